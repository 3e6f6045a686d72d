"""Verification: does a snapshot still hold what it held when its digests were made?

Storage below us makes most snapshots without showing us a byte, so digests are made by reading: at once where the
VolumeSnapshotClass says `digests: "true"`, otherwise by the first `tatami snapshots verify`. From then on each verification, and each
restore of a class with `verify: "true"`, reads the snapshot again and compares.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

from csi_driver.errors import FailedPrecondition, LockLost, OperationPending
from csi_driver.linux.priorities import stand_back
from csi_driver.volumes.contents import Contents, Source
from csi_driver.volumes.fencing import Fence
from csi_driver.volumes.handles import SNAPSHOT
from csi_driver.volumes.jobs import JobControl
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.manifests import MOST_DIFFERENCES, Difference, Manifest, read_manifest
from csi_driver.volumes.model import ContentSource, ManifestSummary, SnapshotRecord, SourceKind
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.records import Gate
from csi_driver.volumes.sources import Sources
from csi_driver.volumes.turns import Turns

_PATIENCE_SECONDS = 10.0  # whoever else locks a snapshot (a deletion that is refused) holds it for a moment


@dataclass(frozen=True)
class Verification:
    """What a look at a snapshot gave. `first`: there was nothing to compare with; where all could be read, now there is."""

    record: SnapshotRecord
    summary: ManifestSummary
    first: bool
    differences: tuple[Difference, ...]

    @property
    def whole(self) -> bool:
        return not self.differences


class Verifier:
    """Makes and compares digests of snapshots."""

    def __init__(self, locks: KeyedLocks, contents: Contents, sources: Sources, turns: Turns) -> None:
        self._locks = locks
        self._contents = contents
        self._sources = sources
        self._turns = turns
        self._fence = Fence(locks, SNAPSHOT)

    def verify(self, handle: str, job: JobControl) -> Verification:
        """Read a snapshot and compare it with its digests, or make them where there are none.

        Nobody can delete it meanwhile. Raises NotFound, OperationPending, RecordDamaged, OSError.
        """
        with self._sources.hold(ContentSource(SourceKind.SNAPSHOT, handle)) as source:
            record = self._record(source)
            with self._read(source, record, job) as found:
                if record.manifest is None:
                    if found.unreadable:  # what cannot be read is no measure of anything
                        return Verification(record, found.summary, True, found.unreadable)
                    return Verification(self._keep_alone(source, found), found.summary, True, ())
                differences = tuple(islice(found.differences(record.id, record.manifest), MOST_DIFFERENCES))
                return Verification(record, found.summary, False, differences)

    def digest(self, store: PoolStore, record: SnapshotRecord, job: JobControl) -> SnapshotRecord:
        """Make the digests of a snapshot that was just cut; the caller holds its lock. Returns the record as it now is.

        Raises FailedPrecondition where the disk does not give back what was to be captured.
        """
        with self._read(Source(store, SourceKind.SNAPSHOT, record.id), record, job) as found:
            if found.unreadable:
                shown = ", ".join(each.path for each in found.unreadable[:3])
                raise FailedPrecondition(f"volume {record.source_handle} is damaged, the disk does not give back: {shown}")
            return self._keep(store, record, found, lambda: self._fence.gate(store, store.snapshots, record))

    def require_whole(self, source: Source, job: JobControl) -> None:
        """Let a snapshot that the caller holds be used only if it is what it was. Raises FailedPrecondition."""
        if source.kind is not SourceKind.SNAPSHOT:
            return
        record = self._record(source)
        if record.manifest is None:
            raise FailedPrecondition(
                f"snapshot {record.handle} has no digests to verify it by: make them with `tatami snapshots verify {record.handle}`, or "
                'take snapshots of a VolumeSnapshotClass with `digests: "true"`'
            )
        with self._read(source, record, job) as found:
            differences = tuple(islice(found.differences(record.id, record.manifest), 3))
        if differences:
            shown = ", ".join(f"{each.path} ({each.what})" for each in differences)
            raise FailedPrecondition(f"snapshot {record.handle} is damaged, nothing was restored from it: {shown}")

    @contextmanager
    def _read(self, source: Source, record: SnapshotRecord, job: JobControl) -> Iterator[Manifest]:
        captured = record.capture.bytes if record.capture else None  # without holes, which are not read
        job.begin("verifying", captured if captured is not None else record.manifest.bytes if record.manifest else None)
        with self._contents.open(source) as content, self._turns.take(source.store.name, record.source_handle, job):
            stand_back()
            with read_manifest(source.store, content, job) as found:
                yield found

    def _keep_alone(self, source: Source, found: Manifest) -> SnapshotRecord:
        """Keep what took long to make, also where somebody else looks at the snapshot at this moment. Raises OperationPending."""
        until = time.monotonic() + _PATIENCE_SECONDS
        key = f"snapshot:{source.record_id}"
        while True:
            try:
                with self._locks.hold(source.store, key):
                    return self._keep(source.store, self._record(source), found, lambda: self._locks.gate(source.store, key))
            except LockLost:
                raise  # the snapshot may be another by now
            except OperationPending:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    @staticmethod
    def _keep(store: PoolStore, record: SnapshotRecord, found: Manifest, gate: Callable[[], Gate]) -> SnapshotRecord:
        found.keep(record.id, gate())
        return store.snapshots.replace(replace(record, manifest=found.summary), gate())

    @staticmethod
    def _record(source: Source) -> SnapshotRecord:
        record = source.store.snapshots.get(source.record_id)
        if record is None:
            raise FailedPrecondition(f"snapshot {source.record_id} has gone from pool {source.store.name}")
        return record
