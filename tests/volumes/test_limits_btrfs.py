"""Volumes of a btrfs with quotas switched on: held by the quota groups of their subvolumes."""

import os
import subprocess

import pytest
from bench import until
from limit_stories import *  # noqa: F403 - the tests that every limiter has to pass
from limit_stories import SIZE, Held, bench_on, complaints, du, stops_at, write

from csi_driver.errors import FailedPrecondition
from csi_driver.linux import btrfs, btrfs_qgroups
from csi_driver.volumes.limiters import SUBVOLUMES
from csi_driver.volumes.model import LimitPolicy
from csi_driver.volumes.requests import CapacityRange

pytestmark = pytest.mark.root
"""limit_stories has no marks of its own."""


@pytest.fixture
def held(tmp_path, make_disk):
    disk = make_disk("btrfs", "768M", "btrfs")
    switch_on(disk)
    found = Held(bench_on(tmp_path, disk), disk)
    yield found
    found.bench.domain.stop(5)


def switch_on(disk):
    subprocess.run(["btrfs", "quota", "enable", disk], check=True)
    descriptor = os.open(disk, os.O_RDONLY)
    try:
        until(lambda: (state := btrfs_qgroups.quota_state(descriptor)) is not None and state.trustworthy)
    finally:
        os.close(descriptor)


def switch_off(disk):
    subprocess.run(["btrfs", "quota", "disable", disk], check=True)


def test_a_subvolume_that_a_tenant_makes_is_not_counted_and_the_level_says_so(held):
    volume = held.create("v")
    code = (
        "import fcntl, os, struct\n"
        "top = os.open('.', os.O_RDONLY)\n"
        "fcntl.ioctl(top, 1 << 30 | 4096 << 16 | 0x94 << 8 | 14, bytearray(struct.pack('=q4088s', 0, b'own')))"
    )
    subprocess.run(["/usr/bin/python3", "-I", "-c", code], cwd=held.bench.path(volume), user=1000, group=1000, check=True)
    assert write(held.bench.path(volume) / "own", uid=1000, most=2 * SIZE) == (2 * SIZE, "-")
    assert SUBVOLUMES in volume.context["limit"]


def test_quotas_that_were_switched_off_are_missed_by_an_expansion_and_by_nobody_else(held):
    volume = held.create("v")
    write(held.bench.path(volume), uid=1000, most=SIZE // 2)
    switch_off(held.disk)
    with pytest.raises(FailedPrecondition, match="switched off"):
        held.bench.volumes.expand(volume.record.handle, CapacityRange(2 * SIZE), None)
    assert held.bench.volumes.get(volume.record.handle).record.capacity_bytes == SIZE
    stats = held.stats(volume)
    assert (stats.source, stats.bytes.used) == ("walk", du(held.bench.path(volume)))
    assert held.create("other").context["limiter"] == "none"
    held.bench.node.unstage(volume.record.handle, held.bench.staging_of(volume.record.handle))
    held.bench.volumes.delete(volume.record.handle)


def test_health_says_that_quotas_are_off_until_they_are_on_and_the_volumes_held_again(held):
    volume, free = held.create("v"), held.bench
    assert complaints(held, volume) == []
    switch_off(held.disk)
    assert complaints(held, volume) == ["LimitOff", "LimitsOff"]
    assert write(free.path(volume), uid=1000, most=SIZE // 2) == (SIZE // 2, "-")
    switch_on(held.disk)  # without the limits: btrfs forgets them
    assert complaints(held, volume) == ["LimitOff"]
    free.sweep()
    assert complaints(held, volume) == []
    stops_at(write(free.path(volume), name="more", uid=1000), SIZE // 2)


def test_limits_that_were_lost_between_two_sweeps_are_set_again(held):
    volume = held.create("v")
    held.bench.sweep()
    switch_off(held.disk)
    switch_on(held.disk)
    held.bench.sweep()
    assert held.held_to(volume)[0] == SIZE


def test_a_volume_that_was_in_use_when_the_limits_were_set_again_is_not_forgotten(held):
    volumes = [held.create(f"v{n}") for n in range(3)]
    held.bench.sweep()
    switch_off(held.disk)
    switch_on(held.disk)
    busy = max(volumes, key=lambda volume: volume.record.id)
    with held.bench.domain.services.snapshots._locks.hold(held.bench.pool(), f"volume:{busy.record.id}"):
        held.bench.sweep()
    assert [held.held_to(volume) is not None and held.held_to(volume)[0] for volume in volumes if volume is not busy] == [
        SIZE
    ] * 2
    held.bench.sweep()
    assert held.held_to(busy)[0] == SIZE
    assert [complaints(held, volume) for volume in volumes] == [[], [], []]


def test_quotas_that_are_switched_on_later_hold_the_volumes_from_then_on(tmp_path, make_disk):
    disk = make_disk("btrfs", "768M", "btrfs")
    late = Held(bench_on(tmp_path, disk), disk)
    assert "btrfs quota enable" in late.create("early").context["limit"]
    switch_on(disk)
    stops_at(write(late.bench.path(late.create("late")), uid=1000), SIZE)


def test_simple_quotas_are_refused_with_the_reason(tmp_path, make_disk):
    disk = make_disk("btrfs", "768M", "btrfs")
    descriptor = os.open(disk, os.O_RDONLY)
    try:
        enable_simple_quotas(descriptor)
    finally:
        os.close(descriptor)
    assert "simple quotas" in Held(bench_on(tmp_path, disk), disk).create("v").context["limit"]


def enable_simple_quotas(descriptor):
    import struct

    from csi_driver.linux.btrfs import call, request_number

    try:
        call(descriptor, request_number(3, 40, 16), struct.pack("=QQ", 4, 0))  # BTRFS_IOC_QUOTA_CTL, ENABLE_SIMPLE_QUOTA
    except OSError as error:
        pytest.skip(f"this kernel has no simple quotas: {error}")


# --- a pool that moves ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def moved(held, tmp_path, make_disk):
    """Moves the pool, file by file, to another disk; there, what has the number of the volume's subvolume is somebody else's."""

    def move(volume, into_subvolume):
        disk = make_disk("moved", "768M", "btrfs")
        switch_on(disk)
        mark = held.bench.volumes.get(volume.record.handle).record.limit.mark
        foreign = disk / "foreign"
        for number in range(1000):
            subprocess.run(["btrfs", "-q", "subvolume", "create", foreign], check=True)
            if subvolume(foreign) == mark:
                break
            foreign = disk / f"foreign-{number}"
        subprocess.run(["btrfs", "qgroup", "limit", str(8 * SIZE), foreign], check=True)
        subprocess.run(["cp", "-a", held.disk / "pool", disk / "pool"], check=True)
        if into_subvolume:
            top = disk / "pool" / volume.record.directory
            top.rename(disk / "content")
            subprocess.run(["btrfs", "-q", "subvolume", "create", top], check=True)
            top.chmod(0o777)
            subprocess.run(["cp", "-a", f"{disk / 'content'}/.", top], check=True)
        held.bench.domain.stop(5)
        (tmp_path / "moved").mkdir()
        return Held(bench_on(tmp_path / "moved", disk), disk), foreign

    return move


def subvolume(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return btrfs.subvolume_id(descriptor)
    finally:
        os.close(descriptor)


def limit_of(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return btrfs_qgroups.read_qgroup(descriptor, btrfs.subvolume_id(descriptor)).limit_bytes
    finally:
        os.close(descriptor)


def test_a_volume_that_came_with_its_pool_from_another_disk_never_touches_what_has_its_number_there(held, moved):
    volume = held.create("v")
    there, foreign = moved(volume, into_subvolume=False)
    there.bench.volumes.expand(volume.record.handle, CapacityRange(2 * SIZE), None)
    assert limit_of(foreign) == 8 * SIZE
    assert there.stats(volume).source == "walk"
    assert complaints(there, volume) == ["LimitOff"]
    there.bench.sweep()
    assert limit_of(foreign) == 8 * SIZE
    said = there.bench.volumes.get(volume.record.handle)
    assert (said.context["limiter"], said.record.limit.mark) == ("none", None)
    assert "came from another filesystem; what lies there is no btrfs subvolume" in said.context["limit"]
    there.bench.node.unstage(volume.record.handle, there.bench.staging_of(volume.record.handle))
    there.bench.volumes.delete(volume.record.handle)
    there.bench.sweep()
    assert limit_of(foreign) == 8 * SIZE
    there.bench.domain.stop(5)


def test_a_volume_that_came_with_its_pool_from_another_disk_is_held_again(held, moved):
    volume = held.create("v", limit=LimitPolicy.REQUIRED)
    write(held.bench.path(volume), name="before", uid=1000, most=SIZE // 2)
    there, foreign = moved(volume, into_subvolume=True)
    assert complaints(there, volume) == ["LimitOff"]
    there.bench.sweep()
    assert complaints(there, volume) == []
    assert there.held_to(volume)[0] == SIZE
    assert limit_of(foreign) == 8 * SIZE
    stops_at(write(there.bench.path(volume), name="after", uid=1000), SIZE // 2)
    said = there.bench.volumes.get(volume.record.handle)
    assert there.bench.volumes.validate(volume.record.handle, (), volume.context) is None
    assert said.record.limit.mark == subvolume(there.bench.path(volume))
    there.bench.domain.stop(5)


def test_a_required_limit_that_cannot_be_had_where_the_volume_lies_now_is_told(held, moved):
    volume = held.create("v", limit=LimitPolicy.REQUIRED)
    there, _ = moved(volume, into_subvolume=False)
    there.bench.sweep()
    assert complaints(there, volume) == ["LimitOff"]
    there.bench.domain.stop(5)
