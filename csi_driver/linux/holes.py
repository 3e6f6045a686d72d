"""Where a file holds data, and where nothing: as its filesystem tells (lseek(2), SEEK_DATA and SEEK_HOLE), or as reading shows."""

import errno
import os
from collections.abc import Iterator

BLOCK_BYTES = 4096
_ZEROS = bytes(BLOCK_BYTES)


def data_extents(descriptor: int, size: int, alignment: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the stretches below `size` that may hold data, in order and apart, as (start, end) in bytes.

    They begin and end at multiples of `alignment`, or at `size`. A filesystem that does not know its holes has one stretch.
    """
    reached = position = 0
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
            position = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            if error.errno != errno.EINVAL:
                raise
            start, position = position, size
        start = max(start - start % alignment, reached)
        reached = min(-(-position // alignment) * alignment, size)
        if start >= reached:
            continue
        yield start, reached


def data_runs(piece: bytes | memoryview) -> Iterator[tuple[int, int]]:
    """Yield the stretches of some content that hold more than zeros, in order and apart, as (start, end) in bytes.

    They begin and end at multiples of 4 KiB, or at the content's end.
    """
    content = bytes(piece)
    if _ZEROS not in content and not content.endswith(b"\0"):
        yield 0, len(content)
        return
    if content == bytes(len(content)):
        return
    start = -1
    for position in range(0, len(content), BLOCK_BYTES):
        if _ZEROS.startswith(content[position : position + BLOCK_BYTES]):
            if start >= 0:
                yield start, position
            start = -1
        elif start < 0:
            start = position
    if start >= 0:
        yield start, len(content)
