"""Ask something that may hang, without hanging.

A scrape or a readiness probe asks pools about their room, and a pool's server may be dead. Each question has a thread of its own
that can be left behind, and is not asked again before it was answered: a dead server costs one thread, not one per scrape.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Pending(Generic[_T]):
    """A question under way. `deadline` is a time of time.monotonic()."""

    future: Future[_T]
    deadline: float

    def result(self) -> _T:
        """Return the answer; raises TimeoutError when there is none by the deadline, or whatever the question raised."""
        return self.future.result(timeout=max(0.0, self.deadline - time.monotonic()))


class BoundedRead(Generic[_T]):
    """One question that is asked again and again, each time for at most `seconds`."""

    def __init__(self, name: str, read: Callable[[], _T], seconds: float) -> None:
        self._name = name
        self._read = read
        self.seconds = seconds
        self._lock = threading.Lock()
        self._pending: Pending[_T] | None = None

    def begin(self) -> Pending[_T]:
        """Ask, or join the question that is not answered yet. Its deadline counts from when it was asked: overdue ones don't wait."""
        with self._lock:
            if self._pending is None or self._pending.future.done():
                self._pending = Pending(Future(), time.monotonic() + self.seconds)
                self._start(self._pending.future)
            return self._pending

    def _start(self, future: Future[_T]) -> None:
        # Not an executor: the interpreter waits for an executor's threads when it ends, and this one may never return.
        thread = threading.Thread(target=self._fill, args=(future,), name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads
            future.set_exception(error)

    def _fill(self, future: Future[_T]) -> None:
        try:
            future.set_result(self._read())
        except BaseException as error:  # noqa: BLE001  # whoever asked gets it; nobody else would
            future.set_exception(error)
