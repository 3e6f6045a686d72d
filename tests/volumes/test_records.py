import json
import os
import shutil
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
from crash import runs_to_its_end

from csi_driver.errors import LockLost, RecordDamaged, Unavailable
from csi_driver.linux.files import OPEN
from csi_driver.volumes.model import Phase, VolumeRecord
from csi_driver.volumes.records import RecordFolder

IDS = [letter * 26 for letter in "abc"]


def record(record_id: str = IDS[0], **changes) -> VolumeRecord:
    known = VolumeRecord(record_id, f"p.{record_id}", "name", "driver", "p", "token", Phase.READY, 1, record_id, 1)
    return replace(known, **changes)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "records").mkdir()
    return tmp_path / "records"


@pytest.fixture
def folder(place):
    @contextmanager
    def opened():
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            raise Unavailable("no pool") from None
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    return RecordFolder(VolumeRecord, "p:.csi/volumes", opened)


def test_what_was_added_is_found_and_what_was_not_is_none(folder):
    assert folder.get(IDS[0]) is None
    assert folder.add(record())
    assert folder.get(IDS[0]) == record()
    assert folder.get(IDS[1]) is None


def test_only_the_first_of_two_makers_adds_a_record(folder):
    assert folder.add(record(token="first"))
    assert not folder.add(record(token="second"))
    assert folder.get(IDS[0]).token == "first"


def test_of_many_who_add_at_once_exactly_one_does(folder, place):
    start = threading.Barrier(8)
    added = []

    def add(token):
        start.wait()
        if folder.add(record(token=token)):
            added.append(token)

    threads = [threading.Thread(target=add, args=(f"token-{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert added == [folder.get(IDS[0]).token]
    assert os.listdir(place) == [f"{IDS[0]}.json"]


def test_an_add_whose_reply_was_lost_is_recognised_by_its_token(folder):
    assert folder.add(record(token="mine"))
    assert folder.add(record(token="mine"))  # as the file system client does it again


def test_an_add_over_a_damaged_record_tells_of_the_damage_and_leaves_it(folder, place):
    (place / f"{IDS[0]}.json").write_bytes(b"{")
    with pytest.raises(RecordDamaged):
        folder.add(record())
    assert (place / f"{IDS[0]}.json").read_bytes() == b"{"
    assert os.listdir(place) == [f"{IDS[0]}.json"]


def test_a_record_that_is_replaced_is_never_half_there(folder, place):
    folder.add(record())
    stop = threading.Event()
    seen = set()

    def read():
        while not stop.is_set():
            seen.add(folder.get(IDS[0]).name)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(300):
        folder.replace(record(name=f"{number} " * 2000), OPEN)
    stop.set()
    reader.join()
    assert None not in seen
    assert os.listdir(place) == [f"{IDS[0]}.json"]


def test_a_writer_that_is_killed_leaves_the_old_record_or_the_new(folder):
    for change in range(1, 10):
        folder.replace(record(name="old"), OPEN)
        done = runs_to_its_end(lambda: folder.replace(record(name="new"), OPEN), change)
        assert folder.get(IDS[0]).name == ("new" if done else "old")
        assert folder.ids() == [IDS[0]]
        if done:
            return
    raise AssertionError("never done")


def test_a_gate_is_asked_when_only_the_name_is_missing(folder, place):
    folder.add(record(name="old"))
    seen = []

    @contextmanager
    def gate():
        seen.extend(sorted(path.read_text() for path in place.iterdir()))
        raise LockLost("too late")
        yield

    for act in (lambda: folder.replace(record(name="new"), gate()), lambda: folder.add(record(IDS[1], name="new"), gate())):
        seen.clear()
        with pytest.raises(LockLost):
            act()
        assert len(seen) == 2
        assert '"new"' in "".join(seen)
        assert folder.ids() == [IDS[0]]
        assert folder.get(IDS[0]).name == "old"
        assert os.listdir(place) == [f"{IDS[0]}.json"]


def test_a_record_is_moved_within_its_gate(folder, place):
    folder.add(record())
    target = os.open(place, os.O_RDONLY)

    @contextmanager
    def gate():
        raise LockLost("too late")
        yield

    with pytest.raises(LockLost):
        folder.move(IDS[0], target, "moved.json", gate())
    os.close(target)
    assert os.listdir(place) == [f"{IDS[0]}.json"]


def test_a_record_on_disk_is_for_root_alone(folder, place):
    folder.add(record())
    folder.add(record(IDS[1]))
    folder.replace(record(), OPEN)
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o600}


def test_removing_and_moving_what_is_gone_is_no_error(folder, place, tmp_path):
    folder.add(record())
    folder.remove(IDS[0])
    folder.remove(IDS[0])
    folder.add(record())
    (tmp_path / "target").mkdir()
    target = os.open(tmp_path / "target", os.O_RDONLY)
    folder.move(IDS[0], target, "kept.json", OPEN)
    folder.move(IDS[0], target, "kept.json", OPEN)
    os.close(target)
    assert json.loads((tmp_path / "target/kept.json").read_text())["id"] == IDS[0]
    assert os.listdir(place) == []


def test_a_pool_that_is_not_there_is_unavailable_and_never_empty(folder, place):
    folder.add(record())
    shutil.rmtree(place)
    for ask in (lambda: folder.get(IDS[0]), folder.ids, lambda: list(folder.each()), lambda: folder.remove(IDS[0])):
        with pytest.raises(Unavailable):
            ask()
    with pytest.raises(Unavailable):
        folder.add(record())
    with pytest.raises(Unavailable):
        folder.replace(record(), OPEN)


def damage(place, how):
    path = place / f"{IDS[1]}.json"
    if how == "torn":
        path.write_bytes(path.read_bytes()[:40])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "another's":
        path.write_bytes((place / f"{IDS[0]}.json").read_bytes())
    elif how == "too large":
        os.truncate(path, 2**21)
    else:
        path.unlink()
        {
            "a symlink": lambda: path.symlink_to(f"{IDS[0]}.json"),
            "a fifo": lambda: os.mkfifo(path),
            "a directory": path.mkdir,
        }[how]()


@pytest.mark.parametrize("how", ["torn", "empty", "another's", "too large", "a symlink", "a fifo", "a directory"])
def test_a_damaged_record_is_named_and_hides_no_other(folder, place, how):
    for record_id in IDS:
        folder.add(record(record_id))
    damage(place, how)
    with pytest.raises(RecordDamaged, match=rf"p:\.csi/volumes/{IDS[1]}\.json is damaged"):
        folder.get(IDS[1])
    first, broken, last = folder.each()
    assert (first.id, last.id) == (IDS[0], IDS[2])
    assert isinstance(broken, RecordDamaged)
    assert [one.id for one in folder.readable()] == [IDS[0], IDS[2]]


def test_listing_is_sorted_and_takes_foreign_files_for_no_records(folder, place):
    for record_id in reversed(IDS):
        folder.add(record(record_id))
    for name in (".tmp.x", "README", "short.json", f"{IDS[0].upper()}.json", f"{IDS[0]}.json.bak"):
        (place / name).write_text("{}")
    assert folder.ids() == IDS


def test_a_record_that_vanishes_while_it_is_listed_is_left_out(folder):
    for record_id in IDS:
        folder.add(record(record_id))
    listing = folder.each()
    assert next(listing).id == IDS[0]
    folder.remove(IDS[1])
    assert [one.id for one in listing] == [IDS[2]]
