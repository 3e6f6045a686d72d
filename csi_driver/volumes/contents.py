"""Making content: built out of sight in `staging/`, complete and on disk.

Nobody ever sees half a volume: until what was built is moved into its place (volume_places.py, snapshot_places.py) it has no name that a
tenant can mount. A crash leaves a staging directory, which the retry or the sweeper throws away (attempts.py).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from csi_driver.errors import FailedPrecondition, OutOfRange
from csi_driver.linux import beneath
from csi_driver.linux.trees import apply_owner_and_mode
from csi_driver.volumes.attempts import open_staged, staging_name, trash_staging
from csi_driver.volumes.captures import AT_ONCE, Captures, Hold, HoldNothing
from csi_driver.volumes.images import forget_holder, image_size, in_use, look_at_image, make_image, resize_image
from csi_driver.volumes.jobs import JobControl
from csi_driver.volumes.model import (
    A_DIRECTORY,
    CaptureReport,
    Form,
    Layout,
    Ownership,
    SnapshotRecord,
    SourceKind,
    VolumeRecord,
)
from csi_driver.volumes.pool_layout import SNAPSHOT_DATA, STAGING
from csi_driver.volumes.pool_store import PoolStore

_NEW_VOLUME_MODE = 0o755
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
    """Builds content."""

    def __init__(self, captures: Captures) -> None:
        self._captures = captures

    def make_empty(self, store: PoolStore, record: VolumeRecord, hold: Hold) -> None:
        """Make an empty directory in staging, held to its size and owned as the class asks for, or one that holds an empty image."""
        with store.open(STAGING) as staging:
            name = staging_name(record.id, record.token)
            self._captures.make_empty(store, staging, name, hold)
            if record.form.layout is Layout.IMAGE:
                with open_staged(staging, name) as top:
                    make_image(top, record.form, record.capacity_bytes, record.ownership)
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
        with self.open(source) as origin, store.open(STAGING) as staging:
            job.begin("copying", source.bytes)
            if source.form.layout is Layout.IMAGE:
                return self._copy_image(store, origin, staging, name, source.origin, job, size_bytes)
            report = self._captures.capture(store, origin, staging, name, source.origin, job, hold or HoldNothing())
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
        with open_staged(staging, name) as top:
            forget_holder(top)
            size = image_size(top)
            if size_bytes and size > size_bytes:  # it has grown since the size was chosen
                raise OutOfRange(
                    f"the image of the content source has {size} bytes by now, but the volume is to have {size_bytes}"
                )
            resize_image(top, size_bytes)
            os.fsync(top)
        return report

    def size_of_staged(self, store: PoolStore, record: SnapshotRecord) -> int | None:
        """Return the bytes of the image that was captured for a snapshot; None of a directory, which has no size of its own."""
        if record.form.layout is not Layout.IMAGE:
            return None
        name = staging_name(record.id, record.token)
        with store.open(STAGING) as staging, open_staged(staging, name) as top:
            return image_size(top)

    @contextmanager
    def open(self, source: Source) -> Iterator[int]:
        """Open what a source holds. Raises FailedPrecondition when it is missing."""
        try:
            content = _open_source(source)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FailedPrecondition(
                f"the content of {source.kind} {source.record_id} is missing from pool {source.store.name}"
            ) from error
        try:
            yield content
        finally:
            os.close(content)

    def _dress(self, staging: int, name: str, ownership: Ownership) -> None:
        with open_staged(staging, name) as top:
            apply_owner_and_mode(top, ownership.uid, ownership.gid, ownership.mode)

    def resize(self, store: PoolStore, record: VolumeRecord) -> None:
        """Make what holds the volume as large as its record says; a directory has no size. Raises OSError, NotFound."""
        if record.form.layout is Layout.IMAGE:
            with store.open_volume(record.directory) as top:
                resize_image(top, record.capacity_bytes)


def _open_source(source: Source) -> int:
    if source.kind is SourceKind.SNAPSHOT:
        with source.store.open(SNAPSHOT_DATA) as data:
            return os.open(source.record_id, _DIRECTORY, dir_fd=data)
    with source.store.open_root() as root:
        return beneath.open_beneath(root, source.directory, _DIRECTORY)
