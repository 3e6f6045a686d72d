"""`kill -9` of a driver that makes, stages, grows and unstages images: no device is lost, nothing is formatted twice, the data is intact."""

import os
import random
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from csi_driver.rpc import csi_pb2 as csi
from tests.driver_process import DriverProcess
from tests.own_mounts import have_own_mounts
from tests.storm.client import RETRY, Client

pytestmark = [pytest.mark.minutes, pytest.mark.root]

SEED = os.environ.get("TATAMI_STORM_SEED") or str(random.SystemRandom().randrange(10**9))
KILLS = int(os.environ.get("TATAMI_STORM_KILLS") or 50)
MIB = 1024**2
SIZES = {"ext4": 16 * MIB, "xfs": 300 * MIB, "block": 16 * MIB}
ONE_NODE = csi.VolumeCapability.AccessMode(mode=csi.VolumeCapability.AccessMode.SINGLE_NODE_MULTI_WRITER)


@dataclass
class Image:
    """One volume, as the container orchestrator and its pod know it."""

    name: str
    kind: str
    kubelet: Path
    size: int = 0
    handle: str = ""
    content: bytes = b""
    steps: list[str] = field(default_factory=list)

    @property
    def capability(self) -> csi.VolumeCapability:
        if self.kind == "block":
            return csi.VolumeCapability(block=csi.VolumeCapability.BlockVolume(), access_mode=ONE_NODE)
        return csi.VolumeCapability(mount=csi.VolumeCapability.MountVolume(fs_type=self.kind), access_mode=ONE_NODE)

    @property
    def staging(self) -> Path:
        return self.kubelet / "plugins" / self.name

    @property
    def target(self) -> Path:
        return self.kubelet / "pods" / self.name / "volume"

    def create(self, insist) -> None:
        self.size = self.size or SIZES[self.kind]
        made = insist(
            "CreateVolume",
            csi.CreateVolumeRequest(
                name=self.name,
                capacity_range=csi.CapacityRange(required_bytes=SIZES[self.kind]),
                volume_capabilities=[self.capability],
                parameters={"layout": "image"},
            ),
        )
        self.handle = made.volume.volume_id

    def stage(self, insist) -> None:
        for path in (self.staging, self.target):
            path.parent.mkdir(parents=True, exist_ok=True)
        common = {
            "volume_id": self.handle,
            "staging_target_path": str(self.staging),
            "volume_capability": self.capability,
        }
        insist("NodeStageVolume", csi.NodeStageVolumeRequest(**common))
        insist("NodePublishVolume", csi.NodePublishVolumeRequest(**common, target_path=str(self.target)))

    def grow(self, insist) -> None:
        if self.kind == "ext4":
            return  # mounted, it takes CAP_SYS_RESOURCE: tests/uml
        self.size += 4 * MIB
        room = csi.CapacityRange(required_bytes=self.size)
        insist("ControllerExpandVolume", csi.ControllerExpandVolumeRequest(volume_id=self.handle, capacity_range=room))
        insist(
            "NodeExpandVolume",
            csi.NodeExpandVolumeRequest(volume_id=self.handle, volume_path=str(self.target), capacity_range=room),
        )

    def unstage(self, insist) -> None:
        insist("NodeUnpublishVolume", csi.NodeUnpublishVolumeRequest(volume_id=self.handle, target_path=str(self.target)))
        insist(
            "NodeUnstageVolume",
            csi.NodeUnstageVolumeRequest(volume_id=self.handle, staging_target_path=str(self.staging)),
        )

    def write(self) -> None:
        self.content = os.urandom(32)
        if self.kind == "block":
            descriptor = os.open(self.target, os.O_RDWR)
            os.pwrite(descriptor, self.content, 5 * MIB)
            os.fsync(descriptor)
            os.close(descriptor)
        else:
            (self.target / "file").write_bytes(self.content)

    def read(self) -> bytes:
        if self.kind == "block":
            with self.target.open("rb") as device:
                device.seek(5 * MIB)
                return device.read(32)
        return (self.target / "file").read_bytes()


def identity_of(image: Path) -> str:
    return subprocess.run(
        ["blkid", "-p", "-s", "UUID", "-o", "value", image], capture_output=True, text=True, check=False
    ).stdout


@pytest.fixture
def driver(tmp_path: Path):
    process = DriverProcess(tmp_path)
    yield process
    process.close()


def test_fifty_kills_lose_no_device_format_nothing_twice_and_leave_the_data_as_it_was(driver: DriverProcess):
    print(f"TATAMI_STORM_SEED={SEED} TATAMI_STORM_KILLS={KILLS}")
    have_own_mounts()
    rng = random.Random(SEED)
    driver.start()
    images = [Image(f"image-{kind}", kind, driver.kubelet) for kind in SIZES]
    for image in images:
        image.create(insistence(driver))
        image.stage(insistence(driver))
        image.write()
        image.unstage(insistence(driver))
    identities = {image.name: identity_of(file_of(driver, image)) for image in images}
    cut_off: dict[str, int] = {}
    for kill in range(KILLS):
        image = images[kill % len(images)]
        fresh = Image(f"fresh-{kill}", image.kind, driver.kubelet)
        steps = threading.Thread(target=take_steps, args=(driver, image, fresh))
        steps.start()
        time.sleep(rng.uniform(0, 1.2))
        driver.kill()
        steps.join()
        for torn in (image, fresh):
            for step in torn.steps:
                cut_off[step] = cut_off.get(step, 0) + 1
            torn.steps.clear()
        driver.start()
        insist = insistence(driver)
        fresh.create(insist)
        image.stage(insist)
        assert image.read() == image.content
        image.grow(insist)
        image.write()
        assert len(devices(driver)) == 1
        image.unstage(insist)
        assert devices(driver) == []
        assert identity_of(file_of(driver, image)) == identities[image.name]
        insist("DeleteVolume", csi.DeleteVolumeRequest(volume_id=fresh.handle))
    assert driver.stop() == 0
    print("cut off:", dict(sorted(cut_off.items())))
    assert sum(cut_off.values()) > KILLS / 3  # kills that meet nothing show nothing


def take_steps(driver: DriverProcess, image: Image, fresh: Image) -> None:
    """Do what a pod's coming and going asks for, until the driver is gone; the step that it went in is kept."""

    def call(method, request):
        with Client(driver.endpoint) as client:
            return client.call(method, request)

    whole = ((fresh, fresh.create), (image, image.stage), (image, image.grow), (image, image.unstage))
    for owner, step in whole:
        try:
            step(call)
        except grpc.RpcError:
            owner.steps.append(step.__name__)
            return


def insistence(driver: DriverProcess):
    """Make calls as sidecars and kubelet do: again, until the answer is final."""

    def insist(method, request):
        until = time.monotonic() + 60
        while True:
            try:
                with Client(driver.endpoint) as client:
                    return client.call(method, request)
            except grpc.RpcError as error:
                if error.code() not in RETRY or time.monotonic() > until:
                    raise
            time.sleep(0.1)

    return insist


def file_of(driver: DriverProcess, image: Image) -> Path:
    return driver.home / "pools" / "default" / image.handle.rpartition(".")[2] / "image"


def devices(driver: DriverProcess) -> list[str]:
    found = []
    for image in (driver.home / "pools").rglob("image"):
        if image.is_file():
            shown = subprocess.run(["losetup", "-n", "-O", "NAME", "-j", image], capture_output=True, text=True, check=False)
            found += shown.stdout.split()
    return found
