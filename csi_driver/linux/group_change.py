"""Giving a volume to a group, as a pod's fsGroup asks: in one step where the volume is new, in one walk where it is not.

The top directory gets the group, group rights and setgid, so that all that is made in it belongs to the group. It gets them last:
a top that has them says that the content below it was done, or is as somebody wants it, and then nothing is walked, however many
files there are (Kubernetes calls this fsGroupChangePolicy: OnRootMismatch). A walk that was cut off has left the top as it was.
"""

import os
import stat
from collections.abc import Callable

from csi_driver.linux.system_calls import magic_link
from csi_driver.linux.visits import visit_below

_GROUP_READS_AND_WRITES = 0o060
_GROUP_ENTERS = 0o010


def has_group(directory_fd: int, gid: int) -> bool:
    """Tell whether the directory belongs to the group, as `give_to_group` leaves it."""
    status = os.fstat(directory_fd)
    return status.st_gid == gid and status.st_mode & 0o2070 == 0o2070


def give_to_group(directory_fd: int, gid: int, on_entry: Callable[[int], bool] = lambda _done: False) -> int:
    """Give the tree to the group, and return how many entries there were; 0 where the top says that it was done before.

    As Kubernetes does it: group rights to read and write, to enter directories, setgid on directories; symlinks get the group alone.
    Never leaves the tree. `on_entry` is told how many were done, and stops the walk by True. Raises WalkStopped, OSError (EPERM where
    the server squashes root).
    """
    if has_group(directory_fd, gid):
        return 0

    def give(pinned: int, status: os.stat_result) -> None:
        _give(magic_link(pinned), status, gid)

    done = visit_below(directory_fd, give, on_entry, "the change of group")
    _give(directory_fd, os.fstat(directory_fd), gid)
    return done + 1


def _give(place: int | bytes, status: os.stat_result, gid: int) -> None:
    is_link, is_directory = stat.S_ISLNK(status.st_mode), stat.S_ISDIR(status.st_mode)
    if status.st_gid != gid:
        os.chown(place, -1, gid)  # of a symlink, too: the magic link leads to the link itself
    if is_link:
        return
    mode = stat.S_IMODE(status.st_mode) | _GROUP_READS_AND_WRITES
    if is_directory:
        mode |= _GROUP_ENTERS | stat.S_ISGID
    if mode != stat.S_IMODE(status.st_mode) or status.st_mode & (stat.S_ISUID | stat.S_ISGID):
        os.chmod(place, mode)  # noqa: PTH101 - a descriptor or its link; and chown has cleared setuid and setgid
