"""Mounts of one's own: whoever copies the machine's mount table (unshare -m) would keep our filesystems and loop devices busy."""

import ctypes
import functools
import os
import subprocess

_CLONE_NEWNS = 0x20000  # unshare(2)


@functools.cache
def have_own_mounts() -> None:
    """Give this process, and what it starts from here on, a mount namespace that nothing gets out of."""
    if os.geteuid() == 0:
        assert ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS) == 0, os.strerror(ctypes.get_errno())
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
