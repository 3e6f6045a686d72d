"""The node's side: stage a volume once, show it to pods, take it away again.

Pods must never write into a directory whose mount is missing, so every step checks what mountinfo says, and a target is only ever
an empty directory with our mount on it. What is not ours, files or mounts, is left as it is.
"""

import logging
import os
import stat
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from csi_driver.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, quoted
from csi_driver.linux import mounts
from csi_driver.linux.mountinfo import Mount, topmost_mount_at
from csi_driver.linux.mounts import parse_bind_flags
from csi_driver.volumes.handles import parse_handle
from csi_driver.volumes.inline import InlineVolumes, is_inline
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import AccessMode, Capability, PublishVolume, StageVolume
from csi_driver.volumes.node_state import NodeState, NodeVolumeRecord, Target
from csi_driver.volumes.placement import Placement, Placements
from csi_driver.volumes.pools import Pools, new_token

_log = logging.getLogger(__name__)

_UNMOUNT_SECONDS = 10.0
_TARGET_MODE = 0o750
_PATH_MAX, _NAME_MAX = 4096, 255  # limits.h


class Publisher:
    """Stage, publish, unpublish, unstage. `kubelet_dir` is the only place where mounts are made."""

    def __init__(
        self,
        pools: Pools,
        locks: KeyedLocks,
        state: NodeState,
        placements: Placements,
        inline: InlineVolumes,
        kubelet_dir: Path,
    ) -> None:
        self._pools = pools
        self._locks = locks
        self._state = state
        self._placements = placements
        self._inline = inline
        self._kubelet_dir = kubelet_dir

    # --- stage --------------------------------------------------------------------------------------------------------------------

    def stage(self, request: StageVolume) -> None:
        """Mount a volume at its staging path, once on this node.

        Raises NotFound, InvalidArgument, AlreadyExists (staged otherwise, or a foreign mount), FailedPrecondition (foreign files).
        """
        staging = self._below_kubelet("staging_target_path", request.staging_path)
        attributes = parse_bind_flags(request.capability.mount_flags, "volume_capability.mount.mount_flags")
        attributes = replace(attributes, read_only=attributes.read_only or request.capability.access_mode.reader_only)
        with self._lock(request.volume_handle):
            place = self._placements.find(
                request.volume_handle, request.capability, request.publish_context, request.volume_context
            )
            known = self._state.get(request.volume_handle)
            mounted = topmost_mount_at(staging)
            if known is not None and self._is_staged(known, place):
                _require_same_staging(known, request)
                return
            if mounted is not None:
                raise _foreign("staging_target_path", staging, mounted)
            _make_empty_directory("staging_target_path", staging)
            record = NodeVolumeRecord(
                id=self._state.id_of(request.volume_handle),
                token=new_token(),
                handle=request.volume_handle,
                pool=place.store.name,
                directory=place.directory,
                access_mode=request.capability.access_mode,
                staging_path=str(staging),
                mount_flags=request.capability.mount_flags,
                static=place.record is None,
                targets=known.targets if known else (),
            )
            self._state.volumes.replace(record)
            place.store.backend.stage(place.directory, staging, attributes)

    def unstage(self, handle: str, staging_path: str) -> None:
        """Unmount the staging path; one that is not staged is unstaged already.

        Raises FailedPrecondition while the volume is published, or where something foreign is mounted.
        """
        staging = self._below_kubelet("staging_target_path", staging_path)
        with self._lock(handle):
            known = self._state.get(handle)
            if known and (published := [target.path for target in known.targets if topmost_mount_at(target.path)]):
                raise FailedPrecondition(f"volume {quoted(handle)} is still published at {published[0]}: unpublish it first")
            self._unmount(known, handle, staging)
            if known is not None and known.staging_path == str(staging):
                self._state.volumes.remove(known.id)

    # --- publish ------------------------------------------------------------------------------------------------------------------

    def publish(self, request: PublishVolume) -> None:
        """Show a staged volume (or a new inline one) at a pod's target path.

        Raises NotFound, InvalidArgument, FailedPrecondition (not staged, foreign files, single writer), AlreadyExists (another mount).
        """
        target = self._below_kubelet("target_path", request.target_path)
        with self._lock(request.volume_handle):
            if is_inline(request.volume_context):
                self._publish_inline(request, target)
            else:
                self._publish_staged(request, target)

    def _publish_staged(self, request: PublishVolume, target: Path) -> None:
        if not request.staging_path:
            raise InvalidArgument("staging_target_path is missing: volumes of this driver are staged before they are published")
        staging = self._below_kubelet("staging_target_path", request.staging_path)
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
        # Cut off between the volume and the node's record of it, Unpublish finds the volume by the handle.
        record = self._inline.create(request.volume_handle, request.capability, request.volume_context)
        store = self._pools.find(record.pool)
        assert store is not None
        known = known or self._state.volumes.replace(
            NodeVolumeRecord(
                id=self._state.id_of(request.volume_handle),
                token=new_token(),
                handle=request.volume_handle,
                pool=record.pool,
                directory=record.directory,
                access_mode=request.capability.access_mode,
                ephemeral=True,
            )
        )
        self._bind(known, Placement(store, record.directory, record), store.path_of(record.directory), target, request)

    def _bind(self, known: NodeVolumeRecord, place: Placement, source: Path, target: Path, request: PublishVolume) -> None:
        attributes = parse_bind_flags(request.capability.mount_flags, "volume_capability.mount.mount_flags")
        readonly = request.readonly or attributes.read_only or request.capability.access_mode.reader_only
        wanted = Target(str(target), readonly, request.capability.mount_flags)
        mounted = topmost_mount_at(target)
        if mounted is not None:
            if not place.store.backend.is_staged(place.directory, target):
                raise _foreign("target_path", target, mounted)
            if known.target(str(target)) != wanted:
                raise AlreadyExists(
                    f"{target} already shows volume {quoted(known.handle)}, but not with readonly {readonly} and these mount flags"
                )
            return
        self._check_single_writer(known, target, request.capability)
        _make_empty_directory("target_path", target)
        others = tuple(other for other in known.targets if other.path != str(target))
        self._state.volumes.replace(replace(known, targets=(*others, wanted)))
        descriptor = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            mounts.bind(descriptor, target, replace(attributes, read_only=readonly))
        finally:
            os.close(descriptor)
        if not place.store.backend.is_staged(place.directory, target):
            mounts.unmount_all(target, _UNMOUNT_SECONDS)
            raise FailedPrecondition(
                f"{source} is not the directory of volume {quoted(known.handle)}; nothing was left mounted at {target}"
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
        target = self._below_kubelet("target_path", target_path)
        with self._lock(handle):
            known = self._state.get(handle)
            self._unmount(known, handle, target)
            _remove_empty_directory(target)
            if known is None:
                if parse_handle(handle) is None:  # ours are no inline volumes, and their pool need not be there
                    self._inline.delete(handle)  # cut off between making it and writing it down
                return
            left = replace(known, targets=tuple(other for other in known.targets if other.path != str(target)))
            if left.ephemeral and not left.targets:
                self._inline.delete(handle)
                self._state.volumes.remove(known.id)
            elif left != known:
                self._state.volumes.replace(left)

    def _unmount(self, known: NodeVolumeRecord | None, handle: str, path: Path) -> None:
        mounted = topmost_mount_at(path)
        if mounted is None:
            return
        if not self._is_ours(known, handle, path):
            raise FailedPrecondition(
                f"{path} has a mount that is not volume {quoted(handle)}: {mounted.source}; it is left as it is"
            )
        if mounts.unmount_all(path, _UNMOUNT_SECONDS):
            _log.warning(
                "a busy mount was detached: it goes when its last user does", extra={"path": str(path), "volume": handle}
            )

    def _is_ours(self, known: NodeVolumeRecord | None, handle: str, target: Path) -> bool:
        if known is not None and str(target) in known.paths():
            return True
        if known is not None and (store := self._pools.find(known.pool)):
            return store.backend.is_staged(known.directory, target)
        located = self._pools.locate(handle)
        record = located[0].volumes.get(located[1]) if located else None
        return located is not None and record is not None and located[0].backend.is_staged(record.directory, target)

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
            and place.store.backend.is_staged(known.directory, Path(known.staging_path))
        )

    def _lock(self, handle: str) -> AbstractContextManager[None]:
        return self._locks.hold(self._state, f"volume {quoted(handle)}")

    def _below_kubelet(self, field: str, path: str) -> Path:
        normal = Path(os.path.normpath(path))
        ours = (self._state.directory, *(store.backend.root() for store in self._pools if store.backend.node_local))
        if not normal.is_relative_to(self._kubelet_dir) or normal == self._kubelet_dir or any(map(normal.is_relative_to, ours)):
            raise InvalidArgument.field(
                field,
                path,
                f"a path below the kubelet's directory {self._kubelet_dir} (--kubelet-dir), outside the driver's own directories",
            )
        encoded = os.fsencode(normal)
        if b"\0" in encoded or len(encoded) >= _PATH_MAX or any(len(part) > _NAME_MAX for part in encoded.split(b"/")):
            raise InvalidArgument.field(
                field, path, f"a path without NUL, of less than {_PATH_MAX} bytes, {_NAME_MAX} in each component"
            )
        return normal


def _require_same_staging(known: NodeVolumeRecord, request: StageVolume) -> None:
    asked = (os.path.normpath(request.staging_path), request.capability.access_mode, request.capability.mount_flags)
    if asked != (known.staging_path, known.access_mode, known.mount_flags):
        raise AlreadyExists(
            f"volume {quoted(known.handle)} is staged at {known.staging_path} with {known.access_mode} and flags {list(known.mount_flags)}"
        )


def _foreign(field: str, path: Path, mounted: Mount) -> AlreadyExists:
    return AlreadyExists(
        f"{field} {path} has another mount on it: {mounted.root} of {mounted.source} ({mounted.fs_type}); it is left as it is"
    )


def _make_empty_directory(field: str, path: Path) -> None:
    """Make `path` (its parent exists) or find it there, empty. Raises FailedPrecondition for anything else."""
    try:
        path.mkdir(mode=_TARGET_MODE)
    except FileExistsError:
        pass
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FailedPrecondition(
            f"{field} {path}: its parent directory does not exist; the container orchestrator makes it"
        ) from error
    else:
        return
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise FailedPrecondition(f"{field} {path} exists and is no directory; it is left as it is")
    with os.scandir(path) as entries:
        if next(entries, None) is not None:
            raise FailedPrecondition(
                f"{field} {path} is not empty: a mount would hide the files in it; they are left as they are"
            )


def _remove_empty_directory(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        return  # gone, or it holds what is not ours: never a recursive removal; the kubelet names what it finds
