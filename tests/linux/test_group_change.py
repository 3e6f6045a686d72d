"""Giving a tree to a group: completely, once, and never anything beside it."""

import os
import stat

import pytest

from csi_driver.linux.group_change import give_to_group, has_group
from csi_driver.linux.walk import WalkStopped

pytestmark = pytest.mark.root
GID = 4321


@pytest.fixture
def tree(tmp_path):
    top = tmp_path / "volume"
    (top / "a/b").mkdir(parents=True)
    (top / "a/b/file").write_text("x")
    (top / "a/b/file").chmod(0o600)
    (top / "a/private").mkdir(mode=0o700)
    os.symlink(tmp_path / "outside", top / "link")
    os.mkfifo(top / "fifo")
    (tmp_path / "outside").write_text("not ours")
    return top


@pytest.fixture
def descriptor(tree):
    opened = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    yield opened
    os.close(opened)


def groups(top):
    return {path.lstat().st_gid for path in [top, *top.rglob("*")]}


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


def test_every_entry_gets_the_group_and_the_group_gets_its_rights(tree, descriptor):
    assert give_to_group(descriptor, GID) == 7
    assert groups(tree) == {GID}
    assert (mode(tree), mode(tree / "a/private"), mode(tree / "a/b/file")) == (0o2775, 0o2770, 0o660)


def test_what_a_symlink_leads_to_is_left_alone(tree, descriptor, tmp_path):
    give_to_group(descriptor, GID)
    assert (tmp_path / "outside").stat().st_gid == 0
    assert mode(tmp_path / "outside") == 0o644


def test_what_is_made_later_in_a_new_volume_belongs_to_the_group(tmp_path):
    opened = os.open(tmp_path, os.O_RDONLY)
    assert give_to_group(opened, GID) == 1
    os.close(opened)
    (tmp_path / "later").mkdir()
    (tmp_path / "later/file").touch()
    assert groups(tmp_path) == {GID}


def test_a_second_time_nothing_is_walked_and_what_a_tenant_changed_stays(tree, descriptor):
    give_to_group(descriptor, GID)
    os.chown(tree / "a/b/file", -1, 77)
    assert has_group(descriptor, GID)
    assert give_to_group(descriptor, GID) == 0
    assert groups(tree) == {GID, 77}


def test_a_walk_that_was_cut_off_is_done_again_from_the_start(tree, descriptor):
    with pytest.raises(WalkStopped):
        give_to_group(descriptor, GID, lambda done: done > 3)
    assert not has_group(descriptor, GID)
    give_to_group(descriptor, GID)
    assert groups(tree) == {GID}


def test_another_group_is_another_walk(tree, descriptor):
    give_to_group(descriptor, GID)
    assert give_to_group(descriptor, GID + 1) == 7
    assert groups(tree) == {GID + 1}


def test_a_mount_inside_the_tree_is_not_entered(tree, descriptor, tmp_path):
    import subprocess

    (tree / "mounted").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "inside", tree / "mounted"], check=False).returncode:
        pytest.skip("needs to mount a tmpfs")
    try:
        (tree / "mounted/file").touch()
        give_to_group(descriptor, GID)
        assert {(tree / "mounted").stat().st_gid, (tree / "mounted/file").stat().st_gid} == {0}
    finally:
        subprocess.run(["umount", tree / "mounted"], check=True)
