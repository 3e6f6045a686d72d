"""A whole hostPath domain on a temporary directory: real directories, real mounts, nothing pretended."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from csi_driver.backends.hostpath import HostPathBackend
from csi_driver.config import HostPathPool
from csi_driver.linux import mountinfo, mounts
from csi_driver.volumes.assembly import Domain, Installation, assemble
from csi_driver.volumes.model import (
    AccessMode,
    AccessType,
    Capability,
    CapacityRange,
    ClassParameters,
    ContentSource,
    CreateSnapshot,
    CreateVolume,
    PublishVolume,
    Snapshot,
    SourceKind,
    StageVolume,
    Volume,
)

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
        request = CreateVolume(name, CapacityRange(size, limit), (mount_capability(),), ClassParameters(**parameters), source)
        return self.volumes.create(request, time.monotonic() + 60)

    def snapshot(self, name: str, volume: Volume) -> Snapshot:
        return self.snapshots.create(CreateSnapshot(name, volume.record.handle), time.monotonic() + 60)

    def restore(self, name: str, snapshot: Snapshot, size: int = MIB) -> Volume:
        return self.create(name, size, ContentSource(SourceKind.SNAPSHOT, snapshot.record.handle))

    def clone(self, name: str, volume: Volume, size: int = MIB) -> Volume:
        return self.create(name, size, ContentSource(SourceKind.VOLUME, volume.record.handle))

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
            PublishVolume(handle, target, capability or mount_capability(), readonly, staging_path=self.staging_of(handle), **contexts)
        )
        return Path(target)

    def sweep(self):
        return self.domain.sweeper.sweep()

    def leftovers(self) -> list[str]:
        """What lies in the pools that no record names."""
        found = []
        for store in self.domain.pools:
            root = store.backend.root()
            named = {record.directory.partition("/")[0] for record in store.volumes.readable()}
            found += [f"{store.name}/{name}" for name in os.listdir(root) if name not in named | {".csi", "lost+found"}]
            for folder in ("staging", "trash"):
                found += [f"{store.name}/.csi/{folder}/{name}" for name in os.listdir(root / ".csi" / folder)]
            known = set(store.snapshots.ids())
            found += [f"{store.name}/.csi/snapshots-data/{name}" for name in os.listdir(root / ".csi/snapshots-data") if name not in known]
        return found


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


@pytest.fixture
def pools(tmp_path: Path) -> tuple[HostPathPool, ...]:
    return (
        HostPathPool("default", tmp_path / "pools" / "default"),
        HostPathPool("other", tmp_path / "pools" / "other", inline=True),
        HostPathPool("spread", tmp_path / "pools" / "spread", shared=True),
    )


@pytest.fixture
def bench(tmp_path: Path, pools: tuple[HostPathPool, ...]) -> Iterator[Bench]:
    made = make_bench(tmp_path, pools)
    yield made
    made.domain.stop(5)
    unmount_below(tmp_path)


def unmount_below(path: Path) -> None:
    for mount in reversed(mountinfo.mounts_below(path)):
        mounts.unmount_all(Path(mount.mount_point), 10)
