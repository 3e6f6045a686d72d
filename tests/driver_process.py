"""The driver as its users have it: a process with flags, a socket and signals."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc

from csi_driver.linux import mountinfo, mounts
from csi_driver.rpc import csi_pb2, csi_pb2_grpc

DRIVER = "hostpath.csi.tatami.dev"
START_SECONDS = 30


class DriverProcess:
    """One `tatami serve`. `home` holds pools, sockets, logs and the kubelet's directory."""

    def __init__(
        self,
        home: Path,
        *,
        role: str = "all",
        name: str = "csi",
        config: Path | None = None,
        node_id: str = "node-1",
        **environment: str,
    ):
        self.home = home
        self.role = role
        self.kubelet = home / "kubelet"
        self.kubelet.mkdir(exist_ok=True)
        # Socket paths end at 107 bytes; pytest's directories are longer.
        self._socket_directory = Path(tempfile.mkdtemp(prefix="tatami-", dir="/tmp"))
        self.socket = self._socket_directory / f"{name}.sock"
        self.log = home / f"{name}.log"
        written = home / "pools.toml"
        self.config = config or (written if written.exists() else write_pools(home))
        self.node_id = node_id
        self.environment = environment
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> "DriverProcess":
        self.spawn()
        self.wait_until_ready()
        return self

    def spawn(self) -> None:
        """Start the process and do not wait for it."""
        argv = [sys.executable, "-m", "csi_driver", "serve", "--config", str(self.config), "--role", self.role]
        argv += ["--endpoint", self.endpoint, "--node-id", self.node_id, "--kubelet-dir", str(self.kubelet)]
        argv += ["--log-level", "debug"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **self.environment}
            )

    def wait_until_ready(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the driver ended with {self.process.returncode}:\n{self.tail()}")
            if self.socket.exists():
                with self.channel() as channel, contextlib.suppress(grpc.RpcError):
                    if csi_pb2_grpc.IdentityStub(channel).Probe(csi_pb2.ProbeRequest(), timeout=2).ready.value:
                        return
            time.sleep(0.02)
        raise AssertionError(f"the driver was not ready after {START_SECONDS} s:\n{self.tail()}")

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.endpoint, options=[("grpc.use_local_subchannel_pool", 1)])

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self) -> None:
        """End the process if it runs, and take away every mount below home."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        for mount in reversed(mountinfo.mounts_below(self.home)):
            mounts.unmount_all(Path(mount.mount_point), 10)
        shutil.rmtree(self._socket_directory, ignore_errors=True)


def write_pools(home: Path, extra: str = "") -> Path:
    config = home / "pools.toml"
    config.write_text(
        f'[driver]\nbackend = "hostpath"\n{extra}\n[pools.default]\npath = "{home}/pools/default"\ninline = true\n'
    )
    return config
