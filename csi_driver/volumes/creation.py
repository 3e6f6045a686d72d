"""Creation of volumes: the record, the content, the place, and what is taken back where one of them fails.

It can be cut off at any point and asked for again: the record says how far it got, and the next call with the same name goes on from
there. A copy runs as a job, which outlasts the call that began it and is joined by those that come after.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from csi_driver.errors import AlreadyExists, InvalidArgument, NotFound, ResourceExhausted, quoted
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
from csi_driver.volumes.lookup import volume_as_shown
from csi_driver.volumes.model import Form, Layout, Phase, VolumeRecord
from csi_driver.volumes.pool_layout import new_token
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.promises import Promises
from csi_driver.volumes.removal import VolumeRemoval
from csi_driver.volumes.requests import CreateVolume
from csi_driver.volumes.sizes import choose_size
from csi_driver.volumes.sources import Sources
from csi_driver.volumes.verification import Verifier
from csi_driver.volumes.volume_names import VolumeNames, exists_elsewhere, require_same
from csi_driver.volumes.volume_places import VolumePlaces


class VolumeCreation:
    """Makes volumes."""

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
        self._limits = limits
        self._names = VolumeNames(pools)
        self._fence = Fence(locks, "volume")

    def create(self, request: CreateVolume, deadline: float) -> Volume:
        """Make a volume, or return the one that this request made before.

        Raises AlreadyExists for a name that another request took, ResourceExhausted, OutOfRange, InvalidArgument, NotFound (source),
        OperationPending while a copy runs.
        """
        store = self._choose_pool(request)
        record_id = store.id_of(VOLUME, request.name)
        found = self._names.find(store, record_id, request)
        if found is not None and found.phase is Phase.READY:
            return self._show_found(store, found)
        if request.source is None:
            return self._create_locked(store, record_id, request, None)
        made = self._jobs.run(record_id, lambda job: self._create_locked(store, record_id, request, job), deadline)
        # The job may have been another request's, of the same name.
        if made.record.pool != store.name:
            raise exists_elsewhere(made.record)
        require_same(made.record, request)
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

    def _create_locked(self, store: PoolStore, record_id: str, request: CreateVolume, job: JobControl | None) -> Volume:
        with self._names.alone_with(request.name), self._locks.hold(store, f"volume:{record_id}"):
            record = self._names.find(store, record_id, request)
            if record is not None and record.phase is Phase.DELETING:
                self._removal.finish(store, record)
                record = None
            if record is None:
                self._removal.complete(store, record_id)
                record = self._begin(store, record_id, request)
            elif record.phase is Phase.CREATING and not self._places.is_in_place(store, record):
                with may_be_left(f"volume {record.handle}"):
                    record = self._fence.take_over(store, store.volumes, record)
            if record.phase is Phase.CREATING:
                return volume_as_shown(store, self._complete(store, record, job))
            return self._show_found(store, record)

    def _show_found(self, store: PoolStore, record: VolumeRecord) -> Volume:
        """Show a volume that was there already. Who made it may have been killed before the last step was on the disk."""
        with may_be_left(f"volume {record.handle}"):
            store.volumes.settle()
        return volume_as_shown(store, record)

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
            self._names.require_nowhere_else(store, request.name)
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
        return store.volumes.replace(record, self._fence.gate(store, store.volumes, record), files.order_directory)

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
            self._fence.require(store, store.volumes, current)
            store.volumes.remove(record.id)
        return True


def _is_made_at_once(record: VolumeRecord) -> bool:
    """Tell whether what is missing is one empty directory, at a name that nobody else can have: then the record need not come first."""
    return record.source is None and record.form.layout is Layout.DIRECTORY and record.directory_template is None
