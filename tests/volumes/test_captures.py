"""Captures on real filesystems: each takes the best way that it has, and what comes out is the same on all."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from bench import MIB, Bench, make_bench, until
from trees import fill, seen

from csi_driver.config import HostPathPool
from csi_driver.errors import FailedPrecondition, OperationPending, OutOfRange
from csi_driver.linux import btrfs, tree_removal
from csi_driver.linux.files import OPEN
from csi_driver.volumes.captures import FILE_BY_FILE, POINT_IN_TIME, HoldToSource
from csi_driver.volumes.groups import POINT_IN_TIME_EACH
from csi_driver.volumes.jobs import JobCancelled, JobControl
from csi_driver.volumes.model import ContentSource, OnDelete, SourceKind
from csi_driver.volumes.requests import CreateSnapshot
from csi_driver.volumes.turns import Turns

pytestmark = pytest.mark.root

SIZES = {"btrfs": "256M", "xfs": "320M", "ext4": "64M"}
METHODS = {"btrfs": "subvolume", "xfs": "reflink", "ext4": "copy_file_range"}


@pytest.fixture
def btrfs_bench(tmp_path, make_disk) -> Bench:
    return bench_on(tmp_path, {"default": make_disk("btrfs", SIZES["btrfs"], "btrfs")})


@pytest.fixture(params=["btrfs", "xfs", "ext4"])
def any_bench(request, tmp_path, make_disk) -> Bench:
    return bench_on(tmp_path, {"default": make_disk(request.param, SIZES[request.param], request.param)})


def bench_on(tmp_path: Path, places: dict[str, Path]) -> Bench:
    return make_bench(tmp_path, tuple(HostPathPool(name, place / "pool") for name, place in places.items()))


def kind_of(bench: Bench) -> str:
    return next(kind for kind in METHODS if f"disks/{kind}" in str(bench.pool().backend.root()))


def data_of(bench: Bench, snapshot) -> Path:
    return bench.pool(snapshot.record.pool).backend.root() / ".csi/snapshots-data" / snapshot.record.id


def is_subvolume(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return btrfs.is_subvolume(descriptor)
    finally:
        os.close(descriptor)


def set_read_only(path: Path, read_only: bool) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        btrfs.set_read_only(descriptor, read_only=read_only)
    finally:
        os.close(descriptor)


def make_subvolume(parent: Path, name: str) -> Path:
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        btrfs.create(descriptor, name)
    finally:
        os.close(descriptor)
    return parent / name


# --- the ladder -------------------------------------------------------------------------------------------------------------------


def test_snapshot_restore_and_clone_are_whole_by_the_best_way_that_the_filesystem_has(any_bench):
    bench, kind = any_bench, kind_of(any_bench)
    volume = bench.create("source")
    fill(bench.path(volume))
    before = seen(bench.path(volume))
    snapshot = bench.snapshot("snap", volume)
    (bench.path(volume) / "plain").write_text("changed since")
    restored = bench.restore("restored", snapshot)
    clone = bench.clone("clone", restored)
    assert seen(bench.path(restored)) == seen(bench.path(clone)) == before
    assert {thing.record.capture.method for thing in (snapshot, restored, clone)} == {METHODS[kind]}
    assert snapshot.record.consistency == (POINT_IN_TIME if kind == "btrfs" else FILE_BY_FILE)
    (bench.path(restored) / "plain").write_text("the restore is its own")
    assert seen(data_of(bench, snapshot)) == before
    assert seen(bench.path(clone)) == before
    for thing in (volume, restored, clone):
        bench.volumes.delete(thing.record.handle)
    bench.snapshots.delete(snapshot.record.handle)
    bench.sweep()
    assert bench.leftovers() == []


def test_what_a_capture_holds_was_written_before_it_also_where_nobody_synced_it(any_bench):
    volume = any_bench.create("source")
    for round_ in range(5):
        (any_bench.path(volume) / "file").write_bytes(os.urandom(3 * MIB))
        snapshot = any_bench.snapshot(f"snap-{round_}", volume)
        assert (data_of(any_bench, snapshot) / "file").read_bytes() == (any_bench.path(volume) / "file").read_bytes()


def test_source_and_capture_live_without_each_other_in_any_order(any_bench):
    bench = any_bench
    volume = bench.create("source")
    fill(bench.path(volume))
    before = seen(bench.path(volume))
    snapshot, clone = bench.snapshot("snap", volume), bench.clone("clone", volume)
    bench.volumes.delete(volume.record.handle)
    bench.sweep()
    restored = bench.restore("restored", snapshot)
    bench.snapshots.delete(snapshot.record.handle)
    bench.sweep()
    assert seen(bench.path(restored)) == seen(bench.path(clone)) == before
    bench.volumes.delete(restored.record.handle)
    bench.sweep()
    assert seen(bench.path(clone)) == before


def test_a_restore_gets_the_size_that_is_asked_for_and_never_less_than_the_snapshot(any_bench):
    volume = any_bench.create("source", 8 * MIB)
    snapshot = any_bench.snapshot("snap", volume)
    assert any_bench.restore("larger", snapshot, 16 * MIB).record.capacity_bytes == 16 * MIB
    assert any_bench.restore("same", snapshot, 8 * MIB).record.capacity_bytes == 8 * MIB
    with pytest.raises(OutOfRange):
        any_bench.restore("smaller", snapshot, 4 * MIB)


def test_owner_and_mode_of_a_class_are_on_top_of_what_was_captured(any_bench):
    from csi_driver.volumes.model import Ownership

    volume = any_bench.create("source", ownership=Ownership(1, 2, 0o750))
    snapshot = any_bench.snapshot("snap", volume)
    source = ContentSource(SourceKind.SNAPSHOT, snapshot.record.handle)
    plain = any_bench.create("plain", source=source)
    other = any_bench.create("other", source=source, ownership=Ownership(10, 20, 0o2770))
    for made, wanted in ((volume, (1, 2, 0o750)), (plain, (1, 2, 0o750)), (other, (10, 20, 0o2770))):
        status = any_bench.path(made).stat()
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == wanted


def test_a_restore_crosses_filesystems(tmp_path, make_disk):
    places = {kind: make_disk(kind, SIZES[kind], kind) for kind in ("btrfs", "xfs", "ext4")}
    bench = bench_on(tmp_path, {"default": places["ext4"], "cow": places["btrfs"], "flat": places["xfs"]})
    for source_pool in ("default", "cow", "flat"):
        volume = bench.create(f"of-{source_pool}", pool=source_pool)
        fill(bench.path(volume))
        snapshot = bench.snapshot(f"snap-{source_pool}", volume)
        for pool in ("default", "cow", "flat"):
            source = ContentSource(SourceKind.SNAPSHOT, snapshot.record.handle)
            restored = bench.create(f"{source_pool}-in-{pool}", source=source, pool=pool)
            assert seen(bench.path(restored)) == seen(bench.path(volume)), (source_pool, pool)


def test_two_pools_of_one_btrfs_share_snapshots_at_once(tmp_path, make_disk):
    place = make_disk("btrfs", SIZES["btrfs"], "btrfs")
    pools = (HostPathPool("default", place / "one"), HostPathPool("other", place / "two"))
    bench = make_bench(tmp_path, pools)
    snapshot = bench.snapshot("snap", bench.create("source"))
    restored = bench.create("restored", source=ContentSource(SourceKind.SNAPSHOT, snapshot.record.handle), pool="other")
    assert restored.record.capture.method == "subvolume"


# --- btrfs ------------------------------------------------------------------------------------------------------------------------


def test_a_snapshot_is_a_subvolume_that_nobody_can_write_to(btrfs_bench):
    volume = btrfs_bench.create("source")
    fill(btrfs_bench.path(volume))
    snapshot = btrfs_bench.snapshot("snap", volume)
    assert is_subvolume(btrfs_bench.path(volume))
    assert is_subvolume(data_of(btrfs_bench, snapshot))
    with pytest.raises(OSError, match="Read-only"):
        (data_of(btrfs_bench, snapshot) / "plain").write_text("never")
    (btrfs_bench.path(btrfs_bench.restore("restored", snapshot)) / "plain").write_text("may be written")


def test_an_old_volume_that_is_a_plain_directory_is_captured_by_reflink_into_a_subvolume(btrfs_bench):
    volume = btrfs_bench.create("source")
    place = btrfs_bench.path(volume)
    place.rmdir()
    place.mkdir()
    fill(place)
    snapshot = btrfs_bench.snapshot("snap", volume)
    assert (snapshot.record.capture.method, snapshot.record.consistency) == ("reflink", FILE_BY_FILE)
    assert seen(data_of(btrfs_bench, snapshot)) == seen(place)
    assert btrfs_bench.restore("restored", snapshot).record.capture.method == "subvolume"


def test_what_lies_in_a_tenants_own_subvolume_is_captured_too(btrfs_bench):
    volume = btrfs_bench.create("source")
    fill(btrfs_bench.path(volume))
    inner = make_subvolume(btrfs_bench.path(volume) / "folder", "inner")
    (inner / "file").write_text("would be missing from a snapshot")
    (make_subvolume(inner, "innermost") / "file").write_text("this too")
    before = seen(btrfs_bench.path(volume))
    snapshot = btrfs_bench.snapshot("snap", volume)
    assert seen(data_of(btrfs_bench, snapshot)) == before
    assert snapshot.record.consistency == FILE_BY_FILE
    assert seen(btrfs_bench.path(btrfs_bench.clone("clone", volume))) == before


def test_a_volume_is_removed_whatever_subvolumes_and_flags_its_tenant_leaves_in_it(btrfs_bench):
    volume = btrfs_bench.create("source")
    top = btrfs_bench.path(volume)
    fill(top)
    inner = make_subvolume(top / "folder", "inner")
    innermost = make_subvolume(inner, "innermost")
    (innermost / "file").write_text("content")
    for path in (innermost, inner, top):
        set_read_only(path, True)
    btrfs_bench.volumes.delete(volume.record.handle)
    btrfs_bench.sweep()
    assert btrfs_bench.leftovers() == []
    listed = subprocess.run(["btrfs", "subvolume", "list", top.parent], capture_output=True, text=True, check=True).stdout
    assert listed == ""


def test_a_volume_that_its_tenant_made_read_only_is_snapshotted_restored_and_archived(btrfs_bench):
    volume = btrfs_bench.create("source", on_delete=OnDelete.ARCHIVE)
    top = btrfs_bench.path(volume)
    fill(top)
    before = seen(top)
    set_read_only(top, True)
    restored = btrfs_bench.restore("restored", btrfs_bench.snapshot("snap", volume))
    (btrfs_bench.path(restored) / "new").touch()
    btrfs_bench.volumes.delete(volume.record.handle)
    (archived,) = (btrfs_bench.pool().backend.root() / "archived").iterdir()
    assert seen(archived) == before


@pytest.mark.parametrize("flag", ["+i", "+a"])
def test_a_volume_whose_top_its_tenant_made_immutable_is_captured_and_deleted(any_bench, flag):
    volume = any_bench.create("source")
    top = any_bench.path(volume)
    fill(top)
    before = seen(top)
    subprocess.run(["chattr", flag, top], check=True)
    snapshot = any_bench.snapshot("snap", volume)
    restored = any_bench.restore("restored", snapshot)
    assert seen(any_bench.path(restored)) == before
    assert snapshot.record.capture.not_carried == {"inode flags": 1}
    for thing in (volume, restored):
        any_bench.volumes.delete(thing.record.handle)
    any_bench.snapshots.delete(snapshot.record.handle)
    any_bench.sweep()
    assert any_bench.leftovers() == []


def test_a_large_subvolume_is_removed_in_one_step(btrfs_bench):
    volume = btrfs_bench.create("source")
    for number in range(2000):
        (btrfs_bench.path(volume) / str(number)).touch()
    steps = 0

    def count():
        nonlocal steps
        steps += 1
        return False

    parent = os.open(btrfs_bench.path(volume).parent, os.O_RDONLY)
    tree_removal.remove_tree(parent, volume.record.directory, should_stop=count)
    os.close(parent)
    assert not btrfs_bench.path(volume).exists()
    assert steps < 10


def test_a_directory_that_another_volume_took_meanwhile_is_not_mistaken_for_ours(btrfs_bench):
    """The top of every subvolume has the same inode number; who owns a place is told by something else."""
    taken = btrfs_bench.create("taken", directory="place")
    other = btrfs_bench.create("other")
    places = btrfs_bench.volumes._creation._places
    from dataclasses import replace

    record = btrfs_bench.pool().volumes.get(other.record.id)
    lost = replace(record, directory="place", claimed=True)
    assert not places.is_in_place(btrfs_bench.pool(), lost)
    assert places.is_in_place(btrfs_bench.pool(), btrfs_bench.pool().volumes.get(taken.record.id))


def test_a_group_is_cut_back_to_back_and_says_what_that_is_worth(btrfs_bench):
    sources = [btrfs_bench.create(f"volume-{number}") for number in range(5)]
    group = btrfs_bench.groups.create("group", [source.record.handle for source in sources], time.monotonic() + 60)
    assert group.record.consistency == POINT_IN_TIME_EACH
    assert {member.record.consistency for member in group.members} == {POINT_IN_TIME}
    cuts = sorted(member.record.created_at_ns for member in group.members)
    assert cuts[-1] - cuts[0] < 2e9


def test_a_group_with_one_member_that_was_read_file_by_file_says_so(btrfs_bench):
    sources = [btrfs_bench.create(f"volume-{number}") for number in range(2)]
    make_subvolume(btrfs_bench.path(sources[1]), "tenants-own")
    group = btrfs_bench.groups.create("group", [source.record.handle for source in sources], time.monotonic() + 60)
    assert group.record.consistency == FILE_BY_FILE


def test_a_snapshot_cut_off_before_it_was_sealed_is_sealed_by_the_retry(btrfs_bench):
    volume = btrfs_bench.create("source")
    snapshot = btrfs_bench.snapshot("snap", volume)
    set_read_only(data_of(btrfs_bench, snapshot), False)
    store = btrfs_bench.pool()
    from dataclasses import replace

    from csi_driver.volumes.model import Phase

    store.snapshots.replace(replace(snapshot.record, phase=Phase.CREATING), OPEN)
    again = btrfs_bench.restarted().snapshot("snap", volume)
    assert again.record == replace(snapshot.record, token=again.record.token)
    with pytest.raises(OSError, match="Read-only"):
        (data_of(btrfs_bench, snapshot) / "file").touch()


# --- while it runs ----------------------------------------------------------------------------------------------------------------


def test_a_source_is_not_deleted_and_a_snapshot_not_taken_away_while_a_copy_reads_it(tmp_path, make_disk):
    bench = bench_on(tmp_path, {"default": make_disk("ext4", "256M", "ext4")})
    volume = bench.create("source")
    for number in range(3000):
        (bench.path(volume) / str(number)).write_bytes(b"x" * 10000)
    snapshot = bench.snapshot("snap", volume)
    restoring = threading.Thread(target=lambda: bench.restore("restored", snapshot))
    cloning = threading.Thread(target=lambda: bench.clone("clone", volume))
    restoring.start()
    cloning.start()
    while not (jobs := bench.domain.jobs.running()) or any(job.progress.files == 0 for job in jobs):
        time.sleep(0.001)
    with pytest.raises(FailedPrecondition, match="is in use"):
        bench.snapshots.delete(snapshot.record.handle)
    with pytest.raises(OperationPending):
        bench.volumes.delete(volume.record.handle)
    restoring.join()
    cloning.join()
    bench.snapshots.delete(snapshot.record.handle)
    bench.volumes.delete(volume.record.handle)


def test_a_third_copy_in_a_pool_waits_for_its_turn_says_so_and_can_be_cancelled_in_line():
    turns, jobs = Turns(at_once=2), [JobControl(f"job-{number}") for number in range(4)]
    release, began = threading.Event(), []

    def work(job):
        with turns.take("pool", f"volume of {job.key}", job):
            began.append(job.key)
            release.wait(20)

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs[:3]]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    assert began == ["job-0", "job-1"]
    assert jobs[2].describe() == "waits for its turn, 1 before it"
    with turns.take("another pool", "volume", JobControl("elsewhere")):
        pass
    jobs[3].cancelled.set()
    with pytest.raises(JobCancelled), turns.take("pool", "volume", jobs[3]):
        pass
    release.set()
    for thread in threads:
        thread.join()
    assert began == ["job-0", "job-1", "job-2"]


@pytest.mark.parametrize("at_once", [1, 2])
def test_many_copies_of_one_volume_let_those_of_others_go_first(at_once):
    turns, began, go_on = Turns(at_once), [], threading.Semaphore(0)

    def work(job, origin):
        with turns.take("pool", origin, job):
            began.append(job.key)
            assert go_on.acquire(timeout=20)

    def ask(key, origin):
        job = JobControl(key)
        thread = threading.Thread(target=work, args=(job, origin))
        thread.start()
        until(lambda: job.ahead or key in began)
        return thread

    threads = [ask(f"many-{number}", "one volume") for number in range(6)]
    threads += [ask("another", "another volume"), ask("third", "third volume"), ask("another's second", "another volume")]
    for _ in threads:
        before = len(began)
        go_on.release()
        until(lambda: len(began) > before or len(began) == len(threads))  # noqa: B023 - at once
    for thread in threads:
        thread.join(20)
    first = [f"many-{number}" for number in range(at_once)]
    assert began[:at_once] == first
    assert {"another", "third"} <= set(began[at_once : at_once + 3])
    assert began.index("another's second") < began.index(f"many-{at_once + 2}")
    assert [key for key in began if key.startswith("many")] == [f"many-{number}" for number in range(6)]


def test_nobody_who_waits_is_passed_without_end():
    """Whoever has been in line longest has his turn, also where new ones come before each other."""
    turns, began, go_on = Turns(1), [], threading.Semaphore(0)

    def work(job, origin):
        with turns.take("pool", origin, job):
            began.append(job.key)
            assert go_on.acquire(timeout=20)

    threads = []

    def ask(key, origin):
        job = JobControl(key)
        threads.append(threading.Thread(target=work, args=(job, origin)))
        threads[-1].start()
        until(lambda: job.ahead or key in began)

    ask("many-0", "one volume")
    ask("many-1", "one volume")
    for number in range(3):
        ask(f"new-{number}", f"new volume {number}")
        go_on.release()
        until(lambda: len(began) == number + 2)  # noqa: B023 - at once
    assert began.index("many-1") <= 2
    for _ in threads:
        go_on.release()
    for thread in threads:
        thread.join(20)


def test_a_copy_that_outlasts_its_call_says_how_far_it_is(tmp_path, make_disk):
    bench = bench_on(tmp_path, {"default": make_disk("ext4", "256M", "ext4")})
    volume = bench.create("source")
    for number in range(4000):
        (bench.path(volume) / str(number)).write_bytes(b"x" * 10000)
    with pytest.raises(OperationPending, match=r"files, [0-9.]+ (B|KiB|MiB) in 0 s"):
        bench.snapshots.create(CreateSnapshot("snap", volume.record.handle), time.monotonic() + 1.1)
    snapshot = bench.snapshot("snap", volume)
    with pytest.raises(OperationPending, match=r" of 38\.1 MiB in 0 s"):
        request = bench.request("restored", source=ContentSource(SourceKind.SNAPSHOT, snapshot.record.handle))
        bench.volumes.create(request, time.monotonic() + 1.1)
    assert bench.restore("restored", snapshot).record.capture.files == 4000


# --- what is rewritten while it is copied -----------------------------------------------------------------------------------------


def test_a_copy_of_more_than_its_volume_can_hold_stops_and_one_that_grows_with_its_volume_does_not(tmp_path, make_disk):
    bench = bench_on(tmp_path, {"default": make_disk("ext4", "256M", "ext4")})
    volume = bench.create("source")
    for number in range(40):
        (bench.path(volume) / str(number)).write_bytes(b"x" * MIB)
    store, captures = bench.pool(), bench.snapshots._contents._captures

    def run(name, hold):
        job = JobControl(name)
        with store.open_volume(volume.record.directory) as top, store.open("staging") as staging:
            return captures.capture(store, top, staging, name, volume.record.handle, job, hold).bytes

    with pytest.raises(FailedPrecondition, match="rewritten"):
        run("a", HoldToSource(lambda: 8 * MIB))
    assert 8 * MIB < sum(path.stat().st_size for path in (store.backend.root() / ".csi/staging/a").iterdir()) <= 10 * MIB
    assert run("b", HoldToSource(lambda: 40 * MIB)) == 40 * MIB
    growing = iter(range(8, 100, 8))
    assert run("c", HoldToSource(lambda: next(growing) * MIB)) == 40 * MIB
    assert run("d", HoldToSource(lambda: None)) == 40 * MIB
    bench.domain.stop(5)


def test_the_size_of_a_copied_snapshot_is_at_least_what_was_copied_where_volumes_are_held(tmp_path, make_disk):
    disk = make_disk("btrfs", "768M", "btrfs")
    subprocess.run(["btrfs", "quota", "enable", disk], check=True)
    bench = bench_on(tmp_path, {"default": disk})
    volume = bench.create("source", 32 * MIB)
    assert volume.record.limit.mark is not None
    subprocess.run(["btrfs", "-q", "subvolume", "create", bench.path(volume) / "inner"], check=True)  # else it were one moment
    for number in range(6):
        (bench.path(volume) / "inner" / str(number)).write_bytes(os.urandom(8 * MIB))  # and this counts for nobody
    snapshot = bench.snapshot("snap", volume)
    assert snapshot.record.consistency == "file by file"
    assert snapshot.record.size_bytes == 48 * MIB
    bench.domain.stop(5)
