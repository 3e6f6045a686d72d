"""Creations whose lock another controller has got meanwhile (rivals.py)."""

import pytest
from bench import MIB
from rivals import Slow, lose_all_locks
from trees import fill, seen

from csi_driver.errors import LockLost, NotFound, OperationPending, Unavailable
from csi_driver.linux import files


@pytest.fixture
def source(bench):
    volume = bench.create("source")
    fill(bench.path(volume))
    return volume


@pytest.mark.parametrize("step", ["place", "gate"])
def test_a_clone_whose_lock_was_lost_changes_nothing_of_what_another_has_made(bench, source, monkeypatch, step):
    places = bench.volumes._creation._places
    # "gate": what says ready is on the disk, and only has to be given its name.
    slow = Slow(monkeypatch, places._fence if step == "gate" else places, step, lambda: bench.clone("new", source))
    lose_all_locks(bench)
    other = bench.restarted()
    made = other.clone("new", source)
    (other.path(made) / "tenant's").write_text("later")
    assert isinstance(slow.go_on(), OperationPending | Unavailable)
    assert other.volumes.get(made.record.handle) == made
    assert seen(other.path(made)).keys() == seen(other.path(source)).keys() | {"tenant's"}
    other.sweep()
    assert other.leftovers() == []
    assert bench.clone("new", source) == made


def test_a_clone_whose_lock_was_lost_leaves_what_another_is_making_alone(bench, source, monkeypatch):
    first = Slow(monkeypatch, bench.volumes._creation._places, "place", lambda: bench.clone("new", source))
    lose_all_locks(bench)
    other = bench.restarted()
    second = Slow(monkeypatch, other.volumes._creation._places, "place", lambda: other.clone("new", source))
    assert isinstance(first.go_on(), LockLost)
    made = second.go_on()
    assert seen(other.path(made)) == seen(other.path(source))
    other.sweep()
    assert other.leftovers() == []


def test_a_clone_whose_lock_was_lost_to_nobody_is_made_by_the_retry(bench, source, monkeypatch):
    with monkeypatch.context() as patched:
        slow = Slow(patched, bench.volumes._creation._places, "place", lambda: bench.clone("new", source))
        lose_all_locks(bench)
        assert isinstance(slow.go_on(), LockLost)
    made = bench.clone("new", source)
    assert seen(bench.path(made)) == seen(bench.path(source))
    bench.sweep()
    assert bench.leftovers() == []


def test_a_failed_clone_whose_lock_was_lost_takes_nothing_back_that_is_anothers(bench, source, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bench.volumes._creation._places, "place", fail)
    slow = Slow(monkeypatch, bench.volumes._creation, "_give_up", lambda: bench.clone("new", source))
    lose_all_locks(bench)
    other = bench.restarted()
    made = other.clone("new", source)
    assert isinstance(slow.go_on(), Exception)
    assert other.volumes.get(made.record.handle) == made
    assert seen(other.path(made)) == seen(other.path(source))


def test_a_failed_clone_whose_lock_was_lost_while_it_read_all_records_takes_nothing_back(bench, source, monkeypatch):
    failures, move = iter([OSError(28, "No space left on device")]), files.move_into_place

    def fail_once(*arguments):
        for failure in failures:
            raise failure
        return move(*arguments)

    monkeypatch.setattr(files, "move_into_place", fail_once)
    slow = Slow(monkeypatch, bench.volumes._creation._places, "_may_be_anothers", lambda: bench.clone("new", source))
    lose_all_locks(bench)
    other = bench.restarted()
    made = other.clone("new", source)
    assert isinstance(slow.go_on(), OperationPending | Unavailable)
    assert other.volumes.get(made.record.handle) == made
    assert seen(other.path(made)) == seen(other.path(source))


@pytest.mark.parametrize("step", ["place", "seal"])
def test_a_snapshot_whose_lock_was_lost_changes_nothing_of_what_another_has_cut(bench, source, monkeypatch, step):
    slow = Slow(monkeypatch, bench.snapshots._places, step, lambda: bench.snapshot("s", source))
    lose_all_locks(bench)
    other = bench.restarted()
    made = other.snapshot("s", source)
    assert isinstance(slow.go_on(), OperationPending)
    assert other.snapshots.get(made.record.handle) == made
    other.sweep()
    assert other.leftovers() == []
    assert seen(other.path(other.restore("restored", made, 2 * MIB))) == seen(other.path(source))


def test_a_restore_whose_snapshot_was_deleted_behind_its_back_is_not_made(bench, source, monkeypatch):
    snapshot = bench.snapshot("s", source)
    slow = Slow(monkeypatch, bench.volumes._creation._contents, "copy", lambda: bench.restore("new", snapshot, 2 * MIB))
    lose_all_locks(bench)
    other = bench.restarted()
    other.snapshots.delete(snapshot.record.handle)
    assert isinstance(slow.go_on(), Exception)
    with pytest.raises(NotFound):
        bench.volumes.get(bench.pool().handle_of(bench.pool().id_of("volume", "new")))


def test_a_restore_whose_source_was_given_away_while_it_was_read_is_not_made(bench, source, monkeypatch):
    """All that it read was there, but nobody can know."""
    snapshot = bench.snapshot("s", source)
    copied = bench.volumes._creation._contents.copy

    def copy(*arguments, **keywords):
        report = copied(*arguments, **keywords)
        lose_all_locks(bench)
        return report

    with monkeypatch.context() as patched:
        patched.setattr(bench.volumes._creation._contents, "copy", copy)
        with pytest.raises(LockLost, match="was lost while it was read"):
            bench.restore("new", snapshot, 2 * MIB)
    assert bench.restore("new", snapshot, 2 * MIB)
