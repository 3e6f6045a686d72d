"""What a pool that does not answer does to the others: nothing."""

import errno
import os
import re
import threading
import time
from dataclasses import replace

import pytest
from bench import make_bench, mount_capability, until
from trees import fill

from csi_driver.backends.hostpath import HostPathBackend
from csi_driver.config import HostPathPool
from csi_driver.errors import OperationPending, Unavailable
from csi_driver.linux.files import OPEN
from csi_driver.volumes import assembly, orphans, rounds
from csi_driver.volumes.model import OnDelete, Phase
from csi_driver.volumes.node_state import NodeVolumeRecord, Target
from csi_driver.volumes.pool_layout import new_token

POOLS = ("away", "here")


class Far(HostPathBackend):
    """A directory that stands behind a server, which a test can stop: `hang` whoever comes, or be known to be `silent`."""

    remote = True
    node_local = False
    generation = 1

    def __init__(self, settings):
        super().__init__(settings, {})
        self.answers = threading.Event()
        self.answers.set()
        self.silent = None

    def root(self):
        self.answers.wait()
        if self.silent:
            raise Unavailable(self.silent)
        return super().root()

    def problem(self):
        return self.silent

    def close(self):
        self.answers.wait()


@pytest.fixture
def backends(tmp_path):
    return {name: Far(HostPathPool(name, tmp_path / "pools" / name, shared=True, inline=True)) for name in POOLS}


@pytest.fixture
def bench(tmp_path, backends):
    made = make_bench(tmp_path, (), backends=backends, default_pool="here", topology=None)
    yield made
    for backend in backends.values():
        backend.answers.set()
    made.domain.stop(5)


def sweepers():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("sweeper")]


def trash_of(bench, pool):
    return os.listdir(bench.root / "pools" / pool / ".csi/trash")


def delete_filled(bench, count, pool):
    for number in range(count):
        volume = bench.create(f"{pool}-{number}", pool=pool)
        fill(bench.path(volume))
        bench.volumes.delete(volume.record.handle)


def falls_silent(monkeypatch, backend, call):
    """Let the server go away at the next `call` of the kernel, and count those that wait for it in vain."""
    waited = []

    def gone(*_arguments, **_named):
        waited.append(call)
        backend.silent = "the server does not answer"
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr(os, call, gone)
    return waited


# --- rounds -----------------------------------------------------------------------------------------------------------------------


def test_a_pool_whose_server_hangs_keeps_no_other_from_being_swept(bench, backends):
    delete_filled(bench, 1, "away")
    volume = bench.create("v", pool="here")
    backends["away"].answers.clear()
    seen = []
    bench.domain.sweeper.start(lambda pool, _seconds, _report: seen.append(pool))
    bench.volumes.delete(volume.record.handle)
    until(lambda: trash_of(bench, "here") == [])
    until(lambda: {"", "here"} <= set(seen))
    assert "away" not in seen, "a round that is not over was told"
    assert len(trash_of(bench, "away")) == 1
    backends["away"].answers.set()
    until(lambda: trash_of(bench, "away") == [])


def test_what_a_crash_left_is_gone_after_two_rounds_that_are_close_to_each_other(bench, monkeypatch):
    monkeypatch.setattr(rounds, "FIRST_INTERVAL_SECONDS", 0.5)
    staging = bench.root / f"pools/here/.csi/staging/{'a' * 26}.0123456789abcdef"
    staging.mkdir()
    counts = []
    bench.domain.sweeper.start(lambda pool, _seconds, report: pool == "here" and counts.append(report.staging))
    until(lambda: len(counts) >= 2)
    assert counts[:2] == [0, 1], "in the first round it may be somebody's"
    until(lambda: trash_of(bench, "here") == [])


def test_a_stop_ends_the_threads_and_waits_for_none_that_hangs(tmp_path):
    many = {f"pool-{n}": Far(HostPathPool(f"pool-{n}", tmp_path / f"pools/{n}", shared=True)) for n in range(40)}
    bench = make_bench(tmp_path, (), backends=many, default_pool="pool-0", topology=None)
    many["pool-7"].answers.clear()
    bench.domain.sweeper.start()
    assert len(sweepers()) == len(many) + 1
    began = time.monotonic()
    bench.domain.sweeper.stop(1.0)
    assert time.monotonic() - began < 5
    until(lambda: sweepers() == ["sweeper pool-7"])
    many["pool-7"].answers.set()
    until(lambda: sweepers() == [])


def test_a_stop_lets_all_pools_go_at_once_and_waits_for_none_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(assembly, "_CLOSE_SECONDS", 1.0)
    many = {f"pool-{n}": Far(HostPathPool(f"pool-{n}", tmp_path / f"pools/{n}", shared=True)) for n in range(10)}
    bench = make_bench(tmp_path, (), backends=many, default_pool="pool-0", topology=None)
    for backend in many.values():
        backend.answers.clear()
    began = time.monotonic()
    bench.domain.stop(1.0)
    assert time.monotonic() - began < 6
    for backend in many.values():
        backend.answers.set()


# --- a pool that falls silent while it is swept -----------------------------------------------------------------------------------


def test_the_trash_of_a_server_that_goes_away_is_left_at_once_and_emptied_when_it_is_back(bench, backends, monkeypatch):
    delete_filled(bench, 6, "away")
    waited = falls_silent(monkeypatch, backends["away"], "unlink")
    assert bench.domain.sweeper._reaper.empty(bench.pool("away")) == (0, 1)
    assert len(waited) == 1
    assert bench.sweep().failed == 1
    monkeypatch.undo()
    assert len(trash_of(bench, "away")) == 6
    backends["away"].silent = None
    report = bench.sweep()
    assert (report.trash, report.failed) == (6, 0)


def test_a_large_entry_of_the_trash_is_left_half_removed_when_its_server_goes_away(bench, backends, monkeypatch):
    volume = bench.create("v", pool="away")
    for number in range(300):
        (bench.path(volume) / str(number)).touch()
    bench.volumes.delete(volume.record.handle)
    unlink, removed = os.unlink, []

    def last(*arguments, **named):
        unlink(*arguments, **named)
        removed.append(arguments)
        if len(removed) == 10:
            backends["away"].silent = "the server does not answer"

    monkeypatch.setattr(os, "unlink", last)
    assert bench.domain.sweeper._reaper.empty(bench.pool("away")) == (0, 0)
    assert len(removed) == 10
    backends["away"].silent = None
    assert bench.domain.sweeper._reaper.empty(bench.pool("away")) == (1, 0)


def test_deletions_that_were_cut_off_are_left_when_their_server_goes_away(bench, backends, monkeypatch):
    store = bench.pool("away")
    for number in range(6):
        record = bench.create(f"v{number}", pool="away").record
        store.volumes.replace(replace(record, phase=Phase.DELETING), OPEN)
    waited = falls_silent(monkeypatch, backends["away"], "rename")
    report = bench.sweep()
    assert (len(waited), report.failed) == (1, 2), "the deletion, and the pool"
    monkeypatch.undo()
    backends["away"].silent = None
    assert bench.sweep().deletions_completed == 6


def test_the_marks_of_parents_are_left_when_their_server_goes_away(bench, backends, monkeypatch):
    for number in range(6):
        bench.volumes.delete(bench.create(f"v{number}", pool="away", directory=f"team-{number}/v").record.handle)
    bench.sweep()
    for number in range(6):
        bench.create(f"v{number}", pool="away", directory=f"team-{number}/v")
    opened, waited = os.open, []

    def gone(path, *arguments, **named):
        if re.fullmatch(r"[0-9a-f]{64}\.json", str(path)):
            waited.append(path)
            backends["away"].silent = "the server does not answer"
            raise OSError(errno.ETIMEDOUT, "Connection timed out")
        return opened(path, *arguments, **named)

    monkeypatch.setattr(os, "open", gone)
    assert bench.sweep().failed == 1
    assert len(waited) == 1


# --- a node -----------------------------------------------------------------------------------------------------------------------


def inline_volume(bench, handle, pool, *targets):
    """An inline volume as an Unpublish leaves it that could not reach the server; with `targets`, as its pod has it."""
    store = bench.pool(pool)
    made = bench.node._publisher._inline.create(
        handle, store, mount_capability(), {"csi.storage.k8s.io/ephemeral": "true", "pool": pool}
    )
    bench.domain.state.keep(
        NodeVolumeRecord(
            id=bench.domain.state.id_of(handle),
            token=new_token(),
            handle=handle,
            pool=pool,
            directory=made.directory,
            access_mode=mount_capability().access_mode,
            ephemeral=True,
            targets=tuple(Target(target, False, ()) for target in targets),
        )
    )


def known(bench):
    return sorted(record.handle for record in bench.domain.state.volumes.readable())


def test_inline_volumes_that_had_to_be_left_are_removed_by_a_round_each_pools_by_itself(bench, backends, monkeypatch):
    monkeypatch.setattr(orphans, "_PATIENCE_SECONDS", 0.5)
    for number, pool in enumerate(POOLS * 2):
        inline_volume(bench, f"csi-{pool}-{number}", pool)
    backends["away"].answers.clear()
    for _ in range(3):
        assert bench.domain.sweeper._orphans.sweep(patient=True) == 0
    until(lambda: known(bench) == ["csi-away-0", "csi-away-2"])
    assert bench.pool("here").volumes.ids() == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("inline")] == ["inline away"]
    backends["away"].answers.set()
    until(lambda: known(bench) == [])
    assert bench.pool("away").volumes.ids() == []


def test_an_unpublish_does_not_wait_for_the_server_of_another_pods_inline_volume(bench, backends):
    inline_volume(bench, "csi-away", "away")
    inline_volume(bench, "csi-here", "here", bench.target("pod"))
    backends["away"].answers.clear()
    unpublish = threading.Thread(target=bench.node.unpublish, args=("csi-here", bench.target("pod")), daemon=True)
    unpublish.start()
    unpublish.join(10)
    assert not unpublish.is_alive()
    assert known(bench) == ["csi-away"]


# --- nothing has to be swept before the first call ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [False, True], ids=["deleted", "archived"])
def test_a_directory_whose_volume_is_being_deleted_is_free_later_and_not_never(bench, monkeypatch, kept):
    parameters = {"on_delete": OnDelete.ARCHIVE} if kept else {}
    first = bench.create("first", pool="here", directory="team/data", **parameters)
    with monkeypatch.context() as broken:
        rename = os.rename

        def cut_off(source, *arguments, **named):
            if source == "data":
                raise OSError(errno.EIO, "Input/output error")
            return rename(source, *arguments, **named)

        broken.setattr(os, "rename", cut_off)
        with pytest.raises(OSError, match="Input/output error"):
            bench.volumes.delete(first.record.handle)
    after = bench.restarted()
    with pytest.raises(OperationPending, match=r"team/data.*deletion is not complete"):
        after.create("second", pool="here", directory="team/data")
    after.sweep()
    assert after.create("second", pool="here", directory="team/data").record.directory == "team/data"
