"""Volumes: made, found, grown, changed and deleted.

Every operation can be cut off at any point and asked for again. The record says how far it got (creating -> ready -> deleting); the
next call with the same name or handle goes on from there. How volumes are made is in creation.py, how they grow in sizes.py, how they
leave in removal.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from csi_driver.errors import RecordDamaged
from csi_driver.volumes import access
from csi_driver.volumes.answers import Volume
from csi_driver.volumes.creation import VolumeCreation
from csi_driver.volumes.jobs import Jobs
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.lookup import find_ready, volume_as_shown
from csi_driver.volumes.model import OnDelete, Phase, VolumeRecord
from csi_driver.volumes.paging import take_page
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.removal import VolumeRemoval
from csi_driver.volumes.requests import Capability, CapacityRange, CreateVolume, Page
from csi_driver.volumes.sizes import Expansion

_LASTING = ("pool", "layout")


class Provisioner:
    """The VolumeService (services.py)."""

    def __init__(
        self,
        pools: Pools,
        locks: KeyedLocks,
        jobs: Jobs,
        creation: VolumeCreation,
        removal: VolumeRemoval,
        expansion: Expansion,
    ) -> None:
        self._pools = pools
        self._locks = locks
        self._jobs = jobs
        self._creation = creation
        self._removal = removal
        self._expansion = expansion

    def create(self, request: CreateVolume, deadline: float) -> Volume:
        """Make a volume, or return the one that this request made before (creation.py)."""
        return self._creation.create(request, deadline)

    # --- read ---------------------------------------------------------------------------------------------------------------------

    def get(self, handle: str) -> Volume:
        """Return a volume. Raises NotFound, RecordDamaged."""
        return volume_as_shown(*find_ready(self._pools, handle))

    def list(self, page: Page) -> tuple[Sequence[Volume], str]:
        """Return one page of all volumes, ordered by pool and id, and the token of the next page."""

        def read(store: PoolStore, ids: list[str]) -> list[Volume]:
            records = store.volumes.each(ids)
            return [volume_as_shown(store, r) for r in records if not isinstance(r, RecordDamaged) and _is_listed(r)]

        return take_page(self._pools, page, lambda store: store.volumes.ids(), read, lambda volume: volume.record.id)

    def validate(self, handle: str, capabilities: Sequence[Capability], context: Mapping[str, str]) -> str | None:
        """Return None where the volume has all capabilities, else why it has not. Raises NotFound."""
        store, record = find_ready(self._pools, handle)
        shown = volume_as_shown(store, record).context
        # What holds the volume is told for people, and changes where its pool is moved to another filesystem.
        if context and (set(context) != set(shown) or any(context[key] != shown[key] for key in _LASTING)):
            return "volume_context is not the one that CreateVolume gave"
        problems = (access.unsupported(capability, store.backend, record.form) for capability in capabilities)
        return next((problem for problem in problems if problem), None)

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
                store.volumes.replace(replace(record, on_delete=on_delete), self._locks.gate(store, f"volume:{record.id}"))

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


def _is_listed(record: VolumeRecord) -> bool:
    """Tell whether a volume exists for those who list volumes: the cluster knows nothing of a pod's inline volume."""
    return record.phase is Phase.READY and not record.ephemeral
