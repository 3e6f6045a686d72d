"""A mount of our own of somebody's directory, that nobody else sees and nothing dangerous can be done through.

Below it no device can be opened, nothing can be written, and no access time changes, whatever the owner of the directory puts there
meanwhile. So a file may be opened at once by its name: what it was is told by the descriptor, and had it been swapped for a device,
the kernel would have refused. What is mounted below the directory is there as it was, and refused as everywhere (`beneath`).
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from csi_driver.linux import beneath
from csi_driver.linux import mount_api as api

_HARMLESS = api.MOUNT_ATTR_RDONLY | api.MOUNT_ATTR_NODEV | api.MOUNT_ATTR_NOEXEC | api.MOUNT_ATTR_NOSUID
_CLONES_ACROSS_MOUNTS = (5, 18)


@contextmanager
def private_view(directory_fd: int) -> Iterator[tuple[int, bool]]:
    """Open a directory for reading through a mount of its own, until the context ends; say whether that could be had.

    Where it could not (no CAP_SYS_ADMIN, an older kernel), it is opened as it is, and may be called harmless only if its own mount
    has nodev. Raises OSError when it cannot be opened at all.
    """
    with ExitStack() as held:
        view = None if beneath.starts_no_device(directory_fd) else _detached(directory_fd)
        if view is not None:
            held.callback(os.close, view)
        opened = held.enter_context(beneath.opened_again(directory_fd if view is None else view))
        yield opened, beneath.starts_no_device(opened)


def _detached(directory_fd: int) -> int | None:
    # Before, the kernel shares no extents between two mounts of one filesystem (ioctl_ficlone(2), EXDEV).
    if _kernel() < _CLONES_ACROSS_MOUNTS:
        return None
    try:
        flags = api.AT_EMPTY_PATH | api.AT_RECURSIVE | api.OPEN_TREE_CLONE | api.OPEN_TREE_CLOEXEC
        view = api.open_tree(directory_fd, "", flags)
    except OSError:
        return None
    try:
        api.mount_setattr(
            view,
            "",
            api.AT_EMPTY_PATH,
            attr_set=_HARMLESS | api.MOUNT_ATTR_NOATIME,
            attr_clr=api.MOUNT_ATTR__ATIME,
            propagation=api.MS_PRIVATE,
        )
    except OSError:
        os.close(view)
        return None
    return view


def _kernel() -> tuple[int, int]:
    major, minor = os.uname().release.split(".")[:2]
    return int(major), int("".join(digit for digit in minor if digit.isdigit()) or 0)
