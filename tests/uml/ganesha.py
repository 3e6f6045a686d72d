"""nfs-ganesha: a second real NFS server, in user space. Starts in a guest's node, or on the machine itself (`Host`).

The machine's kernel has no NFS client, so what mounts ganesha does it inside a guest. On the machine it serves the tests of the
DBus interface, and clients in user space (libnfs).
"""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from nodes import Node, run

BUS = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={directory}/bus</listen>
  <policy context="default"><allow own="*"/><allow send_destination="*"/><allow receive_sender="*"/><allow user="*"/></policy>
</busconfig>
"""
CONFIGURATION = """
NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = {port}; Bind_addr = {address}; Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false; }}
NFSv4 {{ Minor_Versions = 0, 1, 2; Grace_Period = 5; Lease_Lifetime = 5; RecoveryBackend = fs; Only_Numeric_Owners = true; Graceless = {graceless}; }}
EXPORT_DEFAULTS {{ Access_Type = RW; Squash = None; SecType = sys; Protocols = 4; Transports = TCP; }}
"""
EXPORT = 'EXPORT {{ Export_Id = {number}; Path = "{path}"; Pseudo = "{path}"; {access} FSAL {{ Name = VFS; }} }}'


class Host:
    """The machine itself, with as much of a Node as Ganesha needs."""

    name = "host"
    address = "127.0.0.1"
    run = staticmethod(run)

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[Any]] = []

    def popen(self, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a program; `close` kills it."""
        process = subprocess.Popen(argv, start_new_session=True, **options)
        self._processes.append(process)
        return process

    def path(self, inside: str | os.PathLike[str]) -> pathlib.Path:
        """Return the path itself."""
        return pathlib.Path(inside)

    def close(self) -> None:
        """Kill the programs that were started here, with their groups."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


class Ganesha:
    """ganesha.nfsd with a message bus of its own, NFSv4.0 to 4.2, lease and grace 5 s.

    `graceless` for clients that, unlike the kernel's, do not wait until a start's grace period is over.
    """

    def __init__(self, place: Node | Host, *, port: int = 2049, graceless: bool = False) -> None:
        self.node = place
        self.name = place.name
        self.address = place.address
        self.port = port
        self._directory = pathlib.Path(tempfile.mkdtemp(prefix="ganesha-"))
        self._number = 0
        self._server: subprocess.Popen[Any] | None = None
        self.bus = f"unix:path={self._directory}/bus"
        (self._directory / "bus.conf").write_text(BUS.format(directory=self._directory))
        (self._directory / "ganesha.conf").write_text(
            CONFIGURATION.format(port=port, address=self.address, graceless=str(graceless).lower())
        )
        place.run(["/bin/mkdir", "-p", "/var/lib/nfs/ganesha", "/run/ganesha"])
        place.popen(["/usr/bin/dbus-daemon", "--nofork", "--nopidfile", f"--config-file={self._directory}/bus.conf"])
        self._wait("the bus", (self._directory / "bus").exists)
        self.start()

    def start(self) -> None:
        """Start ganesha.nfsd, with the exports that were added so far, and wait until it answers on the bus."""
        log = self._directory / "log"
        self._server = self.node.popen(
            [
                "/usr/bin/ganesha.nfsd",
                "-F",
                "-f",
                f"{self._directory}/ganesha.conf",
                "-L",
                f"{log}",
                "-p",
                f"{self._directory}/pid",
            ],
            env={**os.environ, "DBUS_SYSTEM_BUS_ADDRESS": self.bus},
        )
        server = self._server
        try:
            self._wait("ganesha", lambda: server.poll() is not None or self._bus("ShowExports", check=False).returncode == 0)
            if server.poll() is not None:
                raise TimeoutError(f"ganesha ended with {server.returncode}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; its log:\n{log.read_text() if log.exists() else 'none'}") from None

    def kill(self) -> None:
        """Kill the server with -9, as a crash does; `start` brings it back with the same exports."""
        assert self._server is not None
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait(10)

    def export(self, path: str | os.PathLike[str], *, clients: str = "") -> int:
        """Export `path` (through DBus, as an operator would: no restart) and return its Export_Id.

        `clients`: who may come, as in ganesha's configuration, all if empty.
        """
        self._number += 1
        block = self._block(self._number, path, clients)
        self._change("AddExport", block, f"string:EXPORT(Export_Id={self._number})")
        with (self._directory / "ganesha.conf").open("a") as configuration:
            configuration.write(block + "\n")
        return self._number

    def update(self, number: int, path: str | os.PathLike[str], *, clients: str) -> None:
        """Change who may use an export."""
        self._change("UpdateExport", self._block(number, path, clients), f"string:EXPORT(Export_Id={number})")

    def unexport(self, number: int) -> None:
        """Remove an export."""
        self._bus("RemoveExport", f"uint16:{number}")

    def close(self) -> None:
        """End the server, its bus and its place."""
        self.node.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    @staticmethod
    def _block(number: int, path: str | os.PathLike[str], clients: str) -> str:
        access = f"Access_Type = None; CLIENT {{ Clients = {clients}; Access_Type = RW; }}" if clients else ""
        return EXPORT.format(number=number, path=os.fspath(path), access=access)

    def _change(self, method: str, block: str, which: str) -> None:
        with tempfile.NamedTemporaryFile("w", dir=self._directory, suffix=".conf") as file:
            file.write(block)
            file.flush()
            self._bus(method, f"string:{file.name}", which)

    def _bus(self, method: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        target = ["--dest=org.ganesha.nfsd", "/org/ganesha/nfsd/ExportMgr", f"org.ganesha.nfsd.exportmgr.{method}"]
        return self.node.run(["/usr/bin/dbus-send", f"--bus={self.bus}", "--print-reply", *target, *arguments], check=check)

    @staticmethod
    def _wait(what: str, ready: Any, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what} was not ready within {seconds} s")
            time.sleep(0.05)


def free_port() -> int:
    """Return a TCP port of the machine's loopback that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
