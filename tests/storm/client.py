"""A client of every RPC, by its name: what sidecars and kubelet are to the driver."""

import threading
import time
from typing import Self

import grpc

from csi_driver.rpc import csi_pb2 as csi

RETRY = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
)
"""What a CO takes for "it may have happened, ask again"; every other code is final."""

METHODS = {
    method.name: (
        f"/{service.full_name}/{method.name}",
        getattr(csi, method.input_type.name),
        getattr(csi, method.output_type.name),
    )
    for service in csi.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if not method.server_streaming
}
"""Method -> its path, request class and response class."""

_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.max_send_message_length", -1),
]


class Client:
    """One channel to one driver process."""

    def __init__(self, endpoint: str):
        self.channel = grpc.insecure_channel(endpoint, options=_OPTIONS)
        self._calls = {
            name: self.channel.unary_unary(path, request_serializer=_serialize, response_deserializer=response.FromString)
            for name, (path, _, response) in METHODS.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def wait_until_connected(self, stop: threading.Event) -> None:
        """Wait for the driver to answer, or for `stop`."""
        while not stop.is_set() and self.code("Probe", csi.ProbeRequest(), 2) is not grpc.StatusCode.OK:
            time.sleep(0.01)

    def call(self, method: str, request, timeout: float = 60, *, wait_for_ready: bool = False):
        """Make one call; `request` is a message, or bytes that are sent as they are. Raises grpc.RpcError."""
        return self._calls[method](request, timeout=timeout, wait_for_ready=wait_for_ready)

    def code(self, method: str, request, timeout: float = 60) -> grpc.StatusCode:
        try:
            self.call(method, request, timeout)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK


def _serialize(request) -> bytes:
    return request if isinstance(request, bytes) else request.SerializeToString()


def capability(mode: int = csi.VolumeCapability.AccessMode.SINGLE_NODE_MULTI_WRITER) -> csi.VolumeCapability:
    return csi.VolumeCapability(
        mount=csi.VolumeCapability.MountVolume(), access_mode=csi.VolumeCapability.AccessMode(mode=mode)
    )


def create_volume(
    name: str, size: int = 1024**2, snapshot: str = "", volume: str = "", **parameters: str
) -> csi.CreateVolumeRequest:
    request = csi.CreateVolumeRequest(
        name=name,
        capacity_range=csi.CapacityRange(required_bytes=size),
        volume_capabilities=[capability()],
        parameters=parameters,
    )
    if snapshot:
        request.volume_content_source.snapshot.snapshot_id = snapshot
    if volume:
        request.volume_content_source.volume.volume_id = volume
    return request
