"""Snapshots, restores and clones, on hostPath: each on the node of its volume.

The scheduler does not know on which node a claim's source is. Where a claim waits for its pod, the pod has to be put there; where it
does not (`volumeBindingMode: Immediate`), the nodes' provisioners find out, and the pod follows the volume.
"""

import pytest

from cluster.kubectl import Kubectl, Object
from cluster.objects import (
    claim,
    from_claim,
    from_snapshot,
    image_class,
    of_claim,
    pod,
    snapshot,
    snapshot_class,
    storage_class,
)
from cluster.progress import wait_until
from cluster.story import Story, node_of_volume

SNAPSHOTS_DATA = "/var/lib/tatami/default/.csi/snapshots-data"


def _written(story: Story, node: str = "") -> None:
    """A claim `data`, used by the pod `writer`, with a letter in it."""
    story.make(claim("data"))
    story.run(pod("writer", {"/data": of_claim("data")}, node=node))
    story.k.sh("writer", "echo first > /data/letter; mkdir -p /data/folder; ln /data/letter /data/folder/same")


def _ready(story: Story, name: str) -> Object:
    """Wait until a snapshot can be restored and return its VolumeSnapshotContent."""
    found = story.k.wait("volumesnapshot", name, lambda item: item.get("status", {}).get("readyToUse") is True, 60)
    return Kubectl().get("volumesnapshotcontent", found["status"]["boundVolumeSnapshotContentName"])


def _cut(story: Story, content: Object):
    """Where the data of a snapshot lies."""
    return story.node_of("writer").see(f"{SNAPSHOTS_DATA}/{content['status']['snapshotHandle'].rpartition('.')[2]}")


def test_a_restored_snapshot_has_what_was_there_when_it_was_cut(story: Story):
    _written(story)
    story.make(snapshot("before", "data"))
    content = _ready(story, "before")
    story.k.sh("writer", "echo second > /data/letter; rm -r /data/folder")
    story.make(claim("restored", dataSource=from_snapshot("before")))
    story.run(pod("reader", {"/data": of_claim("restored")}, node=story.node_of("writer").name))
    assert story.k.sh("reader", "cat /data/letter /data/folder/same") == "first\nfirst\n"
    assert story.k.sh("writer", "cat /data/letter") == "second\n"
    # The restored volume is on its own: neither the snapshot nor the source is needed any more.
    data = _cut(story, content)
    assert data.exists()
    story.k.delete("volumesnapshot", "before")
    wait_until("the end of the snapshot's data", lambda: not data.exists(), 30)
    assert not Kubectl().exists("volumesnapshotcontent", content["metadata"]["name"])
    assert story.k.sh("reader", "cat /data/letter") == "first\n"


def test_a_snapshot_outlives_its_volume(story: Story):
    _written(story)
    node = story.node_of("writer")
    story.make(snapshot("before", "data"))
    _ready(story, "before")
    pv = story.bound("data")["metadata"]["name"]
    story.k.delete("pod", "writer")
    story.k.delete("pvc", "data")
    story.k.gone("pv", pv)
    story.make(claim("restored", dataSource=from_snapshot("before")))
    story.run(pod("reader", {"/data": of_claim("restored")}, node=node.name))
    assert story.k.sh("reader", "cat /data/letter") == "first\n"


def test_a_retained_snapshot_can_be_restored_after_its_object_is_gone(story: Story):
    story.make(snapshot_class("keep", "Retain"))
    _written(story)
    story.make(snapshot("before", "data", "keep"))
    content = _ready(story, "before")
    name, handle, data = content["metadata"]["name"], content["status"]["snapshotHandle"], _cut(story, content)
    story.k.delete("volumesnapshot", "before")
    assert Kubectl().exists("volumesnapshotcontent", name)
    assert data.exists()

    # As an admin does who brings it back: a content with the handle, and a snapshot that names it.
    Kubectl().delete("volumesnapshotcontent", name)
    assert data.exists()
    reference = {"name": "again", "namespace": story.namespace}
    again = {
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshotContent",
        "metadata": {"name": f"again-{story.namespace}", "labels": _managed_by(content)},
        "spec": {
            "deletionPolicy": "Delete",
            "driver": content["spec"]["driver"],
            "source": {"snapshotHandle": handle},
            "volumeSnapshotRef": reference,
        },
    }
    taken = {
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshot",
        "metadata": {"name": "again"},
        "spec": {"source": {"volumeSnapshotContentName": f"again-{story.namespace}"}},
    }
    story.make(again, taken)
    _ready(story, "again")
    story.make(claim("restored", dataSource=from_snapshot("again")))
    story.run(pod("reader", {"/data": of_claim("restored")}, node=story.node_of("writer").name))
    assert story.k.sh("reader", "cat /data/letter") == "first\n"
    story.k.delete("volumesnapshot", "again")
    wait_until("the end of the snapshot's data", lambda: not data.exists(), 30)


def _managed_by(content: Object) -> dict[str, str]:
    """The label by which a snapshotter per node knows its contents."""
    return {key: value for key, value in content["metadata"].get("labels", {}).items() if key.endswith("managed-by")}


def test_a_clone_is_a_volume_of_its_own(story: Story):
    _written(story)
    story.make(claim("copy", dataSource=from_claim("data")))
    story.run(pod("reader", {"/data": of_claim("copy")}, node=story.node_of("writer").name))
    assert story.k.sh("reader", "cat /data/letter /data/folder/same; echo changed > /data/letter") == "first\nfirst\n"
    assert story.k.sh("writer", "cat /data/letter") == "first\n"
    story.k.delete("pod", "writer")
    story.k.delete("pvc", "data")
    assert story.k.sh("reader", "cat /data/letter") == "changed\n"


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_a_claim_that_waits_for_no_pod_is_restored_on_the_node_of_its_source_and_the_pod_follows(story: Story, node):
    story.make(storage_class("at-once", volumeBindingMode="Immediate"))
    _written(story, node=node)
    story.make(snapshot("before", "data"))
    _ready(story, "before")
    story.make(claim("restored", storage_class="at-once", dataSource=from_snapshot("before")))
    story.make(claim("copy", storage_class="at-once", dataSource=from_claim("data")))
    for name in ("restored", "copy"):
        assert node_of_volume(story.bound(name, 120)) == [node]
    story.run(pod("reader", {"/restored": of_claim("restored"), "/copy": of_claim("copy")}))
    assert story.node_of("reader").name == node
    assert story.k.sh("reader", "cat /restored/letter /copy/letter") == "first\nfirst\n"


def test_a_claim_of_another_namespace_is_no_source(story: Story):
    _written(story)
    thief = f"{story.namespace}-thief"
    other = Kubectl(thief)
    other.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": thief}})
    try:
        other.apply(claim("copy", dataSource=from_claim("data")))
        wait_until("the service account", lambda: other.exists("serviceaccount", "default"), 30)
        other.apply(pod("reader", {"/data": of_claim("copy")}))
        said = wait_until(
            "a refusal",
            lambda: [event for event in other.events("copy") if "ProvisioningFailed" in event and "not found" in event],
            60,
        )
        assert "data" in said[0]
        assert other.get("pvc", "copy")["status"]["phase"] == "Pending"
        # A dataSourceRef that names the namespace needs a gate that is off: the field is dropped, and the claim is what it was.
    finally:
        other.run("delete", "pods,pvc", "--all", "--grace-period=1", timeout=90)
        other.delete("namespace", thief, wait=False)


def test_an_image_is_captured_under_its_pod_and_restored_and_cloned_larger(story: Story):
    story.make(image_class(), image_class("image-copies", volumeBindingMode="Immediate"))
    story.make(claim("data", size="400Mi", storage_class="images"))
    story.run(pod("writer", {"/data": of_claim("data")}))
    story.k.sh("writer", "echo first > /data/letter; sync")
    story.make(snapshot("before", "data"))
    _ready(story, "before")
    story.k.sh("writer", "echo second > /data/letter; sync")
    story.make(claim("restored", size="600Mi", storage_class="image-copies", dataSource=from_snapshot("before")))
    story.make(claim("copy", size="400Mi", storage_class="image-copies", dataSource=from_claim("data")))
    story.run(pod("reader", {"/restored": of_claim("restored"), "/copy": of_claim("copy")}), 120)
    assert story.k.sh("reader", "cat /restored/letter /copy/letter") == "first\nsecond\n"
    restored, copied = (int(line.split()[1]) for line in story.k.sh("reader", "df -m /restored /copy | tail -n 2").splitlines())
    assert 450 < restored <= 600
    assert 300 < copied <= 400
    story.k.sh("reader", "echo third > /restored/letter; echo third > /copy/letter")
    assert story.k.sh("writer", "cat /data/letter") == "second\n"


def test_raw_blocks_are_captured_and_restored_as_raw_blocks(story: Story):
    story.make(claim("data", size="64Mi", volumeMode="Block"))
    story.run(pod("writer", devices={"/dev/data": of_claim("data")}))
    write = "printf '%-512s' {text} | dd of=/dev/data bs=512 seek=7 conv=fsync,notrunc 2>/dev/null"
    story.k.sh("writer", write.format(text="first"))
    story.make(snapshot("before", "data"))
    _ready(story, "before")
    story.k.sh("writer", write.format(text="second"))
    copies = {"storage_class": "tatami-copies", "size": "64Mi", "dataSource": from_snapshot("before")}
    story.make(claim("restored", volumeMode="Block", **copies))
    story.run(pod("reader", devices={"/dev/data": of_claim("restored")}), 120)
    assert story.k.sh("reader", "dd if=/dev/data bs=512 skip=7 count=1 2>/dev/null").strip() == "first"
    # As a filesystem it could be anything that a tenant wrote there.
    story.make(claim("other-mode", **copies))
    story.refused("PersistentVolumeClaim", "other-mode", "ProvisioningFailed")
    assert story.k.get("pvc", "other-mode")["status"]["phase"] == "Pending"


def test_a_restore_that_is_tried_on_the_wrong_node_says_which_class_and_node_to_use(story: Story):
    _written(story, node="node1")
    story.make(snapshot("before", "data"))
    content = _ready(story, "before")
    story.make(claim("restored", dataSource=from_snapshot("before")))
    story.make(pod("reader", {"/data": of_claim("restored")}, node="node2"))
    said = story.refused("PersistentVolumeClaim", "restored", "ProvisioningFailed", "lives on another node")
    assert "tatami-copies" in said
    assert "volumeBindingMode: Immediate" in said
    assert "than node2" in said
    # Where the message sends the admin: both name the node.
    assert list(_managed_by(content).values()) == ["node1"]
    assert "snapshot.storage.kubernetes.io/managed-by" in said
    assert node_of_volume(story.bound("data")) == ["node1"]
