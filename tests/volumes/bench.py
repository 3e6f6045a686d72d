"""A whole hostPath domain on a temporary directory: real directories, real mounts, nothing pretended."""

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from csi_driver.backends.hostpath import HostPathBackend
from csi_driver.config import HostPathPool
from csi_driver.linux import mountinfo, mounts
from csi_driver.volumes.answers import Snapshot, Volume
from csi_driver.volumes.assembly import Domain, Installation, assemble
from csi_driver.volumes.jobs import JobControl
from csi_driver.volumes.model import AccessMode, AccessType, ContentSource, SourceKind
from csi_driver.volumes.requests import (
    Capability,
    CapacityRange,
    ClassParameters,
    CreateSnapshot,
    CreateVolume,
    PublishVolume,
    StageVolume,
)
from csi_driver.volumes.turns import COPIES_AT_ONCE

DRIVER = "hostpath.csi.tatami.dev"
NODE = "node-1"
MIB = 1024**2


def mount_capability(mode: AccessMode = AccessMode.SINGLE_NODE_MULTI_WRITER, *flags: str) -> Capability:
    return Capability(AccessType.MOUNT, mode, mount_flags=flags)


@dataclass
class Bench:
    """One node with its pools, and the calls that tests make, with the fields that they do not care about filled in."""

    domain: Domain
    root: Path
    kubelet: Path
    installation: Installation

    @property
    def volumes(self):
        return self.domain.services.volumes

    @property
    def snapshots(self):
        return self.domain.services.snapshots

    @property
    def groups(self):
        return self.domain.services.groups

    @property
    def attachments(self):
        return self.domain.services.attachments

    @property
    def node(self):
        return self.domain.services.node

    @property
    def health(self):
        return self.domain.services.health

    def pool(self, name: str = "default"):
        return self.domain.pools.find(name)

    def create(self, name: str, size: int = MIB, source: ContentSource | None = None, limit: int = 0, **parameters) -> Volume:
        return self.volumes.create(self.request(name, size, source, limit, **parameters), time.monotonic() + 60)

    def request(
        self, name: str, size: int = MIB, source: ContentSource | None = None, limit: int = 0, **parameters
    ) -> CreateVolume:
        return CreateVolume(name, CapacityRange(size, limit), (mount_capability(),), ClassParameters(**parameters), source)

    def snapshot(self, name: str, volume: Volume) -> Snapshot:
        return self.snapshots.create(CreateSnapshot(name, volume.record.handle), time.monotonic() + 60)

    def restore(self, name: str, snapshot: Snapshot, size: int = MIB) -> Volume:
        return self.create(name, size, ContentSource(SourceKind.SNAPSHOT, snapshot.record.handle))

    def clone(self, name: str, volume: Volume, size: int = MIB) -> Volume:
        return self.create(name, size, ContentSource(SourceKind.VOLUME, volume.record.handle))

    def volume_source(self, volume: Volume) -> ContentSource:
        return ContentSource(SourceKind.VOLUME, volume.record.handle)

    def path(self, volume: Volume) -> Path:
        return self.pool(volume.record.pool).path_of(volume.record.directory)

    def staging_of(self, handle: str) -> str:
        path = self.kubelet / "plugins" / "staging" / handle.replace("/", "_")
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def target(self, name: str) -> str:
        path = self.kubelet / "pods" / name / "mount"
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def stage(self, handle: str, capability: Capability | None = None, **contexts) -> str:
        staging = self.staging_of(handle)
        self.node.stage(StageVolume(handle, staging, capability or mount_capability(), **contexts))
        return staging

    def publish(self, handle: str, pod: str, capability: Capability | None = None, readonly: bool = False, **contexts) -> Path:
        target = self.target(pod)
        self.node.publish(
            PublishVolume(
                handle, target, capability or mount_capability(), readonly, staging_path=self.staging_of(handle), **contexts
            )
        )
        return Path(target)

    def sweep(self):
        return self.domain.sweeper.sweep()

    def restarted(self) -> "Bench":
        """The same node and pools as a driver that has just started sees them: nothing is remembered but what is on disk."""
        domain = assemble(self.installation)
        domain.prepare()
        return Bench(domain, self.root, self.kubelet, self.installation)

    def leftovers(self, *known: str) -> list[str]:
        """What lies in the pools that no record names, but for `known` top directories. What was retained or archived has a record."""
        found = []
        for store in self.domain.pools:
            root = store.backend.root()
            kept = [json.loads(path.read_text()) for path in (root / ".csi/retained").iterdir()]
            named = {record.directory.partition("/")[0] for record in store.volumes.readable()}
            named |= {record["directory"].partition("/")[0] for record in kept}
            named |= {".csi", "lost+found", *known} | ({"archived"} if os.listdir(root / ".csi/archived") else set())
            found += [f"{store.name}/{name}" for name in os.listdir(root) if name not in named]
            for folder in ("staging", "trash"):
                found += [f"{store.name}/.csi/{folder}/{name}" for name in os.listdir(root / ".csi" / folder)]
            known_snapshots = set(store.snapshots.ids())
            found += [
                f"{store.name}/.csi/snapshots-data/{name}"
                for name in os.listdir(root / ".csi/snapshots-data")
                if name not in known_snapshots
            ]
            found += [str(path) for path in (root / ".csi").rglob("*.tmp.*") if "snapshots-data" not in path.parts]
        return found + [str(path) for path in self.installation.state_directory.rglob(".tmp.*")]

    def age_temporaries(self) -> None:
        """Let the files that a killed writer left look as old as they must be to be removed."""
        places = [store.backend.root() / ".csi" for store in self.domain.pools] + [self.installation.state_directory]
        for place in places:
            for path in place.rglob(".tmp.*"):
                os.utime(path, (0, 0), follow_symlinks=False)


def make_bench(tmp_path: Path, pools: tuple[HostPathPool, ...], **changes) -> Bench:
    kubelet = tmp_path / "kubelet"
    kubelet.mkdir(exist_ok=True)
    topology = {f"topology.{DRIVER}/node": NODE}
    settings = {
        "driver": DRIVER,
        "backends": {pool.name: HostPathBackend(pool, topology) for pool in pools},
        "default_pool": "default",
        "node_id": NODE,
        "topology": topology,
        "state_directory": kubelet / "plugins" / DRIVER,
        "kubelet_dir": kubelet,
    }
    installation = Installation(**{**settings, **changes})
    domain = assemble(installation)
    domain.prepare()
    return Bench(domain, tmp_path, kubelet, installation)


def unmount_below(path: Path) -> None:
    for mount in reversed(mountinfo.mounts_below(path)):
        mounts.unmount_all(Path(mount.mount_point), 10)


@contextmanager
def copying_stands_still_at(*paths: Path) -> Iterator[None]:
    """Let a copy that comes to such a file wait there, as behind any tenant's write lease (fcntl(2)); it goes on afterwards."""
    told = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel's request to give the lease back
    descriptors = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
    try:
        for descriptor in descriptors:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
        signal.signal(signal.SIGIO, told)


@contextmanager
def all_turns_taken(bench: Bench, pool: str = "default") -> Iterator[None]:
    """Let what captures in the pool wait in line; it goes on afterwards."""
    turns = bench.domain.services.snapshots._contents._captures._turns
    with ExitStack() as taken:
        for number in range(COPIES_AT_ONCE):
            taken.enter_context(turns.take(pool, f"volume-{number}", JobControl(f"before-{number}")))
        yield


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until something has come about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)
