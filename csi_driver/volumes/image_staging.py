"""Images on a node: reached, held, attached, checked, mounted; and back, in the reverse order.

All that touches image or device is done in a child with a deadline (linux/image_child.py), for a server may be behind it. Where the image
is seen and which devices it has is in `image_devices.py`, its filesystem in `image_mounts.py`.

Every step is found again by what the kernel says. So a step that was done before a crash is not done twice, and nothing is left that
Unstage would not find. What is never done: formatting, which happened when the volume was made; and letting go of a device that somebody
still writes to.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from csi_driver.errors import DeadlineExceeded, FailedPrecondition, NotFound, TatamiError, Unavailable, quoted
from csi_driver.linux import image_child, image_filesystems, loop_devices, mounts
from csi_driver.linux.bind_flags import parse_bind_flags
from csi_driver.linux.holders import Holder
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.answers import Usage, UsageSource, VolumeStats
from csi_driver.volumes.image_devices import GONE, ImageDevices, is_loop_mount, shows_device, shows_node
from csi_driver.volumes.image_mounts import ImageFilesystems
from csi_driver.volumes.jobs import Jobs
from csi_driver.volumes.model import AccessType
from csi_driver.volumes.node_state import NodeState, NodeVolumeRecord
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.requests import Capability
from csi_driver.volumes.staging import undo_publish
from csi_driver.volumes.unmounting import UNMOUNT_SECONDS

_SECONDS = 30.0
_TRIM_SECONDS = 10.0
_FLAGS = "volume_capability.mount.mount_flags"

_log = logging.getLogger(__name__)


class ImageStaging:
    """The Staging (staging.py) of images, with a filesystem or raw. `boot_id` tells this boot of the node from earlier ones."""

    def __init__(self, pools: Pools, state: NodeState, devices: ImageDevices, jobs: Jobs, node_id: str, boot_id: str) -> None:
        self._pools = pools
        self._state = state
        self._devices = devices
        self._filesystems = ImageFilesystems(jobs)
        self._node_id = node_id
        self._boot_id = boot_id

    # --- stage --------------------------------------------------------------------------------------------------------------------

    def stage(
        self, known: NodeVolumeRecord, store: PoolStore, capability: Capability, staging: Path, size_bytes: int | None
    ) -> NodeVolumeRecord:
        """Attach the image and mount its filesystem, once it is known to be sound.

        Raises FailedPrecondition (another node holds it, its filesystem needs a person), NotFound, Unavailable, OperationPending.
        """
        try:
            return self._stage(known, store, capability, staging, size_bytes)
        except (FailedPrecondition, NotFound):
            # For the kubelet that is final: no Unstage will come, and what was begun would keep the volume from being deleted or repaired.
            with suppress(TatamiError, OSError):
                self.unstage(self._state.get(known.handle) or known, staging)
            raise

    def _stage(
        self, known: NodeVolumeRecord, store: PoolStore, capability: Capability, staging: Path, size_bytes: int | None
    ) -> NodeVolumeRecord:
        place = self._devices.reach(known, store)
        image_child.hold(place, Holder(self._node_id, self._boot_id, known.epoch), _SECONDS)
        block = known.form.access_type is AccessType.BLOCK
        known = self._devices.attach(known, read_only=block and capability.access_mode.reader_only)
        if size_bytes is not None and loop_devices.size_of(known.device) < size_bytes:
            image_child.take_new_size(place, known.device, _SECONDS)
        if not block:
            try:
                self._filesystems.mount(known, capability, staging)
            except FailedPrecondition as error:
                known = self._state.keep(replace(known, fault=str(error)))
                raise
            if known.fault:
                known = self._state.keep(replace(known, fault=""))
        return known

    # --- what is there --------------------------------------------------------------------------------------------------------------

    def is_staged(self, known: NodeVolumeRecord, store: PoolStore) -> bool:  # noqa: ARG002
        return (
            self._devices.is_attached(known, known.device)
            and not loop_devices.is_ending(known.device)
            and (known.form.access_type is AccessType.BLOCK or shows_device(Path(known.staging_path), known.device))
        )

    def shows(self, known: NodeVolumeRecord, store: PoolStore, target: Path) -> bool:  # noqa: ARG002
        if known.form.access_type is AccessType.MOUNT:
            return self._devices.is_attached(known, known.device) and shows_device(target, known.device)
        return any(
            self._devices.is_attached(known, name) and shows_node(target, name)
            for name in (known.device, known.read_only_device)
        )

    # --- publish ------------------------------------------------------------------------------------------------------------------

    def publish(
        self,
        known: NodeVolumeRecord,
        store: PoolStore,  # noqa: ARG002
        target: Path,
        flags: Sequence[str],
        *,
        read_only: bool,
    ) -> NodeVolumeRecord:
        """Bind the mounted filesystem, or the device's node: a read-only one of its own where nothing may be written."""
        attributes = parse_bind_flags(flags, _FLAGS)
        if known.form.access_type is AccessType.MOUNT:
            source = os.open(known.staging_path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            attributes = replace(attributes, read_only=attributes.read_only or read_only)
        else:
            # Also the one that was staged: a pod that has its node may have taken the image from it (linux/loop_devices.py).
            known = self._devices.attach(known, read_only=read_only)
            name = known.read_only_device if read_only else known.device
            source = os.open(loop_devices.node_of(name), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            mounts.bind(source, target, attributes)
        finally:
            os.close(source)
        if known.form.access_type is AccessType.BLOCK and not image_child.serves(self._devices.place_of(known), name, _SECONDS):
            undo_publish(target)
            raise Unavailable(
                f"volume {quoted(known.handle)}: somebody took the image from {name} on this node just now; try again"
            )
        return known

    def stats(self, known: NodeVolumeRecord) -> VolumeStats:
        """Return what the filesystem says (statvfs(3)); of raw block only the size is known. Raises NotFound."""
        if known.form.access_type is AccessType.BLOCK:
            unknown = Usage(None, None, None)
            return VolumeStats(Usage(None, loop_devices.size_of(known.device), None), unknown, UsageSource.DEVICE)
        found = os.statvfs(known.staging_path)
        total, free = found.f_blocks * found.f_frsize, found.f_bfree * found.f_frsize
        return VolumeStats(
            bytes=Usage(total - free, total, found.f_bavail * found.f_frsize),
            inodes=Usage(found.f_files - found.f_ffree, found.f_files, found.f_favail),
            source=UsageSource.FILESYSTEM,
        )

    # --- grow ---------------------------------------------------------------------------------------------------------------------

    def grow(self, known: NodeVolumeRecord) -> int:
        """Let the users of a staged image see its new size, and grow its filesystem; return the device's bytes.

        Raises FailedPrecondition where the filesystem cannot be grown while it is mounted, Unavailable, DeadlineExceeded.
        """
        place = self._devices.place_of(known)
        for name in {known.device, known.read_only_device} - {""}:
            if self._devices.is_attached(known, name):
                image_child.take_new_size(place, name, _SECONDS)
        size = loop_devices.size_of(known.device)
        self._filesystems.grow(known)
        return size

    def complete(self, known: NodeVolumeRecord) -> None:
        """Do what a crash cut off after the mount: a filesystem that came with a smaller origin is made as large as its volume."""
        self._filesystems.grow_if_allowed(known)

    # --- unstage ------------------------------------------------------------------------------------------------------------------

    def unstage(self, known: NodeVolumeRecord, staging: Path) -> None:
        """Unmount, detach, give back, let go, in this order; each step may have been done before.

        Raises Unavailable while somebody still uses the filesystem or the device: another node must not have it before.
        """
        self._filesystems.stop_check(known.handle)
        place = self._devices.place_of(known)
        self._unmount(known, staging)
        for name in {known.device, known.read_only_device, *self._devices.names_of(known)} - {""}:
            if not image_child.detach(place, name, _SECONDS):
                raise Unavailable(
                    f"volume {quoted(known.handle)} is still in use on this node: {loop_devices.node_of(name)} is open somewhere (a pod's mount that "
                    "was detached while it was busy goes with its last process); try again"
                )
        self._give_back(known, place)
        mounts.unmount_all(place, UNMOUNT_SECONDS)
        place.rmdir() if place.exists() else None

    def _is_held(self, place: Path) -> bool:
        if topmost_mount_at(place) is None:
            return True  # nothing tells otherwise
        try:
            return image_child.is_held_by(place, self._node_id, _SECONDS)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return False

    def _unmount(self, known: NodeVolumeRecord, staging: Path) -> None:
        if topmost_mount_at(staging) is None:
            return
        if not is_loop_mount(staging):
            raise FailedPrecondition(f"{staging} has a mount that is not volume {quoted(known.handle)}; it is left as it is")
        held = self._is_held(self._devices.place_of(known))
        try:
            if not held:
                # Another node has had it meanwhile: our journal over its data, or a trim by our idea of what is free, would destroy both.
                _log.warning(
                    "an image was given to another node: what was not written is dropped", extra={"volume": known.handle}
                )
                image_child.shut_down(staging, _SECONDS)
            elif not mounts.mount_is_read_only(staging):
                image_filesystems.trim(staging, _TRIM_SECONDS)
            image_child.unmount(staging, _SECONDS)
        except (OSError, DeadlineExceeded) as error:
            raise Unavailable(
                f"volume {quoted(known.handle)} stays mounted at {staging}, so that what was written here cannot meet another node's writes "
                f"({error}); try again"
            ) from error

    def _give_back(self, known: NodeVolumeRecord, place: Path) -> None:
        store = self._pools.find(known.pool)
        try:
            if topmost_mount_at(place) is None:
                if store is None or not known.directory:
                    return
                self._devices.reach(known, store)
            image_child.release(place, Holder(self._node_id, self._boot_id, known.epoch), _SECONDS)
        except NotFound:
            return  # the volume is gone, and its hold with it
        except OSError as error:
            if error.errno not in GONE:
                raise
