"""Removing whole trees, whatever their owner left in them or does to them meanwhile.

Never leaves the tree: no symlink is followed and no mount is entered, not even a bind mount of the same filesystem. One entry that
stays keeps none of the others: it is counted, and told of at the end. Memory is the walk's, however many stay.
"""

import errno
import os
import stat
from collections.abc import Callable

from csi_driver.errors import FailedPrecondition, quoted
from csi_driver.linux import beneath, btrfs
from csi_driver.linux.inode_flags import clear_holding_flags
from csi_driver.linux.system_calls import magic_link
from csi_driver.linux.walk import Walk, WalkStopped

_MAY_BE_DIRECTORY = frozenset({0, 4})  # DT_UNKNOWN, DT_DIR
_REFILLED_LIMIT = 1000
_MOUNTED = frozenset({errno.EXDEV, errno.EBUSY})
_NOT_EMPTY = frozenset({errno.ENOTEMPTY, errno.EEXIST})
_OF_ONE_ENTRY = frozenset({errno.EPERM, errno.EACCES, errno.EAGAIN}) | _NOT_EMPTY
"""What says nothing of other entries; of all else (EIO, EROFS, a server that is away) each of them could take its time."""
_SHOWN = 3


def remove_tree(parent_fd: int, name: str | bytes, *, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Remove the entry `name` and all below it; one that is not there is done already.

    Modes (also the sticky bit, without CAP_FOWNER where the filesystem asks a server), immutable and append-only flags and read-only
    btrfs subvolumes inside do not stop it. Raises FailedPrecondition when something is mounted in there, and OSError when entries
    will not go (EPERM, EACCES; EAGAIN for write leases on immutable files; ENOTEMPTY when others fill it as fast), both after all else
    was removed; WalkStopped when `should_stop` said so, and OSError for the rest (EIO, EROFS), at once.
    """
    _Removal(parent_fd, os.fsencode(name), should_stop).run()


class _Removal:
    def __init__(self, parent_fd: int, name: bytes, should_stop: Callable[[], bool]) -> None:
        self._parent_fd = parent_fd
        self._name = name
        self._should_stop = should_stop
        self._remains = _Remains()
        self._holding = -1
        """How deep the deepest of the directories on the way down is that holds something that stays; -1: none does."""
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
        self._remains.complain(self._name)

    def _take(self, walk: Walk, name: bytes, *, may_be_directory: bool) -> bool:
        """Remove the entry or leave it behind; or go down into it and return True."""
        try:
            return self._remove(walk, name, may_be_directory=may_be_directory)
        except OSError as error:
            self._leave_behind(walk, name, error)
            return False

    def _remove(self, walk: Walk, name: bytes, *, may_be_directory: bool) -> bool:
        for _ in range(_REFILLED_LIMIT):  # it may change between file and directory under us
            try:
                if may_be_directory:
                    return self._enter(walk, name)
                self._persist(walk, name, os.unlink)
            except FileNotFoundError:
                return False
            except IsADirectoryError:
                may_be_directory = True
            except OSError as error:
                if not may_be_directory or error.errno not in beneath.GONE:
                    raise
                may_be_directory = False
            else:
                return False
        raise OSError(errno.EAGAIN, "keeps changing", name)

    def _enter(self, walk: Walk, name: bytes) -> bool:
        """Go down into a directory; False where it could be removed in one step."""
        child = self._open(walk.descriptor, name)
        try:
            gone = _destroy_subvolume(walk.descriptor, name, child)
        except OSError:
            os.close(child)
            raise
        if gone:
            os.close(child)
        else:
            walk.enter(name, child)
        return not gone

    def _leave(self, walk: Walk) -> None:
        depth = walk.depth
        name = walk.leave()
        try:
            self._persist(walk, name, os.rmdir)
        except FileNotFoundError:
            pass
        except NotADirectoryError:
            self._take(walk, name, may_be_directory=False)
        except OSError as error:
            if error.errno not in _NOT_EMPTY:
                self._leave_behind(walk, name, error)
            elif self._holding < depth:
                self._take_again(walk, name, error)
        self._holding = min(self._holding, walk.depth)

    def _take_again(self, walk: Walk, name: bytes, not_empty: OSError) -> None:
        """Go down once more: entries came after the reading had passed them, or the filesystem skips some while others are removed."""
        self._refilled += 1
        if self._refilled > _REFILLED_LIMIT:
            self._leave_behind(walk, name, not_empty)
        else:
            self._take(walk, name, may_be_directory=True)

    def _leave_behind(self, walk: Walk, name: bytes, error: OSError) -> None:
        if error.errno in _MOUNTED:
            self._remains.add_mounted(name)
        elif error.errno in _OF_ONE_ENTRY:
            self._remains.add_refused(walk, name, error)
        else:
            raise error
        self._holding = walk.depth

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
                released = inside and _release_entries(directory)
                if not self._clear_flags_of(directory, name) and not released:
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


class _Remains:
    """What stays: how many entries, and which were the first."""

    def __init__(self) -> None:
        self._mounted = 0
        self._shown: list[bytes] = []
        self._refused = 0
        self._first: OSError | None = None

    def add_mounted(self, name: bytes) -> None:
        self._mounted += 1
        if len(self._shown) < _SHOWN:
            self._shown.append(name)

    def add_refused(self, walk: Walk, name: bytes, error: OSError) -> None:
        self._refused += 1
        if self._first is None:
            self._first = OSError(error.errno, error.strerror, walk.path_of(name))

    def complain(self, top: bytes) -> None:
        if self._mounted:
            shown = ", ".join(repr(os.fsdecode(name)) for name in self._shown)
            raise FailedPrecondition(
                f"{os.fsdecode(top)} cannot be removed whole: {self._mounted} mounted below it ({shown}); unmount first"
            )
        if self._first is not None:
            where = quoted(os.fsdecode(self._first.filename), 200)
            raise OSError(
                self._first.errno, f"{self._first.strerror} ({self._refused} cannot be removed, the first is {where})"
            )


def _release_entries(directory_fd: int) -> bool:
    """Take from a directory what forbids removing its entries: flags, and the sticky bit; False where it has neither.

    Who is neither the owner nor has CAP_FOWNER is refused by check_sticky() of the kernel, on NFS before the server is asked; but whether
    the mode may be changed only the server decides.
    """
    cleared = clear_holding_flags(directory_fd)
    if not os.fstat(directory_fd).st_mode & stat.S_ISVTX:
        return cleared
    os.fchmod(directory_fd, 0o700)
    return True


def _destroy_subvolume(directory_fd: int, name: bytes, child: int) -> bool:
    """Remove a btrfs subvolume, open as `child`, in one step, whatever is in it; True where it is gone."""
    if not btrfs.is_subvolume(child):
        return False
    btrfs.set_read_only(child, read_only=False)
    try:
        btrfs.destroy(directory_fd, name)
    except OSError as error:
        # Others lie in it, which go first, or the right is lacking: it is taken apart, and rmdir(2) ends it (Linux 4.18).
        if error.errno not in btrfs.NOT_HERE | {errno.ENOTEMPTY}:
            raise
        return False
    return True
