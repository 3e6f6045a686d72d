"""A server does what it was asked, is started again, and answers the same request, sent once more, that the name exists (NFS)."""

import os
from pathlib import Path

import pytest

from csi_driver.backends.hostpath import HostPathBackend
from csi_driver.errors import InvalidArgument

MKDIR = os.mkdir


def place_of(path, dir_fd) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / os.fsdecode(path) if dir_fd is not None else Path(os.fsdecode(path))


@pytest.fixture
def lossy_server(monkeypatch):
    """Pools behind a server that loses its first reply to the mkdir of each volume's directory, and of each parent. Returns what was lost."""
    lost: list[str] = []

    def mkdir(path, mode=0o777, *, dir_fd=None):
        MKDIR(path, mode, dir_fd=dir_fd)
        place = place_of(path, dir_fd)
        if ".csi" not in place.parts and place.name not in lost:
            lost.append(place.name)
            raise FileExistsError(17, "File exists", path)

    monkeypatch.setattr(HostPathBackend, "data_is_here", False)
    monkeypatch.setattr(os, "mkdir", mkdir)
    return lost


@pytest.mark.parametrize("parameters", [{}, {"directory": "team/app"}], ids=["plain", "templated"])
def test_a_volume_whose_mkdir_was_answered_twice_is_made_at_its_place_and_goes_without_a_trace(bench, lossy_server, parameters):
    before = bench.leftovers()
    volume = bench.create("v", **parameters)
    assert lossy_server == (["team", "app"] if parameters else [volume.record.directory])
    assert volume.record.directory == parameters.get("directory", volume.record.handle.rpartition(".")[2])
    assert (bench.path(volume) / ".").is_dir()
    if parameters:
        assert bench.path(volume).parent.stat().st_mode & 0o7777 == 0o711
    bench.volumes.delete(volume.record.handle)
    bench.sweep()
    bench.sweep()
    assert bench.leftovers() == before
    assert not (bench.pool().backend.root() / "team").exists()


@pytest.mark.parametrize("made", [0o755, 0o700], ids=["of another mode", "with something in it"])
def test_what_somebody_else_makes_at_that_moment_stays_his(bench, monkeypatch, made):
    root = bench.pool().backend.root()

    def mkdir(path, mode=0o777, *, dir_fd=None):
        if place_of(path, dir_fd) == root / "theirs" and not (root / "theirs").exists():
            MKDIR(root / "theirs", made)
            if made == 0o700:
                (root / "theirs/kept").write_text("kept")
        MKDIR(path, mode, dir_fd=dir_fd)

    monkeypatch.setattr(HostPathBackend, "data_is_here", False)
    monkeypatch.setattr(os, "mkdir", mkdir)
    before = bench.leftovers()
    with pytest.raises(InvalidArgument, match="exists already"):
        bench.create("v", directory="theirs")
    assert (root / "theirs").stat().st_mode & 0o777 == made
    assert [each.read_text() for each in (root / "theirs").iterdir()] == ["kept"] * (made == 0o700)
    bench.sweep()
    assert bench.leftovers("theirs") == before


def test_where_the_data_is_here_the_word_of_the_kernel_holds(bench, monkeypatch):
    root = bench.pool().backend.root()

    def mkdir(path, mode=0o777, *, dir_fd=None):
        if place_of(path, dir_fd) == root / "theirs":
            MKDIR(root / "theirs", 0o700)
        MKDIR(path, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(InvalidArgument, match="exists already"):
        bench.create("v", directory="theirs")
    assert list((root / "theirs").iterdir()) == []
