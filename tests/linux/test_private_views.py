"""Through a private view a directory can be read, and nothing else."""

import errno
import os
import pathlib
import stat
import subprocess

import pytest

from csi_driver.linux import beneath, private_views

MOUNTS = pathlib.Path("/proc/self/mountinfo")


def open_directory(path):
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


@pytest.mark.root
def test_a_private_view_starts_no_device_and_lets_nobody_write(mount_room):
    os.mknod(mount_room / "device", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (mount_room / "file").write_text("x")
    directory = open_directory(mount_room)
    with private_views.private_view(directory) as (view, harmless):
        if not harmless:
            pytest.skip("needs Linux 5.18 or newer")
        with pytest.raises(PermissionError):
            beneath.open_file(view, b"device")
        with pytest.raises(OSError) as refused:
            os.open("file", os.O_WRONLY, dir_fd=view)
        assert refused.value.errno == errno.EROFS
        os.close(beneath.open_file(view, b"file"))
    os.close(os.open(mount_room / "device", os.O_RDWR))
    os.close(directory)


@pytest.mark.root
def test_a_private_view_leaves_no_mount_and_no_descriptor(mount_room):
    directory = open_directory(mount_room)
    before = len(os.listdir("/proc/self/fd")), MOUNTS.read_text()
    with private_views.private_view(directory) as (view, _):
        assert os.fstat(view).st_ino == os.fstat(directory).st_ino
        assert MOUNTS.read_text() == before[1]
    assert (len(os.listdir("/proc/self/fd")), MOUNTS.read_text()) == before
    os.close(directory)
    subprocess.run(["umount", mount_room], check=True)  # nothing keeps it busy
    subprocess.run(["mount", "-t", "tmpfs", "room", mount_room], check=True)


@pytest.mark.root
def test_a_mount_that_has_nodev_is_looked_at_as_it_is(mount_room):
    subprocess.run(["mount", "-o", "remount,nodev", mount_room], check=True)
    directory = open_directory(mount_room)
    with private_views.private_view(directory) as (view, harmless):
        assert harmless
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=view))
    os.close(directory)


@pytest.mark.root
def test_before_linux_5_18_a_directory_is_opened_as_it_is(mount_room, monkeypatch):
    monkeypatch.setattr(private_views, "_CLONES_ACROSS_MOUNTS", (99, 0))
    directory = open_directory(mount_room)
    with private_views.private_view(directory) as (view, harmless):
        assert not harmless
        os.close(os.open("file", os.O_WRONLY | os.O_CREAT, dir_fd=view))
    os.close(directory)
