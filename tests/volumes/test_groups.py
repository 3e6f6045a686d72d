import os
import threading
import time

import pytest
from bench import MIB, copying_stands_still_at, make_bench, until
from crash import every_crash
from trees import fill, seen

from csi_driver.config import HostPathPool
from csi_driver.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, OperationPending
from csi_driver.volumes.model import ContentSource, SourceKind
from csi_driver.volumes.requests import Page


def cut(bench, name, *volumes, seconds=60.0):
    return bench.groups.create(name, [volume.record.handle for volume in volumes], time.monotonic() + seconds)


def content(bench, member):
    return bench.pool(member.record.pool).backend.root() / ".csi/snapshots-data" / member.record.id


def listed(bench):
    return [snapshot.record.handle for snapshot in bench.snapshots.list(Page(), "", "")[0]]


@pytest.fixture
def sources(bench):
    made = [bench.create(f"source{n}") for n in range(3)]
    for number, volume in enumerate(made):
        fill(bench.path(volume), f"content {number}")
    return made


def test_a_group_has_a_whole_snapshot_of_every_source(bench, sources):
    group = cut(bench, "g", *sources)
    assert group.record.sources == tuple(sorted(volume.record.handle for volume in sources))
    by_source = {volume.record.handle: volume for volume in sources}
    for member, handle in zip(group.members, group.record.members, strict=True):
        assert member.record.handle == handle
        assert member.record.group_handle == group.record.handle
        assert seen(content(bench, member)) == seen(bench.path(by_source[member.record.source_handle]))
        assert bench.snapshots.get(handle) == member
    assert bench.groups.get(group.record.handle, []) == group
    assert bench.groups.get(group.record.handle, list(group.record.members)) == group
    assert sorted(listed(bench)) == sorted(group.record.members)


def test_asking_again_in_any_order_gives_the_same_group(bench, sources):
    group = cut(bench, "g", *sources)
    assert cut(bench, "g", *reversed(sources), sources[0]) == group
    assert cut(bench.restarted(), "g", *sources) == group


def test_the_same_name_of_other_sources_is_refused(bench, sources):
    group = cut(bench, "g", *sources[:2])
    for other in (sources, sources[:1], sources[1:]):
        with pytest.raises(AlreadyExists, match=group.record.handle):
            cut(bench, "g", *other)
    assert bench.groups.get(group.record.handle, []) == group


def test_who_joins_the_job_of_other_sources_is_refused(bench, sources):
    group = cut(bench, "first", *sources[:2])
    begun, go_on = threading.Event(), threading.Event()

    def first(_job):
        begun.set()
        go_on.wait(10)
        return group

    key = bench.pool().id_of("group", "second")
    job = threading.Thread(target=lambda: bench.domain.jobs.run(key, first, time.monotonic() + 30))
    job.start()
    begun.wait(10)
    threading.Timer(0.1, go_on.set).start()
    with pytest.raises(AlreadyExists):
        cut(bench, "second", *sources)
    job.join()


@pytest.mark.parametrize("wrong", ["none", "missing", "foreign", "two pools"])
def test_a_group_that_cannot_be_is_refused_and_no_member_is_cut(bench, sources, wrong):
    handles = [volume.record.handle for volume in sources]
    handles, error = {
        "none": ([], InvalidArgument),
        "missing": ([*handles, bench.pool().handle_of("a" * 26)], NotFound),
        "foreign": ([*handles, "not-ours"], NotFound),
        "two pools": ([*handles, bench.create("far", pool="other").record.handle], InvalidArgument),
    }[wrong]
    with pytest.raises(error):
        bench.groups.create("g", handles, time.monotonic() + 60)
    bench.sweep()
    assert listed(bench) == []
    assert bench.leftovers() == []
    assert cut(bench, "g", *sources)


@pytest.mark.root
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_one_member_for_which_there_is_no_room_leaves_none(tmp_path, make_disk, kind):
    disk = make_disk("small", size="16M", kind=kind)
    bench = make_bench(tmp_path, (HostPathPool("default", disk / "pool"),))
    sources = [bench.create(f"source{n}") for n in range(2)]
    for volume in sources:
        (bench.path(volume) / "data").write_bytes(os.urandom(5 * MIB))
    with pytest.raises(OSError, match="No space left"):
        cut(bench, "g", *sources)
    bench.sweep()
    assert listed(bench) == []
    assert bench.leftovers() == []
    assert bench.pool().groups.ids() == []
    bench.volumes.delete(bench.create("x").record.handle)
    (bench.path(sources[0]) / "data").unlink()
    assert len(cut(bench, "g", *sources).members) == 2


@pytest.mark.root
def test_one_source_that_went_away_while_the_group_was_cut_off_leaves_none_or_all(tmp_path, make_disk):
    disk = make_disk("crashes", size="64M")
    benches = iter(range(1000))
    bench = sources = None

    def start(_change):
        nonlocal bench, sources
        place = disk / str(next(benches))
        place.mkdir()
        bench = make_bench(place, (HostPathPool("default", place / "pool"),))
        sources = [bench.create("one"), bench.create("two")]
        return lambda: cut(bench.restarted(), "g", *sources)

    outcomes = set()
    for change in every_crash(start):
        after = bench.restarted()
        for volume in sources:
            after.volumes.delete(volume.record.handle)
        try:
            group = cut(after, "g", *sources)
        except NotFound:
            outcomes.add("none")
            assert listed(after) == [], change
            assert after.pool().groups.ids() == [], change
        else:
            outcomes.add("all")
            assert len(listed(after)) == len(group.members) == 2
        after.age_temporaries()
        after.restarted().sweep()
        assert after.leftovers() == [], change
    assert outcomes == {"none", "all"}


def test_a_group_that_is_stopped_half_way_shows_no_member_and_is_completed_by_the_retry(bench, sources):
    last = max(sources, key=lambda volume: volume.record.handle)
    with copying_stands_still_at(bench.path(last) / "leased"):
        with pytest.raises(OperationPending):
            cut(bench, "g", *sources, seconds=1.5)
        until(lambda: len(bench.pool().snapshots.ids()) == 3)
        assert listed(bench) == []
        with pytest.raises(NotFound):
            bench.groups.get(bench.pool().handle_of(bench.pool().id_of("group", "g")), [])
    assert len(cut(bench, "g", *sources).members) == 3


def test_deleting_a_group_deletes_its_members_and_frees_its_name(bench, sources):
    single = bench.snapshot("single", sources[0])
    group = cut(bench, "g", *sources)
    bench.groups.delete(group.record.handle, list(group.record.members))
    bench.groups.delete(group.record.handle, [])
    bench.groups.delete("not-ours", [])
    assert listed(bench) == [single.record.handle]
    with pytest.raises(NotFound):
        bench.groups.get(group.record.handle, [])
    bench.sweep()
    assert bench.leftovers() == []
    assert len(cut(bench, "g", *sources[:2]).members) == 2


def test_members_that_are_named_must_be_the_groups(bench, sources):
    group = cut(bench, "g", *sources)
    single = bench.snapshot("single", sources[0]).record.handle
    for named in ([single], [*group.record.members, single], list(group.record.members)[:2], ["not-ours"]):
        for call in (bench.groups.get, bench.groups.delete):
            with pytest.raises(InvalidArgument, match="snapshot_ids"):
                call(group.record.handle, named)
    assert bench.groups.get(group.record.handle, []) == group


def test_a_member_is_not_deleted_alone(bench, sources):
    group = cut(bench, "g", *sources)
    with pytest.raises(InvalidArgument, match=group.record.handle):
        bench.snapshots.delete(group.record.members[0])
    assert bench.groups.get(group.record.handle, []) == group


def test_a_group_with_a_member_that_is_being_restored_is_not_deleted_in_part(bench, sources):
    for volume in sources:
        (bench.path(volume) / "leased").touch()
    group = cut(bench, "g", *sources)
    last = max(group.members, key=lambda member: group.record.members.index(member.record.handle))
    restore = bench.request("restored", source=ContentSource(SourceKind.SNAPSHOT, last.record.handle))
    with copying_stands_still_at(content(bench, last) / "leased"):
        with pytest.raises(OperationPending):
            bench.volumes.create(restore, time.monotonic() + 1.1)
        with pytest.raises(FailedPrecondition, match="being restored"):
            bench.groups.delete(group.record.handle, [])
        assert bench.groups.get(group.record.handle, []) == group
        assert all(content(bench, member).is_dir() for member in group.members)
    bench.volumes.create(restore, time.monotonic() + 60)
    bench.groups.delete(group.record.handle, [])
    assert listed(bench) == []


def test_a_member_can_be_restored_and_outlives_nothing(bench, sources):
    group = cut(bench, "g", *sources)
    source = next(volume for volume in sources if volume.record.handle == group.members[0].record.source_handle)
    restored = bench.restore("restored", group.members[0])
    bench.groups.delete(group.record.handle, [])
    bench.sweep()
    assert seen(bench.path(restored)) == seen(bench.path(source))


def test_a_group_that_lost_a_members_record_says_which(bench, sources):
    group = cut(bench, "g", *sources)
    (bench.pool().backend.root() / f".csi/snapshots/{group.members[1].record.id}.json").unlink()
    with pytest.raises(FailedPrecondition, match=group.record.members[1]):
        bench.groups.get(group.record.handle, [])
    bench.groups.delete(group.record.handle, [])
    assert listed(bench) == []
