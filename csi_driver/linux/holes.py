"""Where a file holds data, and where nothing (lseek(2), SEEK_DATA and SEEK_HOLE)."""

import errno
import os
from collections.abc import Iterator


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
