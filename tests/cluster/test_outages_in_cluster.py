"""The driver, the kubelet and the node go and come back under a writer that checks its own data, on hostPath.

The writer numbers its lines, reads back each one, and ends with an error when one is not what it wrote. A story looks whether it went
on during the outage, whether a number is missing, and whether new pods find their volumes afterwards.
"""

import itertools
from collections.abc import Callable

import pytest

from cluster import driver
from cluster.kubectl import Kubectl, ready
from cluster.objects import claim, of_claim, pod
from cluster.progress import wait_until
from cluster.story import Story

WRITER = """
n=0
while :; do
  n=$((n + 1))
  echo "$n $(cut -d' ' -f1 /proc/uptime)" >> /data/log || exit 1
  echo "$n" > /data/new && mv /data/new /data/last || exit 1
  [ "$(tail -n 1 /data/log | cut -d' ' -f1)" = "$n" ] && [ "$(cat /data/last)" = "$n" ] || exit 2
  sleep 0.05
done
"""


@pytest.fixture
def writer(story: Story) -> str:
    story.make(claim("data"))
    return story.run(
        pod("writer", {"/data": of_claim("data")}, node="node1", command=["sh", "-c", WRITER], restartPolicy="Never")
    )


def _written(story: Story) -> int:
    return int(story.k.sh("writer", "cat /data/last"))


def _check_writer(story: Story, before: int, longest_gap: float = 5) -> None:
    """Assert that the writer wrote on, missed no number and never waited longer than `longest_gap` seconds."""
    wait_until("more lines", lambda: _written(story) > before + 20, 30)
    found = story.k.get("pod", "writer")
    assert found["status"]["phase"] == "Running"
    assert found["status"]["containerStatuses"][0]["restartCount"] == 0
    rows = [line.split() for line in story.k.sh("writer", "cat /data/log").splitlines()]
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    times = [float(at) for _, at in rows]
    assert max(later - earlier for earlier, later in itertools.pairwise(times)) < longest_gap


def _new_pod_works(story: Story, name: str = "another") -> None:
    """Assert that a pod with the same volume, and one with a new one, start."""
    story.make(claim(f"{name}-claim"))
    story.run(pod(name, {"/data": of_claim("data"), "/new": of_claim(f"{name}-claim")}, node="node1"), 120)
    assert story.k.sh(name, "head -n 1 /data/log; echo fresh > /new/letter; cat /new/letter").startswith("1 ")


def _driver_pods() -> list[str]:
    selector = "--selector=app.kubernetes.io/component=hostpath-node"
    return [item["metadata"]["name"] for item in Kubectl(driver.NAMESPACE).find("pods", selector)]


def _driver_ready() -> bool:
    client = Kubectl(driver.NAMESPACE)
    status = client.find("daemonsets")[0]["status"]
    return (
        status.get("numberReady") == status["desiredNumberScheduled"] == status.get("updatedNumberScheduled")
        and status["observedGeneration"] == client.find("daemonsets")[0]["metadata"]["generation"]
    )


def _keep_driver_on(story: Story, node: str | None) -> None:
    """Let the driver run on one node only, or (None) on all."""
    client = Kubectl(driver.NAMESPACE)
    selector = {"nodeSelector": {"kubernetes.io/hostname": node}}
    client.patch("daemonset", client.find("daemonsets")[0]["metadata"]["name"], {"spec": {"template": {"spec": selector}}})


def _pods_replaced(story: Story) -> None:
    Kubectl(driver.NAMESPACE).delete("pods", *_driver_pods())


def _killed(story: Story) -> None:
    for node in story.nodes.values():
        node.machine.kill("tatami", "serve")


def _kubelets_killed(story: Story) -> None:
    for node in story.nodes.values():
        node.restart_kubelet()


@pytest.mark.parametrize(
    "outage", [_pods_replaced, _killed, _kubelets_killed], ids=["pods-replaced", "kill-9", "kubelet-kill-9"]
)
def test_a_writer_writes_on_while_the_driver_or_the_kubelet_is_away(story: Story, writer, outage: Callable[[Story], None]):
    before = _written(story)
    outage(story)
    wait_until("the driver", _driver_ready, 90)
    wait_until("the nodes", lambda: all(node.ready(story.k) for node in story.nodes.values()), 60)
    _check_writer(story, before)
    _new_pod_works(story)


def test_a_pod_that_is_deleted_while_the_driver_is_away_goes_when_it_is_back(story: Story, writer):
    _keep_driver_on(story, "nowhere")
    try:
        wait_until("the end of the driver's pods", lambda: not _driver_pods(), 90)
        story.k.delete("pod", "writer", wait=False)
        story.make(pod("waiting", {"/data": of_claim("data")}, node="node1"))
        story.refused("Pod", "waiting", "FailedMount", driver.HOSTPATH, seconds=60)
        assert story.k.exists("pod", "writer")
    finally:
        _keep_driver_on(story, None)
    wait_until("the driver", lambda: len(_driver_pods()) == 2 and _driver_ready(), 90)
    story.k.gone("pod", "writer", 120)
    story.k.wait("pod", "waiting", ready, 180)
    assert story.k.sh("waiting", "head -n 1 /data/log").startswith("1 ")


def test_an_upgrade_of_the_driver_disturbs_no_writer(story: Story, writer):
    before = _written(story)
    pods = set(_driver_pods())
    client = Kubectl(driver.NAMESPACE)
    image = client.find("daemonsets")[0]["spec"]["template"]["spec"]["containers"][0]["image"]
    newer = f"{image}-newer"
    for node in story.nodes.values():
        node.tag_image(image, newer)
    driver.upgrade(driver.values(newer.rpartition(":")[2]))
    try:
        wait_until("the new pods", lambda: _driver_ready() and not pods & set(_driver_pods()), 120)
        running = [
            item["spec"]["containers"][0]["image"]
            for item in client.find("pods", "--selector=app.kubernetes.io/component=hostpath-node")
        ]
        assert running == [newer] * len(story.nodes)
        _check_writer(story, before)
        _new_pod_works(story)
    finally:
        driver.upgrade(driver.values(image.rpartition(":")[2]))
    _check_writer(story, before)
    _new_pod_works(story, "after-rollback")


def test_a_node_that_is_switched_off_comes_back_with_its_data(story: Story):
    story.make(claim("data"))
    story.run(
        pod(
            "user",
            {"/data": of_claim("data")},
            node="node2",
            command=["sh", "-c", "date >> /data/starts; sync; exec sleep 1000000"],
        )
    )
    node = story.nodes["node2"]
    node.power_off()
    node.boot()
    node.start()

    def starts() -> bool:
        return len(story.k.sh("user", "cat /data/starts").splitlines()) == 2

    wait_until("the second start of the pod", starts, 180)
    wait_until("the driver", _driver_ready, 90)
    story.run(pod("another", {"/data": of_claim("data")}), 120)
    assert len(story.k.sh("another", "cat /data/starts").splitlines()) == 2
