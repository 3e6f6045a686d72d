import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from bench import MIB, make_bench, until

from csi_driver.config import HostPathPool
from csi_driver.errors import DeadlineExceeded, NotFound, OperationPending
from csi_driver.volumes import usage
from csi_driver.volumes.turns import Turns

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


# --- many at once -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def several(bench):
    """Four volumes with a file of their own each."""
    found = []
    for number in range(4):
        volume = bench.create(f"v{number}")
        bench.stage(volume.record.handle)
        target = bench.publish(volume.record.handle, f"pod-{number}")
        for name in range(number):
            (target / str(name)).touch()
        found.append((volume, target))
    return found


def watch_walks(monkeypatch, before):
    """Have `before` called with the deadline and the inode of each walk's top; then walk."""
    walk = usage.measure_tree

    def watched(top, *, deadline):
        before(deadline, os.fstat(top).st_ino)
        return walk(top, deadline=deadline)

    monkeypatch.setattr(usage, "measure_tree", watched)


def test_no_more_volumes_are_counted_at_once_than_there_are_turns(bench, several, monkeypatch):
    monkeypatch.setattr(bench.node._usage, "_lines", ((Turns(2), 60.0), (Turns(1), 60.0)))
    at_work, most, guard = 0, 0, threading.Lock()

    def count_walks(_deadline, _top):
        nonlocal at_work, most
        with guard:
            at_work += 1
            most = max(most, at_work)
        time.sleep(0.3)
        with guard:
            at_work -= 1

    watch_walks(monkeypatch, count_walks)
    with ThreadPoolExecutor(4) as callers:
        told = list(callers.map(lambda one: stats(bench, *one).inodes.used, several))
    assert told == [1, 2, 3, 4]
    assert most == 2


def test_a_volume_that_takes_long_to_count_keeps_no_other_from_its_turn(bench, several, monkeypatch):
    monkeypatch.setattr(bench.node._usage, "_lines", ((Turns(1), 0.3), (Turns(1), 60.0)))
    (large, large_target), *others = several
    inode, go_on, in_the_long_line = large_target.stat().st_ino, threading.Event(), threading.Event()

    def take_long(deadline, top):
        if top != inode:
            return
        if deadline - time.monotonic() > 1:
            in_the_long_line.set()
            go_on.wait(60)
        else:
            time.sleep(max(0.0, deadline - time.monotonic()) + 0.01)

    watch_walks(monkeypatch, take_long)
    with ThreadPoolExecutor(1) as caller:
        asked = caller.submit(stats, bench, large, large_target, 60.0)
        assert in_the_long_line.wait(60)
        assert [stats(bench, *other).inodes.used for other in others] == [2, 3, 4]
        assert not asked.done()
        go_on.set()
        assert asked.result(60).inodes.used == 1


def test_a_volume_that_cannot_be_counted_is_not_tried_again_for_as_long_as_it_is_worth(bench, several, monkeypatch):
    monkeypatch.setattr(bench.node._usage, "_lines", ((Turns(1), 0.05), (Turns(1), 0.05)))
    walks = []
    watch_walks(monkeypatch, lambda deadline, _top: walks.append(time.sleep(max(0.0, deadline - time.monotonic()) + 0.01)))
    monkeypatch.setattr(usage, "_FRESH_FACTOR", 1e9)
    for _ in range(3):
        with pytest.raises(DeadlineExceeded, match="could not be counted completely"):
            stats(bench, *several[0])
    assert len(walks) == 2
    bench.node._usage._given_up.clear()
    monkeypatch.undo()
    assert stats(bench, *several[0]).inodes.used == 1
