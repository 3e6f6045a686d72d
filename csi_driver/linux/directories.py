"""Making directories, exclusively and on the way to one, in a tree where somebody else may be at work.

An NFS server may do what it was asked, be started again, and answer the same request, sent once more, that the name exists: that it does
each thing once (RFC 8881, section 2.10.6) holds as long as it remembers. So where a server answers, and a name was free a moment ago,
a directory that is as ours would be is ours.
"""

import contextlib
import errno
import os
import stat

from csi_driver.linux.beneath import open_beneath
from csi_driver.linux.files import sync_directory

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def make_exclusively(parent_fd: int, name: str, maker: int | None) -> None:
    """Make a directory (0700), of whose name the caller has just seen that it was free.

    `maker` is the uid that owns what is made through a server; None where the kernel itself answers, whose word holds. Raises OSError:
    FileExistsError where the name is taken.
    """
    try:
        os.mkdir(name, 0o700, dir_fd=parent_fd)
    except FileExistsError:
        if maker is None or not _is_as_made(parent_fd, name, maker):
            raise


def make_directories(directory_fd: int, path: str, mode: int, maker: int | None = None) -> list[str]:
    """Make the directory `path` and those above it as needed, below the directory, and return those made, topmost first.

    Those made get exactly `mode` (no umask) and are durable; `maker` as in `make_exclusively`. Raises OSError: ELOOP or ENOTDIR where something else stands in the way,
    EXDEV for `..` or a mount point, EINVAL for a path without a name; what was made is then removed again.
    """
    components = [part for part in path.split("/") if part not in {"", "."}]
    if path.startswith("/") or ".." in components:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    if not components:
        raise OSError(errno.EINVAL, "names no directory", path)
    made: list[str] = []
    parent = os.dup(directory_fd)
    try:
        for depth, component in enumerate(components, start=1):
            if _make_directory(parent, component, mode, maker):
                made.append("/".join(components[:depth]))
            child = open_beneath(parent, component, _DIRECTORY)
            os.close(parent)
            parent = child
    except OSError:
        for one in reversed(made):
            _remove_made(directory_fd, one)
        raise
    finally:
        os.close(parent)
    return made


def _make_directory(parent_fd: int, name: str, mode: int, maker: int | None) -> bool:
    try:
        os.stat(name, dir_fd=parent_fd, follow_symlinks=False)
    except FileNotFoundError:
        pass
    else:
        return False
    try:
        make_exclusively(parent_fd, name, maker)
    except FileExistsError:
        return False
    try:
        descriptor = open_beneath(parent_fd, name, _DIRECTORY)
        try:
            os.fchmod(descriptor, mode)
            sync_directory(descriptor)
        finally:
            os.close(descriptor)
        sync_directory(parent_fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=parent_fd)
        raise
    return True


def _remove_made(directory_fd: int, path: str) -> None:
    above, _, name = path.rpartition("/")
    with contextlib.suppress(OSError):
        parent = open_beneath(directory_fd, above or ".", _DIRECTORY)
        try:
            os.rmdir(name, dir_fd=parent)
        finally:
            os.close(parent)


def _is_as_made(parent_fd: int, name: str, maker: int) -> bool:
    try:
        descriptor = open_beneath(parent_fd, name, _DIRECTORY)
    except OSError:
        return False
    try:
        status = os.fstat(descriptor)
        return (status.st_uid, stat.S_IMODE(status.st_mode) & 0o777) == (maker, 0o700) and not os.listdir(descriptor)
    finally:
        os.close(descriptor)
