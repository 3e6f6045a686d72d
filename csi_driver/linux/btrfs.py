"""btrfs subvolumes: directories of which a snapshot takes milliseconds, whatever is in them.

By the kernel's own calls on descriptors (ioctl_btrfs of <linux/btrfs.h>), so no command is needed and nothing is found by a path that a
tenant could bend. What is no btrfs answers ENOTTY; `NOT_HERE` lists how a filesystem or a lack of rights says no.

Facts that the callers rely on: the top of every subvolume has inode number 256; a snapshot is one point in time, data that was
written before included (the kernel writes it out first); subvolumes that lie inside are *not* part of it, an empty directory is left in
their place; a read-only subvolume cannot be moved to another directory; its ids are never used again.
"""

import errno
import fcntl
import os
import struct

_MAGIC = 0x94
_NAME_BYTES = 4039  # struct btrfs_ioctl_vol_args_v2: s64 fd, u64 transid, u64 flags, u64 unused[4], char name[4040]
_V2 = struct.Struct(f"=qQQ32x{_NAME_BYTES + 1}s")
_V1 = struct.Struct("=q4088s")  # struct btrfs_ioctl_vol_args
_INO_LOOKUP = struct.Struct("=QQ4080s")
_ROOT_REFERENCES = struct.Struct("=Q4080xB7x")
_READ_ONLY = 1 << 1
_TOP_INODE = 256  # BTRFS_FIRST_FREE_OBJECTID

NOT_HERE = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EACCES, errno.EXDEV})
"""What a call answers where subvolumes cannot be had: another filesystem, a user namespace, a source on another disk."""


def request_number(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | _MAGIC << 8 | number


_READ, _WRITE = 2, 1
_SUBVOLUME_CREATE = request_number(_WRITE, 24, _V2.size)
_SNAPSHOT_CREATE = request_number(_WRITE, 23, _V2.size)
_SNAPSHOT_DESTROY = request_number(_WRITE, 15, _V1.size)
_FLAGS_GET = request_number(_READ, 25, 8)
_FLAGS_SET = request_number(_WRITE, 26, 8)
_LOOKUP = request_number(_READ | _WRITE, 18, _INO_LOOKUP.size)
_REFERENCES = request_number(_READ | _WRITE, 61, _ROOT_REFERENCES.size)


def create(parent_fd: int, name: str) -> None:
    """Make an empty subvolume (mode as mkdir gives it). Raises OSError: `NOT_HERE`, FileExistsError, ENOSPC, EDQUOT."""
    call(parent_fd, _SUBVOLUME_CREATE, _V2.pack(0, 0, 0, _encoded(name)))


def snapshot(source_fd: int, parent_fd: int, name: str) -> None:
    """Make the writable subvolume `name` in `parent_fd` hold what the subvolume `source_fd` holds at this moment.

    Raises OSError: `NOT_HERE` (EINVAL: the source is no subvolume; EXDEV: another filesystem), FileExistsError, ENOSPC, EIO.
    """
    call(parent_fd, _SNAPSHOT_CREATE, _V2.pack(source_fd, 0, 0, _encoded(name)))


def destroy(parent_fd: int, name: str | bytes) -> None:
    """Remove a subvolume with all that is in it, at once; the kernel frees its space later.

    Raises OSError: ENOTEMPTY where other subvolumes lie in it, `NOT_HERE` where it is no subvolume, FileNotFoundError, ENOTDIR.
    """
    call(parent_fd, _SNAPSHOT_DESTROY, _V1.pack(0, _encoded(name)))


def is_subvolume(descriptor: int) -> bool:
    """Tell whether the descriptor is the top of a subvolume. Raises OSError (EIO)."""
    return _flags(descriptor) is not None


def subvolume_id(descriptor: int) -> int | None:
    """Return the number that this subvolume has and no other ever gets; None for what is no subvolume."""
    if _flags(descriptor) is None:
        return None
    return int(_INO_LOOKUP.unpack(call(descriptor, _LOOKUP, _INO_LOOKUP.pack(0, _TOP_INODE, b"")))[0])


def identity_of(descriptor: int) -> int:
    """Return what tells a directory from others: its inode's number; of a subvolume, where that is always 256, minus its id."""
    subvolume = subvolume_id(descriptor)
    return os.fstat(descriptor).st_ino if subvolume is None else -subvolume


def holds_subvolumes(descriptor: int) -> bool:
    """Tell whether other subvolumes lie in this one, at any depth. Raises OSError (ENOTTY before Linux 4.18)."""
    try:
        found = call(descriptor, _REFERENCES, bytes(_ROOT_REFERENCES.size))
    except OSError as error:
        if error.errno == errno.EOVERFLOW:  # more of them than one answer holds
            return True
        raise
    return int(_ROOT_REFERENCES.unpack(found)[1]) > 0


def set_read_only(descriptor: int, *, read_only: bool) -> None:
    """Make a subvolume read-only or writable; what is no subvolume is left alone. Raises OSError (EPERM)."""
    flags = _flags(descriptor)
    if flags is not None and bool(flags & _READ_ONLY) != read_only:
        call(descriptor, _FLAGS_SET, struct.pack("=Q", flags ^ _READ_ONLY))


def _flags(descriptor: int) -> int | None:
    if os.fstat(descriptor).st_ino != _TOP_INODE:
        return None
    try:
        return int(struct.unpack("=Q", call(descriptor, _FLAGS_GET, bytes(8)))[0])
    except OSError as error:
        if error.errno in NOT_HERE:
            return None
        raise


def call(descriptor: int, request: int, argument: bytes) -> bytearray:
    buffer = bytearray(argument)  # Python passes more than 1,024 bytes only if they can be written to
    fcntl.ioctl(descriptor, request, buffer)
    return buffer


def _encoded(name: str | bytes) -> bytes:
    raw = os.fsencode(name)
    if not raw or len(raw) > _NAME_BYTES or b"/" in raw or b"\0" in raw or raw in {b".", b".."}:
        raise OSError(errno.EINVAL, "not the name of one entry", name)
    return raw
