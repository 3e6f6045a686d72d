"""Parents of templated directories: the driver makes them, and removes them again when the last volume in them has gone.

Only those that it made: each has a mark in `.csi/parents`, with the inode that it is, written once it was made. A directory of the same
name that an admin has made is another inode; what was made just before a crash has no mark, and stays. A parent is removed empty,
under the lock that every creation below it shares, by the sweeper.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import chain

from csi_driver.errors import InvalidArgument, OperationPending, RecordDamaged, quoted
from csi_driver.linux import beneath, btrfs, files
from csi_driver.linux.directories import make_directories
from csi_driver.linux.system_calls import InodeReader
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import VolumeRecord
from csi_driver.volumes.pool_layout import PARENTS, RETAINED
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.trash import volumes_being_deleted

_PARENT_MODE = 0o711  # to go through, as an NFS client whose root is squashed must, and not to see whose volumes are there
_MARK_BYTES = 65536
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_log = logging.getLogger(__name__)


def place_lock(directory: str) -> str:
    """Name the lock that whoever makes something in a directory shares, and whoever makes or removes it needs alone."""
    return f"directory:{directory}"


def parents_of(directory: str) -> list[str]:
    """List the directories above `directory`, topmost first."""
    components = directory.split("/")
    return ["/".join(components[:depth]) for depth in range(1, len(components))]


class Parents:
    """Makes parents, and never inside a volume."""

    def __init__(self) -> None:
        # Parents of templated directories that were seen to be no volume: a parent stays none for as long as it exists.
        self._known: set[tuple[str, str, int, tuple[int, int]]] = set()

    def make(self, store: PoolStore, directory: str) -> None:
        """Make what is missing of the directories above `directory`. The caller shares their locks.

        Raises InvalidArgument where one of them is no directory, or a volume's.
        """
        parents = parents_of(directory)
        if not parents:
            return
        with store.open_root() as root:
            for parent in parents:
                self._check(store, root, parent, directory)
            try:
                made = make_directories(root, parents[-1], _PARENT_MODE, store.remote_maker)
            except (NotADirectoryError, FileExistsError) as error:
                raise InvalidArgument(
                    f"directory {quoted(directory)}: a part of it is no directory in pool {store.name}"
                ) from error
            if made:
                _mark_made(store, root, made)

    def _check(self, store: PoolStore, root: int, parent: str, directory: str) -> None:
        try:
            descriptor = beneath.open_beneath(root, parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        except OSError as error:
            raise InvalidArgument(f"directory {quoted(directory)}: {parent} is no directory in pool {store.name}") from error
        try:
            status = InodeReader().read(descriptor)
        finally:
            os.close(descriptor)
        known = (store.name, parent, status.inode, status.birth)  # an inode's number alone may be given to a volume later
        if known in self._known:
            return
        # A directory inside a volume would belong to that volume's tenant: whatever he likes, he could put in its place.
        for other in chain(store.volumes.readable(), volumes_being_deleted(store)):
            if other.directory == parent:
                raise InvalidArgument(
                    f"directory {quoted(directory)} would lie inside volume {other.handle} ({other.directory}) of pool {store.name}"
                )
        # Nor in what a deleted volume left: it may be somebody's static volume by now. But the driver may have made it anew since.
        if not _was_made(store, parent, status.inode):
            for name, retained in _retained_volumes(store):
                if retained.directory == parent:
                    raise InvalidArgument(
                        f"directory {quoted(directory)} would lie inside {parent} of pool {store.name}, the data that volume {retained.handle} "
                        f"left (onDelete: retain); choose another `directory`, or, where that data has gone, remove .csi/{RETAINED}/{name}"
                    )
        self._known.add(known)


def _mark_made(store: PoolStore, root: int, made: Sequence[str]) -> None:
    """Remember that these directories, relative to the pool's root, were just made by the driver. Raises OSError."""
    with store.open(PARENTS) as marks:
        for directory in made:
            descriptor = beneath.open_beneath(root, directory, _DIRECTORY)
            try:
                body = {"directory": directory, "inode": btrfs.identity_of(descriptor)}
            finally:
                os.close(descriptor)
            files.write_atomically(marks, _name_of(directory), json.dumps(body).encode() + b"\n")


def remove_empty_parents(store: PoolStore, locks: KeyedLocks, stale: Callable[[str], bool]) -> int:
    """Remove the parents that the driver made and that are empty, where `stale` agrees; return how many. Raises Unavailable, OSError."""
    removed = 0
    with store.open(PARENTS) as marks, store.open_root() as root:
        # The deepest first: then those above them may be empty, too.
        for directory, inode in sorted(_marks(store, marks), key=lambda mark: -mark[0].count("/")):
            store.require_answer()
            try:
                found = _look(root, directory)
            except OSError as error:
                _log.warning("a parent of volumes cannot be looked at", extra={"directory": directory, "error": str(error)})
                continue
            if found is None or found[0] != inode:
                _unmark(marks, directory)  # it has gone, or somebody has put another in its place
            elif found[1] and stale(f"parent {directory}"):
                with suppress(OperationPending), locks.hold(store, place_lock(directory)):
                    removed += _remove(store, root, marks, directory)
    return removed


def _remove(store: PoolStore, root: int, marks: int, directory: str) -> int:
    if any(record.directory == directory for record in store.volumes.readable()):
        # Removed by somebody and made anew as a volume: a filesystem may give the same inode again, and the mark tells no difference.
        _unmark(marks, directory)
        return 0
    parent, _, name = directory.rpartition("/")
    descriptor = beneath.open_beneath(root, parent, _DIRECTORY) if parent else os.dup(root)
    try:
        os.rmdir(name, dir_fd=descriptor)
    except OSError:  # somebody uses it again, or may not be helped
        return 0
    finally:
        os.close(descriptor)
    _unmark(marks, directory)
    _log.info("an empty parent of volumes was removed", extra={"pool": store.name, "directory": directory})
    return 1


def _look(root: int, directory: str) -> tuple[int, bool] | None:
    """Return which inode a directory is, and whether it is empty; None where there is none. Raises OSError where that cannot be told."""
    try:
        descriptor = beneath.open_beneath(root, directory, _DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        with os.scandir(descriptor) as entries:
            return btrfs.identity_of(descriptor), next(entries, None) is None
    finally:
        os.close(descriptor)


def _marks(store: PoolStore, marks: int) -> Iterator[tuple[str, int]]:
    for name in os.listdir(marks):
        store.require_answer()
        if name.endswith(".json") and (mark := _read_mark(marks, name)) is not None:
            yield mark


def _read_mark(marks: int, name: str) -> tuple[str, int] | None:
    """Return a directory and which inode it was when the driver made it; None where there is no mark that can be read."""
    try:
        body = json.loads(files.read_bounded(marks, name, _MARK_BYTES))
        directory, inode = body["directory"], body["inode"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    sound = isinstance(directory, str) and type(inode) is int and _name_of(directory) == name
    return (directory, inode) if sound else None


def _retained_volumes(store: PoolStore) -> Iterator[tuple[str, VolumeRecord]]:
    """Read what says which volumes `onDelete: retain` has kept, each with its file's name; what is damaged is left out."""
    with store.open(RETAINED) as folder:
        for name in sorted(os.listdir(folder)):
            with suppress(RecordDamaged):
                record = store.volumes.read_in(folder, name, name.partition(".")[0])
                if record is not None:
                    yield name, record


def _was_made(store: PoolStore, directory: str, inode: int) -> bool:
    with store.open(PARENTS) as marks:
        return _read_mark(marks, _name_of(directory)) == (directory, inode)


def _unmark(marks: int, directory: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(_name_of(directory), dir_fd=marks)


def _name_of(directory: str) -> str:
    return hashlib.sha256(os.fsencode(directory)).hexdigest() + ".json"
