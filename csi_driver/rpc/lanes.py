"""Lanes: how many calls of a kind may run at once, and for how long a call of that kind is waited for.

A server that hangs makes the calls that touch it hang, each on a thread. Lanes keep them from taking all threads: when a lane is
full its calls are refused at once (UNAVAILABLE, the sidecars come back), and the other lanes do not notice. The thread pool has
room for all lanes at their fullest and a reserve for refusing, so Probe is answered whatever hangs. A call holds its place until it
really ends, also long after its caller has given up: that is what its thread does, too.

The sizes: external-provisioner asks for up to 100 volumes at once (--worker-threads), the kubelet runs about 110 pods on a node.
"""

import threading
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


class Lanes:
    """Counts the calls in each lane."""

    def __init__(self, metrics: Metrics, lanes: Sequence[Lane] = LANES) -> None:
        self._metrics = metrics
        self._places = {lane.name: threading.BoundedSemaphore(lane.capacity) for lane in lanes}
        self.threads = sum(lane.capacity for lane in lanes) + RESERVE_THREADS
        for lane in lanes:
            metrics.lane_opened(lane.name, lane.capacity)

    @contextmanager
    def enter(self, lane: Lane) -> Iterator[None]:
        """Take a place until the context ends. Raises Unavailable at once when there is none."""
        places = self._places[lane.name]
        if not places.acquire(blocking=False):
            self._metrics.call_rejected(lane.name)
            raise Unavailable(f"too many {lane.name} calls are running, or hang on a server that does not answer; try again")
        try:
            with self._metrics.in_lane(lane.name):
                yield
        finally:
            places.release()
