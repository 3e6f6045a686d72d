"""Copying a tree completely: content, metadata, hard links, holes and special files, while its owner goes on changing it.

The source may be a tenant's: each entry is pinned before anything is asked of it, so what is copied is what was looked at, and
nothing outside is ever touched. The target is ours alone (a staging directory). Directories get their own metadata after their
content, so that until then nothing in the copy is open to others, inherits an ACL, or is immutable too early.

One thread does it. The unit of work is the directory: `_Copy._entry` knows two descriptors and a name and nothing of the walk.
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from csi_driver.linux import beneath
from csi_driver.linux.contents import METHODS, ContentLadder, Method
from csi_driver.linux.fidelity import InodeFidelity
from csi_driver.linux.hard_links import HardLinks
from csi_driver.linux.inode_flags import HOLDING
from csi_driver.linux.system_calls import magic_link
from csi_driver.linux.walk import Walk, WalkStopped

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_LINK_REFUSED = frozenset({errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOSYS})
_NODE_REFUSED = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


@dataclass(slots=True)
class Progress:
    """What a running copy has done so far; one thread writes it, any may read it. Files are all that is no directory."""

    files: int = 0
    directories: int = 0
    bytes: int = 0

    def add_bytes(self, count: int) -> None:
        """Count data carried; holes are none."""
        self.bytes += count


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What was copied, how, and what could not be.

    `bytes` counts data, not holes. `method` is "none" when there was no content. `not_carried` counts by kind: owner, mode, acl,
    "xattr user" (trusted, security, …), times, "inode flags", "hard link" (copied as a file of its own), device, socket, fifo,
    symlink, "mount point" (an entry left out), "vanished" (an entry that went away while it was looked at).
    """

    files: int
    directories: int
    bytes: int
    method: Literal["reflink", "copy_file_range", "copy", "mixed", "none"]
    not_carried: dict[str, int]


def copy_tree(
    source_fd: int,
    target_fd: int,
    *,
    progress: Progress | None = None,
    methods: tuple[Method, ...] = METHODS,
    should_stop: Callable[[], bool] | None = None,
) -> CopyReport:
    """Copy what is in the directory `source_fd`, and its own metadata, into the empty directory `target_fd`.

    `should_stop` is asked before each entry and each 16 MiB; it may sleep, to slow the copy down. Nothing is synced:
    `files.sync_filesystem(target_fd)` does it at once for all.
    Raises WalkStopped; OSError for what is no matter of the target's abilities (EIO, ENOSPC, EDQUOT, EACCES; ENOTEMPTY for a target
    that is not empty; ESTALE when a directory more than 64 levels deep was moved away meanwhile). The target is then a torso.
    """
    copy = _Copy(progress or Progress(), methods, should_stop or (lambda: False))
    with beneath.opened_again(source_fd) as source, beneath.opened_again(target_fd) as target:
        return copy.run(source, target)


class _Copy:
    def __init__(self, progress: Progress, methods: tuple[Method, ...], should_stop: Callable[[], bool]) -> None:
        self._progress = progress
        self._should_stop = should_stop
        self._not_carried: Counter[str] = Counter()
        self._fidelity = InodeFidelity(self._not_carried)
        self._ladder = ContentLadder(methods, should_stop)

    def run(self, source_fd: int, target_fd: int) -> CopyReport:
        self._links = HardLinks(target_fd)
        with Walk(source_fd) as source, Walk(target_fd) as target:
            if next(target.entries(), None) is not None:
                raise OSError(errno.ENOTEMPTY, "the target of a copy must be empty")
            self._fidelity.prepare_top(target_fd)
            entered = [os.fstat(source_fd)]
            while True:
                for name, _, _ in source.entries():
                    if self._should_stop():
                        raise WalkStopped("the copy was stopped")
                    inside = self._entry(source.descriptor, target.descriptor, name)
                    if inside is not None:
                        source_child, target_child, status = inside
                        source.enter(name, source_child)
                        target.enter(name, target_child)
                        self._links.enter(name)
                        entered.append(status)
                        break
                else:
                    self._finish_directory(source.descriptor, target.descriptor, entered.pop(), is_top=not entered)
                    if not entered:
                        break
                    source.leave()
                    target.leave()
                    self._links.leave()
            for pinned, flags in self._links.held():
                late = beneath.open_pinned(pinned, os.O_RDONLY)
                try:
                    self._fidelity.set_flags(late, flags, before_content=False)
                finally:
                    os.close(late)
        return self._report()

    def _entry(self, source_fd: int, target_fd: int, name: bytes) -> tuple[int, int, os.stat_result] | None:
        """Copy one entry; of a directory only open both ends and return them with the source's status."""
        try:
            pinned = beneath.pin(source_fd, name)
        except OSError as error:
            if error.errno in beneath.GONE:
                self._not_carried["vanished"] += 1
            elif error.errno == errno.EXDEV:
                self._not_carried["mount point"] += 1
            else:
                raise
            return None
        try:
            status = os.fstat(pinned)
            if stat.S_ISDIR(status.st_mode):
                return self._directory(pinned, target_fd, name, status)
            if status.st_nlink == 1 or not self._linked(pinned, target_fd, name, status):
                self._progress.files += 1
                if stat.S_ISREG(status.st_mode):
                    self._file(pinned, target_fd, name, status)
                else:
                    self._node(pinned, target_fd, name, status)
        except FileExistsError:
            # A directory that changes while it is read may yield one name twice: what it was the first time is copied.
            pass
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS: removed by another client since it was pinned
                raise
            self._not_carried["vanished"] += 1
        finally:
            os.close(pinned)
        return None

    def _directory(self, pinned: int, target_fd: int, name: bytes, status: os.stat_result) -> tuple[int, int, os.stat_result]:
        source = beneath.open_pinned(pinned, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.mkdir(name, 0o700, dir_fd=target_fd)
            target = beneath.open_directory(target_fd, name)
        except OSError:
            os.close(source)
            raise
        return source, target, status

    def _finish_directory(self, source: int, target: int, status: os.stat_result, *, is_top: bool) -> None:
        flags = self._fidelity.read_flags(source)
        self._fidelity.set_flags(target, flags, before_content=True)
        self._fidelity.carry(source, target, status)
        if is_top and flags & HOLDING:
            flags &= ~HOLDING
            self._not_carried["inode flags"] += 1
        self._fidelity.set_flags(target, flags, before_content=False)
        self._progress.directories += 1

    def _file(self, pinned: int, target_fd: int, name: bytes, status: os.stat_result) -> None:
        source = beneath.open_pinned(pinned, os.O_RDONLY, self._should_stop)
        try:
            target = os.open(name, _NEW_FILE, status.st_mode & 0o777, dir_fd=target_fd)
            try:
                flags = self._fidelity.read_flags(source)
                self._fidelity.set_flags(target, flags, before_content=True)
                self._ladder.carry(source, target, status.st_size, status.st_blocks * 512, self._progress.add_bytes)
                self._fidelity.carry(source, target, status)
                if status.st_nlink > 1 and flags & HOLDING:
                    self._links.hold(name, flags & HOLDING)  # no link can be made to it any more once they are set
                    flags &= ~HOLDING
                self._fidelity.set_flags(target, flags, before_content=False)
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _node(self, pinned: int, target_fd: int, name: bytes, status: os.stat_result) -> None:
        """Copy a symlink, fifo, socket or device: never opened, on either side."""
        mode = status.st_mode
        try:
            if stat.S_ISLNK(mode):
                os.symlink(os.readlink(b"", dir_fd=pinned), name, dir_fd=target_fd)
            else:
                os.mknod(name, stat.S_IFMT(mode) | 0o600, status.st_rdev, dir_fd=target_fd)
        except OSError as error:
            if error.errno not in _NODE_REFUSED:
                raise
            self._not_carried[_kind(mode)] += 1
            return
        made = beneath.pin(target_fd, name)
        try:
            self._fidelity.carry(magic_link(pinned), magic_link(made), status)
        finally:
            os.close(made)

    def _linked(self, pinned: int, target_fd: int, name: bytes, status: os.stat_result) -> bool:
        """Link the name to the copy of the same inode; False when there is none yet, so that this becomes the first."""
        try:
            done = self._links.link(pinned, target_fd, name, status.st_nlink)
        except OSError as error:
            if error.errno not in _LINK_REFUSED:
                raise
            self._not_carried["hard link"] += 1
            return False
        if done:
            self._progress.files += 1
        return done

    def _report(self) -> CopyReport:
        used = sorted(self._ladder.used)
        return CopyReport(
            files=self._progress.files,
            directories=self._progress.directories,
            bytes=self._progress.bytes,
            method=used[0] if len(used) == 1 else "mixed" if used else "none",
            not_carried=dict(self._not_carried),
        )


def _kind(mode: int) -> str:
    for test, kind in ((stat.S_ISLNK, "symlink"), (stat.S_ISFIFO, "fifo"), (stat.S_ISSOCK, "socket")):
        if test(mode):
            return kind
    return "device"
