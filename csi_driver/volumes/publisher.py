"""The node's side: stage a volume once, show it to pods, take it away again.

Pods must never write into a directory whose mount is missing, so every step checks what mountinfo says, and a target is only ever
an empty directory with our mount on it. What is not ours, files or mounts, is left as it is.
"""

import errno
import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from csi_driver.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OperationPending,
    RecordDamaged,
    Unavailable,
    quoted,
)
from csi_driver.linux import mounts
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.contents import content_key
from csi_driver.volumes.handles import parse_handle
from csi_driver.volumes.inline import InlineVolumes, is_inline
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import AccessMode, Capability, PublishVolume, StageVolume
from csi_driver.volumes.mount_groups import MountGroups
from csi_driver.volumes.mount_points import MountPoints, foreign, make_empty_directory, remove_empty_directory
from csi_driver.volumes.node_state import NodeState, NodeVolumeRecord, Target
from csi_driver.volumes.placement import Placement, Placements
from csi_driver.volumes.pools import Pools, PoolStore, new_token
from csi_driver.volumes.unmounting import UNMOUNT_SECONDS, Unmounting

_log = logging.getLogger(__name__)


class Publisher:
    """Stage, publish, unpublish, unstage. `kubelet_dir` is the only place where mounts are made."""

    def __init__(
        self,
        pools: Pools,
        locks: KeyedLocks,
        state: NodeState,
        placements: Placements,
        inline: InlineVolumes,
        groups: MountGroups,
        kubelet_dir: Path,
    ) -> None:
        self._pools = pools
        self._locks = locks
        self._state = state
        self._placements = placements
        self._inline = inline
        self._groups = groups
        self._unmounting = Unmounting(pools)
        self._places = MountPoints(kubelet_dir, self._own_places)

    # --- stage --------------------------------------------------------------------------------------------------------------------

    def stage(self, request: StageVolume) -> None:
        """Mount a volume at its staging path, once on this node.

        Raises NotFound, InvalidArgument, AlreadyExists (staged otherwise, or a foreign mount), FailedPrecondition (foreign files).
        """
        staging = self._places.check("staging_target_path", request.staging_path)
        with self._lock(request.volume_handle), self._hold_content(request.volume_handle):
            place = self._placements.find(
                request.volume_handle, request.capability, request.publish_context, request.volume_context
            )
            known = self._state.get(request.volume_handle)
            if known is not None and self._is_staged(known, place):
                _require_same_staging(known, request)
                if self._is_stale(place.store, staging):
                    self._unmounting.detach(request.volume_handle, staging)
                    known = self._mount(request, place, known, staging)
            else:
                known = self._mount(request, place, known, staging)
            self._give_group(known, place.store, staging, request.capability)

    def _mount(self, request: StageVolume, place: Placement, known: NodeVolumeRecord | None, staging: Path) -> NodeVolumeRecord:
        backend, capability = place.store.backend, request.capability
        if known is None and backend.remote and backend.is_staged(place.directory, staging):
            # This node's record of it is lost, and with it how it was mounted.
            self._unmounting.detach(request.volume_handle, staging)
        if (mounted := topmost_mount_at(staging)) is not None:
            raise foreign("staging_target_path", staging, mounted)
        make_empty_directory("staging_target_path", staging)
        record = NodeVolumeRecord(
            id=self._state.id_of(request.volume_handle),
            token=new_token(),
            handle=request.volume_handle,
            pool=place.store.name,
            directory=place.directory,
            access_mode=capability.access_mode,
            staging_path=str(staging),
            mount_flags=capability.mount_flags,
            static=place.static,
            targets=known.targets if known else (),
            source=backend.source_of(place.directory),
            capacity_bytes=place.capacity_bytes if backend.remote else None,
        )
        self._state.volumes.replace(record)
        backend.stage(place.directory, staging, capability.mount_flags, read_only=capability.access_mode.reader_only)
        mounted = topmost_mount_at(staging)
        if record.source and mounted is not None and mounted.source != record.source:
            # The kernel writes some names in another way.
            record = self._state.volumes.replace(replace(record, source=mounted.source))
        return record

    def _is_stale(self, store: PoolStore, staging: Path) -> bool:
        """Tell whether a mount shows what is no more; Unavailable where its server does not answer at all."""
        if not store.backend.remote:
            return False
        try:
            store.backend.look(staging)
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.EIO, errno.ENOENT):
                raise
            return True
        return False

    def _give_group(self, known: NodeVolumeRecord, store: PoolStore, mounted: Path, capability: Capability) -> None:
        group = capability.mount_group
        if not group or group == known.mount_group or mounts.mount_is_read_only(mounted):
            return
        self._groups.give(known.handle, store.backend, mounted, group)
        self._state.volumes.replace(replace(self._state.get(known.handle) or known, mount_group=group))

    def unstage(self, handle: str, staging_path: str) -> None:
        """Unmount the staging path; one that is not staged is unstaged already.

        Raises FailedPrecondition while the volume is published, or where something foreign is mounted; Unavailable while a volume
        that one node at a time may write has writes here that its server did not take: they must not come late.
        """
        staging = self._places.check("staging_target_path", staging_path)
        with self._lock(handle):
            known, damaged = self._remembered(handle)
            if damaged:
                known = self._behind_a_server(handle, staging)
            if known and (published := [target.path for target in known.targets if topmost_mount_at(target.path)]):
                raise FailedPrecondition(f"volume {quoted(handle)} is still published at {published[0]}: unpublish it first")
            self._groups.stop(handle)
            is_own = known is not None and known.staging_path == str(staging)
            if known is not None and is_own and known.source and known.holds_unsaved_writes:
                self._unmounting.unmount_clean(known, staging)
            else:
                self._unmounting.unmount(known, handle, staging)
            if damaged or (known is not None and is_own):
                self._state.volumes.remove(self._state.id_of(handle))

    # --- publish ------------------------------------------------------------------------------------------------------------------

    def publish(self, request: PublishVolume) -> None:
        """Show a staged volume (or a new inline one) at a pod's target path.

        Raises NotFound, InvalidArgument, FailedPrecondition (not staged, foreign files, single writer), AlreadyExists (another mount).
        """
        target = self._places.check("target_path", request.target_path)
        with self._lock(request.volume_handle):
            if is_inline(request.volume_context):
                self._publish_inline(request, target)
            else:
                self._publish_staged(request, target)

    def _publish_staged(self, request: PublishVolume, target: Path) -> None:
        if not request.staging_path:
            raise InvalidArgument("staging_target_path is missing: volumes of this driver are staged before they are published")
        staging = self._places.check("staging_target_path", request.staging_path)
        place = self._placements.find(
            request.volume_handle, request.capability, request.publish_context, request.volume_context
        )
        known = self._state.get(request.volume_handle)
        if known is None or known.staging_path != str(staging) or not self._is_staged(known, place):
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
            known = known or self._state.volumes.replace(wanted)
        # Cut off between the volume and the node's record of it, Unpublish finds the volume by the handle.
        record = self._inline.create(request.volume_handle, store, request.capability, request.volume_context)
        source = store.backend.source_of(record.directory)
        if known is None or known.directory != record.directory:
            known = self._state.volumes.replace(replace(known or wanted, directory=record.directory, source=source))
        place = Placement(store, record.directory, static=False, capacity_bytes=record.capacity_bytes)
        self._bind(known, place, None, target, request)

    def _bind(
        self, known: NodeVolumeRecord, place: Placement, staging: Path | None, target: Path, request: PublishVolume
    ) -> None:
        """Show what is staged, or, of an inline volume, what lies in the pool."""
        backend, capability = place.store.backend, request.capability
        readonly = request.readonly or "ro" in capability.mount_flags or capability.access_mode.reader_only
        wanted = Target(str(target), readonly, capability.mount_flags)
        mounted = topmost_mount_at(target)
        if mounted is not None:
            if not backend.is_staged(place.directory, target, known.source):
                raise foreign("target_path", target, mounted)
            if known.target(str(target)) != wanted:
                raise AlreadyExists(
                    f"{target} already shows volume {quoted(known.handle)}, but not with readonly {readonly} and these mount flags"
                )
            return
        self._check_single_writer(known, target, capability)
        make_empty_directory("target_path", target)
        if staging is not None:
            self._give_group(known, place.store, staging, capability)
            known = self._state.get(known.handle) or known
        others = tuple(other for other in known.targets if other.path != str(target))
        self._state.volumes.replace(replace(known, targets=(*others, wanted)))
        if staging is None:
            backend.stage(place.directory, target, capability.mount_flags, read_only=readonly)
            self._give_group(known, place.store, target, capability)
        else:
            backend.publish(staging, target, capability.mount_flags, read_only=readonly)
        if not backend.is_staged(place.directory, target, known.source):
            mounts.unmount_all(target, UNMOUNT_SECONDS)
            raise FailedPrecondition(
                f"{staging or place.directory} is not the directory of volume {quoted(known.handle)}; nothing was left mounted at {target}"
            )

    def _check_single_writer(self, known: NodeVolumeRecord, target: Path, capability: Capability) -> None:
        if AccessMode.SINGLE_NODE_SINGLE_WRITER not in (capability.access_mode, known.access_mode):
            return
        for other in known.targets:
            if other.path != str(target) and topmost_mount_at(other.path):
                raise FailedPrecondition(
                    f"volume {quoted(known.handle)} is SINGLE_NODE_SINGLE_WRITER (ReadWriteOncePod) and already published at {other.path}"
                )

    def unpublish(self, handle: str, target_path: str) -> None:
        """Take the volume away from a target path and remove the path; what is not published is unpublished already.

        Raises FailedPrecondition where something foreign is mounted. Files in an unmounted target are left as they are.
        """
        target = self._places.check("target_path", target_path)
        with self._lock(handle):
            known, _ = self._remembered(handle)
            self._unmounting.unmount(known, handle, target)
            remove_empty_directory(target)
            if known is None:
                if parse_handle(handle) is None:  # ours are no inline volumes, and their pool need not be there
                    self._inline.delete(handle, None)  # cut off between making it and writing it down
                return
            left = replace(known, targets=tuple(other for other in known.targets if other.path != str(target)))
            if left != known:
                self._state.volumes.replace(left)
        if left.ephemeral:
            self._remove_inline_leftovers()

    def _remove_inline_leftovers(self) -> None:
        """Delete the volumes of pods that are gone. One whose server is away is left for the next time: its pod need not wait."""
        for record in list(self._state.volumes.readable()):
            if not record.ephemeral or record.targets:
                continue
            try:
                with self._lock(record.handle):
                    current = self._state.get(record.handle)
                    if current is not None and current.ephemeral and not current.targets:
                        self._inline.delete(record.handle, record.pool)
                        self._state.volumes.remove(record.id)
            except OperationPending:
                continue  # it is just being made, or deleted by another
            except (Unavailable, OSError) as error:
                store = self._pools.find(record.pool)
                if store is not None and not store.backend.remote:
                    raise
                _log.warning("an inline volume cannot be deleted yet", extra={"volume": record.handle, "error": str(error)})

    # --- what is where --------------------------------------------------------------------------------------------------------------

    def find_published(self, handle: str, path: str) -> NodeVolumeRecord:
        """Return what this node knows of a volume that is mounted at `path` (staging or target). Raises NotFound."""
        known = self._state.get(handle)
        if known is None or os.path.normpath(path) not in known.paths() or topmost_mount_at(os.path.normpath(path)) is None:
            raise NotFound(f"volume {quoted(handle)} is not mounted at {quoted(path)} on this node")
        return known

    def _is_staged(self, known: NodeVolumeRecord, place: Placement) -> bool:
        return (
            bool(known.staging_path)
            and (known.pool, known.directory) == (place.store.name, place.directory)
            and place.store.backend.is_staged(known.directory, Path(known.staging_path), known.source)
        )

    def grown(self, handle: str, size_bytes: int) -> None:
        """Remember that a volume of a remote pool has been made larger."""
        with self._lock(handle):
            known = self._state.get(handle)
            if known is not None and known.capacity_bytes is not None and known.capacity_bytes < size_bytes:
                self._state.volumes.replace(replace(known, capacity_bytes=size_bytes))

    def _own_places(self) -> Iterable[Path]:
        return (self._state.directory, *(store.backend.root() for store in self._pools if store.backend.node_local))

    def _remembered(self, handle: str) -> tuple[NodeVolumeRecord | None, bool]:
        """Return what is known for taking a volume away, which a damaged record must not keep from happening, and whether it is damaged."""
        try:
            return self._state.get(handle), False
        except RecordDamaged as damage:
            _log.error("this node's record of a volume is damaged", extra={"volume": handle, "error": str(damage)})
            return None, True

    def _behind_a_server(self, handle: str, staging: Path) -> NodeVolumeRecord | None:
        """Say the least that is certain of a remote volume without a record: what was written may be for this node alone to write."""
        mounted = topmost_mount_at(staging)
        store = next((pool for pool in self._pools if pool.backend.remote and staging in pool.backend.mounts_of("")), None)
        if store is None or mounted is None:
            return None
        return NodeVolumeRecord(
            id=self._state.id_of(handle),
            token="",
            handle=handle,
            pool=store.name,
            directory="",
            access_mode=AccessMode.SINGLE_NODE_WRITER,
            staging_path=str(staging),
            source=mounted.source,
        )

    def _hold_content(self, handle: str) -> AbstractContextManager[None]:
        """Keep a deletion away from the look at the record until it can see the mount. Raises OperationPending while one is at work.

        Not where a server is between: from there a node has no locks, and the controller deletes nothing that it has published.
        """
        located = self._pools.locate(handle)
        if located is None or located[0].backend.remote:
            return nullcontext()
        return self._locks.hold(located[0], content_key(located[1]), shared=True)

    def _lock(self, handle: str) -> AbstractContextManager[None]:
        return self._locks.hold(self._state, f"volume {quoted(handle)}")


def _require_same_staging(known: NodeVolumeRecord, request: StageVolume) -> None:
    asked = (os.path.normpath(request.staging_path), request.capability.access_mode, request.capability.mount_flags)
    if asked != (known.staging_path, known.access_mode, known.mount_flags):
        raise AlreadyExists(
            f"volume {quoted(known.handle)} is staged at {known.staging_path} with {known.access_mode} and flags {list(known.mount_flags)}"
        )
