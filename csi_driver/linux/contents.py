"""Copying one file's content by the cheapest way that the two filesystems offer.

The ladder, from the top: *reflink* (FICLONE, shares the extents: XFS, btrfs, NFS 4.2), *copy_file_range* (in the server for NFS 4.2,
in the kernel elsewhere), *copy* (read and write). A rung that the filesystems do not have is given up for the rest of the copy; one
that only this file refuses (a btrfs file without copy-on-write, a swap file) is skipped for this file. Holes stay holes on
every rung. A file that grows meanwhile is copied up to the size it had when it was opened: its owner cannot keep us busy forever.
"""

import errno
import fcntl
import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Literal

from csi_driver.linux.holes import data_extents
from csi_driver.linux.walk import WalkStopped
from csi_driver.linux.writeback import STEP_BYTES, SteadyWriteback

Method = Literal["reflink", "copy_file_range", "copy"]
METHODS: tuple[Method, ...] = ("reflink", "copy_file_range", "copy")

FICLONE = 0x40049409
_BUFFER_BYTES = 1024 * 1024
_SMALL_BYTES = 64 * 1024
_NOT_HERE = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY})
_NOT_THIS_FILE = frozenset({errno.EINVAL, errno.EPERM, errno.ETXTBSY, errno.EBADF})


class ContentLadder:
    """The rungs that still hold in one copy, and how many files each has carried (`used`). For one thread."""

    def __init__(self, methods: tuple[Method, ...], should_stop: Callable[[], bool]) -> None:
        """Begin with all of `methods`; plain copying is always the last resort."""
        self._rungs = set(methods)
        self._should_stop = should_stop
        self._space: memoryview | None = None
        self.used: Counter[Method] = Counter()

    def carry(self, source: int, target: int, size: int, allocated: int, carried: Callable[[int], None]) -> None:
        """Copy the content into the empty file `target`.

        `size` and `allocated` (bytes) are what fstat said of the source when it was opened; `carried` hears of the data bytes, bit
        by bit (holes do not count). Raises OSError (EIO, ENOSPC, EDQUOT …) and WalkStopped.
        """
        if size == 0:
            return
        if "reflink" in self._rungs and self._reflink(source, target):
            self.used["reflink"] += 1
            carried(min(size, allocated))
            return
        reached = 0
        method: Method | None = None
        writeback = SteadyWriteback(target)
        for start, end in self._extents(source, size, allocated):
            reached, method = self._carry_extent(source, target, start, end, carried, writeback)
            if reached < end:  # somebody made it shorter meanwhile: what is gone is not there
                size = reached
                break
        writeback.finished(reached)
        if reached < size:
            os.ftruncate(target, size)
        if method:
            self.used[method] += 1

    def _reflink(self, source: int, target: int) -> bool:
        try:
            fcntl.ioctl(target, FICLONE, source)
        except OSError as error:
            self._give_up("reflink", error)
            return False
        return True

    def _give_up(self, method: Method, error: OSError) -> None:
        if error.errno in _NOT_HERE:
            self._rungs.discard(method)
        elif error.errno not in _NOT_THIS_FILE:
            raise error

    def _extents(self, source: int, size: int, allocated: int) -> Iterable[tuple[int, int]]:
        if size <= _SMALL_BYTES and allocated >= size:
            return ((0, size),)  # a call saved per small file: over NFS it would be a round trip
        return data_extents(source, size)

    def _carry_extent(
        self,
        source: int,
        target: int,
        start: int,
        end: int,
        carried: Callable[[int], None],
        writeback: SteadyWriteback,
    ) -> tuple[int, Method]:
        """Copy source[start:end] and return how far it came (short only where the source ends) and by what."""
        method: Method = "copy_file_range" if "copy_file_range" in self._rungs else "copy"
        position = start
        if end - start > _BUFFER_BYTES and method == "copy":
            os.posix_fadvise(source, start, end - start, os.POSIX_FADV_SEQUENTIAL)
        while position < end:
            if self._should_stop():
                raise WalkStopped("the copy was stopped")
            count = 0
            if method == "copy_file_range":
                try:
                    count = os.copy_file_range(source, target, min(end - position, STEP_BYTES), position, position)
                except OSError as error:
                    self._give_up("copy_file_range", error)
            if count == 0:  # refused, or the end of the file: reading tells which
                count = self._read_and_write(source, target, position, end)
                method = "copy"
            if count == 0:
                break
            position += count
            writeback.written(position)
            carried(count)
        return position, method

    def _read_and_write(self, source: int, target: int, position: int, end: int) -> int:
        if self._space is None:
            self._space = memoryview(bytearray(_BUFFER_BYTES))
        piece = self._space[: min(end - position, _BUFFER_BYTES)]
        count = os.preadv(source, [piece], position)
        written = 0
        while written < count:
            written += os.pwrite(target, piece[written:count], position + written)
        return count
