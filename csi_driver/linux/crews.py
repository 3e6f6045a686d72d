"""A crew: threads that carry the entries of directories while one thread walks.

Where each step is a round trip to a server, a copy waits far more than it works, and many can wait at once. The walk goes ahead only as
far as a short queue allows, so neither memory nor descriptors grow with the tree. Whoever carries the last entry of a directory that
the walk has left finishes that directory.
"""

import errno
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

from csi_driver.linux.carriers import Carrier, Folder

_WAITING_PER_WORKER = 4


@dataclass(slots=True, eq=False)
class _Open:
    """A directory with entries that wait or are being carried; it has descriptors of its own, for the walk closes its own."""

    folder: Folder
    under_way: set[bytes] = field(default_factory=set)
    left: bool = False


class Crew:
    """Use as a context manager: its end waits for all work, and raises what went wrong first."""

    def __init__(self, workers: int, new_carrier: Callable[[], Carrier]) -> None:
        """Start the threads; each gets a carrier of its own. They inherit the priority of this thread."""
        self._waiting: queue.Queue[tuple[_Open, bytes, int] | None] = queue.Queue(workers * _WAITING_PER_WORKER)
        self._guard = threading.Lock()
        self._open: dict[int, _Open] = {}
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, args=(new_carrier(),), name=f"copy worker {number}", daemon=True)
            for number in range(workers)
        ]

    def carry(self, folder: Folder, name: bytes, kind: int) -> None:
        """Have an entry carried that is no directory. Raises what a worker has met meanwhile."""
        if self._error is not None:
            raise self._error
        opened = self._open.get(id(folder))
        if opened is None:
            own = Folder(os.dup(folder.source), os.dup(folder.target), folder.status, folder.place)
            opened = self._open[id(folder)] = _Open(own)
        with self._guard:
            if name in opened.under_way:  # a directory that changes while it is read may yield a name twice
                return
            opened.under_way.add(name)
        self._waiting.put((opened, name, kind))

    def finish(self, folder: Folder, carrier: Carrier) -> None:
        """Have a directory finished, whose entries have all been given: now with `carrier`, or by who carries the last of them."""
        opened = self._open.pop(id(folder), None)
        if opened is None:
            carrier.finish(folder)
            return
        with self._guard:
            opened.left = True
            idle = not opened.under_way
        if idle:
            self._close(opened, carrier)

    def __enter__(self) -> Self:
        started: list[threading.Thread] = []
        for thread in self._threads:
            try:
                thread.start()
            except RuntimeError:  # the process may have no more threads (pids limit): fewer do it, too
                break
            started.append(thread)
        self._threads = started
        if not started:
            raise OSError(errno.EAGAIN, "no thread can be started for a copy")
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self._error = self._error or error
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        for opened in self._open.values():  # of a walk that did not come to its end
            _close_descriptors(opened)
        if self._error is not None and error is None:
            raise self._error

    def _work(self, carrier: Carrier) -> None:
        while (item := self._waiting.get()) is not None:
            opened, name, kind = item
            try:
                if self._error is None:
                    carrier.carry(opened.folder, name, kind, enter=False)
            except BaseException as error:  # noqa: BLE001 - raised by the thread that walks
                self._error = self._error or error
            with self._guard:
                opened.under_way.discard(name)
                last = opened.left and not opened.under_way
            if last:
                self._close(opened, carrier)

    def _close(self, opened: _Open, carrier: Carrier) -> None:
        try:
            if self._error is None:
                carrier.finish(opened.folder)
        except BaseException as error:  # noqa: BLE001 - likewise
            self._error = self._error or error
        finally:
            _close_descriptors(opened)


def _close_descriptors(opened: _Open) -> None:
    os.close(opened.folder.source)
    os.close(opened.folder.target)
