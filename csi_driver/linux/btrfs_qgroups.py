"""btrfs quota groups: what each subvolume refers to, and how much it may (ioctl_btrfs of <linux/btrfs.h>, btrfs-quota(5)).

Every subvolume has a group of its own, 0/<its id>, where an admin has switched quotas on: that costs time at every commit and at every
deletion of a snapshot, so it is not done for him. The limit is on what the subvolume refers to, shared with snapshots or not.

Numbers are those of the last commit of the filesystem (every 30 s by itself); limits hold at once. They are wrong while the kernel
says `inconsistent`, until a rescan. Simple quotas (Linux 6.7) count an extent for whoever wrote it first, so a clone would be free.
"""

import errno
import struct
from dataclasses import dataclass

from csi_driver.linux.btrfs import call, request_number

_QUOTA_TREE = 8
_STATUS, _INFO, _LIMIT = 240, 242, 244  # key types of the quota tree
_ON, _RESCAN, _INCONSISTENT, _SIMPLE = 1, 2, 4, 8  # BTRFS_QGROUP_STATUS_FLAG_…
_MAX_REFERRED = 1  # BTRFS_QGROUP_LIMIT_MAX_RFER
_NO_LIMIT = 2**64 - 1

_SEARCH_KEY = struct.Struct("=7Q4I4Q")
_SEARCH = struct.Struct(f"={_SEARCH_KEY.size}s{4096 - _SEARCH_KEY.size}s")
_HEADER = struct.Struct("=QQQII")
_QGROUP_LIMIT = struct.Struct("=QQQQQQ")

_READ, _WRITE = 2, 1
_TREE_SEARCH = request_number(_READ | _WRITE, 17, _SEARCH.size)
_SET_LIMIT = request_number(_READ, 43, _QGROUP_LIMIT.size)

OFF = frozenset({errno.ENOTCONN, errno.EINVAL, errno.ENOENT})
"""What setting a limit answers where quotas are off, or the group is gone."""


@dataclass(frozen=True)
class QgroupState:
    """How quotas are switched on; `trustworthy` False while the numbers are being counted anew or must be."""

    trustworthy: bool
    simple: bool


@dataclass(frozen=True)
class Qgroup:
    """What a subvolume refers to and may, in bytes; a limit of 0 is none."""

    used_bytes: int
    limit_bytes: int


def quota_state(descriptor: int) -> QgroupState | None:
    """Return how quotas are switched on on the descriptor's filesystem; None where they are not. Raises OSError (ENOTTY, EPERM)."""
    found = _search(descriptor, _STATUS, 0)
    if found is None:
        return None
    flags = struct.unpack_from("=QQQ", found)[2]
    if not flags & _ON:
        return None
    return QgroupState(trustworthy=not flags & (_RESCAN | _INCONSISTENT), simple=bool(flags & _SIMPLE))


def read_qgroup(descriptor: int, subvolume_id: int) -> Qgroup | None:
    """Return what a subvolume has and may have, as of the last commit; None where it has no group. Raises OSError."""
    info, limit = _search(descriptor, _INFO, subvolume_id), _search(descriptor, _LIMIT, subvolume_id)
    if info is None:
        return None
    flags, most = struct.unpack_from("=QQ", limit) if limit is not None else (0, 0)
    bounded = flags & _MAX_REFERRED and most != _NO_LIMIT
    return Qgroup(used_bytes=struct.unpack_from("=QQ", info)[1], limit_bytes=most if bounded else 0)


def set_limit(descriptor: int, subvolume_id: int, limit_bytes: int) -> None:
    """Allow a subvolume to refer to `limit_bytes`; what it has beyond stays. Raises OSError: ENOTCONN or EINVAL where quotas are off."""
    call(descriptor, _SET_LIMIT, _QGROUP_LIMIT.pack(subvolume_id, _MAX_REFERRED, limit_bytes, 0, 0, 0))


def _search(descriptor: int, kind: int, offset: int) -> bytes | None:
    """Find the one item of the quota tree that has this key; None where there is none, or no quota tree."""
    key = _SEARCH_KEY.pack(_QUOTA_TREE, 0, 0, offset, offset, 0, 2**64 - 1, kind, kind, 1, 0, 0, 0, 0, 0)
    try:
        answer = call(descriptor, _TREE_SEARCH, _SEARCH.pack(key, b""))
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    if _SEARCH_KEY.unpack_from(answer)[9] == 0:
        return None
    length = _HEADER.unpack_from(answer, _SEARCH_KEY.size)[4]
    start = _SEARCH_KEY.size + _HEADER.size
    return bytes(answer[start : start + length])
