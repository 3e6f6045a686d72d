"""Where volumes and their pods land, on hostPath: node1 has a disk of 10 GiB, node2 one of 20."""

import contextlib
import json
import os
from collections.abc import Iterator

import pytest

from cluster.driver import POOL
from cluster.kubectl import Kubectl, ready
from cluster.nodes import Node
from cluster.objects import claim, of_claim, pod
from cluster.progress import wait_until
from cluster.story import Story, node_of_volume

NODE1_FIRST = {
    "nodeAffinity": {
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {
                "weight": 100,
                "preference": {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": ["node1"]}]},
            }
        ]
    }
}


@contextlib.contextmanager
def _filled(node: Node, gibibytes: int) -> Iterator[None]:
    """Take room on a node's disk, as another tenant of it would."""
    file = node.see(POOL.parent / "taken")
    with file.open("wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, gibibytes << 30)
    try:
        yield
    finally:
        file.unlink()


def _known_room(node: str) -> int:
    """What Kubernetes believes to be free in the pool of a node, in bytes."""
    found = Kubectl("tatami-system").find("csistoragecapacities")
    mine = [item for item in found if node in str(item.get("nodeTopology")) and item["storageClassName"] == "tatami"]
    return _bytes(mine[0]["capacity"])


def _bytes(quantity: str) -> int:
    units = {"Ki": 10, "Mi": 20, "Gi": 30}
    return int(quantity[:-2]) << units[quantity[-2:]] if quantity[-2:] in units else int(quantity)


def _room(node: Node) -> int:
    """What the pool of a node can still promise, in bytes: reckoned from its disk and its records, without the driver."""
    disk = os.statvfs(node.see(POOL))
    records = [json.loads(file.read_text()) for file in node.see(POOL / ".csi" / "volumes").glob("[!.]*.json")]
    promised = sum(record["capacity_bytes"] for record in records)
    return min(disk.f_bavail, disk.f_blocks - promised // disk.f_frsize) * disk.f_frsize


def _wait_until_published(node: Node) -> None:
    wait_until(f"the room of {node.name}", lambda: abs(_known_room(node.name) - _room(node)) < 128 << 20, 90)


def test_the_room_of_each_node_is_published(story: Story):
    for node in story.nodes.values():
        _wait_until_published(node)


def test_a_volume_too_large_for_one_node_lands_on_the_other(story: Story):
    story.make(claim("large", size="15Gi"))
    story.run(pod("user", {"/data": of_claim("large")}, affinity=NODE1_FIRST))
    assert story.node_of("user").name == "node2"
    assert node_of_volume(story.bound("large")) == ["node2"]


def test_a_volume_too_large_for_all_nodes_keeps_its_pod_waiting_and_says_why(story: Story):
    story.make(claim("huge", size="500Gi"), pod("user", {"/data": of_claim("huge")}))
    story.refused("Pod", "user", "FailedScheduling", "did not have enough free storage")
    assert story.volumes() == []


def test_a_pod_that_fits_nowhere_runs_as_soon_as_there_is_room(story: Story):
    node = story.nodes["node2"]
    with _filled(node, 12):
        # Published every so often (driver.py: CAPACITY_SECONDS), and when a volume comes or goes.
        wait_until("less room on node2", lambda: _known_room("node2") < 9 << 30, 90)
        story.make(claim("large", size="15Gi"), pod("user", {"/data": of_claim("large")}))
        story.refused("Pod", "user", "FailedScheduling", "did not have enough free storage")
    story.k.wait("pod", "user", lambda item: item["status"]["phase"] == "Running", 120)
    assert story.node_of("user").name == "node2"


def test_a_node_that_turns_out_to_be_full_costs_a_second_try_not_a_stuck_claim(story: Story):
    for attempt in range(4):
        name = f"data-{attempt}"
        with _filled(story.nodes["node1"], 6):
            story.make(claim(name, size="7Gi"))
            story.run(pod(name, {"/data": of_claim(name)}, affinity=NODE1_FIRST), 120)
            assert story.node_of(name).name == "node2"
            tried = [event for event in story.k.events(name) if "ProvisioningFailed" in event and "ResourceExhausted" in event]
        if tried:
            return
        # Between the two the provisioner had told the scheduler of it: no harm, and not this story.
        story.k.delete("pod", name)
        story.k.delete("pvc", name)
        wait_until("node1 to have room again", lambda: _known_room("node1") > 8 << 30, 90)
    pytest.fail("the scheduler knew of the full node each time")


def test_the_room_that_is_published_is_what_a_claim_can_have(story: Story):
    story.make(claim("data", size="3Gi"))
    story.run(pod("user", {"/data": of_claim("data")}, node="node1"))
    _wait_until_published(story.nodes["node1"])  # less what was just promised, although nothing is written yet
    room = _known_room("node1")
    story.make(claim("rest", size=str(room - (160 << 20))))  # an XFS takes a little more for itself meanwhile
    story.run(pod("greedy", {"/data": of_claim("rest")}, node="node1"))
    wait_until("no room", lambda: _known_room("node1") < 512 << 20, 90)
    story.make(claim("late", size="1Gi"), pod("late", {"/data": of_claim("late")}, node="node1"))
    story.refused("Pod", "late", "FailedScheduling", "did not have enough free storage")
    story.k.delete("pod", "greedy", now=True)
    story.k.delete("pvc", "rest")
    story.k.wait("pod", "late", ready, 120)
