"""What tests of image volumes say and look at: capabilities, loop devices, and what the kernel knows of them."""

import os
import subprocess
import time
from pathlib import Path

from bench import Bench

from csi_driver.linux import loop_devices
from csi_driver.volumes.model import (
    AccessMode,
    AccessType,
    Capability,
    CapacityRange,
    ClassParameters,
    ContentSource,
    CreateVolume,
    Layout,
    Volume,
)

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
    **parameters,
) -> Volume:
    size = size or LEAST.get(capability.fs_type, 16 * MIB)
    parameters = {"layout": Layout.IMAGE, **parameters}
    request = CreateVolume(name, CapacityRange(size, limit), (capability,), ClassParameters(**parameters), source)
    return bench.volumes.create(request, time.monotonic() + 60)


def devices_below(root: Path) -> list[str]:
    """List the loop devices whose file lies below `root`."""
    names = [name for name in os.listdir("/sys/block") if name.startswith("loop")]
    return [name for name in names if (loop_devices.backing_file(name) or "").startswith(f"{root}/")]


def detach_below(root: Path) -> None:
    for name in devices_below(root):
        subprocess.run(["losetup", "-d", f"/dev/{name}"], check=False)
