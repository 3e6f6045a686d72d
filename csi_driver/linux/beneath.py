"""Opening what lies below a directory, and nothing else.

A tenant can put a symlink, or have a mount, anywhere in a tree that we work in, also between our look and our step. So nothing is
ever opened by a path from the root: a descriptor of the directory is held, and the kernel itself refuses to leave it
(openat2(2), Linux 5.6). An entry of unknown kind is first *pinned* with O_PATH, which has no side effect on what is found (a fifo
does not block, a watchdog device does not start), then looked at, and only then opened for real through its descriptor.
"""

import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache

from csi_driver.linux import system_calls as kernel

_TRIES_WHEN_BUSY = 64
_PATIENCE_SECONDS = 60.0  # /proc/sys/fs/lease-break-time is 45 by default
_LOOK_SECONDS = 0.05
_opener = lru_cache(maxsize=64)(kernel.OpenAt2)

GONE = frozenset({errno.ENOENT, errno.ESTALE, errno.ENOTDIR, errno.ELOOP})
"""What an open says of an entry that vanished or became something else since its name was read."""


def open_beneath(directory_fd: int, path: str | bytes, flags: int, mode: int = 0, *, cross_mounts: bool = False) -> int:
    """Open `path` below the directory; symlinks, `..` out of it and (unless `cross_mounts`) mount points are refused.

    Always close-on-exec. Raises OSError: ELOOP for a symlink anywhere in the path (with O_PATH|O_NOFOLLOW a last one is returned
    itself), EXDEV for a way out or a mount point, EAGAIN when the tree moved on each of 64 tries, and open(2)'s own.
    """
    resolve = kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | (0 if cross_mounts else kernel.RESOLVE_NO_XDEV)
    # openat2 answers EINVAL to a mode that would not be used, where open ignores it.
    call = _opener(flags, mode & 0o7777 if flags & (os.O_CREAT | _TMPFILE_BIT) else 0, resolve)
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
    for attempt in range(_TRIES_WHEN_BUSY):
        try:
            return call(directory_fd, raw)
        except OSError as error:
            if error.errno == errno.ENOSYS:
                return open_by_components(directory_fd, raw, flags, mode, cross_mounts=cross_mounts)
            if error.errno != errno.EAGAIN or attempt == _TRIES_WHEN_BUSY - 1:
                raise
    raise AssertionError("unreachable")


_TMPFILE_BIT = os.O_TMPFILE & ~os.O_DIRECTORY


def open_by_components(directory_fd: int, path: bytes, flags: int, mode: int, *, cross_mounts: bool) -> int:
    """Do what `open_beneath` does, one component at a time, for kernels and sandboxes without openat2."""
    if path.startswith(b"/"):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    components = [part for part in path.split(b"/") if part not in {b"", b"."}]
    if b".." in components:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    if not path:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    home = None if cross_mounts else kernel.mount_id(directory_fd)
    last = components[-1] if components else b"."
    parent = os.dup(directory_fd)
    try:
        for component in components[:-1]:
            child = os.open(component, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
            os.close(parent)
            parent = child
            _refuse_other_mount(parent, home, path)
        if not flags & os.O_CREAT and last != b".":
            # Look before the real open: that one could start a device, or hang in a mount.
            pinned = os.open(last, os.O_PATH | os.O_NOFOLLOW, dir_fd=parent)
            try:
                _refuse_other_mount(pinned, home, path)
                if stat.S_ISLNK(os.fstat(pinned).st_mode) and not (flags & os.O_PATH and flags & os.O_NOFOLLOW):
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            finally:
                os.close(pinned)
        opened = os.open(last, flags | os.O_NOFOLLOW, mode, dir_fd=parent)
    finally:
        os.close(parent)
    try:
        _refuse_other_mount(opened, home, path)
    except OSError:
        os.close(opened)
        raise
    return opened


def _refuse_other_mount(descriptor: int, home: int | None, path: bytes) -> None:
    if home is not None and kernel.mount_id(descriptor) != home:
        raise OSError(errno.EXDEV, "a mount point", path)


_pin = _opener(os.O_PATH | os.O_NOFOLLOW, 0, kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_XDEV)


def pin(directory_fd: int, name: bytes) -> int:
    """Hold the entry `name`, whatever it is, without opening it (O_PATH): its inode can no longer be swapped under us.

    Raises OSError: one of `GONE`, or EXDEV for a mount point, which is not even looked at (its server may hang).
    """
    try:
        return _pin(directory_fd, name)
    except OSError as error:
        if error.errno not in {errno.ENOSYS, errno.EAGAIN}:
            raise
    return open_beneath(directory_fd, name, os.O_PATH | os.O_NOFOLLOW)


class Patience:
    """How long a piece of work waits in all for write leases to be broken (fcntl(2)): a tenant can hold one on each of his files.

    What several threads wait at the same time counts once.
    """

    def __init__(self, seconds: float = _PATIENCE_SECONDS) -> None:
        self._left = seconds
        self._counted_until = 0.0
        self._guard = threading.Lock()

    def wait(self) -> bool:
        """Wait a moment; False, at once, where none is left."""
        if self._left <= 0:
            return False
        began = time.monotonic()
        time.sleep(_LOOK_SECONDS)
        with self._guard:
            now = time.monotonic()
            self._left -= max(0.0, now - max(began, self._counted_until))
            self._counted_until = now
        return True


def open_pinned(
    pinned: int, flags: int, should_stop: Callable[[], bool] | None = None, patience: Patience | None = None
) -> int:
    """Open for real the file or directory that `pinned` holds, leaving its access time alone where we may.

    Where a tenant holds a write lease on its file, waits for the kernel to break it as long as `patience` (by default 60 s) lasts.
    Raises OSError; BlockingIOError (EAGAIN) where a lease outlasts that, or `should_stop` said so meanwhile.
    """
    link = kernel.magic_link(pinned)
    flags |= os.O_NONBLOCK | os.O_NOATIME
    while True:
        try:
            return os.open(link, flags)
        except PermissionError:
            if not flags & os.O_NOATIME:
                raise
            flags &= ~os.O_NOATIME  # only an owner or CAP_FOWNER may (open(2))
        except BlockingIOError:
            patience = patience or Patience()
            if (should_stop is not None and should_stop()) or not patience.wait():
                raise


_open_directory = _opener(
    os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_NOATIME,
    0,
    kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_XDEV,
)


def open_directory(directory_fd: int, name: bytes) -> int:
    """Open the subdirectory `name` for reading; raises OSError as `pin` does, and EACCES."""
    try:
        return _open_directory(directory_fd, name)
    except OSError as error:
        if error.errno not in {errno.EPERM, errno.ENOSYS, errno.EAGAIN}:
            raise
    return open_beneath(directory_fd, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


_open_file = _opener(
    os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOATIME,
    0,
    kernel.RESOLVE_BENEATH | kernel.RESOLVE_NO_SYMLINKS | kernel.RESOLVE_NO_XDEV,
)


def open_file(directory_fd: int, name: bytes) -> int:
    """Open what is taken for a file, for reading, in one step: for mounts with nodev only, for it may be a device by now.

    Raises OSError for whatever does not open like a file at once; `pin` and `open_pinned` are the way that tells more.
    """
    return _open_file(directory_fd, name)


def starts_no_device(directory_fd: int) -> bool:
    """Return whether the directory's mount has nodev, so that nothing below it can be opened as a device."""
    return bool(os.fstatvfs(directory_fd).f_flag & os.ST_NODEV)


@contextlib.contextmanager
def opened_again(directory_fd: int) -> Iterator[int]:
    """Open the same directory once more for reading: a read offset of our own, and its access time left alone."""
    descriptor = open_directory(directory_fd, b".")
    try:
        yield descriptor
    finally:
        os.close(descriptor)
