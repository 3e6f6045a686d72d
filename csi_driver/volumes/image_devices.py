"""Images as a node sees them: at a place of its own, and from there on a loop device.

The place is a directory below the node's state directory, which no pod sees: a bind of the volume's directory, or a mount from its server.
What is there is asked of the kernel each time: the place in mountinfo, the device in sysfs by the file that it has. A record on the node
may be older than either, or lost.
"""

import errno
import logging
import os
from dataclasses import replace
from pathlib import Path

from csi_driver.errors import NotFound, Unavailable, quoted
from csi_driver.linux import image_child, image_filesystems, loop_devices, mounts
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.handles import parse_handle
from csi_driver.volumes.images import SECTOR_BYTES
from csi_driver.volumes.model import AccessMode, AccessType, Form, Layout
from csi_driver.volumes.node_state import NodeState, NodeVolumeRecord
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.unmounting import UNMOUNT_SECONDS

_SECONDS = 30.0
GONE = frozenset({errno.ENOENT, errno.ESTALE})
"""What a directory says whose volume was deleted, here or, of a server, meanwhile."""

_log = logging.getLogger(__name__)


class ImageDevices:
    """Reaches images, attaches them to loop devices, and finds them again."""

    def __init__(self, state: NodeState) -> None:
        self._state = state

    def place_of(self, known: NodeVolumeRecord) -> Path:
        """Say where this node sees the volume's directory."""
        return self._state.directory / "images" / known.id

    def reach(self, known: NodeVolumeRecord, store: PoolStore) -> Path:
        """Make the volume's directory seen at its place, and return that. Raises what PoolBackend.stage raises."""
        place = self.place_of(known)
        if not store.backend.is_staged(known.directory, place, known.source):
            if topmost_mount_at(place) is not None:
                mounts.unmount_all(place, UNMOUNT_SECONDS)  # its pool has moved meanwhile
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            store.backend.stage(known.directory, place, (), read_only=False)
        return place

    def attach(self, known: NodeVolumeRecord, *, read_only: bool) -> NodeVolumeRecord:
        """Attach the image to a loop device, or find the one that it has, and return what is known of it then.

        Raises NotFound, Unavailable while somebody still has its device open from before.
        """
        block_size = SECTOR_BYTES[known.form.access_type]
        try:
            found = image_child.attach(self.place_of(known), read_only=read_only, block_size=block_size, seconds=_SECONDS)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise Unavailable(
                    f"volume {quoted(known.handle)} is still in use on this node from before: somebody has its loop device open; try again"
                ) from error
            if error.errno != errno.ENOENT:
                raise
            raise NotFound(
                f"the image of volume {quoted(known.handle)}, or the loop device for it, is not there ({error}): the node plugin needs the "
                "host's /dev"
            ) from error
        if not found.direct_io:
            _log.warning("an image's filesystem does no direct I/O: its pages are cached twice", extra={"volume": known.handle})
        named = replace(known, read_only_device=found.name) if read_only else replace(known, device=found.name)
        if read_only and not known.device:
            named = replace(named, device=found.name)
        return self._state.keep(named)

    def is_attached(self, known: NodeVolumeRecord, name: str) -> bool:
        """Tell whether the image is attached to the loop device of this name."""
        image = self.place_of(known) / image_child.IMAGE
        if not name or not loop_devices.has_file(name, image):
            return False
        # What is mounted from a device keeps it from being another's. Raw block's can be, and the kernel's name for its file is cut off
        # when the container that attached it ends (an upgrade of the driver), so then the file itself is looked at.
        mounted = known.form.access_type is AccessType.MOUNT
        return mounted or loop_devices.backing_file(name) == str(image) or name in self.names_of(known)

    def names_of(self, known: NodeVolumeRecord) -> list[str]:
        """Find the image's devices, also those attached by a process that was killed before it could write that down."""
        place = self.place_of(known)
        if topmost_mount_at(place) is None:
            return []
        try:
            return image_child.devices(place, _SECONDS)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return []  # the image is gone

    def is_own(self, known: NodeVolumeRecord, target: Path) -> bool:
        """Tell whether one of the image's devices is what is seen at `target`, as a filesystem or raw."""
        return any(
            self.is_attached(known, name) and (shows_device(target, name) or shows_node(target, name))
            for name in (known.device, known.read_only_device)
        )

    def rediscovered(self, handle: str, staging_path: str = "") -> NodeVolumeRecord | None:
        """Say the least that is certain of an image whose record on this node is lost; None where this node has no such image."""
        parsed = parse_handle(handle)
        known = NodeVolumeRecord(
            id=self._state.id_of(handle),
            token="",
            handle=handle,
            pool=parsed.pool if parsed is not None else "",
            directory="",
            access_mode=AccessMode.SINGLE_NODE_WRITER,
            staging_path=staging_path,
            form=Form(Layout.IMAGE),
        )
        # The place is the sign that it is ours: in another mount namespace a device may have a file of the same name.
        if topmost_mount_at(self.place_of(known)) is None:
            return None
        names = self.names_of(known)
        return replace(known, device=names[0] if names else "", read_only_device=names[-1] if names else "")


def shows_device(target: Path, name: str) -> bool:
    """Tell whether the filesystem of this loop device is what is mounted on top at `target`."""
    mounted = topmost_mount_at(target)
    return mounted is not None and mounted.source == str(loop_devices.node_of(name)) and is_loop_mount(target)


def is_loop_mount(target: Path) -> bool:
    """Tell whether a filesystem of an image is what is mounted on top at `target`."""
    mounted = topmost_mount_at(target)
    return mounted is not None and mounted.source.startswith("/dev/loop") and mounted.fs_type in image_filesystems.KINDS


def shows_node(target: Path, name: str) -> bool:
    """Tell whether the node of this loop device is what is mounted on top at `target`."""
    try:
        node = os.open(loop_devices.node_of(name), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return mounts.same_file_mounted(node, target)
    finally:
        os.close(node)
