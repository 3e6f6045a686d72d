"""Lanes: how many calls of a kind may run at once, and for how long a call of that kind is waited for.

A server that hangs makes the calls that touch it hang, each on a thread. Lanes keep them from taking all threads: when a lane is
full its calls are refused at once (UNAVAILABLE, the sidecars come back), and the other lanes do not notice. The thread pool has
room for all lanes at their fullest and a reserve for refusing, so Probe is answered whatever hangs. A call holds its place until it
really ends, also long after its caller has given up: that is what its thread does, too.

A server that hangs must not take a lane from the pools of other servers either. So of each lane the first half is anybody's, and in
the second half each pool has its own part: whatever hangs, the others get their part.

The sizes: external-provisioner asks for up to 100 volumes at once (--worker-threads), the kubelet runs about 110 pods on a node.
"""

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from google.protobuf.message import Message

from csi_driver.errors import Unavailable
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.telemetry.metrics import Metrics

RESERVE_THREADS = 16
"""Threads beyond all lanes, in which calls are parsed and refused."""


@dataclass(frozen=True)
class Lane:
    """A kind of calls. `seconds` is what a call gets whose caller says nothing, `most_seconds` what no call gets more than."""

    name: str
    capacity: int
    seconds: float
    most_seconds: float


IDENTITY = Lane("identity", 8, 5, 10)
CONTROLLER = Lane("controller", 128, 60, 300)
CAPTURE = Lane("capture", 32, 60, 600)  # these wait for copies
NODE = Lane("node", 64, 110, 300)  # the kubelet waits two minutes
NODE_READ = Lane("node-read", 32, 30, 60)  # what the kubelet asks of every volume again and again
LANES = (IDENTITY, CONTROLLER, CAPTURE, NODE, NODE_READ)

_BY_METHOD: Mapping[str, Lane] = {
    "GetPluginInfo": IDENTITY,
    "GetPluginCapabilities": IDENTITY,
    "Probe": IDENTITY,
    "ControllerGetCapabilities": IDENTITY,
    "GroupControllerGetCapabilities": IDENTITY,
    "NodeGetCapabilities": IDENTITY,
    "CreateSnapshot": CAPTURE,
    "CreateVolumeGroupSnapshot": CAPTURE,
    "NodeGetInfo": NODE_READ,
    "NodeGetVolumeStats": NODE_READ,
    "NodeGetVolumeHealth": NODE_READ,
    "NodeGetStorageHealth": NODE_READ,
}


def lane_of(method: str, request: Message) -> Lane:
    """Return the lane of a call; `method` is the bare name, as `NodeStageVolume`."""
    if isinstance(request, csi.CreateVolumeRequest):
        return CAPTURE if request.HasField("volume_content_source") else CONTROLLER
    return _BY_METHOD.get(method) or (NODE if method.startswith("Node") else CONTROLLER)


def pool_of(request: Message) -> str:
    """Return the name of the pool that a call is about, as far as its fields tell: a handle begins with it. "" for none or several."""
    names = {field.name for field in request.DESCRIPTOR.fields}
    for field in ("volume_context", "parameters"):
        if field in names and (pool := getattr(request, field).get("pool")):
            return str(pool)
    for field in ("volume_id", "source_volume_id", "snapshot_id", "group_snapshot_id"):
        if field in names and (handle := getattr(request, field)):
            return str(handle).partition(".")[0]
    if isinstance(request, csi.CreateVolumeGroupSnapshotRequest) and request.source_volume_ids:
        return request.source_volume_ids[0].partition(".")[0]
    return ""


class Lanes:
    """Counts the calls in each lane, and in it those of each of `pools`."""

    def __init__(self, metrics: Metrics, lanes: Sequence[Lane] = LANES, pools: Sequence[str] = ()) -> None:
        self._metrics = metrics
        self._guard = threading.Lock()
        self._running: dict[str, Counter[str]] = {lane.name: Counter() for lane in lanes}
        self._capacity = {lane.name: lane.capacity for lane in lanes}
        self._pools = frozenset(pools)
        self.threads = sum(lane.capacity for lane in lanes) + RESERVE_THREADS
        for lane in lanes:
            metrics.lane_opened(lane.name, lane.capacity)

    @contextmanager
    def enter(self, lane: Lane, pool: str = "") -> Iterator[None]:
        """Take a place until the context ends. Raises Unavailable at once when there is none."""
        key = pool if pool in self._pools else ""
        running = self._running[lane.name]
        with self._guard:
            if not self._has_place(self._capacity[lane.name], running, key):
                self._metrics.call_rejected(lane.name)
                whose = f" of pool {key}" if running.total() < self._capacity[lane.name] else ""
                raise Unavailable(
                    f"too many {lane.name} calls{whose} are running, or hang on a server that does not answer; try again"
                )
            running[key] += 1
        try:
            with self._metrics.in_lane(lane.name):
                yield
        finally:
            with self._guard:
                running[key] -= 1

    def _has_place(self, capacity: int, running: Counter[str], key: str) -> bool:
        if running.total() >= capacity:
            return False
        if len(self._pools) <= 1:
            return True
        own_part = capacity // 2 // (len(self._pools) + 1)  # calls that are about no pool, or several, have one, too
        return running.total() < capacity // 2 or running[key] < max(1, own_part)
