"""Filesystem ids: which filesystem something lies on, by the UUID in its superblock.

A device number says nothing after a reboot, and a path nothing after a mount. Copied block by block, a filesystem keeps its UUID, and
with it all that is numbered within it (inodes, project ids, limits): it is the same one. Copied file by file, what is copied has
come to another.
"""

import errno
import fcntl
import struct

_UUID_BYTES = 16
_FSUUID2 = struct.Struct("=B16s")  # struct fsuuid2
_GET_UUID = 2 << 30 | _FSUUID2.size << 16 | 0x15 << 8  # FS_IOC_GETFSUUID, Linux 6.9
_EXT4_FSUUID = struct.Struct("=II16s")  # struct fsuuid, whose array is not part of the request's number
_EXT4_GET_UUID = 2 << 30 | 8 << 16 | ord("f") << 8 | 44  # EXT4_IOC_GETFSUUID, Linux 6.0
_XFS_GEOMETRY_BYTES, _XFS_UUID_AT = 112, 64  # struct xfs_fsop_geom_v1
_XFS_GEOMETRY = 2 << 30 | _XFS_GEOMETRY_BYTES << 16 | ord("X") << 8 | 100

_NOT_HERE = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODATA, errno.EPERM, errno.EACCES})


def filesystem_id(descriptor: int) -> str | None:
    """Return the UUID of the filesystem that a file or directory lies on; None where the kernel does not tell. Raises OSError (EIO)."""
    for request, argument, start in (
        (_GET_UUID, bytes(_FSUUID2.size), 1),
        (_XFS_GEOMETRY, bytes(_XFS_GEOMETRY_BYTES), _XFS_UUID_AT),
        (_EXT4_GET_UUID, _EXT4_FSUUID.pack(_UUID_BYTES, 0, b""), 8),
    ):
        try:
            answer = fcntl.ioctl(descriptor, request, argument)
        except OSError as error:
            if error.errno not in _NOT_HERE:
                raise
            continue
        uuid = answer[start : start + _UUID_BYTES]
        return uuid.hex() if any(uuid) else None
    return None
