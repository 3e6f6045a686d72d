"""What it means that a handle has gone stale (ESTALE): on NFS each descriptor stands for a handle that the server gave out once.

It is stale because another client removed what it stood for. Or because the server does not know it any more: an export was taken back,
for a moment perhaps, and then all that was there still is. The first is an entry less, the second must end whatever reads a tree, or
it would go on with a part and call it the whole. Only the way down from the top tells which it was: each directory on it must be
good, and the name lead to nothing, or to something else.

The client answers from memory where it can, and what it remembers is what was removed. So the server is asked for each directory first;
one that has changed since makes the client forget what it knew of the names in it.
"""

import errno
import os
from collections.abc import Sequence

from csi_driver.linux import beneath
from csi_driver.linux.system_calls import file_handle, require_current

_TRIES = 3
_ELSEWHERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV})


def is_stale(descriptor: int) -> bool:
    """Ask the server, past what the client remembers, whether a descriptor's handle is dead. Raises OSError (EIO)."""
    try:
        require_current(descriptor)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return True
    return False


def is_gone(top_fd: int, way: Sequence[bytes], handle: bytes | None) -> bool:
    """Tell whether a directory, whose own descriptor is stale, was removed: `way` leads to it from the top, by names.

    `handle` is what `file_handle` said of it while it was good; without it, whatever is found under its name is taken for it.
    Raises OSError, ESTALE where the top, or what leads there, is stale itself: then nothing can be told.
    """
    for left in reversed(range(_TRIES)):
        try:
            return _is_gone(top_fd, way, handle)
        except OSError as error:
            # One on the way may be removed right after it was looked up.
            if error.errno != errno.ESTALE or not left:
                raise
    raise AssertionError("unreachable")


def _is_gone(top_fd: int, way: Sequence[bytes], handle: bytes | None) -> bool:
    found = os.dup(top_fd)
    try:
        require_current(found)
        for name in way:
            try:
                below = beneath.pin(found, name)
            except OSError as error:
                if error.errno in _ELSEWHERE:
                    return True
                raise
            os.close(found)
            found = below
            require_current(found)
        return handle is not None and file_handle(found) != handle
    finally:
        os.close(found)
