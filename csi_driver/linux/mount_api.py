"""The kernel's mount calls, which Python does not have: open_tree, mount_setattr, move_mount, umount2.

Thin on purpose: names and constants are those of <linux/mount.h> and <linux/fcntl.h>, and errors are OSError with the call's name.
What they are used for is told in `mounts`.

The numbers are the same on every architecture that Linux gained since 5.2 unified them, x86_64 and aarch64 among them (alpha and
MIPS add an offset). ctypes lets go of the interpreter's lock during a call.

Run as a program (`python mount_api.py PATH FLAGS`) it is an umount2 that can be killed: see `mounts.unmount`. So it imports nothing
of the driver.
"""

import ctypes
import errno
import functools
import os
import sys

_SYS_OPEN_TREE = 428  # Linux 5.2
_SYS_MOVE_MOUNT = 429  # Linux 5.2
_SYS_MOUNT_SETATTR = 442  # Linux 5.12

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000

OPEN_TREE_CLONE = 0x1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC

MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40

MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR__ATIME = 0x70  # the field that holds one of the next three
MOUNT_ATTR_RELATIME = 0x0
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_NOSYMFOLLOW = 0x200000  # Linux 5.14

MS_PRIVATE = 1 << 18

MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _MountAttr(ctypes.Structure):
    """`struct mount_attr` of mount_setattr(2), version 0: 32 bytes."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def open_tree(dir_fd: int, path: str, flags: int) -> int:
    """Open a mount, or with OPEN_TREE_CLONE a detached copy of it. Returns a descriptor; closing it dissolves a copy not yet moved."""
    return _call("open_tree", _SYS_OPEN_TREE, dir_fd, os.fsencode(path), flags)


def mount_setattr(dir_fd: int, path: str, flags: int, *, attr_set: int = 0, attr_clr: int = 0, propagation: int = 0) -> None:
    """Clear, then set MOUNT_ATTR_* bits of a mount and change its propagation (MS_PRIVATE ..., 0 keeps it), all or nothing."""
    attributes = _MountAttr(attr_set, attr_clr, propagation, 0)
    size = ctypes.sizeof(attributes)
    _call("mount_setattr", _SYS_MOUNT_SETATTR, dir_fd, os.fsencode(path), flags, ctypes.byref(attributes), size)


def move_mount(from_fd: int, from_path: str, to_fd: int, to_path: str, flags: int) -> None:
    """Attach a detached mount, or move an attached one. Without MOVE_MOUNT_[FT]_SYMLINKS no symbolic link at the end is followed."""
    _call("move_mount", _SYS_MOVE_MOUNT, from_fd, os.fsencode(from_path), to_fd, os.fsencode(to_path), flags)


def umount2(path: str, flags: int) -> None:
    """Unmount the topmost mount at `path`."""
    if _libc.umount2(os.fsencode(path), ctypes.c_int(flags)) != 0:
        raise _os_error("umount2", path)


@functools.cache
def supported() -> bool:
    """Tell whether the kernel has all three calls and lets this process use them (no seccomp filter, CAP_SYS_ADMIN). Asked once."""
    # Flags that no kernel knows: EINVAL proves that the call exists and is allowed, and that nothing was done.
    unknown = 0x7FFF_FFFF
    probes = (
        functools.partial(open_tree, AT_FDCWD, "/", unknown),
        functools.partial(mount_setattr, AT_FDCWD, "/", unknown),
        functools.partial(move_mount, AT_FDCWD, "/", AT_FDCWD, "/", unknown),
    )
    return all(_errno_of(probe) == errno.EINVAL for probe in probes)


def _errno_of(probe: "functools.partial[int] | functools.partial[None]") -> int:
    try:
        probe()
    except OSError as error:
        return error.errno or 0
    return 0


def _call(name: str, number: int, *arguments: object) -> int:
    # syscall(2) is variadic: every integer is passed as a full register, or its upper half is whatever lay there.
    converted = [ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *converted))
    if result < 0:
        raise _os_error(name)
    return result


def _os_error(call: str, path: str | None = None) -> OSError:
    code = ctypes.get_errno()
    message = f"{call}: {os.strerror(code)}"
    return OSError(code, message) if path is None else OSError(code, message, path)


def _umount_and_print_errno(path: str, flags: str) -> None:
    try:
        umount2(path, int(flags))
    except OSError as error:
        print(error.errno)  # noqa: T201  # a program's answer
    else:
        print(0)  # noqa: T201


if __name__ == "__main__":
    _umount_and_print_errno(*sys.argv[1:])
