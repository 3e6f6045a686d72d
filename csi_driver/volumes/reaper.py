"""The reaper: removes for good what deletions put into the trash.

A deletion moves data first and its record last, into an entry that carries the record's token. So an entry is complete when the record
is in it, or when no record says any more that it is being deleted with that token; then nobody will touch it again, and no lock is
needed, which a later namesake would meet.
"""

import logging
import os
from collections.abc import Callable
from typing import Protocol

from csi_driver.errors import RecordDamaged, TatamiError
from csi_driver.linux.trees import remove_tree
from csi_driver.volumes.handles import ID_PATTERN
from csi_driver.volumes.model import Phase
from csi_driver.volumes.pools import TRASH, TRASHED_DATA, TRASHED_RECORD, PoolStore

_log = logging.getLogger(__name__)


class _Deletable(Protocol):
    @property
    def token(self) -> str: ...

    @property
    def phase(self) -> Phase: ...


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
    found = _names_in(trash, name)
    if TRASHED_RECORD in found:
        return True
    record_id, _, token = name.partition(".")
    if not ID_PATTERN.fullmatch(record_id):
        return True
    return TRASHED_DATA in found and not any(_is_being_deleted(record, token) for record in _records(store, record_id))


def _names_in(trash: int, name: str) -> set[str]:
    try:
        entry = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=trash)
    except FileNotFoundError:
        return set()
    try:
        return set(os.listdir(entry))
    finally:
        os.close(entry)


def _records(store: PoolStore, record_id: str) -> list[_Deletable]:
    found: list[_Deletable] = []
    for records in (store.volumes, store.snapshots):
        try:
            record = records.get(record_id)
        except RecordDamaged:
            continue
        if record is not None:
            found.append(record)
    return found


def _is_being_deleted(record: _Deletable, token: str) -> bool:
    return record.phase is Phase.DELETING and record.token == token
