"""Copying one file's content by the cheapest way that the two filesystems offer.

The ladder, from the top: *reflink* (FICLONE, shares the extents: XFS, btrfs, NFS 4.2), *copy_file_range* (in the server for NFS 4.2,
in the kernel elsewhere), *copy* (read and write). A rung that the filesystems do not have is given up for the rest of the copy; one
that only this file refuses (a btrfs file without copy-on-write, a swap file) is skipped for this file. Holes stay holes on
every rung. Where a file has holes and nobody tells where (NFS before 4.2), it is read, and what holds only zeros is not written. A
file that grows meanwhile is copied up to the size it had when it was opened: its owner cannot keep us busy forever.
"""

import errno
import fcntl
import os
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Literal

from csi_driver.linux.holes import data_extents, data_runs
from csi_driver.linux.walk import WalkStopped
from csi_driver.linux.writeback import STEP_BYTES, SteadyWriteback

Method = Literal["reflink", "copy_file_range", "copy"]
METHODS: tuple[Method, ...] = ("reflink", "copy_file_range", "copy")

FICLONE = 0x40049409
_BUFFER_BYTES = 1024 * 1024
_SMALL_BYTES = 64 * 1024
_NOT_HERE = frozenset({errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY})
_NOT_THIS_FILE = frozenset({errno.EINVAL, errno.EPERM, errno.ETXTBSY, errno.EBADF})


class HolesUntold(Exception):
    """A file has holes, its filesystem does not tell where, and it is larger than the filesystem that is to hold the copy."""

    def __init__(self, size: int, allocated: int, room: int) -> None:
        """All in bytes; `room` is the size of the target's filesystem."""
        super().__init__(
            f"it is {size} bytes long, of which {allocated} are on disk, and its filesystem does not tell where (NFS before 4.2); to read "
            f"more than the {room} bytes that the target's filesystem has takes too long"
        )


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
        by bit (holes do not count). Raises OSError (EIO, ENOSPC, EDQUOT …), HolesUntold and WalkStopped.
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
        extents = self._extents(source, size, allocated)
        if allocated < size:  # there are holes, or the content lies elsewhere than in blocks
            told = iter(extents)
            first = next(told, None)
            if first == (0, size):
                self._carry_all_but_zeros(source, target, size, allocated, carried, writeback)
                return
            extents = chain([first] if first else [], told)
        for start, end in extents:
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

    def _carry_all_but_zeros(
        self, source: int, target: int, size: int, allocated: int, carried: Callable[[int], None], writeback: SteadyWriteback
    ) -> None:
        """Copy the content where nobody tells what of it is holes."""
        room = os.fstatvfs(target)
        if size > room.f_blocks * room.f_frsize:
            raise HolesUntold(size, allocated, room.f_blocks * room.f_frsize)
        os.posix_fadvise(source, 0, size, os.POSIX_FADV_SEQUENTIAL)
        position = 0
        while position < size:
            if self._should_stop():
                raise WalkStopped("the copy was stopped")
            piece = self._read(source, position, size)
            if not piece:
                break
            for start, end in data_runs(piece):
                _write(target, piece[start:end], position + start)
                carried(end - start)
            position += len(piece)
            writeback.written(position)
        writeback.finished(position)
        os.ftruncate(target, position)
        self.used["copy"] += 1

    def _read_and_write(self, source: int, target: int, position: int, end: int) -> int:
        piece = self._read(source, position, end)
        _write(target, piece, position)
        return len(piece)

    def _read(self, source: int, position: int, end: int) -> memoryview:
        """Read on, into the one buffer; empty at the end of the file."""
        if self._space is None:
            self._space = memoryview(bytearray(_BUFFER_BYTES))
        piece = self._space[: min(end - position, _BUFFER_BYTES)]
        return piece[: os.preadv(source, [piece], position)]


def _write(target: int, piece: memoryview, position: int) -> None:
    written = 0
    while written < len(piece):
        written += os.pwrite(target, piece[written:], position + written)
