"""Limiters: the ways in which a filesystem can hold a volume to its size, and who passes each of them all the same.

A limit is set while a volume is in staging, before there is content in it, so that a copy counts. From then on the volume is known by
its *mark*, which its record keeps: what its top directory says, its tenant may change.
"""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from csi_driver.linux import btrfs, btrfs_qgroups, project_limits, projects, quota
from csi_driver.linux.filesystem_ids import filesystem_id
from csi_driver.linux.project_change import give_project
from csi_driver.volumes.model import LimiterKind
from csi_driver.volumes.pool_layout import new_token

HARD = "hard"
NONE = "none"
OWNERS = "owners of files who change their project id, which nobody can in a user namespace"
PRIVILEGED = "processes with CAP_SYS_RESOURCE"
NFS_ROOT = "root of clients where the export has `no_root_squash`"
"""nfsd gives CAP_SYS_RESOURCE to what root does and takes it from everybody else (nfsd_setuser; CAP_NFSD_SET)."""
SUBVOLUMES = "processes that make btrfs subvolumes of their own in it"

_NOT_BTRFS = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
SWITCHED_OFF = quota.NO_QUOTA_HERE | btrfs_qgroups.OFF
"""What setting a limit answers where quotas have been switched off since."""


Stop = Callable[[], bool]
"""Tells whether to stop."""


class Limiter(Protocol):
    """One way to hold volumes. `top` is a descriptor of a volume's top directory, sizes are bytes, inodes 0 is any number."""

    kind: LimiterKind
    counts_inodes: bool

    def hold(self, top: int, size_bytes: int, inodes: int) -> int | None:
        """Limit a volume that is in staging and return its mark; None where this one cannot be held. Raises OSError."""

    def has(self, top: int, mark: int, filesystem: str | None, inode: int | None) -> bool:
        """Tell whether what lies there is what was given `mark`: the volume may have been moved to another filesystem, file by file.

        There the same number is somebody else's, or will be. `filesystem` and `inode` are those of the time when it was given (None:
        unknown). Raises OSError.
        """

    def hold_again(self, parent: int, top: int, size_bytes: int, inodes: int, stop: Stop) -> int | None:
        """Limit a volume that came from elsewhere with all that is in it, and return its new mark; None where it cannot be held.

        `parent` takes an empty directory for a moment. Raises WalkStopped, OSError.
        """

    def change(self, top: int, mark: int, size_bytes: int, inodes: int) -> None:
        """Set another limit. Raises OSError, `SWITCHED_OFF`."""

    def usage(self, top: int, mark: int) -> tuple[int, int | None] | None:
        """Return the bytes and, where they are counted, the inodes of a volume; None where the count is wrong. Raises OSError."""

    def limited_to(self, top: int, mark: int) -> int | None:
        """Return the bytes that a volume is held to now; None where its quota is off, or its limit lost. Raises OSError."""

    def release(self, root: int, mark: int) -> None:
        """Let go of the mark of a volume that is about to be removed; `root` is the pool's. Raises OSError."""


class ProjectLimiter:
    """Project quota of XFS and ext4."""

    kind = LimiterKind.PROJECT_QUOTA
    counts_inodes = True

    def hold(self, top: int, size_bytes: int, inodes: int) -> int | None:
        project = project_limits.claim(top)
        quota.set_limits(top, project, size_bytes, inodes)
        return project

    def has(self, top: int, mark: int, filesystem: str | None, inode: int | None) -> bool:
        here = filesystem_id(top)
        if filesystem is not None and here is not None and here != filesystem:
            return False  # also with that mark: some restore tools bring it along
        # A tenant may give his directory another project; on its own filesystem, in its own inode, it is the same volume all the same.
        return _project_of(top) == mark or (here is not None and here == filesystem and os.fstat(top).st_ino == inode)

    def hold_again(self, parent: int, top: int, size_bytes: int, inodes: int, stop: Stop) -> int | None:
        project = project_limits.claim_for(parent, f"claim.{new_token()}", top)
        give_project(top, project, stop)
        # Last: until then a crash leaves no limit that nobody would lift, and ext4 would refuse what is too much already.
        quota.set_limits(top, project, size_bytes, inodes)
        return project

    def change(self, top: int, mark: int, size_bytes: int, inodes: int) -> None:
        quota.set_limits(top, mark, size_bytes, inodes)

    def usage(self, top: int, mark: int) -> tuple[int, int | None] | None:
        if not quota.enforced(top):
            return None
        found = quota.read_quota(top, mark)
        return found.used_bytes, found.used_inodes

    def limited_to(self, top: int, mark: int) -> int | None:
        return quota.read_quota(top, mark).limit_bytes or None if quota.enforced(top) else None

    def release(self, root: int, mark: int) -> None:
        quota.set_limits(root, mark, 0, 0)


class QgroupLimiter:
    """The quota group that every btrfs subvolume has. It goes with its subvolume (by itself from Linux 6.11 on)."""

    kind = LimiterKind.QGROUP
    counts_inodes = False

    def hold(self, top: int, size_bytes: int, _inodes: int) -> int | None:
        subvolume = btrfs.subvolume_id(top)
        if subvolume is None:
            return None
        btrfs_qgroups.set_limit(top, subvolume, size_bytes)
        return subvolume

    def has(self, top: int, mark: int, _filesystem: str | None, _inode: int | None) -> bool:
        return btrfs.subvolume_id(top) == mark  # which nobody can change

    def hold_again(self, _parent: int, top: int, size_bytes: int, inodes: int, _stop: Stop) -> int | None:
        return self.hold(top, size_bytes, inodes)

    def change(self, top: int, mark: int, size_bytes: int, _inodes: int) -> None:
        btrfs_qgroups.set_limit(top, mark, size_bytes)

    def usage(self, top: int, mark: int) -> tuple[int, int | None] | None:
        state, found = btrfs_qgroups.quota_state(top), btrfs_qgroups.read_qgroup(top, mark)
        return (found.used_bytes, None) if state is not None and state.trustworthy and found is not None else None

    def limited_to(self, top: int, mark: int) -> int | None:
        state, found = btrfs_qgroups.quota_state(top), btrfs_qgroups.read_qgroup(top, mark)
        return found.limit_bytes or None if state is not None and not state.simple and found is not None else None

    def release(self, root: int, mark: int) -> None:
        """Do nothing."""


def _project_of(top: int) -> int | None:
    try:
        return projects.project_of(top).id
    except OSError as error:
        if error.errno not in projects.NO_PROJECTS_HERE:
            raise
        return None


PROJECT_LIMITER, QGROUP_LIMITER = ProjectLimiter(), QgroupLimiter()
LIMITERS: dict[LimiterKind, Limiter] = {limiter.kind: limiter for limiter in (PROJECT_LIMITER, QGROUP_LIMITER)}


@dataclass(frozen=True)
class Means:
    """What a place has to hold volumes with: a limiter (None: nothing), and how well that does, or why there is none."""

    limiter: Limiter | None
    level: str


def switched_on(descriptor: int) -> Limiter | None:
    """Ask the kernel which limiter could be used at a place, without trying it out. Raises OSError."""
    qgroups = _qgroups(descriptor)
    if qgroups is not None:
        return qgroups.limiter
    return PROJECT_LIMITER if project_limits.is_on(descriptor) else None


def find_means(directory: int, *, over_nfs: bool = False) -> Means:
    """Find out by trying what can hold volumes that are made in `directory`.

    `over_nfs`: only NFS clients come to them, who can neither change project ids nor make subvolumes (there is no ioctl in NFS).
    Raises OSError where it cannot be found out now (ENOSPC, EROFS, EIO).
    """
    if (qgroups := _qgroups(directory)) is not None:
        return Means(qgroups.limiter, HARD) if qgroups.limiter is not None and over_nfs else qgroups
    finding = project_limits.probe(directory, f"probe.{new_token()}")
    if finding.problem is not None:
        return Means(None, f"{NONE}: {finding.problem}")
    if over_nfs:
        return Means(PROJECT_LIMITER, HARD if finding.binds_privileged else f"{HARD} but for {NFS_ROOT}")
    passers = OWNERS if finding.binds_privileged else f"{PRIVILEGED}, and {OWNERS}"
    return Means(PROJECT_LIMITER, f"{HARD} but for {passers}")


def _qgroups(descriptor: int) -> Means | None:
    """Say what a btrfs has; None for any other filesystem."""
    try:
        state = btrfs_qgroups.quota_state(descriptor)
    except PermissionError:
        return Means(None, f"{NONE}: the driver may not ask btrfs for its quotas (it needs CAP_SYS_ADMIN)")
    except OSError as error:
        if error.errno in _NOT_BTRFS:
            return None
        raise
    if state is None:
        return Means(None, f"{NONE}: its btrfs has quotas switched off (`btrfs quota enable`)")
    if state.simple:
        return Means(None, f"{NONE}: its btrfs has simple quotas, which do not count what a clone shares with its source")
    return Means(QGROUP_LIMITER, f"{HARD} but for {SUBVOLUMES}")
