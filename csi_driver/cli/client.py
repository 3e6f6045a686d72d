"""A client of the driver's own socket, for commands: it asks as a sidecar does and turns refusals into words.

gRPC takes a fifth of a second to import, so commands import this module where they use it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from urllib.parse import quote

import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc.calls import REQUEST_ID_KEY
from csi_driver.rpc.csi_pb2_grpc import ControllerStub, GroupControllerStub, IdentityStub, NodeStub

DEFAULT_SECONDS = 60.0

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
_SERVICES: dict[str, Callable[[grpc.Channel], object]] = {
    "Identity": IdentityStub,
    "Controller": ControllerStub,
    "GroupController": GroupControllerStub,
    "Node": NodeStub,
}


class CallFailed(Exception):
    """The driver refused, or nobody answered. `code` is gRPC's name for it (`NOT_FOUND`), `message` is meant for people."""

    def __init__(self, call: str, code: str, message: str, request_id: str | None) -> None:
        super().__init__(f"{call}: {code}: {message}")
        self.call, self.code, self.message, self.request_id = call, code, message, request_id


class Client:
    """One connection to the Unix socket at `socket`; a context manager that closes it."""

    def __init__(self, socket: Path) -> None:
        # The address is read as a URI. Neither proxies nor another client's connection have a part in this.
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(f"unix:{quote(os.fsencode(socket))}", options=options)
        self.identity = IdentityStub(self._channel)
        self.controller = ControllerStub(self._channel)
        self.node = NodeStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._channel.close()

    def ask(
        self, method: "grpc.UnaryUnaryMultiCallable[Request, Response]", request: Request, seconds: float = DEFAULT_SECONDS
    ) -> Response:
        """Send `request` and return the answer, waiting at most `seconds`. Raises CallFailed."""
        try:
            return method(request, timeout=seconds)
        except grpc.RpcError as error:
            raise _failed(call_name(request), error) from None

    def ask_by_name(self, method: str, body: dict[str, Any], seconds: float = DEFAULT_SECONDS) -> Message:
        """Call `ListVolumes` or `Controller/ListVolumes` with a request written as JSON (protobuf's mapping, proto field names).

        Raises CallFailed, and ValueError for a method that CSI does not have or a body that its request does not.
        """
        from google.protobuf.json_format import ParseDict, ParseError

        service, request_type = find_method(method)
        try:
            request = ParseDict(body, request_type())
        except ParseError as error:
            raise ValueError(f"{request_type.DESCRIPTOR.name}: {' '.join(str(error).split())}") from None
        stub = _SERVICES[service](self._channel)
        answer: Message = self.ask(getattr(stub, call_name(request)), request, seconds)
        return answer


def find_method(name: str) -> tuple[str, type[Message]]:
    """Return the service and the request's class of `ListVolumes` or `Controller/ListVolumes`. Raises ValueError."""
    service, _, method = name.rpartition("/")
    known = [
        (candidate, found)
        for candidate in _SERVICES
        for found in csi.DESCRIPTOR.services_by_name[candidate].methods
        if service in ("", candidate) and found.name == method
    ]
    if not known:
        names = sorted(found.name for each in _SERVICES for found in csi.DESCRIPTOR.services_by_name[each].methods)
        raise ValueError(f"CSI has no method {name}; it has {', '.join(names)}")
    candidate, found = known[0]
    request_type: type[Message] = getattr(csi, found.input_type.name)
    return candidate, request_type


def call_name(request: Message) -> str:
    """Return the call that a request belongs to: `CreateVolume` of a CreateVolumeRequest."""
    return request.DESCRIPTOR.name.removesuffix("Request")


def as_json(message: Message) -> dict[str, Any]:
    """Return a message as JSON's values, with the field names of the spec; int64 are strings, as protobuf's mapping wants it."""
    return MessageToDict(message, preserving_proto_field_name=True)


def _failed(call: str, error: grpc.RpcError) -> CallFailed:
    outcome = cast("grpc.Call", error)  # the error of a unary call is the call (grpc's documentation of RpcError)
    request_id = dict(outcome.trailing_metadata() or ()).get(REQUEST_ID_KEY)
    return CallFailed(call, outcome.code().name, outcome.details() or "", str(request_id) if request_id else None)
