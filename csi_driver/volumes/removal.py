"""Removal: how volumes and snapshots leave, without haste and without a moment in which they are half gone.

Record and data are moved to the trash, in this order, each by one rename (trash.py): deletion takes the same time whatever the size,
needs no room, and the name is free at once. The sweeper completes what was cut off and empties the trash. What `onDelete` keeps is
moved out of the way of the name instead.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

from csi_driver.errors import FailedPrecondition, OperationPending
from csi_driver.linux import beneath, files
from csi_driver.linux.renames import rename_directory
from csi_driver.volumes.attempts import trash_staging
from csi_driver.volumes.contents import content_key
from csi_driver.volumes.fencing import Fence
from csi_driver.volumes.handles import SNAPSHOT, VOLUME
from csi_driver.volumes.limits import Limits
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import OnDelete, Phase, SnapshotRecord, VolumeRecord
from csi_driver.volumes.pool_layout import ARCHIVE_DIRECTORY, ARCHIVED, RETAINED, archived_place, exists_at, new_token
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.records import Gate
from csi_driver.volumes.snapshot_places import SnapshotPlaces
from csi_driver.volumes.trash import begin_deletion, unfinished_deletions
from csi_driver.volumes.volume_places import VolumePlaces

_log = logging.getLogger(__name__)


class VolumeRemoval:
    """Takes a volume away. The caller holds the volume's lock."""

    def __init__(self, locks: KeyedLocks, places: VolumePlaces, limits: Limits) -> None:
        self._locks = locks
        self._places = places
        self._limits = limits
        self._fence = Fence(locks, "volume")

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
            if record.phase is Phase.CREATING and not self._places.is_in_place(store, record):
                # Nobody was ever told of this volume, and what lies at its directory is not its content.
                trash_staging(store, record.id)
                self._places.release_claim(store, record)
                self._fence.require(store, store.volumes, record)
                store.volumes.remove(record.id)
                return
            # What was never shown to anybody holds nothing that somebody would want to keep.
            never_shown = record.phase is Phase.CREATING or record.ephemeral
            fate = OnDelete.DELETE if never_shown else record.on_delete
            if fate is OnDelete.ARCHIVE and record.phase is not Phase.DELETING:
                deleting = replace(record, phase=Phase.DELETING, token=new_token())
                record = store.volumes.replace(deleting, self._gate(store, record.id))
            self._take(store, record, fate)

    def finish(self, store: PoolStore, record: VolumeRecord) -> None:
        """Complete the removal of a volume whose record says `deleting`; every step may have been done before."""
        self._take(store, record, record.on_delete)

    def _take(self, store: PoolStore, record: VolumeRecord, fate: OnDelete) -> None:
        if fate is OnDelete.DELETE:
            deletion = begin_deletion(store, VOLUME, store.volumes, record.id, self._gate(store, record.id))
            # While the data is in its place: once it is gone, another volume may have what this one was held by.
            self._limits.release(store, record)
            deletion.take_directory(record.directory, self._gate(store, record.id))
            deletion.complete()
            return
        if fate is OnDelete.ARCHIVE:
            _archive(store, record, self._gate(store, record.id))
        folder, token = (ARCHIVED, record.token) if fate is OnDelete.ARCHIVE else (RETAINED, new_token())
        with store.open(folder) as kept:
            store.volumes.move(record.id, kept, f"{record.id}.{token}.json", self._gate(store, record.id))

    def _gate(self, store: PoolStore, record_id: str) -> Gate:
        """Return the gate (records.py) of a step that only who holds the volume's lock may take."""
        return self._locks.gate(store, f"{VOLUME}:{record_id}")

    def complete(self, store: PoolStore, record_id: str) -> int:
        """Complete the deletions of this id that were cut off. The caller holds the volume's lock. Returns how many there were."""
        deletions = unfinished_deletions(store, VOLUME, record_id)
        for deletion in deletions:
            record = deletion.record(store.volumes)
            if record is None or deletion.has_data():
                deletion.complete()
                continue
            with self._places.hold_own(store, record) as is_own:
                if is_own:
                    self._limits.release(store, record)
                    deletion.take_directory(record.directory, self._gate(store, record_id))
                else:
                    _log.warning(
                        "what lies at the directory of a deleted volume, if anything, is another's and stays",
                        extra={"pool": store.name, "volume": record.handle, "directory": record.directory},
                    )
                deletion.complete()
        return len(deletions)


class SnapshotRemoval:
    """Takes a snapshot away. The caller holds the snapshot's lock."""

    def __init__(self, locks: KeyedLocks, places: SnapshotPlaces) -> None:
        self._locks = locks
        self._places = places

    def remove(self, store: PoolStore, record: SnapshotRecord) -> None:
        """Delete the snapshot. Raises FailedPrecondition while a restore reads it."""
        with self.hold(store, record):
            self.take(store, record)

    def abandon(self, store: PoolStore, record: SnapshotRecord) -> None:
        """End a creation that nobody asks for any more: a snapshot that is whole is made ready and kept, any other is deleted.

        Raises FailedPrecondition while something reads it, LockLost.
        """
        self.complete(store, record.id)
        if not self._places.has_content(store, record.id):
            self.remove(store, record)
            return
        # Somebody may have been told that it is ready, and `creating` be what a controller that was cut off wrote too late.
        self._places.seal(store, record.id)
        self._places.make_ready(store, record)
        _log.warning(
            "a snapshot that is whole, though its creation was not asked for again, is kept",
            extra={"pool": store.name, "snapshot": record.handle},
        )

    @contextmanager
    def hold(self, store: PoolStore, record: SnapshotRecord) -> Iterator[None]:
        """Keep restores away until the context ends. Raises FailedPrecondition while one reads the snapshot."""
        with ExitStack() as held:
            try:
                held.enter_context(self._locks.hold(store, content_key(record.id)))
            except OperationPending as error:
                raise FailedPrecondition(
                    f"snapshot {record.handle} is in use: a volume is being restored from it, or it is being verified"
                ) from error
            yield

    def take(self, store: PoolStore, record: SnapshotRecord) -> None:
        """Delete a snapshot that the caller holds."""
        trash_staging(store, record.id)
        deletion = begin_deletion(store, SNAPSHOT, store.snapshots, record.id, self._gate(store, record.id))
        deletion.take_snapshot(self._gate(store, record.id))
        deletion.complete()

    def complete(self, store: PoolStore, record_id: str) -> int:
        """Complete the deletions of this id that were cut off. The caller holds the snapshot's lock. Returns how many there were.

        It comes before a new snapshot of this id: until then what lies at its place is the old one's.
        """
        deletions = unfinished_deletions(store, SNAPSHOT, record_id)
        for deletion in deletions:
            if not deletion.has_data():
                deletion.take_snapshot(self._gate(store, record_id))
            deletion.complete()
        return len(deletions)

    def _gate(self, store: PoolStore, record_id: str) -> Gate:
        """Return the gate (records.py) of a step that only who holds the snapshot's lock may take."""
        return self._locks.gate(store, f"{SNAPSHOT}:{record_id}")


def _archive(store: PoolStore, record: VolumeRecord, gate: Gate) -> None:
    name = archived_place(record.directory, record.token).rpartition("/")[2]
    with store.open_root() as root:
        with suppress(FileExistsError):
            os.mkdir(ARCHIVE_DIRECTORY, 0o700, dir_fd=root)
            files.sync_directory(root)
        archive = beneath.open_beneath(root, ARCHIVE_DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if exists_at(archive, name):
            return  # moved before a crash: what lies at the old place now is another's
        with store.open_parent(record.directory) as (parent, last):
            with gate:
                rename_directory(parent, last, archive, name)
            files.sync_directory(archive)
            files.sync_directory(parent)
    except FileNotFoundError:
        pass  # gone: the record goes its way all the same
    finally:
        os.close(archive)
