"""What a pool promises: no byte twice, no more than it may, and exactly what GetCapacity says."""

import itertools
import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction

import pytest
from bench import MIB, make_bench, mount_capability
from crash import runs_to_its_end
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csi_driver.config import Budget, HostPathPool
from csi_driver.errors import NotFound, OperationPending, OutOfRange, ResourceExhausted, Unavailable
from csi_driver.volumes import promises
from csi_driver.volumes.answers import HealthLevel
from csi_driver.volumes.model import OnDelete
from csi_driver.volumes.parameters import EPHEMERAL
from csi_driver.volumes.record_format import encode
from csi_driver.volumes.requests import CapacityRange, ClassParameters

DIGITS = str.maketrans("0123456789", "abcdefghij")


def bench_with(tmp_path, budget, place=None):
    return make_bench(tmp_path, (HostPathPool("default", place or tmp_path / "pool", inline=True, budget=budget),))


@pytest.fixture
def small(tmp_path):
    """A pool that may promise 40 MiB."""
    bench = bench_with(tmp_path, Budget(40 * MIB))
    yield bench
    bench.domain.stop(5)


def available(bench):
    found = bench.domain.services.capacity.available(ClassParameters(), (), None)
    assert found.maximum_volume_bytes == found.available_bytes
    return found.available_bytes


def names(bench):
    return sorted(record.name for record in bench.pool().volumes.readable())


# --- what may be promised -----------------------------------------------------------------------------------------------------------


def test_every_volume_takes_its_size_from_what_is_left_full_or_empty(small):
    assert available(small) == 40 * MIB
    small.create("a", 15 * MIB)
    assert available(small) == 25 * MIB
    small.create("b", 25 * MIB)
    assert available(small) == 0


def test_a_byte_more_than_there_is_gets_an_answer_that_says_what_and_why(small):
    small.create("a", 15 * MIB)
    with pytest.raises(ResourceExhausted) as refused:
        small.create("b", 25 * MIB + 1)
    for part in (
        25 * MIB + 1,
        25 * MIB,
        15 * MIB,
        40 * MIB,
        "overcommit 1",
        "[pools.default]",
        "delete volumes",
        "`overcommit`",
    ):
        assert str(part) in str(refused.value)
    assert names(small) == ["a"]
    assert small.leftovers() == []


def test_overcommit_promises_more_than_there_is(tmp_path):
    bench = bench_with(tmp_path, Budget(10 * MIB, Fraction(3, 2)))
    bench.create("a", 10 * MIB)
    assert available(bench) == 5 * MIB
    bench.create("b", 5 * MIB)
    with pytest.raises(ResourceExhausted, match=r"size 10485760 x overcommit 1\.5"):
        bench.create("c", 1)


@pytest.mark.root
def test_without_a_size_it_is_the_filesystem_but_for_the_reserve(tmp_path, make_disk):
    disk = make_disk("small", size="32M")
    bench = bench_with(tmp_path, Budget(reserve_share=Fraction(1, 4)), disk / "pool")
    assert 23 * MIB < available(bench) <= 24 * MIB
    bench.create("a", 20 * MIB)
    assert available(bench) == 4 * MIB
    with pytest.raises(ResourceExhausted, match=r"20971520 of 25165824"):
        bench.create("b", 4 * MIB + 1)


@pytest.mark.root
def test_nobody_is_promised_what_is_not_free_whatever_the_overcommit(tmp_path, make_disk):
    disk = make_disk("small", size="32M")
    bench = bench_with(tmp_path, Budget(overcommit=Fraction(10), reserve_bytes=2 * MIB), disk / "pool")
    (disk / "foreign").write_bytes(bytes(20 * MIB))
    assert 9 * MIB < available(bench) <= 10 * MIB
    with pytest.raises(ResourceExhausted, match="bytes free beyond its reserve of 2097152"):
        bench.create("a", 11 * MIB)
    for number in range(5):
        bench.create(f"thin-{number}", 9 * MIB)
    (disk / "filler").write_bytes(bytes(11 * MIB))
    assert available(bench) == 0


@pytest.mark.root
def test_a_size_beyond_the_filesystem_promises_no_more_than_it_has(tmp_path, make_disk):
    bench = bench_with(tmp_path, Budget(1024**5), make_disk("small", size="8M") / "pool")
    bench.create("a", 7 * MIB)
    assert available(bench) == MIB


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["create", "grow", "delete", "retain", "restart", "other"]), st.integers(0, 5), st.integers(1, 30)
        ),
        max_size=12,
    ),
    overcommit=st.sampled_from([Fraction(1), Fraction(3, 2), Fraction(11, 10)]),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_said_to_be_available_can_be_had_and_not_a_byte_more(tmp_path_factory, steps, overcommit):
    home = tmp_path_factory.mktemp("p")
    bench = bench_with(home, Budget(40 * MIB, overcommit))
    other = bench.restarted()  # a second controller of the same pool
    promised, kept = {}, 0
    for what, which, size in steps:
        name, volume = f"v{which}", promised.get(f"v{which}")
        left = int(40 * MIB * overcommit) - sum(v.capacity_bytes for v in promised.values()) - kept
        if what == "create" and volume is None:
            if size * MIB <= left:
                promised[name] = bench.create(name, size * MIB).record
            else:
                with pytest.raises(ResourceExhausted):
                    bench.create(name, size * MIB)
        elif what == "grow" and volume is not None:
            grown = CapacityRange(volume.capacity_bytes + size * MIB)
            if size * MIB <= left:
                bench.volumes.expand(volume.handle, grown, None)
                promised[name] = bench.volumes.get(volume.handle).record
            else:
                with pytest.raises(OutOfRange):
                    bench.volumes.expand(volume.handle, grown, None)
        elif what in ("delete", "retain") and volume is not None:
            bench.volumes.modify(volume.handle, OnDelete(what))
            bench.volumes.delete(volume.handle)
            kept += volume.capacity_bytes if what == "retain" else 0
            del promised[name]
        elif what == "restart":
            bench = bench.restarted()
        elif what == "other":
            bench, other = other, bench
    left = int(40 * MIB * overcommit) - sum(v.capacity_bytes for v in promised.values()) - kept
    assert available(bench) == available(other) == left
    with pytest.raises(ResourceExhausted):
        other.create("last", left + 1)
    if left:
        assert bench.create("last", left).record.capacity_bytes == left
    assert available(bench) == available(other) == 0
    shutil.rmtree(home)


# --- what counts ----------------------------------------------------------------------------------------------------------------------


def test_a_retry_of_what_was_made_is_never_refused(small):
    made = small.create("a", 40 * MIB)
    (small.path(made) / "data").write_bytes(bytes(MIB))
    for bench in (small, small.restarted()):
        assert bench.create("a", 40 * MIB) == made
        assert bench.volumes.expand(made.record.handle, CapacityRange(40 * MIB), None) == 40 * MIB


def test_a_clone_and_a_restore_count_like_any_volume(small):
    source = small.create("a", 15 * MIB)
    snapshot = small.snapshot("s", source)
    assert available(small) == 25 * MIB
    small.clone("b", source, 15 * MIB)
    assert available(small) == 10 * MIB
    with pytest.raises(ResourceExhausted):
        small.restore("c", snapshot, 15 * MIB)
    assert names(small) == ["a", "b"]
    assert small.leftovers() == []


@pytest.mark.parametrize("fate", [OnDelete.RETAIN, OnDelete.ARCHIVE])
def test_what_is_retained_or_archived_stays_promised_until_its_data_is_gone(small, fate):
    volume = small.create("a", 30 * MIB, on_delete=fate)
    small.volumes.delete(volume.record.handle)
    for bench in (small, small.restarted()):
        assert available(bench) == 10 * MIB
        with pytest.raises(ResourceExhausted, match="31457280 of them to retained or archived volumes"):
            bench.create("b", 11 * MIB)
    root = small.pool().backend.root()
    shutil.rmtree(root / "archived" if fate is OnDelete.ARCHIVE else small.path(volume))
    assert available(small) == 40 * MIB
    small.create("b", 40 * MIB)


def test_what_is_retained_does_not_count_where_another_volume_has_its_place(small):
    first = small.create("a", 10 * MIB, directory="place", on_delete=OnDelete.RETAIN)
    small.volumes.delete(first.record.handle)
    shutil.rmtree(small.path(first))
    small.create("b", 10 * MIB, directory="place")
    assert available(small) == 30 * MIB
    assert available(small.restarted()) == 30 * MIB


def test_what_is_deleted_is_promised_to_nobody_though_it_is_still_in_the_trash(small):
    volume = small.create("a", 40 * MIB)
    small.volumes.delete(volume.record.handle)
    assert available(small) == 40 * MIB
    small.create("b", 40 * MIB)


@pytest.mark.root
def test_an_inline_volume_counts_and_is_refused_with_a_reason(small):
    small.create("a", 30 * MIB)

    def publish(pod, size):
        capability = mount_capability()
        return small.publish(f"csi-{pod}", pod, capability, volume_context={EPHEMERAL: "true", "size": size})

    publish("one", "8Mi")
    assert available(small) == 2 * MIB
    with pytest.raises(ResourceExhausted, match="3145728 bytes are asked for, but pool default can promise 2097152 more"):
        publish("two", "3Mi")
    small.node.unpublish("csi-one", small.target("one"))
    assert available(small) == 10 * MIB


def test_a_record_that_a_newer_driver_wrote_counts(small):
    volume = small.create("a", 30 * MIB)
    path = small.pool().backend.root() / f".csi/volumes/{volume.record.id}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99, "new": 1}))
    for bench in (small, small.restarted()):
        assert available(bench) == 10 * MIB


def test_a_record_that_cannot_be_read_counts_nothing_and_the_health_of_the_pool_says_so(small):
    volume = small.create("a", 30 * MIB)
    (small.pool().backend.root() / f".csi/volumes/{volume.record.id}.json").write_text("{")
    assert available(small) == 40 * MIB
    (entry,) = small.health.storage()
    assert (entry.level, entry.reason) == (HealthLevel.DEGRADED, "PromisesUnknown")
    assert "1 volume record" in entry.message


def test_a_pool_that_promised_more_than_it_may_says_so_and_promises_no_more(tmp_path):
    before = bench_with(tmp_path, Budget(40 * MIB, Fraction(2)))
    volume = before.create("a", 60 * MIB)
    after = bench_with(tmp_path, Budget(40 * MIB))
    assert available(after) == 0
    (entry,) = after.health.storage()
    assert (entry.level, entry.reason) == (HealthLevel.DEGRADED, "PoolOverpromised")
    assert f"{60 * MIB} of {40 * MIB}" in entry.message
    assert after.volumes.get(volume.record.handle)
    with pytest.raises(ResourceExhausted, match="can promise 0 more"):
        after.create("b", 1)


# --- growing ----------------------------------------------------------------------------------------------------------------------------


def test_growing_beyond_what_is_left_is_out_of_range_and_a_smaller_size_then_works(small):
    handle = small.create("a", 10 * MIB).record.handle
    small.create("b", 20 * MIB)
    with pytest.raises(OutOfRange, match=r"from 10485760 to 20971521 bytes: 10485761 bytes are asked for"):
        small.volumes.expand(handle, CapacityRange(20 * MIB + 1), None)
    assert small.volumes.get(handle).record.capacity_bytes == 10 * MIB
    assert small.volumes.expand(handle, CapacityRange(15 * MIB), None) == 15 * MIB
    assert available(small) == 5 * MIB
    assert small.volumes.expand(handle, CapacityRange(20 * MIB), None) == 20 * MIB
    assert available(small) == 0


# --- several at once ----------------------------------------------------------------------------------------------------------------------


def test_of_many_threads_and_two_controllers_exactly_as_many_get_a_volume_as_there_is_room_for(small):
    benches = itertools.cycle([small, small.restarted()])

    def create(number, bench):
        try:
            bench.create(f"v{number}", MIB)
        except ResourceExhausted:
            return False
        return True

    with ThreadPoolExecutor(50) as threads:
        made = list(threads.map(create, range(100), benches))
    assert sum(made) == len(names(small)) == 40
    assert available(small) == 0


def test_of_many_who_grow_exactly_as_many_as_there_is_room_for_do(small):
    handles = [small.create(f"v{number}", MIB).record.handle for number in range(20)]
    benches = itertools.cycle([small, small.restarted()])

    def grow(handle, bench):
        try:
            return bench.volumes.expand(handle, CapacityRange(3 * MIB), None)
        except OutOfRange:
            return 0

    with ThreadPoolExecutor(20) as threads:
        grown = list(threads.map(grow, handles, benches))
    assert grown.count(3 * MIB) == 10
    assert grown.count(0) == 10
    assert available(small) == 0


def test_whoever_keeps_the_lock_of_the_pool_is_waited_for_and_not_for_ever(small, monkeypatch):
    monkeypatch.setattr(promises, "WAIT_SECONDS", 0.5)
    other = small.restarted()
    began, finish = threading.Event(), threading.Event()
    gate = other.domain.promises.gate(other.pool(), "x" * 26, MIB, MIB)
    locks = other.domain.services.volumes._locks

    def hold():
        with locks.hold(other.pool(), f"volume:{'x' * 26}"), gate:
            began.set()
            finish.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    began.wait(10)
    with pytest.raises(OperationPending, match="promises"):
        small.create("a", MIB)
    assert names(small) == []
    soon = threading.Timer(0.2, finish.set)
    soon.start()
    small.create("a", MIB)
    holder.join()
    assert small.leftovers() == []


def test_killed_at_any_step_a_creation_and_an_expansion_leave_no_phantom_promise(tmp_path):
    bench = bench_with(tmp_path, Budget(40 * MIB))
    for number in itertools.count(1):
        grown = bench.create("grown", 5 * MIB).record.handle

        def work(grown=grown):
            bench.create("made", 20 * MIB)
            bench.volumes.expand(grown, CapacityRange(10 * MIB), None)

        done = runs_to_its_end(work, number)
        after = bench.restarted()
        counted = sum(
            json.loads(path.read_text())["capacity_bytes"] for path in (tmp_path / "pool/.csi/volumes").glob("*.json")
        )
        assert available(after) == available(bench) == 40 * MIB - counted
        bench.create("made", 20 * MIB)
        bench.volumes.expand(grown, CapacityRange(10 * MIB), None)
        assert available(after) == 10 * MIB
        for record in list(bench.pool().volumes.readable()):
            after.volumes.delete(record.handle)
        assert available(bench) == 40 * MIB
        if done:
            assert number > 10
            return


# --- what is remembered -----------------------------------------------------------------------------------------------------------------


def test_what_another_controller_promises_and_deletes_is_seen_at_once(small):
    other = small.restarted()
    for _ in range(3):
        first = other.create("a", 30 * MIB)
        with pytest.raises(ResourceExhausted):
            small.create("b", 11 * MIB)
        second = small.create("b", 10 * MIB)
        other.volumes.delete(first.record.handle)
        third = small.create("c", 30 * MIB)
        for volume in (second, third):
            small.volumes.delete(volume.record.handle)


def test_a_record_that_got_the_number_and_the_name_of_its_predecessor_is_read_again(small):
    other = small.restarted()
    folder = small.pool().backend.root() / ".csi/volumes"
    for size in (10, 20, 5, 15, 25):
        volume = small.create("a", size * MIB)
        assert available(other) == (40 - size) * MIB
        inodes = {entry.inode() for entry in os.scandir(folder)}
        small.volumes.delete(volume.record.handle)
        small.sweep()
        small.create("a", (size + 1) * MIB)
        assert available(other) == (39 - size) * MIB, inodes
        small.volumes.delete(volume.record.handle)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["btrfs", "xfs", "ext4", "tmpfs"])
def test_volumes_that_are_attached_all_the_time_do_not_slip_through_the_counting(tmp_path, make_disk, kind):
    bench = bench_with(tmp_path, Budget(200 * MIB, Fraction(100)), make_disk("d", "320M", kind) / "pool")
    first = bench.create("first", MIB).record
    # More than one call of getdents(2) lists: within one, nobody can change the folder.
    records = [replace(first, id=f"{number:026}".translate(DIGITS)) for number in range(3000)]
    folder = bench.pool().backend.root() / ".csi/volumes"
    for record in records:
        (folder / f"{record.id}.json").write_bytes(encode(record))
    stop = threading.Event()

    def attach():
        while not stop.is_set():
            for record in records:
                (folder / ".tmp.new").write_bytes(encode(record))
                (folder / ".tmp.new").rename(folder / f"{record.id}.json")

    attaching = threading.Thread(target=attach)
    attaching.start()
    try:
        for _ in range(60):
            assert bench.domain.promises.room(bench.pool()).promised_bytes == 3001 * MIB
    finally:
        stop.set()
        attaching.join()


def test_a_pool_that_is_gone_is_no_pool_with_room(small):
    volume = small.create("a", 10 * MIB)
    root = small.pool().backend.root()
    root.rename(root.parent / "away")
    with pytest.raises(Unavailable):
        available(small)
    (root.parent / "away").rename(root)
    assert available(small) == 30 * MIB
    with pytest.raises(NotFound):
        small.volumes.expand(volume.record.handle + "x", CapacityRange(MIB), None)
