"""Image volumes whose driver is killed at every step: nothing is formatted twice, no loop device is lost, the data is what it was."""

import os
from pathlib import Path

import pytest
from bench import make_bench
from crash import every_crash
from images import MIB, block, devices_below, filesystem, make_image, take_down

from csi_driver.config import HostPathPool
from csi_driver.linux import mountinfo
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.requests import CapacityRange

pytestmark = [pytest.mark.minutes, pytest.mark.root, pytest.mark.usefixtures("own_mounts")]
FORMS = pytest.mark.parametrize("capability", [filesystem("ext4"), block()], ids=["ext4", "block"])


@pytest.fixture
def new_bench(tmp_path):
    """Makes benches, each with a place of its own, of which nothing may stay attached."""
    made = []

    def make(number: int):
        home = tmp_path / str(number)
        home.mkdir()
        bench = make_bench(home, (HostPathPool("default", home / "pool"),))
        made.append(bench)
        return bench

    yield make
    for bench in made:
        bench.domain.stop(5)
    take_down(tmp_path)


def is_clean(bench) -> bool:
    return devices_below(bench.root) == [] and mountinfo.mounts_below(bench.kubelet) == ()


def put(place: Path, content: bytes) -> None:
    if place.is_block_device():
        descriptor = os.open(place, os.O_RDWR)
        os.pwrite(descriptor, content, MIB)
        os.fsync(descriptor)
        os.close(descriptor)
    else:
        (place / "file").write_bytes(content)


def got(place: Path, size: int) -> bytes:
    if place.is_block_device():
        with place.open("rb") as device:
            device.seek(MIB)
            return device.read(size)
    return (place / "file").read_bytes()


def with_data(bench, capability) -> str:
    volume = make_image(bench, "v", capability)
    handle = volume.record.handle
    bench.stage(handle, capability)
    target = bench.publish(handle, "pod", capability)
    put(target, b"content")
    bench.node.unpublish(handle, str(target))
    bench.node.unstage(handle, bench.staging_of(handle))
    assert is_clean(bench)
    return handle


@FORMS
def test_a_creation_that_is_killed_is_completed(new_bench, capability):
    bench = None

    def operation_of(number):
        nonlocal bench
        bench = new_bench(number)
        return lambda: make_image(bench, "v", capability)

    for _ in every_crash(operation_of):
        after = bench.restarted()
        volume = make_image(after, "v", capability)
        assert (after.path(volume) / "image").stat().st_size == 16 * MIB
        after.stage(volume.record.handle, capability)
        after.node.unstage(volume.record.handle, after.staging_of(volume.record.handle))
        assert is_clean(after)
        after.domain.stop(5)


@FORMS
@pytest.mark.parametrize("again", [True, False], ids=["asked for again", "given up"])
def test_a_staging_that_is_killed_is_completed_or_taken_back(new_bench, capability, again):
    bench = handle = None

    def operation_of(number):
        nonlocal bench, handle
        bench = new_bench(number)
        handle = with_data(bench, capability)

        def operate():
            bench.stage(handle, capability)
            bench.publish(handle, "pod", capability)

        return operate

    for _ in every_crash(operation_of):
        after = bench.restarted()
        if again:
            after.stage(handle, capability)
            assert len(devices_below(after.root)) == 1
            assert got(after.publish(handle, "pod", capability), 7) == b"content"
        after.node.unpublish(handle, after.target("pod"))
        after.node.unstage(handle, after.staging_of(handle))
        assert is_clean(after)
        assert sorted(os.listdir(after.path(after.volumes.get(handle)))) == ["image"]
        after.domain.stop(5)


@FORMS
def test_an_unstaging_that_is_killed_is_completed(new_bench, capability):
    bench = handle = None

    def operation_of(number):
        nonlocal bench, handle
        bench = new_bench(number)
        handle = with_data(bench, capability)
        staging = bench.stage(handle, capability)
        target = bench.publish(handle, "pod", capability)

        def operate():
            bench.node.unpublish(handle, str(target))
            bench.node.unstage(handle, staging)

        return operate

    for _ in every_crash(operation_of):
        after = bench.restarted()
        after.node.unpublish(handle, after.target("pod"))
        after.node.unstage(handle, after.staging_of(handle))
        assert is_clean(after)
        assert sorted(os.listdir(after.path(after.volumes.get(handle)))) == ["image"]
        after.stage(handle, capability)
        assert got(after.publish(handle, "pod", capability), 7) == b"content"
        after.domain.stop(5)


def test_growing_that_is_killed_is_completed(new_bench):
    bench = handle = None

    def operation_of(number):
        nonlocal bench, handle
        bench = new_bench(number)
        handle = with_data(bench, block())
        bench.stage(handle, block())
        target = bench.publish(handle, "pod", block())

        def operate():
            bench.volumes.expand(handle, CapacityRange(40 * MIB), None)
            bench.node.expand(handle, str(target), CapacityRange(40 * MIB))

        return operate

    for _ in every_crash(operation_of):
        after = bench.restarted()
        target = Path(after.target("pod"))
        assert after.volumes.expand(handle, CapacityRange(40 * MIB), None) == 40 * MIB
        assert after.node.expand(handle, str(target), CapacityRange(40 * MIB)) == 40 * MIB
        with target.open("rb") as device:
            assert device.seek(0, os.SEEK_END) == 40 * MIB
        assert got(target, 7) == b"content"
        assert topmost_mount_at(target) is not None
        after.node.unpublish(handle, str(target))
        after.node.unstage(handle, after.staging_of(handle))
        assert is_clean(after)
        after.domain.stop(5)
