"""Image volumes in their pool: a directory that only root enters, with one sparse file in it.

The filesystem is made when the volume is made, on the file, before anybody knows of it (docs/decisions: no node ever formats anything).
"""

import os
from contextlib import suppress
from dataclasses import dataclass

from csi_driver.errors import FailedPrecondition, ResourceExhausted
from csi_driver.linux import files, image_filesystems
from csi_driver.linux.commands import CommandFailed
from csi_driver.linux.holders import HOLDER
from csi_driver.linux.image_child import IMAGE
from csi_driver.volumes.model import AccessType, Form, Layout, Ownership

SECTOR_BYTES = {AccessType.MOUNT: image_filesystems.BLOCK_SIZE, AccessType.BLOCK: 512}
"""Sizes of sectors: a filesystem of ours is made for large ones; what raw block holds, a disk image say, expects the usual."""
DIRECTORY_MODE = 0o700
_STEP_BYTES = 4096
_LEAST_BLOCK_BYTES = 1024**2
_NEW_MODE = 0o755
_NO_ROOM = ("No space left on device", "Disk quota exceeded")


def fitting_size(form: Form, wanted_bytes: int) -> int:
    """Return the least size, not below `wanted_bytes`, that a volume of this form can have."""
    if form.layout is Layout.DIRECTORY:
        return wanted_bytes
    least = _LEAST_BLOCK_BYTES if form.access_type is AccessType.BLOCK else image_filesystems.KINDS[form.fs_type].least_bytes
    return max(least, -(-wanted_bytes // _STEP_BYTES) * _STEP_BYTES)


def make_image(directory_fd: int, form: Form, capacity_bytes: int, ownership: Ownership) -> None:
    """Make an empty image in a new directory, with its filesystem, and bring it to disk.

    Raises ResourceExhausted where there is no room, OSError, CommandFailed, CommandMissing, DeadlineExceeded.
    """
    image = os.open(IMAGE, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=directory_fd)
    try:
        os.ftruncate(image, capacity_bytes)
        if form.access_type is AccessType.MOUNT:
            _make_filesystem(directory_fd, form.fs_type, ownership)
        os.fsync(image)
    finally:
        os.close(image)
    files.sync_directory(directory_fd)


def resize_image(directory_fd: int, capacity_bytes: int) -> None:
    """Make an image as large as its volume; one that is larger is left alone: nothing ever shrinks. Raises OSError."""
    image = os.open(IMAGE, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        if os.fstat(image).st_size < capacity_bytes:
            os.ftruncate(image, capacity_bytes)
            os.fsync(image)
    finally:
        os.close(image)


def image_size(directory_fd: int) -> int:
    """Return the bytes of an image. Raises OSError."""
    return os.stat(IMAGE, dir_fd=directory_fd, follow_symlinks=False).st_size


@dataclass(frozen=True)
class ImageState:
    """Whether a node has the image, and when it was last written (ns)."""

    held: bool
    written_at_ns: int


def look_at_image(directory_fd: int) -> ImageState:
    """Look at an image. Raises OSError."""
    try:
        os.stat(HOLDER, dir_fd=directory_fd, follow_symlinks=False)
        held = True
    except FileNotFoundError:
        held = False
    return ImageState(held, os.stat(IMAGE, dir_fd=directory_fd, follow_symlinks=False).st_mtime_ns)


def in_use(pool: str) -> FailedPrecondition:
    """Say why an image cannot be captured now, and what would help."""
    return FailedPrecondition(
        f"the image is in use on a node, and pool {pool} cannot capture it at one moment: that takes reflinks (XFS, btrfs, or NFS 4.2 on one of "
        "them); or stop the pods that use it first"
    )


def forget_holder(directory_fd: int) -> None:
    """Remove from a copy of an image's directory who held the origin. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(HOLDER, dir_fd=directory_fd)


def _make_filesystem(directory_fd: int, fs_type: str, ownership: Ownership) -> None:
    path = f"/proc/{os.getpid()}/fd/{directory_fd}/{IMAGE}"  # the tools run in processes of their own
    try:
        image_filesystems.make(
            path,
            fs_type,
            uid=ownership.uid or 0,
            gid=ownership.gid or 0,
            mode=_NEW_MODE if ownership.mode is None else ownership.mode,
        )
    except CommandFailed as error:
        if any(words in error.stderr for words in _NO_ROOM):
            raise ResourceExhausted(f"there is no room for the filesystem of a new volume: {error}") from error
        raise
