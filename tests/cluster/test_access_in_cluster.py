"""Who may use a volume, how, and as whom, on hostPath."""

import pytest

from cluster.kubectl import ready
from cluster.objects import claim, of_claim, pod
from cluster.story import Story, directory_of

USER = {"runAsUser": 1000, "runAsGroup": 1000, "runAsNonRoot": True}


def test_read_write_once_lets_in_all_pods_of_one_node(story: Story):
    story.make(claim("data"))
    story.run(pod("one", {"/data": of_claim("data")}))
    story.run(pod("two", {"/data": of_claim("data")}))
    assert story.node_of("one").name == story.node_of("two").name
    story.k.sh("one", "echo from one > /data/letter")
    assert story.k.sh("two", "cat /data/letter") == "from one\n"


def test_read_write_once_pod_lets_in_one_pod_and_then_the_next(story: Story):
    story.make(claim("data", mode="ReadWriteOncePod"))
    story.run(pod("one", {"/data": of_claim("data")}))
    story.make(pod("two", {"/data": of_claim("data")}))
    story.refused("Pod", "two", "FailedScheduling", "ReadWriteOncePod")
    assert not ready(story.k.get("pod", "two"))
    story.k.sh("one", "echo from one > /data/letter")
    story.k.delete("pod", "one")
    story.k.wait("pod", "two", ready)
    assert story.k.sh("two", "cat /data/letter") == "from one\n"


@pytest.mark.parametrize("mode", ["ReadWriteMany", "ReadOnlyMany"])
def test_modes_of_many_nodes_are_refused_on_a_pool_of_one_node(story: Story, mode):
    story.make(claim("data", mode=mode), pod("user", {"/data": of_claim("data")}))
    story.refused("PersistentVolumeClaim", "data", "ProvisioningFailed", "shared = true")
    assert story.volumes() == []


def test_a_user_writes_by_the_group_of_its_pod(story: Story):
    story.make(claim("data"))
    security = {**USER, "fsGroup": 2000}
    story.run(pod("user", {"/data": of_claim("data")}, securityContext=security))
    story.k.sh("user", "echo mine > /data/letter; mkdir /data/folder; echo deep > /data/folder/letter")
    assert story.k.sh("user", "stat -c '%u %g' /data/letter /data/folder/letter").split() == ["1000", "2000"] * 2
    directory = story.node_of("user").see(directory_of(story.bound("data")))
    assert directory.stat().st_gid == 2000
    assert directory.stat().st_mode & 0o2070 == 0o2070


def test_a_user_without_a_group_cannot_write_to_roots_volume(story: Story):
    story.make(claim("data"))
    story.run(pod("user", {"/data": of_claim("data")}, securityContext=USER))
    with pytest.raises(RuntimeError, match="Permission denied"):
        story.k.sh("user", "echo mine > /data/letter")


def test_a_sub_path_shows_a_part_of_the_volume(story: Story):
    story.make(claim("data"))
    story.run(pod("whole", {"/data": of_claim("data")}))
    story.k.sh("whole", "mkdir -p /data/a/b /data/other; echo deep > /data/a/b/letter")
    story.run(pod("part", {"/data": of_claim("data")}, mount={"subPath": "a/b"}))
    assert story.k.sh("part", "ls /data; cat /data/letter").split() == ["letter", "deep"]
    story.k.sh("part", "echo back > /data/answer")
    assert story.k.sh("whole", "cat /data/a/b/answer") == "back\n"


def test_a_sub_path_that_is_a_symlink_leads_nowhere_outside(story: Story):
    story.make(claim("data"))
    story.run(pod("whole", {"/data": of_claim("data")}))
    story.k.sh("whole", "ln -s /etc /data/outside")
    story.make(pod("part", {"/data": of_claim("data")}, mount={"subPath": "outside"}))
    story.refused("Pod", "part", "Failed", "subPath")
    assert not ready(story.k.get("pod", "part"))


@pytest.mark.parametrize("how", ["claim", "mount"])
def test_a_read_only_pod_reads_what_another_writes_and_cannot_write(story: Story, how):
    story.make(claim("data"))
    story.run(pod("writer", {"/data": of_claim("data")}))
    volume = of_claim("data", read_only=how == "claim")
    story.run(pod("reader", {"/data": volume}, mount={"readOnly": True} if how == "mount" else None))
    story.k.sh("writer", "echo hello > /data/letter")
    assert story.k.sh("reader", "cat /data/letter") == "hello\n"
    with pytest.raises(RuntimeError, match="Read-only file system"):
        story.k.sh("reader", "echo no > /data/letter")
