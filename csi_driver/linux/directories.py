"""Making directories on the way to one, in a tree where somebody else may be at work."""

import contextlib
import errno
import os

from csi_driver.linux.beneath import open_beneath
from csi_driver.linux.files import sync_directory

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def make_directories(directory_fd: int, path: str, mode: int) -> list[str]:
    """Make the directory `path` and those above it as needed, below the directory, and return those made, topmost first.

    Those made get exactly `mode` (no umask) and are durable. Raises OSError: ELOOP or ENOTDIR where something else stands in the way,
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
            if _make_directory(parent, component, mode):
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


def _make_directory(parent_fd: int, name: str, mode: int) -> bool:
    try:
        os.mkdir(name, 0o700, dir_fd=parent_fd)
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
