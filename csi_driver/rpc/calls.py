"""What happens around every call: its id, its lane, its deadline, its line in the log, its time in the metrics, and its status.

One interceptor does it for all methods, so a servicer's method is only parse, ask the domain, reply. It parses the message itself,
instead of leaving that to grpc, because grpc answers INTERNAL for bytes that are no message, and knows nothing of our log.
"""

from __future__ import annotations

import contextvars
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import grpc
from google.protobuf.message import DecodeError, Message

from csi_driver.errors import DeadlineExceeded, InvalidArgument, Unavailable
from csi_driver.rpc.lanes import Lane, Lanes, lane_of, pool_of
from csi_driver.rpc.redaction import loggable
from csi_driver.rpc.status import to_status
from csi_driver.telemetry import logs
from csi_driver.telemetry.metrics import Metrics

if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]  # generic in the stubs only

REQUEST_ID_KEY = "x-request-id"
"""The metadata that may bring a call's id, and in which the answer tells it."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Asked all the time by sidecars and probes, and the answer never changes.
_QUIET = frozenset(
    {"Probe", "GetPluginInfo", "GetPluginCapabilities"}
    | {f"{service}GetCapabilities" for service in ("Controller", "GroupController", "Node")}
)
_NO_DEADLINE_SECONDS = 10.0**9  # grpc says some 292 years for a call without a deadline

_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline")
_log = logging.getLogger(__name__)


def deadline() -> float:
    """Return the time.monotonic() value by which the call that this thread serves wants its answer."""
    return _deadline.get()


class Calls(grpc.ServerInterceptor):
    """The interceptor. It also knows which calls run, so that a stop can wait for them."""

    def __init__(self, lanes: Lanes, metrics: Metrics) -> None:
        self._lanes = lanes
        self._metrics = metrics
        self._changed = threading.Condition()
        self._running = 0
        self._stopping = False

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], _Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wrap the method's handler; None (grpc: UNIMPLEMENTED) for a method that nobody serves."""
        handler = continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return None
        method = handler_call_details.method
        request_id = _request_id(handler_call_details)

        def serve(data: bytes, context: grpc.ServicerContext) -> Message:
            with logs.bind_request(request_id, method.rpartition("/")[2]):
                return self._serve(method, handler, data, context, request_id)

        return grpc.unary_unary_rpc_method_handler(
            serve, request_deserializer=None, response_serializer=handler.response_serializer
        )

    def refuse_new(self) -> None:
        """Answer UNAVAILABLE to every call from now on."""
        with self._changed:
            self._stopping = True

    def wait_until_idle(self, seconds: float) -> bool:
        """Wait for the calls that run, at most so long. Returns whether all have ended."""
        with self._changed:
            return self._changed.wait_for(lambda: self._running == 0, timeout=seconds)

    def _serve(self, method: str, handler: _Handler, data: bytes, context: grpc.ServicerContext, request_id: str) -> Message:
        started = time.monotonic()
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        line = _CallLog(method.rpartition("/")[2])
        response: Message | None = None
        code, message = grpc.StatusCode.OK, ""
        try:
            response = self._answer(line, handler, data, context)
        except Exception as error:  # noqa: BLE001  # whatever it is has a status, and the log has the rest
            code, message = to_status(error)
            line.error = error
        seconds = time.monotonic() - started
        self._metrics.call_finished(method, code.name, seconds)
        line.finish(code, message, seconds)
        if response is None:
            context.abort(code, message)
        return response

    def _answer(self, line: _CallLog, handler: _Handler, data: bytes, context: grpc.ServicerContext) -> Message:
        with self._counted():
            request = _parse(handler, data)
            line.begin(request)
            lane = lane_of(line.method, request)
            with self._lanes.enter(lane, pool_of(request)):
                _deadline.set(_deadline_of(lane, context))
                return cast("Message", handler.unary_unary(request, context))  # type: ignore[misc]  # intercept_service saw to it

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._changed:
            if self._stopping:
                raise Unavailable("the driver is shutting down; try again")
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()


class _CallLog:
    """What is said of one call: a line at debug when it begins, one when it ends. The request only where somebody reads it."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.error: Exception | None = None
        self._request: Message | None = None

    def begin(self, request: Message) -> None:
        self._request = request
        if self.method not in _QUIET and _log.isEnabledFor(logging.DEBUG):
            _log.debug("call begins", extra={"request": loggable(request)})

    def finish(self, code: grpc.StatusCode, message: str, seconds: float) -> None:
        fields: dict[str, object] = {"code": code.name, "seconds": round(seconds, 4)}
        if code is grpc.StatusCode.OK:
            _log.log(logging.DEBUG if self.method in _QUIET else logging.INFO, "call done", extra=fields)
            return
        fields |= {"error": message, "request": loggable(self._request) if self._request else None}
        if code is grpc.StatusCode.INTERNAL:
            _log.error("call failed", extra=fields, exc_info=self.error)
        else:
            _log.warning("call refused", extra=fields)


def _request_id(details: grpc.HandlerCallDetails) -> str:
    for key, value in details.invocation_metadata or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return secrets.token_hex(8)


def _parse(handler: _Handler, data: bytes) -> Message:
    try:
        return cast("Message", handler.request_deserializer(data))  # type: ignore[misc]  # every generated handler has one
    except DecodeError:
        raise InvalidArgument(
            "the request is not a message of this method: its bytes, or the UTF-8 of a string, are malformed"
        ) from None


def _deadline_of(lane: Lane, context: grpc.ServicerContext) -> float:
    remaining = context.time_remaining()
    if remaining is None or remaining > _NO_DEADLINE_SECONDS:
        remaining = lane.seconds
    if remaining <= 0:
        raise DeadlineExceeded("the call waited for a thread until its deadline had passed; it was not begun")
    return time.monotonic() + min(remaining, lane.most_seconds)
