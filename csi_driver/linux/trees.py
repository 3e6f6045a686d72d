"""Measuring and removing whole trees, whatever their owner left in them or does to them meanwhile.

Never leaves the tree: no symlink is followed and no mount is entered, not even a bind mount of the same filesystem. An entry that
vanishes or becomes something else is taken as it is found.
"""

import errno
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass

from csi_driver.errors import FailedPrecondition
from csi_driver.linux import beneath, btrfs
from csi_driver.linux.hard_links import MOST_OPEN
from csi_driver.linux.inode_flags import clear_holding_flags
from csi_driver.linux.system_calls import InodeReader, magic_link
from csi_driver.linux.walk import Walk, WalkStopped

_BLOCK_BYTES = 512  # of st_blocks and stx_blocks, on any filesystem (stat(3type))
_MAY_BE_DIRECTORY = frozenset({0, 4})  # DT_UNKNOWN, DT_DIR
_REFILLED_LIMIT = 1000


@dataclass(frozen=True, slots=True)
class TreeUsage:
    """What a tree takes, as du(1) counts: allocated bytes, each inode once, the top included.

    `complete` is False when the deadline cut the count short, a part could not be read, or more files with several names than memory
    is kept for were met; the numbers are then a floor.
    """

    bytes: int
    inodes: int
    complete: bool


def measure_tree(directory_fd: int, *, deadline: float, most_open: int = MOST_OPEN) -> TreeUsage:
    """Count what the tree takes until `deadline` (time.monotonic(), seconds).

    Raises OSError only for the top itself. Memory grows with the number of inodes of which some names were met and others not, up to
    `most_open` of them; the rest are not counted.
    """
    with beneath.opened_again(directory_fd) as start, Walk(start) as walk:
        count = _Count(start, most_open)
        while time.monotonic() <= deadline:
            try:
                if not _next_step(walk, count):
                    return count.usage()
            except OSError:  # the directory itself is unreadable (EIO), or was moved away from under a deep walk
                count.complete = False
                return count.usage()
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


def remove_tree(parent_fd: int, name: str | bytes, *, should_stop: Callable[[], bool] | None = None) -> None:
    """Remove the entry `name` and all below it; one that is not there is done already.

    Modes, immutable and append-only flags and read-only btrfs subvolumes inside do not stop it. Raises FailedPrecondition when
    something is mounted in there (all else is removed; what is mounted is not touched), WalkStopped when `should_stop` said so,
    and OSError for the rest (EIO, EROFS, EAGAIN for write leases on immutable files, EPERM without the right to clear a flag, ENOTEMPTY when others fill it as fast).
    """
    _Removal(parent_fd, os.fsencode(name), should_stop or _never).run()


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
        self._blocks = top.blocks
        self._inodes = 1
        self._names_left: dict[tuple[int, tuple[int, int]], int] = {}
        self.complete = True

    def usage(self) -> TreeUsage:
        return TreeUsage(self._blocks * _BLOCK_BYTES, self._inodes, self.complete)

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
        if (
            status.links > 1
            and not stat.S_ISDIR(status.mode)
            and not self._is_first((status.inode, status.device), status.links)
        ):
            return child
        self._blocks += status.blocks
        self._inodes += 1
        return child

    def _is_first(self, inode: tuple[int, tuple[int, int]], names: int) -> bool:
        """Tell whether an inode with several names is to be counted by this one; it is forgotten once all were met."""
        left = self._names_left.pop(inode, None)
        if left is None and len(self._names_left) >= self._most_open:
            self.complete = False
            return False
        if (left or names) > 1:
            self._names_left[inode] = (left or names) - 1
        return left is None


class _Removal:
    def __init__(self, parent_fd: int, name: bytes, should_stop: Callable[[], bool]) -> None:
        self._parent_fd = parent_fd
        self._name = name
        self._should_stop = should_stop
        self._mounted: list[bytes] = []
        self._refilled = 0
        self._patience = beneath.Patience()

    def run(self) -> None:
        with beneath.opened_again(self._parent_fd) as start, Walk(start) as walk:
            self._take(walk, self._name, may_be_directory=True)
            while walk.depth > 0:
                for name, kind, _ in walk.entries():
                    if self._should_stop():
                        raise WalkStopped("the removal was stopped")
                    if self._take(walk, name, may_be_directory=kind in _MAY_BE_DIRECTORY):
                        break
                else:
                    self._leave(walk)
        if self._mounted:
            shown = ", ".join(repr(os.fsdecode(name)) for name in self._mounted[:3])
            raise FailedPrecondition(
                f"{os.fsdecode(self._name)} cannot be removed whole: {len(self._mounted)} mounted below it ({shown}); unmount first"
            )

    def _take(self, walk: Walk, name: bytes, *, may_be_directory: bool) -> bool:
        """Remove the entry, or go down into it and return True."""
        directory = walk.descriptor
        for _ in range(_REFILLED_LIMIT):  # it may change between file and directory under us
            try:
                if may_be_directory:
                    child = self._open(directory, name)
                    if self._destroy_subvolume(directory, name, child):
                        return False
                    walk.enter(name, child)
                    return True
                self._persist(walk, name, os.unlink)
            except FileNotFoundError:
                return False
            except IsADirectoryError:
                may_be_directory = True
            except OSError as error:
                if error.errno in {errno.EXDEV, errno.EBUSY}:
                    self._mounted.append(name)
                    return False
                if not may_be_directory or error.errno not in beneath.GONE:
                    raise
                may_be_directory = False
            else:
                return False
        raise OSError(errno.EBUSY, "keeps changing", name)

    def _leave(self, walk: Walk) -> None:
        name = walk.leave()
        try:
            self._persist(walk, name, os.rmdir)
        except FileNotFoundError:
            pass
        except NotADirectoryError:
            self._take(walk, name, may_be_directory=False)
        except OSError as error:
            if error.errno == errno.EBUSY:
                self._mounted.append(name)
            elif error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            elif not self._mounted:
                # Entries came after the reading had passed them, or the filesystem skips some while others are removed.
                self._refilled += 1
                if self._refilled > _REFILLED_LIMIT:
                    raise
                self._take(walk, name, may_be_directory=True)

    def _destroy_subvolume(self, directory_fd: int, name: bytes, child: int) -> bool:
        """Remove a btrfs subvolume in one step, whatever is in it; True where it is gone and `child` closed."""
        if not btrfs.is_subvolume(child):
            return False
        btrfs.set_read_only(child, read_only=False)
        try:
            btrfs.destroy(directory_fd, name)
        except OSError as error:
            # Others lie in it, which go first, or the right is lacking: it is taken apart, and rmdir(2) ends it (Linux 4.18).
            if error.errno not in btrfs.NOT_HERE | {errno.ENOTEMPTY}:
                os.close(child)
                raise
            return False
        os.close(child)
        return True

    def _open(self, directory_fd: int, name: bytes) -> int:
        try:
            return beneath.open_directory(directory_fd, name)
        except PermissionError:
            # Without CAP_DAC_OVERRIDE (a user namespace, a squashed NFS root) the mode holds us off: it is ours to change.
            pinned = beneath.pin(directory_fd, name)
            try:
                if stat.S_ISDIR(os.fstat(pinned).st_mode):
                    os.chmod(magic_link(pinned), 0o700)  # noqa: PTH101 - a descriptor's link, no path
                return beneath.open_pinned(pinned, os.O_RDONLY | os.O_DIRECTORY)
            finally:
                os.close(pinned)

    def _persist(self, walk: Walk, name: bytes, step: Callable[..., None]) -> None:
        """Do the step (unlink or rmdir) and, where flags or modes forbid it, clear them and do it again."""
        directory = walk.descriptor
        try:
            step(name, dir_fd=directory)
        except PermissionError as error:
            inside = walk.depth > 0  # the parent that the caller gave is not ours to change
            if error.errno == errno.EPERM:
                of_directory = inside and clear_holding_flags(directory)
                if not self._clear_flags_of(directory, name) and not of_directory:
                    raise
            elif inside:
                os.fchmod(directory, 0o700)
            else:
                raise
            step(name, dir_fd=directory)

    def _clear_flags_of(self, directory_fd: int, name: bytes) -> bool:
        pinned = beneath.pin(directory_fd, name)
        try:
            mode = os.fstat(pinned).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # no others carry flags, and opening a device does things
                return False
            opened = beneath.open_pinned(pinned, os.O_RDONLY, self._should_stop, self._patience)
        finally:
            os.close(pinned)
        try:
            return clear_holding_flags(opened)
        finally:
            os.close(opened)


def _directory_or_none(directory_fd: int, name: bytes) -> int | None:
    try:
        return beneath.open_directory(directory_fd, name)
    except OSError as error:
        if error.errno in beneath.GONE:
            return None
        raise


def _never() -> bool:
    return False
