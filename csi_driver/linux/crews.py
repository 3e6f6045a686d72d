"""A crew: threads that carry the entries of directories while one thread walks.

Where each step is a round trip to a server, a copy waits far more than it works, and many can wait at once. The walk goes ahead only as
far as a short queue allows. Descriptors are held of the directories whose entries wait or are being carried, no more than find room in
the queue and among the workers, and of the one where the walk stands; of all others on the way down only what is to be done with them
is kept. Whoever carries the last entry of a directory that the walk has left finishes that directory.
"""

import errno
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

from csi_driver.linux.carriers import Carrier
from csi_driver.linux.fidelity import Births
from csi_driver.linux.folders import Folder

_WAITING_PER_WORKER = 4


@dataclass(slots=True, eq=False)
class _Open:
    """A directory that the walk has not left, or some of whose entries wait or are being carried.

    Such entries need descriptors of its own, for the walk closes its own; without them both are -1. To carry the next entry of a directory
    while the walk stands in it costs none.
    """

    folder: Folder
    under_way: set[bytes] = field(default_factory=set)
    walk_is_here: bool = False
    left: bool = False

    def hold(self, folder: Folder) -> None:
        """Duplicate the walk's descriptors, where there are none."""
        if self.folder.source < 0:
            self.folder.source = os.dup(folder.source)
        if self.folder.target < 0:
            self.folder.target = os.dup(folder.target)

    def release(self) -> None:
        """Close what is held."""
        for descriptor in (self.folder.source, self.folder.target):
            if descriptor >= 0:
                os.close(descriptor)
        self.folder.source = self.folder.target = -1


class Crew:
    """Use as a context manager: its end waits for all work, and raises what went wrong first."""

    def __init__(self, workers: int, new_carrier: Callable[[], Carrier]) -> None:
        """Start the threads; each gets a carrier of its own. They inherit the priority of this thread."""
        self._waiting: queue.Queue[tuple[_Open, bytes, int] | None] = queue.Queue(workers * _WAITING_PER_WORKER)
        self._guard = threading.Lock()
        self._open: dict[int, _Open] = {}
        self._here: _Open | None = None
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
            opened = self._open[id(folder)] = _Open(replace(folder, source=-1, target=-1, births=Births()))
        if opened is not self._here:
            self._go_to(opened, folder)
        with self._guard:
            if name in opened.under_way:  # a directory that changes while it is read may yield a name twice
                return
            opened.under_way.add(name)
        self._waiting.put((opened, name, kind))

    def _go_to(self, opened: _Open, folder: Folder) -> None:
        before, self._here = self._here, opened
        with self._guard:
            opened.hold(folder)
            opened.walk_is_here = True
            if before is not None:
                before.walk_is_here = False
                if not before.under_way:
                    before.release()

    def finish(self, folder: Folder, carrier: Carrier) -> None:
        """Have a directory finished, whose entries have all been given: now with `carrier`, or by who carries the last of them."""
        opened = self._open.pop(id(folder), None)
        if opened is None:
            carrier.finish(folder)
            return
        if opened is self._here:
            self._here = None
        with self._guard:
            opened.walk_is_here = False
            opened.left = True
            idle = not opened.under_way
        if idle:
            opened.release()
            carrier.finish(folder)

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
            opened.release()
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
                if not (opened.under_way or opened.walk_is_here or last):
                    opened.release()
            if last:
                self._close(opened, carrier)

    def _close(self, opened: _Open, carrier: Carrier) -> None:
        try:
            if self._error is None:
                carrier.finish(opened.folder)
        except BaseException as error:  # noqa: BLE001 - likewise
            self._error = self._error or error
        finally:
            opened.release()
