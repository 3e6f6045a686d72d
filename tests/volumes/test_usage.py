import os
import time
from dataclasses import replace

import pytest
from bench import MIB, make_bench, until

from csi_driver.config import HostPathPool
from csi_driver.errors import NotFound, OperationPending
from csi_driver.volumes import usage

pytestmark = pytest.mark.root


@pytest.fixture
def mounted(bench):
    volume = bench.create("v", size=64 * MIB)
    bench.stage(volume.record.handle)
    return bench.publish(volume.record.handle, "pod"), volume


@pytest.fixture(autouse=True)
def _count_anew_each_time(monkeypatch, request):
    if "remembered" not in request.node.name:
        monkeypatch.setattr(usage, "_FRESH_FACTOR", 0)


def stats(bench, volume, path, seconds=30.0):
    return bench.node.stats(volume.record.handle, str(path), time.monotonic() + seconds)


def test_the_numbers_are_the_volumes_own_not_its_disks(bench, mounted):
    target, volume = mounted
    empty = stats(bench, volume, target)
    neighbour = bench.create("neighbour")
    (bench.path(neighbour) / "large").write_bytes(bytes(8 * MIB))
    assert stats(bench, volume, target).bytes.used == empty.bytes.used < MIB
    (target / "data").write_bytes(os.urandom(4 * MIB))
    (target / "folder").mkdir()
    full = stats(bench, volume, target)
    assert 4 * MIB <= full.bytes.used - empty.bytes.used < 5 * MIB
    assert full.bytes.total == 64 * MIB
    assert full.bytes.available == 64 * MIB - full.bytes.used
    assert full.inodes.used == empty.inodes.used + 2 == 3


def test_hard_links_count_once_and_holes_not_at_all(bench, mounted):
    target, volume = mounted
    (target / "data").write_bytes(os.urandom(2 * MIB))
    before = stats(bench, volume, target)
    os.link(target / "data", target / "again")
    with (target / "sparse").open("wb") as sparse:
        sparse.truncate(2**40)
    after = stats(bench, volume, target)
    assert after.bytes.used - before.bytes.used < MIB
    assert after.inodes.used == before.inodes.used + 1


def test_a_volume_that_holds_more_than_its_size_has_nothing_left(bench):
    volume = bench.create("v", size=1)
    bench.stage(volume.record.handle)
    target = bench.publish(volume.record.handle, "pod")
    (target / "data").write_bytes(os.urandom(MIB))
    found = stats(bench, volume, target).bytes
    assert (found.total, found.available) == (1, 0)
    assert found.used > MIB


def test_no_volume_has_more_left_than_its_disk(tmp_path, make_disk):
    disk = make_disk("small", size="16M")
    bench = make_bench(tmp_path, (HostPathPool("default", disk / "pool"),))
    volume = bench.create("v", size=12 * MIB)
    bench.stage(volume.record.handle)
    target = bench.publish(volume.record.handle, "pod")
    (disk / "else").write_bytes(bytes(10 * MIB))
    assert stats(bench, volume, target).bytes.available <= 6 * MIB


def test_a_grown_volume_has_its_new_size(bench, mounted):
    target, volume = mounted
    bench.volumes.expand(volume.record.handle, replace(bench.request("x").capacity, required_bytes=128 * MIB), None)
    assert stats(bench, volume, target).bytes.total == 128 * MIB


def test_a_read_only_target_and_the_staging_path_tell_the_same(bench, mounted):
    target, volume = mounted
    reader = bench.publish(volume.record.handle, "reader", readonly=True)
    same = {stats(bench, volume, path).inodes.used for path in (target, reader, bench.staging_of(volume.record.handle))}
    assert len(same) == 1


def test_a_count_that_was_dear_is_remembered_for_as_long_as_it_is_worth(bench, mounted, monkeypatch):
    monkeypatch.setattr(usage, "_FRESH_FACTOR", 1e9)
    target, volume = mounted
    first = stats(bench, volume, target)
    (target / "new").touch()
    assert stats(bench, volume, target).inodes.used == first.inodes.used
    monkeypatch.setattr(usage, "_FRESH_FACTOR", 0)
    restarted = bench.restarted()
    assert stats(restarted, volume, target).inodes.used == first.inodes.used + 1


def test_a_count_that_outlasts_the_call_is_joined_by_the_next(bench, mounted):
    target, volume = mounted
    for folder in range(40):
        (target / str(folder)).mkdir()
        for name in range(250):
            (target / str(folder) / str(name)).touch()
    with pytest.raises(OperationPending, match="try again"):
        stats(bench, volume, target, seconds=0.0)
    assert stats(bench, volume, target).inodes.used == 1 + 40 + 40 * 250


def test_while_a_new_count_runs_the_last_one_is_told_with_its_age(bench, mounted, monkeypatch):
    target, volume = mounted
    first = stats(bench, volume, target)
    assert (first.source, first.inodes.used) == ("walk", 1)
    for folder in range(40):
        (target / str(folder)).mkdir()
        for name in range(250):
            (target / str(folder) / str(name)).touch()
    monkeypatch.setattr(usage, "_PATIENCE_SECONDS", 0.0)
    told = stats(bench, volume, target)
    assert told.inodes.used == 1
    assert told.bytes.used == first.bytes.used
    assert told.age_seconds > 0
    until(lambda: stats(bench, volume, target).inodes.used == 1 + 40 + 40 * 250)
    # What is too old is told no more.
    monkeypatch.setattr(usage, "_OLDEST_SECONDS", 0.0)
    with pytest.raises(OperationPending, match="try again"):
        stats(bench, volume, target, seconds=0.0)


def test_a_volume_that_went_while_an_older_count_is_known_is_not_found(bench, mounted):
    target, volume = mounted
    assert stats(bench, volume, target).inodes.used == 1
    bench.path(volume).rename(bench.root / "stolen")
    with pytest.raises(NotFound):
        stats(bench, volume, target)


def test_a_volume_whose_directory_is_gone_is_not_found(bench, mounted):
    target, volume = mounted
    bench.path(volume).rename(bench.root / "stolen")
    with pytest.raises(NotFound):
        stats(bench, volume, target)
