"""`/metrics`, `/healthz` and `/readyz` over HTTP, for Prometheus and the kubelet.

Whoever reaches the port may ask, so it is bounded: a request has a few seconds, and when too many connections are open the oldest
gives way, so that idle or slow clients can never keep the kubelet's probe out (a failed probe restarts the pod).
Nothing here waits longer than its bound: `/healthz` for the driver itself, `/readyz` for its pools.
"""

import logging
import socket
import socketserver
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from csi_driver.config import ConfigError, parse_metrics_address
from csi_driver.telemetry.bounded import BoundedRead
from csi_driver.telemetry.metrics import Metrics

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 16
REQUEST_SECONDS = 5.0
READY_SECONDS = 0.8  # the kubelet's probes give up after 1 s by default
ALIVE_SECONDS = 0.8  # likewise

_PLAIN = "text/plain; charset=utf-8"


class MetricsEndpoint:
    """The HTTP server in its daemon thread. `port` is the one that the kernel gave when 0 was asked for."""

    def __init__(self, server: "_Server") -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="metrics endpoint", daemon=True)
        self._thread.start()
        self.port: int = server.server_address[1]

    def stop(self) -> None:
        """Stop listening, cut what is open, and wait for the thread. May be called twice."""
        self._server.shutdown()
        self._server.server_close()
        self._server.close_connections()
        self._thread.join()


def serve_metrics(
    address: str,
    metrics: Metrics,
    ready: Callable[[], str | None] = lambda: None,
    alive: Callable[[], str | None] = lambda: None,
) -> MetricsEndpoint:
    """Serve on `address` (HOST:PORT, :PORT for every address) until `stop` is called.

    `ready` returns None, or the reason why the driver is not ready; it is asked for at most READY_SECONDS. `alive` likewise, where
    only a restart helps, for at most ALIVE_SECONDS.
    Raises ConfigError when the address is malformed or cannot be listened on.
    """
    host, port = parse_metrics_address(address)
    try:
        server = _Server(host, port, metrics, ready, alive)
    except OSError as error:
        raise ConfigError(f"--metrics-address = {address}: cannot listen there: {error.strerror or error}") from error
    return MetricsEndpoint(server)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = MAX_CONNECTIONS

    def __init__(
        self, host: str, port: int, metrics: Metrics, ready: Callable[[], str | None], alive: Callable[[], str | None]
    ) -> None:
        self.metrics = metrics
        self.ready = BoundedRead("readiness", ready, READY_SECONDS)
        self.alive = BoundedRead("liveness", alive, ALIVE_SECONDS)
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, None] = {}  # in the order of their arrival
        self.address_family, bind_address = _resolve(host, port)
        super().__init__(bind_address, _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Not HTTPServer's own: it asks DNS for this host's name, which can take half a minute.
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401  # socketserver's signature
        with self._lock:
            self._connections[request] = None
            oldest = next(iter(self._connections)) if len(self._connections) > MAX_CONNECTIONS else None
            if oldest is not None:
                del self._connections[oldest]
                _cut(oldest)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401  # socketserver's signature
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002  # socketserver's signature
        log.debug("a connection to the metrics endpoint broke off", exc_info=True)  # noqa: LOG014  # called while handling

    def close_connections(self) -> None:
        with self._lock:
            for connection in self._connections:
                _cut(connection)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = REQUEST_SECONDS
    server_version = "tatami"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/healthz":
            self._reply_check(self._reason("liveness", self.server.alive))
        elif path == "/readyz":
            self._reply_check(self._reason("readiness", self.server.ready))
        elif path == "/metrics":
            self._reply(*self._metrics())
        else:
            self._reply(HTTPStatus.NOT_FOUND, b"there is /metrics, /healthz and /readyz\n", _PLAIN)

    def _metrics(self) -> tuple[HTTPStatus, bytes, str]:
        try:
            return HTTPStatus.OK, *self.server.metrics.render(self.headers.get("Accept", ""))
        except Exception:
            log.exception("the metrics cannot be shown")
            return HTTPStatus.INTERNAL_SERVER_ERROR, b"the metrics cannot be shown; see the log\n", _PLAIN

    def _reply_check(self, reason: str | None) -> None:
        self._reply(HTTPStatus.SERVICE_UNAVAILABLE if reason else HTTPStatus.OK, f"{reason or 'ok'}\n".encode(), _PLAIN)

    @staticmethod
    def _reason(name: str, check: BoundedRead[str | None]) -> str | None:
        try:
            return check.begin().result()
        except TimeoutError:
            return f"the {name} check has not answered within {check.seconds} seconds"
        except Exception:
            log.exception("the %s check failed", name)
            return f"the {name} check failed; see the log"

    def _reply(self, status: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002, ANN401  # http.server's signature
        log.debug(format, *args, extra={"client": self.client_address[0]})


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return the family and address to bind; without a host every address, IPv6 and IPv4 by one socket where there is IPv6."""
    if not host:
        return (socket.AF_INET6, ("::", port)) if socket.has_dualstack_ipv6() else (socket.AF_INET, ("", port))
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return found[0][0], found[0][4]


def _cut(connection: socket.socket) -> None:
    """End a connection under whoever reads from it, who then finds its end and closes it."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the client was faster
