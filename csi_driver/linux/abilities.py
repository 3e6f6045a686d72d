"""What a filesystem can do for copies, found out by trying, for names say little: XFS shares blocks or not, NFS passes it on or not."""

import errno
import fcntl
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from csi_driver.linux import btrfs
from csi_driver.linux.contents import FICLONE
from csi_driver.linux.tree_removal import remove_tree

PROBE_PREFIX = "probe."
_BLOCK = bytes(range(256)) * 256
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

Capture = Literal["subvolume", "reflink", "copy_file_range", "copy"]


@dataclass(frozen=True, slots=True)
class Abilities:
    """The rungs of the ladder that hold on one filesystem."""

    subvolumes: bool
    reflink: bool
    copy_file_range: bool

    @property
    def best(self) -> Capture:
        if self.subvolumes:
            return "subvolume"
        if self.reflink:
            return "reflink"
        return "copy_file_range" if self.copy_file_range else "copy"


def probe(directory_fd: int) -> Abilities:
    """Try it out in the directory; nothing is left there. Raises OSError (ENOSPC, EROFS, EDQUOT): then nothing is known."""
    name = PROBE_PREFIX + secrets.token_hex(8)
    os.mkdir(name, 0o700, dir_fd=directory_fd)
    try:
        place = os.open(name, _DIRECTORY, dir_fd=directory_fd)
        try:
            return Abilities(_has_subvolumes(place), *_shares_blocks(place))
        finally:
            os.close(place)
    finally:
        remove_tree(directory_fd, name)


def _has_subvolumes(place: int) -> bool:
    try:
        btrfs.create(place, "one")
        one = os.open("one", _DIRECTORY, dir_fd=place)
        try:
            btrfs.holds_subvolumes(one)  # without it nobody could tell what a snapshot leaves out
            btrfs.snapshot(one, place, "two")
        finally:
            os.close(one)
        btrfs.destroy(place, "two")
        btrfs.destroy(place, "one")
    except OSError as error:
        if error.errno in btrfs.NOT_HERE:
            return False
        raise
    return True


def _shares_blocks(place: int) -> tuple[bool, bool]:
    source = os.open("source", _NEW, 0o600, dir_fd=place)
    try:
        target = os.open("target", _NEW, 0o600, dir_fd=place)
        try:
            os.write(source, _BLOCK)
            return _works(lambda: fcntl.ioctl(target, FICLONE, source)), _works(
                lambda: os.copy_file_range(source, target, len(_BLOCK), 0, 0)
            )
        finally:
            os.close(target)
    finally:
        os.close(source)


def _works(step: Callable[[], int]) -> bool:
    try:
        step()
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE}:
            raise
        return False
    return True
