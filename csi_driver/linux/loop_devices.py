"""Loop devices: an image file as a block device (loop(4), <linux/loop.h>, Linux 5.8 or newer for LOOP_CONFIGURE).

A device is attached in one step, with its block size, direct I/O and read-only or not. It is not made autoclear: between our opening
of it and the mount nobody may use it, and a raw block volume has no user while no pod runs. So it stays until it is detached, and
after a crash it is found again: by the name of its file in sysfs, which nothing but the kernel writes and no server is asked for,
and then by device and inode, for in another mount namespace another file may have the name.

A pod has the node of its device and may do on it what asks for no privilege (drivers/block/loop.c): LOOP_CLR_FD, and, where the loop
itself is read-only, LOOP_CHANGE_FD, which puts another file in the place of the image. So the loop is never read-only: its file is
open for writing, and the block device is (BLKROSET, which takes CAP_SYS_ADMIN to undo). A read-only *bind* of a device's node would
stop nothing, for a mount guards files, not devices. What was cleared has no file, or somebody's: device and inode tell, not names.
"""

import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from csi_driver.linux.mountinfo import read_mounts

_CONTROL = "/dev/loop-control"
_SYSFS = Path("/sys/block")

_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A
_CLEAR = 0x4C01
_GET_STATUS = 0x4C05
_SET_CAPACITY = 0x4C07
_ADD = 0x4C80  # LOOP_CTL_ADD; -1 is a number that no device has
_SET_READ_ONLY, _GET_READ_ONLY = 0x125D, 0x125E  # BLKROSET, BLKROGET
_AUTOCLEAR, _DIRECT_IO = 4, 16
_INFO = struct.Struct("=QQQQQ IIII 64s 64s 32s QQ")  # struct loop_info64
_CONFIG = struct.Struct(f"=II {_INFO.size}s 64x")  # struct loop_config
_ATTEMPTS = 64
_POLL_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class LoopDevice:
    """An attached device: `name` is loop5, `direct_io` whether the image's filesystem could do without its page cache.

    `ending`: it is to be detached, and is used until its last user lets go.
    """

    name: str
    read_only: bool
    direct_io: bool
    ending: bool = False

    @property
    def node(self) -> Path:
        return node_of(self.name)


def node_of(name: str) -> Path:
    return Path("/dev") / name


def attach(image: Path, *, read_only: bool, block_size: int) -> LoopDevice:
    """Attach `image` (not followed where it is a symbolic link), or return the device that it has in this mode.

    Raises OSError: EBUSY while a device of it is ending (a second one would be a second cache of the same bytes), ENOENT where
    `/dev` has no loop devices, ENXIO, EINVAL (a block size that the image cannot have), EIO.
    """
    opened = os.open(image, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(opened)
        devices = devices_of(image)
        if any(device.ending for device in devices):
            raise OSError(errno.EBUSY, "a device of it waits for its last user", os.fspath(image))
        known = next((device for device in devices if device.read_only is read_only), None)
        if known is not None:
            return known
        for _ in range(_ATTEMPTS):
            name = _free()
            if _configure(name, opened, read_only=read_only, block_size=block_size):
                return _look(name, status) or LoopDevice(name, read_only, direct_io=False)
    finally:
        os.close(opened)
    raise OSError(errno.EBUSY, "others take every free loop device", os.fspath(image))


def devices_of(image: Path) -> list[LoopDevice]:
    """List the devices that have just this file, by device and inode, ending ones too. Raises OSError where it cannot be opened."""
    status = _status_of(image)
    found = (_look(name, status) for name in _names() if has_file(name, image))
    return [device for device in found if device is not None]


def serves(name: str, image: Path) -> bool:
    """Tell whether the device has just this file, and keeps it. Raises OSError where the file cannot be opened."""
    found = _look(name, _status_of(image))
    return found is not None and not found.ending


def backing_file(name: str) -> str | None:
    """Return the path of a device's file; None where nothing is attached."""
    try:
        shown = (_SYSFS / name / "loop" / "backing_file").read_bytes()
    except OSError:
        return None
    return os.fsdecode(shown.removesuffix(b"\n")).removesuffix(" (deleted)")


def has_file(name: str, image: Path) -> bool:
    """Tell whether a device that was attached to `image` still can be: sysfs shows this name, or, its mount being gone, the last part."""
    return backing_file(name) in (os.fspath(image), _cut_off(image))


def detach(name: str, image: Path, seconds: float) -> bool:
    """Detach the device from `image`, and tell whether it is free now; False: somebody has it open, and it goes with the last one.

    A device that has another file by now is left alone. Raises OSError.
    """
    deadline = time.monotonic() + seconds
    with suppress(FileNotFoundError), _opened(name) as device:
        if not _is_of(name, device, image):
            _let_write(name)
            return True
        try:
            fcntl.ioctl(device, _CLEAR)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
    # The kernel lets go when the last descriptor is closed, ours just now; udev or blkid may be looking at it.
    while _still_has(name, image):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    _let_write(name)
    return True


def _let_write(name: str) -> None:
    """Make a device that is free writable again, for whoever has it next: BLKROSET outlasts what was attached at the time."""
    try:
        # Exclusively open, it cannot be attached meanwhile (LOOP_CONFIGURE answers EBUSY): somebody else's read-only device stays one.
        with _opened(name, os.O_RDWR | os.O_EXCL) as device:
            try:
                _file_and_flags(device)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    _set_read_only(device, read_only=False)
    except OSError as error:
        if error.errno not in {errno.EBUSY, errno.ENOENT, errno.ENXIO}:
            raise


def is_ending(name: str) -> bool:
    """Tell whether a device is to be detached as soon as its last user lets go."""
    try:
        return (_SYSFS / name / "loop" / "autoclear").read_bytes().strip() == b"1"
    except OSError:
        return False


def _is_of(name: str, device: int, image: Path) -> bool:
    """Tell whether the open device has this image: the name that is left of a file whose mount has gone is every image's."""
    shown = backing_file(name)
    if shown == os.fspath(image):
        return True
    if shown != _cut_off(image):
        return False
    try:
        status = image.lstat()
        file, _ = _file_and_flags(device)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENXIO, errno.ESTALE}:
            raise
        return False
    return file == (status.st_dev, status.st_ino)


def _still_has(name: str, image: Path) -> bool:
    """Tell whether a device that was detached still has this image, and not another's that was attached to it since."""
    if not has_file(name, image):
        return False
    try:
        with _opened(name) as device:
            return _is_of(name, device, image)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENXIO}:
            raise
        return False


def take_new_size(name: str) -> int:
    """Make the device as large as its file is by now, under the eyes of its users; return bytes. Raises OSError."""
    with _opened(name) as device:
        fcntl.ioctl(device, _SET_CAPACITY)
    return size_of(name)


def size_of(name: str) -> int:
    """Return a device's size in bytes. Raises OSError where there is none."""
    return int((_SYSFS / name / "size").read_text()) * 512  # sectors of 512 bytes, whatever the block size is


def _cut_off(image: Path) -> str:
    # d_path() of a file whose mount was taken away, or went with its mount namespace: it begins at the root of that mount.
    return f"/{image.name}"


def _names() -> list[str]:
    return [entry.name for entry in os.scandir(_SYSFS) if entry.name.startswith("loop")]


def _free() -> str:
    """Find a device that is free, and whose node no pod has: whoever cleared his device must not meet another's image there."""
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        name = f"loop{fcntl.ioctl(control, _GET_FREE)}"
        if any(mount.root.rpartition("/")[2] == name for mount in read_mounts()):
            name = f"loop{fcntl.ioctl(control, _ADD, -1)}"
        return name
    finally:
        os.close(control)


def _configure(name: str, opened: int, *, read_only: bool, block_size: int) -> bool:
    """Attach the file; False where somebody else was quicker."""
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, _DIRECT_IO, b"", b"", b"", 0, 0)
    with _opened(name, os.O_RDWR) as device:
        try:
            fcntl.ioctl(device, _CONFIGURE, _CONFIG.pack(opened, block_size, info))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        _set_read_only(device, read_only=read_only)
    return True


def _set_read_only(device: int, *, read_only: bool) -> None:
    fcntl.ioctl(device, _SET_READ_ONLY, struct.pack("=i", read_only))


def _status_of(image: Path) -> os.stat_result:
    opened = os.open(image, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.fstat(opened)
    finally:
        os.close(opened)


def _look(name: str, status: os.stat_result) -> LoopDevice | None:
    """Describe the device if it has just this file."""
    try:
        with _opened(name) as device:
            file, flags = _file_and_flags(device)
            read_only = bool(struct.unpack("=i", fcntl.ioctl(device, _GET_READ_ONLY, bytes(4)))[0])
    except OSError:
        return None
    if file != (status.st_dev, status.st_ino):
        return None
    return LoopDevice(name, read_only, bool(flags & _DIRECT_IO), ending=bool(flags & _AUTOCLEAR))


def _file_and_flags(device: int) -> tuple[tuple[int, int], int]:
    """Return device and inode of the attached file, and the loop's flags. Raises OSError: ENXIO where there is none."""
    found = _INFO.unpack(fcntl.ioctl(device, _GET_STATUS, bytes(_INFO.size)))
    return (_decoded(found[0]), found[1]), found[8]


def _decoded(number: int) -> int:
    # huge_encode_dev() of the kernel, which is what glibc's makedev() makes of the same major and minor.
    return os.makedev(os.major(number), os.minor(number))


@contextmanager
def _opened(name: str, mode: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(node_of(name), mode | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
