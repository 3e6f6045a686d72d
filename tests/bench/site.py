"""What the benchmarks run on: filesystems in images of their own, a driver as a process, trees, and other ways to copy them."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from csi_driver.linux.system_calls import sync_filesystem
from csi_driver.rpc import csi_pb2 as csi
from tests.driver_process import DriverProcess
from tests.storm.client import Client

MIB = 1024**2
_MKFS_OPTIONS = {
    # A discard, of mkfs or while it is mounted, would give the image's blocks back; lazy initialisation goes on behind the first runs.
    "xfs": ("-K", "-m", "reflink=1"),
    "btrfs": ("--nodiscard",),
    "ext4": ("-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"),
}
CAPABILITY = csi.VolumeCapability(
    mount=csi.VolumeCapability.MountVolume(),
    access_mode=csi.VolumeCapability.AccessMode(mode=csi.VolumeCapability.AccessMode.SINGLE_NODE_MULTI_WRITER),
)


@dataclass
class Site:
    """One filesystem of a kind, with a driver whose pool lies on it."""

    kind: str
    place: Path
    driver: DriverProcess
    client: Client

    @property
    def pool(self) -> Path:
        return self.place / "pool"

    def create(self, name: str, *, snapshot: str = "", volume: str = "") -> csi.Volume:
        source = None
        if snapshot:
            source = csi.VolumeContentSource(snapshot=csi.VolumeContentSource.SnapshotSource(snapshot_id=snapshot))
        elif volume:
            source = csi.VolumeContentSource(volume=csi.VolumeContentSource.VolumeSource(volume_id=volume))
        request = csi.CreateVolumeRequest(name=name, volume_capabilities=[CAPABILITY], volume_content_source=source)
        return self.insist("CreateVolume", request).volume

    def snapshot(self, name: str, volume: str) -> csi.Snapshot:
        return self.insist("CreateSnapshot", csi.CreateSnapshotRequest(name=name, source_volume_id=volume)).snapshot

    def delete_volume(self, handle: str) -> None:
        self.insist("DeleteVolume", csi.DeleteVolumeRequest(volume_id=handle))

    def delete_snapshot(self, handle: str) -> None:
        self.insist("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=handle))

    def insist(self, method: str, request):
        """Call as a sidecar does: again and again while the answer is "not yet"."""
        while True:
            try:
                return self.client.call(method, request, timeout=600)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.ABORTED:
                    raise
                time.sleep(0.05)

    def path(self, volume: csi.Volume) -> Path:
        return self.pool / volume.volume_id.rpartition(".")[2]

    def settle(self) -> None:
        """Wait until the trash is empty and everything is on disk, so that nobody pays for what came before."""
        while os.listdir(self.pool / ".csi/trash"):
            time.sleep(0.02)
        os.sync()


@contextmanager
def site(kind: str, work: Path, size: int, *, write_out: bool) -> Iterator[Site]:
    """Make a filesystem of `size` bytes in an image, and a driver on it."""
    home = work / kind
    place = home / "disk"
    place.mkdir(parents=True)
    image = home / "image"
    if write_out:
        _write_out(image, size)
    else:
        image.touch()
        os.truncate(image, size)
    # btrfs talks, also when quiet.
    subprocess.run([f"mkfs.{kind}", "-q", *_MKFS_OPTIONS[kind], image], check=True, capture_output=True)
    # Direct, or the image's own page cache would take gigabytes at once and make each commit of a journal wait for them.
    attach = ["losetup", "--find", "--show", "--direct-io=on", image]
    device = subprocess.run(attach, check=True, capture_output=True, text=True).stdout.strip()
    (home / "pools.toml").write_text(
        f'[driver]\nbackend = "hostpath"\n[pools.default]\npath = "{place}/pool"\novercommit = 1000\n'
    )
    driver = DriverProcess(home)
    try:
        subprocess.run(["mount", "-o", "nodiscard", device, place], check=True)
        driver.start()
        with Client(driver.endpoint) as client:
            yield Site(kind, place, driver, client)
    finally:
        driver.close()  # and every mount below
        subprocess.run(["losetup", "--detach", device], check=False)
        shutil.rmtree(home, ignore_errors=True)


def _write_out(image: Path, size: int) -> None:
    """Write every block once, or who came first to one that is only reserved would pay for it."""
    nothing = bytes(4 * MIB)
    with image.open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        for start in range(0, size, len(nothing)):
            file.write(nothing[: size - start])
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)


def fill(place: Path, files: int, total_bytes: int, per_directory: int = 100) -> None:
    """Write so many files of equal size, of bytes that nothing can compress, and sync them."""
    blob = os.urandom(MIB)
    each = total_bytes // files
    for number in range(files):
        folder = place / f"folder-{number // per_directory:05}"
        if number % per_directory == 0:
            folder.mkdir()
        with (folder / f"file-{number:07}").open("wb", buffering=0) as file:
            left = each
            while left:
                start = number * 4099 % (MIB // 2) if left < MIB // 2 else 0
                left -= file.write(blob[start : start + min(left, MIB)])
    os.sync()


def elapsed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def shell(site: Site, *argv: str) -> Callable[[], None]:
    """A command, and after it all that it wrote on disk."""

    def run() -> None:
        subprocess.run(argv, check=True)
        root = os.open(site.place, os.O_RDONLY)
        try:
            sync_filesystem(root)
        finally:
            os.close(root)

    return run
