"""Publishing: a staged volume, or a pod's own inline one, is shown at a pod's target path, and taken away again.

A target is only ever an empty directory, or for raw block an empty file, with our mount on it. What is not ours, files or mounts, is
left as it is.
"""

import logging
from dataclasses import replace
from pathlib import Path

from csi_driver.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    OperationPending,
    TatamiError,
    Unavailable,
    quoted,
)
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.handles import parse_handle
from csi_driver.volumes.inline import InlineVolumes, is_inline
from csi_driver.volumes.model import AccessMode, AccessType
from csi_driver.volumes.mount_points import foreign, make_empty_directory, make_empty_file, remove_empty
from csi_driver.volumes.node_state import NodeVolumeRecord, Target
from csi_driver.volumes.node_volumes import NodeVolumes
from csi_driver.volumes.placement import Placement, Placements
from csi_driver.volumes.pool_layout import new_token
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.requests import Capability, PublishVolume
from csi_driver.volumes.staging import undo_publish

_log = logging.getLogger(__name__)


class Publisher:
    """Publish and unpublish."""

    def __init__(self, pools: Pools, volumes: NodeVolumes, placements: Placements, inline: InlineVolumes) -> None:
        self._pools = pools
        self._volumes = volumes
        self._state = volumes.state
        self._placements = placements
        self._inline = inline

    # --- publish ------------------------------------------------------------------------------------------------------------------

    def publish(self, request: PublishVolume) -> None:
        """Show a staged volume (or a new inline one) at a pod's target path.

        Raises NotFound, InvalidArgument, FailedPrecondition (not staged, foreign files, single writer), AlreadyExists (another mount).
        """
        target = self._volumes.places.check("target_path", request.target_path)
        with self._volumes.lock(request.volume_handle):
            if is_inline(request.volume_context):
                self._publish_inline(request, target)
            else:
                self._publish_staged(request, target)

    def _publish_staged(self, request: PublishVolume, target: Path) -> None:
        if not request.staging_path:
            raise InvalidArgument("staging_target_path is missing: volumes of this driver are staged before they are published")
        staging = self._volumes.places.check("staging_target_path", request.staging_path)
        place = self._placements.find(
            request.volume_handle, request.capability, request.publish_context, request.volume_context
        )
        known = self._state.get(request.volume_handle)
        if known is None or known.staging_path != str(staging) or not self._volumes.is_staged(known, place):
            raise FailedPrecondition(
                f"volume {quoted(request.volume_handle)} is not staged at {staging}: NodeStageVolume comes first"
            )
        self._bind(known, place, staging, target, request)

    def _publish_inline(self, request: PublishVolume, target: Path) -> None:
        known = self._state.get(request.volume_handle)
        if known is not None and not known.ephemeral:
            raise AlreadyExists(
                f"volume {quoted(request.volume_handle)} is no inline volume: it is staged at {known.staging_path}"
            )
        store = self._inline.choose_pool(request.volume_context)
        wanted = NodeVolumeRecord(
            id=self._state.id_of(request.volume_handle),
            token=new_token(),
            handle=request.volume_handle,
            pool=store.name,
            directory="",
            access_mode=request.capability.access_mode,
            ephemeral=True,
        )
        if store.backend.remote:
            # Before the volume: Unpublish must know in which pool to look for it, when others' servers are away.
            known = known or self._state.keep(wanted)
        # Cut off between the volume and the node's record of it, Unpublish finds the volume by the handle.
        record = self._inline.create(request.volume_handle, store, request.capability, request.volume_context)
        source = store.backend.source_of(record.directory)
        if known is None or known.directory != record.directory:
            known = self._state.keep(replace(known or wanted, directory=record.directory, source=source))
        place = Placement(store, record.directory, static=False, capacity_bytes=record.capacity_bytes)
        self._bind(known, place, None, target, request)

    def _bind(
        self, known: NodeVolumeRecord, place: Placement, staging: Path | None, target: Path, request: PublishVolume
    ) -> None:
        """Show what is staged, or, of an inline volume, what lies in the pool."""
        backend, capability = place.store.backend, request.capability
        way = self._volumes.staging_of(known.form)
        readonly = request.readonly or "ro" in capability.mount_flags or capability.access_mode.reader_only
        wanted = Target(str(target), readonly, capability.mount_flags)
        mounted = topmost_mount_at(target)
        if mounted is not None:
            if not way.shows(known, place.store, target):
                raise foreign("target_path", target, mounted)
            if known.target(str(target)) != wanted:
                raise AlreadyExists(
                    f"{target} already shows volume {quoted(known.handle)}, but not with readonly {readonly} and these mount flags"
                )
            return
        self._check_single_writer(known, target, capability)
        if known.form.access_type is AccessType.BLOCK:
            make_empty_file("target_path", target)
        else:
            make_empty_directory("target_path", target)
        if staging is not None:
            self._volumes.give_group(known, place.store, staging, capability)
            known = self._state.get(known.handle) or known
        others = tuple(other for other in known.targets if other.path != str(target))
        known = self._state.keep(replace(known, targets=(*others, wanted)))
        if staging is None:
            backend.stage(place.directory, target, capability.mount_flags, read_only=readonly)
            self._volumes.give_group(known, place.store, target, capability)
        else:
            known = way.publish(known, place.store, target, capability.mount_flags, read_only=readonly)
        if not way.shows(known, place.store, target):
            undo_publish(target)
            raise FailedPrecondition(
                f"{staging or place.directory} is not volume {quoted(known.handle)}; nothing was left mounted at {target}"
            )

    def _check_single_writer(self, known: NodeVolumeRecord, target: Path, capability: Capability) -> None:
        if AccessMode.SINGLE_NODE_SINGLE_WRITER not in (capability.access_mode, known.access_mode):
            return
        for other in known.targets:
            if other.path != str(target) and topmost_mount_at(other.path):
                raise FailedPrecondition(
                    f"volume {quoted(known.handle)} is SINGLE_NODE_SINGLE_WRITER (ReadWriteOncePod) and already published at {other.path}"
                )

    # --- unpublish ----------------------------------------------------------------------------------------------------------------

    def unpublish(self, handle: str, target_path: str) -> None:
        """Take the volume away from a target path and remove the path; what is not published is unpublished already.

        Raises FailedPrecondition where something foreign is mounted. Files in an unmounted target are left as they are. An inline volume
        that cannot be deleted keeps no pod: this node remembers it, and the sweeper tries again.
        """
        target = self._volumes.places.check("target_path", target_path)
        with self._volumes.lock(handle):
            known, _ = self._volumes.remembered(handle)
            lost = self._volumes.image_devices.rediscovered(handle) if known is None else None
            if lost is not None and self._volumes.image_devices.is_own(lost, target):
                self._volumes.unmounting.detach(handle, target)
            self._volumes.unmounting.unmount(known, handle, target)
            remove_empty(target)
            if known is None:
                if parse_handle(handle) is None:  # ours are no inline volumes, and their pool need not be there
                    self._inline.delete(handle, None)  # cut off between making it and writing it down
                return
            left = replace(known, targets=tuple(other for other in known.targets if other.path != str(target)))
            if left != known:
                self._state.keep(left)
        if left.ephemeral:
            self.remove_inline_leftovers(left.pool)

    def remove_inline_leftovers(self, pool: str) -> None:
        """Delete the volumes of pods that are gone. One that cannot be deleted is kept in mind for the next time: no pod need wait."""
        store = self._pools.find(pool)
        if store is None:
            return  # taken out of pools.toml, and back some day
        for record in list(self._state.volumes.readable()):
            if record.pool != pool or not record.ephemeral or record.targets:
                continue
            try:
                self._remove_inline(record)
            except OperationPending:
                continue  # it is just being made, or deleted by another
            except (TatamiError, OSError) as error:
                _log.warning("an inline volume cannot be deleted yet", extra={"volume": record.handle, "error": str(error)})
                if store.backend.remote and isinstance(error, (Unavailable, OSError)):
                    return  # the others would take as long

    def _remove_inline(self, record: NodeVolumeRecord) -> None:
        with self._volumes.lock(record.handle):
            current = self._state.get(record.handle)
            if current is not None and current.ephemeral and not current.targets:
                self._inline.delete(record.handle, record.pool)
                self._state.volumes.remove(record.id)
