"""What tests of image volumes say and look at: capabilities, loop devices, and what the kernel knows of them."""

import subprocess
import sys
import time
from pathlib import Path

from bench import Bench, unmount_below

from csi_driver.volumes.answers import Volume
from csi_driver.volumes.model import AccessMode, AccessType, ContentSource, Layout, LimitPolicy
from csi_driver.volumes.requests import Capability, CapacityRange, ClassParameters, CreateVolume

MIB = 1024**2
LEAST = {"ext4": 16 * MIB, "xfs": 300 * MIB}


def filesystem(fs_type: str = "ext4", mode: AccessMode = AccessMode.SINGLE_NODE_MULTI_WRITER, *flags: str) -> Capability:
    return Capability(AccessType.MOUNT, mode, fs_type=fs_type, mount_flags=flags)


def block(mode: AccessMode = AccessMode.SINGLE_NODE_MULTI_WRITER) -> Capability:
    return Capability(AccessType.BLOCK, mode)


def make_image(
    bench: Bench,
    name: str,
    capability: Capability,
    size: int = 0,
    source: ContentSource | None = None,
    limit: int = 0,
    limit_policy: LimitPolicy = LimitPolicy.PREFERRED,
    **parameters,
) -> Volume:
    size = size or LEAST.get(capability.fs_type, 16 * MIB)
    parameters = {"layout": Layout.IMAGE, "limit": limit_policy, **parameters}
    request = CreateVolume(name, CapacityRange(size, limit), (capability,), ClassParameters(**parameters), source)
    return bench.volumes.create(request, time.monotonic() + 60)


def devices_below(root: Path) -> list[str]:
    """List the loop devices of the images below `root`: by device and inode, whatever name the kernel has for them."""
    images = [image for image in Path(root).rglob("image") if image.is_file()]
    return sorted({name for image in images for name in devices_of(image)})


def devices_of(file: Path) -> list[str]:
    shown = subprocess.run(["losetup", "-n", "-O", "NAME", "-j", file], capture_output=True, text=True, check=True)
    return [word.removeprefix("/dev/") for word in shown.stdout.split()]


def take_down(root: Path) -> None:
    """Take every mount and loop device below `root` away."""
    devices = devices_below(root)
    unmount_below(root)
    for name in devices:
        subprocess.run(["losetup", "-d", f"/dev/{name}"], check=False, capture_output=True)


CHANGE_FD, CLR_FD, SET_FD, SET_READ_ONLY = 0x4C06, 0x4C01, 0x4C00, 0x125D
_ASK = """
import fcntl, os, sys
device = os.open(sys.argv[2], os.O_RDONLY)
try:
    fcntl.ioctl(device, int(sys.argv[1]), *([os.open(name, os.O_RDWR) for name in sys.argv[3:]] or [bytes(4)]))
except OSError as error:
    print(error.strerror)
"""


def ask_without_capabilities(node: Path, request: int, *files: Path) -> str:
    """Do an ioctl on a device as a pod's root without any capability can; return the error, empty where there was none."""
    without = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--"]
    words = [*without, sys.executable, "-c", _ASK, str(request), node, *files]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
