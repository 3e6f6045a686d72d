"""What everybody does with a volume, on hostPath: claim it, write, lose the pod, find the data, give it back."""

import pytest

from cluster.kubectl import Kubectl
from cluster.objects import claim, of_claim, pod, pod_template, static_volume, storage_class, workload
from cluster.progress import wait_until
from cluster.story import Story, directory_of, node_of_volume


def test_a_deployments_data_outlives_its_pod_and_goes_with_its_claim(story: Story):
    story.make(
        claim("data"),
        workload("Deployment", "writer", 1, pod_template({"/data": of_claim("data")})),
    )
    first = story.pods_ready("writer", 1)[0]["metadata"]["name"]
    story.k.sh(first, "echo kept > /data/letter")
    pv = story.bound("data")
    assert pv["spec"]["storageClassName"] == "tatami"  # the claim names none: it is the default
    assert pv["spec"]["capacity"]["storage"] == "1Gi"
    node = story.node_of(first)
    directory = node.see(directory_of(pv))
    assert (directory / "letter").read_text() == "kept\n"

    story.k.delete("pod", first)
    second = story.pods_ready("writer", 1)[0]["metadata"]["name"]
    assert second != first
    assert story.node_of(second).name == node.name
    assert story.k.sh(second, "cat /data/letter") == "kept\n"

    story.k.delete("deployment", "writer")
    story.k.delete("pvc", "data")
    story.k.gone("pv", pv["metadata"]["name"])
    wait_until("the end of the directory", lambda: not directory.exists(), 10)


def test_a_retained_volume_keeps_its_data_and_can_be_bound_again(story: Story):
    story.make(storage_class("keep", reclaimPolicy="Retain"), claim("first", storage_class="keep"))
    story.run(pod("writer", {"/data": of_claim("first")}))
    story.k.sh("writer", "echo kept > /data/letter")
    pv = story.bound("first")
    name = pv["metadata"]["name"]
    directory = story.node_of("writer").see(directory_of(pv))
    story.k.delete("pod", "writer")
    story.k.delete("pvc", "first")
    story.k.wait("pv", name, lambda found: found["status"]["phase"] == "Released")
    assert (directory / "letter").read_text() == "kept\n"

    story.k.patch("pv", name, {"spec": {"claimRef": None}})
    story.make(claim("second", storage_class="keep", volumeName=name))
    story.run(pod("reader", {"/data": of_claim("second")}))
    assert story.k.sh("reader", "cat /data/letter") == "kept\n"
    assert story.bound("second")["metadata"]["name"] == name

    story.k.patch("pv", name, {"spec": {"persistentVolumeReclaimPolicy": "Delete"}})
    story.k.delete("pod", "reader")
    story.k.delete("pvc", "second")
    story.k.gone("pv", name)
    wait_until("the end of the directory", lambda: not directory.exists(), 10)


def test_each_pod_of_a_statefulset_comes_back_to_its_own_data_on_its_node(story: Story):
    template = pod_template({}, command=["sh", "-c", "hostname >> /data/names; exec sleep 1000000"])
    template["spec"]["containers"][0]["volumeMounts"] = [{"name": "data", "mountPath": "/data"}]
    story.make(workload("StatefulSet", "db", 3, template, serviceName="db", volumeClaimTemplates=[claim("data")]))
    before = {pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in story.pods_ready("db", 3)}

    story.k.delete("pod", *before)
    after = {pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in story.pods_ready("db", 3)}

    assert after == before
    for name, node in after.items():
        assert story.k.sh(name, "cat /data/names") == f"{name}\n{name}\n"
        directory = story.nodes[node].see(directory_of(story.bound(f"data-{name}")))
        assert (directory / "names").read_text() == f"{name}\n{name}\n"
        (directory / "from-the-node").write_text("edited on the node\n")
        assert story.k.sh(name, "cat /data/from-the-node") == "edited on the node\n"


def test_a_claim_in_use_is_deleted_only_when_its_pod_is_gone(story: Story):
    story.make(claim("data"))
    story.run(pod("user", {"/data": of_claim("data")}))
    pv = story.bound("data")
    story.k.delete("pvc", "data", wait=False)
    story.k.wait("pvc", "data", lambda pvc: "deletionTimestamp" in pvc["metadata"])
    story.k.sh("user", "echo still here > /data/letter; cat /data/letter")
    assert story.k.exists("pvc", "data")
    assert Kubectl().get("pv", pv["metadata"]["name"])["status"]["phase"] == "Bound"

    story.k.delete("pod", "user")
    story.k.gone("pvc", "data")
    story.k.gone("pv", pv["metadata"]["name"])


def test_a_reserved_volume_goes_to_the_claim_that_it_names_and_to_no_other(story: Story):
    node = story.nodes["node1"]
    node.see("/var/lib/tatami/default/reserved").mkdir(exist_ok=True)
    reference = {
        "claimRef": {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "namespace": story.namespace, "name": "mine"}
    }
    story.make(static_volume("reserved", "reserved", node="node1", storage_class="by-hand", **reference))
    story.make(claim("another", storage_class="by-hand"))
    story.refused("PersistentVolumeClaim", "another", "not found")
    story.make(claim("mine", storage_class="by-hand"))
    assert story.bound("mine")["metadata"]["name"] == "reserved"
    assert story.k.get("pvc", "another")["status"]["phase"] == "Pending"
    story.run(pod("user", {"/data": of_claim("mine")}))
    story.k.sh("user", "echo mine > /data/letter")
    assert node.see("/var/lib/tatami/default/reserved/letter").read_text() == "mine\n"
    assert story.node_of("user").name == "node1"


def test_a_static_volume_shows_a_directory_that_was_there_and_deletion_leaves_it(story: Story):
    directory = story.nodes["node2"].see("/var/lib/tatami/default/photographs/1998")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "a.txt").write_text("from before\n")
    story.make(static_volume("photographs", "photographs/1998", node="node2"))
    story.make(claim("album", storage_class="", volumeName="photographs"))
    story.run(pod("viewer", {"/data": of_claim("album")}))
    assert story.node_of("viewer").name == "node2"
    assert story.k.sh("viewer", "cat /data/a.txt; echo new > /data/b.txt") == "from before\n"
    story.k.delete("pod", "viewer")
    story.k.delete("pvc", "album")
    story.k.delete("pv", "photographs")
    assert (directory / "b.txt").read_text() == "new\n"


def test_a_static_volume_of_a_directory_that_is_not_there_says_so(story: Story):
    story.make(static_volume("nowhere", "not/there", node="node1"))
    story.make(claim("data", storage_class="", volumeName="nowhere"), pod("user", {"/data": of_claim("data")}))
    story.refused("Pod", "user", "NotFound", "not/there")


def test_the_mount_options_of_a_class_are_those_of_the_mount(story: Story):
    story.make(storage_class("options", mountOptions=["noexec", "noatime"]), claim("data", storage_class="options"))
    story.run(pod("user", {"/data": of_claim("data")}))
    options = story.k.sh("user", "grep ' /data ' /proc/mounts").split()[3].split(",")
    assert {"noexec", "noatime"} <= set(options)
    story.k.sh("user", "echo '#!/bin/sh' > /data/program; chmod +x /data/program")
    with pytest.raises(RuntimeError, match=r"[Pp]ermission denied"):
        story.k.exec("user", "/data/program")


def test_a_wrong_mount_option_is_named_where_the_admin_looks(story: Story):
    story.make(storage_class("wrong", mountOptions=["noexecc"]), claim("data", storage_class="wrong"))
    story.make(pod("user", {"/data": of_claim("data")}))
    event = story.refused("PersistentVolumeClaim", "data", "ProvisioningFailed", "noexecc")
    assert "noexec" in event.replace("noexecc", "")  # what is allowed
    assert story.volumes() == []


def test_pods_are_pinned_to_the_node_that_has_their_volume(story: Story):
    story.make(claim("data"))
    story.run(pod("first", {"/data": of_claim("data")}, node="node2"))
    assert node_of_volume(story.bound("data")) == ["node2"]
    story.k.delete("pod", "first")
    story.run(pod("second", {"/data": of_claim("data")}))
    assert story.node_of("second").name == "node2"
    story.make(pod("elsewhere", {"/data": of_claim("data")}, node="node1"))
    story.refused("Pod", "elsewhere", "FailedScheduling")
