"""Giving a whole tree a project: for a volume that came from another filesystem, where it had another one.

From the top down, so that what is made in a directory meanwhile inherits. What cannot be opened without side effects (fifos, sockets,
devices, symbolic links) keeps what it has: it holds no data. So does what is immutable, or leased by a tenant (fcntl(2)) just now:
whoever owns a file may change its project anyway. The tree's owner may mean harm; nothing here leaves it or waits for him.
"""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress

from csi_driver.linux import beneath
from csi_driver.linux.projects import Project, set_project
from csi_driver.linux.walk import Walk, WalkStopped


def give_project(top: int, project: int, should_stop: Callable[[], bool]) -> int:
    """Give a directory and all that is in it a project, and return how many entries there were.

    Raises WalkStopped, OSError.
    """
    done = 0
    set_project(top, Project(project, inherit=True))
    with beneath.opened_again(top) as start, Walk(start) as walk:
        while True:
            for name, _, _ in walk.entries():
                done += 1
                if should_stop():
                    raise WalkStopped("the change of project was stopped")
                child = _give_entry(walk.descriptor, name, project)
                if child is not None:
                    walk.enter(name, child)
                    break
            else:
                if walk.depth == 0:
                    return done
                walk.leave()


def _give_entry(directory_fd: int, name: bytes, project: int) -> int | None:
    """Give one entry; of a directory return a descriptor to go down into."""
    try:
        pinned = beneath.pin(directory_fd, name)
    except OSError as error:
        if error.errno in beneath.GONE or error.errno == errno.EXDEV:  # a mount point is not of this tree
            return None
        raise
    try:
        mode = os.fstat(pinned).st_mode
        if stat.S_ISDIR(mode):
            opened = beneath.open_pinned(pinned, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(PermissionError):
                set_project(opened, Project(project, inherit=True))
            return opened
        if stat.S_ISREG(mode):
            with suppress(PermissionError, BlockingIOError):
                _give_file(pinned, project)
        return None
    finally:
        os.close(pinned)


def _give_file(pinned: int, project: int) -> None:
    opened = beneath.open_pinned(pinned, os.O_RDONLY, lambda: True)
    try:
        set_project(opened, Project(project, inherit=False))
    finally:
        os.close(opened)
