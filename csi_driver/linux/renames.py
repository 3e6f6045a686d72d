"""Moving a directory that its tenant has tried to nail down.

The owner of a directory may make it immutable or append-only (with the capability for it) or, if it is a btrfs subvolume, read-only;
then it can be neither moved nor removed until that is undone. It costs nothing where nobody did it.
"""

import errno
import os

from csi_driver.linux import beneath, btrfs
from csi_driver.linux.inode_flags import clear_holding_flags


def rename_directory(source_fd: int, source_name: str, target_fd: int, target_name: str) -> None:
    """Do what rename(2) does, and undo what holds a directory in its place where that refuses. Raises OSError."""
    try:
        os.rename(source_name, target_name, src_dir_fd=source_fd, dst_dir_fd=target_fd)
    except OSError as error:
        if error.errno not in {errno.EROFS, errno.EPERM} or not _release(source_fd, source_name):
            raise
        os.rename(source_name, target_name, src_dir_fd=source_fd, dst_dir_fd=target_fd)


def _release(parent_fd: int, name: str) -> bool:
    try:
        directory = beneath.open_beneath(parent_fd, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False  # no directory: what the rename said of it stands
    try:
        btrfs.set_read_only(directory, read_only=False)
        clear_holding_flags(directory)
    except OSError:
        return False
    finally:
        os.close(directory)
    return True
