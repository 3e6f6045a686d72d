"""Snapshots: complete copies of a volume's content, cut once and never changed.

A snapshot stands on its own: its source may be deleted, and it may be deleted, without harm to the other.
"""

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace

from csi_driver.errors import AlreadyExists, InvalidArgument, NotFound, RecordDamaged, ResourceExhausted, quoted
from csi_driver.linux import files
from csi_driver.volumes.answers import Snapshot
from csi_driver.volumes.attempts import trash_staging
from csi_driver.volumes.captures import HoldToSource, consistency_of
from csi_driver.volumes.contents import Contents
from csi_driver.volumes.fencing import Fence
from csi_driver.volumes.finality import may_be_left, take_back
from csi_driver.volumes.handles import SNAPSHOT, parse_handle
from csi_driver.volumes.jobs import JobControl, Jobs
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.lookup import is_shown
from csi_driver.volumes.model import CaptureReport, ContentSource, Phase, SnapshotRecord, SourceKind, VolumeRecord
from csi_driver.volumes.paging import take_page
from csi_driver.volumes.pool_layout import new_token
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.removal import SnapshotRemoval
from csi_driver.volumes.requests import CreateSnapshot, Page
from csi_driver.volumes.snapshot_places import SnapshotPlaces
from csi_driver.volumes.sources import Sources
from csi_driver.volumes.trash import discard_snapshot_data
from csi_driver.volumes.verification import Verifier


class Snapshots:
    """The SnapshotService (services.py)."""

    def __init__(
        self,
        pools: Pools,
        locks: KeyedLocks,
        jobs: Jobs,
        contents: Contents,
        places: SnapshotPlaces,
        sources: Sources,
        removal: SnapshotRemoval,
        verifier: Verifier,
    ) -> None:
        self._pools = pools
        self._locks = locks
        self._jobs = jobs
        self._contents = contents
        self._places = places
        self._sources = sources
        self._removal = removal
        self._verifier = verifier
        self._fence = Fence(locks, "snapshot")

    # --- create -------------------------------------------------------------------------------------------------------------------

    def create(self, request: CreateSnapshot, deadline: float) -> Snapshot:
        """Cut a snapshot, or return the one that this request cut before.

        Raises AlreadyExists for a name that another source took, NotFound (source), OperationPending while the copy runs.
        """
        snapshot = self._create(request, deadline)
        if request.requisite == (snapshot.topology,):
            # Told nothing that it did not ask for: csi-sanity compares this answer with its own request byte count by byte count.
            return replace(snapshot, topology=None)
        return snapshot

    def _create(self, request: CreateSnapshot, deadline: float) -> Snapshot:
        found = self._find_name(request.name, request.source_handle)
        if found is not None and found[1].phase is Phase.READY:
            with may_be_left(f"snapshot {found[1].handle}"):
                found[0].snapshots.settle()
            return show(*found)
        # What was cut off is completed or taken back even if the source has gone meanwhile.
        store = found[0] if found is not None else self._sources.volume(request.source_handle)[0]
        if not store.reachable_from(request.requisite):
            raise ResourceExhausted(
                f"volume {request.source_handle} and its snapshots can only be reached from {dict(store.backend.topology() or {})}"
            )
        record_id = store.id_of(SNAPSHOT, request.name)
        made = self._jobs.run(record_id, lambda job: self._create_locked(store, record_id, request, job), deadline)
        _require_same(made.record, request.source_handle)  # the job may have been another request's, of the same name
        return made

    def _find_name(self, name: str, source_handle: str) -> tuple[PoolStore, SnapshotRecord] | None:
        source = parse_handle(source_handle)
        for store in self._pools:
            record_id, is_own = store.id_of(SNAPSHOT, name), source is not None and source.pool == store.name
            record = store.snapshots.get(record_id) if is_own else store.glance(store.snapshots, record_id)
            if record is None:
                continue
            _require_same(record, source_handle)
            return store, record
        return None

    def _create_locked(self, store: PoolStore, record_id: str, request: CreateSnapshot, job: JobControl) -> Snapshot:
        with self._locks.hold(store, f"snapshot:{record_id}"):
            record = store.snapshots.get(record_id)
            if record is None:
                _, source = self._sources.volume(request.source_handle)
                record = self.begin(store, record_id, request.name, source, None)
            elif record.phase is Phase.CREATING:
                # Also one that is cut: who cut it may still read it for its digests.
                with may_be_left(f"snapshot {record.handle}"):
                    record = self._fence.take_over(store, store.snapshots, record)
            if record.phase is Phase.CREATING:
                return show(store, self._complete(store, record, job, digests=request.digests))
            with may_be_left(f"snapshot {record.handle}"):
                store.snapshots.settle()
            return show(store, record)

    def _complete(self, store: PoolStore, record: SnapshotRecord, job: JobControl, *, digests: bool) -> SnapshotRecord:
        """Cut and place a snapshot and make it ready; where one of the first two fails, nothing is left of it (but see `_undo`)."""
        with ExitStack() as drafts:
            try:
                record = self.cut(store, record, job)
                if digests:
                    record = self._verifier.digest(store, self.place(store, record), job)
                ready = replace(record, phase=Phase.READY)
                # What can be written down before the last steps goes to the disk with them.
                show_ready = drafts.enter_context(store.snapshots.drafted(ready))
                if not digests:
                    self.place(store, record)
            except BaseException as error:  # noqa: BLE001 - raised again
                take_back(error, lambda: self._undo(store, record, job), f"snapshot {record.handle}")
            with may_be_left(f"snapshot {record.handle}"):
                show_ready(self._fence.gate(store, store.snapshots, record))
        return ready

    def _undo(self, store: PoolStore, record: SnapshotRecord, job: JobControl) -> bool:
        """Take back a snapshot whose making failed, and tell whether nothing is left.

        Where the driver stops, one that is in its place stays, as after a kill: the retry makes its digests, and cuts nothing later.
        """
        if job.shutdown and self.is_cut(store, record):
            return False
        return self.give_up(store, record.id, record.token)

    # --- the steps, which group snapshots share -------------------------------------------------------------------------------------

    def begin(
        self, store: PoolStore, record_id: str, name: str, source: VolumeRecord, group_handle: str | None
    ) -> SnapshotRecord:
        """Write the record of a snapshot that is about to be cut. The caller holds the snapshot's lock."""
        self._removal.complete(store, record_id)
        record = SnapshotRecord(
            id=record_id,
            handle=store.handle_of(record_id),
            name=name,
            driver=store.driver,
            pool=store.name,
            token=new_token(),
            phase=Phase.CREATING,
            created_at_ns=time.time_ns(),
            source_handle=source.handle,
            size_bytes=source.capacity_bytes,
            group_handle=group_handle,
            form=source.form,
        )
        with may_be_left(f"snapshot {record.handle}"):
            added = store.snapshots.add(record, self._locks.gate(store, f"snapshot:{record_id}"), files.order_directory)
        if not added:
            raise AlreadyExists(f"snapshot {quoted(name)} is being made by another controller")
        return record

    def is_cut(self, store: PoolStore, record: SnapshotRecord) -> bool:
        """Tell whether the content of a snapshot is in its place: it gets there complete or not at all."""
        return self._places.has_content(store, record.id)

    def cut(self, store: PoolStore, record: SnapshotRecord, job: JobControl) -> SnapshotRecord:
        """Make the content of a snapshot that is `creating`, out of sight in staging; `place` must follow."""
        if self._places.has_content(store, record.id):
            return record  # in place before a crash: content gets there complete or not at all
        origin = ContentSource(SourceKind.VOLUME, record.source_handle)
        with self._sources.hold(origin) as source:
            cut_at = time.time_ns()  # after a crash it is cut anew, and later
            hold = HoldToSource(lambda: self._sources.most_bytes_of(record.source_handle))
            report = self._contents.copy(store, record.id, record.token, source, None, job, hold)
            size = self._contents.size_of_staged(store, record) or self._least_bytes(record, report)
        return replace(
            record, capture=report, size_bytes=size, created_at_ns=cut_at, consistency=consistency_of(report, record.form)
        )

    def _least_bytes(self, record: SnapshotRecord, report: CaptureReport) -> int:
        """Return how many bytes a restore of a directory needs.

        Asked after the cut: the volume may have grown meanwhile, and more may be in the snapshot than it was allowed before. Where what
        is restored is held to its size, it must be large enough for what was copied.
        """
        _, volume = self._sources.volume(record.source_handle)
        is_held = volume.limit is not None and volume.limit.mark is not None
        return max(volume.capacity_bytes, (report.bytes or 0) if is_held else 0)

    def place(self, store: PoolStore, record: SnapshotRecord) -> SnapshotRecord:
        """Move what was cut into its place; it stays `creating` until the caller says `ready`."""
        if self._places.has_content(store, record.id):
            self._places.seal(store, record.id)
            return record
        self._places.place(store, record)
        return record

    def make_ready(self, store: PoolStore, record: SnapshotRecord) -> SnapshotRecord:
        """Say that a snapshot that is in its place is ready. Returns the record as it now is. Raises LockLost."""
        return self._places.make_ready(store, record)

    def give_up(self, store: PoolStore, record_id: str, token: str = "") -> bool:
        """Take back a snapshot that never became ready, and tell whether nothing is left.

        Only who holds the snapshot's lock may; `token` is that of the attempt, where its caller knows it.
        """
        current = store.snapshots.get(record_id)
        anothers = token and current is not None and (current.phase is Phase.READY or current.token != token)
        if anothers or not self._locks.is_held(store, f"snapshot:{record_id}"):
            if token:
                trash_staging(store, record_id, token)
            return False
        trash_staging(store, record_id, token)
        self._locks.require(store, f"snapshot:{record_id}")
        discard_snapshot_data(store, record_id)
        self._locks.require(store, f"snapshot:{record_id}")
        store.snapshots.remove(record_id)
        return True

    # --- read ---------------------------------------------------------------------------------------------------------------------

    def get(self, handle: str) -> Snapshot:
        """Return a snapshot. Raises NotFound."""
        located = self._pools.locate(handle)
        record = located[0].snapshots.get(located[1]) if located else None
        if located is None or record is None or not is_shown(located[0], record):
            raise NotFound(f"snapshot {quoted(handle)} does not exist")
        return show(located[0], record)

    def list(self, page: Page, snapshot_handle: str, source_handle: str) -> tuple[Sequence[Snapshot], str]:
        """Return one page of snapshots, ordered by pool and id, and the token of the next page.

        A filter that names nothing gives an empty list (CSI spec "ListSnapshots Errors").
        """
        if snapshot_handle:
            return self._list_one(snapshot_handle, source_handle), ""

        def read(store: PoolStore, ids: list[str]) -> Iterable[Snapshot]:
            for record in store.snapshots.each(ids):
                if isinstance(record, RecordDamaged) or not is_shown(store, record):
                    continue
                if not source_handle or record.source_handle == source_handle:
                    yield show(store, record)

        return take_page(self._pools, page, lambda store: store.snapshots.ids(), read, lambda snapshot: snapshot.record.id)

    def _list_one(self, handle: str, source_handle: str) -> Sequence[Snapshot]:
        try:
            snapshot = self.get(handle)
        except NotFound:
            return []
        return [snapshot] if not source_handle or snapshot.record.source_handle == source_handle else []

    # --- delete -------------------------------------------------------------------------------------------------------------------

    def delete(self, handle: str) -> None:
        """Delete a snapshot; one that does not exist is deleted already.

        Raises InvalidArgument for a member of a group, FailedPrecondition while a restore reads it or where it is another node's.
        """
        located = self._pools.locate(handle)
        if located is None:
            return
        store, record_id = located
        self._jobs.cancel(record_id)
        with self._locks.hold(store, f"snapshot:{record_id}"):
            self._removal.complete(store, record_id)
            record = store.snapshots.get(record_id)
            if record is None:
                return
            if record.group_handle is not None:
                raise InvalidArgument(
                    f"snapshot_id is {quoted(handle)}: it belongs to group snapshot {record.group_handle} and goes with it (DeleteVolumeGroupSnapshot)"
                )
            self._removal.remove(store, record)


def _require_same(record: SnapshotRecord, source_handle: str) -> None:
    if record.source_handle != source_handle:
        raise AlreadyExists(f"snapshot {quoted(record.name)} exists as {record.handle}, of volume {record.source_handle}")


def show(store: PoolStore, record: SnapshotRecord) -> Snapshot:
    """Give a record with the place from which it can be reached."""
    return Snapshot(record, store.backend.topology())
