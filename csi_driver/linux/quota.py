"""Project quota: what a filesystem counts and allows for each project id (quotactl(2); XFS, ext4, f2fs).

The generic calls are enough for all of them, because the kernel translates (fs/quota/quota.c): limits in KiB, usage in bytes. The
filesystem is named by a descriptor (quotactl_fd(2), Linux 5.14); before that, by its block device, which must be seen in /dev/block.

Whether limits bind is another question than whether they can be set: `enforced` asks the kernel (Q_XGETQSTATV, which ext4 answers, too).
"""

import ctypes
import errno
import os
import struct
import sys
from dataclasses import dataclass

_PROJECT = 2  # PRJQUOTA
_GET_QUOTA = 0x800007
_SET_QUOTA = 0x800008
_GET_STATE = ord("X") << 8 | 8  # Q_XGETQSTATV
_QUOTACTL_FD = 443  # the same number on every architecture
_BLOCK = 1024  # QIF_DQBLKSIZE
_LIMITS = 1 | 4  # QIF_BLIMITS | QIF_ILIMITS
_DQBLK = struct.Struct("=QQQQQQQQI4x")
_STATE = struct.Struct("=bxH")
_STATE_BYTES = 256  # struct fs_quota_statv has 168
_STATE_VERSION = 1
_ENFORCED = 1 << 4 | 1 << 5  # FS_QUOTA_PDQ_ACCT, FS_QUOTA_PDQ_ENFD

NO_QUOTA_HERE = frozenset(
    {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ESRCH, errno.ENODEV, errno.ENOTBLK, errno.ENOENT}
)
"""What the calls answer where a filesystem has no project quota, or has it switched off (ESRCH)."""

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint32, ctypes.c_void_p]
_syscall.restype = ctypes.c_long
_quotactl = _libc.quotactl
_quotactl.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_void_p]
_quotactl.restype = ctypes.c_int


@dataclass(frozen=True)
class ProjectQuota:
    """What one project has and may have; a limit of 0 is none."""

    used_bytes: int = 0
    used_inodes: int = 0
    limit_bytes: int = 0
    limit_inodes: int = 0

    @property
    def unused(self) -> bool:
        return self == ProjectQuota()


def enforced(descriptor: int) -> bool:
    """Tell whether the filesystem counts projects and holds them to their limits. Raises OSError, `NO_QUOTA_HERE` where it cannot."""
    buffer = bytearray(_STATE_BYTES)
    buffer[0] = _STATE_VERSION
    _call(descriptor, _GET_STATE, 0, buffer)
    _, flags = _STATE.unpack_from(buffer)
    return int(flags) & _ENFORCED == _ENFORCED


def read_quota(descriptor: int, project: int) -> ProjectQuota:
    """Return what a project has and may have on the descriptor's filesystem. Raises OSError (`NO_QUOTA_HERE`)."""
    buffer = bytearray(_DQBLK.size)
    try:
        _call(descriptor, _GET_QUOTA, project, buffer)
    except OSError as error:
        if error.errno == errno.ENOENT:  # XFS has never heard of this project
            return ProjectQuota()
        raise
    hard, _, space, inode_hard, _, inodes, _, _, _ = _DQBLK.unpack(buffer)
    return ProjectQuota(space, inodes, hard * _BLOCK, inode_hard)


def set_limits(descriptor: int, project: int, limit_bytes: int, limit_inodes: int) -> None:
    """Allow a project `limit_bytes`, to the KiB above, and `limit_inodes`; 0 is no limit. Raises OSError (EPERM without CAP_SYS_ADMIN).

    There is no soft limit: a time of grace would let a volume grow beyond its size.
    """
    sys.audit("quota.set_limits", project, limit_bytes, limit_inodes)  # as Python does for the calls that it knows
    blocks = -(-limit_bytes // _BLOCK)
    _call(descriptor, _SET_QUOTA, project, bytearray(_DQBLK.pack(blocks, 0, 0, limit_inodes, 0, 0, 0, 0, _LIMITS)))


def _call(descriptor: int, command: int, project: int, buffer: bytearray) -> None:
    code = command << 8 | _PROJECT
    address = ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer))
    if _syscall(_QUOTACTL_FD, descriptor, code, project, address) == 0:
        return
    if ctypes.get_errno() == errno.ENOSYS:
        device = os.fstat(descriptor).st_dev
        special = f"/dev/block/{os.major(device)}:{os.minor(device)}".encode()
        if _quotactl(ctypes.c_int(code).value, special, ctypes.c_int(project).value, address) == 0:
            return
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
