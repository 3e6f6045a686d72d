"""Making content: built out of sight in `staging/`, complete and on disk, then moved into place in one step.

Nobody ever sees half a volume: until the move the content has no name that a tenant can mount, and after it the content is whole.
A crash in between leaves a staging directory, which the retry or the sweeper throws away.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Self

from csi_driver.errors import (
    FailedPrecondition,
    InvalidArgument,
    LockLost,
    NotFound,
    OperationPending,
    OutOfRange,
    RecordDamaged,
    quoted,
)
from csi_driver.linux import btrfs, files
from csi_driver.linux.system_calls import InodeReader
from csi_driver.linux.trees import apply_owner_and_mode
from csi_driver.volumes.attempts import staging_name, trash_staging
from csi_driver.volumes.captures import Captures, Hold, HoldNothing
from csi_driver.volumes.fencing import Fence
from csi_driver.volumes.images import AT_ONCE, forget_holder, image_size, in_use, look_at_image, make_image, resize_image
from csi_driver.volumes.jobs import JobControl
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import (
    A_DIRECTORY,
    CaptureReport,
    Form,
    Layout,
    Ownership,
    Phase,
    SnapshotRecord,
    SourceKind,
    VolumeRecord,
)
from csi_driver.volumes.parents import mark_made, place_lock
from csi_driver.volumes.pool_layout import SNAPSHOT_DATA, STAGING, exists_at
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.trash import volumes_being_deleted

_NEW_VOLUME_MODE = 0o755
_PARENT_MODE = 0o711  # to go through, as an NFS client whose root is squashed must, and not to see whose volumes are there
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Source:
    """Content that exists: a volume's `directory` (relative to the root), or a snapshot's id."""

    store: PoolStore
    kind: SourceKind
    record_id: str
    directory: str = ""
    bytes: int | None = None  # how much it holds, where that is known
    form: Form = A_DIRECTORY
    origin: str = ""  # the handle of the volume that it comes from: for whom others wait in line (turns.py)


def content_key(record_id: str) -> str:
    """Name the lock that a capture shares and a deletion needs alone."""
    return f"content:{record_id}"


class Contents:
    """Builds content and moves it into place."""

    def __init__(self, locks: KeyedLocks, captures: Captures) -> None:
        self._locks = locks
        self._captures = captures
        self._volume_fence, self._snapshot_fence = Fence(locks, "volume"), Fence(locks, "snapshot")
        # Parents of templated directories that were seen to be no volume: a parent stays none for as long as it exists.
        self._known_parents: set[tuple[str, str, int, tuple[int, int]]] = set()

    # --- build --------------------------------------------------------------------------------------------------------------------

    def make_empty(self, store: PoolStore, record: VolumeRecord, hold: Hold) -> None:
        """Make an empty directory in staging, held to its size and owned as the class asks for, or one that holds an empty image."""
        with store.open(STAGING) as staging:
            name = staging_name(record.id, record.token)
            self._captures.make_empty(store, staging, name, hold)
            if record.form.layout is Layout.IMAGE:
                with _open_staged(staging, name) as top:
                    make_image(top.fd, record.form, record.capacity_bytes, record.ownership)
                self._dress(staging, name, Ownership())
                return
            mode = _NEW_VOLUME_MODE if record.ownership.mode is None else record.ownership.mode
            self._dress(staging, name, replace(record.ownership, mode=mode))

    def copy(
        self,
        store: PoolStore,
        record_id: str,
        token: str,
        source: Source,
        ownership: Ownership | None,
        job: JobControl,
        hold: Hold | None = None,
        size_bytes: int = 0,
    ) -> CaptureReport:
        """Copy `source`, which the caller holds (sources.py), into staging, all of it or nothing, and bring it to disk.

        An image is made at least `size_bytes` large; its filesystem keeps the owner that it has. Raises FailedPrecondition when the
        content is missing, or an image that a node has and that this pool cannot capture at once, OutOfRange for one that is larger,
        JobCancelled, OSError (ENOSPC, EIO).
        """
        trash_staging(store, record_id)  # of earlier attempts; one that is still at work lost its lock, and ends when it asks
        name = staging_name(record_id, token)
        with _open_source(source) as origin, store.open(STAGING) as staging:
            job.begin("copying", source.bytes)
            if source.form.layout is Layout.IMAGE:
                return self._copy_image(store, origin.fd, staging, name, source.origin, job, size_bytes)
            report = self._captures.capture(store, origin.fd, staging, name, source.origin, job, hold or HoldNothing())
            self._dress(staging, name, ownership or Ownership())
        return report

    def _copy_image(
        self, store: PoolStore, origin: int, staging: int, name: str, from_volume: str, job: JobControl, size_bytes: int
    ) -> CaptureReport:
        """Copy an image: at once where a node has it, for a copy bit by bit would be of no moment at all."""
        before = look_at_image(origin)
        if before.held and self._captures.abilities_of(store).best not in AT_ONCE:
            raise in_use(store.name)
        report = self._captures.capture(store, origin, staging, name, from_volume, job, HoldNothing())
        if report.method not in AT_ONCE and (before.held or look_at_image(origin) != before):
            trash_staging(store, *name.split(".", 1))
            raise in_use(store.name)
        with _open_staged(staging, name) as top:
            forget_holder(top.fd)
            size = image_size(top.fd)
            if size_bytes and size > size_bytes:  # it has grown since the size was chosen
                raise OutOfRange(
                    f"the image of the content source has {size} bytes by now, but the volume is to have {size_bytes}"
                )
            resize_image(top.fd, size_bytes)
            os.fsync(top.fd)
        return report

    def size_of_staged(self, store: PoolStore, record: SnapshotRecord) -> int | None:
        """Return the bytes of the image that was captured for a snapshot; None of a directory, which has no size of its own."""
        if record.form.layout is not Layout.IMAGE:
            return None
        name = staging_name(record.id, record.token)
        with store.open(STAGING) as staging, _open_staged(staging, name) as top:
            return image_size(top.fd)

    @contextmanager
    def open(self, source: Source) -> Iterator[int]:
        """Open what a source holds. Raises FailedPrecondition when it is missing."""
        with _open_source(source) as content:
            yield content.fd

    def _dress(self, staging: int, name: str, ownership: Ownership) -> None:
        with _open_staged(staging, name) as top:
            apply_owner_and_mode(top.fd, ownership.uid, ownership.gid, ownership.mode)

    def resize(self, store: PoolStore, record: VolumeRecord) -> None:
        """Make what holds the volume as large as its record says; a directory has no size. Raises OSError, NotFound."""
        if record.form.layout is Layout.IMAGE:
            with store.open_volume(record.directory) as top:
                resize_image(top, record.capacity_bytes)

    def discard(self, store: PoolStore, record_id: str, token: str = "") -> None:
        """Throw away what is being built for `record_id`, by the attempt with this token or by all."""
        trash_staging(store, record_id, token)

    # --- move into place ----------------------------------------------------------------------------------------------------------

    def is_in_place(self, store: PoolStore, record: VolumeRecord) -> bool:
        """Tell whether the content of a volume that is being created was moved into place before a crash."""
        if not record.claimed or record.content_inode is None:
            return False
        try:
            with store.open_volume(record.directory) as top:
                return btrfs.identity_of(top) == record.content_inode
        except NotFound:
            return False

    def place_volume(
        self, store: PoolStore, record: VolumeRecord, claim: Callable[[VolumeRecord], VolumeRecord]
    ) -> VolumeRecord:
        """Move built content to the volume's directory, which must not exist, and make it ready. Returns the record as it now is.

        `claim` writes the record that claims the directory: a new one, or in place of the one that there is. It needs to last no sooner
        than what comes after it. The record that says ready is written down before: one commit of a journal takes both to the disk,
        and a second one the claim, the directory and the readiness, in this order.

        Raises InvalidArgument for a directory that exists already (it is never adopted) or lies inside another volume.
        """
        with self._hold_place(store, record.directory):
            self._make_parents(store, record.directory)
            with store.open_parent(record.directory) as (parent, name), store.open(STAGING) as staging, ExitStack() as held:
                staged = staging_name(record.id, record.token)
                claimed_before = self._check_free(store, record, parent, name)
                with _open_staged(staging, staged) as content:
                    inode = btrfs.identity_of(content.fd)
                    record = replace(record, claimed=True, content_inode=inode)
                    ready = replace(record, phase=Phase.READY)
                    show = held.enter_context(store.volumes.drafted(ready))
                    # The claim reaches the disk before the directory: after a crash, an empty directory of that name is known to be ours.
                    claim(record)
                    # Its name in staging may be lost in a crash: nobody looks for it there.
                    files.order_directory(content.fd)
                if not claimed_before:
                    try:
                        os.mkdir(name, 0o700, dir_fd=parent)
                    except FileExistsError:
                        store.volumes.replace(replace(record, claimed=False, content_inode=None))
                        raise _exists(store, record.directory) from None
                self._volume_fence.require(store, store.volumes, record)
                try:
                    files.move_into_place(staging, staged, parent, name)
                except OSError as error:
                    if error.errno != errno.EXDEV:
                        raise
                    raise InvalidArgument(
                        f"directory {quoted(record.directory)}: what it lies in hands on a project id (chattr +P), so it takes in no volume that "
                        "has one of its own; choose another `directory`"
                    ) from error
                self._show_ready(store, record, lambda: show(_ordered(parent, staging)))
        return ready

    def _show_ready(self, store: PoolStore, record: VolumeRecord, show: Callable[[], None]) -> None:
        self._volume_fence.require(store, store.volumes, record)
        show()

    def make_ready(self, store: PoolStore, record: VolumeRecord) -> VolumeRecord:
        """Say that a volume, whose content came into its place before a crash, is ready. Returns the record as it now is."""
        self._volume_fence.require(store, store.volumes, record)
        with store.open_parent(record.directory) as (parent, _), store.open(STAGING) as staging:
            return store.volumes.replace(replace(record, phase=Phase.READY), _ordered(parent, staging))

    def place_snapshot(self, store: PoolStore, record: SnapshotRecord) -> None:
        """Write the record of what was built, and move it to the snapshot's place. Raises LockLost.

        It lasts there as soon as the record that says ready does.
        """
        record_id, name = record.id, staging_name(record.id, record.token)
        self._snapshot_fence.require(store, store.snapshots, record)
        store.snapshots.replace(record, settle=files.order_directory)
        with store.open(STAGING) as staging, store.open(SNAPSHOT_DATA) as data:
            with _open_staged(staging, name) as content:
                files.order_directory(content.fd)
            self._snapshot_fence.require(store, store.snapshots, record)
            os.rename(name, record_id, src_dir_fd=staging, dst_dir_fd=data)
            files.order_directory(data)
            files.order_directory(staging)
        self.seal_snapshot(store, record_id)

    def seal_snapshot(self, store: PoolStore, record_id: str) -> None:
        """Make a snapshot that is a subvolume read-only; only then, for what is read-only cannot be moved into place."""
        with store.open(SNAPSHOT_DATA) as data, _Descriptor(os.open(record_id, _DIRECTORY, dir_fd=data)) as content:
            btrfs.set_read_only(content.fd, read_only=True)

    def has_snapshot(self, store: PoolStore, record_id: str) -> bool:
        """Tell whether a snapshot's content is in place: it gets there complete or not at all."""
        with store.open(SNAPSHOT_DATA) as data:
            return exists_at(data, record_id)

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
        """Remove the empty directory that a creation which now fails had claimed."""
        if not record.claimed:
            return
        try:
            with self._hold_place(store, record.directory), store.open_parent(record.directory) as (parent, name):
                if not self._may_be_anothers(store, record):
                    os.rmdir(name, dir_fd=parent)
        except (OperationPending, OSError):
            return  # somebody makes it his, it is not empty, or not there: not ours to remove

    def _check_free(self, store: PoolStore, record: VolumeRecord, parent: int, name: str) -> bool:
        """Return whether the name is taken by our own empty claim from before a crash; raise where it is anybody else's."""
        if not exists_at(parent, name):
            return False
        if not (record.claimed and _is_empty_directory(parent, name)):
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
            for parent in _parents(directory):
                held.enter_context(self._locks.hold(store, place_lock(parent), shared=True))
            yield

    def _make_parents(self, store: PoolStore, directory: str) -> None:
        parents = _parents(directory)
        if not parents:
            return
        with store.open_root() as root:
            for parent in parents:
                self._check_parent(store, root, parent, directory)
            try:
                made = files.make_directories_beneath(root, parents[-1], _PARENT_MODE, exclusive=False)
            except (NotADirectoryError, FileExistsError) as error:
                raise InvalidArgument(
                    f"directory {quoted(directory)}: a part of it is no directory in pool {store.name}"
                ) from error
            if made:
                mark_made(store, root, made)

    def _check_parent(self, store: PoolStore, root: int, parent: str, directory: str) -> None:
        try:
            descriptor = files.open_beneath(root, parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        except OSError as error:
            raise InvalidArgument(f"directory {quoted(directory)}: {parent} is no directory in pool {store.name}") from error
        with _Descriptor(descriptor) as found:
            status = InodeReader().read(found.fd)
        known = (store.name, parent, status.inode, status.birth)  # an inode's number alone may be given to a volume later
        if known in self._known_parents:
            return
        # A directory inside a volume would belong to that volume's tenant: whatever he likes, he could put in its place.
        for other in chain(store.volumes.readable(), volumes_being_deleted(store)):
            if other.directory == parent:
                raise InvalidArgument(
                    f"directory {quoted(directory)} would lie inside volume {other.handle} ({other.directory}) of pool {store.name}"
                )
        self._known_parents.add(known)


# --- small things -----------------------------------------------------------------------------------------------------------------


class _Descriptor:
    """A file descriptor that closes itself."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


@contextmanager
def _ordered(*directories: int) -> Iterator[None]:
    """The gate (files.py) of a record that speaks of names in these directories: it reaches the disk after them."""
    for directory in directories:
        files.order_directory(directory)
    yield


def _open_staged(staging: int, name: str) -> _Descriptor:
    """Open what this attempt has built. Raises LockLost where it has been thrown away."""
    try:
        return _Descriptor(os.open(name, _DIRECTORY, dir_fd=staging))
    except FileNotFoundError as error:
        raise LockLost(
            f"what was being made as {name} was thrown away: another controller has taken it over; try again"
        ) from error


def _open_source(source: Source) -> _Descriptor:
    try:
        if source.kind is SourceKind.SNAPSHOT:
            with source.store.open(SNAPSHOT_DATA) as data:
                return _Descriptor(os.open(source.record_id, _DIRECTORY, dir_fd=data))
        with source.store.open_root() as root:
            return _Descriptor(files.open_beneath(root, source.directory, _DIRECTORY))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FailedPrecondition(
            f"the content of {source.kind} {source.record_id} is missing from pool {source.store.name}"
        ) from error


def _parents(directory: str) -> list[str]:
    """List the directories above `directory`, topmost first."""
    components = directory.split("/")
    return ["/".join(components[:depth]) for depth in range(1, len(components))]


def _exists(store: PoolStore, directory: str) -> InvalidArgument:
    return InvalidArgument(
        f"directory {quoted(directory)} exists already in pool {store.name}: an existing directory is never taken for a new volume; "
        "choose another `directory`, or offer this one as a static volume"
    )


def _is_empty_directory(parent: int, name: str) -> bool:
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        return False
    with _Descriptor(os.open(name, _DIRECTORY, dir_fd=parent)) as found:
        return not os.listdir(found.fd)
