"""What others notice of a large copy: Probe, NodePublish and CreateVolume while a plain copy of gigabytes runs in the same pool."""

import os
import statistics
import threading
import time
from pathlib import Path

from csi_driver.rpc import csi_pb2 as csi
from tests.bench.site import CAPABILITY, Site, elapsed, fill

PAUSE_SECONDS = 0.02


def latencies(site: Site, copy_bytes: int, calm_seconds: float) -> dict[str, list[float]]:
    """Return seconds of each call: "calm …" without and "busy …" beside the copy; "bare mkdir" is mkdir and fsync by another process."""
    source = site.create("source")
    fill(site.path(source), max(1, copy_bytes // (100 * 1024**2)), copy_bytes)
    node = _Node(site, site.create("published"))
    calm = _measure(site, node, "calm", lambda began: time.monotonic() - began < calm_seconds)
    site.settle()
    copying = threading.Thread(target=lambda: site.snapshot("large", source.volume_id))
    copying.start()
    busy = _measure(site, node, "busy", lambda _: copying.is_alive())
    copying.join()
    node.close()
    return calm | busy


def judge(taken: dict[str, list[float]]) -> list[tuple[str, float, float]]:
    """Return (sentence, measured, target); measured must not exceed the target."""
    p99 = {name: percentile(values, 99) for name, values in taken.items()}
    return [
        ("Probe, p99 beside the copy / without", p99["busy Probe"] / p99["calm Probe"], 2.0),
        ("NodePublish, p99 beside the copy / without", p99["busy NodePublish"] / p99["calm NodePublish"], 2.0),
        ("CreateVolume / bare mkdir, p99 beside the copy", p99["busy CreateVolume"] / p99["busy bare mkdir"], 2.0),
        (
            "CreateVolume / bare mkdir, medians beside the copy",
            statistics.median(taken["busy CreateVolume"]) / statistics.median(taken["busy bare mkdir"]),
            2.0,
        ),
    ]


def percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def _measure(site: Site, node: "_Node", label: str, going_on) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {f"{label} {name}": [] for name in ("Probe", "NodePublish", "CreateVolume", "bare mkdir")}
    began, number = time.monotonic(), 0

    def probe() -> None:
        while going_on(began):
            taken[f"{label} Probe"].append(elapsed(lambda: site.client.call("Probe", csi.ProbeRequest())))
            time.sleep(PAUSE_SECONDS)

    def publish() -> None:
        while going_on(began):
            taken[f"{label} NodePublish"].append(elapsed(node.publish))
            node.unpublish()
            time.sleep(PAUSE_SECONDS)

    others = [threading.Thread(target=act) for act in (probe, publish)]
    for other in others:
        other.start()
    while going_on(began):
        number += 1
        name = f"{label}-{number}"
        taken[f"{label} CreateVolume"].append(elapsed(lambda name=name: site.create(name)))
        time.sleep(PAUSE_SECONDS)  # or it would find the journal just written by the other
        taken[f"{label} bare mkdir"].append(elapsed(lambda name=name: _bare_mkdir(site.place / name)))
        time.sleep(PAUSE_SECONDS)
    for other in others:
        other.join()
    return taken


def _bare_mkdir(place: Path) -> None:
    place.mkdir()
    for path in (place, place.parent):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class _Node:
    """A kubelet that publishes one volume again and again."""

    def __init__(self, site: Site, volume: csi.Volume):
        self._site = site
        self._handle = volume.volume_id
        self._staging = site.driver.kubelet / "plugins/staging/published"
        self._target = site.driver.kubelet / "pods/pod/mount"
        for path in (self._staging, self._target):
            path.parent.mkdir(parents=True, exist_ok=True)
        site.insist(
            "NodeStageVolume",
            csi.NodeStageVolumeRequest(
                volume_id=self._handle, staging_target_path=str(self._staging), volume_capability=CAPABILITY
            ),
        )

    def publish(self) -> None:
        request = csi.NodePublishVolumeRequest(
            volume_id=self._handle,
            staging_target_path=str(self._staging),
            target_path=str(self._target),
            volume_capability=CAPABILITY,
        )
        self._site.client.call("NodePublishVolume", request)

    def unpublish(self) -> None:
        request = csi.NodeUnpublishVolumeRequest(volume_id=self._handle, target_path=str(self._target))
        self._site.client.call("NodeUnpublishVolume", request)

    def close(self) -> None:
        request = csi.NodeUnstageVolumeRequest(volume_id=self._handle, staging_target_path=str(self._staging))
        self._site.insist("NodeUnstageVolume", request)
