import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest

from csi_driver.errors import FailedPrecondition
from csi_driver.linux import inode_flags, trees
from csi_driver.linux.walk import Walk, WalkStopped


def soon():
    return time.monotonic() + 60


@pytest.fixture
def room(tmp_path):
    """A directory and its descriptor; whatever a test leaves in there is made removable again."""
    path = tmp_path / "room"
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    yield path, descriptor
    os.close(descriptor)


def open_directory(path):
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def measure(path, deadline=None):
    descriptor = open_directory(path)
    try:
        return trees.measure_tree(descriptor, deadline=deadline or soon())
    finally:
        os.close(descriptor)


def nest(path, depth, leaf=b"leaf"):
    """Make a chain of directories whose path no system call would take, with a file in each tenth."""
    descriptor = open_directory(path)
    for level in range(depth):
        os.mkdir("nested-directory", dir_fd=descriptor)
        child = os.open("nested-directory", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = child
        if level % 10 == 9:
            file = os.open("file", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=descriptor)
            os.write(file, leaf)
            os.close(file)
    os.close(descriptor)


def du(path):
    """What du(1) says: bytes and inodes."""
    size = subprocess.run(["du", "-s", "-x", "--block-size=1", path], check=True, capture_output=True).stdout.split()[0]
    inodes = subprocess.run(["du", "-s", "-x", "--inodes", path], check=True, capture_output=True).stdout.split()[0]
    return int(size), int(inodes)


def furnish(path):
    """Fill a directory with one of each kind."""
    path.mkdir()
    (path / "sub" / "deeper").mkdir(parents=True)
    (path / "sub" / "file").write_bytes(bytes(100_000))
    os.link(path / "sub" / "file", path / "sub" / "deeper" / "same")
    os.link(path / "sub" / "file", path / "again")
    os.truncate(path / "sub" / "deeper" / "same", 10_000_000)
    (path / "link").symlink_to("/etc")
    os.mkfifo(path / "fifo")
    open(os.path.join(os.fsencode(path), b"not utf-8 \xff\n"), "wb").close()
    return path


# --- the walk ----------------------------------------------------------------------------------------------------------------------


def test_a_walk_yields_every_entry_once_however_deep_and_wide(room):
    path, descriptor = room
    here = path
    for level in range(150):  # more levels than are held open, so that reading goes on in directories opened again
        for number in range(40):
            (here / f"file-{level}-{number}").touch()
        here = here / "d"
        here.mkdir()
    seen = []
    most = 0
    with Walk(descriptor) as walk:
        while True:
            for name, _, _ in walk.entries():
                if name == b"d":
                    walk.enter(name, os.open(name, os.O_RDONLY, dir_fd=walk.descriptor))
                    most = max(most, len(os.listdir("/proc/self/fd")))
                    break
                seen.append(name)
            else:
                if not walk.depth:
                    break
                walk.leave()
    assert len(seen) == len(set(seen)) == 150 * 40
    assert most < 120


def test_a_walk_whose_way_back_was_moved_says_so(room):
    path, descriptor = room
    nest(path, 100)
    (path / "elsewhere").mkdir()
    with Walk(descriptor) as walk:
        for _ in range(100):
            walk.enter(b"nested-directory", os.open("nested-directory", os.O_RDONLY, dir_fd=walk.descriptor))
        # Level 30 is closed by now: its child gets another parent.
        inner = path.joinpath(*["nested-directory"] * 31)
        inner.rename(path / "elsewhere" / "moved")
        with pytest.raises(OSError) as caught:
            while walk.depth:
                walk.leave()
    assert caught.value.errno == errno.ESTALE


# --- measuring ---------------------------------------------------------------------------------------------------------------------


def test_hard_links_beyond_what_memory_is_kept_for_leave_a_floor(tmp_path):
    tree = tmp_path / "linked"
    for folder in ("one", "two"):
        (tree / folder).mkdir(parents=True)
    for number in range(20):
        (tree / "one" / str(number)).write_bytes(b"x" * 4096)
        os.link(tree / "one" / str(number), tree / "two" / str(number))
    descriptor = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    try:
        whole, exact, floor = (trees.measure_tree(descriptor, deadline=soon(), most_open=most) for most in (200, 20, 19))
    finally:
        os.close(descriptor)
    assert (whole.inodes, whole.complete) == (23, True)
    assert exact == whole
    assert not floor.complete
    assert 22 <= floor.inodes <= whole.inodes  # its other name may have come when there was room again
    assert floor.bytes <= whole.bytes


def test_measures_as_du_does(room):
    tree = furnish(room[0] / "tree")
    usage = measure(tree)
    assert (usage.bytes, usage.inodes) == du(tree)
    assert usage.complete
    assert usage.bytes < 1_000_000  # holes and further names of a file take nothing


def test_a_deadline_cuts_the_count_short_and_says_so(room):
    tree = furnish(room[0] / "tree")
    usage = measure(tree, deadline=time.monotonic() - 1)
    assert not usage.complete
    assert usage.inodes < measure(tree).inodes


@pytest.mark.root
def test_measuring_stays_in_its_mount(room):
    tree = furnish(room[0] / "tree")
    (room[0] / "foreign").mkdir()
    (room[0] / "foreign" / "big").write_bytes(bytes(5_000_000))
    before = measure(tree)
    (tree / "mounted").mkdir()
    (tree / "mounted-file").touch()
    subprocess.run(["mount", "--bind", room[0] / "foreign", tree / "mounted"], check=True)
    subprocess.run(["mount", "--bind", room[0] / "foreign" / "big", tree / "mounted-file"], check=True)
    try:
        usage = measure(tree)
        assert usage.bytes - before.bytes < 100_000
        assert usage.complete
    finally:
        subprocess.run(["umount", tree / "mounted", tree / "mounted-file"], check=True)


@pytest.mark.root
def test_a_part_that_cannot_be_read_makes_the_count_incomplete(room):
    tree = furnish(room[0] / "tree")
    (tree / "sub").chmod(0)
    room[0].chmod(0o755)
    code = (
        "import os, sys, time\nfrom csi_driver.linux import trees\nd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\nu = trees.measure_tree(d, deadline=time.monotonic() + 9)\n"
        "assert not u.complete and u.inodes > 3, u"
    )
    subprocess.run([sys.executable, "-c", code, tree], check=True)


# --- removing ----------------------------------------------------------------------------------------------------------------------


def test_a_removed_tree_leaves_what_its_symlinks_point_at(room):
    path, descriptor = room
    outside = furnish(path / "outside")
    tree = furnish(path / "tree")
    (tree / "sub" / "out").symlink_to(outside)
    (tree / "sub" / "out-file").symlink_to(outside / "again")
    before = du(outside)
    trees.remove_tree(descriptor, "tree")
    assert not tree.exists()
    assert du(outside) == before
    trees.remove_tree(descriptor, "tree")  # a second time there is nothing to do


@pytest.mark.parametrize("kind", ["file", "symlink", "fifo"])
def test_what_is_no_directory_is_removed_itself(room, kind):
    path, descriptor = room
    (path / "target").mkdir()
    (path / "target" / "kept").touch()
    if kind == "file":
        (path / "x").touch()
    elif kind == "symlink":
        (path / "x").symlink_to(path / "target")
    else:
        os.mkfifo(path / "x")
    trees.remove_tree(descriptor, "x")
    assert os.listdir(path) == ["target"]
    assert (path / "target" / "kept").exists()


@pytest.mark.root
def test_immutable_and_append_only_entries_are_removed(room):
    path, descriptor = room
    tree = furnish(path / "tree")
    set_flags(tree / "again", inode_flags.IMMUTABLE)
    (tree / "log").touch()
    set_flags(tree / "log", inode_flags.APPEND)
    (tree / "held").mkdir()
    (tree / "held" / "link").symlink_to("x")
    (tree / "empty").mkdir()
    for name in ("held", "empty", "sub/deeper", "sub", "."):
        set_flags(tree / name, inode_flags.IMMUTABLE)
    with pytest.raises(PermissionError):
        shutil.rmtree(tree)
    trees.remove_tree(descriptor, "tree")
    assert os.listdir(path) == []


@pytest.mark.root
def test_flags_of_the_parent_are_not_ours_to_clear(room):
    path, descriptor = room
    (path / "tree" / "a").mkdir(parents=True)
    set_flags(path, inode_flags.IMMUTABLE)
    try:
        with pytest.raises(PermissionError):
            trees.remove_tree(descriptor, "tree")
        assert inode_flags.read_flags(descriptor) & inode_flags.IMMUTABLE
    finally:
        inode_flags.write_flags(descriptor, 0)


@pytest.mark.root
def test_modes_that_hold_off_an_owner_without_capabilities_do_not_stop_a_removal(room):
    path, _ = room
    tree = furnish(path / "tree")
    for entry in [path, tree, *tree.rglob("*")]:
        os.chown(entry, 65534, 65534, follow_symlinks=False)
    os.chown(os.path.join(os.fsencode(tree), b"not utf-8 \xff\n"), 65534, 65534)
    for name in ("sub/deeper", "sub"):
        (tree / name).chmod(0)
    tree.chmod(0o500)
    code = (
        "import os, sys\nfrom csi_driver.linux import trees\nd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\ntrees.remove_tree(d, 'tree')"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)
    assert os.listdir(path) == []


@pytest.mark.root
def test_what_is_mounted_in_a_tree_is_neither_entered_nor_removed(room):
    path, descriptor = room
    foreign = furnish(path / "foreign")
    tree = furnish(path / "tree")
    (tree / "sub" / "mounted").mkdir()
    (tree / "sub" / "mounted-file").touch()
    subprocess.run(["mount", "--bind", foreign, tree / "sub" / "mounted"], check=True)
    subprocess.run(["mount", "--bind", foreign / "again", tree / "sub" / "mounted-file"], check=True)
    before = du(foreign)
    try:
        with pytest.raises(FailedPrecondition, match="mounted") as caught:
            trees.remove_tree(descriptor, "tree")
        assert "2 mounted below it" in str(caught.value)
        assert du(foreign) == before
        assert os.listdir(tree) == ["sub"]
        assert sorted(os.listdir(tree / "sub")) == ["mounted", "mounted-file"]
    finally:
        subprocess.run(["umount", tree / "sub" / "mounted", tree / "sub" / "mounted-file"], check=True)
    trees.remove_tree(descriptor, "tree")
    assert not tree.exists()


def test_a_removal_stops_when_told_and_can_be_done_again(room):
    path, descriptor = room
    furnish(path / "tree")
    asked = []
    with pytest.raises(WalkStopped):
        trees.remove_tree(descriptor, "tree", should_stop=lambda: len(asked) > 2 or asked.append(1))
    assert (path / "tree").exists()
    trees.remove_tree(descriptor, "tree")
    assert not (path / "tree").exists()


def test_a_tree_that_is_filled_while_it_is_removed_goes_in_the_end(room):
    path, descriptor = room
    (path / "tree" / "sub").mkdir(parents=True)
    for number in range(2000):
        (path / "tree" / "sub" / f"{number}").touch()
    until = time.monotonic() + 0.3

    def fill():
        number = 0
        while time.monotonic() < until:
            number += 1
            try:
                (path / "tree" / "sub" / f"new-{number}").touch()
            except OSError:
                return

    thread = threading.Thread(target=fill)
    thread.start()
    trees.remove_tree(descriptor, "tree")
    thread.join()
    assert os.listdir(path) == []


def test_deep_branches_that_part_far_down_are_measured_and_removed(room):
    path, descriptor = room
    for branch in ("x", "y", "z"):
        # They part 75 levels down, where the first levels are closed already; each goes 70 further.
        (path / "/".join(["a"] * 75) / "/".join([branch] * 70)).mkdir(parents=True)
    assert measure(path).inodes == 1 + 75 + 3 * 70
    trees.remove_tree(descriptor, "a")
    assert os.listdir(path) == []


def test_a_tree_deeper_than_any_path_is_measured_and_removed(room):
    path, descriptor = room
    nest(path, 10_000)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        usage = measure(path)
        assert usage.complete
        assert usage.inodes == 1 + 10_000 + 1_000
        trees.remove_tree(descriptor, "nested-directory")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert os.listdir(path) == []


def test_owner_and_mode_are_set_on_the_top_alone(room):
    path, _ = room
    furnish(path / "tree")
    below = (path / "tree" / "sub").stat()
    descriptor = open_directory(path / "tree")
    trees.apply_owner_and_mode(descriptor, None, None, None)
    trees.apply_owner_and_mode(descriptor, os.getuid(), None, 0o2771)
    assert os.fstat(descriptor).st_mode & 0o7777 == 0o2771
    os.close(descriptor)
    assert (path / "tree" / "sub").stat() == below


@pytest.mark.root
def test_owner_and_group_are_set_and_keep_the_setgid_bit(room):
    descriptor = room[1]
    trees.apply_owner_and_mode(descriptor, 1234, 5678, 0o2770)
    status = os.fstat(descriptor)
    assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1234, 5678, 0o2770)
    trees.apply_owner_and_mode(descriptor, None, 99, None)
    assert (os.fstat(descriptor).st_uid, os.fstat(descriptor).st_gid) == (1234, 99)


@pytest.mark.minutes
def test_a_hundred_thousand_files_in_one_directory_take_no_memory(room):
    path, descriptor = room
    (path / "tree").mkdir()
    tree = open_directory(path / "tree")
    for number in range(100_000):
        os.mknod(f"a-file-with-a-long-enough-name-{number}", 0o100600, dir_fd=tree)
    os.close(tree)
    tracemalloc.start()
    try:
        assert measure(path / "tree").inodes == 100_001
        trees.remove_tree(descriptor, "tree")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    assert os.listdir(path) == []


@pytest.mark.root
def test_unprivileged_read_only_subvolumes_do_not_stop_a_removal(btrfs_room):
    descriptor = open_directory(btrfs_room)
    (btrfs_room / "tree").mkdir()
    for arguments in (["create", "tree/sub"], ["snapshot", "-r", "tree/sub", "tree/read-only"]):
        subprocess.run(["btrfs", "subvolume", *arguments], cwd=btrfs_room, check=True, stdout=subprocess.DEVNULL)
        (btrfs_room / "tree" / "sub" / "file").write_text("x" * 100)
    assert measure(btrfs_room / "tree").inodes >= 5
    trees.remove_tree(descriptor, "tree")
    assert os.listdir(btrfs_room) == []
    os.close(descriptor)


def set_flags(path, flags):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        inode_flags.write_flags(descriptor, inode_flags.read_flags(descriptor) | flags)
    except OSError as error:
        if error.errno in inode_flags.NO_FLAGS_HERE:
            pytest.skip(f"the filesystem of the tests has no inode flags: {error}")
        raise
    finally:
        os.close(descriptor)
