"""The controller's share: mounted when it is needed, let go when it is not, and not touched while its server is away."""

import os
import threading
import time
from pathlib import Path

import pytest

from csi_driver.backends import nfs_share
from csi_driver.backends.base import in_background
from csi_driver.backends.nfs import NfsBackend
from csi_driver.config import NfsPool
from csi_driver.errors import InvalidArgument, NotFound, Unavailable
from csi_driver.linux import mountinfo


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(nfs_share, "ASK_SECONDS", 0.2)
    monkeypatch.setattr(nfs_share, "LATE_SECONDS", 1.0)


@pytest.fixture
def place(server, xfs):
    """A directory of the exported filesystem, for this test only."""
    path = xfs / f"pool-{time.monotonic_ns()}"
    server.tree(path).mkdir()
    return path


@pytest.fixture
def make_backend(tmp_path):
    made = []

    def make(server, path, *options) -> NfsBackend:
        pool = NfsPool("fast", server.address, path, options or ("vers=4.2",))
        made.append(NfsBackend(pool, tmp_path / "shares" / f"fast-{len(made)}"))
        return made[-1]

    yield make
    for backend in made:
        backend.close()
    assert not mountinfo.mounts_below(tmp_path)
    until(lambda: not [thread for thread in threading.enumerate() if thread.name == "share fast"])


def mounted(backend):
    return mountinfo.topmost_mount_at(backend.root())


def test_a_share_is_mounted_when_it_is_first_needed_and_once(server, place, make_backend, tmp_path):
    backend = make_backend(server, place)
    assert not mountinfo.mounts_below(tmp_path)
    roots = []
    threads = [threading.Thread(target=lambda: roots.append(backend.root())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(roots)) == 1
    assert len(roots) == 8
    assert [mount.source for mount in mountinfo.mounts_below(tmp_path)] == [f"{server.address}:{place}"]
    assert backend.generation == 1
    assert (tmp_path / "shares").stat().st_mode & 0o777 == 0o700
    assert "softerr" in mounted(backend).super_options


def test_what_an_earlier_process_left_is_replaced(server, place, make_backend, tmp_path):
    first = make_backend(server, place)
    assert "vers=4.2" in mounted(first).super_options
    second = NfsBackend(NfsPool("fast", server.address, place, ("vers=4.1",)), tmp_path / "shares" / "fast-0")
    try:
        assert "vers=4.1" in mounted(second).super_options
        assert len(mountinfo.mounts_below(tmp_path)) == 1
    finally:
        second.close()


def test_an_idle_share_is_let_go_and_mounted_again_when_it_is_needed(server, place, make_backend, tmp_path, monkeypatch):
    monkeypatch.setattr(nfs_share, "IDLE_SECONDS", 1.0)
    backend = make_backend(server, place)
    (backend.root() / "file").write_text("content")

    def look_in_the_background():
        in_background.set(True)
        backend.root()

    for _ in range(3):  # the sweeper's rounds keep nothing mounted
        thread = threading.Thread(target=look_in_the_background)
        thread.start()
        thread.join()
        time.sleep(0.2)
    until(lambda: backend.dormant)
    assert not mountinfo.mounts_below(tmp_path)
    assert backend.problem() is None
    assert (backend.root() / "file").read_text() == "content"
    assert backend.generation == 2
    assert not backend.dormant


def test_a_share_that_is_in_use_is_not_let_go(server, place, make_backend, tmp_path, monkeypatch):
    backend = make_backend(server, place)
    with (backend.root() / "file").open("w"):
        monkeypatch.setattr(nfs_share, "IDLE_SECONDS", 0.5)
        time.sleep(3)
        assert len(mountinfo.mounts_below(tmp_path)) == 1
    until(lambda: not mountinfo.mounts_below(tmp_path))


def test_while_the_server_is_away_nobody_goes_near_it_and_afterwards_everybody_may(make_server, make_backend):
    server = make_server("away")
    path = server.filesystem("xfs", name="away")
    server.export(path)
    backend = make_backend(server, path)
    root = backend.root()
    server.freeze()
    until(lambda: backend.problem() is not None, 10)
    started = time.monotonic()
    for _ in range(200):
        with pytest.raises(Unavailable, match=f"{server.address}.*does not answer since"):
            backend.root()
        with pytest.raises(Unavailable):
            backend.space()
    assert time.monotonic() - started < 1
    server.thaw()
    until(lambda: backend.problem() is None, 60)
    assert backend.root() == root
    assert backend.space().total_bytes
    assert backend.generation == 1, "the same mount goes on"


def test_a_share_whose_root_is_stale_is_mounted_anew(server, xfs, place, make_backend):
    backend = make_backend(server, place)
    (backend.root() / "old").touch()
    server.tree(place).rename(server.tree(xfs / "moved-away"))
    server.tree(place).mkdir()
    (server.tree(place) / "new").touch()
    server.node.run(["/bin/rm", "-rf", str(xfs / "moved-away")])
    until(lambda: backend.generation > 1)
    assert os.listdir(backend.root()) == ["new"]


def test_a_missing_export_is_unavailable_never_a_missing_volume(server, xfs, make_backend):
    backend = make_backend(server, xfs / "never-made")
    with pytest.raises(Unavailable, match="no such directory"):
        backend.root()
    with pytest.raises(NotFound, match="no such directory"):
        backend.stage("volume", _directory(backend), (), read_only=False)


def test_an_option_that_this_kernel_does_not_take_is_said(server, place, make_backend, tmp_path):
    backend = make_backend(server, place)
    target = tmp_path / "target"
    target.mkdir()
    backend.root()
    (backend.root() / "v").mkdir()
    with pytest.raises(InvalidArgument, match="one of the options"):
        backend.stage("v", target, ("xprtsec=tls",), read_only=False)
    assert not mountinfo.mounts_at(target)


def test_nfs3_without_a_lock_manager_here_works_with_its_own_locks_and_says_so(make_server, make_backend):
    server = make_server("old", v3=True)
    path = server.filesystem("xfs", name="old")
    server.export(path)
    backend = make_backend(server, path, "vers=3")
    assert mounted(backend).fs_type == "nfs"
    assert [found.reason for found in backend.shortcomings()] == ["LocksLocal"]
    assert {"nolock", "local_lock=all"} & mounted(backend).super_options


def test_nfs3_that_was_told_to_keep_its_locks_here_says_so(make_server, make_backend):
    server = make_server("old", v3=True)
    path = server.filesystem("xfs", name="old")
    server.export(path)
    backend = make_backend(server, path, "vers=3", "nolock")
    backend.root()
    assert [found.reason for found in backend.shortcomings()] == ["LocksLocal"]
    newer = make_backend(server, path, "vers=4.2", "nolock")  # means nothing there
    newer.root()
    assert not newer.shortcomings()


def test_who_root_is_to_the_server_is_found_out(make_server, make_backend):
    server = make_server("squashing")
    path = server.filesystem("xfs", name="squashing")
    server.tree(path).chmod(0o777)
    server.export(path, "rw,sync,no_subtree_check,root_squash")
    backend = make_backend(server, path)
    assert backend.owner(backend.root()) == 65534
    assert backend.squashed_to == 65534
    assert [found.reason for found in backend.shortcomings()] == ["RootSquashed"]
    assert os.listdir(backend.root()) == []
    server.export(path)
    until(lambda: backend.owner(backend.root()) == 0)
    assert list(backend.shortcomings()) == []


def _directory(backend) -> Path:
    target = Path("/tmp") / f"target-{id(backend)}"
    target.mkdir()
    return target
