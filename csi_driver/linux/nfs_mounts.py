"""Mounting an NFS directory, in a child that can be killed, and knowing it again in mountinfo.

mount.nfs(8) is called directly: mount(8) would look into fstab and resolve the target, both for nothing. It negotiates versions,
talks to rpcbind and mountd for NFSv3, and makes its complaints in English (LC_ALL=C), which are told apart here: whether to come
back later or to change a pool is the one thing that the caller must know.

All mounts of one export on a node share a superblock, so device and root are the same for all its volumes; what tells them apart is
the source, which the kernel computes from where the mount's root lies (nfs_show_devname): `server:/path/directory`, for a bind too.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from csi_driver.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound, TatamiError, Unavailable
from csi_driver.linux import commands, mountinfo, mounts
from csi_driver.linux.nfs_options import NfsOption, join_options, render_options, retry_once

NFS_TYPES = frozenset({"nfs", "nfs4"})


class LockManagerMissing(FailedPrecondition):
    """NFSv3 locks need rpc.statd on this machine, and it is not there."""


_COMPLAINTS: tuple[tuple[re.Pattern[str], type[TatamiError], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), kind, advice)
    for pattern, kind, advice in (
        (
            r"rpc\.statd|remote locking",
            LockManagerMissing,
            "NFSv3 locks need rpcbind and rpc.statd on this machine; run them, use `vers=4.2`, or give the pool `nolock`",
        ),
        (
            r"access denied|permission denied|operation not permitted",
            FailedPrecondition,
            "the server does not export this directory to this machine: look at its export's client list and `sec=`",
        ),
        (r"no such file or directory", NotFound, "the server has no such directory, or does not export it"),
        (r"not a directory", NotFound, "what the server has there is no directory"),
        (r"failed to resolve|name or service|name resolution", Unavailable, "the server's name cannot be resolved here"),
        (
            r"protocol not supported|version or transport protocol is not supported|program not registered",
            FailedPrecondition,
            "server and client have no NFS version or transport in common: look at `vers` and `proto` of the pool",
        ),
        (
            r"incorrect mount option|invalid argument|bad option|unsupported option|unknown option",
            InvalidArgument,
            "this kernel or mount.nfs does not take one of the options together with the others",
        ),
        (r"unknown filesystem type|no such device", FailedPrecondition, "this kernel has no NFS client: load its module `nfs`"),
        (
            r"timed out|refused|no route|unreachable|host is down|stale|input/output|remote i/o|connection|busy|reset",
            Unavailable,
            "the server does not answer",
        ),
    )
)


def mount_nfs(source: str, target: Path, options: Sequence[NfsOption], *, seconds: float) -> mountinfo.Mount:
    """Mount `source` (`server:/path`, an IPv6 server in brackets) on the directory `target`, and return what mountinfo says of it.

    Raises Unavailable where the server cannot be reached or does not answer within `seconds`, NotFound for a missing directory,
    FailedPrecondition where the server refuses, InvalidArgument for options that the kernel does not take together.
    Whatever is raised, nothing was left mounted, as far as mountinfo can say.
    """
    argv = ["mount.nfs", source, os.fspath(target), "-n", "-o", render_options((*join_options(options), retry_once()))]
    before = mountinfo.topmost_mount_at(target)
    try:
        failure = _failure(source, commands.run(argv, timeout=seconds, check=False))
    except DeadlineExceeded:
        failure = Unavailable(f"{source} could not be mounted within {seconds:g} s: the server does not answer")
    except commands.CommandMissing as error:
        raise FailedPrecondition(f"{error}; it is part of Debian's nfs-common") from error
    mounted = mountinfo.topmost_mount_at(target)
    is_new = mounted is not None and (before is None or mounted.mount_id != before.mount_id)
    if mounted is not None and is_new and failure is None:
        return mounted
    if is_new:
        mounts.unmount(target, lazy=True)  # the child was killed too late
    raise failure or Unavailable(f"{source} was mounted and is gone again")


def _failure(source: str, done: commands.Completed) -> TatamiError | None:
    if done.returncode == 0:
        return None
    said = " ".join(done.stderr.split()).removeprefix("mount.nfs: ")[-300:]
    for pattern, kind, advice in _COMPLAINTS:
        if pattern.search(said):
            return kind(f"{source} cannot be mounted: {advice} ({said})")
    return FailedPrecondition(
        f"{source} cannot be mounted: mount.nfs ended with {done.returncode} ({said or 'it said nothing'})"
    )


def shows(target: Path, source: str) -> bool:
    """Tell whether what is seen at `target` is the NFS directory `source`, mounted or bound. The server is not asked."""
    mounted = mountinfo.topmost_mount_at(target)
    return mounted is not None and is_mount_of(mounted, source)


def is_mount_of(mounted: mountinfo.Mount, source: str) -> bool:
    return mounted.fs_type in NFS_TYPES and _plain(mounted.source) == _plain(source)


def mounts_of(source: str) -> list[Path]:
    """List where on this machine the NFS directory `source`, or something in it, is mounted."""
    inside = _plain(source).rstrip("/") + "/"
    table = mountinfo.read_mounts()
    return [Path(m.mount_point) for m in table if m.fs_type in NFS_TYPES and (_plain(m.source) + "/").startswith(inside)]


def _plain(source: str) -> str:
    # The kernel shows doubled slashes as they were given, and a trailing one of the root.
    host, separator, path = source.partition(":/")
    return f"{host}:/{re.sub('/+', '/', path).strip('/')}" if separator else source
