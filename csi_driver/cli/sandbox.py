"""A mount namespace of one's own, so that nothing mounted in a trial is ever seen, or left, outside of it.

The kernel dissolves the namespace with its last process, whatever ended that. Who may not mount gets a user namespace around it,
in which this one user is root (user_namespaces(7)). Python has `os.unshare` from 3.12 on only.
"""

import ctypes
import errno
import os
import signal
from pathlib import Path

_CLONE_NEWNS = 0x00020000  # <linux/sched.h>
_CLONE_NEWUSER = 0x10000000
_MS_REC = 0x4000  # <linux/mount.h>
_MS_PRIVATE = 0x40000
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>

_libc = ctypes.CDLL(None, use_errno=True)


class NoNamespace(Exception):
    """This user cannot get a mount namespace here; the text says what to do."""


def enter_private_mounts() -> bool:
    """Move this process into mounts of its own; returns whether it needed a user namespace for that.

    To be called while the process has one thread (unshare(2)). Raises NoNamespace.
    """
    with_user = os.geteuid() != 0
    try:
        _unshare(_CLONE_NEWNS | (_CLONE_NEWUSER if with_user else 0))
    except OSError as refused:
        if with_user:
            raise NoNamespace(_advice(refused)) from refused
        try:  # root of a container that may not mount
            _unshare(_CLONE_NEWNS | _CLONE_NEWUSER)
        except OSError as error:
            raise NoNamespace(_advice(error)) from error
        with_user = True
    return with_user


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent's thread ends (prctl(2)). For the child, between fork and exec."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _unshare(flags: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    if _libc.unshare(flags) != 0:
        raise _os_error("unshare")
    if flags & _CLONE_NEWUSER:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    # Or mounts would propagate to where the namespace was copied from.
    if _libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None) != 0:
        raise _os_error("mount")


def _os_error(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")


def _advice(error: OSError) -> str:
    lines = [
        f"this user cannot get mounts of its own here ({error.strerror}), and `try` never mounts where others would see it.",
        "Any one of these helps:",
        "  * run it as root (sudo)",
        "  * in a container: give it CAP_SYS_ADMIN (docker run --privileged)",
    ]
    if error.errno == errno.ENOSPC:
        lines.append("  * let users make user namespaces: sysctl -w user.max_user_namespaces=10000")
    else:
        lines.append("  * let users make user namespaces; as root, whichever of these the kernel has:")
        lines.append("      sysctl -w kernel.apparmor_restrict_unprivileged_userns=0    (Ubuntu 24.04 and later)")
        lines.append("      sysctl -w kernel.unprivileged_userns_clone=1                (older Debian)")
    return "\n".join(lines)
