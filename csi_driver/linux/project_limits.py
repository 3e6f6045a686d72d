"""Directories held by project quota: each has a project id of its own, taken from a range that is high enough to be nobody else's.

An id is free while nothing has it and no limit is set for it. It is taken by giving it to an empty directory, and whoever then finds
that he is not alone with it takes another: so no lock is needed, and two pools on one filesystem, two controllers and other programs
get along; data that is being deleted, or was retained, keeps its id busy; and a crash at any moment leaves nothing but a directory.
For that, `drop` comes before a directory is removed, not after.
"""

import errno
import os
import secrets
from dataclasses import dataclass

from csi_driver.linux import quota
from csi_driver.linux.projects import NO_PROJECTS_HERE, Project, project_of, set_project

FIRST, LAST = 2**30, 2**31 - 1
"""The range: above what kubelet (from 1,048,577) and container runtimes count up to, below what some tools take for negative."""

_CAP_SYS_RESOURCE = 24
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_OFF = quota.NO_QUOTA_HERE | NO_PROJECTS_HERE | {errno.EPERM, errno.EACCES}


def draw_id() -> int:
    """Return an id to try, from the whole range: one that a tenant cannot tell from his own, for whoever owns a file may give it any id.

    Far apart they cost the quota file a block of 4 KiB each (XFS, ext4).
    """
    return FIRST + secrets.randbelow(LAST - FIRST + 1)


@dataclass(frozen=True)
class Finding:
    """What project quota is good for in one place: `problem` says why it holds nobody there, None where it does.

    `binds_privileged` is False where processes with CAP_SYS_RESOURCE pass (ext4), or where nobody could find that out.
    """

    problem: str | None
    binds_privileged: bool = False


def probe(parent: int, name: str) -> Finding:
    """Find out, by a limit on the new directory `name` in `parent`, whether project quota holds; nothing is left of it.

    Raises OSError (ENOSPC, EIO, EROFS): then nothing is known.
    """
    problem = _problem_of(parent)
    if problem is not None:
        return Finding(problem)
    os.mkdir(name, 0o700, dir_fd=parent)
    try:
        top = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            return _try_out(top)
        finally:
            drop(top)
            os.close(top)
    finally:
        os.rmdir(name, dir_fd=parent)


def is_on(descriptor: int) -> bool:
    """Tell, by a question to the kernel alone, whether a limit set here would hold."""
    return _problem_of(descriptor) is None


def claim(top: int) -> int:
    """Give an empty directory, and all that will be made in it, a project id that nobody has, and return it. Raises OSError."""
    while True:
        candidate = draw_id()
        if not quota.read_quota(top, candidate).unused:
            continue
        set_project(top, Project(candidate, inherit=True))
        found = quota.read_quota(top, candidate)
        if found.used_inodes == 1 and not found.limit_bytes and not found.limit_inodes:
            return candidate
        # Another took it between our two looks, and sees us as we see him.


def claim_for(parent: int, name: str, top: int) -> int:
    """Give a directory that is not empty a project id that nobody has, and return it: claimed by `name` in `parent`, which goes again.

    What is in the directory keeps what it has (project_change.py). Raises OSError.
    """
    os.mkdir(name, 0o700, dir_fd=parent)
    try:
        claimed = os.open(name, _DIRECTORY, dir_fd=parent)
        try:
            project = claim(claimed)
            set_project(top, Project(project, inherit=True))  # before the other one goes: an id in use is nobody else's
        finally:
            os.close(claimed)
    finally:
        os.rmdir(name, dir_fd=parent)
    return project


def drop(top: int) -> None:
    """Lift the limits of a directory that nobody else was ever shown, before it is removed. What has none of ours is left alone."""
    try:
        project = project_of(top)
        if project.inherit and FIRST <= project.id <= LAST:
            quota.set_limits(top, project.id, 0, 0)
    except OSError as error:
        if error.errno not in _OFF:
            raise


def lift_limit(parent: int, name: str) -> None:
    """Do as `drop` for the entry `name` of a directory, if it is there and a directory. Raises OSError (EIO)."""
    try:
        top = os.open(name, _DIRECTORY, dir_fd=parent)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}:
            return
        raise
    try:
        drop(top)
    finally:
        os.close(top)


def _problem_of(descriptor: int) -> str | None:
    try:
        if not quota.enforced(descriptor):
            return "its filesystem counts by project but holds nobody to it; mount it with `prjquota`"
        project = project_of(descriptor)
    except OSError as error:
        if error.errno not in _OFF:
            raise
        return "its filesystem has no project quota (XFS and ext4 have it when they are mounted with `prjquota`)"
    if project.inherit:
        return f"it lies in a directory of project {project.id}, which takes in no directory of another project"
    return None


def _try_out(top: int) -> Finding:
    try:
        project = claim(top)
        quota.set_limits(top, project, 0, 1)
    except OSError as error:
        if error.errno not in _OFF:
            raise
        return Finding(f"its project quota cannot be used ({error.strerror})")
    passed = _takes_a_file(top)
    if not passed:
        quota.set_limits(top, project, 0, 0)
        if not _takes_a_file(top):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the disk is full, so the limit was not what refused
    privileged = _may_exceed_resources()
    if passed and not privileged:
        return Finding("its project quota does not hold, although the kernel says that it does")
    return Finding(None, binds_privileged=privileged and not passed)


def _takes_a_file(top: int) -> bool:
    try:
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=top))
    except OSError as error:
        if error.errno not in {errno.EDQUOT, errno.ENOSPC}:
            raise
        return False
    os.unlink("file", dir_fd=top)
    return True


def _may_exceed_resources() -> bool:
    with open("/proc/self/status", encoding="ascii", errors="replace") as lines:  # noqa: PTH123 - as in system_calls.py
        effective = next((int(line.split()[1], 16) for line in lines if line.startswith("CapEff:")), 0)
    return bool(effective >> _CAP_SYS_RESOURCE & 1)
