"""How a volume gets onto a node, which depends on how it is stored: a directory is mounted or bound, an image is attached first."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from csi_driver.linux import mounts
from csi_driver.volumes.node_state import NodeVolumeRecord
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.requests import Capability
from csi_driver.volumes.unmounting import UNMOUNT_SECONDS, Unmounting


class Staging(Protocol):
    """One layout's way onto a node. The caller holds the volume's lock; `known` is on disk before anything is mounted."""

    def stage(
        self, known: NodeVolumeRecord, store: PoolStore, capability: Capability, staging: Path, size_bytes: int | None
    ) -> NodeVolumeRecord:
        """Bring the volume to its staging path, an empty directory that exists, and return what is known of it then."""

    def is_staged(self, known: NodeVolumeRecord, store: PoolStore) -> bool:
        """Tell whether it is there, by what the kernel says."""

    def publish(
        self, known: NodeVolumeRecord, store: PoolStore, target: Path, flags: Sequence[str], *, read_only: bool
    ) -> NodeVolumeRecord:
        """Show what is staged at a target, which exists and is empty; what turns out to be another volume is taken away again."""

    def shows(self, known: NodeVolumeRecord, store: PoolStore, target: Path) -> bool:
        """Tell whether what is mounted on top at `target` is the volume."""

    def unstage(self, known: NodeVolumeRecord, staging: Path) -> None:
        """Take it away from the node. Raises Unavailable where that cannot be done yet without harm."""


class DirectoryStaging:
    """The Staging of directories: the pool's backend mounts or binds them."""

    def __init__(self, unmounting: Unmounting) -> None:
        self._unmounting = unmounting

    def stage(
        self,
        known: NodeVolumeRecord,
        store: PoolStore,
        capability: Capability,
        staging: Path,
        size_bytes: int | None,  # noqa: ARG002
    ) -> NodeVolumeRecord:
        """Mount the directory. Raises what PoolBackend.stage raises."""
        read_only = capability.access_mode.reader_only
        store.backend.stage(known.directory, staging, capability.mount_flags, read_only=read_only)
        return known

    def is_staged(self, known: NodeVolumeRecord, store: PoolStore) -> bool:
        return self.shows(known, store, Path(known.staging_path))

    def publish(
        self, known: NodeVolumeRecord, store: PoolStore, target: Path, flags: Sequence[str], *, read_only: bool
    ) -> NodeVolumeRecord:
        store.backend.publish(Path(known.staging_path), target, flags, read_only=read_only)
        return known

    def shows(self, known: NodeVolumeRecord, store: PoolStore, target: Path) -> bool:
        return store.backend.is_staged(known.directory, target, known.source)

    def unstage(self, known: NodeVolumeRecord, staging: Path) -> None:
        if known.source and known.holds_unsaved_writes:
            self._unmounting.unmount_clean(known, staging)
        else:
            self._unmounting.unmount(known, known.handle, staging)


def undo_publish(target: Path) -> None:
    """Unmount what was published a moment ago and turned out to be something else."""
    mounts.unmount_all(target, UNMOUNT_SECONDS)
