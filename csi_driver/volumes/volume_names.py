"""Names of volumes: each is one volume's, in whatever pool it lies.

CreateVolume is idempotent by its name alone: the same request again is answered with what there is, another is refused, also where it asks
for another pool. Within this process a name is kept for the call that works on it; against other processes each looks once more after
its own record is there (creation.py).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from csi_driver.errors import AlreadyExists, OperationPending, quoted
from csi_driver.volumes import access
from csi_driver.volumes.handles import VOLUME
from csi_driver.volumes.model import Phase, VolumeRecord
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.requests import CreateVolume


class VolumeNames:
    """Knows which names are taken."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools
        self._guard = threading.Lock()
        self._names: set[str] = set()

    def find(self, store: PoolStore, record_id: str, request: CreateVolume) -> VolumeRecord | None:
        """Find the record that the name has, in whatever pool; raise AlreadyExists if it is not what is asked for."""
        self.require_nowhere_else(store, request.name)
        record = store.volumes.get(record_id)
        if record is not None and record.phase is not Phase.DELETING:
            require_same(record, request)
        return record

    def require_nowhere_else(self, store: PoolStore, name: str) -> None:
        """Raise AlreadyExists where another pool than `store` has a volume of this name."""
        for other in self._pools:
            taken = other.glance(other.volumes, other.id_of(VOLUME, name)) if other is not store else None
            if taken is not None and taken.phase is not Phase.DELETING:
                raise exists_elsewhere(taken)

    @contextmanager
    def alone_with(self, name: str) -> Iterator[None]:
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


def exists_elsewhere(taken: VolumeRecord) -> AlreadyExists:
    """Say which volume has the name."""
    return AlreadyExists(f"volume {quoted(taken.name)} exists in pool {taken.pool} as {taken.handle}")


def require_same(record: VolumeRecord, request: CreateVolume) -> None:
    """Raise AlreadyExists where the volume is not what the request asks for, and say in what."""
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
