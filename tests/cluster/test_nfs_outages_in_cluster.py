"""Controllers and node pods of the driver, kubelets, nodes and the server go and come back under a writer that checks its data, on NFS."""

from collections.abc import Callable

import pytest

from cluster.driver import NFS_NAMESPACE
from cluster.kubectl import Kubectl, Object
from cluster.nfs_objects import claim, pod
from cluster.objects import of_claim
from cluster.progress import PATIENCE, wait_until
from cluster.share import Share
from cluster.story import Story
from cluster.writer import COMMAND, Writer

GAP = 20 * PATIENCE  # seconds; guests are slow where the machine is busy, and a mount that hangs does not end by itself
REBOOT = 60 * PATIENCE  # seconds that a server is away for, the time in which its clients take back what they had open included


@pytest.fixture
def writer(story: Story, share: Share) -> Writer:
    story.make(claim("data"))
    return Writer(
        story, story.run(pod("writer", {"/data": of_claim("data")}, node="nfs2", command=COMMAND, restartPolicy="Never"))
    )


def _pods(component: str) -> list[Object]:
    return Kubectl(NFS_NAMESPACE).find("pods", f"app.kubernetes.io/component={component}")


def _leaders() -> dict[str, str]:
    """Return who leads: sidecar's lease -> node."""
    return {item["metadata"]["name"]: item["spec"]["holderIdentity"] for item in Kubectl(NFS_NAMESPACE).find("leases")}


def test_the_other_controller_takes_over_while_volumes_are_asked_for(story: Story, writer: Writer):
    leases = wait_until("leaders", lambda: _leaders() if len(_leaders()) >= 4 else None, 60)
    lease = next(name for name in leases if "attacher" not in name and "resizer" not in name and "snapshotter" not in name)
    leader = leases[lease]
    pod_of_leader = next(item["metadata"]["name"] for item in _pods("nfs-controller") if item["spec"]["nodeName"] == leader)
    before = writer.written()

    story.make(*(claim(f"early-{number}") for number in range(3)))
    Kubectl(NFS_NAMESPACE).run("cordon", leader)  # its successor waits, so that it is the other one who has to do it
    try:
        Kubectl(NFS_NAMESPACE).run("delete", "pod", pod_of_leader, "--force", "--grace-period=0")
        story.make(*(claim(f"late-{number}") for number in range(3)))
        handles = {
            story.bound(f"{when}-{number}", 120)["spec"]["csi"]["volumeHandle"]
            for when in ("early", "late")
            for number in range(3)
        }
        assert len(handles) == 6
        assert _leaders()[lease] != leader
        story.run(pod("another", {"/data": of_claim("data"), "/new": of_claim("late-0")}, node=_other(leader)), 120)
        assert story.k.sh("another", "head -n 1 /data/log").startswith("1 ")
    finally:
        Kubectl(NFS_NAMESPACE).run("uncordon", leader)
    writer.check(before, GAP)
    wait_until("two controllers", lambda: _ready_pods("nfs-controller") == 2, 120)


def _node_pod_replaced(_share: Share) -> None:
    first = next(item["metadata"]["name"] for item in _pods("nfs-node") if item["spec"]["nodeName"] == "nfs2")
    Kubectl(NFS_NAMESPACE).delete("pod", first)


def _kubelets_killed(share: Share) -> None:
    for node in share.nodes:
        node.restart_kubelet()


@pytest.mark.parametrize("outage", [_node_pod_replaced, _kubelets_killed], ids=["node-pod-replaced", "kubelet-kill-9"])
def test_a_writer_writes_on_and_new_pods_find_their_volumes(
    story: Story, share: Share, writer: Writer, outage: Callable[[Share], None]
):
    before = writer.written()
    outage(share)
    wait_until("the nodes", lambda: all(node.ready(story.k) for node in share.nodes), 60)
    story.make(claim("new"))
    story.run(pod("another", {"/data": of_claim("data"), "/new": of_claim("new")}, node="nfs2"), 120)
    assert story.k.sh("another", "echo fresh > /new/letter; head -n 1 /data/log; cat /new/letter").endswith("\nfresh\n")
    writer.check(before, GAP)


def test_a_driver_that_is_killed_comes_back_and_goes_on(story: Story, share: Share, writer: Writer):
    before = writer.written()
    for node in share.nodes:
        node.machine.kill("tatami", "serve")  # node service and controller, on both nodes, at once
    story.make(claim("new"))
    story.run(pod("another", {"/data": of_claim("data"), "/new": of_claim("new")}, node="nfs2"), 180)
    assert story.k.sh("another", "echo fresh > /new/letter; cat /new/letter") == "fresh\n"
    writer.check(before, GAP)


def test_a_node_that_is_switched_off_comes_back_with_its_volumes(story: Story, share: Share):
    starts = "date >> /own/starts; date >> /data/starts; sync; exec sleep 1000000"
    story.make(claim("data"), claim("own", mode="ReadWriteOnce"))
    own, shared = of_claim("own"), of_claim("data")
    elsewhere = Writer(story, story.run(pod("elsewhere", {"/data": shared}, node="nfs1", command=COMMAND)))
    story.run(pod("user", {"/own": own, "/data": shared}, node="nfs2", command=["sh", "-c", starts]))
    before = elsewhere.written()
    node = share.nodes[1]
    node.power_off()
    elsewhere.check(before, GAP)  # nobody waits for a client that has gone
    node.boot()
    node.start()
    wait_until("the node", lambda: node.ready(story.k), 90)

    def seen() -> list[str]:
        return story.k.sh("user", "wc -l < /own/starts; wc -l < /data/starts").split()

    wait_until("the second start of the pod", lambda: seen() == ["2", "2"], 180)
    _release_works(story)


def test_a_server_that_is_switched_off_comes_back_to_writers_that_waited(story: Story, share: Share, writer: Writer):
    """The server is a node, too, with a controller of the driver on it."""
    before = writer.written()
    share.node.power_off()
    story.make(claim("asked-meanwhile"))
    share.node.boot()
    share.start()
    share.node.start()
    wait_until("the node", lambda: share.node.ready(story.k), 90)
    writer.check(before, REBOOT)
    story.bound("asked-meanwhile", 120)
    _release_works(story)


def _release_works(story: Story) -> None:
    """See that all of the driver is there again, and that what is asked for now is done."""
    wait_until("two controllers", lambda: _ready_pods("nfs-controller") == 2, 180)
    wait_until("two node pods", lambda: _ready_pods("nfs-node") == 2, 180)
    story.make(claim("new"))
    story.run(pod("another", {"/data": of_claim("data"), "/new": of_claim("new")}, node="nfs2"), 180)
    assert story.k.sh("another", "echo fresh > /new/letter; cat /new/letter") == "fresh\n"


def _other(node: str) -> str:
    return "nfs1" if node == "nfs2" else "nfs2"


def _ready_pods(component: str) -> int:
    return sum(
        all(c["ready"] for c in item["status"].get("containerStatuses", [{"ready": False}])) for item in _pods(component)
    )
