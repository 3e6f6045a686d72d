"""What a volume's size means, on hostPath: it holds, it grows, it can be taken back, and those who ask are told the truth about it."""

import json
import re

import pytest

from cluster.kubectl import Kubectl, Object, ready
from cluster.objects import claim, image_class, of_claim, pod
from cluster.progress import wait_until
from cluster.story import Story

MIB = 1 << 20
GIB = 1 << 30
FILL = "dd if=/dev/zero of=/data/{name} bs=1M count={count} conv=fsync"


def _image(story: Story, size: str, **pod_fields: str) -> None:
    """A claim `data` of an image, used by the pod `writer`."""
    story.make(image_class(), claim("data", size=size, storage_class="images"))
    story.run(pod("writer", {"/data": of_claim("data")}, **pod_fields))


def _df(story: Story, name: str) -> int:
    """The size in bytes of what is mounted at /data, as the pod sees it."""
    return int(story.k.sh(name, "df -k /data | tail -n 1").split()[1]) << 10


def _written(story: Story) -> int:
    return int(story.k.sh("writer", "du -ck /data/fill* | tail -n 1").split()[0]) << 10


def test_writes_stop_at_the_size_and_go_on_after_an_expansion_under_the_running_pod(story: Story):
    _image(story, "400Mi")
    assert 300 * MIB < _df(story, "writer") <= 400 * MIB
    with pytest.raises(RuntimeError, match="No space left on device"):
        story.k.sh("writer", FILL.format(name="fill", count=800))
    assert 300 * MIB < _written(story) <= 400 * MIB

    story.resize("data", "800Mi")
    story.resized("data", "800Mi")
    assert 600 * MIB < _df(story, "writer") <= 800 * MIB
    story.k.sh("writer", FILL.format(name="fill-2", count=250))
    assert _written(story) > 550 * MIB
    assert story.k.get("pod", "writer")["status"]["containerStatuses"][0]["restartCount"] == 0


def test_a_directory_grows_while_it_is_used(story: Story):
    story.make(claim("data"))
    story.run(pod("writer", {"/data": of_claim("data")}))
    story.k.sh("writer", "echo first > /data/letter")
    story.resize("data", "2Gi")
    story.resized("data", "2Gi")
    assert story.k.sh("writer", "cat /data/letter") == "first\n"


def test_a_volume_that_grows_while_nobody_uses_it_is_larger_for_its_next_pod(story: Story):
    _image(story, "400Mi")
    story.k.delete("pod", "writer")
    story.resize("data", "800Mi")
    pending = ("FileSystemResizePending", "NodeResizePending")
    story.k.wait("pvc", "data", lambda pvc: (ready(pvc, pending[0]), _resize_status(pvc)) == (True, pending[1]))
    story.run(pod("reader", {"/data": of_claim("data")}))
    story.resized("data", "800Mi")
    assert 600 * MIB < _df(story, "reader") <= 800 * MIB


def _resize_status(pvc: Object) -> str:
    return pvc["status"].get("allocatedResourceStatuses", {}).get("storage", "")


@pytest.mark.parametrize("layout", ["directory", "image"])
def test_an_expansion_that_cannot_be_is_taken_back_by_a_lower_request(story: Story, layout):
    if layout == "image":
        story.make(image_class())
    story.make(claim("data", size="1Gi", storage_class="images" if layout == "image" else None))
    story.run(pod("writer", {"/data": of_claim("data")}))
    story.k.sh("writer", "echo first > /data/letter")

    story.resize("data", "900Gi")
    said = story.refused("Pod", "writer", "VolumeResizeFailed", "OutOfRange", "pool default has")
    assert "expansion from 1073741824 to 966367641600 bytes" in said
    found = story.k.get("pvc", "data")
    assert found["status"]["capacity"]["storage"] == "1Gi"
    assert story.k.sh("writer", "echo second >> /data/letter; cat /data/letter") == "first\nsecond\n"

    story.resize("data", "2Gi")
    story.resized("data", "2Gi")
    found = story.k.wait("pvc", "data", lambda pvc: not _resize_status(pvc) and not pvc["status"].get("conditions"))
    assert story.k.sh("writer", "cat /data/letter") == "first\nsecond\n"
    assert story.k.get("pod", "writer")["status"]["containerStatuses"][0]["restartCount"] == 0
    # And nothing of the refused size is left: the next one is no different from a first.
    story.resize("data", "3Gi")
    story.resized("data", "3Gi")


def test_an_expansion_that_cannot_be_is_taken_back_before_the_next_pod(story: Story):
    _image(story, "400Mi")
    story.k.delete("pod", "writer")
    story.resize("data", "900Gi")
    story.k.wait("pvc", "data", lambda pvc: _resize_status(pvc) == "NodeResizePending")
    story.make(pod("reader", {"/data": of_claim("data")}))
    story.refused("Pod", "reader", "OutOfRange", "pool default has")
    story.resize("data", "500Mi")
    story.k.wait("pod", "reader", ready, 120)
    story.resized("data", "500Mi")


# --- what is said about it ----------------------------------------------------------------------------------------------------------


def _volume_stats(story: Story, name: str) -> Object:
    """What the kubelet says of the claim of a pod: /stats/summary. Nothing, while it has not looked yet."""
    node = story.node_of(name).name
    summary = json.loads(Kubectl().run("get", "--raw", f"/api/v1/nodes/{node}/proxy/stats/summary"))
    mine = (item for item in summary["pods"] if item["podRef"] == item["podRef"] | {"name": name, "namespace": story.namespace})
    return next((volume for item in mine for volume in item.get("volume", []) if "pvcRef" in volume), {})


def _metric(story: Story, name: str, metric: str) -> float:
    """What the kubelet's /metrics say of the claim `data`."""
    text = Kubectl().run("get", "--raw", f"/api/v1/nodes/{story.node_of(name).name}/proxy/metrics")
    label = f'namespace="{story.namespace}",persistentvolumeclaim="data"'
    (value,) = re.findall(rf"^{metric}\{{{label}\}} (\S+)$", text, re.MULTILINE)
    return float(value)


@pytest.mark.parametrize("layout", ["directory", "image"])
def test_the_kubelet_knows_size_and_usage_of_the_volume_itself(story: Story, layout):
    if layout == "image":
        story.make(image_class())
    story.make(claim("data", size="1Gi", storage_class="images" if layout == "image" else None))
    story.run(pod("writer", {"/data": of_claim("data")}))
    story.k.sh("writer", FILL.format(name="fill", count=64))

    def used() -> Object | None:
        stats = _volume_stats(story, "writer")
        return stats if stats.get("usedBytes", 0) >= 64 * MIB else None

    stats = wait_until("64 MiB in the kubelet's statistics", used, 90)
    assert 0.9 * GIB < stats["capacityBytes"] <= GIB
    assert stats["usedBytes"] < 200 * MIB
    assert stats["inodesUsed"] >= 1
    assert _metric(story, "writer", "kubelet_volume_stats_capacity_bytes") == stats["capacityBytes"]
    assert _metric(story, "writer", "kubelet_volume_stats_used_bytes") >= 64 * MIB
