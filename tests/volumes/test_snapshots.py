import os
import threading
import time

import pytest
from bench import DRIVER, MIB, NODE, all_turns_taken, copying_stands_still_at, make_bench, until
from trees import fill, seen

from csi_driver.config import HostPathPool
from csi_driver.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    OperationPending,
    OutOfRange,
    RecordDamaged,
    ResourceExhausted,
)
from csi_driver.volumes.model import ContentSource, SourceKind
from csi_driver.volumes.requests import CapacityRange, CreateSnapshot, Page


def content(bench, snapshot):
    return bench.pool(snapshot.record.pool).backend.root() / ".csi/snapshots-data" / snapshot.record.id


def listed(bench, snapshot_handle="", source_handle=""):
    return [snapshot.record.handle for snapshot in bench.snapshots.list(Page(), snapshot_handle, source_handle)[0]]


def outcome(call):
    try:
        return call()
    except Exception as error:
        return error


@pytest.fixture
def source(bench):
    volume = bench.create("source", size=2 * MIB)
    fill(bench.path(volume))
    return volume


def test_a_snapshot_is_the_whole_content_at_one_time_and_never_changes(bench, source):
    before = time.time_ns()
    snapshot = bench.snapshot("s", source)
    whole = seen(bench.path(source))
    assert before <= snapshot.record.created_at_ns <= time.time_ns()
    (bench.path(source) / "plain").write_text("changed")
    (bench.path(source) / "new").touch()
    assert seen(content(bench, snapshot)) == whole
    assert snapshot.record.size_bytes == 2 * MIB
    assert snapshot.record.source_handle == source.record.handle
    assert snapshot.record.consistency == "file by file"
    assert bench.snapshots.get(snapshot.record.handle) == snapshot
    assert bench.snapshot("s", source) == snapshot
    assert bench.restarted().snapshot("s", source) == snapshot


def test_the_size_of_a_snapshot_is_its_sources_at_that_time(bench, source):
    first = bench.snapshot("first", source)
    bench.volumes.expand(source.record.handle, CapacityRange(8 * MIB), None)
    assert bench.snapshot("second", source).record.size_bytes == 8 * MIB
    assert bench.snapshots.get(first.record.handle).record.size_bytes == 2 * MIB


def test_a_volume_that_grows_before_its_snapshot_is_cut_gives_it_its_new_size(bench, source):
    made = []
    with all_turns_taken(bench):
        asked = threading.Thread(target=lambda: made.append(bench.snapshot("snap", source)))
        asked.start()
        until(lambda: any(job.ahead for job in bench.domain.jobs.running()))
        bench.volumes.expand(source.record.handle, CapacityRange(8 * MIB), None)
    asked.join()
    assert made[0].record.size_bytes == 8 * MIB
    assert bench.snapshots.get(made[0].record.handle) == made[0]
    with pytest.raises(OutOfRange, match="the content source needs 8388608"):
        bench.restore("restored", made[0], size=2 * MIB)
    assert bench.restore("restored", made[0], size=0).record.capacity_bytes == 8 * MIB


def test_snapshots_lie_where_no_tenant_can_see_them(bench, source):
    place = content(bench, bench.snapshot("s", source))
    assert place.parents[1].stat().st_mode & 0o777 == 0o700


def test_a_name_belongs_to_one_source(bench, source):
    snapshot = bench.snapshot("s", source)
    for other in (bench.create("other"), bench.create("in-another-pool", pool="other")):
        with pytest.raises(AlreadyExists, match=snapshot.record.handle):
            bench.snapshot("s", other)
    assert listed(bench) == [snapshot.record.handle]


def test_who_joins_the_job_of_another_source_is_refused(bench, source):
    other = bench.create("other")
    snapshot = bench.snapshot("first", source)
    begun, go_on = threading.Event(), threading.Event()

    def first(_job):
        begun.set()
        go_on.wait(10)
        return snapshot

    key = bench.pool().id_of("snapshot", "second")
    job = threading.Thread(target=lambda: bench.domain.jobs.run(key, first, time.monotonic() + 30))
    job.start()
    begun.wait(10)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(outcome(lambda: bench.snapshot("second", other))))
    asking.start()
    time.sleep(0.1)
    go_on.set()
    asking.join()
    job.join()
    assert isinstance(answers[0], AlreadyExists)


def test_a_volume_and_a_snapshot_may_have_the_same_name(bench, source):
    snapshot = bench.snapshot("source", source)
    assert snapshot.record.id != source.record.id
    assert bench.create("s")
    assert bench.snapshot("s", source)


def test_a_source_that_does_not_exist_is_not_found(bench):
    for handle in ("", "not-ours", bench.pool().handle_of("a" * 26)):
        with pytest.raises(NotFound):
            bench.snapshots.create(CreateSnapshot("s", handle), time.monotonic() + 60)
    assert listed(bench) == []


def test_a_source_on_another_node_is_not_taken_for_gone(bench, tmp_path):
    place = tmp_path / "elsewhere"
    place.mkdir()
    elsewhere = make_bench(place, (HostPathPool("default", place / "pool"),), node_id="node-2")
    with pytest.raises(FailedPrecondition, match="another node"):
        bench.snapshot("s", elsewhere.create("v"))


def test_a_snapshot_is_as_reachable_as_its_pool(bench, source):
    here = {f"topology.{DRIVER}/node": NODE}
    elsewhere = {f"topology.{DRIVER}/node": "node-2"}
    assert bench.snapshot("s", source).topology == here
    assert bench.snapshot("t", bench.create("shared", pool="spread")).topology is None
    with pytest.raises(ResourceExhausted):
        bench.snapshots.create(CreateSnapshot("u", source.record.handle, (elsewhere,)), time.monotonic() + 60)
    assert bench.snapshots.create(CreateSnapshot("u", source.record.handle, (elsewhere, here)), time.monotonic() + 60)


def test_a_snapshot_outlives_its_source_and_a_restore_outlives_its_snapshot(bench, source):
    whole = seen(bench.path(source))
    snapshot = bench.snapshot("s", source)
    bench.volumes.delete(source.record.handle)
    bench.sweep()
    restored = bench.restore("restored", snapshot, size=2 * MIB)
    bench.snapshots.delete(snapshot.record.handle)
    bench.sweep()
    assert seen(bench.path(restored)) == whole
    assert bench.leftovers() == []


def test_the_handle_of_a_deleted_source_may_be_used_again_and_the_snapshot_stays_what_it_was(bench, source):
    snapshot = bench.snapshot("s", source)
    whole = seen(content(bench, snapshot))
    bench.volumes.delete(source.record.handle)
    again = bench.create("source")
    assert again.record.handle == source.record.handle
    assert bench.snapshot("s", again) == snapshot
    assert seen(content(bench, snapshot)) == whole


def test_a_long_copy_is_joined_and_shown_only_when_it_is_whole(bench, source):
    request = CreateSnapshot("s", source.record.handle)
    with copying_stands_still_at(bench.path(source) / "leased"):
        for _ in range(2):
            with pytest.raises(OperationPending):
                bench.snapshots.create(request, time.monotonic() + 1.1)
        assert len(bench.domain.jobs.running()) == 1
        assert listed(bench) == []
        until(lambda: bench.domain.jobs.running()[0].doing == "copying")  # a slow disk may still be writing the record down
        with pytest.raises(OperationPending):
            bench.volumes.delete(source.record.handle)
    snapshot = bench.snapshots.create(request, time.monotonic() + 60)
    assert seen(content(bench, snapshot)) == seen(bench.path(source))


@pytest.mark.minutes
def test_leases_on_many_files_end_a_capture_after_a_minute_and_leave_nothing(bench, source):
    leased = [bench.path(source) / f"leased{number}" for number in range(20)]
    began = time.monotonic()
    with copying_stands_still_at(*leased):
        with pytest.raises(FailedPrecondition, match=r"'leased\d+' cannot be copied: a program holds a write lease"):
            bench.snapshots.create(CreateSnapshot("s", source.record.handle), began + 300)
        assert time.monotonic() - began < 100
        bench.sweep()
        assert listed(bench) == []
        assert bench.leftovers() == []
    assert seen(content(bench, bench.snapshot("s", source))) == seen(bench.path(source))


def test_deleting_a_snapshot_that_is_being_cut_stops_it(bench, source):
    handle = bench.pool().handle_of(bench.pool().id_of("snapshot", "s"))
    with copying_stands_still_at(bench.path(source) / "leased"):
        with pytest.raises(OperationPending):
            bench.snapshots.create(CreateSnapshot("s", source.record.handle), time.monotonic() + 1.1)
        with pytest.raises(OperationPending):
            bench.snapshots.delete(handle)
        until(lambda: not bench.domain.jobs.running())
    bench.snapshots.delete(handle)
    bench.sweep()
    assert listed(bench) == []
    assert bench.leftovers() == []


def test_deleting_is_done_once_and_frees_the_name(bench, source):
    snapshot = bench.snapshot("s", source)
    for handle in (snapshot.record.handle, snapshot.record.handle, "", "not-ours"):
        bench.snapshots.delete(handle)
    assert not content(bench, snapshot).exists()
    with pytest.raises(NotFound):
        bench.snapshots.get(snapshot.record.handle)
    assert seen(content(bench, bench.snapshot("s", bench.create("other")))).keys() == {"."}
    bench.sweep()
    assert bench.leftovers() == []


def test_a_snapshot_that_a_restore_reads_is_not_deleted(bench, source):
    (bench.path(source) / "leased").touch()
    snapshot = bench.snapshot("s", source)
    restore = bench.request("restored", size=2 * MIB, source=ContentSource(SourceKind.SNAPSHOT, snapshot.record.handle))
    with copying_stands_still_at(content(bench, snapshot) / "leased"):
        with pytest.raises(OperationPending):
            bench.volumes.create(restore, time.monotonic() + 1.1)
        with pytest.raises(FailedPrecondition, match="a volume is being restored"):
            bench.snapshots.delete(snapshot.record.handle)
        assert bench.snapshots.get(snapshot.record.handle) == snapshot
    restored = bench.volumes.create(restore, time.monotonic() + 60)
    bench.snapshots.delete(snapshot.record.handle)
    assert seen(bench.path(restored)) == seen(bench.path(source))


def test_a_restore_whose_snapshots_data_was_lost_says_so_and_leaves_nothing(bench, source):
    snapshot = bench.snapshot("s", source)
    content(bench, snapshot).rename(bench.root / "stolen")
    with pytest.raises(FailedPrecondition, match=r"content of snapshot .* is missing"):
        bench.restore("restored", snapshot, size=2 * MIB)
    bench.sweep()
    assert bench.leftovers() == []
    assert [v.record.name for v in bench.volumes.list(Page())[0]] == ["source"]


def test_lists_are_filtered_by_snapshot_and_by_source(bench, source):
    other = bench.create("other", pool="spread")
    mine = sorted(bench.snapshot(f"s{n}", source).record.handle for n in range(5))
    theirs = bench.snapshot("t", other).record.handle
    assert sorted(listed(bench)) == sorted([*mine, theirs])
    assert listed(bench, source_handle=source.record.handle) == mine
    assert listed(bench, source_handle="nothing") == []
    assert listed(bench, snapshot_handle=theirs) == [theirs]
    assert listed(bench, theirs, other.record.handle) == [theirs]
    assert listed(bench, theirs, source.record.handle) == []
    assert listed(bench, snapshot_handle="nothing") == []
    assert listed(bench, snapshot_handle=bench.pool().handle_of("a" * 26)) == []


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_filtered_pages_hold_each_snapshot_once(bench, source, size):
    other = bench.create("other")
    wanted = sorted(bench.snapshot(f"s{n}", source).record.handle for n in range(6))
    for n in range(6):
        bench.snapshot(f"t{n}", other)
    token, found = "", []
    while True:
        entries, token = bench.snapshots.list(Page(size, token), "", source.record.handle)
        found += [entry.record.handle for entry in entries]
        if not token:
            break
    assert found == wanted


def test_a_damaged_snapshot_record_hides_only_its_own(bench, source):
    kept, broken = bench.snapshot("kept", source), bench.snapshot("broken", source)
    (bench.pool().backend.root() / f".csi/snapshots/{broken.record.id}.json").write_text("nonsense")
    assert listed(bench) == [kept.record.handle]
    for call in (
        lambda: bench.snapshots.get(broken.record.handle),
        lambda: bench.snapshots.delete(broken.record.handle),
        lambda: bench.snapshot("broken", source),
        lambda: bench.restore("r", broken),
    ):
        with pytest.raises(RecordDamaged):
            call()
    bench.sweep()
    assert os.path.isdir(content(bench, broken))
