"""Inode flags (chattr(1), ioctl_iflags(2)): what a tenant can set on files and directories beside their mode.

A root pod can make its files immutable or append-only; then nobody can remove, rename or link them until the flag is cleared.
"""

import errno
import fcntl
import struct

SYNC = 0x00000008
IMMUTABLE = 0x00000010
APPEND = 0x00000020
NODUMP = 0x00000040
NOATIME = 0x00000080
DIRSYNC = 0x00010000
NOCOW = 0x00800000

HOLDING = IMMUTABLE | APPEND

_GET = 0x80006601 | struct.calcsize("l") << 16
_SET = 0x40006602 | struct.calcsize("l") << 16

NO_FLAGS_HERE = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""What a filesystem answers that has no such flags (NFS, for one)."""


def read_flags(descriptor: int) -> int:
    """Return the flags of a regular file or directory; raises OSError, one of `NO_FLAGS_HERE` where there are none."""
    # The kernel writes an int, whatever the request number says of a long.
    return int(struct.unpack_from("=I", fcntl.ioctl(descriptor, _GET, bytes(8)))[0])


def write_flags(descriptor: int, flags: int) -> None:
    """Replace the flags; raises OSError: EPERM without CAP_LINUX_IMMUTABLE, `NO_FLAGS_HERE`."""
    fcntl.ioctl(descriptor, _SET, struct.pack("=II", flags, 0))


def clear_holding_flags(descriptor: int) -> bool:
    """Clear immutable and append-only, and return whether there was any. Raises OSError as `write_flags`."""
    try:
        flags = read_flags(descriptor)
    except OSError as error:
        if error.errno in NO_FLAGS_HERE:
            return False
        raise
    if not flags & HOLDING:
        return False
    write_flags(descriptor, flags & ~HOLDING)
    return True
