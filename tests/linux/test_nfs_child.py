"""What is done to mounts in children: it works, its errors come back, and a child that hangs is left behind."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from csi_driver.errors import Unavailable
from csi_driver.linux import commands, mountinfo, mounts, nfs_child
from csi_driver.linux.bind_flags import MountAttributes
from csi_driver.linux.mount_table import MountTable

pytestmark = pytest.mark.root


@pytest.fixture
def mounted(tmp_path):
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "mine", place], check=False).returncode:
        pytest.skip("needs to mount a tmpfs")
    yield place
    mounts.unmount_all(place, 10)


def test_a_mount_is_looked_at_flushed_and_measured(mounted):
    (mounted / "file").write_bytes(bytes(100_000))
    nfs_child.look(mounted, 20)
    nfs_child.flush(mounted, 20)
    found = nfs_child.measure(mounted, 20)
    assert found.complete
    assert found.used_inodes == 2
    assert 100_000 <= found.used_bytes <= 200_000
    assert found.total_bytes == 8 << 20


def test_a_mount_is_bound_with_its_attributes(mounted, tmp_path):
    (mounted / "file").write_text("content")
    target = tmp_path / "target"
    target.mkdir()
    nfs_child.bind(mounted, target, MountAttributes(read_only=True, noexec=True), 20)
    try:
        assert (target / "file").read_text() == "content"
        assert {"ro", "noexec"} <= mountinfo.topmost_mount_at(target).options
    finally:
        mounts.unmount_all(target, 10)


def test_a_group_is_given_and_the_count_comes_back(mounted):
    (mounted / "dir").mkdir()
    assert nfs_child.change_group(mounted, 4321, 20, lambda _done: False) == 2
    assert nfs_child.change_group(mounted, 4321, 20, lambda _done: False) == 0
    assert (mounted / "dir").stat().st_gid == 4321


def test_what_fails_in_the_child_fails_here_with_its_errno(tmp_path):
    for call in (nfs_child.look, nfs_child.flush, nfs_child.measure):
        with pytest.raises(FileNotFoundError):
            call(tmp_path / "missing", 20)
    with pytest.raises(NotADirectoryError):
        (tmp_path / "file").touch()
        nfs_child.flush(tmp_path / "file", 20)


def test_a_child_that_hangs_is_given_up_at_its_deadline_and_leaves_no_thread(tmp_path):
    before = threading.active_count()
    started = time.monotonic()
    with pytest.raises(Unavailable, match="did not answer in time"):
        nfs_child.look(tmp_path, 0.001)
    assert time.monotonic() - started < 5
    until = time.monotonic() + 10
    while commands.stuck_children() and time.monotonic() < until:
        time.sleep(0.05)
    assert not commands.stuck_children()
    assert threading.active_count() <= before + 1, "only the reaper stays"


def test_a_command_is_stopped_when_its_watcher_says_so():
    seen = []

    def enough(printed):
        seen.append(printed)
        return printed.count(b"\n") >= 3

    started = time.monotonic()
    with pytest.raises(commands.DeadlineExceeded):
        commands.run(["sh", "-c", "while :; do echo x; sleep 0.1; done"], timeout=60, should_stop=enough)
    assert time.monotonic() - started < 10
    assert seen[-1].count(b"\n") >= 3


def test_the_kept_mount_table_sees_what_is_mounted_and_unmounted(tmp_path, mounted):
    table = MountTable(mounted)
    assert table.top().fs_type == "tmpfs"
    assert table.top().source == "mine"
    subprocess.run(["mount", "-t", "tmpfs", "above", mounted], check=True)
    assert table.top().source == "above"
    subprocess.run(["umount", mounted], check=True)
    assert table.top().source == "mine"
    subprocess.run(["umount", mounted], check=True)
    assert table.top() is None
    table.close()
    assert not [name for name in os.listdir("/proc/self/fd") if _leads_to_mountinfo(name)]


def test_the_kept_mount_table_is_not_read_while_nothing_changes(mounted, monkeypatch):
    from csi_driver.linux import mount_table

    readings = []
    read = mount_table.read_mounts
    monkeypatch.setattr(mount_table, "read_mounts", lambda: readings.append(1) or read())
    table = MountTable(mounted)
    for _ in range(50):
        assert table.top() is not None
    table.close()
    assert len(readings) < 10, "others on this machine may mount, but not all the time"


def _leads_to_mountinfo(name: str) -> bool:
    try:
        return str(Path(f"/proc/self/fd/{name}").readlink()).endswith("mountinfo")
    except OSError:
        return False
