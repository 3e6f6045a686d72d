"""Keyed locks: one operation per volume at a time, in this process and across controllers.

external-provisioner and external-snapshotter each elect their own leader, so two controllers can be asked about one volume at
once. Nobody waits: the second caller is told that the first is at work, and the sidecar comes back.

A lock is shared by those who only read a volume's content (a capture) and exclusive for those who change it.

What all calls of a pool need for a moment (promises.py) is queued for instead: there, being told to come back would meet everybody.
"""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from csi_driver.errors import LockLost, OperationPending
from csi_driver.linux.byte_range_locks import HeldLock

_EXCLUSIVE = -1
_POLL_SECONDS = 0.004


class LockedStore(Protocol):
    """A pool, as far as locks need it."""

    @property
    def name(self) -> str: ...

    def try_hold(self, offset: int, *, shared: bool) -> HeldLock | None: ...


class KeyedLocks:
    """Locks by pool and key. One for the whole process."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._holders: dict[tuple[str, str], int] = {}
        self._alone: dict[tuple[str, str], HeldLock] = {}
        self._turns: dict[tuple[str, str], threading.Lock] = {}

    @contextmanager
    def hold(self, store: LockedStore, key: str, *, shared: bool = False) -> Iterator[HeldLock]:
        """Hold `key` in `store` until the context ends. What it yields can tell whether the server took the lock away meanwhile.

        Raises OperationPending (ABORTED, CSI spec "Concurrency") at once when this or another controller holds it.
        """
        place = (store.name, key)
        with self._guard:
            holders = self._holders.get(place, 0)
            if holders == _EXCLUSIVE or (holders and not shared):
                raise _pending(store, key)
            self._holders[place] = holders + 1 if shared else _EXCLUSIVE
        try:
            # Processes are kept apart by the lock file, threads by the table: one byte of the file stands for one key.
            held = store.try_hold(_offset(key), shared=shared)
            if held is None:
                raise _pending(store, key)
            with held:
                if not shared:
                    self._alone[place] = held
                yield held
        finally:
            with self._guard:
                self._alone.pop(place, None)
                left = self._holders[place] - 1 if shared else 0
                if left:
                    self._holders[place] = left
                else:
                    del self._holders[place]

    def is_held(self, store: LockedStore, key: str) -> bool:
        """Tell whether this process holds `key`, not shared, and the server has not taken it away."""
        held = self._alone.get((store.name, key))
        return held is not None and held.still_held()

    def require(self, store: LockedStore, key: str) -> None:
        """Go on only while `is_held`. Raises LockLost: what was protected may be another's by now."""
        if not self.is_held(store, key):
            raise LockLost(f"the lock of {key} in pool {store.name} was lost, its server was away for too long; try again")

    @contextmanager
    def gate(self, store: LockedStore, key: str) -> Iterator[None]:
        """Ask for `key`, not shared, right before the step that is made within, as what was written until then took its time.

        Raises LockLost.
        """
        self.require(store, key)
        yield

    @contextmanager
    def queue(self, store: LockedStore, key: str, seconds: float) -> Iterator[None]:
        """Hold `key` in `store` until the context ends, after waiting at most `seconds` for others; for moments, not for work.

        It is another lock than `hold` has for the same key, in this process; with other processes it is the same.
        Raises OperationPending where they do not come to an end.
        """
        with self._guard:
            turn = self._turns.setdefault((store.name, key), threading.Lock())
        until = time.monotonic() + seconds
        if not turn.acquire(timeout=seconds):
            raise _pending(store, key)
        try:
            # The threads of this process wait in `turn`; whose turn it is asks the other processes: fcntl(2) cannot wait for a while.
            while (held := store.try_hold(_offset(key), shared=False)) is None:
                if time.monotonic() > until:
                    raise _pending(store, key)
                time.sleep(_POLL_SECONDS)
            with held:
                yield
        finally:
            turn.release()


def _pending(store: LockedStore, key: str) -> OperationPending:
    return OperationPending(f"another operation works on {key} in pool {store.name}; try again")


def _offset(key: str) -> int:
    # 62 bits: off_t is signed, and the end of the one-byte range must not overflow. Two keys that meet cost a retry, no more.
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 2
