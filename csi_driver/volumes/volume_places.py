"""The places of volumes: content that was built in staging is moved into the directory of its volume, in one step.

The directory is claimed before, in the record and by an exclusive mkdir, so that nobody else's is ever taken, whatever came in between;
and after the move the content is whole. A crash leaves an empty directory that the record claims, or the content in its place; which it
is, the inode tells.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain

from csi_driver.errors import InvalidArgument, NotFound, OperationPending, RecordDamaged, quoted
from csi_driver.linux import btrfs, files
from csi_driver.linux.directories import make_exclusively
from csi_driver.volumes.attempts import open_staged, staging_name
from csi_driver.volumes.fencing import Fence
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import Phase, VolumeRecord
from csi_driver.volumes.parents import Parents, parents_of, place_lock
from csi_driver.volumes.pool_layout import STAGING, exists_at
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.trash import volumes_being_deleted

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class VolumePlaces:
    """Moves what was built for volumes into their directories, and says whose what lies there is."""

    def __init__(self, locks: KeyedLocks) -> None:
        self._locks = locks
        self._fence = Fence(locks, "volume")
        self._parents = Parents()

    def is_in_place(self, store: PoolStore, record: VolumeRecord) -> bool:
        """Tell whether the content of a volume that is being created was moved into place before a crash."""
        if not record.claimed or record.content_inode is None:
            return False
        try:
            with store.open_volume(record.directory) as top:
                return btrfs.identity_of(top) == record.content_inode
        except NotFound:
            return False

    def place(self, store: PoolStore, record: VolumeRecord, claim: Callable[[VolumeRecord], VolumeRecord]) -> VolumeRecord:
        """Move built content to the volume's directory, which must not exist, and make it ready. Returns the record as it now is.

        `claim` writes the record that claims the directory: a new one, or in place of the one that there is. It needs to last no sooner
        than what comes after it. The record that says ready is written down before: one commit of a journal takes both to the disk,
        and a second one the claim, the directory and the readiness, in this order.

        Raises InvalidArgument for a directory that exists already (it is never adopted) or lies inside another volume.
        """
        with self._hold_place(store, record.directory):
            self._parents.make(store, record.directory)
            with store.open_parent(record.directory) as (parent, name), store.open(STAGING) as staging, ExitStack() as held:
                staged = staging_name(record.id, record.token)
                claimed_before = self._check_free(store, record, parent, name)
                with open_staged(staging, staged) as content:
                    inode = btrfs.identity_of(content)
                    record = replace(record, claimed=True, content_inode=inode)
                    ready = replace(record, phase=Phase.READY)
                    show = held.enter_context(store.volumes.drafted(ready))
                    # The claim reaches the disk before the directory: after a crash, an empty directory of that name is known to be ours.
                    claim(record)
                    # Its name in staging may be lost in a crash: nobody looks for it there.
                    files.order_directory(content)
                if not claimed_before:
                    try:
                        make_exclusively(parent, name, store.remote_maker)
                    except FileExistsError:
                        unclaimed = replace(record, claimed=False, content_inode=None)
                        store.volumes.replace(unclaimed, self._fence.gate(store, store.volumes, record))
                        raise _exists(store, record.directory) from None
                self._fence.require(store, store.volumes, record)
                try:
                    files.move_into_place(staging, staged, parent, name)
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    raise InvalidArgument(
                        f"directory {quoted(record.directory)}: what it lies in hands on a project id (chattr +P), so it takes in no volume that "
                        "has one of its own; choose another `directory`"
                    ) from error
                show(self._gate(store, record, parent, staging))
        return ready

    def make_ready(self, store: PoolStore, record: VolumeRecord) -> VolumeRecord:
        """Say that a volume, whose content came into its place before a crash, is ready. Returns the record as it now is."""
        with store.open_parent(record.directory) as (parent, _), store.open(STAGING) as staging:
            return store.volumes.replace(replace(record, phase=Phase.READY), self._gate(store, record, parent, staging))

    @contextmanager
    def _gate(self, store: PoolStore, record: VolumeRecord, *directories: int) -> Iterator[None]:
        """The gate (files.py) of a record that says ready: what it says of these directories reaches the disk before it does."""
        for directory in directories:
            files.order_directory(directory)
        with self._fence.gate(store, store.volumes, record):
            yield

    @contextmanager
    def hold_own(self, store: PoolStore, record: VolumeRecord) -> Iterator[bool]:
        """Tell whether a volume whose record is in the trash still lies in its place, and keep others from taking the place meanwhile.

        An inode's number is given again once its owner is gone, so another volume may have it, in the same place: its record says so.
        Raises OperationPending, RecordDamaged (what cannot be read might be that one's).
        """
        with self._hold_place(store, record.directory):
            try:
                with store.open_volume(record.directory) as top:
                    inode = btrfs.identity_of(top)
            except NotFound:
                yield False
                return
            own = inode == record.content_inode
            for other in store.volumes.each():
                if isinstance(other, RecordDamaged):
                    raise other
                own = own and (other.directory, other.content_inode) != (record.directory, inode)
            yield own

    def release_claim(self, store: PoolStore, record: VolumeRecord) -> None:
        """Remove the empty directory that a creation which now fails had claimed, if the creation is still the caller's."""
        if not record.claimed:
            return
        try:
            with self._hold_place(store, record.directory), store.open_parent(record.directory) as (parent, name):
                if not self._may_be_anothers(store, record):
                    self._fence.require(store, store.volumes, record)  # all records were read meanwhile
                    os.rmdir(name, dir_fd=parent)
        except (OperationPending, OSError):
            return  # somebody makes it his, it is not empty, or not there: not ours to remove

    def _check_free(self, store: PoolStore, record: VolumeRecord, parent: int, name: str) -> bool:
        """Return whether the name is taken by our own empty claim from before a crash; raise where it is anybody else's."""
        if not exists_at(parent, name):
            return False
        if not (record.claimed and _is_empty_directory(parent, name)):
            _require_no_deletion(store, record.directory)
            raise _exists(store, record.directory)
        if self._may_be_anothers(store, record):
            raise _exists(store, record.directory)
        return True

    @staticmethod
    def _may_be_anothers(store: PoolStore, record: VolumeRecord) -> bool:
        # We had claimed the name before a crash, but another volume may have taken it since; a damaged record might be that one's.
        return any(
            isinstance(other, RecordDamaged) or (other.id != record.id and other.directory == record.directory)
            for other in store.volumes.each()
        )

    @contextmanager
    def _hold_place(self, store: PoolStore, directory: str) -> Iterator[None]:
        """Keep others from making this directory, or one above it, a volume at the same moment. Raises OperationPending."""
        with ExitStack() as held:
            held.enter_context(self._locks.hold(store, place_lock(directory)))
            for parent in parents_of(directory):
                held.enter_context(self._locks.hold(store, place_lock(parent), shared=True))
            yield


def _require_no_deletion(store: PoolStore, directory: str) -> None:
    """Raise OperationPending where a directory is that of a volume that is on its way out: the name will be free."""
    deleting = (record for record in store.volumes.readable() if record.phase is Phase.DELETING)
    if any(record.directory == directory for record in chain(deleting, volumes_being_deleted(store))):
        raise OperationPending(
            f"directory {quoted(directory)} of pool {store.name} is that of a volume whose deletion is not complete; try again"
        )


def _exists(store: PoolStore, directory: str) -> InvalidArgument:
    return InvalidArgument(
        f"directory {quoted(directory)} exists already in pool {store.name}: an existing directory is never taken for a new volume; "
        "choose another `directory`, or offer this one as a static volume"
    )


def _is_empty_directory(parent: int, name: str) -> bool:
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        return False
    directory = os.open(name, _DIRECTORY, dir_fd=parent)
    try:
        return not os.listdir(directory)
    finally:
        os.close(directory)
