"""Finding a volume by its handle."""

from csi_driver.errors import NotFound, quoted
from csi_driver.volumes.model import Phase, VolumeRecord
from csi_driver.volumes.pools import Pools, PoolStore


def find_ready(pools: Pools, handle: str) -> tuple[PoolStore, VolumeRecord]:
    """Find a volume that exists. Raises NotFound, also for one that is still being made or already being deleted."""
    located = pools.locate(handle)
    record = located[0].volumes.get(located[1]) if located else None
    if located is None or record is None or record.phase is not Phase.READY:
        raise NotFound(f"volume {quoted(handle)} does not exist")
    return located[0], record
