"""Removal: how volumes and snapshots leave, without haste and without a moment in which they are half gone.

Data and record are moved to the trash, in this order, each by one rename: deletion takes the same time whatever the size, and the
name is free at once. The sweeper empties the trash. What `onDelete` keeps is moved out of the way of the name instead.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

from csi_driver.errors import FailedPrecondition, OperationPending
from csi_driver.linux import files
from csi_driver.volumes.contents import Contents, content_key
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import OnDelete, Phase, SnapshotRecord, VolumeRecord
from csi_driver.volumes.pools import ARCHIVE_DIRECTORY, ARCHIVED, RETAINED, PoolStore, exists_at, new_token


class VolumeRemoval:
    """Takes a volume away. The caller holds the volume's lock."""

    def __init__(self, locks: KeyedLocks, contents: Contents) -> None:
        self._locks = locks
        self._contents = contents

    def remove(self, store: PoolStore, record: VolumeRecord) -> None:
        """Delete, retain or archive the volume.

        Raises FailedPrecondition while it is published or mounted, OperationPending while its content is being copied.
        """
        if record.published:
            nodes = ", ".join(publication.node_id for publication in record.published)
            raise FailedPrecondition(f"volume {record.handle} is still published to {nodes}: unpublish it first")
        with self._locks.hold(store, content_key(record.id)):
            if record.phase is Phase.READY and (mounted := store.backend.mounts_of(record.directory)):
                raise FailedPrecondition(
                    f"volume {record.handle} is still mounted at {mounted[0]} on this node: unpublish it first"
                )
            if record.phase is Phase.CREATING and not self._contents.is_in_place(store, record):
                # Nobody was ever told of this volume, and what lies at its directory is not its content.
                self._contents.discard(store, record.id)
                self._contents.release_claim(store, record)
                store.volumes.remove(record.id)
                return
            if record.phase is not Phase.DELETING:
                # What was never shown to anybody holds nothing that somebody would want to keep.
                fate = record.on_delete if record.phase is Phase.READY else OnDelete.DELETE
                record = store.volumes.replace(replace(record, phase=Phase.DELETING, token=new_token(), on_delete=fate))
            self.finish(store, record)

    def finish(self, store: PoolStore, record: VolumeRecord) -> None:
        """Complete the removal of a volume whose record says `deleting`; every step may have been done before."""
        kept = f"{record.id}.{record.token}"
        if record.on_delete is OnDelete.DELETE or record.ephemeral:
            store.trash_directory(record.directory, kept)
            store.trash_record(store.volumes, record.id, kept)
            return
        if record.on_delete is OnDelete.ARCHIVE:
            _archive(store, record)
        with store.open(ARCHIVED if record.on_delete is OnDelete.ARCHIVE else RETAINED) as folder:
            store.volumes.move(record.id, folder, f"{kept}.json")


class SnapshotRemoval:
    """Takes a snapshot away. The caller holds the snapshot's lock."""

    def __init__(self, locks: KeyedLocks) -> None:
        self._locks = locks

    def remove(self, store: PoolStore, record: SnapshotRecord) -> None:
        """Delete the snapshot. Raises FailedPrecondition while a restore reads it."""
        with self.hold(store, record):
            self.take(store, record)

    @contextmanager
    def hold(self, store: PoolStore, record: SnapshotRecord) -> Iterator[None]:
        """Keep restores away until the context ends. Raises FailedPrecondition while one reads the snapshot."""
        with ExitStack() as held:
            try:
                held.enter_context(self._locks.hold(store, content_key(record.id)))
            except OperationPending as error:
                raise FailedPrecondition(f"snapshot {record.handle} is in use: a volume is being restored from it") from error
            yield

    def take(self, store: PoolStore, record: SnapshotRecord) -> None:
        """Delete a snapshot that the caller holds."""
        if record.phase is not Phase.DELETING:
            record = store.snapshots.replace(replace(record, phase=Phase.DELETING, token=new_token()))
        self.finish(store, record)

    def finish(self, store: PoolStore, record: SnapshotRecord) -> None:
        """Complete the removal of a snapshot whose record says `deleting`."""
        kept = f"{record.id}.{record.token}"
        store.trash_staging(record.id)
        store.trash_snapshot_data(record.id, kept)
        store.trash_record(store.snapshots, record.id, kept)


def _archive(store: PoolStore, record: VolumeRecord) -> None:
    name = f"{record.directory.rpartition('/')[2]}.{record.token}"
    with store.open_root() as root:
        with suppress(FileExistsError):
            os.mkdir(ARCHIVE_DIRECTORY, 0o700, dir_fd=root)
            files.sync_directory(root)
        archive = files.open_beneath(root, ARCHIVE_DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if exists_at(archive, name):
            return  # moved before a crash: what lies at the old place now is another's
        with store.open_parent(record.directory) as (parent, last):
            os.rename(last, name, src_dir_fd=parent, dst_dir_fd=archive)
            files.sync_directory(archive)
            files.sync_directory(parent)
    except FileNotFoundError:
        pass  # gone: the record goes its way all the same
    finally:
        os.close(archive)
