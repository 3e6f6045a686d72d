"""Inline ephemeral volumes: made when a pod is published, gone with it.

Pod authors write these, so they say a size and a pool, and nothing else. No claim stands for them, so no ResourceQuota counts them:
only pools of which the admin says so (`inline`) take them, the default pool being no exception.
"""

import time
from collections.abc import Mapping

from csi_driver.errors import InvalidArgument
from csi_driver.volumes.handles import VOLUME
from csi_driver.volumes.model import Layout, Ownership, VolumeRecord
from csi_driver.volumes.parameters import EPHEMERAL, parse_inline_parameters
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.provisioner import Provisioner
from csi_driver.volumes.requests import DEFAULT_CAPACITY_BYTES, Capability, CapacityRange, ClassParameters, CreateVolume

_MODE = 0o777
"""As emptyDir: the pod's user is not known, and nobody else mounts it."""
_SECONDS = 30.0


def is_inline(volume_context: Mapping[str, str]) -> bool:
    """Tell whether the kubelet asks for an inline volume."""
    return volume_context.get(EPHEMERAL) == "true"


class InlineVolumes:
    """Makes and removes the volumes of pods."""

    def __init__(self, pools: Pools, provisioner: Provisioner) -> None:
        self._pools = pools
        self._provisioner = provisioner

    def choose_pool(self, volume_context: Mapping[str, str]) -> PoolStore:
        """Find the pool for a pod's volume. Raises InvalidArgument."""
        named = parse_inline_parameters(volume_context).pool
        name = named or self._pools.default
        if name is None:
            raise InvalidArgument(
                f'volume_context["pool"] is missing: there is no default pool; there are {self._pools.names()}'
            )
        store = self._pools.find(name)
        if store is not None and store.backend.inline:
            return store
        allowed = ", ".join(pool.name for pool in self._pools if pool.backend.inline)
        said = f"pools that take inline volumes: {allowed or 'none (`inline = true` in pools.toml)'}"
        if named is None:
            raise InvalidArgument(
                f'volume_context["pool"] is missing, and the default pool {name} takes no inline volumes; {said}'
            )
        raise InvalidArgument.field('volume_context["pool"]', named, said)

    def create(self, handle: str, store: PoolStore, capability: Capability, volume_context: Mapping[str, str]) -> VolumeRecord:
        """Make the volume in `store`, or find the one that was made. Raises InvalidArgument, ResourceExhausted."""
        parameters = parse_inline_parameters(volume_context)
        request = CreateVolume(
            name=inline_name(handle),
            capacity=CapacityRange(required_bytes=parameters.size_bytes or DEFAULT_CAPACITY_BYTES),
            capabilities=(capability,),
            parameters=ClassParameters(pool=store.name, ownership=Ownership(mode=_MODE), layout=Layout.DIRECTORY),
            ephemeral=True,
        )
        return self._provisioner.create(request, time.monotonic() + _SECONDS).record

    def delete(self, handle: str, pool: str | None) -> None:
        """Remove the volume that was made for this handle, if there is one, with all that is in it.

        It is in `pool`, or, if that is None, in any pool of this machine: of one behind a server the node always knows the name.
        """
        for store in self._pools:
            if store.name != pool if pool is not None else store.backend.remote:
                continue
            record_id = store.id_of(VOLUME, inline_name(handle))
            if store.volumes.get(record_id) is not None:
                self._provisioner.delete(store.handle_of(record_id))


def inline_name(handle: str) -> str:
    """Return the name of the volume that is made for an inline handle; no CSI name holds a NUL, so no claim can ever meet it."""
    return f"inline\0{handle}"
