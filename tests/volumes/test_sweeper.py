import json
import os
import subprocess
import threading
import time
from dataclasses import replace

import pytest
from bench import copying_stands_still_at, make_bench, until
from crash import runs_to_its_end
from rivals import Slow
from trees import fill, seen

from csi_driver.config import HostPathPool
from csi_driver.errors import OperationPending
from csi_driver.linux.files import OPEN
from csi_driver.volumes.handles import SNAPSHOT, VOLUME
from csi_driver.volumes.leftovers import ABANDONED_SECONDS
from csi_driver.volumes.model import Phase
from csi_driver.volumes.requests import CreateSnapshot, Page

LONG_AGO = int((time.time() - ABANDONED_SECONDS - 60) * 1e9)


def with_phase(bench, volume, phase, **changes):
    record = bench.pool().volumes.get(volume.record.id)
    return bench.pool().volumes.replace(replace(record, phase=phase, **changes), OPEN)


def test_nothing_is_done_where_nothing_is_left(bench):
    volume = bench.create("v")
    snapshot = bench.snapshot("s", volume)
    bench.groups.create("g", [volume.record.handle], time.monotonic() + 30)
    before = seen(bench.pool().backend.root())
    report = bench.sweep()
    assert (report.trash, report.staging, report.deletions_completed, report.creations_abandoned, report.failed) == (
        0,
        0,
        0,
        0,
        0,
    )
    assert seen(bench.pool().backend.root()) == before
    assert bench.snapshots.get(snapshot.record.handle) == snapshot


def test_a_deletion_that_was_cut_off_is_completed(bench):
    volume = bench.create("v")
    fill(bench.path(volume))
    with_phase(bench, volume, Phase.DELETING)
    report = bench.sweep()
    assert (report.deletions_completed, report.failed) == (1, 0)
    assert not bench.path(volume).exists()
    assert bench.leftovers() == []
    assert bench.pool().volumes.ids() == []


@pytest.mark.parametrize("age", ["young", "old"])
def test_a_creation_is_taken_back_only_once_nobody_will_ask_for_it_again(bench, age):
    volume = bench.create("v")
    bench.path(volume).rmdir()
    with_phase(
        bench,
        volume,
        Phase.CREATING,
        content_inode=None,
        claimed=False,
        created_at_ns=LONG_AGO if age == "old" else time.time_ns(),
    )
    report = bench.sweep()
    assert report.creations_abandoned == (age == "old")
    assert bench.pool().volumes.ids() == ([] if age == "old" else [volume.record.id])


def test_a_ready_volume_is_never_abandoned_however_old(bench):
    volume = bench.create("v")
    with_phase(bench, volume, Phase.READY, created_at_ns=LONG_AGO)
    assert bench.sweep().creations_abandoned == 0
    assert bench.path(volume).is_dir()


def test_staging_that_nobody_builds_is_thrown_away(bench):
    staging = bench.pool().backend.root() / f".csi/staging/{'a' * 26}.0123456789abcdef"
    staging.mkdir()
    fill(staging)
    report = bench.sweep()
    assert (report.staging, report.trash, report.failed) == (1, 1, 0)
    assert bench.leftovers() == []


def test_what_is_being_built_is_left_alone(bench):
    source = bench.create("source")
    with copying_stands_still_at(bench.path(source) / "leased"):
        request = bench.request("clone", source=bench.volume_source(source))
        with pytest.raises(OperationPending):
            bench.volumes.create(request, time.monotonic() + 1.1)
        with pytest.raises(OperationPending):
            bench.snapshots.create(CreateSnapshot("s", source.record.handle), time.monotonic() + 1.1)
        staging = bench.pool().backend.root() / ".csi/staging"
        until = time.monotonic() + 30
        while len(before := sorted(os.listdir(staging))) < 2:  # a busy machine answers "not yet" before it has begun
            assert time.monotonic() < until
            time.sleep(0.05)
        for sweeping in (bench, bench.restarted()):  # in this process, and as another one
            report = sweeping.sweep()
            assert (report.staging, report.failed) == (0, 0)
            assert sorted(os.listdir(staging)) == before
    assert bench.volumes.create(request, time.monotonic() + 30)
    assert bench.snapshot("s", source)


def test_one_thing_that_is_in_use_does_not_keep_the_others_from_being_swept(bench):
    volumes = [bench.create(f"v{n}") for n in range(3)]
    for volume in volumes:
        (bench.path(volume) / "leased").touch()
        with_phase(bench, volume, Phase.DELETING)
    locks = bench.domain.services.snapshots._locks
    first = min(volumes, key=lambda volume: volume.record.id)
    with locks.hold(bench.pool(), f"content:{first.record.id}"):
        report = bench.sweep()
        assert (report.deletions_completed, report.failed) == (2, 0)
        assert bench.pool().volumes.ids() == [first.record.id]
    assert bench.sweep().deletions_completed == 1
    assert bench.leftovers() == []


def begun_long_ago(bench, group, **changes):
    record = bench.pool().groups.get(group.record.id)
    bench.pool().groups.replace(replace(record, phase=Phase.CREATING, **({"created_at_ns": LONG_AGO} | changes)), OPEN)


def test_a_group_that_is_in_use_does_not_keep_the_rest_from_being_swept(bench):
    volume = bench.create("v")
    group = bench.groups.create("g", [volume.record.handle], time.monotonic() + 30)
    snapshot = bench.snapshot("s", volume).record
    begun_long_ago(bench, group)
    bench.pool().snapshots.replace(replace(snapshot, phase=Phase.CREATING, created_at_ns=LONG_AGO), OPEN)
    with bench.domain.services.snapshots._locks.hold(bench.pool(), f"group:{group.record.id}"):
        assert bench.sweep().creations_abandoned == 1
        assert bench.pool().snapshots.get(snapshot.id).phase is Phase.READY
    assert bench.sweep().creations_abandoned == 1
    assert bench.pool().groups.ids() == []
    assert bench.pool().snapshots.ids() == [snapshot.id]
    assert bench.leftovers() == []


def test_a_group_that_was_begun_anew_while_the_old_one_was_to_be_taken_back_stays(bench, monkeypatch):
    handles = [bench.create("v").record.handle]
    begun_long_ago(bench, bench.groups.create("g", handles, time.monotonic() + 30))
    of_group = lambda _store, key: key.startswith("group:")  # noqa: E731
    slow = Slow(monkeypatch, bench.domain.services.snapshots._locks, "hold", bench.sweep, of_group)
    other = bench.restarted()
    other.groups.delete(other.groups.create("g", handles, time.monotonic() + 30).record.handle, [])
    anew = other.groups.create("g", handles, time.monotonic() + 30)
    begun_long_ago(other, anew, created_at_ns=time.time_ns())
    assert slow.go_on().creations_abandoned == 0
    assert other.groups.create("g", handles, time.monotonic() + 30).members == anew.members


def test_a_record_stays_in_the_trash_until_its_data_is_there_too(bench):
    trash = bench.pool().backend.root() / ".csi/trash"
    in_place = moved = 0
    for changes in range(1, 20):
        volume = bench.create(f"v{changes}")
        fill(bench.path(volume))
        if runs_to_its_end(lambda handle=volume.record.handle: bench.volumes.delete(handle), changes):
            break
        entries = os.listdir(trash)
        bench.domain.sweeper._reaper.empty(bench.pool())
        if entries and bench.path(volume).exists():
            in_place += 1
            assert os.listdir(trash) == entries
        elif entries:
            moved += 1
            assert os.listdir(trash) == []
        bench.sweep()
        if entries:
            assert not bench.path(volume).exists()
    assert in_place
    assert moved
    bench.sweep()
    assert bench.leftovers(*(volume.record.directory for volume in bench.volumes.list(Page())[0])) == []


def test_trash_that_a_kill_left_half_removed_is_removed(bench):
    trash = bench.pool().backend.root() / ".csi/trash"
    for number in range(1, 200):
        volume = bench.create(f"v{number}")
        fill(bench.path(volume))
        bench.volumes.delete(volume.record.handle)
        if runs_to_its_end(bench.sweep, number):
            break
        bench.sweep()
        assert os.listdir(trash) == [], number
    assert number > 5


@pytest.mark.root
def test_trash_in_which_something_is_mounted_is_told_kept_and_no_obstacle(bench):
    mounted, other = bench.create("mounted"), bench.create("other")
    for volume in (mounted, other):
        fill(bench.path(volume))
        bench.volumes.delete(volume.record.handle)
    (entry,) = (bench.pool().backend.root() / ".csi/trash").glob(f"{mounted.record.id}.*")
    inside = entry / "folder"
    subprocess.run(["mount", "-t", "tmpfs", "theirs", inside], check=True)
    (inside / "precious").write_text("kept")
    try:
        report = bench.sweep()
        assert (report.trash, report.failed) == (1, 1)
        assert (inside / "precious").read_text() == "kept"
    finally:
        subprocess.run(["umount", inside], check=True)
    bench.sweep()
    assert bench.leftovers() == []


def test_what_lies_beside_the_volumes_is_never_touched(bench):
    root = bench.pool().backend.root()
    (root / "theirs").mkdir()
    fill(root / "theirs")
    (root / "a file").write_text("kept")
    (root / ("a" * 26)).mkdir()
    before = {name: seen(root / name) for name in ("theirs", "a" * 26)}
    bench.sweep()
    assert {name: seen(root / name) for name in before} == before
    assert (root / "a file").read_text() == "kept"


def test_a_pool_that_is_not_there_does_not_keep_the_others_from_being_swept(bench, pools):
    volume = bench.create("v", pool="other")
    bench.volumes.delete(volume.record.handle)
    pools[0].path.rename(bench.root / "unplugged")
    report = bench.sweep()
    assert report.failed >= 1
    assert report.trash == 1
    (bench.root / "unplugged").rename(pools[0].path)


def test_the_files_of_a_killed_writer_are_removed_when_they_are_old(bench):
    volumes = bench.pool().backend.root() / ".csi/volumes"
    for changes in range(1, 100):
        assert not runs_to_its_end(lambda: bench.create("v"), changes)
        if os.listdir(volumes):
            break
    assert [name[:5] for name in os.listdir(volumes)] == [".tmp."]
    bench.sweep()
    assert len(os.listdir(volumes)) == 1, "a young one may be somebody's"
    bench.age_temporaries()
    bench.sweep()
    assert os.listdir(volumes) == []


def test_the_thread_empties_the_trash_as_soon_as_something_is_in_it(bench):
    rounds = []
    bench.domain.sweeper.start(lambda pool, _, report: rounds.append((pool, report)))
    until(lambda: {pool for pool, _ in rounds} == {"", "default", "other", "spread"})
    volume = bench.create("v")
    fill(bench.path(volume))
    bench.volumes.delete(volume.record.handle)
    until(lambda: sum(report.trash for _, report in rounds) == 1, seconds=5)  # told after it was done
    assert bench.leftovers() == []
    bench.domain.sweeper.stop(5)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sweeper")]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_a_round_that_ends_in_what_nobody_foresaw_is_told_and_counted_and_the_next_one_comes(bench, monkeypatch, caplog, error):
    reaper, rounds = bench.domain.sweeper._reaper, []
    empty, errors = reaper.empty, [error]

    def fail_once(store):
        if store.name == "default" and errors:
            raise errors.pop()
        return empty(store)

    monkeypatch.setattr(reaper, "empty", fail_once)
    bench.domain.sweeper.start(lambda pool, _, report: rounds.append((pool, report.failed)))
    until(lambda: ("default", 1) in rounds)
    until(lambda: [record for record in caplog.records if record.exc_info and record.exc_info[1] is error])
    bench.volumes.delete(bench.create("v").record.handle)
    until(lambda: bench.leftovers() == [], seconds=5)
    bench.domain.sweeper.stop(5)


def test_the_thread_disturbs_no_creation_and_no_deletion(bench):
    bench.domain.sweeper.start()
    source = bench.create("source")
    fill(bench.path(source))
    for number in range(15):
        clone = bench.clone(f"c{number}", source)
        snapshot = bench.snapshot(f"s{number}", source)
        assert seen(bench.path(clone)) == seen(bench.path(source))
        bench.volumes.delete(clone.record.handle)
        bench.snapshots.delete(snapshot.record.handle)
        bench.clone(f"c{number}", source)
    bench.domain.sweeper.stop(5)
    bench.restarted().sweep()
    assert bench.leftovers() == []


def test_ids_of_volumes_and_snapshots_never_meet(bench):
    assert bench.pool().id_of(VOLUME, "x") != bench.pool().id_of(SNAPSHOT, "x")


@pytest.mark.root
def test_a_large_tree_is_removed_and_a_stop_in_the_middle_is_taken_up_again(tmp_path, make_disk):
    disk = make_disk("many", size="64M")
    bench = make_bench(tmp_path, (HostPathPool("default", disk / "pool"),))
    volume = bench.create("v")
    for folder in range(30):
        (bench.path(volume) / str(folder)).mkdir()
        for name in range(200):
            (bench.path(volume) / str(folder) / str(name)).touch()
    bench.volumes.delete(volume.record.handle)
    bench.domain.sweeper.start()
    time.sleep(0.01)
    bench.domain.sweeper.stop(5)
    bench.restarted().sweep()
    assert bench.leftovers() == []


# --- parents of templated directories ---------------------------------------------------------------------------------------------


def test_empty_parents_that_the_driver_made_go_and_an_admins_stay(bench):
    root = bench.pool().backend.root()
    (root / "admins").mkdir()
    volumes = [bench.create(f"v{n}", directory=place) for n, place in enumerate(("team/a/one", "team/two", "admins/b/three"))]
    bench.volumes.delete(volumes[0].record.handle)
    bench.volumes.delete(volumes[2].record.handle)
    bench.sweep()
    assert sorted(os.listdir(root / "team")) == ["two"]
    assert os.listdir(root / "admins") == []
    bench.volumes.delete(volumes[1].record.handle)
    bench.sweep()
    assert not (root / "team").exists()
    assert (root / "admins").is_dir()
    assert os.listdir(root / ".csi/parents") == []
    assert bench.create("again", directory="team/a/one").record.directory == "team/a/one"


def test_a_parent_that_an_admin_has_put_in_the_place_of_ours_or_put_something_in_stays(bench):
    root = bench.pool().backend.root()
    volumes = [bench.create(f"v{n}", directory=f"{place}/v") for n, place in enumerate(("replaced", "used"))]
    for volume in volumes:
        bench.volumes.delete(volume.record.handle)
    (root / "replaced").rename(root / "old")
    (root / "replaced").mkdir()
    (root / "used" / "file").write_text("an admin's")
    bench.sweep()
    assert (root / "replaced").is_dir()
    assert (root / "used" / "file").read_text() == "an admin's"


def test_a_volume_that_got_the_place_and_the_inode_of_a_parent_of_ours_stays(bench):
    root = bench.pool().backend.root()
    bench.volumes.delete(bench.create("first", directory="team/first").record.handle)
    mark = next((root / ".csi/parents").iterdir())
    (root / "team").rmdir()  # an admin did it
    volume = bench.create("second", directory="team")
    # What a filesystem does that gives numbers again at once.
    mark.write_text(json.dumps({"directory": "team", "inode": (root / "team").stat().st_ino}))
    bench.sweep()
    assert bench.path(volume).is_dir()
    assert not mark.exists()


def test_a_parent_below_which_somebody_makes_a_volume_is_not_taken_away(bench, monkeypatch):
    bench.volumes.delete(bench.create("first", directory="team/first").record.handle)
    root = bench.pool().backend.root()
    mkdir = os.mkdir

    def sweeping(path, *arguments, **named):
        if path == "second":
            monkeypatch.undo()
            bench.restarted().sweep()
        return mkdir(path, *arguments, **named)

    monkeypatch.setattr(os, "mkdir", sweeping)
    bench.create("second", directory="team/second")
    assert os.listdir(root / "team") == ["second"]
