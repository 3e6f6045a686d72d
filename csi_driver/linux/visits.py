"""Doing the same to every entry of a tenant's tree, from the top down; each is pinned meanwhile, so that no swap leads out of the tree."""

import errno
import os
import stat
from collections.abc import Callable

from csi_driver.linux import beneath
from csi_driver.linux.walk import Walk, WalkStopped

Visit = Callable[[int, os.stat_result], None]
"""Told an O_PATH descriptor, which is closed afterwards, and what fstat(2) says of it."""


def visit_below(top: int, visit: Visit, on_entry: Callable[[int], bool], what: str) -> int:
    """Visit all that is in a directory, a directory before what is in it, and return how many entries there were.

    What is gone before its turn is passed over, and so is a mount point, which is not of this tree. `on_entry` is told how many were
    come upon, and stops the walk by True; `what` names the work then. Raises WalkStopped, OSError.
    """
    done = 0
    with beneath.opened_again(top) as start, Walk(start) as walk:
        while True:
            for name, _, _ in walk.entries():
                done += 1
                if on_entry(done):
                    raise WalkStopped(f"{what} was stopped")
                child = _visit_entry(walk.descriptor, name, visit)
                if child is not None:
                    walk.enter(name, child)
                    break
            else:
                if walk.depth == 0:
                    return done
                walk.leave()


def _visit_entry(directory_fd: int, name: bytes, visit: Visit) -> int | None:
    """Visit one entry; of a directory return a descriptor to go down into."""
    try:
        pinned = beneath.pin(directory_fd, name)
    except OSError as error:
        if error.errno in beneath.GONE or error.errno == errno.EXDEV:
            return None
        raise
    try:
        status = os.fstat(pinned)
        visit(pinned, status)
        return beneath.open_pinned(pinned, os.O_RDONLY | os.O_DIRECTORY) if stat.S_ISDIR(status.st_mode) else None
    finally:
        os.close(pinned)
