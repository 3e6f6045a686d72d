"""Giving a whole tree a project: for a volume that came from another filesystem, where it had another one.

From the top down, so that what is made in a directory meanwhile inherits. What cannot be opened without side effects (fifos, sockets,
devices, symbolic links) keeps what it has: it holds no data. So does what is immutable, or leased by a tenant (fcntl(2)) just now:
whoever owns a file may change its project anyway. The tree's owner may mean harm; nothing here leaves it or waits for him.
"""

import os
import stat
from collections.abc import Callable
from contextlib import suppress

from csi_driver.linux import beneath
from csi_driver.linux.projects import Project, set_project
from csi_driver.linux.visits import visit_below


def give_project(top: int, project: int, should_stop: Callable[[], bool]) -> int:
    """Give a directory and all that is in it a project, and return how many entries there were.

    Raises WalkStopped, OSError.
    """
    set_project(top, Project(project, inherit=True))

    def give(pinned: int, status: os.stat_result) -> None:
        if stat.S_ISDIR(status.st_mode):
            with suppress(PermissionError):
                _give(pinned, os.O_DIRECTORY, Project(project, inherit=True))
        elif stat.S_ISREG(status.st_mode):
            with suppress(PermissionError, BlockingIOError):
                _give(pinned, 0, Project(project, inherit=False))

    return visit_below(top, give, lambda _done: should_stop(), "the change of project")


def _give(pinned: int, flags: int, project: Project) -> None:
    opened = beneath.open_pinned(pinned, os.O_RDONLY | flags, lambda: True)
    try:
        set_project(opened, project)
    finally:
        os.close(opened)
