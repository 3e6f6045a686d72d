"""The filesystems inside image files: made, recognised, checked, mounted and grown, all by their own tools.

Options are spelled out, so that a volume does not depend on the mke2fs.conf of whoever makes it: blocks and sectors of 4,096 bytes (an
image then works with direct I/O on every disk, and can move to one with large sectors), nothing reserved for root, and nothing written
that a new, sparse file holds anyway (e2fsprogs 1.47: assume_storage_prezeroed), so that a filesystem costs what it must.
"""

import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from csi_driver.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from csi_driver.linux import commands
from csi_driver.linux.bind_flags import MountAttributes

BLOCK_SIZE = 4096
_MAKE_SECONDS = 300.0
_GROW_SECONDS = 7 * 24 * 3600.0
"""As good as no end: a resize2fs that is killed can leave a filesystem that a person has to repair."""
_CAP_SYS_RESOURCE = 24

_EXT4_MAGIC_AT, _EXT4_MAGIC = 1024 + 56, b"\x53\xef"
_XFS_MAGIC = b"XFSB"
_HEAD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class FilesystemKind:
    """What differs between filesystems: the least size in bytes, how one is made, and what it is mounted with."""

    least_bytes: int
    make: tuple[str, ...]
    mount_options: tuple[str, ...]


KINDS = {
    "ext4": FilesystemKind(
        least_bytes=16 * 1024**2,
        make=(
            *("mkfs.ext4", "-q", "-b", str(BLOCK_SIZE), "-I", "256", "-i", "8192", "-m", "0"),
            *("-E", "nodiscard,assume_storage_prezeroed=1,root_owner=0:0"),
        ),
        mount_options=("discard", "errors=remount-ro"),
    ),
    "xfs": FilesystemKind(
        least_bytes=300 * 1024**2,  # mkfs.xfs 5.19 and newer make none that is smaller
        make=("mkfs.xfs", "-q", "-K", "-s", f"size={BLOCK_SIZE}"),
        # A clone has its origin's UUID, and XFS would not have both mounted on one node.
        mount_options=("discard", "nouuid"),
    ),
}
DEFAULT = "ext4"


def make(image: str, fs_type: str, *, uid: int, gid: int, mode: int) -> None:
    """Make a filesystem in a new file, whose top directory has this owner and mode. No `force`: data is never overwritten.

    Raises CommandFailed, CommandMissing, DeadlineExceeded, OSError (ENOSPC shows as CommandFailed).
    """
    commands.run((*KINDS[fs_type].make, image), timeout=_MAKE_SECONDS)
    if fs_type == "xfs":
        fields = (("core.mode", f"0{0o40000 | mode:o}"), ("core.uid", str(uid)), ("core.gid", str(gid)))
        orders = [word for field, value in fields for word in ("-c", f"write {field} {value}")]
        done = commands.run(("xfs_db", "-x", "-c", "sb 0", "-c", "addr rootino", *orders, image), timeout=_MAKE_SECONDS)
        wrong = done.stderr.splitlines()
    else:
        top = (("uid", str(uid)), ("gid", str(gid)), ("mode", f"0{0o40000 | mode:o}"))
        orders = [f"set_inode_field <2> {field} {value}\n" for field, value in top]
        done = commands.run(("debugfs", "-w", "-f", "-", image), timeout=_MAKE_SECONDS, stdin="".join(orders).encode())
        wrong = done.stderr.splitlines()[1:]  # after its version
    if wrong:  # neither says by its exit code that it failed
        raise OSError(errno.EIO, f"{done.argv[0]}: {wrong[0]}", image)


def recognise(device: Path) -> tuple[str, int] | None:
    """Say which filesystem of ours a device or image begins with, and its size in bytes; None for anything else. Raises OSError."""
    descriptor = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = os.pread(descriptor, _HEAD_BYTES, 0)
    finally:
        os.close(descriptor)
    if len(head) < _HEAD_BYTES:
        return None
    if head[:4] == _XFS_MAGIC:
        block_size, blocks = struct.unpack_from(">IQ", head, 4)
        return "xfs", block_size * blocks
    if head[_EXT4_MAGIC_AT : _EXT4_MAGIC_AT + 2] == _EXT4_MAGIC:
        low, shift = struct.unpack_from("<I", head, 1024 + 4)[0], struct.unpack_from("<I", head, 1024 + 24)[0]
        high = struct.unpack_from("<I", head, 1024 + 0x150)[0]
        return "ext4", (high << 32 | low) << (10 + min(shift, 6))
    return None


def check(device: Path, fs_type: str, seconds: float, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Check and, where that is safe, repair a filesystem that is not mounted. XFS replays its log when it is mounted (xfs_repair(8)).

    Raises FailedPrecondition where a person has to repair it, DeadlineExceeded.
    """
    if fs_type != "ext4":
        return
    argv = ("e2fsck", "-p", os.fspath(device))
    done = commands.run(argv, timeout=seconds, check=False, should_stop=lambda _: should_stop())
    # e2fsck(8): 1 and 2 are errors that it has corrected, 4 what it left, 8 and more that it could not work.
    if done.returncode & ~3 and "is in use" in done.stderr:
        raise Unavailable(f"{device} is being checked already, or still mounted somewhere; try again")
    if done.returncode & ~3 or done.returncode < 0:
        said = " | ".join(line.strip() for line in (done.stdout + done.stderr).splitlines()[-4:] if line.strip())
        raise FailedPrecondition(f"e2fsck -p ended with {done.returncode}: {said[-300:]}")


def mount(device: Path, target: Path, fs_type: str, attributes: MountAttributes, *, read_only: bool, seconds: float) -> None:
    """Mount a device, never with its device files. Raises FailedPrecondition (damaged), Unavailable after `seconds`, CommandMissing."""
    words = {"nodev", *KINDS[fs_type].mount_options, *attributes.words()}
    if read_only:
        words = words - {"discard"} | {"ro"}
    argv = ("mount", "-n", "-t", fs_type, "-o", ",".join(sorted(words)), os.fspath(device), os.fspath(target))
    try:
        done = commands.run(argv, timeout=seconds, check=False)
    except DeadlineExceeded as error:
        raise Unavailable(f"{device} could not be mounted within {seconds:g} s") from error
    if done.returncode == 0:
        return
    said = " ".join(done.stderr.split())[-300:]
    if fs_type == "xfs":
        verdict = commands.run(("xfs_repair", "-n", os.fspath(device)), timeout=seconds, check=False)
        said += f"; xfs_repair -n ended with {verdict.returncode}: " + " ".join(verdict.stderr.split())[-200:]
    raise FailedPrecondition(f"{fs_type} on {device} cannot be mounted: {said}")


def may_grow_mounted(fs_type: str) -> bool:
    """Tell whether this process may grow a filesystem that is mounted: ext4 asks for CAP_SYS_RESOURCE (ext4_resize_begin)."""
    if fs_type != "ext4":
        return True
    effective = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(effective.split()[1], 16) >> _CAP_SYS_RESOURCE & 1)


def grow_mounted(device: Path, mounted: Path, fs_type: str) -> None:
    """Grow a mounted filesystem to its device's size; what has that size already is left alone.

    Raises FailedPrecondition where that is not allowed while it is mounted, CommandFailed, DeadlineExceeded (a retry goes on).
    """
    if not may_grow_mounted(fs_type):
        raise FailedPrecondition(
            f"{fs_type} on {device} can be grown while it is mounted only with CAP_SYS_RESOURCE, which this process lacks: run the node "
            "plugin privileged; else it is grown when it is staged the next time"
        )
    argv = ("xfs_growfs", "-d", os.fspath(mounted)) if fs_type == "xfs" else ("resize2fs", os.fspath(device))
    commands.run(argv, timeout=_GROW_SECONDS)


def grow_unmounted(device: Path, seconds: float, should_stop: Callable[[], bool] = lambda: False) -> None:
    """Grow an ext4 that is not mounted to its device's size, once it is checked, in `seconds` at most and unless it `should_stop`.

    The growth itself is not stopped. Raises FailedPrecondition (damaged), CommandFailed, DeadlineExceeded.
    """
    argv = ("e2fsck", "-f", "-p", os.fspath(device))
    done = commands.run(argv, timeout=seconds, check=False, should_stop=lambda _: should_stop())
    if done.returncode & ~3 or done.returncode < 0:
        raise FailedPrecondition(f"e2fsck -f -p ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    commands.run(("resize2fs", os.fspath(device)), timeout=_GROW_SECONDS)


def trim(mounted: Path, seconds: float) -> None:
    """Give back what is free (fstrim(8)), for at most `seconds`; what is not done then is done the next time."""
    try:
        commands.run(("fstrim", os.fspath(mounted)), timeout=seconds, check=False)
    except DeadlineExceeded:
        return
