"""Binding with mount(8), for kernels before 5.12 and for seccomp filters that do not know the new mount calls.

The old call binds first and makes read-only after, and in between the bind can be written. So this happens in a place that only
root can enter and that no other mount namespace sees, and the finished mount is then moved onto the target.

Its limits: some ten processes a bind (about 20 ms); a driver killed in between leaves a directory `tatami-bind-*` with a bind in
the temporary directory; and root on the node could reach the bind there while it can be written.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from csi_driver.errors import FailedPrecondition
from csi_driver.linux import mount_api, mountinfo
from csi_driver.linux.bind_flags import MountAttributes
from csi_driver.linux.commands import run

_TIMEOUT = 30.0  # seconds for each command
_MOUNT = ("mount", "--no-mtab", "--no-canonicalize")  # names are used as they are, and descriptors stay what they are
_INHERITED = frozenset({"ro", "nosuid", "nodev", "noexec", "noatime", "relatime", "nodiratime", "nosymfollow"})
_ACCESS_TIMES = frozenset({"noatime", "relatime", "strictatime"})


def bind(source_fd: int, target_fd: int, attributes: MountAttributes, *, recursive: bool = False) -> None:
    """Bind what is open as `source_fd` onto what is open as `target_fd`, never showing it there with fewer attributes.

    Raises commands.CommandFailed, OSError, and FailedPrecondition when mount(8) or the kernel did not set what was asked for.
    """
    with _private_place(is_directory=stat.S_ISDIR(os.fstat(source_fd).st_mode)) as place:
        _mount("--rbind" if recursive else "--bind", _by_descriptor(source_fd), place)
        _mount("--make-rprivate", place)
        for mount_point in (place, *(mount.mount_point for mount in mountinfo.mounts_below(place))):
            _tighten(mount_point, attributes)
        _mount("--move", place, _by_descriptor(target_fd))


def _tighten(mount_point: str, attributes: MountAttributes) -> None:
    # A remount sets exactly the flags given, so those that came with the source are given again, or a bind would loosen them.
    inherited = _flags_at(mount_point)
    times = frozenset({attributes.access_times}) if attributes.access_times else inherited & _ACCESS_TIMES
    wanted = (inherited | attributes.words()) - _ACCESS_TIMES | times
    # With a source given (any word will do), mount(8) looks nowhere else for options.
    _mount("-o", ",".join(["remount", "bind", *sorted(wanted)]), "none", mount_point)
    if _flags_at(mount_point) != wanted:
        raise FailedPrecondition(f"mount(8) could not set {', '.join(sorted(wanted))}: got {sorted(_flags_at(mount_point))}")


def _flags_at(mount_point: str) -> frozenset[str]:
    mount = mountinfo.topmost_mount_at(mount_point)
    if mount is None:
        raise FailedPrecondition(f"the bind at {mount_point} has vanished")
    flags = mount.options & _INHERITED
    # mountinfo has no word for strictatime: it is the absence of the two others.
    return flags if flags & _ACCESS_TIMES else flags | {"strictatime"}


def _by_descriptor(fd: int) -> str:
    """Name an open file so that mount(2), in a child, comes to this very file and nowhere else: proc_pid_fd(5)."""
    return f"/proc/{os.getpid()}/fd/{fd}"


def _mount(*arguments: str) -> None:
    run([*_MOUNT, *arguments], timeout=_TIMEOUT)


@contextlib.contextmanager
def _private_place(*, is_directory: bool) -> Iterator[str]:
    """Make an empty mount point that only root can reach, inside a private mount: what is mounted there reaches no peer,
    and mount(2) moves nothing out of a shared mount.
    """
    room = Path(tempfile.mkdtemp(prefix="tatami-bind-"))
    place = room / "volume"
    try:
        _mount("--bind", str(room), str(room))
        _mount("--make-private", str(room))
        if is_directory:
            place.mkdir(mode=0o700)
        else:
            place.touch(mode=0o600)
        yield str(place)
    finally:
        # Whatever is still mounted goes first: then the removals below can only meet our own empty names.
        with contextlib.suppress(OSError):
            mount_api.umount2(str(room), mount_api.MNT_DETACH | mount_api.UMOUNT_NOFOLLOW)
        with contextlib.suppress(FileNotFoundError):
            place.rmdir() if is_directory else place.unlink()
        room.rmdir()
