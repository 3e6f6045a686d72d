"""A code that says "it has certainly not happened" is only given where that is true: one system call after the other fails."""

import errno
import itertools
import os
import shutil
import threading
import time
from dataclasses import replace

import pytest
from bench import MIB
from grpc import StatusCode

from csi_driver.errors import NotFound, OperationPending, Unavailable
from csi_driver.linux import files
from csi_driver.rpc.status import to_status
from csi_driver.volumes.answers import Snapshot
from csi_driver.volumes.model import Phase
from csi_driver.volumes.requests import Page

IN_BACKGROUND = {StatusCode.CANCELLED, StatusCode.DEADLINE_EXCEEDED, StatusCode.UNAVAILABLE, StatusCode.ABORTED}
"""external-provisioner v6.3 (pkg/controller/controller.go, checkError): ProvisioningInBackground; all other codes end it."""
NOT_FINAL_FOR_SNAPSHOTS = IN_BACKGROUND | {StatusCode.RESOURCE_EXHAUSTED}
"""external-snapshotter v8.7 (pkg/sidecar-controller/snapshot_controller.go, isCSIFinalError)."""
CHANGES = ("rename", "link", "mkdir", "fsync", "unlink", "rmdir", "fdatasync")


class Faults:
    """Lets calls of the system fail from the n-th change of a filesystem on."""

    def __init__(self, monkeypatch):
        self._guard = threading.Lock()
        self._left, self._number, self._manner = 0, 0, ""
        self.met = False
        for name in CHANGES:
            monkeypatch.setattr(os, name, self._failing(getattr(os, name)))

    def begin(self, change, number, manner):
        self._left, self._number, self._manner, self.met = change, number, manner, False

    def end(self):
        self._left = 0

    def _failing(self, call):
        def change(*arguments, **named):
            if not self._is_met():
                return call(*arguments, **named)
            if self._manner == "done, and said to have failed":
                call(*arguments, **named)
            raise OSError(self._number, os.strerror(self._number))

        return change

    def _is_met(self):
        with self._guard:
            if self._left == 0:
                return False
            if self._left > 1:
                self._left -= 1
                return False
            if self._manner != "all from here on":
                self._left = 0
            self.met = True
            return True


def volume(bench, name, **parameters):
    return bench.create(name, **parameters).record


def snapshot(bench, name, source):
    return bench.snapshot(name, source).record


def group(bench, name, sources):
    return bench.groups.create(name, [source.record.handle for source in sources], time.monotonic() + 60).record


STORIES = {
    "an empty volume": (lambda bench, name, _: volume(bench, name), IN_BACKGROUND),
    "a volume of a template": (lambda bench, name, _: volume(bench, name, directory=f"team/{name}"), IN_BACKGROUND),
    "a clone": (lambda bench, name, sources: bench.clone(name, sources[0]).record, IN_BACKGROUND),
    "a snapshot": (lambda bench, name, sources: snapshot(bench, name, sources[0]), NOT_FINAL_FOR_SNAPSHOTS),
    "a group": (group, NOT_FINAL_FOR_SNAPSHOTS),
}


def outcome(call):
    try:
        return call(), None
    except Exception as error:
        return None, error


def left(bench, sources):
    """What is in the pool but for the sources and what goes by itself."""
    bench.sweep()
    store = bench.pool()
    names = [record.name for folder in (store.volumes, store.snapshots, store.groups) for record in folder.readable()]
    known = {source.record.name for source in sources}
    unknown = [name for name in bench.leftovers("team") if ".tmp." not in name]  # swept when they are an hour old
    return [name for name in names if name not in known] + unknown


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("manner", ["once", "done, and said to have failed", "all from here on"])
@pytest.mark.parametrize("story", STORIES)
def test_what_fails_with_a_final_code_has_left_nothing_and_what_left_something_is_asked_for_again(
    bench, monkeypatch, story, manner, number
):
    make, may_be_there = STORIES[story]
    sources = [bench.create(f"source{n}") for n in range(2)]
    for source in sources:
        (bench.path(source) / "file").write_text("content")
    faults = Faults(monkeypatch)
    for change in itertools.count(1):
        name = f"v{change}"
        faults.begin(change, number, manner)
        made, error = outcome(lambda name=name: make(bench, name, sources))
        faults.end()
        if error is not None:
            there = left(bench, sources)
            assert to_status(error)[0] in may_be_there or there == [], (change, error)
            made = make(bench, name, sources)
        assert made.name == name
        remove(bench, made)
        if not faults.met:
            assert change > 3
            return


def remove(bench, made):
    if hasattr(made, "members"):
        bench.groups.delete(made.handle, [])
    elif hasattr(made, "source_handle"):
        bench.snapshots.delete(made.handle)
    else:
        bench.volumes.delete(made.handle)


# --- groups -----------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing runs after it, as after `kill -9`."""


def killed_at(bench, monkeypatch, owner, name, call_number):
    """Let the process of a group's creation end at a call."""
    calls = itertools.count(1)
    true = getattr(owner, name)

    def ending(*arguments, **named):
        if next(calls) == call_number:
            raise Killed
        return true(*arguments, **named)

    monkeypatch.setattr(owner, name, ending)
    monkeypatch.setattr(bench.groups, "_give_up", lambda *_: (_ for _ in ()).throw(Killed))


@pytest.mark.parametrize(("step", "number", "is_kept"), [("place", 2, False), ("make_ready", 1, True), ("make_ready", 2, True)])
def test_a_group_that_meets_another_at_work_on_a_member_leaves_what_was_cut_and_its_retry_keeps_all_of_it_or_none(
    bench, monkeypatch, step, number, is_kept
):
    sources = [bench.create(f"source{n}", size=MIB) for n in range(2)]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(bench, patch, bench.snapshots, step, number)
        group(bench, "g", sources)
    before = {record.handle: record for record in bench.pool().snapshots.readable()}
    cut = [record for record in before.values() if bench.snapshots.is_cut(bench.pool(), record)]
    assert len(cut) == (2 if is_kept else 1)
    last = max(before.values(), key=lambda record: record.created_at_ns)
    with bench.domain.services.snapshots._locks.hold(bench.pool(), f"snapshot:{last.id}"), pytest.raises(OperationPending):
        group(bench, "g", sources)
    assert all(bench.snapshots.is_cut(bench.pool(), record) for record in cut)
    retried_at = time.time_ns()
    members = {handle: bench.snapshots.get(handle).record for handle in group(bench, "g", sources).members}
    assert members.keys() == before.keys()
    for handle, member in members.items():
        assert (member.created_at_ns == before[handle].created_at_ns) == is_kept
        assert (member.created_at_ns >= retried_at) == (not is_kept)


def test_a_group_whose_source_is_held_by_another_cuts_nothing_and_its_retry_does(bench):
    sources = [bench.create(f"source{n}") for n in range(2)]
    locks = bench.domain.services.snapshots._locks
    with locks.hold(bench.pool(), f"content:{sources[1].record.id}"), pytest.raises(OperationPending):
        group(bench, "g", sources)
    bench.sweep()
    assert bench.leftovers() == []
    assert len(group(bench, "g", sources).members) == 2


def test_no_member_is_seen_before_its_group_is_whole_whatever_was_killed(bench, monkeypatch):
    sources = [bench.create(f"source{n}") for n in range(2)]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(bench, patch, bench.pool().groups, "replace", 1)
        group(bench, "g", sources)
    fresh = bench.restarted()
    members = list(fresh.pool().snapshots.readable())
    assert len(members) == 2
    assert fresh.snapshots.list(Page(), "", "") == ([], "")
    for member in members:
        with pytest.raises(NotFound):
            fresh.snapshots.get(member.handle)
        with pytest.raises(NotFound):
            fresh.restore("restored", Snapshot(member, None))
    made = group(fresh, "g", sources)
    assert sorted(shown.record.handle for shown in fresh.snapshots.list(Page(), "", "")[0]) == sorted(made.members)


@pytest.mark.parametrize("kind", ["clone", "snapshot"])
def test_a_retry_that_cannot_even_take_over_what_was_cut_off_is_asked_for_again(bench, monkeypatch, kind):
    source = bench.create("source")
    make = {"clone": lambda: bench.clone("new", source), "snapshot": lambda: bench.snapshot("new", source)}[kind]
    folder = bench.pool().volumes if kind == "clone" else bench.pool().snapshots
    made = make().record
    changes = {"claimed": False, "content_inode": None} if kind == "clone" else {}
    folder.replace(replace(made, phase=Phase.CREATING, **changes), files.OPEN)
    place = bench.pool().backend.root() / (made.directory if kind == "clone" else f".csi/snapshots-data/{made.id}")
    shutil.rmtree(place)  # as after a kill in the midst of the copy

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(files, "write_atomically", full)
        with pytest.raises(Unavailable, match="may have been made"):
            make()
    assert make().record.phase is Phase.READY


@pytest.mark.parametrize("kind", ["volume", "clone", "snapshot", "group"])
def test_what_is_found_ready_is_on_the_disk_before_it_is_answered(bench, monkeypatch, kind):
    """Who made it may have been killed after its record could be seen, and before that had reached the disk."""
    source = bench.create("source")
    make, folder = {
        "volume": (lambda: bench.create("source"), "volumes"),
        "clone": (lambda: bench.clone("new", source), "volumes"),
        "snapshot": (lambda: bench.snapshot("new", source), "snapshots"),
        "group": (lambda: bench.groups.create("new", [source.record.handle], time.monotonic() + 30), "groups"),
    }[kind]
    make()
    synced, fsync = [], os.fsync

    def note(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    make()
    assert f"{bench.pool().backend.root()}/.csi/{folder}" in synced
