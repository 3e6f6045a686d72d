"""The trash: what a deletion is made of. It takes renames alone, so a pool that is full to its last byte can be emptied.

First the record is moved to `trash/<id>.<token>.<kind>.json`: from here on the thing is deleted and its name is free. Then the data
follows, to `trash/<id>.<token>`, and the record is removed. So a record in the trash says that a deletion is under way, or was cut
off, and that its data may still be in place; data in the trash is there for the reaper, whatever lies beside it. What never became
anything (attempts.py) is data alone.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from csi_driver.errors import RecordDamaged
from csi_driver.linux import files
from csi_driver.linux.renames import rename_directory
from csi_driver.volumes.handles import GROUP, SNAPSHOT, VOLUME
from csi_driver.volumes.model import GroupRecord, SnapshotRecord, VolumeRecord
from csi_driver.volumes.pool_layout import MANIFESTS, SNAPSHOT_DATA, TRASH, exists_at, new_token
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.records import Gate, RecordFolder

_RECORD_NAME = re.compile(rf"(?P<data>(?P<id>[a-z2-7]{{26}})\.[0-9a-f]+)\.(?P<kind>{VOLUME}|{SNAPSHOT}|{GROUP})\.json")
_Record = TypeVar("_Record", VolumeRecord, SnapshotRecord, GroupRecord)


@dataclass(frozen=True)
class Deletion:
    """One deletion whose record is in the trash. Whoever works on it holds the lock of the thing that it deletes."""

    store: PoolStore
    kind: str
    record_id: str
    record_name: str
    data_name: str

    def record(self, records: RecordFolder[_Record]) -> _Record | None:
        """Read the record; None where the deletion was completed meanwhile. Raises RecordDamaged."""
        with self.store.open(TRASH) as trash:
            return records.read_in(trash, self.record_name, self.record_id)

    def has_data(self) -> bool:
        """Tell whether the data is in the trash: then what lies in its place is another's."""
        with self.store.open(TRASH) as trash:
            return exists_at(trash, self.data_name)

    def take_directory(self, directory: str, gate: Gate) -> None:
        """Move a volume's directory to the trash, within `gate`; one that is gone already is fine."""
        with suppress(FileNotFoundError), self.store.open_parent(directory) as (parent, name), gate:
            self._take(parent, name)

    def take_snapshot(self, gate: Gate) -> None:
        """Move a snapshot's content to the trash, without its manifest, within `gate`; one that is gone already is fine."""
        with suppress(FileNotFoundError), self.store.open(SNAPSHOT_DATA) as parent, gate:
            drop_manifest(self.store, self.record_id)
            self._take(parent, self.record_id)

    def complete(self) -> None:
        """Remove the record: nothing is left in place, and the reaper has the data."""
        with self.store.open(TRASH) as trash:
            drop_record(trash, self.record_name)
        self.store.wake_reaper()

    def _take(self, parent: int, name: str) -> None:
        with self.store.open(TRASH) as trash:
            rename_directory(parent, name, trash, self.data_name)
            files.sync_directory(trash)
            files.sync_directory(parent)


def begin_deletion(store: PoolStore, kind: str, records: RecordFolder[_Record], record_id: str, gate: Gate) -> Deletion:
    """Delete a thing, by one rename of its record, within `gate`; its data has to follow. The caller holds its lock."""
    name = f"{record_id}.{new_token()}"
    deletion = Deletion(store, kind, record_id, f"{name}.{kind}.json", name)
    with store.open(TRASH) as trash:
        records.move(record_id, trash, deletion.record_name, gate)
    return deletion


def unfinished_deletions(store: PoolStore, kind: str | None = None, record_id: str | None = None) -> list[Deletion]:
    """List the deletions (of a kind, of an id) that are under way or were cut off; whether they still are, the lock tells."""
    with store.open(TRASH) as trash:
        found = (_RECORD_NAME.fullmatch(name) for name in sorted(os.listdir(trash)))
    return [
        Deletion(store, match["kind"], match["id"], match.string, match["data"])
        for match in found
        if match is not None and kind in (None, match["kind"]) and record_id in (None, match["id"])
    ]


def volumes_being_deleted(store: PoolStore) -> Iterator[VolumeRecord]:
    """Read the records of volumes whose directory may still be in place. Look after `store.volumes`: from there they come."""
    for deletion in unfinished_deletions(store, VOLUME):
        with suppress(RecordDamaged):  # its deletion stands still until somebody has looked at it
            record = deletion.record(store.volumes)
            if record is not None:
                yield record


def discard(store: PoolStore, parent: int, name: str, record_id: str) -> None:
    """Move what was given up to the trash, with nothing that says what it was; what is gone already is fine."""
    # By rename alone: a copy that has filled the disk must be removable, and there a mkdir finds no room.
    with store.open(TRASH) as trash:
        try:
            rename_directory(parent, name, trash, f"{record_id}.{new_token()}")
        except FileNotFoundError:
            return
        files.sync_directory(trash)
        files.sync_directory(parent)
    store.wake_reaper()


def discard_snapshot_data(store: PoolStore, record_id: str) -> None:
    """Move the content of a snapshot that never became ready into the trash."""
    drop_manifest(store, record_id)
    with store.open(SNAPSHOT_DATA) as data:
        discard(store, data, record_id, record_id)


def drop_manifest(store: PoolStore, record_id: str) -> None:
    """Remove the manifest of a snapshot that is on its way out; none is fine."""
    with suppress(FileNotFoundError), store.open(MANIFESTS) as manifests:
        os.unlink(record_id, dir_fd=manifests)


def is_record_name(name: str) -> bool:
    """Tell whether an entry of the trash is the record of a deletion."""
    return _RECORD_NAME.fullmatch(name) is not None


def data_name(record_name: str) -> str:
    """Say under which name the data of a deletion comes into the trash."""
    return ".".join(record_name.split(".")[:2])


def drop_record(trash: int, name: str) -> None:
    """Remove the record of a deletion whose data has been moved; one that is gone already is fine."""
    try:
        os.unlink(name, dir_fd=trash)
    except FileNotFoundError:
        return
    files.sync_directory(trash)
