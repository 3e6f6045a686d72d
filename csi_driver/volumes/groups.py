"""Group snapshots: the snapshots of several volumes, which exist all together or not at all."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from csi_driver.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    LockLost,
    NotFound,
    OperationPending,
    quoted,
)
from csi_driver.volumes.answers import GroupSnapshot
from csi_driver.volumes.captures import FILE_BY_FILE, POINT_IN_TIME
from csi_driver.volumes.fencing import Fence
from csi_driver.volumes.finality import may_be_left, take_back
from csi_driver.volumes.handles import GROUP, SNAPSHOT, parse_handle
from csi_driver.volumes.jobs import JobControl, Jobs
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import ContentSource, GroupRecord, Phase, SnapshotRecord, SourceKind, VolumeRecord
from csi_driver.volumes.pool_layout import new_token
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.removal import SnapshotRemoval
from csi_driver.volumes.snapshots import Snapshots, show
from csi_driver.volumes.sources import Sources
from csi_driver.volumes.trash import begin_deletion, unfinished_deletions

POINT_IN_TIME_EACH = "point in time for each volume, not across volumes"
"""The honest label of a group whose members were cut one right after the other, each in one step."""


class Groups:
    """The GroupService (services.py)."""

    def __init__(
        self, pools: Pools, locks: KeyedLocks, jobs: Jobs, snapshots: Snapshots, sources: Sources, removal: SnapshotRemoval
    ) -> None:
        self._pools = pools
        self._locks = locks
        self._jobs = jobs
        self._snapshots = snapshots
        self._sources = sources
        self._removal = removal
        self._fence = Fence(locks, GROUP)

    def create(self, name: str, source_handles: Sequence[str], deadline: float) -> GroupSnapshot:
        """Cut the snapshots of all sources, or return those that this request cut before.

        Raises AlreadyExists for a name that other sources took, InvalidArgument for sources of several pools, NotFound,
        OperationPending while the copies run.
        """
        wanted = tuple(sorted(set(source_handles)))
        found = self._find_name(name, wanted)
        if found is not None and found[1].phase is Phase.READY:
            with may_be_left(f"group {found[1].handle}"):
                found[0].groups.settle()
            return self._show(*found)
        # What was cut off is completed or taken back even if a source has gone meanwhile.
        store = found[0] if found is not None else self._one_pool([self._sources.volume(handle) for handle in wanted])
        group_id = store.id_of(GROUP, name)
        made = self._jobs.run(group_id, lambda job: self._create_locked(store, group_id, name, wanted, job), deadline)
        _require_same(made.record, wanted)  # the job may have been another request's, of the same name
        return made

    def get(self, handle: str, snapshot_handles: Sequence[str]) -> GroupSnapshot:
        """Return a group. Raises NotFound; InvalidArgument where `snapshot_handles` are given and are not its members."""
        located = self._pools.locate(handle)
        record = located[0].groups.get(located[1]) if located else None
        if located is None or record is None or record.phase is not Phase.READY:
            raise NotFound(f"group snapshot {quoted(handle)} does not exist")
        _require_members(record, snapshot_handles)
        return self._show(located[0], record)

    def delete(self, handle: str, snapshot_handles: Sequence[str]) -> None:
        """Delete a group with its members; one that does not exist is deleted already.

        Raises InvalidArgument for foreign members, FailedPrecondition while a restore reads one.
        """
        located = self._pools.locate(handle)
        if located is None:
            return
        store, group_id = located
        self._jobs.cancel(group_id)
        with self._locks.hold(store, f"group:{group_id}"):
            self.complete_removal(store, group_id)
            record = store.groups.get(group_id)
            if record is None:
                return
            _require_members(record, snapshot_handles)
            self.remove(store, record)

    def remove(self, store: PoolStore, record: GroupRecord) -> None:
        """Delete a group; the caller holds its lock. Raises FailedPrecondition while a restore reads a member."""
        with self._hold_members(store, record) as members:
            deletion = begin_deletion(store, GROUP, store.groups, record.id, self._locks.gate(store, f"group:{record.id}"))
            for member in members:
                self._removal.take(store, member)
        deletion.complete()

    def complete_removal(self, store: PoolStore, group_id: str) -> int:
        """Complete the deletions of this id that were cut off; the caller holds the group's lock. Returns how many there were.

        It comes before a new group of this id: the members of both have the same ids.
        """
        deletions = unfinished_deletions(store, GROUP, group_id)
        for deletion in deletions:
            if (record := deletion.record(store.groups)) is not None:
                with self._hold_members(store, record) as members:
                    for member in members:
                        self._removal.take(store, member)
            deletion.complete()
        return len(deletions)

    @contextmanager
    def _hold_members(self, store: PoolStore, record: GroupRecord) -> Iterator[list[SnapshotRecord]]:
        """Keep everybody from the members that there are. Raises OperationPending, FailedPrecondition."""
        with ExitStack() as held:
            members = []
            for member_id in _member_ids(record):
                held.enter_context(self._locks.hold(store, f"snapshot:{member_id}"))
                self._removal.complete(store, member_id)
                if member := store.snapshots.get(member_id):
                    held.enter_context(self._removal.hold(store, member))
                    members.append(member)
            yield members

    # --- create, step by step -------------------------------------------------------------------------------------------------------

    def _find_name(self, name: str, sources: tuple[str, ...]) -> tuple[PoolStore, GroupRecord] | None:
        own = {handle.pool for source in sources if (handle := parse_handle(source)) is not None}
        for store in self._pools:
            record_id = store.id_of(GROUP, name)
            record = store.groups.get(record_id) if store.name in own else store.glance(store.groups, record_id)
            if record is None:
                continue
            _require_same(record, sources)
            return store, record
        return None

    def _one_pool(self, found: Sequence[tuple[PoolStore, VolumeRecord]]) -> PoolStore:
        if not found:
            raise InvalidArgument("source_volume_ids is empty: a group snapshot needs at least one volume")
        names = sorted({store.name for store, _ in found})
        if len(names) > 1:
            raise InvalidArgument(
                f"source_volume_ids lie in the pools {', '.join(names)}: a group snapshot is of volumes of one pool"
            )
        return found[0][0]

    def _create_locked(
        self, store: PoolStore, group_id: str, name: str, sources: tuple[str, ...], job: JobControl
    ) -> GroupSnapshot:
        with self._locks.hold(store, f"group:{group_id}"):
            record = store.groups.get(group_id)
            if record is None:
                self.complete_removal(store, group_id)
                record = self._begin(store, group_id, name, sources)
            if record.phase is Phase.CREATING:
                record = self._complete(store, record, job)
            return self._show(store, record)

    def _complete(self, store: PoolStore, record: GroupRecord, job: JobControl) -> GroupRecord:
        """Make all members ready, and then the group; on an error nothing is left of it.

        But for an error after which the caller asks again: a lock that another holds, say. If all was cut, it stays as it was cut then,
        and the retry goes on from there; it may only be taken back by who holds the locks of all members.
        """
        what = f"group snapshot {record.handle}"
        with ExitStack() as held:
            for member_id in _member_ids(record):
                held.enter_context(self._locks.hold(store, f"snapshot:{member_id}"))
            try:
                members = self._cut_all(store, record, job)
            except OperationPending:
                raise
            except BaseException as error:  # noqa: BLE001 - raised again
                take_back(error, lambda: self._give_up(store, record), what)
            with may_be_left(what):
                cut_at = min(member.created_at_ns for member in members)
                ready = replace(record, phase=Phase.READY, created_at_ns=cut_at, consistency=_consistency_of(members))
                return store.groups.replace(ready, self._fence.gate(store, store.groups, record))

    def _begin(self, store: PoolStore, group_id: str, name: str, sources: tuple[str, ...]) -> GroupRecord:
        handle = store.handle_of(group_id)
        members = tuple(store.handle_of(_member_id(store, group_id, source)) for source in sources)
        record = GroupRecord(
            id=group_id,
            handle=handle,
            name=name,
            driver=store.driver,
            pool=store.name,
            token=new_token(),
            phase=Phase.CREATING,
            created_at_ns=time.time_ns(),
            sources=sources,
            members=members,
        )
        with may_be_left(f"group snapshot {record.handle}"):
            added = store.groups.add(record, self._locks.gate(store, f"group:{record.id}"))
        if not added:
            raise AlreadyExists(f"group snapshot {quoted(name)} is being made by another controller")
        return record

    def _cut_all(self, store: PoolStore, record: GroupRecord, job: JobControl) -> list[SnapshotRecord]:
        """Make all members ready, and return them. The caller holds them."""
        placed = self._cut_before(store, record) or self._cut_anew(store, record, job)
        # Not one says ready before all are in place; after a crash from here on, the retry finds them there and goes on.
        return [self._snapshots.make_ready(store, member) if member.phase is Phase.CREATING else member for member in placed]

    def _cut_before(self, store: PoolStore, record: GroupRecord) -> list[SnapshotRecord]:
        """Return the members that an attempt which was cut off has put in place, if those are all; else none.

        A part of them is no use: what is cut now would be of another time, by as much as nobody asked in between.
        """
        found = [store.snapshots.get(member_id) for member_id in _member_ids(record)]
        members = [member for member in found if member is not None and self._snapshots.is_cut(store, member)]
        return [self._snapshots.place(store, member) for member in members] if len(members) == len(found) else []

    def _cut_anew(self, store: PoolStore, record: GroupRecord, job: JobControl) -> list[SnapshotRecord]:
        """Put all members in place, cut at one time; what there is of them goes before: nobody was shown it."""
        begun = []
        for member_id, source_handle in zip(_member_ids(record), record.sources, strict=True):
            if store.snapshots.get(member_id) is not None and not self._snapshots.give_up(store, member_id):
                raise LockLost(f"the lock of a member of group snapshot {record.handle} was lost; try again")
            _, source = self._sources.volume(source_handle)
            begun.append(self._snapshots.begin(store, member_id, f"{record.name}/{source_handle}", source, record.handle))
        with ExitStack() as held:
            for source_handle in record.sources:  # all at hand before the first is cut, and in vain if one is not
                held.enter_context(self._sources.hold(ContentSource(SourceKind.VOLUME, source_handle)))
            # Back to back, with nothing written in between: as close to one moment as the pool can come.
            cut = [self._snapshots.cut(store, member, job) for member in begun]
            return [self._snapshots.place(store, member) for member in cut]

    def _give_up(self, store: PoolStore, record: GroupRecord) -> bool:
        """Take a group back that never became ready, and tell whether nothing is left. The caller holds the group and its members."""
        current = store.groups.get(record.id)
        if not self._locks.is_held(store, f"group:{record.id}") or (current is not None and current.phase is Phase.READY):
            return False  # another has taken it over
        taken_back = [self._snapshots.give_up(store, member_id) for member_id in _member_ids(record)]
        if not all(taken_back):
            return False
        self._locks.require(store, f"group:{record.id}")
        store.groups.remove(record.id)
        return True

    def _show(self, store: PoolStore, record: GroupRecord) -> GroupSnapshot:
        members = [store.snapshots.get(member_id) for member_id in _member_ids(record)]
        if missing := [handle for handle, member in zip(record.members, members, strict=True) if member is None]:
            raise FailedPrecondition(
                f"group snapshot {record.handle} lacks its member {missing[0]}: its record is gone from the pool"
            )
        return GroupSnapshot(record, tuple(show(store, member) for member in members if member is not None))


def _consistency_of(members: Sequence[SnapshotRecord]) -> str:
    """Return the label that the group as a whole deserves."""
    return POINT_IN_TIME_EACH if {member.consistency for member in members} == {POINT_IN_TIME} else FILE_BY_FILE


def _member_id(store: PoolStore, group_id: str, source_handle: str) -> str:
    # No CSI name can be this: a name holds no NUL, so a member never answers to a CreateSnapshot.
    return store.id_of(SNAPSHOT, f"group\0{group_id}\0{source_handle}")


def _member_ids(record: GroupRecord) -> list[str]:
    return [handle.rpartition(".")[2] for handle in record.members]


def _require_same(record: GroupRecord, sources: tuple[str, ...]) -> None:
    if record.sources != sources:
        raise AlreadyExists(f"group snapshot {quoted(record.name)} exists as {record.handle}, of {', '.join(record.sources)}")


def _require_members(record: GroupRecord, snapshot_handles: Sequence[str]) -> None:
    if snapshot_handles and set(snapshot_handles) != set(record.members):
        raise InvalidArgument(
            f"snapshot_ids are {', '.join(quoted(handle) for handle in snapshot_handles)}: group snapshot {record.handle} has "
            f"{', '.join(record.members)}"
        )
