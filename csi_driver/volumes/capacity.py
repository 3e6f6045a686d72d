"""Capacity: what a pool can still keep."""

from collections.abc import Sequence

from csi_driver.errors import InvalidArgument
from csi_driver.volumes import access
from csi_driver.volumes.model import Capability, Capacity, ClassParameters, Topology
from csi_driver.volumes.pools import Pools


class PoolCapacity:
    """The CapacityService (services.py)."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def available(self, parameters: ClassParameters, capabilities: Sequence[Capability], topology: Topology | None) -> Capacity:
        """Return the room in the pool of a class; without one and without a default, the room of the pool that has most.

        Nothing where the pool cannot serve the capabilities or cannot be reached from `topology`. Raises InvalidArgument for an
        unknown pool, Unavailable where a pool cannot be measured: an unknown capacity is not 0.
        """
        name = parameters.pool or self._pools.default
        stores = list(self._pools) if name is None else [store for store in self._pools if store.name == name]
        if not stores:
            raise InvalidArgument.field('parameters["pool"]', name, f"no such pool; allowed are {self._pools.names()}")
        try:
            form = access.form_for(parameters.layout, capabilities)
        except InvalidArgument:
            return Capacity(0, 0)  # no volume can be so
        rooms = [
            store.space()
            for store in stores
            if store.reachable_from((topology,) if topology else ())
            and not any(access.unsupported(capability, store.backend, form) for capability in capabilities)
        ]
        usable = [room for room in rooms if not room.read_only]
        return Capacity(
            available_bytes=max((room.available_bytes for room in usable), default=0),
            maximum_volume_bytes=max((room.total_bytes for room in usable), default=0),
        )
