"""Every operation, killed before every single change that it makes, and then asked for again by a new process.

The heart of the promise: after the retry the result is whole, what was ready before is what it was, and nothing is left on disk that no
record names.
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bench import MIB, Bench, make_bench, unmount_below
from crash import every_crash, runs_to_its_end
from trees import fill, seen

from csi_driver.config import HostPathPool
from csi_driver.errors import InvalidArgument, NotFound, OperationPending
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes import leftovers
from csi_driver.volumes.model import AccessMode, NodePublication, OnDelete, Ownership
from csi_driver.volumes.parameters import EPHEMERAL
from csi_driver.volumes.requests import CapacityRange, Page

pytestmark = pytest.mark.root


@dataclass(frozen=True)
class Story:
    """What is there before, what is done, and how it must look when it was done."""

    prepare: Callable[[Bench], Any]
    act: Callable[[Bench, Any], Any]
    check: Callable[[Bench, Any, Any], None]
    parents: tuple[str, ...] = ()  # directories above templated ones: they stay, for they may have been there before


def a_filled_volume(bench: Bench, name: str = "source", **parameters: Any) -> Any:
    volume = bench.create(name, **parameters)
    fill(bench.path(volume))
    return volume


def a_snapshot(bench: Bench) -> Any:
    source = a_filled_volume(bench)
    return source, bench.snapshot("snapshot", source)


def two_filled_volumes(bench: Bench) -> list[Any]:
    return [a_filled_volume(bench, "one"), a_filled_volume(bench, "two")]


def is_empty_with(mode: int) -> Callable[[Bench, Any, Any], None]:
    def check(bench: Bench, _given: Any, volume: Any) -> None:
        top = bench.path(volume)
        assert list(top.iterdir()) == []
        assert top.stat().st_mode & 0o7777 == mode
        assert bench.volumes.get(volume.record.handle) == volume

    return check


def is_a_copy_of_the_source(bench: Bench, given: Any, volume: Any) -> None:
    source = given[0] if isinstance(given, tuple) else given
    assert seen(bench.path(volume)) == seen(bench.path(source))
    assert bench.volumes.get(volume.record.handle) == volume


def snapshot_path(bench: Bench, snapshot: Any) -> Path:
    return bench.pool(snapshot.record.pool).backend.root() / ".csi/snapshots-data" / snapshot.record.id


def snapshot_is_whole(bench: Bench, source: Any, snapshot: Any) -> None:
    assert bench.snapshots.get(snapshot.record.handle) == snapshot
    assert seen(snapshot_path(bench, snapshot)) == seen(bench.path(source))


def group_is_whole(bench: Bench, sources: list[Any], group: Any) -> None:
    assert [member.record.source_handle for member in group.members] == sorted(source.record.handle for source in sources)
    by_handle = {source.record.handle: source for source in sources}
    for member in group.members:
        snapshot_is_whole(bench, by_handle[member.record.source_handle], member)


def is_gone(bench: Bench, volume: Any, _result: None) -> None:
    with pytest.raises(NotFound):
        bench.volumes.get(volume.record.handle)
    assert not bench.path(volume).exists()
    assert bench.create(volume.record.name, size=2 * MIB).record.capacity_bytes == 2 * MIB


def is_kept(where: Callable[[Bench, Any], Path]) -> Callable[[Bench, Any, None], None]:
    def check(bench: Bench, volume: Any, _result: None) -> None:
        with pytest.raises(NotFound):
            bench.volumes.get(volume.record.handle)
        assert (where(bench, volume) / "plain").read_text() == "content"
        namesake = bench.create(volume.record.name, size=2 * MIB)
        assert list(bench.path(namesake).iterdir()) == []
        assert (where(bench, volume) / "plain").read_text() == "content"

    return check


def archived_place(bench: Bench, volume: Any) -> Path:
    (place,) = (bench.pool().backend.root() / "archived").iterdir()
    assert place.name.startswith(volume.record.directory + ".")
    return place


def in_a_pod(bench: Bench, given: Any, pod: str = "pod") -> None:
    (bench.kubelet / "pods" / pod / "mount" / "written").write_text("by the pod")
    assert (bench.path(given) / "written").read_text() == "by the pod"


def inline(bench: Bench, _given: Any = None) -> Path:
    return bench.publish("csi-inline", "pod", volume_context={EPHEMERAL: "true", "size": "1Mi"})


def inline_shows(bench: Bench, _given: Any, target: Path) -> None:
    (target / "written").write_text("by the pod")
    assert target.stat().st_mode & 0o7777 == 0o777
    bench.node.unpublish("csi-inline", str(target))
    assert not target.exists()


def prepared_inline(bench: Bench) -> Path:
    target = inline(bench)
    fill(target)
    return target


def staged(bench: Bench) -> Any:
    volume = a_filled_volume(bench)
    bench.stage(volume.record.handle)
    return volume


def published(bench: Bench) -> Any:
    volume = staged(bench)
    bench.publish(volume.record.handle, "pod")
    return volume


def two_in_a_group(bench: Bench) -> tuple[list[Any], Any]:
    sources = two_filled_volumes(bench)
    return sources, bench.groups.create("group", [s.record.handle for s in sources], time.monotonic() + 60)


def group_is_gone(bench: Bench, given: Any, _result: None) -> None:
    _, group = given
    with pytest.raises(NotFound):
        bench.groups.get(group.record.handle, [])
    assert bench.snapshots.list(Page(), "", "") == ([], "")


def snapshot_is_gone(bench: Bench, given: Any, _result: None) -> None:
    with pytest.raises(NotFound):
        bench.snapshots.get(given[1].record.handle)
    again = bench.snapshot("snapshot", given[0])
    snapshot_is_whole(bench, given[0], again)


def attached(bench: Bench, volume: Any, context: Any) -> None:
    record = bench.volumes.get(volume.record.handle).record
    assert [publication.node_id for publication in record.published] == ["node-1"]
    assert context == {"directory": record.directory, "layout": "directory", "epoch": "1"}
    bench.attachments.unpublish(volume.record.handle, "node-1")


def attach(bench: Bench, volume: Any) -> Any:
    request = bench.request("x").capabilities[0]
    return bench.attachments.publish(
        volume.record.handle, NodePublication("node-1", AccessMode.SINGLE_NODE_MULTI_WRITER), request, {}
    )


STORIES = {
    "create": Story(lambda _: None, lambda b, _: b.create("new"), is_empty_with(0o755)),
    "create with an owner": Story(
        lambda _: None, lambda b, _: b.create("new", ownership=Ownership(1000, 1000, 0o2770)), is_empty_with(0o2770)
    ),
    "create at a template": Story(
        lambda _: None, lambda b, _: b.create("new", directory="team/app/data"), is_empty_with(0o755), parents=("team",)
    ),
    "clone": Story(a_filled_volume, lambda b, source: b.clone("clone", source), is_a_copy_of_the_source),
    "restore": Story(a_snapshot, lambda b, given: b.restore("restored", given[1]), is_a_copy_of_the_source),
    "clone to a template": Story(
        a_filled_volume,
        lambda b, source: b.volumes.create(
            b.request("clone", source=b.volume_source(source), directory="team/clone"), time.monotonic() + 60
        ),
        is_a_copy_of_the_source,
        parents=("team",),
    ),
    "snapshot": Story(a_filled_volume, lambda b, source: b.snapshot("snapshot", source), snapshot_is_whole),
    "group snapshot": Story(
        two_filled_volumes,
        lambda b, sources: b.groups.create("group", [s.record.handle for s in sources], time.monotonic() + 60),
        group_is_whole,
    ),
    "delete": Story(a_filled_volume, lambda b, volume: b.volumes.delete(volume.record.handle), is_gone),
    "delete at a template": Story(
        lambda b: a_filled_volume(b, directory="team/data"),
        lambda b, volume: b.volumes.delete(volume.record.handle),
        is_gone,
        parents=("team",),
    ),
    "delete and retain": Story(
        lambda b: a_filled_volume(b, on_delete=OnDelete.RETAIN),
        lambda b, volume: b.volumes.delete(volume.record.handle),
        is_kept(lambda b, volume: b.path(volume)),
    ),
    "delete and archive": Story(
        lambda b: a_filled_volume(b, on_delete=OnDelete.ARCHIVE),
        lambda b, volume: b.volumes.delete(volume.record.handle),
        is_kept(archived_place),
    ),
    "delete a snapshot": Story(a_snapshot, lambda b, given: b.snapshots.delete(given[1].record.handle), snapshot_is_gone),
    "delete a group": Story(two_in_a_group, lambda b, given: b.groups.delete(given[1].record.handle, []), group_is_gone),
    "expand": Story(
        a_filled_volume,
        lambda b, volume: b.volumes.expand(volume.record.handle, CapacityRange(3 * MIB), None),
        lambda b, volume, size: _equal(size, b.volumes.get(volume.record.handle).record.capacity_bytes, 3 * MIB),
    ),
    "modify": Story(
        a_filled_volume,
        lambda b, volume: b.volumes.modify(volume.record.handle, OnDelete.RETAIN),
        lambda b, volume, _: _equal(b.volumes.get(volume.record.handle).record.on_delete, OnDelete.RETAIN),
    ),
    "attach": Story(a_filled_volume, attach, attached),
    "stage": Story(
        a_filled_volume,
        lambda b, volume: b.stage(volume.record.handle),
        lambda b, volume, staging: _equal(seen(Path(staging)), seen(b.path(volume))),
    ),
    "publish": Story(
        staged, lambda b, volume: b.publish(volume.record.handle, "pod"), lambda b, volume, _: in_a_pod(b, volume)
    ),
    "unpublish": Story(
        published,
        lambda b, volume: b.node.unpublish(volume.record.handle, b.target("pod")),
        lambda b, _volume, _: _equal(Path(b.target("pod")).exists(), False),
    ),
    "unstage": Story(
        staged,
        lambda b, volume: b.node.unstage(volume.record.handle, b.staging_of(volume.record.handle)),
        lambda b, volume, _: _equal(
            topmost_mount_at(b.staging_of(volume.record.handle)), b.domain.state.get(volume.record.handle)
        ),
    ),
    "publish inline": Story(lambda _: None, inline, inline_shows),
    "unpublish inline": Story(
        prepared_inline,
        lambda b, target: b.node.unpublish("csi-inline", str(target)),
        lambda b, target, _: _equal(target.exists(), any(record.ephemeral for record in b.pool().volumes.readable()), False),
    ),
}


def _equal(*values: object) -> None:
    assert all(value == values[0] for value in values), values


def everything_ready(bench: Bench) -> dict[str, object]:
    """What the driver shows as finished, with all that is in it."""
    volumes, _ = bench.volumes.list(Page())
    snapshots, _ = bench.snapshots.list(Page(), "", "")
    return {v.record.handle: (v.record, seen(bench.path(v))) for v in volumes} | {
        s.record.handle: (s.record, seen(snapshot_path(bench, s))) for s in snapshots
    }


@pytest.fixture
def new_bench(tmp_path: Path, make_disk):
    """Makes a bench in a place of its own, again and again, on a disk that syncs quickly."""
    disk = make_disk("crashes", size="256M")
    number = itertools.count()

    def make() -> Bench:
        place = disk / str(next(number))
        place.mkdir()
        bench = make_bench(
            place, (HostPathPool("default", place / "pool", inline=True), HostPathPool("other", place / "other"))
        )
        fill(bench.path(bench.create("bystander")))
        return bench

    yield make
    unmount_below(disk)


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_a_retry_after_a_kill_at_any_step_completes_what_was_cut_off(new_bench, story):
    bench, given, before = None, None, {}

    def start(_change: int) -> Callable[[], object]:
        nonlocal bench, given, before
        bench = new_bench()
        given = story.prepare(bench)
        before = everything_ready(bench)
        fresh = bench.restarted()
        return lambda: story.act(fresh, given)

    for change in every_crash(start):
        after = bench.restarted()
        shown = everything_ready(after)
        bystander = next(handle for handle, (record, _) in before.items() if record.name == "bystander")
        assert shown[bystander] == before[bystander], change

        result = story.act(after, given)
        again = everything_ready(after)
        story.check(after, given, result)
        for handle, thing in shown.items():
            if handle in again and handle not in before:
                assert again[handle] == thing, f"change {change}: a thing that was ready is another now"
        after.age_temporaries()
        after.restarted().sweep()
        assert after.leftovers(*story.parents) == [], change
        unmount_below(bench.root)


@pytest.mark.parametrize(
    "name", [name for name in STORIES if name.split()[0] in ("create", "clone", "restore", "snapshot", "group")]
)
def test_of_a_creation_that_is_killed_and_never_asked_for_again_nothing_half_made_is_left(new_bench, name, monkeypatch):
    """A snapshot that was whole by then is shown and kept: somebody may have been told that it is ready."""
    monkeypatch.setattr(leftovers, "ABANDONED_SECONDS", -1.0)
    story = STORIES[name]
    bench, given, before = None, None, {}

    def start(_change: int) -> Callable[[], object]:
        nonlocal bench, given, before
        bench = new_bench()
        given = story.prepare(bench)
        before = everything_ready(bench)
        fresh = bench.restarted()
        return lambda: story.act(fresh, given)

    for change in every_crash(start):
        after = bench.restarted()
        shown = everything_ready(after)
        after.age_temporaries()
        after.restarted().sweep()
        assert everything_ready(after).items() >= before.items(), change
        if "group" not in name:
            kept = {handle: thing for handle, thing in everything_ready(after).items() if shown.get(handle) != thing}
            for record, content in kept.values():
                assert (name, content) == ("snapshot", seen(bench.path(given))), change
                assert record.handle not in shown, change
        phases = [
            record.phase
            for folder in (after.pool().volumes, after.pool().snapshots, after.pool().groups)
            for record in folder.readable()
        ]
        assert set(phases) == {"ready"}, change
        assert after.leftovers(*story.parents) == [], change


@pytest.mark.parametrize("on_delete", OnDelete)
def test_a_deletion_that_was_killed_never_takes_what_has_its_directory_now(new_bench, on_delete):
    bench = volume = None

    def start(_change: int) -> Callable[[], object]:
        nonlocal bench, volume
        bench = new_bench()
        volume = a_filled_volume(bench, directory="team/data", on_delete=on_delete)
        fresh = bench.restarted()
        return lambda: fresh.volumes.delete(volume.record.handle)

    refused = taken = 0
    for change in every_crash(start):
        after = bench.restarted()
        try:
            successor = after.create("successor", directory="team/data")
        except (InvalidArgument, OperationPending):  # it is there as ever, or on its way out
            refused += 1
            assert (after.path(volume) / "plain").read_text() == "content", change
            after.volumes.delete(volume.record.handle)
            continue
        taken += 1
        if change % 2:
            (after.path(successor) / "precious").write_text("kept")
        whole = seen(after.path(successor))
        after.volumes.delete(volume.record.handle)
        for _ in range(2):
            after.restarted().sweep()
        assert seen(after.path(successor)) == whole, change
        with pytest.raises(NotFound):
            after.volumes.get(volume.record.handle)
    assert refused
    assert taken or on_delete is OnDelete.RETAIN


def test_a_creation_that_was_killed_never_takes_or_removes_what_has_its_directory_now(new_bench, monkeypatch):
    monkeypatch.setattr(leftovers, "ABANDONED_SECONDS", -1.0)
    bench = None

    def start(_change: int) -> Callable[[], object]:
        nonlocal bench
        bench = new_bench()
        fresh = bench.restarted()
        return lambda: fresh.create("first", directory="team/data")

    for change in every_crash(start):
        after = bench.restarted()
        try:
            second = after.create("second", directory="team/data")  # stays empty: nothing but its record tells whose it is
        except InvalidArgument:
            second = None  # the first one's claim
        inode = None if second is None else after.path(second).stat().st_ino
        if second is not None:
            with pytest.raises(InvalidArgument, match="exists already"):
                after.create("first", directory="team/data")
        if change % 2:
            after.restarted().sweep()
        else:
            after.volumes.delete(after.pool().handle_of(after.pool().id_of("volume", "first")))
        if second is not None:
            assert after.path(second).stat().st_ino == inode, change
            assert after.volumes.get(second.record.handle) == second


@pytest.mark.minutes
@pytest.mark.parametrize(
    "name", ["create at a template", "delete at a template", "snapshot", "delete and archive", "publish inline"]
)
def test_a_retry_that_is_killed_too_is_completed_by_the_next(new_bench, name):
    story = STORIES[name]
    first_done, first = False, 0
    while not first_done:
        first += 1
        for second in itertools.count(1):
            bench = new_bench()
            given = story.prepare(bench)
            killed, retrying, after = bench.restarted(), bench.restarted(), bench.restarted()
            first_done = runs_to_its_end(lambda killed=killed, given=given: story.act(killed, given), first)
            second_done = runs_to_its_end(lambda retrying=retrying, given=given: story.act(retrying, given), second)
            story.check(after, given, story.act(after, given))
            after.age_temporaries()
            after.restarted().sweep()
            assert after.leftovers(*story.parents) == [], (first, second)
            unmount_below(bench.root)
            if second_done:
                break


def test_no_volume_is_made_inside_one_whose_deletion_was_killed_before_its_data_had_gone(new_bench):
    bench = volume = None

    def start(_change: int) -> Callable[[], object]:
        nonlocal bench, volume
        bench = new_bench()
        volume = a_filled_volume(bench, directory="team/data")
        fresh = bench.restarted()
        return lambda: fresh.volumes.delete(volume.record.handle)

    refused = 0
    for change in every_crash(start):
        after = bench.restarted()
        if after.path(volume).exists():
            refused += 1
            with pytest.raises(InvalidArgument, match="would lie inside"):
                after.create("inside", directory="team/data/sub")
            with pytest.raises(InvalidArgument, match="overlaps"):
                after.stage("static", volume_context={"pool": "default", "directory": "team/data"})
            after.volumes.delete(volume.record.handle)
        inside = after.create("inside", directory="team/data/sub")
        fill(after.path(inside))
        whole = seen(after.path(inside))
        after.restarted().sweep()
        assert seen(after.path(inside)) == whole, change
    assert refused >= 2


def test_a_deletion_that_was_killed_never_takes_a_directory_that_was_made_in_its_place(new_bench):
    """Somebody has removed the data by hand before the deletion was completed; an inode's number may be given again, then, too."""
    bench = volume = None

    def start(_change: int) -> Callable[[], object]:
        nonlocal bench, volume
        bench = new_bench()
        volume = a_filled_volume(bench, directory="team/data")
        fresh = bench.restarted()
        return lambda: fresh.volumes.delete(volume.record.handle)

    cut_off = 0
    for change in every_crash(start):
        after = bench.restarted()
        record = next((after.pool().backend.root() / ".csi/trash").glob("*.volume.json"), None)
        if record is None:
            continue
        cut_off += 1
        if after.path(volume).exists():
            shutil.rmtree(after.path(volume))
        successor = after.create("successor", directory="team/data")
        if cut_off % 2:
            body = json.loads(record.read_text()) | {"content_inode": successor.record.content_inode}
            record.write_text(json.dumps(body))
        after.restarted().sweep()
        after.volumes.delete(volume.record.handle)
        assert after.path(successor).stat().st_ino == successor.record.content_inode, change
        assert after.volumes.get(successor.record.handle) == successor
        after.restarted().sweep()
        assert after.leftovers("team") == [], change
    assert cut_off >= 2


def put_in_place_in_part(bench: Bench, sources: list[Any]) -> None:
    """Leave a group as a kill between its two members does."""
    killed = bench.restarted()
    place, calls = killed.snapshots.place, itertools.count(1)
    killed.snapshots.place = lambda *arguments: os._exit(9) if next(calls) == 2 else place(*arguments)
    assert not runs_to_its_end(lambda: STORIES["group snapshot"].act(killed, sources), 10**9)
    assert len(list((bench.pool().backend.root() / ".csi/snapshots-data").iterdir())) == 1


@pytest.mark.parametrize("prepare", [lambda *_: None, put_in_place_in_part], ids=["first attempt", "retry"])
def test_the_members_of_a_group_that_was_killed_are_all_of_before_or_all_of_its_retry(new_bench, prepare):
    bench = sources = None

    def start(_change: int) -> Callable[[], object]:
        nonlocal bench, sources
        bench = new_bench()
        sources = two_filled_volumes(bench)
        prepare(bench, sources)
        fresh = bench.restarted()
        return lambda: STORIES["group snapshot"].act(fresh, sources)

    outcomes = set()
    for change in every_crash(start):
        after = bench.restarted()
        for source in sources:
            (after.path(source) / "plain").write_text("changed since")
        retried_at = time.time_ns()
        group = STORIES["group snapshot"].act(after, sources)
        found = {
            (member.record.created_at_ns >= retried_at, (snapshot_path(after, member) / "plain").read_text())
            for member in group.members
        }
        assert len(found) == 1, (change, found)
        assert group.record.created_at_ns == min(member.record.created_at_ns for member in group.members), change
        outcomes |= found
        after.age_temporaries()
        after.restarted().sweep()
        assert after.groups.get(group.record.handle, []) == group, change
        assert after.leftovers() == [], change
        unmount_below(bench.root)
    assert outcomes == {(False, "content"), (True, "changed since")}


@pytest.mark.parametrize("kind", ["snapshot", "group"])
def test_a_new_snapshot_never_shows_what_one_of_its_name_held_whose_deletion_was_killed(new_bench, kind):
    bench = given = None

    def start(_change: int) -> Callable[[], object]:
        nonlocal bench, given
        bench = new_bench()
        given = a_snapshot(bench) if kind == "snapshot" else two_in_a_group(bench)
        fresh = bench.restarted()
        delete = fresh.snapshots.delete if kind == "snapshot" else (lambda handle: fresh.groups.delete(handle, []))
        return lambda: delete(given[1].record.handle)

    anew = 0
    for change in every_crash(start):
        after = bench.restarted()
        if kind == "snapshot":
            (after.path(given[0]) / "plain").write_text("changed since")
            again = after.snapshot("snapshot", given[0])
            cut_anew = again != given[1]
            if cut_anew:
                snapshot_is_whole(after, given[0], again)
        else:
            for source in given[0]:
                (after.path(source) / "plain").write_text("changed since")
            again = after.groups.create("group", [source.record.handle for source in given[0]], time.monotonic() + 60)
            cut_anew = again != given[1]
            if cut_anew:
                group_is_whole(after, given[0], again)
        anew += cut_anew
        after.restarted().sweep()
        assert after.leftovers() == [], change
        if kind == "snapshot":
            assert after.snapshots.get(again.record.handle) == again, change
        else:
            assert after.groups.get(again.record.handle, []) == again, change
    assert anew >= 2
