"""What is known of the files of a folder without reading them all each time.

The folder is the truth and the index is held against it: a file that is another one than before is read again. Files appear, change
and go by rename and link alone, so a changed file has another inode; but a number that became free is given to the next file, so a
thorough look compares the times as well. That costs a system call for each file, and on NFS a question to the server.
"""

import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, TypeVar

from csi_driver.linux.listings import list_steadily

T = TypeVar("T")

_CLOCK_NS = 50_000_000
"""More than a tick of any kernel's file times: what changed that shortly before the newest file may change again and not show it."""


@dataclass(slots=True)
class _Entry(Generic[T]):
    inode: int
    changed_ns: int  # mtime; 0 where it is not known, so that a thorough look reads it
    value: T


class FolderIndex(Generic[T]):
    """The files of one folder whose names match a pattern, each with what `read` made of it. Not for two threads at once."""

    def __init__(
        self, open_folder: Callable[[], AbstractContextManager[int]], pattern: re.Pattern[str], read: Callable[[int, str], T]
    ) -> None:
        """`read` is given the open folder and a name; it may raise FileNotFoundError."""
        self._open = open_folder
        self._pattern = pattern
        self._read = read
        self._entries: dict[str, _Entry[T]] = {}

    def values(self) -> Mapping[str, T]:
        """Return what is known, by name."""
        return {name: entry.value for name, entry in self._entries.items()}

    def note(self, name: str, value: T) -> T | None:
        """Remember what was just written. Returns what was known before."""
        before = self._entries.get(name)
        self._entries[name] = _Entry(0, 0, value)
        return before.value if before else None

    def look(self, *, thorough: bool) -> None:
        """Read what is new or another file, and forget what is gone.

        Without `thorough` a file that was changed and happened to get the number of its predecessor's predecessor passes for the old.
        """
        listed = self._list()
        with self._open() as folder:
            # A listing can miss a file that is being replaced (linux/listings.py): what was there is asked for by name.
            for name in [*listed, *(self._entries.keys() - listed.keys())]:
                known = self._entries.get(name)
                if known is None or thorough or known.inode != listed.get(name):
                    self._look_at(folder, name, known)
        if thorough:
            newest = max((entry.changed_ns for entry in self._entries.values()), default=0)
            for entry in self._entries.values():
                if entry.changed_ns > newest - _CLOCK_NS:
                    entry.changed_ns = 0

    def _look_at(self, folder: int, name: str, known: _Entry[T] | None) -> None:
        try:
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if known is None or (known.inode, known.changed_ns) != (status.st_ino, status.st_mtime_ns):
                # What is replaced between the two calls has the older status here, and is read again by the next look.
                self._entries[name] = _Entry(status.st_ino, status.st_mtime_ns, self._read(folder, name))
        except FileNotFoundError:
            self._entries.pop(name, None)

    def _list(self) -> dict[str, int]:
        with self._open() as folder:
            return {name: inode for name, inode in list_steadily(folder).items() if self._pattern.fullmatch(name)}
