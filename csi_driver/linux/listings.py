"""Listing a directory whose entries are being replaced.

readdir(3) says nothing of entries that come and go while it reads, and a rename over a name is such a change: btrfs and tmpfs move the
name to the end or to the front, so that one listing can miss a file that was there all the time. A directory that changed while it was
listed, or right before, is listed again.
"""

import os
import time

_CLOCK_NS = 50_000_000
"""More than a tick of any kernel's file times: what changed since may have changed again and not show it."""
_MOST_LISTINGS = 5


def list_steadily(directory_fd: int) -> dict[str, int]:
    """Return names and inode numbers: all that were there from the beginning to the end, and perhaps some that came or went meanwhile.

    A directory that never rests is listed five times; what all of them missed is missed. Raises OSError.
    """
    found: dict[str, int] = {}
    for _ in range(_MOST_LISTINGS):
        before = os.fstat(directory_fd)
        with os.scandir(directory_fd) as entries:
            found |= {entry.name: entry.inode() for entry in entries}
        after = os.fstat(directory_fd)
        if before.st_ctime_ns == after.st_ctime_ns < time.time_ns() - _CLOCK_NS:
            break
    return found
