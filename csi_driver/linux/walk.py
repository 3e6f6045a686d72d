"""Where a walk through a tree stands: the directories from its top down to the current one.

The tree belongs to somebody who changes it meanwhile and who may mean harm. So the way down is a chain of descriptors, never a
path; a directory is read in pieces; and only the deepest 64 directories hold a descriptor, for a tenant can nest 10,000 of them,
beyond any path length and descriptor limit. On the way up a closed one is opened again as `..`, without side effects, and
must prove to be the same inode; its reading goes on at the position that the filesystem gave for the last entry taken.
Memory is O(depth + one piece of a directory for each open one).
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self

from csi_driver.errors import OperationPending
from csi_driver.linux import beneath, staleness
from csi_driver.linux.system_calls import DirectoryEntry, DirectoryReader, file_handle, filesystem_type

_OPEN_LEVELS = 64
_NFS_MAGIC = 0x6969


class WalkStopped(OperationPending):
    """The caller's `should_stop` ended the walk early. What was done so far stays; doing it again is safe."""


@dataclass(slots=True)
class Level:
    """One directory of the way down. `descriptor` is -1 while it is closed."""

    name: bytes
    descriptor: int
    handle: bytes | None = None
    identity: tuple[int, int] = (0, 0)
    position: int = 0
    pending: list[DirectoryEntry] = field(default_factory=list)


class Walk:
    """A way down into a tree. Use as a context manager: it closes what it opened, never the top descriptor."""

    def __init__(self, top_fd: int) -> None:
        """Start at the directory; its read offset is ours until the walk ends."""
        self._levels = [Level(b"", top_fd)]
        self._reader = DirectoryReader()
        self._may_go_stale = filesystem_type(top_fd) == _NFS_MAGIC
        os.lseek(top_fd, 0, os.SEEK_SET)

    @property
    def descriptor(self) -> int:
        """The current directory."""
        return self._levels[-1].descriptor

    @property
    def handle(self) -> bytes | None:
        """What tells the current directory from another that takes its place (`staleness.is_gone`); on NFS only, never of the top."""
        return self._levels[-1].handle

    @property
    def depth(self) -> int:
        """How far below the top; 0 at the top."""
        return len(self._levels) - 1

    def path_of(self, name: bytes) -> bytes:
        """Say where the current directory's entry `name` lies, for people: from the top down, of any length."""
        return b"/".join([*self._way(), name])

    def entries(self) -> Iterator[DirectoryEntry]:
        """Yield the current directory's entries that were not yielded yet. Begin anew after each `enter` and `leave`.

        One that was removed meanwhile has none. Raises OSError; ESTALE where a server knows a directory no more that was not removed.
        """
        level = self._levels[-1]
        while True:
            if not level.pending:
                level.pending = self._read(level.descriptor)
                if not level.pending:
                    return
            entry = level.pending.pop()
            level.position = entry[2]
            yield entry

    def _read(self, descriptor: int) -> list[DirectoryEntry]:
        try:
            return self._reader.read(descriptor)
        except OSError as error:
            # Somebody removed the directory while we stood in it: it holds nothing any more. The top is the caller's concern.
            if self.depth and (error.errno == errno.ENOENT or (error.errno == errno.ESTALE and self._is_gone())):
                return []
            raise

    def _is_gone(self) -> bool:
        return staleness.is_gone(self._levels[0].descriptor, self._way(), self._levels[-1].handle)

    def _way(self) -> list[bytes]:
        return [level.name for level in self._levels[1:]]

    def enter(self, name: bytes, descriptor: int) -> None:
        """Go down into the subdirectory that the caller has opened; the descriptor is the walk's from now on."""
        self._levels.append(Level(name, descriptor, file_handle(descriptor) if self._may_go_stale else None))
        hidden = len(self._levels) - 1 - _OPEN_LEVELS
        # It may be closed already: the walk has come up from further down, and goes down once more.
        if hidden > 0 and self._levels[hidden].descriptor >= 0:
            level = self._levels[hidden]
            level.identity = _identity(level.descriptor)
            os.close(level.descriptor)
            level.descriptor = -1
            level.pending = []

    def leave(self) -> bytes:
        """Go up to the parent and return the name of the directory just left.

        Raises OSError ESTALE when somebody moved it away meanwhile, more than 64 levels deep; the walk cannot go on then.
        """
        level = self._levels.pop()
        try:
            if self._levels[-1].descriptor < 0:
                self._open_again(self._levels[-1], level.descriptor)
        finally:
            os.close(level.descriptor)
        return level.name

    def _open_again(self, level: Level, child_fd: int) -> None:
        parent = os.open(b"..", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=child_fd)
        try:
            if _identity(parent) != level.identity:
                raise OSError(errno.ESTALE, "a directory was moved while it was walked", level.name)
            level.descriptor = beneath.open_pinned(parent, os.O_RDONLY | os.O_DIRECTORY)
        finally:
            os.close(parent)
        os.lseek(level.descriptor, level.position, os.SEEK_SET)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for level in self._levels[1:]:
            if level.descriptor >= 0:
                os.close(level.descriptor)


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
