"""What everybody does with a volume, on NFS: one share, two nodes whose kernel mounts it, the driver from its chart."""

import pytest

from cluster.kubectl import Kubectl, ready
from cluster.nfs_objects import (
    CLASS,
    claim,
    directory_of,
    on_different_nodes,
    pod,
    pod_template,
    static_volume,
    storage_class,
)
from cluster.objects import from_claim, of_claim, workload
from cluster.progress import wait_until
from cluster.share import Share
from cluster.story import Story

USER = {"runAsUser": 1000, "runAsGroup": 1000, "runAsNonRoot": True}


def test_a_deployments_data_outlives_its_pod_and_goes_with_its_claim(story: Story, share: Share):
    story.make(claim("data"), workload("Deployment", "writer", 1, pod_template({"/data": of_claim("data")})))
    first = story.pods_ready("writer", 1)[0]["metadata"]["name"]
    story.k.sh(first, "echo kept > /data/letter")
    pv = story.bound("data")
    assert (pv["spec"]["storageClassName"], pv["spec"]["capacity"]["storage"]) == (CLASS, "1Gi")
    directory = directory_of(pv)
    assert share.sh('cat "$1/letter"', directory) == "kept\n"

    story.k.delete("pod", first)
    second = story.pods_ready("writer", 1)[0]["metadata"]["name"]
    assert second != first
    assert story.k.sh(second, "cat /data/letter") == "kept\n"

    story.k.delete("deployment", "writer")
    story.k.delete("pvc", "data")
    story.k.gone("pv", pv["metadata"]["name"])
    wait_until("the end of the directory", lambda: not share.exists(directory), 10)


def test_a_retained_volume_keeps_its_data_and_can_be_bound_again(story: Story, share: Share):
    story.make(storage_class("keep-nfs", reclaimPolicy="Retain"), claim("first", storage_class="keep-nfs"))
    story.run(pod("writer", {"/data": of_claim("first")}))
    story.k.sh("writer", "echo kept > /data/letter")
    pv = story.bound("first")
    name, directory = pv["metadata"]["name"], directory_of(pv)
    story.k.delete("pod", "writer", now=True)
    story.k.delete("pvc", "first")
    story.k.wait("pv", name, lambda found: found["status"]["phase"] == "Released")
    assert share.sh('cat "$1/letter"', directory) == "kept\n"

    story.k.patch("pv", name, {"spec": {"claimRef": None, "persistentVolumeReclaimPolicy": "Delete"}})
    story.make(claim("second", storage_class="keep-nfs", volumeName=name))
    story.run(pod("reader", {"/data": of_claim("second")}))
    assert story.k.sh("reader", "cat /data/letter") == "kept\n"
    story.k.delete("pod", "reader", now=True)
    story.k.delete("pvc", "second")
    story.k.gone("pv", name)
    wait_until("the end of the directory", lambda: not share.exists(directory), 10)


def test_replicas_on_two_nodes_share_one_volume(story: Story, share: Share):
    template = pod_template({"/data": of_claim("data")}, affinity=on_different_nodes("web"))
    story.make(claim("data"), workload("Deployment", "web", 2, template))
    one, two = story.pods_ready("web", 2)
    assert {one["spec"]["nodeName"], two["spec"]["nodeName"]} == {"nfs1", "nfs2"}
    for number, found in enumerate((one, two)):
        story.k.sh(found["metadata"]["name"], f"echo from {number} > /data/{number}")
    for found in (one, two):
        # Close-to-open: what was closed on one node is seen by whoever opens it afterwards on the other.
        assert story.k.sh(found["metadata"]["name"], "cat /data/0 /data/1") == "from 0\nfrom 1\n"


def test_each_pod_of_a_statefulset_comes_back_to_its_own_two_volumes(story: Story, share: Share):
    script = "hostname >> /data/names; hostname >> /log/names; exec sleep 1000000"
    template = pod_template({}, command=["sh", "-c", script])
    template["spec"]["containers"][0]["volumeMounts"] = [
        {"name": "data", "mountPath": "/data"},
        {"name": "log", "mountPath": "/log"},
    ]
    claims = [claim("data", mode="ReadWriteOnce"), claim("log", mode="ReadWriteOnce")]
    parallel = {"podManagementPolicy": "Parallel"}
    story.make(workload("StatefulSet", "db", 2, template, serviceName="db", volumeClaimTemplates=claims, **parallel))
    names = [found["metadata"]["name"] for found in story.pods_ready("db", 2)]
    story.k.delete("pod", *names)
    assert [found["metadata"]["name"] for found in story.pods_ready("db", 2)] == names
    for name in names:
        assert story.k.sh(name, "cat /data/names /log/names") == f"{name}\n" * 4
    handles = {story.bound(f"{what}-{name}")["spec"]["csi"]["volumeHandle"] for what in ("data", "log") for name in names}
    assert len(handles) == 4


def test_read_write_once_holds_back_the_second_node_until_the_first_lets_go(story: Story, share: Share):
    story.make(claim("data", mode="ReadWriteOnce"))
    story.run(pod("one", {"/data": of_claim("data")}, node="nfs1"))
    story.k.sh("one", "echo from one > /data/letter")
    story.make(pod("two", {"/data": of_claim("data")}, node="nfs2"))
    story.refused("Pod", "two", "FailedAttachVolume", "Multi-Attach")
    assert not ready(story.k.get("pod", "two"))
    story.k.delete("pod", "one", now=True)
    story.k.wait("pod", "two", ready)
    assert story.k.sh("two", "cat /data/letter") == "from one\n"


def test_an_attachment_of_a_volume_that_another_node_has_is_refused_by_the_name_of_that_node(story: Story, share: Share):
    """Kubernetes itself looks before it attaches; when it is wrong, the driver's record holds."""
    story.make(claim("data", mode="ReadWriteOnce"))
    story.run(pod("one", {"/data": of_claim("data")}, node="nfs1"))
    name = story.bound("data")["metadata"]["name"]
    forced = {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "VolumeAttachment",
        "metadata": {"name": f"forced-{name}"},
        "spec": {"attacher": "nfs.csi.tatami.dev", "nodeName": "nfs2", "source": {"persistentVolumeName": name}},
    }
    Kubectl().create(forced)
    try:
        refused = Kubectl().wait("volumeattachment", f"forced-{name}", lambda item: "attachError" in item.get("status", {}))
        message = refused["status"]["attachError"]["message"]
        assert "FailedPrecondition" in message
        assert "nfs1" in message
        assert refused["status"]["attached"] is False
    finally:
        Kubectl().delete("volumeattachment", f"forced-{name}")


def test_read_write_once_pod_lets_in_one_pod_and_then_the_next_on_another_node(story: Story, share: Share):
    story.make(claim("data", mode="ReadWriteOncePod"))
    story.run(pod("one", {"/data": of_claim("data")}, node="nfs1"))
    story.k.sh("one", "echo from one > /data/letter")
    story.make(pod("two", {"/data": of_claim("data")}, node="nfs2"))
    story.refused("Pod", "two", "FailedScheduling", "ReadWriteOncePod")
    story.k.delete("pod", "one", now=True)
    story.k.wait("pod", "two", ready)
    assert story.k.sh("two", "cat /data/letter") == "from one\n"


def test_read_only_many_is_read_on_both_nodes_and_written_on_none(story: Story, share: Share):
    story.make(claim("source"))
    story.run(pod("writer", {"/data": of_claim("source")}))
    story.k.sh("writer", "echo fixed > /data/letter")
    story.make(claim("data", mode="ReadOnlyMany", dataSource=from_claim("source")))
    for node in ("nfs1", "nfs2"):
        story.make(pod(f"reader-{node}", {"/data": of_claim("data")}, node=node))
    for node in ("nfs1", "nfs2"):
        story.k.wait("pod", f"reader-{node}", ready)
        assert story.k.sh(f"reader-{node}", "cat /data/letter") == "fixed\n"
        with pytest.raises(RuntimeError, match="Read-only file system"):
            story.k.sh(f"reader-{node}", "echo no > /data/letter")


def test_the_mount_options_of_a_class_are_those_of_the_mount(story: Story, share: Share):
    story.make(storage_class("options-nfs", mountOptions=["noexec", "vers=4.1"]), claim("data", storage_class="options-nfs"))
    story.run(pod("user", {"/data": of_claim("data")}))
    source, _, kind, options, *_ = story.k.sh("user", "grep ' /data ' /proc/mounts").split()
    assert source.startswith(f"{share.address}:/srv/share/")
    assert kind == "nfs4"
    assert {"noexec", "vers=4.1", "hard"} <= set(options.split(","))


def test_a_wrong_mount_option_is_named_where_the_admin_looks(story: Story, share: Share):
    story.make(storage_class("wrong-nfs", mountOptions=["nconect=2"]), claim("data", storage_class="wrong-nfs"))
    event = story.refused("PersistentVolumeClaim", "data", "ProvisioningFailed", "nconect")
    assert "nconnect" in event  # what was probably meant
    assert story.volumes() == []


def test_a_user_writes_by_the_group_of_its_pod(story: Story, share: Share):
    story.make(claim("data"))
    story.run(pod("user", {"/data": of_claim("data")}, securityContext={**USER, "fsGroup": 2000}))
    story.k.sh("user", "echo mine > /data/letter; mkdir /data/folder; echo deep > /data/folder/letter")
    assert story.k.sh("user", "stat -c '%u %g' /data/letter /data/folder/letter").split() == ["1000", "2000"] * 2
    assert share.sh('stat -c "%g %a" "$1"', directory_of(story.bound("data"))) == "2000 2775\n"


def test_a_user_without_a_group_cannot_write_to_roots_volume(story: Story, share: Share):
    story.make(claim("data"))
    story.run(pod("user", {"/data": of_claim("data")}, securityContext=USER))
    with pytest.raises(RuntimeError, match="Permission denied"):
        story.k.sh("user", "echo mine > /data/letter")


def test_a_sub_path_shows_a_part_of_the_volume(story: Story, share: Share):
    story.make(claim("data"))
    story.run(pod("whole", {"/data": of_claim("data")}, node="nfs1"))
    story.k.sh("whole", "mkdir -p /data/a/b /data/other; echo deep > /data/a/b/letter")
    story.run(pod("part", {"/data": of_claim("data")}, node="nfs2", mount={"subPath": "a/b"}))
    assert story.k.sh("part", "ls /data; cat /data/letter").split() == ["letter", "deep"]
    story.k.sh("part", "echo back > /data/answer")
    assert story.k.sh("whole", "cat /data/a/b/answer") == "back\n"


def test_a_static_volume_shows_a_directory_that_was_there_and_deletion_leaves_it(story: Story, share: Share):
    directory = f"photographs-{story.namespace}/1998"
    share.sh('mkdir -p "$1"; echo from before >"$1/a.txt"', directory)
    name = f"photographs-{story.namespace}"
    story.make(static_volume(name, directory), claim("album", storage_class="", volumeName=name))
    story.run(pod("viewer", {"/data": of_claim("album")}))
    assert story.k.sh("viewer", "cat /data/a.txt; echo new > /data/b.txt") == "from before\n"
    story.k.delete("pod", "viewer", now=True)
    story.k.delete("pvc", "album")
    story.k.delete("pv", name)
    assert share.sh('cat "$1/b.txt"; rm -r "${1%/*}"', directory) == "new\n"


def test_an_inline_volume_lives_as_long_as_its_pod(story: Story, share: Share):
    inline = {"csi": {"driver": "nfs.csi.tatami.dev", "volumeAttributes": {"size": "1Gi", "pool": "default"}}}
    story.run(pod("user", {"/data": inline}))
    story.k.sh("user", f"echo mine > /data/{story.namespace}")
    assert share.sh('find . -name "$1" | wc -l', story.namespace) == "1\n"
    story.k.delete("pod", "user", now=True)
    wait_until("the end of the data", lambda: share.sh('find . -name "$1" | wc -l', story.namespace) == "0\n", 30)
