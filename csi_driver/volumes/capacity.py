"""Capacity: what a pool can still promise, and keep. It is what CreateVolume goes by, too (promises.py)."""

from collections.abc import Sequence

from csi_driver.errors import InvalidArgument
from csi_driver.volumes import access
from csi_driver.volumes.answers import Capacity
from csi_driver.volumes.images import fitting_size
from csi_driver.volumes.limits import Limits
from csi_driver.volumes.model import Topology
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.promises import Promises
from csi_driver.volumes.requests import Capability, ClassParameters


class PoolCapacity:
    """The CapacityService (services.py)."""

    def __init__(self, pools: Pools, promises: Promises, limits: Limits) -> None:
        self._pools = pools
        self._promises = promises
        self._limits = limits

    def available(self, parameters: ClassParameters, capabilities: Sequence[Capability], topology: Topology | None) -> Capacity:
        """Return what the pool of a class can promise; without one and without a default, what the roomiest pool can.

        Nothing where the pool cannot serve the capabilities or a required limit, or cannot be reached from `topology`. Raises InvalidArgument for an
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
        available = [
            self._available(store)
            for store in stores
            if store.reachable_from((topology,) if topology else ())
            and not any(access.unsupported(capability, store.backend, form) for capability in capabilities)
            and not self._limits.refusal(store, parameters, form)  # no room: the scheduler then looks for a node whose pool can
        ]
        # A volume lies in one pool, so what the roomiest can promise is the largest volume as well.
        most = max(available, default=0)
        return Capacity(most, most, fitting_size(form, 0) or None)

    def _available(self, store: PoolStore) -> int:
        space = store.space()
        return 0 if space.read_only else self._promises.room(store, space).available_bytes
