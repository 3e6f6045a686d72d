"""Registration with the kubelet, without a sidecar for it.

The kubelet watches its `plugins_registry` directory and dials every socket that appears there: it asks what the plugin is and where
it is served, and then says whether it took it. What node-driver-registrar does in a container of its own is done here by one
socket, so that a registration cannot outlive the driver and every node runs one container less.

The socket is made under a name that the kubelet overlooks (a leading dot) and renamed when it is served: the kubelet dials at once,
and a socket that a killed driver left is replaced in the same step.
"""

# The names and arguments are those of the generated servicers.
# ruff: noqa: N802, ARG002

import logging
import os
import secrets
import threading
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import grpc

from csi_driver.errors import FailedPrecondition
from csi_driver.rpc import pluginregistration_pb2 as plugin
from csi_driver.rpc.pluginregistration_pb2_grpc import RegistrationServicer, add_RegistrationServicer_to_server
from csi_driver.rpc.threads import DaemonThreads

WATCH_SECONDS = 2.0
"""How often it is looked whether the socket is still there."""

_THREADS = 4
_VERSIONS = ("1.0.0",)  # of CSI; the kubelet compares the major version only

_log = logging.getLogger(__name__)


class KubeletRegistration:
    """Keeps driver `driver_name` registered while the context lasts.

    `registry` is the kubelet's plugins_registry directory, `endpoint` the driver's CSI socket as the kubelet finds it, on the host.
    The driver has to be served before: the kubelet calls NodeGetInfo as soon as it is told.
    """

    def __init__(self, driver_name: str, registry: Path, endpoint: Path) -> None:
        self._socket = registry / f"{driver_name}-reg.sock"
        self._servicer = _Registration(driver_name, endpoint)
        self._stopping = threading.Event()
        self._server: grpc.Server | None = None
        self._identity: tuple[int, int] | None = None
        self._watcher = threading.Thread(target=self._watch, name="kubelet registration", daemon=True)

    def __enter__(self) -> Self:
        """Offer the driver to the kubelet. Raises OSError, FailedPrecondition where the socket cannot be made."""
        self._offer()
        self._watcher.start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        """Take the socket away, whereupon the kubelet calls this driver no more."""
        self._stopping.set()
        self._watcher.join()
        try:
            if self._found() == self._identity:
                self._socket.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("the registration socket stays", extra={"error": str(error)})
        self._close()

    def problem(self) -> str | None:
        """Return None where the kubelet has taken the driver, else why not."""
        return self._servicer.problem

    def _offer(self) -> None:
        self._close()
        self._servicer.problem = _NOT_ASKED
        registry = self._socket.parent
        registry.mkdir(mode=0o755, parents=True, exist_ok=True)
        for left in registry.glob(f".{self._socket.name}.*"):
            left.unlink(missing_ok=True)  # of a driver that was killed before its rename
        hidden = registry / f".{self._socket.name}.{secrets.token_hex(4)}"
        server = grpc.server(DaemonThreads(_THREADS))
        add_RegistrationServicer_to_server(self._servicer, server)
        try:
            # gRPC reads the address as a URI, so a `%` or a space in the path has to be quoted.
            server.add_insecure_port(f"unix:{quote(os.fsencode(hidden))}")
        except RuntimeError as error:
            raise FailedPrecondition(f"cannot listen on {hidden}: {error}") from error
        server.start()
        self._server = server
        hidden.chmod(0o600)
        status = hidden.lstat()
        self._identity = status.st_dev, status.st_ino
        hidden.rename(self._socket)
        _log.info("offered to the kubelet", extra={"socket": str(self._socket)})

    def _watch(self) -> None:
        """Offer the driver again when somebody has removed the socket, as a kubelet that starts may do."""
        while not self._stopping.wait(WATCH_SECONDS):
            try:
                if self._found() is None:
                    _log.warning("the registration socket is gone and is made anew", extra={"socket": str(self._socket)})
                    self._offer()
            except (OSError, FailedPrecondition) as error:
                _log.warning("the driver cannot be offered to the kubelet", extra={"error": str(error)})

    def _found(self) -> tuple[int, int] | None:
        """Return device and inode of what lies where the socket should: another driver process may have taken the place over."""
        try:
            status = self._socket.lstat()
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _close(self) -> None:
        if self._server is not None:
            self._server.stop(0).wait(1.0)
            self._server = None


_NOT_ASKED = "the kubelet has not registered this driver yet"


class _Registration(RegistrationServicer):
    def __init__(self, driver_name: str, endpoint: Path) -> None:
        self._info = plugin.PluginInfo(
            type="CSIPlugin", name=driver_name, endpoint=os.fspath(endpoint), supported_versions=_VERSIONS
        )
        self.problem: str | None = _NOT_ASKED

    def GetInfo(self, request: plugin.InfoRequest, context: grpc.ServicerContext) -> plugin.PluginInfo:
        return self._info

    def NotifyRegistrationStatus(
        self, request: plugin.RegistrationStatus, context: grpc.ServicerContext
    ) -> plugin.RegistrationStatusResponse:
        if request.plugin_registered:
            self.problem = None
            _log.info("registered with the kubelet")
        else:
            # It comes back by itself, more and more slowly.
            self.problem = f"the kubelet has not registered this driver: {request.error}"
            _log.error("the kubelet has not registered this driver", extra={"error": request.error})
        return plugin.RegistrationStatusResponse()
