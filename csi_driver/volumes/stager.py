"""Staging: a volume comes to its node once, however many pods then see it, and leaves it again.

Pods must never write into a directory whose mount is missing, so every step checks what mountinfo says. What is not ours, files or
mounts, is left as it is.
"""

import errno
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

from csi_driver.errors import AlreadyExists, FailedPrecondition, TatamiError, quoted
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.contents import content_key
from csi_driver.volumes.finality import ASK_AGAIN
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import AccessMode, Layout
from csi_driver.volumes.mount_points import foreign, make_empty_directory
from csi_driver.volumes.node_state import NodeVolumeRecord
from csi_driver.volumes.node_volumes import NodeVolumes
from csi_driver.volumes.placement import Placement, Placements
from csi_driver.volumes.pool_layout import new_token
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.requests import StageVolume


class Stager:
    """Stage and unstage."""

    def __init__(self, pools: Pools, locks: KeyedLocks, volumes: NodeVolumes, placements: Placements) -> None:
        self._pools = pools
        self._locks = locks
        self._volumes = volumes
        self._state = volumes.state
        self._placements = placements

    def stage(self, request: StageVolume) -> None:
        """Mount a volume at its staging path, once on this node.

        Raises NotFound, InvalidArgument, AlreadyExists (staged otherwise, or a foreign mount), FailedPrecondition (foreign files, an
        image that another node holds or that is damaged).
        """
        staging = self._volumes.places.check("staging_target_path", request.staging_path)
        with self._volumes.lock(request.volume_handle), self._hold_content(request.volume_handle):
            place = self._placements.find(
                request.volume_handle, request.capability, request.publish_context, request.volume_context
            )
            known = self._state.get(request.volume_handle)
            if known is not None and self._volumes.is_staged(known, place):
                _require_same_staging(known, request)
                if known.form.layout is Layout.DIRECTORY and self._is_stale(place.store, staging):
                    self._volumes.unmounting.detach(request.volume_handle, staging)
                    known = self._mount(request, place, known, staging)
                if known.form.layout is Layout.IMAGE:
                    self._volumes.images.complete(known)
            else:
                known = self._mount(request, place, known, staging)
            self._volumes.give_group(known, place.store, staging, request.capability)

    def _mount(self, request: StageVolume, place: Placement, known: NodeVolumeRecord | None, staging: Path) -> NodeVolumeRecord:
        backend, capability = place.store.backend, request.capability
        if known is None and backend.remote and backend.is_staged(place.directory, staging):
            # This node's record of it is lost, and with it how it was mounted.
            self._volumes.unmounting.detach(request.volume_handle, staging)
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
            form=place.form,
            epoch=place.epoch,
        )
        self._state.keep(record)
        way = self._volumes.staging_of(record.form)
        try:
            record = way.stage(record, place.store, capability, staging, place.capacity_bytes)
        except TatamiError as error:
            if not isinstance(error, ASK_AGAIN):
                self._forget(record.handle, staging)
            raise
        mounted = topmost_mount_at(staging)
        if record.form.layout is Layout.DIRECTORY and record.source and mounted is not None and mounted.source != record.source:
            # The kernel writes some names in another way.
            record = self._state.keep(replace(record, source=mounted.source))
        return record

    def _forget(self, handle: str, staging: Path) -> None:
        """Remove the record of a volume that has certainly not come: for the kubelet that is final, and no Unstage will.

        A damaged filesystem is told by the record until the kubelet's directory is gone (orphans.py).
        """
        known = self._state.get(handle)
        if known is not None and not known.fault and not known.targets and not self._volumes.is_anywhere(known, staging):
            self._state.volumes.remove(known.id)

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

    def unstage(self, handle: str, staging_path: str) -> None:
        """Unmount the staging path; one that is not staged is unstaged already.

        Raises FailedPrecondition while the volume is published, or where something foreign is mounted; Unavailable while a volume
        that one node at a time may write has writes here that its server did not take: they must not come late.
        """
        staging = self._volumes.places.check("staging_target_path", staging_path)
        with self._volumes.lock(handle):
            known, damaged = self._volumes.remembered(handle)
            if known is None:
                known = self._volumes.image_devices.rediscovered(handle, str(staging))
            if known is None and damaged:
                known = self._behind_a_server(handle, staging)
            if known and (published := [target.path for target in known.targets if topmost_mount_at(target.path)]):
                raise FailedPrecondition(f"volume {quoted(handle)} is still published at {published[0]}: unpublish it first")
            self._volumes.groups.stop(handle)
            is_own = known is not None and known.staging_path == str(staging)
            if known is not None and is_own:
                self._volumes.staging_of(known.form).unstage(known, staging)
            else:
                self._volumes.unmounting.unmount(known, handle, staging)
            if damaged or is_own:
                self._state.volumes.remove(self._state.id_of(handle))

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

    def _hold_content(self, handle: str) -> AbstractContextManager[object]:
        """Keep a deletion away from the look at the record until it can see the mount. Raises OperationPending while one is at work.

        Not where a server is between: from there a node has no locks, and the controller deletes nothing that it has published.
        """
        located = self._pools.locate(handle)
        if located is None or located[0].backend.remote:
            return nullcontext()
        return self._locks.hold(located[0], content_key(located[1]), shared=True)


def _require_same_staging(known: NodeVolumeRecord, request: StageVolume) -> None:
    asked = (os.path.normpath(request.staging_path), request.capability.access_mode, request.capability.mount_flags)
    if asked != (known.staging_path, known.access_mode, known.mount_flags):
        raise AlreadyExists(
            f"volume {quoted(known.handle)} is staged at {known.staging_path} with {known.access_mode} and flags {list(known.mount_flags)}"
        )
