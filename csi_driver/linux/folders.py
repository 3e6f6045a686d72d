"""A directory that is being copied: making files in it and taking them back, and what became of it, or of something in it, where another
client of its server removes it meanwhile.
"""

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field

from csi_driver.errors import Unavailable, quoted
from csi_driver.linux import beneath, staleness
from csi_driver.linux.fidelity import Births
from csi_driver.linux.hard_links import Place
from csi_driver.linux.system_calls import require_current

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
_NEW_OR_EMPTY_FILE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(slots=True)
class Folder:
    """A directory that is being copied: both ends, open; the source's status from before; its place in the copy.

    `handle` is the source's (`Walk.handle`); `is_gone`: it was removed meanwhile.
    """

    source: int
    target: int
    status: os.stat_result
    place: Place
    births: Births = field(default_factory=Births)
    handle: bytes | None = None
    is_gone: bool = False


def is_gone(folder: Folder, name: bytes, source_top: int) -> bool:
    """Tell whether an entry that has gone stale was removed; False: it is there still, or again.

    `source_top` is the top of the source. Raises OSError, ESTALE where that cannot be told (`is_folder_gone`).
    """
    if is_folder_gone(folder, source_top):
        return True
    try:
        os.close(beneath.pin(folder.source, name))
    except FileNotFoundError:
        return True
    except OSError:  # whatever else it is, carrying it anew meets it
        return False
    return False


def is_folder_gone(folder: Folder, source_top: int) -> bool:
    """Tell whether a directory was removed; False: its descriptor is good.

    Raises OSError, ESTALE where it is neither, or its copy is stale: that is ours, and nobody removes it.
    """
    require_current(folder.target)
    if not folder.is_gone and staleness.is_stale(folder.source):
        if folder.place.parent is None or not staleness.is_gone(source_top, folder.place.way(), folder.handle):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), folder.place.path_of(b""))
        folder.is_gone = True
    return folder.is_gone


def new_file(folder: Folder, name: bytes, mode: int, *, over_network: bool) -> tuple[int, os.stat_result | None]:
    """Make a file and open it for writing; also what it was made as, where that had to be asked anyway.

    Over a network O_EXCL is spared, which NFS pays for with a SETATTR of its own: an empty file with one name is as good as a new one.
    Raises OSError, EEXIST where the name is taken.
    """
    if not over_network:
        return os.open(name, _NEW_FILE, mode, dir_fd=folder.target), None
    try:
        target = os.open(name, _NEW_OR_EMPTY_FILE, mode, dir_fd=folder.target)
    except OSError as error:
        if error.errno == errno.ESTALE:  # it may have been made, and is no other's then
            raise
        # EISDIR, ELOOP, ENXIO: the name is taken, and this way says so by its right name.
        return os.open(name, _NEW_FILE, mode, dir_fd=folder.target), None
    try:
        made = os.fstat(target)
    except OSError:
        os.close(target)
        raise
    if not stat.S_ISREG(made.st_mode) or made.st_nlink != 1 or made.st_size:
        os.close(target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
    return target, made


def take_back(folder: Folder, name: bytes, error: OSError, remove: Callable[..., None]) -> bool:
    """Remove what was just made, where `error` says that it has gone stale half-way (after any other the whole copy is given up).

    Raises Unavailable where it will not go: it must not be taken for the whole.
    """
    if error.errno != errno.ESTALE:
        return False
    try:
        remove(name, dir_fd=folder.target)
    except FileNotFoundError:
        pass
    except OSError as refused:
        path = quoted(folder.place.path_of(name), 400)
        raise Unavailable(
            f"{path} went stale while it was copied, and its copy cannot be taken back: {refused.strerror}"
        ) from refused
    return True
