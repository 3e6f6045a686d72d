"""The driver, the kubelet and the node go and come back under writers that check their own data, on hostPath.

One writes into a directory, one into an image, one to raw blocks. Each numbers its records, reads back each one, and ends with an
error when one is not what it wrote. A story looks whether all went on during the outage, whether a number is missing, and whether
new pods find their volumes afterwards.
"""

import itertools
from collections.abc import Callable, Mapping

import pytest

from cluster import driver
from cluster.kubectl import Kubectl, ready
from cluster.objects import claim, image_class, of_claim, pod
from cluster.progress import wait_until
from cluster.story import Story
from cluster.writer import COMMAND

# A record in each block of 4 KiB; the log of them is the container's own, for a device holds no file.
BLOCKS = """
n=0
while :; do
  n=$((n + 1))
  record="$n $(cut -d' ' -f1 /proc/uptime)"
  printf '%-4096s' "$record" | dd of=/dev/data bs=4096 seek=$n conv=fsync,notrunc 2>/dev/null || exit 1
  [ "$(dd if=/dev/data bs=4096 skip=$n count=1 2>/dev/null | sed 's/ *$//')" = "$record" ] || exit 2
  echo "$record" >> /log
  sleep 0.1
done
"""

CLAIMS = {
    "directory": claim("directory"),
    "image": claim("image", size="400Mi", storage_class="images"),
    "blocks": claim("blocks", size="64Mi", volumeMode="Block"),
}
LOGS = {"directory": "/data/log", "image": "/data/log", "blocks": "/log"}


@pytest.fixture
def writers(story: Story) -> Mapping[str, str]:
    """Pods on node1 that write: the name of each -> the file in it with what it has written."""
    running = {"node": "node1", "restartPolicy": "Never"}
    story.make(image_class(), *CLAIMS.values())
    for name in ("directory", "image"):
        story.make(pod(name, {"/data": of_claim(name)}, command=COMMAND, **running))
    story.make(pod("blocks", devices={"/dev/data": of_claim("blocks")}, command=["sh", "-c", BLOCKS], **running))
    for name in CLAIMS:
        story.k.wait("pod", name, ready, 120)
    return LOGS


def _rows(story: Story, writer: str) -> list[tuple[int, float]]:
    """The numbers that a writer has written, and when, in seconds of the machine's uptime."""
    rows = (line.split() for line in story.k.sh(writer, f"cat {LOGS[writer]}").splitlines())
    return [(int(number), float(at)) for number, at in rows]


def _written(story: Story, writers: Mapping[str, str]) -> dict[str, int]:
    return {writer: len(_rows(story, writer)) for writer in writers}


def _check_writers(story: Story, before: Mapping[str, int], longest_gap: float = 5) -> None:
    """Assert that each writer wrote on, missed no number and never waited longer than `longest_gap` seconds."""
    for writer, count in before.items():
        wait_until(f"more of {writer}", lambda: len(_rows(story, writer)) > count + 20, 30)  # noqa: B023
        found = story.k.get("pod", writer)
        assert found["status"]["phase"] == "Running"
        assert found["status"]["containerStatuses"][0]["restartCount"] == 0
        rows = _rows(story, writer)
        assert [number for number, _ in rows] == list(range(1, len(rows) + 1))
        assert max(later - earlier for (_, earlier), (_, later) in itertools.pairwise(rows)) < longest_gap


def _new_pod_works(story: Story, name: str = "another") -> None:
    """Assert that a pod starts that has the writers' volumes and a new one, and reads what they wrote."""
    story.make(claim(f"{name}-claim"))
    story.run(_reader(name, {"/new": of_claim(f"{name}-claim")}), 120)
    assert story.k.sh(name, "echo fresh > /new/letter; cat /new/letter") == "fresh\n"
    _reads_all(story, name)


def _reader(name: str, more: Mapping[str, dict] | None = None) -> dict:
    volumes = {f"/{claim_name}": of_claim(claim_name) for claim_name in ("directory", "image")} | dict(more or {})
    return pod(name, volumes, devices={"/dev/data": of_claim("blocks")}, node="node1")


def _reads_all(story: Story, name: str) -> None:
    first = "head -n 1 /directory/log; head -n 1 /image/log; dd if=/dev/data bs=4096 skip=1 count=1 2>/dev/null"
    assert [line.split()[0] for line in story.k.sh(name, first).splitlines()] == ["1", "1", "1"]


def _driver_pods() -> list[str]:
    selector = "app.kubernetes.io/component=hostpath-node"
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
def test_writers_write_on_while_the_driver_or_the_kubelet_is_away(story: Story, writers, outage: Callable[[Story], None]):
    before = _written(story, writers)
    outage(story)
    wait_until("the driver", _driver_ready, 90)
    wait_until("the nodes", lambda: all(node.ready(story.k) for node in story.nodes.values()), 60)
    _check_writers(story, before)
    _new_pod_works(story)


def test_pods_that_are_deleted_while_the_driver_is_away_go_when_it_is_back(story: Story, writers):
    _keep_driver_on(story, "nowhere")
    try:
        wait_until("the end of the driver's pods", lambda: not _driver_pods(), 90)
        story.k.delete("pod", *writers, wait=False)
        story.make(_reader("waiting"))
        story.refused("Pod", "waiting", "FailedMount", driver.HOSTPATH, seconds=60)
        assert all(story.k.exists("pod", name) for name in writers)
    finally:
        _keep_driver_on(story, None)
    wait_until("the driver", lambda: len(_driver_pods()) == 2 and _driver_ready(), 90)
    for name in writers:
        story.k.gone("pod", name, 120)
    story.k.wait("pod", "waiting", ready, 180)
    _reads_all(story, "waiting")


def test_an_upgrade_of_the_driver_disturbs_no_writer(story: Story, writers):
    before = _written(story, writers)
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
            item["spec"]["containers"][0]["image"] for item in client.find("pods", "app.kubernetes.io/component=hostpath-node")
        ]
        assert running == [newer] * len(story.nodes)
        _check_writers(story, before)
        _new_pod_works(story)
    finally:
        driver.upgrade(driver.values(image.rpartition(":")[2]))
    _check_writers(story, before)
    _new_pod_works(story, "after-rollback")


def test_a_node_that_is_switched_off_comes_back_with_its_data(story: Story):
    starts = """
    date >> /directory/starts; date >> /image/starts
    n=$(dd if=/dev/data bs=512 count=1 2>/dev/null | tr -d '\\0 ')
    printf '%-512s' $((n + 1)) | dd of=/dev/data bs=512 conv=notrunc 2>/dev/null
    sync; exec sleep 1000000
    """
    story.make(image_class(), *CLAIMS.values())
    volumes = {"/directory": of_claim("directory"), "/image": of_claim("image")}
    devices = {"/dev/data": of_claim("blocks")}
    story.run(pod("user", volumes, devices=devices, node="node2", command=["sh", "-c", starts]))
    node = story.nodes["node2"]
    node.power_off()
    node.boot()
    node.start()

    def seen(name: str) -> list[str]:
        count = "wc -l < /directory/starts; wc -l < /image/starts; dd if=/dev/data bs=512 count=1 2>/dev/null"
        return story.k.sh(name, count).split()

    wait_until("the second start of the pod", lambda: seen("user") == ["2", "2", "2"], 180)
    wait_until("the driver", _driver_ready, 90)
    story.run(pod("another", volumes, devices=devices), 120)
    assert seen("another") == ["2", "2", "2"]
