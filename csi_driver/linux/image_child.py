"""What a node does with an image, done in a child that can be killed: the image may lie behind a server that is away.

`place` is where the node sees the volume's directory, a mount that no pod sees; the image is the file IMAGE in it.
"""

import errno
import fcntl
import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from csi_driver.errors import FailedPrecondition
from csi_driver.linux import children, commands, holders, image_filesystems, loop_devices, mounts
from csi_driver.linux.commands import CommandFailed
from csi_driver.linux.holders import Holder
from csi_driver.linux.loop_devices import LoopDevice

IMAGE = "image"
"""The one file of an image volume's directory."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_RELEASE_SECONDS = 5.0
_REMOUNT_SECONDS = 10.0
_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN, which is XFS_IOC_GOINGDOWN


def hold(place: Path, holder: Holder, seconds: float) -> None:
    """Make this node the holder of the image. Raises FailedPrecondition naming another holder, Unavailable, OSError."""
    said = children.ask(__name__, "hold", place, json.dumps(asdict(holder)), seconds=seconds)
    if "refused" in said:
        raise FailedPrecondition(said["refused"])


def release(place: Path, holder: Holder, seconds: float) -> None:
    """Give the image back. Raises Unavailable, OSError."""
    children.ask(__name__, "release", place, json.dumps(asdict(holder)), seconds=seconds)


def is_held_by(place: Path, node_id: str, seconds: float) -> bool:
    """Tell whether the image is this node's. Raises Unavailable, OSError."""
    return bool(children.ask(__name__, "is_held_by", place, node_id, seconds=seconds)["held"])


def attach(place: Path, *, read_only: bool, block_size: int, seconds: float) -> LoopDevice:
    """Attach the image, or find its device. Raises Unavailable, OSError."""
    wanted = json.dumps({"read_only": read_only, "block_size": block_size})
    return LoopDevice(**children.ask(__name__, "attach", place, wanted, seconds=seconds))


def devices(place: Path, seconds: float) -> list[str]:
    """List the names of the image's devices. Raises Unavailable, OSError."""
    return list(children.ask(__name__, "devices", place, seconds=seconds)["names"])


def detach(place: Path, name: str, seconds: float) -> bool:
    """Detach a device from the image, and tell whether it is free now. Raises Unavailable, OSError."""
    return bool(children.ask(__name__, "detach", place, name, seconds=seconds)["free"])


def serves(place: Path, name: str, seconds: float) -> bool:
    """Tell whether a device has the image and keeps it. Raises Unavailable, OSError."""
    return bool(children.ask(__name__, "serves", place, name, seconds=seconds)["serves"])


def take_new_size(place: Path, name: str, seconds: float) -> int:
    """Make a device as large as the image is, and return bytes. Raises Unavailable, OSError."""
    return int(children.ask(__name__, "take_new_size", place, name, seconds=seconds)["bytes"])


def recognise(device: Path, seconds: float) -> tuple[str, int] | None:
    """Say which filesystem a device begins with, and its size in bytes. Raises Unavailable, OSError."""
    found = children.ask(__name__, "recognise", device, seconds=seconds)["found"]
    return (str(found[0]), int(found[1])) if found else None


def shut_down(mounted: Path, seconds: float) -> None:
    """Let nothing that is still to be written through this mount of ext4 or XFS reach its device. Raises Unavailable, OSError."""
    children.ask(__name__, "shut_down", mounted, seconds=seconds)


def unmount(mounted: Path, seconds: float) -> None:
    """Unmount all that is mounted there, plainly. Raises Unavailable, OSError (EBUSY)."""
    children.ask(__name__, "unmount", mounted, seconds=seconds)


# --- in the child -----------------------------------------------------------------------------------------------------------------


def main(operation: str, place: str, *arguments: str) -> None:
    """Do one operation and print its answer."""
    children.answer(_OPERATIONS, operation, place, *arguments)


def _hold(place: str, holder: str) -> dict[str, Any]:
    with _opened(place) as directory:
        try:
            holders.hold(directory, Holder(**json.loads(holder)))
        except FailedPrecondition as refusal:
            return {"refused": str(refusal)}
    return {}


def _release(place: str, holder: str) -> dict[str, Any]:
    with _opened(place) as directory:
        holders.release(directory, Holder(**json.loads(holder)))
    return {}


def _is_held_by(place: str, node_id: str) -> dict[str, Any]:
    with _opened(place) as directory:
        return {"held": holders.is_held_by(directory, node_id)}


def _attach(place: str, wanted: str) -> dict[str, Any]:
    return asdict(loop_devices.attach(Path(place) / IMAGE, **json.loads(wanted)))


def _devices(place: str) -> dict[str, Any]:
    return {"names": [device.name for device in loop_devices.devices_of(Path(place) / IMAGE)]}


def _detach(place: str, name: str) -> dict[str, Any]:
    return {"free": loop_devices.detach(name, Path(place) / IMAGE, _RELEASE_SECONDS)}


def _serves(place: str, name: str) -> dict[str, Any]:
    return {"serves": loop_devices.serves(name, Path(place) / IMAGE)}


def _take_new_size(place: str, name: str) -> dict[str, Any]:
    if name not in (device.name for device in loop_devices.devices_of(Path(place) / IMAGE)):
        raise OSError(errno.ENXIO, f"{name} has another file by now")
    _ask_for_news(f"{place}/{IMAGE}")
    return {"bytes": loop_devices.take_new_size(name)}


def _ask_for_news(image: str) -> None:
    """Let an NFS client learn a file's new size, as it does when it opens the file (nfs(5), close-to-open); the loop never asks.

    For writing, because that makes it give a read delegation back (nfs4_return_incompatible_delegation() in fs/nfs/nfs4proc.c). What is
    delegated is believed, and nobody recalls it where the controller made the image larger from this very node: to the server
    both are one client.
    """
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        opened = os.open(image, os.O_RDWR | flags)
    except OSError as error:
        if error.errno not in {errno.EROFS, errno.EACCES}:
            raise
        opened = os.open(image, os.O_RDONLY | flags)
    os.close(opened)


def _recognise(device: str) -> dict[str, Any]:
    return {"found": image_filesystems.recognise(Path(device))}


def _shut_down(mounted: str) -> dict[str, Any]:
    with suppress(CommandFailed):  # one that is shut down already
        # Else ext4 discards what was freed last when its journal is closed, shut down or not.
        commands.run(["mount", "-o", "remount,nodiscard", mounted], timeout=_REMOUNT_SECONDS)
    try:
        with _opened(mounted) as top:
            fcntl.ioctl(top, _SHUTDOWN, struct.pack("=I", _NO_LOG_FLUSH))
    except OSError as error:
        if error.errno != errno.EIO:  # what XFS says of one that is shut down already
            raise
    return {}


def _unmount(mounted: str) -> dict[str, Any]:
    while mounts.mount_is_read_only(Path(mounted)) is not None:
        mounts.unmount(Path(mounted))
    return {}


@contextmanager
def _opened(place: str) -> Iterator[int]:
    descriptor = os.open(place, _DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


_OPERATIONS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "hold": _hold,
    "release": _release,
    "is_held_by": _is_held_by,
    "attach": _attach,
    "devices": _devices,
    "detach": _detach,
    "serves": _serves,
    "take_new_size": _take_new_size,
    "recognise": _recognise,
    "shut_down": _shut_down,
    "unmount": _unmount,
}
