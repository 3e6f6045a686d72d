"""Steps that a controller takes too late: it was cut off in their midst, and another has got the lock and gone on meanwhile (rivals.py).

Each stands still with everything asked and decided, before what others will see is written.
"""

import time
from dataclasses import replace

import pytest
from bench import MIB, make_bench, mount_capability
from rivals import Slow, lose_all_locks
from trees import fill, seen

from csi_driver.config import HostPathPool
from csi_driver.errors import LockLost, NotFound, OperationPending, Unavailable
from csi_driver.linux.files import OPEN
from csi_driver.volumes import snapshots
from csi_driver.volumes.jobs import JobControl
from csi_driver.volumes.leftovers import ABANDONED_SECONDS
from csi_driver.volumes.model import AccessMode, NodePublication, OnDelete, Phase
from csi_driver.volumes.requests import CapacityRange, CreateSnapshot

ONE_NODE = AccessMode.SINGLE_NODE_MULTI_WRITER


@pytest.fixture(params=[0, 5], ids=["no limit", "a limit of volumes per node"])
def shared(tmp_path, request):
    pools = (HostPathPool("default", tmp_path / "default", shared=True),)
    return make_bench(tmp_path, pools, max_volumes_per_node=request.param)


@pytest.fixture
def source(bench):
    volume = bench.create("source")
    fill(bench.path(volume))
    return volume


def publish(bench, volume, node):
    return bench.attachments.publish(
        volume.record.handle, NodePublication(node, ONE_NODE, False), mount_capability(ONE_NODE), volume.context
    )


def nodes(bench, volume):
    return [publication.node_id for publication in bench.volumes.get(volume.record.handle).record.published]


def group(bench, name, *volumes):
    return bench.groups.create(name, [volume.record.handle for volume in volumes], time.monotonic() + 60)


def with_digests(bench, volume):
    return bench.snapshots.create(CreateSnapshot("s", volume.record.handle, digests=True), time.monotonic() + 60)


# --- volumes that are there -------------------------------------------------------------------------------------------------------


def test_a_late_publication_does_not_take_the_volume_from_the_node_that_has_it(shared, monkeypatch):
    volume = shared.create("v")
    slow = Slow(monkeypatch, shared.pool().volumes, "replace", lambda: publish(shared, volume, "node-a"))
    lose_all_locks(shared)
    other = shared.restarted()
    assert publish(other, volume, "node-b")["epoch"] == "1"
    assert isinstance(slow.go_on(), LockLost)
    assert nodes(other, volume) == ["node-b"]


@pytest.mark.parametrize("node", ["node-a", ""], ids=["of one node", "of all nodes"])
def test_a_late_end_of_a_publication_leaves_the_next_one_alone(shared, monkeypatch, node):
    volume = shared.create("v")
    publish(shared, volume, "node-a")
    unpublish = shared.attachments.unpublish
    slow = Slow(monkeypatch, shared.pool().volumes, "replace", lambda: unpublish(volume.record.handle, node))
    lose_all_locks(shared)
    other = shared.restarted()
    other.attachments.unpublish(volume.record.handle, "node-a")
    publish(other, volume, "node-b")
    assert isinstance(slow.go_on(), LockLost)
    assert nodes(other, volume) == ["node-b"]


CHANGES = {
    "expand": lambda bench, handle: bench.volumes.expand(handle, CapacityRange(4 * MIB, 0), None),
    "modify": lambda bench, handle: bench.volumes.modify(handle, OnDelete.RETAIN),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_late_change_erases_no_publication(shared, monkeypatch, change):
    volume = shared.create("v")
    slow = Slow(monkeypatch, shared.pool().volumes, "replace", lambda: CHANGES[change](shared, volume.record.handle))
    lose_all_locks(shared)
    other = shared.restarted()
    publish(other, volume, "node-b")
    before = other.volumes.get(volume.record.handle)
    assert isinstance(slow.go_on(), LockLost)
    assert other.volumes.get(volume.record.handle) == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_late_change_brings_no_deleted_volume_back(bench, monkeypatch, change):
    volume = bench.create("v")
    slow = Slow(monkeypatch, bench.pool().volumes, "replace", lambda: CHANGES[change](bench, volume.record.handle))
    lose_all_locks(bench)
    other = bench.restarted()
    other.volumes.delete(volume.record.handle)
    assert isinstance(slow.go_on(), LockLost)
    assert other.pool().volumes.ids() == []
    other.sweep()
    assert other.leftovers() == []


def test_an_expansion_that_was_late_is_made_by_its_retry(bench, monkeypatch):
    volume = bench.create("v")
    with monkeypatch.context() as patched:
        slow = Slow(patched, bench.pool().volumes, "replace", lambda: CHANGES["expand"](bench, volume.record.handle))
        lose_all_locks(bench)
        assert isinstance(slow.go_on(), LockLost)
    assert CHANGES["expand"](bench, volume.record.handle) == 4 * MIB
    assert bench.volumes.get(volume.record.handle).record.capacity_bytes == 4 * MIB


# --- volumes that go --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_delete", "step"), [("archive", "replace"), ("archive", "move"), ("retain", "move"), ("delete", "move")]
)
def test_a_late_deletion_leaves_the_next_volume_of_the_name_alone(bench, monkeypatch, on_delete, step):
    volume = bench.create("v", on_delete=OnDelete(on_delete))
    slow = Slow(monkeypatch, bench.pool().volumes, step, lambda: bench.volumes.delete(volume.record.handle))
    lose_all_locks(bench)
    other = bench.restarted()
    other.volumes.delete(volume.record.handle)
    made = other.create("v", on_delete=OnDelete(on_delete))
    assert isinstance(slow.go_on(), LockLost)
    assert other.volumes.get(made.record.handle) == made
    assert other.path(made).is_dir()
    other.sweep()
    assert other.leftovers() == []


def test_data_that_follows_its_record_too_late_is_not_taken_from_the_next_volume_there(bench, monkeypatch):
    volume = bench.create("v", directory="team/data")
    fill(bench.path(volume))
    slow = Slow(monkeypatch, bench.volumes._removal._limits, "release", lambda: bench.volumes.delete(volume.record.handle))
    lose_all_locks(bench)
    other = bench.restarted()
    other.volumes.delete(volume.record.handle)
    made = other.create("another", directory="team/data")
    (other.path(made) / "tenant's").write_text("later")
    assert isinstance(slow.go_on(), LockLost)
    other.sweep()
    assert seen(other.path(made)).keys() >= {"tenant's"}
    assert other.leftovers() == []


# --- volumes in the making --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["empty", "templated", "clone"])
def test_a_late_record_of_a_creation_brings_no_deleted_volume_back(bench, source, monkeypatch, kind):
    make = {
        "empty": lambda bench: bench.create("new"),
        "templated": lambda bench: bench.create("new", directory="team/new"),
        "clone": lambda bench: bench.clone("new", source),
    }[kind]
    slow = Slow(monkeypatch, bench.pool().volumes, "add", lambda: make(bench))
    lose_all_locks(bench)
    other = bench.restarted()
    other.volumes.delete(make(other).record.handle)
    assert isinstance(slow.go_on(), LockLost)
    assert other.pool().volumes.ids() == [source.record.id]
    other.sweep()
    assert other.leftovers("team") == []


def test_a_late_claim_leaves_a_volume_that_is_in_use_ready(bench, source, monkeypatch):
    slow = Slow(monkeypatch, bench.pool().volumes, "replace", lambda: bench.clone("new", source))
    lose_all_locks(bench)
    other = bench.restarted()
    made = other.clone("new", source)
    (other.path(made) / "tenant's").write_text("later")
    assert isinstance(slow.go_on(), OperationPending | Unavailable)
    assert other.volumes.get(made.record.handle) == made
    assert bench.clone("new", source) == made
    assert seen(other.path(made)).keys() == seen(other.path(source)).keys() | {"tenant's"}
    other.sweep()
    assert other.leftovers() == []


def cut_off(bench, source, kind):
    """Leave a creation as a kill in the midst of its copy does."""
    if kind == "clone":
        made = bench.clone("new", source).record
        bench.pool().volumes.replace(replace(made, phase=Phase.CREATING, claimed=False, content_inode=None), OPEN)
        place = bench.pool().path_of(made.directory)
    else:
        made = bench.snapshot("new", source).record
        bench.pool().snapshots.replace(replace(made, phase=Phase.CREATING), OPEN)
        place = bench.pool().backend.root() / f".csi/snapshots-data/{made.id}"
    place.rename(bench.pool().backend.root() / f".csi/trash/{made.id}.0123456789abcdef")


@pytest.mark.parametrize("kind", ["clone", "snapshot"])
def test_a_late_take_over_takes_nothing_from_who_was_sooner(bench, source, monkeypatch, kind):
    cut_off(bench, source, kind)
    records = bench.pool().volumes if kind == "clone" else bench.pool().snapshots

    def make(bench):
        return bench.clone("new", source) if kind == "clone" else bench.snapshot("new", source)

    slow = Slow(monkeypatch, records, "replace", lambda: make(bench))
    lose_all_locks(bench)
    other = bench.restarted()
    made = make(other)
    assert isinstance(slow.go_on(), LockLost)
    assert records.get(made.record.id) == made.record
    assert make(bench) == made


# --- snapshots --------------------------------------------------------------------------------------------------------------------


def test_a_late_record_of_a_snapshot_changes_nothing_of_what_another_has_cut(bench, source, monkeypatch):
    slow = Slow(monkeypatch, bench.pool().snapshots, "replace", lambda: bench.snapshot("s", source))
    lose_all_locks(bench)
    other = bench.restarted()
    made = other.snapshot("s", source)
    assert isinstance(slow.go_on(), LockLost)
    assert other.snapshots.get(made.record.handle) == made
    assert seen(other.path(other.restore("restored", made))) == seen(other.path(source))


def test_a_late_record_of_a_snapshot_brings_no_deleted_one_back(bench, source, monkeypatch):
    slow = Slow(monkeypatch, bench.pool().snapshots, "add", lambda: bench.snapshot("s", source))
    lose_all_locks(bench)
    other = bench.restarted()
    other.snapshots.delete(other.snapshot("s", source).record.handle)
    assert isinstance(slow.go_on(), LockLost)
    assert other.pool().snapshots.ids() == []


@pytest.mark.parametrize("step", ["manifest", "record"])
def test_digests_that_come_too_late_leave_a_snapshot_ready_and_its_data_where_it_is(bench, source, monkeypatch, step):
    if step == "manifest":
        slow = Slow(monkeypatch, bench.snapshots._verifier, "_keep", lambda: with_digests(bench, source))
    else:
        has_digests = lambda record, *_: record.manifest is not None  # noqa: E731
        slow = Slow(monkeypatch, bench.pool().snapshots, "replace", lambda: with_digests(bench, source), has_digests)
    lose_all_locks(bench)
    other = bench.restarted()
    made = with_digests(other, source)
    manifest = other.pool().backend.root() / f".csi/manifests/{made.record.id}"
    before = manifest.stat().st_ino
    assert isinstance(slow.go_on(), LockLost)
    assert other.snapshots.get(made.record.handle) == made
    if step == "manifest":
        assert manifest.stat().st_ino == before
    assert other.domain.verifier.verify(made.record.handle, JobControl("look")).whole
    assert seen(other.path(other.restore("restored", made))) == seen(other.path(source))


def test_digests_of_a_verification_bring_no_deleted_snapshot_back(bench, source, monkeypatch):
    made = bench.snapshot("s", source)
    verify = bench.domain.verifier.verify
    slow = Slow(monkeypatch, bench.pool().snapshots, "replace", lambda: verify(made.record.handle, JobControl("look")))
    lose_all_locks(bench)
    other = bench.restarted()
    other.snapshots.delete(made.record.handle)
    assert isinstance(slow.go_on(), LockLost)
    assert other.pool().snapshots.ids() == []


def test_whoever_completes_a_snapshot_that_is_cut_makes_it_his(bench, source):
    """The one who cut it may still read it, for its digests."""
    made = bench.snapshot("s", source)
    bench.pool().snapshots.replace(replace(made.record, phase=Phase.CREATING), OPEN)
    again = bench.restarted().snapshot("s", source).record
    assert again == replace(made.record, token=again.token)
    assert again.token != made.record.token


def test_a_failed_snapshot_that_is_given_up_too_late_is_not_taken_from_who_made_it(bench, source, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench.snapshots._places, "place", fail)
    with monkeypatch.context() as patched:  # of all controllers, until the first stands still there
        slow = Slow(patched, snapshots, "trash_staging", lambda: bench.snapshot("s", source))
    lose_all_locks(bench)
    other = bench.restarted()
    made = other.snapshot("s", source)
    assert isinstance(slow.go_on(), Exception)
    assert other.pool().snapshots.get(made.record.id) == made.record


# --- groups -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["add", "replace"])
def test_a_late_group_is_not_there_again_once_it_was_deleted(bench, source, monkeypatch, step):
    slow = Slow(monkeypatch, bench.pool().groups, step, lambda: group(bench, "g", source))
    lose_all_locks(bench)
    other = bench.restarted()
    other.groups.delete(group(other, "g", source).record.handle, [])
    assert isinstance(slow.go_on(), LockLost)
    assert other.pool().groups.ids() == []
    assert other.pool().snapshots.ids() == []


def test_a_late_deletion_leaves_the_next_group_of_the_name_alone(bench, source, monkeypatch):
    handle = group(bench, "g", source).record.handle
    slow = Slow(monkeypatch, bench.pool().groups, "move", lambda: bench.groups.delete(handle, []))
    lose_all_locks(bench)
    other = bench.restarted()
    other.groups.delete(handle, [])
    made = group(other, "g", source)
    assert isinstance(slow.go_on(), LockLost)
    assert other.groups.get(handle, []) == made


def test_a_late_deletion_leaves_the_next_snapshot_of_the_name_alone(bench, source, monkeypatch):
    handle = bench.snapshot("s", source).record.handle
    slow = Slow(monkeypatch, bench.pool().snapshots, "move", lambda: bench.snapshots.delete(handle))
    lose_all_locks(bench)
    other = bench.restarted()
    other.snapshots.delete(handle)
    made = other.snapshot("s", source)
    assert isinstance(slow.go_on(), LockLost)
    assert other.snapshots.get(handle) == made
    assert seen(other.path(other.restore("restored", made))) == seen(other.path(source))


# --- what the sweeper makes of it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_whole", [True, False])
def test_the_sweeper_keeps_a_snapshot_that_is_whole_and_takes_back_one_that_is_not(bench, source, is_whole):
    """`creating` may be what somebody wrote too late: of what is whole, others may have been told that it is ready."""
    made = bench.snapshot("s", source)
    long_ago = int((time.time() - ABANDONED_SECONDS - 60) * 1e9)
    bench.pool().snapshots.replace(replace(made.record, phase=Phase.CREATING, created_at_ns=long_ago), OPEN)
    place = bench.pool().backend.root() / f".csi/snapshots-data/{made.record.id}"
    if not is_whole:
        place.rename(place.parent.parent / f"trash/{made.record.id}.0123456789abcdef")
    with pytest.raises(NotFound):
        bench.snapshots.get(made.record.handle)
    assert bench.restarted().sweep().creations_abandoned == 1
    if is_whole:
        assert seen(bench.path(bench.restore("restored", made))) == seen(bench.path(source))
    else:
        assert bench.pool().snapshots.ids() == []
    assert bench.leftovers() == []
