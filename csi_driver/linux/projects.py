"""Project ids of files and directories (ioctl_xfs_fsgetxattr(2); XFS, ext4, f2fs), by which project quota counts.

A directory that hands its id on (PROJINHERIT) gives it to all that is made in it, and takes nothing in by rename or link that has
another one (EXDEV). The owner of a file may change its id, unless he lives in a user namespace of his own (EINVAL, fileattr_set of Linux).
"""

import errno
import fcntl
import struct
from dataclasses import dataclass

_FSXATTR = struct.Struct("=IIIII8x")  # struct fsxattr: xflags, extsize, nextents, projid, cowextsize
_GET = 2 << 30 | _FSXATTR.size << 16 | ord("X") << 8 | 31
_SET = 1 << 30 | _FSXATTR.size << 16 | ord("X") << 8 | 32
_INHERIT = 0x00000200  # FS_XFLAG_PROJINHERIT

NO_PROJECTS_HERE = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""What a filesystem answers whose files have no project ids."""


@dataclass(frozen=True)
class Project:
    """The project id of a file or directory, and whether what is made in it inherits the id."""

    id: int
    inherit: bool


def project_of(descriptor: int) -> Project:
    """Return a file's or directory's project. Raises OSError (`NO_PROJECTS_HERE`)."""
    flags, _, _, project, _ = _read(descriptor)
    return Project(project, bool(flags & _INHERIT))


def set_project(descriptor: int, project: Project) -> None:
    """Give a directory a project: it alone, nothing in it. Raises OSError: `NO_PROJECTS_HERE` (ext4 without the feature), EPERM, EDQUOT."""
    flags, extent_size, extents, _, cow_extent_size = _read(descriptor)
    flags = flags | _INHERIT if project.inherit else flags & ~_INHERIT
    fcntl.ioctl(descriptor, _SET, _FSXATTR.pack(flags, extent_size, extents, project.id, cow_extent_size))


def _read(descriptor: int) -> tuple[int, int, int, int, int]:
    flags, extent_size, extents, project, cow_extent_size = _FSXATTR.unpack(fcntl.ioctl(descriptor, _GET, bytes(_FSXATTR.size)))
    return flags, extent_size, extents, project, cow_extent_size
