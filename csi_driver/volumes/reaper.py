"""The reaper: removes for good what deletions put into the trash.

A deletion moves data first and its record last, into an entry that carries the record's token. So an entry is complete when the record
is in it, or when no record says (any more) that it is being deleted with that token, as with what was given up, which comes in one
step; then nobody will touch it again, and no lock is needed, which a later namesake would meet.
"""

import logging
import os
from collections.abc import Callable

from csi_driver.errors import RecordDamaged, TatamiError
from csi_driver.linux.trees import remove_tree
from csi_driver.volumes.handles import ID_PATTERN
from csi_driver.volumes.model import Phase, SnapshotRecord, VolumeRecord
from csi_driver.volumes.pools import TRASH, TRASHED_RECORD, PoolStore, exists_at
from csi_driver.volumes.records import RecordFolder

_log = logging.getLogger(__name__)


class Reaper:
    """Empties the trash of a pool. `should_stop` is asked between entries and inside large ones."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def empty(self, store: PoolStore) -> tuple[int, int]:
        """Remove every complete entry. Returns how many were removed, and how many could not be."""
        removed = failed = 0
        with store.open(TRASH) as trash:
            for name in sorted(os.listdir(trash)):
                if self._should_stop():
                    break
                try:
                    if _is_complete(store, trash, name):
                        remove_tree(trash, name, should_stop=self._should_stop)
                        removed += 1
                except (TatamiError, OSError) as error:
                    failed += 1
                    _log.warning("the trash cannot be emptied", extra={"pool": store.name, "entry": name, "error": str(error)})
        return removed, failed


def _is_complete(store: PoolStore, trash: int, name: str) -> bool:
    record_id, _, token = name.partition(".")
    if not ID_PATTERN.fullmatch(record_id) or exists_at(trash, f"{name}/{TRASHED_RECORD}"):
        return True
    return not any(_is_being_deleted(records, record_id, token) for records in (store.volumes, store.snapshots))


def _is_being_deleted(records: RecordFolder[VolumeRecord] | RecordFolder[SnapshotRecord], record_id: str, token: str) -> bool:
    try:
        record = records.get(record_id)
    except RecordDamaged:
        return True  # for all that can be known
    return record is not None and record.phase is Phase.DELETING and record.token == token
