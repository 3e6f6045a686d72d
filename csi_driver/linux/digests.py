"""A digest of a file's content that holes do not change and do not cost.

A copy keeps holes as far as its filesystem can, so where they are must not matter; and a tenant's file of 8 EiB with nothing in it must
not keep anybody busy for a year. So blocks of 4 KiB that hold only zeros are left out, whether they are on disk or not: the digest is
SHA-256 over (SHA-256 of the other blocks in order, SHA-256 of where their runs begin and end, the size), in hexadecimal.
"""

import hashlib
import os
import struct
from collections.abc import Callable

from csi_driver.linux.holes import BLOCK_BYTES, data_extents, data_runs
from csi_driver.linux.walk import WalkStopped

PIECE_BYTES = 1024 * 1024
_RUN = struct.Struct("<QQ")


class ContentDigest:
    """Takes a file's content piece by piece, in order; pieces begin at multiples of 4 KiB and only the last ends elsewhere."""

    def __init__(self) -> None:
        self._data = hashlib.sha256()
        self._runs = hashlib.sha256()
        self._start = self._end = 0

    def add(self, position: int, piece: bytes | memoryview) -> None:
        """Take what the file holds from `position` (bytes) on; what is skipped counts as zeros."""
        for start, end in data_runs(piece):
            self._take(position + start, piece[start:end])

    def _take(self, position: int, data: bytes | memoryview) -> None:
        if position != self._end:
            self._close_run()
            self._start = position
        self._end = position + len(data)
        self._data.update(data)

    def _close_run(self) -> None:
        if self._end > self._start:
            self._runs.update(_RUN.pack(self._start, self._end))

    def finish(self, size: int) -> str:
        """Return the digest of the file, whose size is `size` bytes."""
        self._close_run()
        return hashlib.sha256(self._data.digest() + self._runs.digest() + struct.pack("<Q", size)).hexdigest()


def digest_file(descriptor: int, should_stop: Callable[[], bool], read: Callable[[int], None]) -> tuple[str, int]:
    """Read a regular file and return its digest and its size in bytes; `read` hears how many bytes were read, bit by bit.

    Raises OSError (EIO), WalkStopped.
    """
    status = os.fstat(descriptor)
    digest = ContentDigest()
    for start, end in data_extents(descriptor, status.st_size, BLOCK_BYTES):
        position = start
        while position < end:
            if should_stop():
                raise WalkStopped("the reading was stopped")
            piece = read_piece(descriptor, min(PIECE_BYTES, end - position), position)
            if not piece:
                break
            digest.add(position, piece)
            read(len(piece))
            position += len(piece)
    return digest.finish(status.st_size), status.st_size


def read_piece(descriptor: int, length: int, position: int) -> bytes:
    """Read `length` bytes, fewer only where the file ends. Raises OSError."""
    piece = os.pread(descriptor, length, position)
    while len(piece) < length and (more := os.pread(descriptor, length - len(piece), position + len(piece))):
        piece += more
    return piece
