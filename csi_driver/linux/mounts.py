"""Binding a directory or file to a target, and taking it away again, such that neither a tenant nor a dead server can interfere.

Binding happens in one step. The source comes as a descriptor, so whoever opened it has proved where it lies, and no name is looked
up again. A detached copy of its mount is made, it gets its attributes while nobody can reach it, and only then is it attached to
the target, which is a descriptor too. So there is no moment in which a read-only bind can be written, no symbolic link is followed,
and what fails leaves nothing behind. Kernels without these calls (before 5.12) get the same from mount(8): see `bind_fallback`.

Attributes only ever tighten: a bind of a read-only or nosuid mount stays so, whatever is asked. Ask `mount_is_read_only`.

A new bind is private before it is attached, so the target's surroundings alone decide its propagation: below a shared mount (the
kubelet's directory) move_mount gives it a new peer group and the host sees it; below a private one it stays private. A plain
`mount --bind` would join the source's peer group, and what one pod mounts inside its volume would appear in the others'.

Unmounting trusts mountinfo only. On everything but well-known local filesystems the call is made in a child that can be killed.
"""

import contextlib
import errno
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from csi_driver.errors import AlreadyExists, DeadlineExceeded, FailedPrecondition
from csi_driver.linux import bind_fallback, commands, mount_api, mountinfo
from csi_driver.linux.bind_flags import MountAttributes, parse_bind_flags

__all__ = [
    "MountAttributes",
    "bind",
    "mount_is_read_only",
    "mounts_of",
    "parse_bind_flags",
    "same_file_mounted",
    "unmount",
    "unmount_all",
]

# Unmounting these waits for a local disk at worst. Everything else may wait for a server, or for a process (FUSE).
_LOCAL_FILESYSTEMS = frozenset(
    {"bcachefs", "btrfs", "devtmpfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "tmpfs", "vfat", "xfs", "zfs"}
)
_PLAIN_ATTEMPT = 5.0  # seconds that a plain unmount of a network filesystem gets before it is detached


def bind(source_fd: int, target: Path, attributes: MountAttributes, *, recursive: bool = False) -> None:
    """Bind the directory or file open as `source_fd` (O_PATH will do) onto `target`, in one step.

    `target` exists and is of the same kind. With `recursive`, mounts below the source come along, with the same attributes.
    On a network filesystem the caller runs this where a hang does no harm, as with opening `source_fd`.

    Raises AlreadyExists when something is mounted on the target, FailedPrecondition when it is a symbolic link, OSError from the
    kernel (ENOENT: no such target, or the source was removed; EINVAL: a directory onto a file or the reverse), and where mount(8)
    has to do it, commands.CommandFailed for the last two.
    """
    taken = mountinfo.topmost_mount_at(target)
    if taken is not None:
        raise AlreadyExists(f"{target} already has a mount on it: {taken.root} of {taken.source} ({taken.fs_type})")
    with _mount_point(target) as target_fd:
        if mount_api.supported():
            _bind_in_one_step(source_fd, target_fd, attributes, recursive)
        else:
            bind_fallback.bind(source_fd, target_fd, attributes, recursive=recursive)


def unmount(target: Path, *, lazy: bool = False, timeout: float = 10.0) -> None:
    """Take away the topmost mount at `target`. With `lazy`, at once, even when it is busy: it lives on until its last user is gone.

    Raises OSError (EBUSY: in use, EINVAL: nothing is mounted), and, for other than local filesystems, DeadlineExceeded after
    `timeout` seconds: whether it is gone is then to be seen in mountinfo, and what was written may not have reached the server.
    """
    layer = mountinfo.topmost_mount_at(target)
    if layer is None:
        raise OSError(errno.EINVAL, "nothing is mounted", os.fspath(target))
    _unmount_layer(layer, mount_api.MNT_DETACH if lazy else 0, timeout)


def unmount_all(target: Path, timeout: float) -> bool:
    """Take away every mount stacked at `target`, until mountinfo shows none. Returns whether one had to be detached lazily.

    All and not only ours: the kubelet removes the directory next, which any mount left there would prevent. Each goes plainly if it
    can, and lazily if it is busy or its server does not answer. Nothing mounted, or no such directory: nothing to do.

    Raises DeadlineExceeded when something is still there after `timeout` seconds, OSError when the kernel refuses (EPERM, or EINVAL
    for a mount that a less privileged namespace has inherited).
    """
    deadline = time.monotonic() + timeout
    detached = False
    while layer := mountinfo.topmost_mount_at(target):
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise DeadlineExceeded(f"{target} is still a mount of {layer.source} after {timeout:g} s")
        detached = _pop(layer, remaining) or detached
    return detached


def same_file_mounted(source_fd: int, target: Path) -> bool:
    """Tell whether what is seen at `target` is a mount of exactly the directory or file open as `source_fd`.

    Compared are the filesystem's device and the path within it, both as the kernel's tables name them, so that neither side is
    touched. False also when it cannot be known: the source has been removed, or lies on a mount that this namespace does not see.
    """
    top = mountinfo.topmost_mount_at(target)
    return top is not None and (top.device, top.root) == _place_in_filesystem(source_fd)


def mounts_of(source_fd: int) -> list[Path]:
    """List where the directory or file open as `source_fd`, or something in it, is mounted; empty when that cannot be known."""
    place = _place_in_filesystem(source_fd)
    if place is None:
        return []
    device, root = place
    inside = root.rstrip("/") + "/"
    return [Path(m.mount_point) for m in mountinfo.read_mounts() if m.device == device and (m.root + "/").startswith(inside)]


def mount_is_read_only(target: Path) -> bool | None:
    """Tell whether the mount seen at `target` refuses writes, itself or its filesystem; None when nothing is mounted there."""
    top = mountinfo.topmost_mount_at(target)
    return None if top is None else top.read_only


def _bind_in_one_step(source_fd: int, target_fd: int, attributes: MountAttributes, recursive: bool) -> None:
    here = mount_api.AT_EMPTY_PATH | (mount_api.AT_RECURSIVE if recursive else 0)
    copy_fd = mount_api.open_tree(source_fd, "", here | mount_api.OPEN_TREE_CLONE | mount_api.OPEN_TREE_CLOEXEC)
    try:
        bits, cleared = attributes.kernel_bits()
        mount_api.mount_setattr(copy_fd, "", here, attr_set=bits, attr_clr=cleared, propagation=mount_api.MS_PRIVATE)
        by_descriptor = mount_api.MOVE_MOUNT_F_EMPTY_PATH | mount_api.MOVE_MOUNT_T_EMPTY_PATH
        mount_api.move_mount(copy_fd, "", target_fd, "", by_descriptor)
    finally:
        os.close(copy_fd)


@contextlib.contextmanager
def _mount_point(target: Path) -> Iterator[int]:
    """Open the target itself, whatever it is. Raises FailedPrecondition for a symbolic link, OSError."""
    # O_PATH with O_NOFOLLOW opens a symbolic link instead of failing: open(2). So it has to be asked what it is.
    target_fd = os.open(target, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if stat.S_ISLNK(os.fstat(target_fd).st_mode):
            raise FailedPrecondition(f"{target} is a symbolic link: a volume is mounted on a real directory or file only")
        yield target_fd
    finally:
        os.close(target_fd)


def _place_in_filesystem(fd: int) -> tuple[str, str] | None:
    """Name the device ("major:minor") and the path within the filesystem of an open file, without asking the filesystem."""
    facts = dict(line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines() if ":" in line)
    mount = next((mount for mount in mountinfo.read_mounts() if mount.mount_id == int(facts["mnt_id"])), None)
    path = str(Path(f"/proc/self/fd/{fd}").readlink())
    # A removed file is shown with this ending. One that is really called so is taken for removed, which errs on the safe side.
    if mount is None or path.endswith(" (deleted)"):
        return None
    mount_point = mount.mount_point.rstrip("/")
    if not (path + "/").startswith(mount_point + "/"):
        return None
    return mount.device, mount.root.rstrip("/") + path[len(mount_point) :].rstrip("/") or "/"


def _pop(layer: mountinfo.Mount, timeout: float) -> bool:
    """Take one layer away, plainly or else lazily. Returns whether lazily."""
    try:
        _unmount_layer(layer, 0, min(timeout / 2, _PLAIN_ATTEMPT))
    except DeadlineExceeded:
        if not _is_topmost(layer):
            return True  # gone from the tree, but what it had yet to write was not waited for
    except OSError as error:
        if not _is_topmost(layer):
            return False  # somebody else was faster
        if error.errno != errno.EBUSY:
            raise
    else:
        return False
    try:
        _unmount_layer(layer, mount_api.MNT_DETACH, timeout / 2)
    except (DeadlineExceeded, OSError):
        if _is_topmost(layer):
            raise
    return True


def _is_topmost(layer: mountinfo.Mount) -> bool:
    top = mountinfo.topmost_mount_at(layer.mount_point)
    return top is not None and top.mount_id == layer.mount_id


def _unmount_layer(layer: mountinfo.Mount, flags: int, timeout: float) -> None:
    flags |= mount_api.UMOUNT_NOFOLLOW
    if layer.fs_type in _LOCAL_FILESYSTEMS:
        mount_api.umount2(layer.mount_point, flags)
        return
    # Not umount(8): it follows a symbolic link at the end when root calls it, looks at the target first, and starts umount.nfs.
    # Even a detach may wait: the last user of a filesystem writes back what it has, on its way out of the call.
    argv = [sys.executable, "-I", "-S", mount_api.__file__, layer.mount_point, str(flags)]
    code = int(commands.run(argv, timeout=timeout).stdout)
    if code:
        raise OSError(code, f"umount2: {os.strerror(code)}", layer.mount_point)
