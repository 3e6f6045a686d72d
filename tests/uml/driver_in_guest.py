"""The driver's own processes in the nodes of a guest, called as sidecars and kubelet call them.

`Driver` is one `tatami serve` in one node. `Cluster` is a controller in a node of its own and a node process in each of the others; it
remembers, as Kubernetes' objects do, what the controller said of a volume, and walks the way of a volume to a pod and back.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import grpc
import psutil
import pytest
from nodes import Network, Node, run
from servers import KernelNfsServer

from csi_driver.rpc import csi_pb2 as csi
from tests.storm.client import Client

CHECKOUT = pathlib.Path(__file__).resolve().parents[2]
NAME = "nfs.csi.tatami.dev"
KUBELET = pathlib.Path("/var/lib/kubelet")  # each node's own
START_SECONDS = 60

_MODE = csi.VolumeCapability.AccessMode
RWX, ROX = _MODE.MULTI_NODE_MULTI_WRITER, _MODE.MULTI_NODE_READER_ONLY
RWO, RWOP = _MODE.SINGLE_NODE_MULTI_WRITER, _MODE.SINGLE_NODE_SINGLE_WRITER


@dataclass(frozen=True)
class Pool:
    """A `[pools.NAME]`."""

    name: str
    server: str
    path: str
    options: tuple[str, ...] = ("vers=4.2",)
    inline: bool = True
    size: str = ""
    data: str = ""

    def text(self) -> str:
        """Say it as pools.toml does."""
        options = ", ".join(f'"{option}"' for option in self.options)
        return (
            f'[pools.{self.name}]\nserver = "{self.server}"\npath = "{self.path}"\noptions = [{options}]\n'
            f"inline = {str(self.inline).lower()}\n" + (f'size = "{self.size}"\n' if self.size else "")
        ) + (f'data = "{self.data}"\n' if self.data else "")


def pool_of(server: KernelNfsServer, path: str | os.PathLike[str], name: str = "default", *options: str) -> Pool:
    """Describe an exported path of a server as a pool."""
    return Pool(name, server.address, os.fspath(path), options or ("vers=4.2",))


class Driver:
    """One process of the driver in a node. Its log is `log`, its socket can be reached from everywhere in the guest."""

    def __init__(self, node: Node, config: pathlib.Path, role: str) -> None:
        self.node = node
        self.role = role
        self._config = config
        # Socket paths end at 107 bytes.
        self._directory = pathlib.Path(tempfile.mkdtemp(prefix="csi-", dir="/tmp"))
        self.socket = self._directory / "s"
        self.log = self._directory / "log"
        self.confinement: tuple[str, ...] = ()
        """The command that runs the driver's, and takes something from it."""
        self.process: subprocess.Popen[bytes] | None = None
        self._client: Client | None = None

    @property
    def endpoint(self) -> str:
        """Say where it serves, as csi-sanity takes it."""
        return f"unix://{self.socket}"

    def spawn(self) -> None:
        """Start the process and do not wait for it."""
        argv = [
            *self.confinement,
            sys.executable,
            "-m",
            "csi_driver",
            "serve",
            "--config",
            str(self._config),
            "--role",
            self.role,
        ]
        argv += ["--endpoint", self.endpoint, "--kubelet-dir", str(KUBELET), "--log-level", "debug"]
        with self.log.open("ab") as log:
            self.process = self.node.popen(argv, directory=str(CHECKOUT), stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def start(self) -> Self:
        """Start the process and wait until it serves: whether its pools can be reached is another thing."""
        self.spawn()
        self.wait_until_serving()
        return self

    def wait_until_serving(self) -> None:
        """Wait until a probe is answered. Raises AssertionError with the log's end."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the {self.role} ended with {self.process.returncode}:\n{self.tail()}")
            if self.socket.exists():
                with contextlib.suppress(grpc.RpcError):
                    self.call("Probe", csi.ProbeRequest(), 5)
                    return
            time.sleep(0.05)
        raise AssertionError(f"the {self.role} did not serve after {START_SECONDS} s:\n{self.tail()}")

    def call(self, method: str, request, timeout: float = 100):
        """Make one call. Raises grpc.RpcError."""
        if self._client is None:
            self._client = Client(self.endpoint)
        return self._client.call(method, request, timeout)

    def insist(self, method: str, request, seconds: float = 120):
        """Call until it is answered with more than "still at it", as sidecars do. Raises grpc.RpcError."""
        until = time.monotonic() + seconds
        while True:
            try:
                return self.call(method, request)
            except grpc.RpcError as error:
                again = error.code() in (
                    grpc.StatusCode.ABORTED,
                    grpc.StatusCode.UNAVAILABLE,
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                )
                if not again or time.monotonic() > until:
                    raise
            time.sleep(0.2)

    def kill(self) -> None:
        """Kill it with -9, alone."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(20)
        self._disconnect()

    def stop(self) -> int:
        """Stop it with SIGTERM; returns its exit code."""
        assert self.process is not None
        self.process.terminate()
        code = self.process.wait(60)
        self._disconnect()
        return code

    def restart(self) -> None:
        """Stop it, as an upgrade does, and start it anew."""
        self.stop()
        self.start()

    def threads(self) -> int:
        """Count its threads."""
        return psutil.Process(self.process.pid).num_threads()

    def children(self) -> list[psutil.Process]:
        """List what it started and what still runs."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def tail(self, lines: int = 60) -> str:
        """Return the end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""

    def close(self) -> None:
        """End it."""
        self._disconnect()
        if self.process is not None and self.process.poll() is None:
            self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.channel.close()
            self._client = None


@dataclass(frozen=True)
class Volume:
    """What a PV says of a volume."""

    handle: str
    context: Mapping[str, str] = field(default_factory=dict)

    @property
    def short(self) -> str:
        """Name it in paths."""
        return self.handle.rpartition(".")[2][:20].replace("/", "-") or "volume"


@dataclass(frozen=True)
class Use:
    """How a pod on a node uses a volume: a VolumeAttachment and a mount in one."""

    volume: Volume
    driver: Driver
    mode: int = RWX
    flags: tuple[str, ...] = ()
    group: str = ""
    readonly: bool = False
    pod: str = "pod"
    fs_type: str = ""
    block: bool = False

    @property
    def capability(self) -> csi.VolumeCapability:
        """Say it in CSI."""
        mode = csi.VolumeCapability.AccessMode(mode=self.mode)
        if self.block:
            return csi.VolumeCapability(block=csi.VolumeCapability.BlockVolume(), access_mode=mode)
        mount = csi.VolumeCapability.MountVolume(fs_type=self.fs_type, mount_flags=self.flags, volume_mount_group=self.group)
        return csi.VolumeCapability(mount=mount, access_mode=mode)

    @property
    def staging(self) -> pathlib.Path:
        """Where the kubelet has it staged, in the node."""
        return KUBELET / "plugins/kubernetes.io/csi" / NAME / self.volume.short / "globalmount"

    @property
    def target(self) -> pathlib.Path:
        """Where the kubelet has it for the pod, in the node."""
        return KUBELET / "pods" / self.pod / "volumes/kubernetes.io~csi" / self.volume.short / "mount"


class Cluster:
    """A controller, nodes, and the objects that Kubernetes would keep. Pools can be changed by `configure`."""

    def __init__(
        self,
        network: Network,
        pools: Iterable[Pool],
        *,
        nodes: int = 2,
        driver_options: str = "",
        v3: bool = False,
        controller_at: Node | None = None,
    ) -> None:
        """Make the nodes; `controller_at`: a node that is there already (a server's), and stays."""
        self._directory = pathlib.Path(tempfile.mkdtemp(prefix="cluster-", dir="/tmp"))
        self._options = driver_options
        self.config = self._directory / "pools.toml"
        self.configure(pools)
        controller = controller_at or network.node("controller")
        self._made = [controller, *(network.node("worker") for _ in range(nodes))]
        self._lent = controller_at
        if v3:
            for node in self._made:
                node.start_statd()
        self.controller = Driver(self._made[0], self.config, "controller")
        self.nodes = [Driver(node, self.config, "node") for node in self._made[1:]]
        self._told: dict[tuple[str, str], Mapping[str, str]] = {}
        self._ids: dict[str, str] = {}

    @property
    def drivers(self) -> list[Driver]:
        """All processes."""
        return [self.controller, *self.nodes]

    def configure(self, pools: Iterable[Pool]) -> None:
        """Write pools.toml; a process reads it when it starts."""
        self.config.write_text(f'[driver]\nbackend = "nfs"\n{self._options}\n' + "\n".join(pool.text() for pool in pools))

    def start(self) -> Self:
        """Start all processes, at once."""
        for driver in self.drivers:
            driver.spawn()
        for driver in self.drivers:
            driver.wait_until_serving()
        return self

    def restart(self) -> None:
        """Start all processes anew, as after a change of their ConfigMap."""
        for driver in self.drivers:
            driver.stop()
        self.start()

    def close(self) -> None:
        """End the processes and close their nodes."""
        for driver in self.drivers:
            driver.close()
        for node in reversed(self._made):
            if node is not self._lent:
                node.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        """Start."""
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    # --- the controller -----------------------------------------------------------------------------------------------------------

    def create(
        self,
        name: str,
        *,
        access: int = RWX,
        flags: Sequence[str] = (),
        snapshot: str = "",
        volume: str = "",
        size: int = 1 << 20,
        fs_type: str = "",
        block: bool = False,
        **parameters: str,
    ) -> Volume:
        """Make a volume (as external-provisioner does: until it is there); `parameters` are the class'."""
        asked = Use(Volume(""), self.controller, access, tuple(flags), fs_type=fs_type, block=block)
        request = csi.CreateVolumeRequest(
            name=name,
            capacity_range=csi.CapacityRange(required_bytes=size),
            volume_capabilities=[asked.capability],
            parameters=parameters,
        )
        if snapshot:
            request.volume_content_source.snapshot.snapshot_id = snapshot
        if volume:
            request.volume_content_source.volume.volume_id = volume
        made = self.controller.insist("CreateVolume", request).volume
        return Volume(made.volume_id, dict(made.volume_context))

    def expand(self, use: Use, size: int) -> int:
        """Make a volume larger, in the controller and on the node that uses it; return its bytes there."""
        capacity = csi.CapacityRange(required_bytes=size)
        request = csi.ControllerExpandVolumeRequest(
            volume_id=use.volume.handle, capacity_range=capacity, volume_capability=use.capability
        )
        grown = self.controller.insist("ControllerExpandVolume", request)
        if not grown.node_expansion_required:
            return grown.capacity_bytes
        asked = csi.NodeExpandVolumeRequest(
            volume_id=use.volume.handle,
            volume_path=str(use.target),
            staging_target_path=str(use.staging),
            capacity_range=capacity,
            volume_capability=use.capability,
        )
        return use.driver.call("NodeExpandVolume", asked).capacity_bytes

    def delete(self, volume: Volume) -> None:
        """Delete a volume."""
        self.controller.insist("DeleteVolume", csi.DeleteVolumeRequest(volume_id=volume.handle))

    def snapshot(self, name: str, volume: Volume) -> str:
        """Make a snapshot and return its handle."""
        request = csi.CreateSnapshotRequest(name=name, source_volume_id=volume.handle)
        return self.controller.insist("CreateSnapshot", request).snapshot.snapshot_id

    # --- the way to a pod ---------------------------------------------------------------------------------------------------------

    def node_id(self, driver: Driver) -> str:
        """Ask a node what it is called."""
        if driver.node.name not in self._ids:
            self._ids[driver.node.name] = driver.call("NodeGetInfo", csi.NodeGetInfoRequest()).node_id
        return self._ids[driver.node.name]

    def use(self, volume: Volume, node: int = 0, **how) -> Use:
        """Describe how a pod of a node uses a volume, and do nothing yet."""
        return Use(volume, self.nodes[node], **how)

    def attach(self, use: Use) -> Mapping[str, str]:
        """ControllerPublishVolume; what it says is kept for the node."""
        request = csi.ControllerPublishVolumeRequest(
            volume_id=use.volume.handle,
            node_id=self.node_id(use.driver),
            volume_capability=use.capability,
            readonly=use.readonly,
            volume_context=use.volume.context,
        )
        told = dict(self.controller.call("ControllerPublishVolume", request).publish_context)
        self._told[use.volume.handle, use.driver.node.name] = told
        return told

    def stage(self, use: Use, told: Mapping[str, str] | None = None) -> None:
        """NodeStageVolume; `told`: a publish_context other than the controller's."""
        use.driver.node.path(use.staging).parent.mkdir(parents=True, exist_ok=True)
        request = csi.NodeStageVolumeRequest(
            volume_id=use.volume.handle,
            staging_target_path=str(use.staging),
            volume_capability=use.capability,
            publish_context=self._context(use, told),
            volume_context=use.volume.context,
        )
        use.driver.call("NodeStageVolume", request)

    def publish(self, use: Use, told: Mapping[str, str] | None = None) -> pathlib.Path:
        """NodePublishVolume; returns the target, a path in the node."""
        use.driver.node.path(use.target).parent.mkdir(parents=True, exist_ok=True)
        request = csi.NodePublishVolumeRequest(
            volume_id=use.volume.handle,
            staging_target_path=str(use.staging),
            target_path=str(use.target),
            volume_capability=use.capability,
            readonly=use.readonly,
            publish_context=self._context(use, told),
            volume_context=use.volume.context,
        )
        use.driver.call("NodePublishVolume", request)
        return use.target

    def mount(self, use: Use) -> pathlib.Path:
        """Attach, stage and publish."""
        self.attach(use)
        self.stage(use)
        return self.publish(use)

    def unpublish(self, use: Use, timeout: float = 100) -> None:
        """NodeUnpublishVolume."""
        request = csi.NodeUnpublishVolumeRequest(volume_id=use.volume.handle, target_path=str(use.target))
        use.driver.call("NodeUnpublishVolume", request, timeout)

    def unstage(self, use: Use, timeout: float = 100) -> None:
        """NodeUnstageVolume."""
        request = csi.NodeUnstageVolumeRequest(volume_id=use.volume.handle, staging_target_path=str(use.staging))
        use.driver.call("NodeUnstageVolume", request, timeout)

    def detach(self, use: Use) -> None:
        """ControllerUnpublishVolume."""
        request = csi.ControllerUnpublishVolumeRequest(volume_id=use.volume.handle, node_id=self.node_id(use.driver))
        self.controller.call("ControllerUnpublishVolume", request)
        self._told.pop((use.volume.handle, use.driver.node.name), None)

    def unmount(self, use: Use) -> None:
        """Unpublish, unstage and detach."""
        self.unpublish(use)
        self.unstage(use)
        self.detach(use)

    def _context(self, use: Use, told: Mapping[str, str] | None) -> Mapping[str, str]:
        return self._told.get((use.volume.handle, use.driver.node.name), {}) if told is None else told


def of_pod(use: Use, pod: str) -> Use:
    """Describe another pod on the same node."""
    return replace(use, pod=pod)


@contextlib.contextmanager
def refused(code: str, *words: str) -> Iterator[None]:
    """Expect a call to end with `code`, and a message that has all `words` in it."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code().name == code, caught.value.details()
    for word in words:
        assert word in caught.value.details(), caught.value.details()


def sources(node: Node, below: pathlib.Path | str = KUBELET) -> dict[str, str]:
    """Return what a node has mounted below a path: target -> source; of stacked mounts the one that is seen."""
    table = {}
    for line in pathlib.Path(f"/proc/{node.pid}/mountinfo").read_text().splitlines():
        fields, rest = line.split(" - ")
        target = fields.split()[4]
        if pathlib.Path(target).is_relative_to(below) and target != str(below):
            table[target] = rest.split()[1]
    return table


def mount_options(node: Node, target: pathlib.Path) -> tuple[set[str], set[str]]:
    """Return the options of a node's mount: the mount's own, and the filesystem's."""
    for line in reversed(pathlib.Path(f"/proc/{node.pid}/mountinfo").read_text().splitlines()):
        fields, rest = line.split(" - ")
        if fields.split()[4] == str(target):
            return set(fields.split()[5].split(",")), set(rest.split()[2].split(","))
    raise AssertionError(f"nothing is mounted at {target}")


def shell(use_or_node: Use | Driver | Node, script: str, timeout: float = 60, *, check: bool = True):
    """Run a shell script in a node, as root and with a deadline; returns what it printed, or (without check) all of its outcome."""
    node = use_or_node.driver.node if isinstance(use_or_node, Use) else getattr(use_or_node, "node", use_or_node)
    done = node.run(["/bin/bash", "-ec", script], timeout=timeout, check=check)
    return done.stdout if check else done


__all__ = [
    "KUBELET", "NAME", "ROX", "RWO", "RWOP", "RWX", "Cluster", "Driver", "Pool", "Use", "Volume",
    "mount_options", "of_pod", "pool_of", "refused", "run", "shell", "sources",
]  # fmt: skip
