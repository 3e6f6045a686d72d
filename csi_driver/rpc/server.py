"""The gRPC server on its Unix socket.

Whoever can connect can mount and delete, CSI having no authentication of its own; so the socket is made with mode 0600, and nothing
else is listened on.
"""

import logging
import os
import socket
import stat
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import grpc

from csi_driver.errors import FailedPrecondition
from csi_driver.rpc import csi_pb2, csi_pb2_grpc
from csi_driver.rpc.calls import Calls
from csi_driver.rpc.controller import Controller
from csi_driver.rpc.expansion import ExpansionController, ExpansionNode
from csi_driver.rpc.group_controller import GroupController
from csi_driver.rpc.identity import Identity
from csi_driver.rpc.lanes import LANES, Lane, Lanes
from csi_driver.rpc.node import Node
from csi_driver.rpc.threads import DaemonThreads
from csi_driver.telemetry.metrics import Metrics
from csi_driver.volumes.services import Services

_OPTIONS = (
    # A CreateVolume may carry the topology of every node twice; gRPC's usual limit is enough for several thousand.
    ("grpc.max_receive_message_length", 4 << 20),
    # ListVolumes without max_entries has no bound (CSI spec); whether the answer is too long is for the caller to say.
    ("grpc.max_send_message_length", -1),
)

_log = logging.getLogger(__name__)


class CsiServer:
    """Serves `services` on the Unix socket at `socket_path`, as driver `driver_name`.

    `topology` tells whether volumes live on one node; plugin capabilities describe the installation, so every instance of it must
    be told the same. `pools` are those that share the lanes. Which services are registered follows from what `services` holds.
    """

    def __init__(
        self,
        services: Services,
        *,
        driver_name: str,
        topology: bool,
        socket_path: Path,
        metrics: Metrics,
        pools: Sequence[str] = (),
        lanes: Sequence[Lane] = LANES,
    ) -> None:
        self._socket_path = socket_path
        # gRPC reads the address as a URI, so a `%` or a space in the path has to be quoted.
        self._address = f"unix:{quote(os.fsencode(socket_path))}"
        places = Lanes(metrics, lanes, pools)
        self._calls = Calls(places, metrics)
        self._server = grpc.server(DaemonThreads(places.threads), interceptors=[self._calls], options=_OPTIONS)
        self._register(services, Identity(driver_name, services.health, topology=topology))

    def start(self) -> None:
        """Listen and serve. To be called before other threads make files: for a moment they would be nobody else's (umask).

        Raises FailedPrecondition when another process serves the socket, or the path holds something else or cannot be listened on.
        """
        self._socket_path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        _remove_stale_socket(self._socket_path)
        # Between a bind and a chmod anybody could connect. The umask is the whole process', so nothing else makes files by now.
        umask = os.umask(0o177)
        try:
            self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise FailedPrecondition(f"cannot listen on {self._socket_path}: {error}") from error
        finally:
            os.umask(umask)
        self._server.start()
        _log.info("serving", extra={"socket": str(self._socket_path)})

    def silence(self, seconds: float) -> str | None:
        """Call Probe through the socket, as livenessprobe does: None where it is answered, whatever the answer, else why it is not."""
        # A connection of its own each time: an old one would outlive a socket that somebody has removed.
        with grpc.insecure_channel(self._address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                csi_pb2_grpc.IdentityStub(channel).Probe(csi_pb2.ProbeRequest(), timeout=seconds)
            except grpc.RpcError as error:
                return f"Probe is not answered: {error.code().name}: {error.details()}"
        return None

    def stop(self, grace: float) -> bool:
        """Refuse new calls, give those that run `grace` seconds, cancel the rest. Returns whether all have ended.

        What hangs in the kernel cannot be ended from here; its threads end with the process.
        """
        self._calls.refuse_new()
        until = time.monotonic() + grace
        answered = self._server.stop(grace)
        ended = self._calls.wait_until_idle(grace)
        answered.wait(max(0.0, until - time.monotonic()) + 1.0)
        return ended

    def _register(self, services: Services, identity: Identity) -> None:
        csi_pb2_grpc.add_IdentityServicer_to_server(identity, self._server)
        if services.volumes and services.attachments and services.snapshots and services.capacity:
            controller = Controller(
                services.volumes, services.attachments, services.snapshots, services.capacity, services.health
            )
            csi_pb2_grpc.add_ControllerServicer_to_server(controller, self._server)
        if services.expansion:
            # The stubs call every method abstract; at run time the generated base answers UNIMPLEMENTED.
            csi_pb2_grpc.add_ControllerServicer_to_server(ExpansionController(), self._server)  # type: ignore[abstract]
            csi_pb2_grpc.add_NodeServicer_to_server(ExpansionNode(), self._server)  # type: ignore[abstract]
        if services.groups:
            csi_pb2_grpc.add_GroupControllerServicer_to_server(GroupController(services.groups), self._server)
        if services.node:
            csi_pb2_grpc.add_NodeServicer_to_server(Node(services.node, services.health), self._server)


def _remove_stale_socket(path: Path) -> None:
    """Remove the socket that a killed driver left. gRPC would take it from a living one, too: it unlinks before it binds."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FailedPrecondition(f"{path} is there and is no socket: it is left alone; choose another endpoint or remove it")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
            return
        except OSError as error:
            raise FailedPrecondition(f"cannot tell whether {path} is served by another process: {error}") from error
    raise FailedPrecondition(f"another process serves {path}: stop it, or choose another endpoint")
