"""The node as CSI sees it: who it is, and the calls about volumes that are mounted on it."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from csi_driver.errors import NotFound, OutOfRange, Unavailable, quoted
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.answers import HealthEntry, HealthLevel, NodeInfo, VolumeHealth, VolumeStats
from csi_driver.volumes.handles import VOLUME
from csi_driver.volumes.health import Health
from csi_driver.volumes.inline import inline_name
from csi_driver.volumes.limits import Limits
from csi_driver.volumes.model import Layout, VolumeRecord
from csi_driver.volumes.node_state import NodeVolumeRecord
from csi_driver.volumes.node_volumes import NodeVolumes
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.publisher import Publisher
from csi_driver.volumes.requests import CapacityRange, PublishVolume, StageVolume
from csi_driver.volumes.services import VolumeService
from csi_driver.volumes.stager import Stager
from csi_driver.volumes.usage import UsageCounter

_log = logging.getLogger(__name__)


class Node:
    """The NodeService (services.py)."""

    def __init__(
        self,
        info: NodeInfo,
        pools: Pools,
        here: NodeVolumes,
        stager: Stager,
        publisher: Publisher,
        usage: UsageCounter,
        health: Health,
        volumes: VolumeService,
        limits: Limits,
    ) -> None:
        self._info = info
        self._pools = pools
        self._here = here
        self._stager = stager
        self._publisher = publisher
        self._usage = usage
        self._health = health
        self._volumes = volumes
        self._limits = limits

    def info(self) -> NodeInfo:
        return self._info

    def stage(self, request: StageVolume) -> None:
        self._stager.stage(request)

    def unstage(self, handle: str, staging_path: str) -> None:
        self._stager.unstage(handle, staging_path)

    def publish(self, request: PublishVolume) -> None:
        self._publisher.publish(request)

    def unpublish(self, handle: str, target_path: str) -> None:
        self._publisher.unpublish(handle, target_path)

    def stats(self, handle: str, volume_path: str, deadline: float) -> VolumeStats:
        """Return the usage of a volume that is mounted at `volume_path`. Raises NotFound, OperationPending while it is counted."""
        known = self._here.find_mounted(handle, volume_path)
        if known.form.layout is Layout.IMAGE:
            return self._here.images.stats(known)
        store, record = self._find(known)
        capacity = record.capacity_bytes if record else known.capacity_bytes
        found = self._limits.stats(store, record) if record else None
        found = found or self._usage.stats(store, known.directory, capacity, deadline, Path(os.path.normpath(volume_path)))
        # CSI has no field for it: whoever doubts a number finds here how it came about.
        _log.debug(
            "usage read", extra={"volume": handle, "source": found.source.value, "age_seconds": round(found.age_seconds, 1)}
        )
        return found

    def expand(self, handle: str, volume_path: str, capacity: CapacityRange) -> int:
        """Return the size that the volume has; one of a node-local pool is made larger here, where its record is, an image where it is used.

        Raises NotFound, OutOfRange (also of what ControllerExpandVolume should have done), OperationPending, what ImageStaging.grow raises.
        """
        known = self._here.find_mounted(handle, volume_path)
        store, record = self._find(known)
        if known.form.layout is Layout.IMAGE:
            if store.backend.node_local:
                self._volumes.expand(handle, capacity, None)
            return self._expand_image(handle, capacity)
        if store.backend.remote and known.capacity_bytes is not None:
            # The controller has made it larger; this node knows its size from when it was staged.
            self._here.grown(handle, capacity.required_bytes)
            return max(known.capacity_bytes, capacity.required_bytes)
        if record is not None and store.backend.node_local and not known.ephemeral:
            return self._volumes.expand(handle, capacity, None)
        size = record.capacity_bytes if record else capacity.required_bytes
        if size < capacity.required_bytes or (capacity.limit_bytes and size > capacity.limit_bytes):
            raise OutOfRange(
                f"volume {quoted(handle)} has {size} bytes; ControllerExpandVolume has to make it {capacity.required_bytes} first"
            )
        return size

    def _expand_image(self, handle: str, capacity: CapacityRange) -> int:
        with self._here.lock(handle):
            known = self._here.state.get(handle)
            if known is None:
                raise NotFound(f"volume {quoted(handle)} is not on this node")
            size = self._here.images.grow(known)
        self._here.grown(handle, size)
        if size < capacity.required_bytes or (capacity.limit_bytes and size > capacity.limit_bytes):
            raise OutOfRange(
                f"volume {quoted(handle)} has {size} bytes; ControllerExpandVolume has to make it {capacity.required_bytes} first"
            )
        return size

    def health(self, handle: str, publish_path: str, staging_path: str) -> VolumeHealth:
        """Say what is wrong with a volume on this node. Raises NotFound."""
        known = self._here.state.get(handle)
        entries: Sequence[HealthEntry] = ()
        store = self._pools.find(known.pool) if known is not None else None
        if known is not None and store is not None and store.backend.remote:
            entries = self._remote_problems(known, store)
        elif known is None and any(store.backend.remote for store in self._pools):
            raise NotFound(f"volume {quoted(handle)} is not on this node")
        elif known is None or not (known.static or known.ephemeral):
            entries = self._health.volume(handle).entries
        if known is not None and known.fault:
            entries = (*entries, HealthEntry(HealthLevel.INACCESSIBLE, "FilesystemDamaged", known.fault))
        return VolumeHealth(handle, (*entries, *self._missing_mounts(known, (publish_path, staging_path))))

    @staticmethod
    def _remote_problems(known: NodeVolumeRecord, store: PoolStore) -> list[HealthEntry]:
        mounted = next((path for path in known.paths() if topmost_mount_at(path) is not None), None)
        if mounted is None:
            return []
        try:
            store.backend.look(Path(mounted))
        except Unavailable as error:
            return [HealthEntry(HealthLevel.INACCESSIBLE, "ServerNotAnswering", str(error))]
        except OSError as error:
            message = f"the mount of volume {quoted(known.handle)} at {mounted}: {error.strerror}"
            return [HealthEntry(HealthLevel.INACCESSIBLE, "MountStale", message)]
        return []

    def _missing_mounts(self, known: NodeVolumeRecord | None, paths: Sequence[str]) -> list[HealthEntry]:
        if known is None:
            return []
        return [
            HealthEntry(
                HealthLevel.INACCESSIBLE, reason, f"volume {quoted(known.handle)} should be mounted at {path} and is not"
            )
            for reason, path in zip(("MountMissing", "StagingMissing"), paths, strict=True)
            if path and os.path.normpath(path) in known.paths() and topmost_mount_at(os.path.normpath(path)) is None
        ]

    def _find(self, known: NodeVolumeRecord) -> tuple[PoolStore, VolumeRecord | None]:
        store = self._pools.find(known.pool)
        if store is None:
            raise NotFound(f"pool {known.pool} of volume {quoted(known.handle)} is not configured on this node")
        if known.static or store.backend.remote:
            return store, None
        record_id = store.id_of(VOLUME, inline_name(known.handle)) if known.ephemeral else known.handle.rpartition(".")[2]
        return store, store.volumes.get(record_id)
