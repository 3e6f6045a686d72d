"""Reading a whole tree and saying what each of its files holds: the walk behind a snapshot's manifest.

Told are entries that are no directories, in no particular order. A file of several names is read once, unless `MOST_OPEN` others wait for
a name of theirs: memory does not grow with what a tenant makes.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from csi_driver.linux import beneath
from csi_driver.linux.digests import digest_file
from csi_driver.linux.hard_links import MOST_OPEN
from csi_driver.linux.walk import Walk, WalkStopped

LONGEST_PATH_BYTES = 4096
UNREADABLE = "unreadable"
"""Stands for the digest of what the disk does not give back (EIO, and what else a filesystem says of damage)."""
_DAMAGE = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EREMOTEIO, errno.ENODATA})
_KINDS = (
    (stat.S_ISREG, "f"),
    (stat.S_ISLNK, "l"),
    (stat.S_ISFIFO, "p"),
    (stat.S_ISSOCK, "s"),
    (stat.S_ISCHR, "c"),
    (stat.S_ISBLK, "b"),
)


class Counts(Protocol):
    """Where the walk counts; see copies.Progress."""

    def add_bytes(self, count: int) -> None: ...
    def add_file(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: kind (f, l, p, s, c, b), size in bytes (files and links), digest of a file's content or a link's target, path.

    A path of more than 4,096 bytes is told as `~` and a hash of it.
    """

    kind: str
    size: int
    digest: str
    path: bytes


def digest_tree(
    top_fd: int, tell: Callable[[Entry], None], progress: Counts, should_stop: Callable[[], bool], most_open: int = MOST_OPEN
) -> None:
    """Tell of every entry below the directory that is no directory. Raises OSError (of a directory that cannot be read; EAGAIN
    for a file whose write lease was not given back), WalkStopped.
    """
    reader = _Reader(progress, should_stop, most_open)
    with beneath.opened_again(top_fd) as top, Walk(top) as walk:
        paths = [b""]
        while True:
            for name, _, _ in walk.entries():
                if should_stop():
                    raise WalkStopped("the reading was stopped")
                path = _join(paths[-1], name)
                inside = reader.entry(walk.descriptor, name, path, tell)
                if inside is not None:
                    walk.enter(name, inside)
                    paths.append(path)
                    break
            else:
                if walk.depth == 0:
                    return
                walk.leave()
                paths.pop()


class _Reader:
    def __init__(self, progress: Counts, should_stop: Callable[[], bool], most_open: int) -> None:
        self._most_open = most_open
        self._progress = progress
        self._should_stop = should_stop
        self._patience = beneath.Patience()
        self._linked: dict[tuple[int, int], tuple[str, int]] = {}

    def entry(self, directory_fd: int, name: bytes, path: bytes, tell: Callable[[Entry], None]) -> int | None:
        """Tell of one entry; of a directory only open it."""
        pinned = beneath.pin(directory_fd, name)
        try:
            status = os.fstat(pinned)
            if stat.S_ISDIR(status.st_mode):
                return beneath.open_pinned(pinned, os.O_RDONLY | os.O_DIRECTORY)
            tell(self._entry(pinned, status, path))
            self._progress.add_file()
            return None
        finally:
            os.close(pinned)

    def _entry(self, pinned: int, status: os.stat_result, path: bytes) -> Entry:
        kind = next((letter for test, letter in _KINDS if test(status.st_mode)), "?")
        if kind == "f":
            return Entry(kind, status.st_size, self._digest(pinned, status), path)
        if kind == "l":
            target = os.readlink(b"", dir_fd=pinned)
            return Entry(kind, len(target), hashlib.sha256(target).hexdigest(), path)
        return Entry(kind, 0, f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" if kind in "cb" else "-", path)

    def _digest(self, pinned: int, status: os.stat_result) -> str:
        key = status.st_dev, status.st_ino
        if status.st_nlink > 1 and (known := self._linked.pop(key, None)) is not None:
            digest, names = known
        else:
            digest, names = self._read(pinned), status.st_nlink
        if names > 1 and len(self._linked) < self._most_open:
            self._linked[key] = digest, names - 1
        return digest

    def _read(self, pinned: int) -> str:
        try:
            opened = beneath.open_pinned(pinned, os.O_RDONLY, self._should_stop, self._patience)
            try:
                # What the disk holds is asked, not what memory holds of it; and nobody else's files shall make room for these.
                os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
                digest = digest_file(opened, self._should_stop, self._progress.add_bytes)[0]
                os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
                return digest
            finally:
                os.close(opened)
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise
            return UNREADABLE


def _join(path: bytes, name: bytes) -> bytes:
    joined = path + b"/" + name if path else name
    if len(joined) <= LONGEST_PATH_BYTES:
        return joined
    return b"~" + hashlib.sha256(joined).hexdigest().encode()
