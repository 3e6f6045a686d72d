"""What stager and publisher share: this node's volumes, their locks and records, and the way each layout has."""

import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from csi_driver.errors import NotFound, RecordDamaged, quoted
from csi_driver.linux import mounts
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.image_devices import ImageDevices
from csi_driver.volumes.image_staging import ImageStaging
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import AccessType, Form, Layout
from csi_driver.volumes.mount_groups import MountGroups
from csi_driver.volumes.mount_points import MountPoints
from csi_driver.volumes.node_state import NodeState, NodeVolumeRecord
from csi_driver.volumes.placement import Placement
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.requests import Capability
from csi_driver.volumes.staging import DirectoryStaging, Staging
from csi_driver.volumes.unmounting import Unmounting

_log = logging.getLogger(__name__)


class NodeVolumes:
    """The volumes of this node. `kubelet_dir` is the only place where mounts for others are made."""

    def __init__(
        self,
        pools: Pools,
        locks: KeyedLocks,
        state: NodeState,
        groups: MountGroups,
        images: ImageStaging,
        image_devices: ImageDevices,
        kubelet_dir: Path,
    ) -> None:
        self._pools = pools
        self._locks = locks
        self.state = state
        self.groups = groups
        self.images = images
        self.image_devices = image_devices
        self.unmounting = Unmounting(pools)
        self.places = MountPoints(kubelet_dir, self._own_places)
        self._directories = DirectoryStaging(self.unmounting)

    def staging_of(self, form: Form) -> Staging:
        """Return the way that volumes of this form go."""
        return self.images if form.layout is Layout.IMAGE else self._directories

    def lock(self, handle: str) -> AbstractContextManager[object]:
        return self._locks.hold(self.state, f"volume {quoted(handle)}")

    def is_staged(self, known: NodeVolumeRecord, place: Placement) -> bool:
        return (
            bool(known.staging_path)
            and (known.pool, known.directory, known.form) == (place.store.name, place.directory, place.form)
            and self.staging_of(known.form).is_staged(known, place.store)
        )

    def is_anywhere(self, known: NodeVolumeRecord, *paths: Path) -> bool:
        """Tell whether the mount table still has anything of a volume: at one of `paths` or, of an image, where this node reaches it."""
        places = (*paths, *map(Path, known.paths()))
        if known.form.layout is Layout.IMAGE:
            places = (*places, self.image_devices.place_of(known))  # which goes last, after the device
        return any(topmost_mount_at(place) is not None for place in places)

    def find_mounted(self, handle: str, path: str) -> NodeVolumeRecord:
        """Return what this node knows of a volume that is mounted at `path` (staging or target). Raises NotFound."""
        known = self.state.get(handle)
        if known is not None and known.form.access_type is AccessType.BLOCK and self._is_block_at(known, path):
            return known
        if known is None or os.path.normpath(path) not in known.paths() or topmost_mount_at(os.path.normpath(path)) is None:
            raise NotFound(f"volume {quoted(handle)} is not mounted at {quoted(path)} on this node")
        return known

    def _is_block_at(self, known: NodeVolumeRecord, path: str) -> bool:
        """Tell whether raw block is at a place that is no target of ours: staged, where nothing is ever mounted, or shown by the kubelet.

        That has a mount of its own for each pod, volumeDevices/PV/dev/POD, and asks for the usage there (MapBlockVolume() in
        pkg/volume/util/volumepathhandler).
        """
        place = os.path.normpath(path)
        if place == known.staging_path:
            store = self._pools.find(known.pool)
            return store is not None and self.images.is_staged(known, store)
        return self.image_devices.is_own(known, Path(place))

    def remembered(self, handle: str) -> tuple[NodeVolumeRecord | None, bool]:
        """Return what is known for taking a volume away, which a damaged record must not keep from happening, and whether it is damaged."""
        try:
            return self.state.get(handle), False
        except RecordDamaged as damage:
            _log.error("this node's record of a volume is damaged", extra={"volume": handle, "error": str(damage)})
            return None, True

    def give_group(self, known: NodeVolumeRecord, store: PoolStore, mounted: Path, capability: Capability) -> None:
        """Give a mounted volume to the pod's group (fsGroup), once. Raises what MountGroups.give raises."""
        group = capability.mount_group
        if not group or group == known.mount_group or mounts.mount_is_read_only(mounted):
            return
        self.groups.give(known.handle, store.backend, mounted, group)
        self.state.keep(replace(self.state.get(known.handle) or known, mount_group=group))

    def grown(self, handle: str, size_bytes: int) -> None:
        """Remember that a volume of a remote pool has been made larger."""
        with self.lock(handle):
            known = self.state.get(handle)
            if known is not None and known.capacity_bytes is not None and known.capacity_bytes < size_bytes:
                self.state.keep(replace(known, capacity_bytes=size_bytes))

    def _own_places(self) -> Iterable[Path]:
        return (self.state.directory, *(store.backend.root() for store in self._pools if store.backend.node_local))
