"""Which inodes with several names a copy has met, and where their first copies are.

A first copy is found again by its way down in the target, kept as a chain that inodes of one directory share: neither its length
nor the number of descriptors has a limit. An inode is forgotten once all its names were met. A tenant decides how many are open at a time, so there is a
most (`MOST_OPEN`), beyond which the copy is refused: memory is everybody's. Not for two threads at once.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Optional

from csi_driver.errors import FailedPrecondition
from csi_driver.linux import beneath
from csi_driver.linux.system_calls import InodeReader, magic_link

MOST_OPEN = 200_000
"""Inodes of which some names were met and others not, some 60 MB."""
_PATH_BYTES = 4000  # PATH_MAX is 4096
_KEY = struct.Struct("=QIIqI")


@dataclass(frozen=True, slots=True)
class Place:
    """A directory of the copy: its name and what it lies in; the top has no parent."""

    name: bytes
    parent: Optional["Place"]

    def way(self) -> list[bytes]:
        """Name the directories from the top, which is not among them, down to this one."""
        names, place = [], self
        while place.parent is not None:
            names.append(place.name)
            place = place.parent
        return names[::-1]

    def path_of(self, name: bytes) -> str:
        """Say where in the copy `name` lies, for people."""
        return os.fsdecode(b"/".join([*self.way(), name]))


@dataclass(slots=True)
class _First:
    directory: Place
    name: bytes
    names_left: int


class HardLinks:
    """The table of one copy."""

    def __init__(self, target_top_fd: int, most_open: int = MOST_OPEN) -> None:
        """Begin at the top of the target; the descriptor stays the caller's."""
        self._top_fd = target_top_fd
        self._most = most_open
        self._firsts: dict[bytes, _First] = {}
        self._held: list[tuple[Place, bytes, int]] = []
        self._reader = InodeReader()

    def link(self, pinned: int, target_fd: int, here: Place, name: bytes, names: int) -> bool:
        """Link `name` in `here` (open as `target_fd`) to the first copy of the inode that `pinned` holds, which has so many names.

        False when there is none: the caller makes one under this name, and it counts as the first from now on.
        Raises OSError as link(2); after such a refusal, too, this name counts as the first. Raises FailedPrecondition where more
        inodes are open than memory is kept for.
        """
        status = self._reader.read(pinned)
        # With its birth time, for a number may be given to another inode while the copy runs.
        key = _KEY.pack(status.inode, *status.device, *status.birth)
        first = self._firsts.get(key)
        if first is None:
            self._require_room(here, name)
            self._firsts[key] = _First(here, name, names - 1)
            return False
        try:
            self._link_to(first, target_fd, here, name)
        except FileExistsError:
            raise
        except OSError as error:
            self._firsts[key] = _First(here, name, first.names_left)
            if isinstance(error, FileNotFoundError):  # the first could not be made
                return False
            raise
        first.names_left -= 1
        if first.names_left <= 0:
            del self._firsts[key]
        return True

    def hold(self, here: Place, name: bytes, flags: int) -> None:
        """Keep flags of the copy `name` in `here` that would forbid further links to it, for `held`."""
        self._require_room(here, name)
        self._held.append((here, name, flags))

    def _require_room(self, here: Place, name: bytes) -> None:
        if len(self._firsts) + len(self._held) >= self._most:
            raise FailedPrecondition(
                f"the tree has too many hard links to be copied with them: {self._most} files have several names of which others "
                f"were not met yet, at {here.path_of(name)!a}; remove links, or keep such data in an image (`layout: image`) or on btrfs"
            )

    def held(self) -> Iterator[tuple[int, int]]:
        """Yield what was kept back: a pinned descriptor, closed on the next step, and the flags."""
        for place, name, flags in self._held:
            pinned = self._find(place, name)
            try:
                yield pinned, flags
            finally:
                os.close(pinned)

    def _link_to(self, first: _First, target_fd: int, here: Place, name: bytes) -> None:
        if first.directory is here:
            os.link(first.name, name, src_dir_fd=target_fd, dst_dir_fd=target_fd, follow_symlinks=False)
            return
        pinned = self._find(first.directory, first.name)
        try:
            # Following the magic link leads to the inode itself, be it a symlink; nothing else is followed.
            os.link(magic_link(pinned), name, dst_dir_fd=target_fd, follow_symlinks=True)
        finally:
            os.close(pinned)

    def _find(self, place: Place, name: bytes) -> int:
        names = [*place.way(), name][::-1]
        found = os.dup(self._top_fd)
        path = b""
        while names:
            path = path + b"/" + names.pop() if path else names.pop()
            if not names or len(path) + len(names[-1]) >= _PATH_BYTES:
                try:
                    deeper = beneath.open_beneath(found, path, os.O_PATH | os.O_NOFOLLOW)
                finally:
                    os.close(found)
                found, path = deeper, b""
        return found
