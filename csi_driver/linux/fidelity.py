"""What belongs to one inode beside its content: owner, mode, ACLs, extended attributes, flags, times.

Carried in an order that matters: owner first (chown clears setuid, setgid and capabilities), then mode, then ACLs and
attributes, then times, and last the flags that would forbid all of that. What the target cannot take is counted by kind, not hidden
and not fatal. Never carried: birth and change time (the kernel's own), the project id and its inheritance (they belong to the
volume's quota), encryption, verity and casefold (they belong to the filesystem), and immutable or append-only on the top
directory (it must still be moved into place).
"""

import errno
import os
import stat
from collections import Counter
from dataclasses import dataclass, field

from csi_driver.linux import inode_flags

_ACL_NAMES = frozenset({"system.posix_acl_access", "system.posix_acl_default"})
_NFS4_ACL = "system.nfs4_acl"
# XFS lists its own storage of ACLs once more; NFS lists the parts of its ACL once more.
_ALIASES = frozenset({"trusted.SGI_ACL_FILE", "trusted.SGI_ACL_DEFAULT", "system.nfs4_dacl", "system.nfs4_sacl"})

_REFUSED = frozenset({errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.E2BIG, errno.ERANGE})
_FLAGS_BEFORE_CONTENT = inode_flags.NOCOW
_FLAGS_AFTER_ALL = inode_flags.SYNC | inode_flags.NODUMP | inode_flags.NOATIME | inode_flags.DIRSYNC | inode_flags.HOLDING
CARRIED_FLAGS = _FLAGS_BEFORE_CONTENT | _FLAGS_AFTER_ALL


Birth = tuple[int, int, int]
"""The mode, owner and group that a new file was to get."""


@dataclass(slots=True)
class Births:
    """What was seen of new files in one directory of the copy: the next one of the same kind is not asked again.

    What a new file gets (set-group-ID directories, default ACLs, squashed owners) follows from its directory and from what it is made
    as. For several threads: whoever comes too early asks once more.
    """

    right: set[Birth] = field(default_factory=set)
    """Which come out with the owner and mode that they shall have."""
    acls: dict[Birth, bytes] = field(default_factory=dict)
    """The NFSv4 ACL that they have then."""


class InodeFidelity:
    """Carries metadata from inode to inode in one copy, and counts what could not be carried (`not_carried`, by kind).

    An inode is given as a descriptor or, where it cannot be opened for reading or writing, as its magic link.
    """

    def __init__(self, not_carried: Counter[str]) -> None:
        """Count into `not_carried`."""
        self._not_carried = not_carried
        self._source_has_attributes = True
        self._source_has_flags = True

    def prepare_top(self, target: int) -> None:
        """Take inherited ACLs off the top of the copy, or all that is made in it would inherit them, too."""
        for name in _ACL_NAMES:
            try:
                os.removexattr(target, name)
            except OSError as error:
                if error.errno not in {errno.ENODATA, errno.EOPNOTSUPP}:
                    raise

    def read_flags(self, source: int) -> int:
        """Return those flags of a file or directory that are carried; 0 where the filesystem has none."""
        if not self._source_has_flags:
            return 0
        try:
            return inode_flags.read_flags(source) & CARRIED_FLAGS
        except OSError as error:
            if error.errno not in inode_flags.NO_FLAGS_HERE:
                raise
            self._source_has_flags = False
            return 0

    def set_flags(self, target: int, flags: int, *, before_content: bool) -> None:
        """Add the flags that are due before the content (no copy-on-write works on empty files only), or after all else."""
        due = flags & (_FLAGS_BEFORE_CONTENT if before_content else _FLAGS_AFTER_ALL)
        if not due:
            return
        try:
            inode_flags.write_flags(target, inode_flags.read_flags(target) | due)
        except OSError as error:
            self._refused(error, "inode flags", inode_flags.NO_FLAGS_HERE | _REFUSED)

    def carry(self, source: int | bytes, target: int | bytes, status: os.stat_result) -> None:
        """Give the target the owner, mode, ACLs, attributes and times of the source; `status` is the source's, read before."""
        self._carry_owner_and_mode(target, status, os.stat(target))  # noqa: PTH116 - a descriptor or its link, no path
        self._carry_attributes(source, target, {}, (0, 0, 0))
        self._carry_times(target, status)

    def carry_remembered(self, target: int, status: os.stat_result) -> None:
        """Give the copy of a directory that is gone its owner and times, and of its mode what is the owner's.

        With an ACL the rest would mean something else (acl(5)), and nobody can say any more whether there was one.
        """
        owners = os.stat_result((status.st_mode & ~0o7077, *status[1:]))
        self._carry_owner_and_mode(target, owners, os.fstat(target))
        self._carry_times(target, status)

    def carry_to_new_file(
        self, source: int, target: int, status: os.stat_result, made: os.stat_result | None, births: Births
    ) -> None:
        """Do the same for a regular file that was just made with the source's mode: as `made` says, or nobody has looked."""
        birth = status.st_mode, status.st_uid, status.st_gid
        if birth not in births.right and self._carry_owner_and_mode(target, status, made or os.fstat(target)):
            births.right.add(birth)
        self._carry_attributes(source, target, births.acls, birth)
        self._carry_times(target, status)

    def _carry_owner_and_mode(self, target: int | bytes, status: os.stat_result, made: os.stat_result) -> bool:
        """Return whether they were right already."""
        # To look first costs less than a change: a local change is a transaction, and over NFS a round trip where the look is none.
        owner_is_right = (made.st_uid, made.st_gid) == (status.st_uid, status.st_gid)
        if not owner_is_right:
            try:
                os.chown(target, status.st_uid, status.st_gid)
            except OSError as error:
                self._refused(error, "owner")
        # chown may have cleared setuid and setgid; nothing else in the mode.
        mode_is_right = made.st_mode == status.st_mode and not status.st_mode & (stat.S_ISUID | stat.S_ISGID)
        if not mode_is_right:
            try:
                os.chmod(target, stat.S_IMODE(status.st_mode))  # noqa: PTH101 - a descriptor or its link, no path
            except OSError as error:
                self._refused(error, "mode")
        return owner_is_right and mode_is_right

    def _carry_times(self, target: int | bytes, status: os.stat_result) -> None:
        try:
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        except OSError as error:
            self._refused(error, "times")

    def _carry_attributes(self, source: int | bytes, target: int | bytes, acls: dict[Birth, bytes], birth: Birth) -> None:
        if not self._source_has_attributes:
            return
        try:
            names = os.listxattr(source)
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.ENOSYS}:
                raise
            self._source_has_attributes = False
            return
        for name in names:
            if name not in _ALIASES:
                self._carry_attribute(source, target, name, acls, birth)

    def _carry_attribute(
        self, source: int | bytes, target: int | bytes, name: str, acls: dict[Birth, bytes], birth: Birth
    ) -> None:
        try:
            value = os.getxattr(source, name)
        except OSError as error:
            if error.errno != errno.ENODATA:  # removed since it was listed
                self._refused(error, _kind(name))
            return
        try:
            # An NFSv4 ACL is there for every file, mostly saying what the mode says already: reading is cheaper than writing.
            if name == _NFS4_ACL and (birth not in acls or acls[birth] != value):
                acls[birth] = os.getxattr(target, name)
            if name != _NFS4_ACL or acls[birth] != value:
                os.setxattr(target, name, value)
        except OSError as error:
            # ext4 answers ENOSPC to what does not fit its one attribute block, however empty the disk is.
            ill_named = error.errno == errno.ENOSPC and _has_room(target)
            self._refused(error, _kind(name), _REFUSED | {errno.ENOSPC} if ill_named else _REFUSED)

    def _refused(self, error: OSError, kind: str, refusals: frozenset[int] = _REFUSED) -> None:
        if error.errno not in refusals:
            raise error
        self._not_carried[kind] += 1


def _kind(attribute: str) -> str:
    return "acl" if attribute in _ACL_NAMES or attribute == _NFS4_ACL else f"xattr {attribute.partition('.')[0]}"


def _has_room(target: int | bytes) -> bool:
    room = os.statvfs(target)
    return room.f_bavail > 0 and (room.f_favail > 0 or room.f_files == 0)
