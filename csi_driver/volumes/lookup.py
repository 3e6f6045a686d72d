"""Finding a volume by its handle, showing it, and telling which snapshots are there for others."""

from csi_driver.errors import NotFound, RecordDamaged, quoted
from csi_driver.volumes.answers import Volume
from csi_driver.volumes.model import Limit, LimiterKind, Phase, SnapshotRecord, VolumeRecord
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools


def find_ready(pools: Pools, handle: str) -> tuple[PoolStore, VolumeRecord]:
    """Find a volume that exists. Raises NotFound, also for one that is still being made or already being deleted."""
    located = pools.locate(handle)
    record = located[0].volumes.get(located[1]) if located else None
    if located is None or record is None or record.phase is not Phase.READY:
        raise NotFound(f"volume {quoted(handle)} does not exist")
    return located[0], record


def volume_as_shown(store: PoolStore, record: VolumeRecord) -> Volume:
    """Make of a record what CSI shows of its volume."""
    # Words for people and `kubectl describe`; never an address, and nothing that the driver reads back.
    limit = record.limit or Limit(LimiterKind.NONE, "none: made by a driver that set no limits")
    context = {
        "pool": record.pool,
        "layout": record.form.layout.value,
        "limiter": limit.limiter.value,
        "limit": limit.level,
    }
    return Volume(record, context, store.backend.topology())


def is_shown(store: PoolStore, record: SnapshotRecord) -> bool:
    """Tell whether a snapshot is complete, and, being a member of a group, all others of its group are: they exist together or not at all."""
    if record.phase is not Phase.READY or record.group_handle is None:
        return record.phase is Phase.READY
    try:
        group = store.groups.get(record.group_handle.rpartition(".")[2])
    except RecordDamaged:
        return True  # the data is there, and this record is sound
    return group is None or group.phase is Phase.READY
