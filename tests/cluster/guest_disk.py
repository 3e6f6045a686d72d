"""The disk that guests start with: a file system with the images in containerd's store, made on this machine, once for each set of them.

A guest's processes run at a tenth of this machine's speed: the driver's image alone would take it more than a minute to unpack. Each
guest has a copy of it.
"""

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from cluster.layout import CACHE
from cluster.machines import Machine
from cluster.nodes import CONTAINERD, SOCKET
from cluster.progress import step, wait_until

DISKS = CACHE / "guest-disks"
SIZE = 20 << 30  # bytes; sparse


def guest_disk(archives: Sequence[Path]) -> Path:
    """Return the disk with these images; half a minute when one of them is new, nothing when not."""
    described = "\n".join([CONTAINERD, *(archive.name for archive in archives)])
    target = DISKS / f"{hashlib.sha256(described.encode()).hexdigest()[:12]}.xfs"
    if target.exists():
        return target
    DISKS.mkdir(parents=True, exist_ok=True)
    for stale in DISKS.iterdir():
        stale.unlink()
    workshop = Machine("guest-disk", network=False)
    with step("images onto the guests' disk"):
        workshop.boot()
        disk, configuration = workshop.directory / "disk", workshop.directory / "containerd.toml"
        # What containerd writes down has no paths in it: the guest has its store in another place.
        configuration.write_text(CONTAINERD.replace('root = "/var', 'root = "/mnt/var'))
        with disk.open("wb") as stream:
            stream.truncate(SIZE)
        workshop.run("sh", "-ec", MOUNT, "sh", str(disk))
        workshop.start("containerd", "containerd", f"--config={configuration}")
        wait_until("containerd", lambda: workshop.run("ctr", "--address", SOCKET, "version"), 30)
        for archive in archives:
            workshop.run("ctr", "--address", SOCKET, "--namespace", "k8s.io", "images", "import", str(archive), timeout=120)
        workshop.stop("containerd")
        workshop.run("umount", "/mnt")
        shutil.move(disk, target)
        workshop.destroy()
    return target


MOUNT = """
mkfs.xfs -q "$1"
mount -o loop,noatime "$1" /mnt
mkdir -p /mnt/var/lib/containerd
mount -t tmpfs -o mode=755 run /run
"""
