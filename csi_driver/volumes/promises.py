"""Promises: what a pool has promised to its volumes, and that it promises nothing twice.

A volume of 10 GiB is a promise of 10 GiB, whether it is full or empty. A pool may promise its size times its overcommit, and nobody
may be promised more than is free beyond the reserve. The promises are the records: there is no account beside them that a crash could
falsify. A record appears, or grows, within a gate, which holds one lock of the pool against all threads and all controllers; only the
link or rename that shows the record happens there, for everybody else waits.

What counts: every record of a volume, whatever its phase, and the volumes that were retained or archived, for as long as their data is
there. What does not: snapshots and the trash. Nobody may still write there, and what they take is missing from the free space.

Ten thousand records are not read for each volume. Whoever raises promises puts his mark into `.csi/promises` first, under the lock.
While our mark is there, nobody else has raised any since we looked, so what we know is at least what is promised; where that leaves
no room, or is some seconds old, the folder is looked at again.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fractions import Fraction

from csi_driver.backends.base import Space
from csi_driver.errors import OperationPending, ResourceExhausted
from csi_driver.linux import beneath, files
from csi_driver.volumes.folder_index import FolderIndex
from csi_driver.volumes.handles import VOLUME
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.pool_layout import ARCHIVED, RETAINED, VOLUMES, archived_place, new_token
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.record_format import MAX_RECORD_BYTES

KEY = "promises"
"""The pool's lock under which promises are raised."""
WAIT_SECONDS = 10.0
_TRUSTED_SECONDS = 10.0
_MARK = "promises"
_VOLUME_RECORD = re.compile(r"[a-z2-7]{26}\.json")
_KEPT_RECORD = re.compile(r"[a-z2-7]{26}\.[0-9a-f]+\.json")

_log = logging.getLogger(__name__)


class Committed(ResourceExhausted):
    """The pool cannot promise what is asked for."""


@dataclass(frozen=True)
class Room:
    """How a pool stands, in bytes. `kept_bytes` is the part of the promises that retained and archived volumes hold."""

    size_bytes: int
    overcommit: Fraction
    promised_bytes: int
    kept_bytes: int
    free_bytes: int
    reserve_bytes: int
    unknown_records: int = 0
    limiters: frozenset[str] = frozenset()
    """What its volumes are held to their sizes by, as their records say."""

    @property
    def most_bytes(self) -> int:
        """What may be promised in all."""
        return int(self.size_bytes * self.overcommit)

    @property
    def available_bytes(self) -> int:
        """What a new volume may be promised now."""
        return max(0, min(self.free_bytes - self.reserve_bytes, self.most_bytes - self.promised_bytes))

    def can_promise(self, more_bytes: int) -> bool:
        return self.promised_bytes + more_bytes <= self.most_bytes


class Promises:
    """The promises of all pools, as this process knows them."""

    def __init__(self, locks: KeyedLocks) -> None:
        self._locks = locks
        self._guard = threading.Lock()
        self._ledgers: dict[str, _Ledger] = {}

    def room(self, store: PoolStore, space: Space | None = None) -> Room:
        """Say how the pool stands, by its records as they are now. Raises Unavailable, OperationPending, OSError."""
        ledger = self._ledger(store)
        with ledger.alone(WAIT_SECONDS):
            ledger.look(thorough=not ledger.is_marked())
            return ledger.room(space or store.space())

    def gate(self, store: PoolStore, record_id: str, size_bytes: int, more_bytes: int) -> AbstractContextManager[object]:
        """Return the gate within which a volume's record, of `size_bytes`, may raise the promises by `more_bytes`.

        Raises Committed where so much is not free beyond the reserve. Entering it raises Committed where it cannot be promised,
        OperationPending where it takes too long to come to it, and LockLost where the volume's lock, which the caller holds, was lost.
        """
        space = store.space()
        reserve = store.backend.budget.reserve_of(space.total_bytes)
        if more_bytes > space.available_bytes - reserve:
            kept = f" beyond its reserve of {reserve}" if reserve else ""
            raise Committed(
                f"{more_bytes} bytes are asked for, but pool {store.name} has {max(0, space.available_bytes - reserve)} bytes free{kept}: "
                "remove data or snapshots, or wait until what was deleted has left the trash"
            )
        return self._raise(store, record_id, size_bytes, more_bytes, space)

    @contextmanager
    def _raise(self, store: PoolStore, record_id: str, size_bytes: int, more_bytes: int, space: Space) -> Iterator[None]:
        ledger = self._ledger(store)
        if not ledger.was_read:
            with ledger.alone(WAIT_SECONDS):  # the one long look, for which no other controller has to wait
                ledger.look(thorough=True)
        with self._locks.queue(store, KEY, WAIT_SECONDS), ledger.alone(WAIT_SECONDS):
            marked = ledger.is_marked()
            if not marked or not ledger.is_recent() or not ledger.room(space).can_promise(more_bytes):
                ledger.look(thorough=not marked)
            room = ledger.room(space)
            if not room.can_promise(more_bytes):
                raise Committed(_refusal(store, room, more_bytes))
            if not marked:
                ledger.mark()
            # The volume's lock last of all: there may have been a queue.
            with ledger.noting(record_id, size_bytes), self._locks.gate(store, f"{VOLUME}:{record_id}"):
                yield

    def _ledger(self, store: PoolStore) -> "_Ledger":
        with self._guard:
            return self._ledgers.setdefault(store.name, _Ledger(store))


@dataclass(frozen=True, slots=True)
class _Promise:
    """Of a record: its size, None where it cannot be read, and what is needed to find the data of a kept volume."""

    size_bytes: int | None
    directory: str = ""
    token: str = ""
    limiter: str | None = None


class _Ledger:
    """One pool's promises, as far as this process has seen them. Used by one thread at a time (`alone`)."""

    def __init__(self, store: PoolStore) -> None:
        self._store = store
        self._mark = new_token().encode()
        self._lock = threading.Lock()
        self._doubtful = True
        self._looked = 0.0
        self.was_read = False
        self._volumes = FolderIndex(lambda: store.open(VOLUMES), _VOLUME_RECORD, _read_promise)
        self._retained = FolderIndex(lambda: store.open(RETAINED), _KEPT_RECORD, _read_promise)
        self._archived = FolderIndex(lambda: store.open(ARCHIVED), _KEPT_RECORD, _read_promise)
        self.promised = 0
        self._kept = 0
        self._unknown = 0
        self._limiters: frozenset[str] = frozenset()

    @contextmanager
    def alone(self, seconds: float) -> Iterator[None]:
        """Keep the other threads away. Raises OperationPending where one does not come to its end."""
        if not self._lock.acquire(timeout=seconds):
            raise OperationPending(f"the records of pool {self._store.name} are still being looked through; try again")
        try:
            yield
        finally:
            self._lock.release()

    def room(self, space: Space) -> Room:
        budget = self._store.backend.budget
        reserve = budget.reserve_of(space.total_bytes)
        most = max(0, space.total_bytes - reserve)
        size = most if budget.size_bytes is None else min(budget.size_bytes, most)
        return Room(
            size, budget.overcommit, self.promised, self._kept, space.available_bytes, reserve, self._unknown, self._limiters
        )

    def is_recent(self) -> bool:
        return time.monotonic() - self._looked < _TRUSTED_SECONDS

    def is_marked(self) -> bool:
        """Tell whether nobody but us has raised promises since we looked."""
        if self._doubtful:
            return False
        with self._store.open("") as control:
            try:
                return files.read_bounded(control, _MARK, 1024) == self._mark
            except FileNotFoundError:
                return False

    def mark(self) -> None:
        """Say that we raise promises; the caller holds the pool's lock. It need not last: whoever knows anything dies with the machine."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._store.open("") as control:
            descriptor = os.open(_MARK, flags, 0o600, dir_fd=control)
            try:
                os.write(descriptor, self._mark)
            finally:
                os.close(descriptor)

    @contextmanager
    def noting(self, record_id: str, size_bytes: int) -> Iterator[None]:
        """Count what the body of the context makes; whatever becomes of that if it fails, the next look will tell."""
        self._doubtful = True
        yield
        before = self._volumes.note(f"{record_id}.json", _Promise(size_bytes))
        self.promised += size_bytes - ((before.size_bytes or 0) if before else 0)
        self._doubtful = False

    def look(self, *, thorough: bool) -> None:
        """Hold what is known against the folders."""
        # In this order: a volume that is deleted meanwhile is seen twice rather than not at all.
        for index in (self._volumes, self._retained, self._archived):
            index.look(thorough=thorough)
        volumes = self._volumes.values().values()
        self._unknown = sum(promise.size_bytes is None for promise in volumes)
        self._limiters = frozenset(promise.limiter for promise in volumes if promise.limiter)
        self._kept = self._measure_kept({promise.directory for promise in volumes})
        self.promised = sum(promise.size_bytes or 0 for promise in volumes) + self._kept
        self._looked = time.monotonic()
        self._doubtful = False
        self.was_read = True

    def _measure_kept(self, taken: set[str]) -> int:
        """Sum up the retained and archived volumes whose data is there, and at its place no other volume."""
        kept = [(promise.directory, promise) for promise in self._retained.values().values() if promise.directory not in taken]
        kept += [(archived_place(promise.directory, promise.token), promise) for promise in self._archived.values().values()]
        return sum(promise.size_bytes or 0 for place, promise in kept if self._has_data(place))

    def _has_data(self, place: str) -> bool:
        with self._store.open_root() as root:
            try:
                os.close(beneath.open_beneath(root, place, os.O_PATH | os.O_NOFOLLOW))
            except (FileNotFoundError, NotADirectoryError):
                return False
            except OSError:  # something stands in the way: it may be there
                return True
        return True


def _read_promise(folder: int, name: str) -> _Promise:
    # No more of the record is asked than this, so what is damaged elsewhere, or a newer driver wrote, counts all the same.
    try:
        body = json.loads(files.read_bounded(folder, name, MAX_RECORD_BYTES))
        size, directory, token = body["capacity_bytes"], body["directory"], body["token"]
        if type(size) is int and size >= 0 and isinstance(directory, str) and isinstance(token, str):
            return _Promise(size, directory, token, _limiter_of(body))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        _log.warning("what a volume was promised cannot be read", extra={"record": name, "error": str(error)})
    return _Promise(None)


def _limiter_of(body: dict[str, object]) -> str | None:
    limit = body.get("limit")
    limiter = limit.get("limiter") if isinstance(limit, dict) and limit.get("mark") is not None else None
    return limiter if isinstance(limiter, str) else None


def _refusal(store: PoolStore, room: Room, more_bytes: int) -> str:
    kept = f", {room.kept_bytes} of them to retained or archived volumes" if room.kept_bytes else ""
    return (
        f"{more_bytes} bytes are asked for, but pool {store.name} can promise {max(0, room.most_bytes - room.promised_bytes)} more: "
        f"{room.promised_bytes} of {room.most_bytes} are promised{kept} (size {room.size_bytes} x overcommit {float(room.overcommit):g}); "
        f"delete volumes, or raise `size` or `overcommit` of [pools.{store.name}]"
    )
