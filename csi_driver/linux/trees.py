"""Measuring whole trees, whatever their owner left in them or does to them meanwhile.

Never leaves the tree: no symlink is followed and no mount is entered, not even a bind mount of the same filesystem. An entry that
vanishes or becomes something else is taken as it is found.

A file of several names counts once, as du(1) has it: by the first one met. So those of which other names are still to come are kept in
mind, and a tenant decides how many they are; memory is everybody's. What finds no room counts by its share with each of its names, which is
the same in the end where all of them lie in the tree. Whether they do, those tell for which there was room.
"""

import errno
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass

from csi_driver.linux import beneath
from csi_driver.linux.system_calls import InodeReader, InodeStatus
from csi_driver.linux.walk import Walk

MOST_OPEN = 20_000
"""Inodes of which some names were met and others not, that are kept in mind; some 6 MB."""
_STRAYS = 0.01
"""How many of them may lack a name in the end, as a part of MOST_OPEN: names come and go while a tree is walked."""
_BLOCK_BYTES = 512  # of st_blocks and stx_blocks, on any filesystem (stat(3type))
_MAY_BE_DIRECTORY = frozenset({0, 4})  # DT_UNKNOWN, DT_DIR


@dataclass(frozen=True, slots=True)
class TreeUsage:
    """What a tree takes, as du(1) counts: allocated bytes, each inode once, the top included.

    `complete` is False when the deadline cut the count short, a part could not be read, or files with several names, more than are kept
    in mind, have some of them elsewhere; the numbers are then a floor.
    """

    bytes: int
    inodes: int
    complete: bool


def measure_tree(
    directory_fd: int, *, deadline: float, most_open: int = MOST_OPEN, on_entry: Callable[[], None] = lambda: None
) -> TreeUsage:
    """Count what the tree takes until `deadline` (time.monotonic(), seconds); `on_entry` is called at each step.

    Raises OSError only for the top itself. Memory is the walk's and that of `most_open` inodes, whatever is in the tree.
    """
    with beneath.opened_again(directory_fd) as start, Walk(start) as walk:
        count = _Count(start, most_open)
        while time.monotonic() <= deadline:
            on_entry()
            try:
                if not _next_step(walk, count):
                    return count.usage()
            except OSError:  # the directory itself is unreadable (EIO), or was moved away from under a deep walk
                break
        count.complete = False
        return count.usage()


def _next_step(walk: Walk, count: "_Count") -> bool:
    """Count one entry, going down into it if it is a directory, or go up; False at the end of the top."""
    for name, kind, _ in walk.entries():
        child = count.add(walk.descriptor, name, may_be_directory=kind in _MAY_BE_DIRECTORY)
        if child is not None:
            walk.enter(name, child)
        return True
    if walk.depth == 0:
        return False
    walk.leave()
    return True


def apply_owner_and_mode(directory_fd: int, uid: int | None, gid: int | None, mode: int | None) -> None:
    """Set owner, group and mode (12 bits) of this one directory; None leaves that one alone. Raises OSError."""
    if uid is not None or gid is not None:
        os.fchown(directory_fd, -1 if uid is None else uid, -1 if gid is None else gid)
    if mode is not None:
        os.fchmod(directory_fd, mode)  # after chown, which clears setuid and setgid


class _Count:
    def __init__(self, top_fd: int, most_open: int) -> None:
        self._most_open = most_open
        self._reader = InodeReader()
        top = self._reader.read(top_fd)
        self._mount = top.mount
        self._blocks = float(top.blocks)
        self._inodes = 1.0
        self._names_left: dict[tuple[int, tuple[int, int]], int] = {}
        self._is_full = False
        """Once it has been, for whoever found no room then must count by shares to the end."""
        self.complete = True

    def usage(self) -> TreeUsage:
        elsewhere = self._is_full and len(self._names_left) > self._most_open * _STRAYS
        return TreeUsage(round(self._blocks) * _BLOCK_BYTES, round(self._inodes), self.complete and not elsewhere)

    def add(self, directory_fd: int, name: bytes, *, may_be_directory: bool) -> int | None:
        """Count the entry; return a descriptor of it when it is a directory to go down into."""
        try:
            child = _directory_or_none(directory_fd, name) if may_be_directory else None
            try:
                status = self._reader.read(directory_fd, name) if child is None else self._reader.read(child)
            except OSError:
                if child is not None:
                    os.close(child)
                raise
        except OSError as error:
            # A mount point is not of this tree, and what vanished is not there: neither makes the count incomplete.
            self.complete = self.complete and (error.errno in beneath.GONE or error.errno == errno.EXDEV)
            return None
        if child is None and status.mount != self._mount:
            return None
        share = self._share(status) if status.links > 1 and not stat.S_ISDIR(status.mode) else 1
        self._blocks += status.blocks * share
        self._inodes += share
        return child

    def _share(self, status: InodeStatus) -> float:
        """Say how much of an inode with several names this one stands for; it is forgotten once all were met."""
        inode = status.inode, status.device
        left = self._names_left.get(inode)
        if left is None:
            self._is_full = self._is_full or len(self._names_left) >= self._most_open
            if self._is_full:
                return 1 / status.links
            self._names_left[inode] = status.links - 1
            return 1
        if left > 1:
            self._names_left[inode] = left - 1
        else:
            del self._names_left[inode]
        return 0


def _directory_or_none(directory_fd: int, name: bytes) -> int | None:
    try:
        return beneath.open_directory(directory_fd, name)
    except OSError as error:
        if error.errno in beneath.GONE:
            return None
        raise
