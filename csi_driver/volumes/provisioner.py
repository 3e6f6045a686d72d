"""Volumes: made, found, grown, changed and deleted.

Every operation can be cut off at any point and asked for again. The record says how far it got (creating -> ready -> deleting); the
next call with the same name or handle goes on from there.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from csi_driver.errors import (
    AlreadyExists,
    InvalidArgument,
    NotFound,
    OperationPending,
    RecordDamaged,
    ResourceExhausted,
    quoted,
)
from csi_driver.linux import files
from csi_driver.volumes import access
from csi_driver.volumes.answers import Volume
from csi_driver.volumes.attempts import drop_empty_staging, trash_staging
from csi_driver.volumes.contents import Contents
from csi_driver.volumes.fencing import Fence
from csi_driver.volumes.finality import may_be_left, take_back
from csi_driver.volumes.handles import VOLUME
from csi_driver.volumes.jobs import JobControl, Jobs
from csi_driver.volumes.limits import Holding, ImageHolding, Limits
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.lookup import find_ready
from csi_driver.volumes.model import Form, Layout, Limit, LimiterKind, OnDelete, Phase, VolumeRecord
from csi_driver.volumes.paging import take_page
from csi_driver.volumes.pool_layout import new_token
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.promises import Promises
from csi_driver.volumes.removal import VolumeRemoval
from csi_driver.volumes.requests import Capability, CapacityRange, CreateVolume, Page
from csi_driver.volumes.sizes import Expansion, choose_size
from csi_driver.volumes.sources import Sources
from csi_driver.volumes.verification import Verifier
from csi_driver.volumes.volume_places import VolumePlaces


class Provisioner:
    """The VolumeService (services.py)."""

    def __init__(
        self,
        pools: Pools,
        locks: KeyedLocks,
        jobs: Jobs,
        contents: Contents,
        places: VolumePlaces,
        sources: Sources,
        removal: VolumeRemoval,
        verifier: Verifier,
        promises: Promises,
        limits: Limits,
    ) -> None:
        self._pools = pools
        self._locks = locks
        self._jobs = jobs
        self._contents = contents
        self._places = places
        self._sources = sources
        self._removal = removal
        self._verifier = verifier
        self._promises = promises
        self._expansion = Expansion(pools, locks, promises, contents, limits)
        self._limits = limits
        self._guard = threading.Lock()
        self._names: set[str] = set()
        self._fence = Fence(locks, "volume")

    # --- create -------------------------------------------------------------------------------------------------------------------

    def create(self, request: CreateVolume, deadline: float) -> Volume:
        """Make a volume, or return the one that this request made before.

        Raises AlreadyExists for a name that another request took, ResourceExhausted, OutOfRange, InvalidArgument, NotFound (source),
        OperationPending while a copy runs.
        """
        store = self._choose_pool(request)
        record_id = store.id_of(VOLUME, request.name)
        found = self._find(store, record_id, request)
        if found is not None and found.phase is Phase.READY:
            return self.show(store, found)
        if request.source is None:
            return self._create_locked(store, record_id, request, None)
        made = self._jobs.run(record_id, lambda job: self._create_locked(store, record_id, request, job), deadline)
        # The job may have been another request's, of the same name.
        if made.record.pool != store.name:
            raise _exists_elsewhere(made.record)
        _require_same(made.record, request)
        return made

    def _choose_pool(self, request: CreateVolume) -> PoolStore:
        name = request.parameters.pool or self._pools.default
        if name is None:
            raise InvalidArgument(f'parameters["pool"] is missing: there is no default pool; allowed are {self._pools.names()}')
        store = self._pools.find(name)
        if store is None:
            raise InvalidArgument.field('parameters["pool"]', name, f"no such pool; allowed are {self._pools.names()}")
        if request.source is None:
            self._choose_form(store, request)
        if not store.reachable_from(request.requisite):
            raise ResourceExhausted(f"pool {store.name} can only be reached from {dict(store.backend.topology() or {})}")
        return store

    def _find(self, store: PoolStore, record_id: str, request: CreateVolume) -> VolumeRecord | None:
        """Find the record that the name has, in whatever pool; raise AlreadyExists if it is not what is asked for."""
        self._require_nowhere_else(store, request.name)
        record = store.volumes.get(record_id)
        if record is not None and record.phase is not Phase.DELETING:
            _require_same(record, request)
        return record

    def _require_nowhere_else(self, store: PoolStore, name: str) -> None:
        for other in self._pools:
            taken = other.glance(other.volumes, other.id_of(VOLUME, name)) if other is not store else None
            if taken is not None and taken.phase is not Phase.DELETING:
                raise _exists_elsewhere(taken)

    @contextmanager
    def _alone_with(self, name: str) -> Iterator[None]:
        """Keep the other calls of this process from making a volume of this name in another pool. Raises OperationPending at once."""
        with self._guard:
            if name in self._names:
                raise OperationPending(f"volume {quoted(name)} is being made by another call; try again")
            self._names.add(name)
        try:
            yield
        finally:
            with self._guard:
                self._names.discard(name)

    def _create_locked(self, store: PoolStore, record_id: str, request: CreateVolume, job: JobControl | None) -> Volume:
        with self._alone_with(request.name), self._locks.hold(store, f"volume:{record_id}"):
            record = self._find(store, record_id, request)
            if record is not None and record.phase is Phase.DELETING:
                self._removal.finish(store, record)
                record = None
            if record is None:
                self._removal.complete(store, record_id)
                record = self._begin(store, record_id, request)
            elif record.phase is Phase.CREATING and not self._places.is_in_place(store, record):
                record = self._fence.take_over(store, store.volumes, record)
            if record.phase is Phase.CREATING:
                record = self._complete(store, record, job)
            return self.show(store, record)

    def _begin(self, store: PoolStore, record_id: str, request: CreateVolume) -> VolumeRecord:
        form = self._choose_form(store, request)
        capacity = choose_size(request.capacity, form, self._sources.size_of(request.source) if request.source else 0)
        parameters = request.parameters
        access.check_ownership(parameters.ownership, store.backend)
        record = VolumeRecord(
            id=record_id,
            handle=store.handle_of(record_id),
            name=request.name,
            driver=store.driver,
            pool=store.name,
            token=new_token(),
            phase=Phase.CREATING,
            created_at_ns=time.time_ns(),
            directory=parameters.directory or self._own_directory(store, record_id),
            directory_template=parameters.directory,
            capacity_bytes=capacity,
            form=form,
            on_delete=parameters.on_delete,
            ownership=parameters.ownership,
            source=request.source,
            ephemeral=request.ephemeral,
            verify=parameters.verify,
            limit_policy=parameters.limit,
            inodes=parameters.inodes,
        )
        gate = self._promises.gate(store, record_id, capacity, capacity)

        def add(record: VolumeRecord) -> VolumeRecord:
            if not store.volumes.add(record, gate, files.order_directory):
                raise AlreadyExists(f"volume {quoted(request.name)} is being made by another controller")
            # Once more: another controller may have made one in another pool since. Each looks after its own record is there, so of two at
            # once, one at least sees the other, and gives way.
            self._require_nowhere_else(store, request.name)
            return record

        if _is_made_at_once(record):
            return self._complete(store, record, None, add)
        try:
            return add(record)
        except BaseException as error:  # noqa: BLE001 - raised again
            take_back(error, lambda: self._give_up(store, record), f"volume {record.handle}")

    def _own_directory(self, store: PoolStore, record_id: str) -> str:
        # The data of a retained volume keeps its place when the name is used again.
        try:
            with store.open_volume(record_id):
                return f"{record_id}.{new_token()}"
        except NotFound:
            return record_id

    def _choose_form(self, store: PoolStore, request: CreateVolume) -> Form:
        """Choose in which form the volume is stored. Raises InvalidArgument where its pool cannot serve it so."""
        source = self._sources.form_of(request.source) if request.source else None
        form = access.form_for(request.parameters.layout, request.capabilities, source)
        for capability in request.capabilities:
            if problem := access.unsupported(capability, store.backend, form):
                raise InvalidArgument(problem)
        return form

    def _complete(
        self,
        store: PoolStore,
        record: VolumeRecord,
        job: JobControl | None,
        add: Callable[[VolumeRecord], VolumeRecord] | None = None,
    ) -> VolumeRecord:
        """Build the content of a `creating` volume and make it ready; on an error nothing is left of it.

        With `add` there is no record yet, so the id may be another controller's: until `add` has shown the record, nothing but what
        has its token is touched.
        """
        what = f"volume {record.handle}"
        if add is None and self._places.is_in_place(store, record):
            with may_be_left(what):
                return self._places.make_ready(store, record)
        try:
            holding = self._limits.holding(store, record)
            if record.source is None:
                if add is None:
                    trash_staging(store, record.id)
                self._contents.make_empty(store, record, holding)
            else:
                record = self._fill(store, record, job, holding)
            claim = add or (lambda record: self._replace_own(store, record))
            return self._places.place(store, replace(record, limit=holding.limit), claim)
        except BaseException as error:  # noqa: BLE001 - raised again
            take_back(error, lambda: self._give_up(store, record), what)

    def _replace_own(self, store: PoolStore, record: VolumeRecord) -> VolumeRecord:
        self._fence.require(store, store.volumes, record)
        return store.volumes.replace(record, settle=files.order_directory)

    def _fill(
        self, store: PoolStore, record: VolumeRecord, job: JobControl | None, holding: Holding | ImageHolding
    ) -> VolumeRecord:
        assert record.source is not None
        job = job or JobControl(record.id)
        with self._sources.hold(record.source) as source:
            if record.verify:
                self._verifier.require_whole(source, job)
            size, token = record.capacity_bytes, record.token
            report = self._contents.copy(store, record.id, token, source, record.ownership, job, holding, size)
        return replace(record, capture=report)

    def _give_up(self, store: PoolStore, record: VolumeRecord) -> bool:
        """Take back what was made of a volume, and tell whether nothing is left."""
        if not self._locks.is_held(store, f"volume:{record.id}"):
            trash_staging(store, record.id, record.token)
            return False  # the rest may be another's by now
        current = store.volumes.get(record.id)
        if current is not None and current.token != record.token:
            current = None  # another's, who was first
        if current is not None and self._places.is_in_place(store, current):
            return False  # only the last steps failed: a retry completes them
        if _is_made_at_once(record):
            drop_empty_staging(store, record.id, record.token)
        else:
            trash_staging(store, record.id, record.token)
        if current is not None:
            self._places.release_claim(store, current)
            store.volumes.remove(record.id)
        return True

    # --- read ---------------------------------------------------------------------------------------------------------------------

    def get(self, handle: str) -> Volume:
        """Return a volume. Raises NotFound, RecordDamaged."""
        return self.show(*find_ready(self._pools, handle))

    def list(self, page: Page) -> tuple[Sequence[Volume], str]:
        """Return one page of all volumes, ordered by pool and id, and the token of the next page."""

        def read(store: PoolStore, ids: list[str]) -> list[Volume]:
            records = store.volumes.each(ids)
            return [self.show(store, r) for r in records if not isinstance(r, RecordDamaged) and is_listed(r)]

        return take_page(self._pools, page, lambda store: store.volumes.ids(), read, lambda volume: volume.record.id)

    def validate(self, handle: str, capabilities: Sequence[Capability], context: Mapping[str, str]) -> str | None:
        """Return None where the volume has all capabilities, else why it has not. Raises NotFound."""
        store, record = find_ready(self._pools, handle)
        shown = self.show(store, record).context
        # What holds the volume is told for people, and changes where its pool is moved to another filesystem.
        if context and (set(context) != set(shown) or any(context[key] != shown[key] for key in _LASTING)):
            return "volume_context is not the one that CreateVolume gave"
        problems = (access.unsupported(capability, store.backend, record.form) for capability in capabilities)
        return next((problem for problem in problems if problem), None)

    def show(self, store: PoolStore, record: VolumeRecord) -> Volume:
        # Words for people and `kubectl describe`; never an address, and nothing that the driver reads back.
        limit = record.limit or Limit(LimiterKind.NONE, "none: made by a driver that set no limits")
        context = {
            "pool": record.pool,
            "layout": record.form.layout.value,
            "limiter": limit.limiter.value,
            "limit": limit.level,
        }
        return Volume(record, context, store.backend.topology())

    # --- change -------------------------------------------------------------------------------------------------------------------

    def expand(self, handle: str, capacity: CapacityRange, capability: Capability | None) -> int:
        """Grow a volume (sizes.py). Returns bytes."""
        return self._expansion.expand(handle, capacity, capability)

    def modify(self, handle: str, on_delete: OnDelete | None) -> None:
        """Change what becomes of the data at deletion. Raises NotFound."""
        store, record = find_ready(self._pools, handle)
        with self._locks.hold(store, f"volume:{record.id}"):
            _, record = find_ready(self._pools, handle)
            if on_delete is not None and on_delete is not record.on_delete:
                store.volumes.replace(replace(record, on_delete=on_delete))

    # --- delete -------------------------------------------------------------------------------------------------------------------

    def delete(self, handle: str) -> None:
        """Delete a volume as its `onDelete` says; one that does not exist is deleted already.

        Raises FailedPrecondition while it is in use or belongs elsewhere, OperationPending while it is being copied.
        """
        located = self._pools.locate(handle)
        if located is None:
            return
        store, record_id = located
        self._jobs.cancel(record_id)
        with self._locks.hold(store, f"volume:{record_id}"):
            self._removal.complete(store, record_id)
            record = store.volumes.get(record_id)
            if record is not None:
                self._removal.remove(store, record)


_LASTING = ("pool", "layout")


def is_listed(record: VolumeRecord) -> bool:
    """Tell whether a volume exists for those who list volumes: the cluster knows nothing of a pod's inline volume."""
    return record.phase is Phase.READY and not record.ephemeral


def _is_made_at_once(record: VolumeRecord) -> bool:
    """Tell whether what is missing is one empty directory, at a name that nobody else can have: then the record need not come first."""
    return record.source is None and record.form.layout is Layout.DIRECTORY and record.directory_template is None


def _exists_elsewhere(taken: VolumeRecord) -> AlreadyExists:
    return AlreadyExists(f"volume {quoted(taken.name)} exists in pool {taken.pool} as {taken.handle}")


def _require_same(record: VolumeRecord, request: CreateVolume) -> None:
    parameters = request.parameters
    differences = [
        name
        for name, differs in (
            ("capacity_range", not request.capacity.admits(record.capacity_bytes)),
            ("volume_content_source", record.source != request.source),
            ("parameters.directory", record.directory_template != parameters.directory),
            ("parameters.uid, gid or mode", record.ownership != parameters.ownership),
            ("layout, volume mode or filesystem", not access.has_form(record.form, parameters.layout, request.capabilities)),
            ("parameters.limit or inodes", (record.limit_policy, record.inodes) != (parameters.limit, parameters.inodes)),
            ("parameters.verify", record.verify != parameters.verify),
        )
        if differs
    ]
    if differences:
        raise AlreadyExists(
            f"volume {quoted(record.name)} exists as {record.handle} ({record.capacity_bytes} bytes) with another {', '.join(differences)}"
        )
