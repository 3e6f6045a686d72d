"""Fencing: who has lost his lock makes nothing of what he built.

A lock of a pool on a server is a lease. Where the server was away for longer, another controller may have the lock by now, take over
what we were making, and be through with it; we only notice when we ask. So each attempt has a token of its own, in the record and in
the name of what it builds: whoever takes a creation over writes his there first. And right before any step that others see, with all
that it shows on the disk already, the lock is asked for (`KeyedLocks.gate`), and of a creation the token. Between the question and the
step lies a moment in which nothing helps; it is one call, no longer a copy's hours.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from csi_driver.errors import LockLost
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import GroupRecord, Phase, SnapshotRecord, VolumeRecord
from csi_driver.volumes.pool_layout import new_token
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.records import RecordFolder

_Record = TypeVar("_Record", VolumeRecord, SnapshotRecord, GroupRecord)


class Fence:
    """Keeps what is made of one kind, "volume", "snapshot" or "group", from attempts that lost their lock (`kind:id`)."""

    def __init__(self, locks: KeyedLocks, kind: str) -> None:
        self._locks = locks
        self._kind = kind

    def take_over(self, store: PoolStore, records: RecordFolder[_Record], record: _Record) -> _Record:
        """Make a creation that was begun before this attempt's own: an earlier one that is still at work ends here.

        Returns the record. Raises LockLost.
        """
        return records.replace(replace(record, token=new_token()), self.gate(store, records, record))

    def require(self, store: PoolStore, records: RecordFolder[_Record], record: _Record) -> None:
        """Let only the attempt go on whose the lock and the record are. Raises LockLost."""
        self._locks.require(store, f"{self._kind}:{record.id}")
        current = records.get(record.id)
        if current is None or (current.token, current.phase) != (record.token, Phase.CREATING):
            raise LockLost(f"another controller has taken over {record.handle} meanwhile; try again")

    @contextmanager
    def gate(self, store: PoolStore, records: RecordFolder[_Record], record: _Record) -> Iterator[None]:
        """Ask as the last thing before the step that is made within: what went to the disk until then took its time. Raises LockLost."""
        self.require(store, records, record)
        yield
