"""Snapshots, restores, clones, groups, growth and changes of a volume, on NFS: any node can mount what comes out."""

from cluster.kubectl import Kubectl, Object
from cluster.nfs_objects import claim, directory_of, group_snapshot, pod, snapshot
from cluster.objects import from_claim, from_snapshot, of_claim
from cluster.progress import wait_until
from cluster.share import Share
from cluster.story import Story

SNAPSHOTS_DATA = ".csi/snapshots-data"


def _written(story: Story, name: str = "data") -> str:
    """Make a claim, and a pod that writes a letter to it; returns the pod's name."""
    story.make(claim(name))
    writer = story.run(pod(f"writer-{name}", {"/data": of_claim(name)}, node="nfs1"))
    story.k.sh(writer, f"echo first of {name} > /data/letter; mkdir -p /data/folder; ln /data/letter /data/folder/same")
    return writer


def _ready(story: Story, name: str) -> Object:
    """Wait until a snapshot can be restored and return its VolumeSnapshotContent."""
    found = story.k.wait("volumesnapshot", name, lambda item: item.get("status", {}).get("readyToUse") is True, 60)
    return Kubectl().get("volumesnapshotcontent", found["status"]["boundVolumeSnapshotContentName"])


def test_a_restored_snapshot_has_what_was_there_when_it_was_cut_and_both_go_with_their_objects(story: Story, share: Share):
    writer = _written(story)
    story.make(snapshot("before", "data"))
    content = _ready(story, "before")
    cut = f"{SNAPSHOTS_DATA}/{content['status']['snapshotHandle'].rpartition('.')[2]}"
    assert share.exists(cut)
    story.k.sh(writer, "echo second > /data/letter; rm -r /data/folder")
    story.make(claim("restored", dataSource=from_snapshot("before")))
    story.run(pod("reader", {"/data": of_claim("restored")}, node="nfs2"))
    assert story.k.sh("reader", "cat /data/letter /data/folder/same") == "first of data\n" * 2
    assert story.k.sh(writer, "cat /data/letter") == "second\n"
    story.k.delete("volumesnapshot", "before")
    wait_until("the end of the snapshot's data", lambda: not share.exists(cut), 30)
    assert not Kubectl().exists("volumesnapshotcontent", content["metadata"]["name"])
    assert story.k.sh("reader", "cat /data/letter") == "first of data\n"


def test_a_clone_is_a_volume_of_its_own_and_shares_its_blocks_on_the_server(story: Story, share: Share):
    writer = _written(story)
    story.k.sh(writer, "dd if=/dev/urandom of=/data/blob bs=1M count=16 2>/dev/null; sync")
    story.make(claim("copy", dataSource=from_claim("data")))
    story.run(pod("reader", {"/data": of_claim("copy")}, node="nfs2"))
    sums = {story.k.sh(name, "md5sum /data/blob") for name in (writer, "reader")}
    assert len(sums) == 1
    blobs = [f"{directory_of(story.bound(name))}/blob" for name in ("data", "copy")]
    # Where a file's blocks lie, from the server's own file system: the same for both, so nothing was copied.
    places = {share.sh('xfs_bmap "$1" | grep -v :$', blob) for blob in blobs}
    assert len(places) == 1
    story.k.sh("reader", "echo changed > /data/letter")
    assert story.k.sh(writer, "cat /data/letter") == "first of data\n"


def test_a_group_is_cut_in_one_go_and_each_member_is_restored(story: Story, share: Share):
    names = ("left", "right")
    for name in names:
        _written(story, name)
        story.k.patch("pvc", name, {"metadata": {"labels": {"group": "both"}}})
    story.make(group_snapshot("pair", {"group": "both"}))
    story.k.wait("volumegroupsnapshot", "pair", lambda item: item.get("status", {}).get("readyToUse") is True, 90)
    members = {item["spec"]["source"]["persistentVolumeClaimName"]: item for item in story.k.find("volumesnapshots")}
    assert set(members) == set(names)
    for name in names:
        story.k.sh(f"writer-{name}", "echo second > /data/letter")
        story.make(claim(f"{name}-again", dataSource=from_snapshot(members[name]["metadata"]["name"])))
    story.run(pod("reader", {f"/{name}": of_claim(f"{name}-again") for name in names}, node="nfs2"))
    assert story.k.sh("reader", "cat /left/letter /right/letter") == "first of left\nfirst of right\n"
    story.k.delete("volumegroupsnapshot", "pair")
    story.k.gone("volumegroupsnapshot", "pair")
    wait_until("the end of the members", lambda: not story.k.find("volumesnapshots"), 60)


def test_a_volume_grows_while_it_is_used(story: Story, share: Share):
    writer = _written(story)
    story.k.patch("pvc", "data", {"spec": {"resources": {"requests": {"storage": "2Gi"}}}})
    story.k.wait("pvc", "data", lambda pvc: pvc["status"]["capacity"]["storage"] == "2Gi")
    assert story.bound("data")["spec"]["capacity"]["storage"] == "2Gi"
    assert story.k.sh(writer, "cat /data/letter") == "first of data\n"


def test_an_expansion_that_cannot_be_says_why_and_a_smaller_request_takes_it_back(story: Story, share: Share):
    writer = _written(story)
    story.k.patch("pvc", "data", {"spec": {"resources": {"requests": {"storage": "900Gi"}}}})
    story.refused("PersistentVolumeClaim", "data", "VolumeResizeFailed", "OutOfRange", "pool default has")
    assert story.k.get("pvc", "data")["status"]["capacity"]["storage"] == "1Gi"
    story.k.patch("pvc", "data", {"spec": {"resources": {"requests": {"storage": "2Gi"}}}})
    found = story.k.wait("pvc", "data", lambda pvc: pvc["status"]["capacity"]["storage"] == "2Gi", 120)
    assert not found["status"].get("allocatedResourceStatuses")
    assert story.bound("data")["spec"]["capacity"]["storage"] == "2Gi"
    assert story.k.sh(writer, "echo second >> /data/letter; cat /data/letter") == "first of data\nsecond\n"


def test_a_volume_that_is_there_is_given_another_attributes_class(story: Story, share: Share):
    writer = _written(story)
    pv, directory = story.bound("data")["metadata"]["name"], directory_of(story.bound("data"))
    story.k.patch("pvc", "data", {"spec": {"volumeAttributesClassName": "tatami-nfs-retain"}})
    story.k.wait("pvc", "data", lambda pvc: pvc["status"].get("currentVolumeAttributesClassName") == "tatami-nfs-retain")
    story.k.delete("pod", writer, now=True)
    story.k.delete("pvc", "data")
    story.k.gone("pv", pv)  # the class of the volume is Delete; the data stays by onDelete: retain
    assert share.sh('cat "$1/letter"; rm -r "$1"', directory) == "first of data\n"


def test_a_raw_block_device_over_nfs_keeps_what_is_written_and_goes_to_another_node(story: Story, share: Share):
    story.make(claim("disk", mode="ReadWriteOnce", size="64Mi", volumeMode="Block"))
    for name, node in (("one", "nfs1"), ("two", "nfs2")):
        story.run(pod(name, devices={"/dev/disk": of_claim("disk")}, node=node), 120)
        if name == "one":
            story.k.sh(name, "echo raw letter | dd of=/dev/disk bs=4096 seek=100 conv=fsync,sync 2>/dev/null")
            story.k.delete("pod", name, now=True)
    assert story.k.sh("two", "dd if=/dev/disk bs=4096 skip=100 count=1 2>/dev/null | head -c 11") == "raw letter\n"
