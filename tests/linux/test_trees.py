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
from csi_driver.linux import inode_flags, tree_removal, trees
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


def measure_with_room_for(tree, most_open):
    descriptor = open_directory(tree)
    try:
        return trees.measure_tree(descriptor, deadline=soon(), most_open=most_open)
    finally:
        os.close(descriptor)


def link_files(tree, count, *folders):
    """Make files, each with a name in every folder."""
    for folder in folders:
        folder.mkdir(parents=True)
    for number in range(count):
        (folders[0] / str(number)).write_bytes(bytes(4096))
        for folder in folders[1:]:
            os.link(folders[0] / str(number), folder / str(number))
    return tree


@pytest.mark.parametrize("most_open", [0, 1, 19, 20])
def test_hard_links_count_once_however_few_are_kept_in_mind(tmp_path, most_open):
    tree = link_files(tmp_path / "linked", 20, *(tmp_path / "linked" / name for name in ("one", "two", "three")))
    usage = measure_with_room_for(tree, most_open)
    assert (usage.bytes, usage.inodes) == du(tree)
    assert usage.complete


def test_hard_links_into_other_trees_count_whole_or_the_count_is_a_floor(tmp_path):
    tree = link_files(tmp_path / "linked", 20, tmp_path / "linked" / "here", tmp_path / "there")
    exact, floor = measure_with_room_for(tree, 20), measure_with_room_for(tree, 19)
    assert (exact.bytes, exact.inodes, exact.complete) == (*du(tree), True)
    assert not floor.complete
    assert floor.inodes <= exact.inodes


def test_hard_links_of_which_no_other_name_was_met_take_no_more_memory_than_is_kept_for_them(tmp_path):
    tree = link_files(tmp_path / "linked", 3000, tmp_path / "linked" / "one", tmp_path / "linked" / "two")
    peaks = []
    for most_open in (100, 3000):
        tracemalloc.start()
        try:
            assert measure_with_room_for(tree, most_open).inodes == 3003
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] > 2000 * 100


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
    tree_removal.remove_tree(descriptor, "tree")
    assert not tree.exists()
    assert du(outside) == before
    tree_removal.remove_tree(descriptor, "tree")  # a second time there is nothing to do


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
    tree_removal.remove_tree(descriptor, "x")
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
    tree_removal.remove_tree(descriptor, "tree")
    assert os.listdir(path) == []


@pytest.mark.root
def test_flags_of_the_parent_are_not_ours_to_clear(room):
    path, descriptor = room
    (path / "tree" / "a").mkdir(parents=True)
    set_flags(path, inode_flags.IMMUTABLE)
    try:
        with pytest.raises(PermissionError):
            tree_removal.remove_tree(descriptor, "tree")
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
    remove_as_nobody(path)
    assert os.listdir(path) == []


def remove_as_nobody(path, ending="tree_removal.remove_tree(d, 'tree')"):
    """Remove `tree` in a directory without any right of root's."""
    code = (
        "import os, sys\nfrom csi_driver.linux import tree_removal\nd = os.open(sys.argv[1], os.O_RDONLY)\n"
        f"os.setgroups([]); os.setgid(65534); os.setuid(65534)\n{ending}"
    )
    return subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True)


@pytest.mark.root
def test_sticky_directories_that_are_ours_do_not_stop_a_removal(room):
    path, _ = room
    for folder in (path, path / "tree", path / "tree" / "tmp", path / "tree" / "tmp" / "deeper"):
        folder.mkdir(exist_ok=True)
        os.chown(folder, 65534, 65534)
        folder.chmod(0o1777)
        (folder / "others").touch()
    (path / "others").unlink()
    (path / "tree" / "tmp" / "flagged").touch()
    set_flags(path / "tree" / "tmp" / "flagged", inode_flags.IMMUTABLE)
    tree_removal.remove_tree(room[1], "tree")
    assert os.listdir(path) == []


@pytest.mark.root
def test_what_cannot_be_removed_keeps_nothing_else_and_is_told_of_with_the_first_and_how_many(room):
    path, descriptor = room
    tree = furnish(path / "tree")
    # Others' files in others' sticky directories: nobody without CAP_FOWNER may remove them, or change the directory.
    for folder in (tree / "a", tree / "sub" / "b"):
        folder.mkdir()
        for number in range(1200):  # more than a removal goes back for when a directory is filled meanwhile
            (folder / f"{number}").touch()
        folder.chmod(0o1777)
    for folder in (path, tree, tree / "sub", tree / "sub" / "deeper"):
        os.chown(folder, 65534, 65534)
    ending = (
        "steps = []\ntry: tree_removal.remove_tree(d, 'tree', should_stop=lambda: bool(steps.append(1)))\n"
        "except PermissionError as error: print(len(steps), error)"
    )
    said = remove_as_nobody(path, ending).stdout
    steps, _, told = said.partition(" ")
    assert "(2400 cannot be removed, the first is 'tree/" in told
    assert sorted(str(left.relative_to(tree)) for left in tree.rglob("*") if left.is_dir()) == ["a", "sub", "sub/b"]
    assert len(list(tree.rglob("*"))) == 3 + 2400
    assert int(steps) < 2450, "each entry is tried once"
    tree_removal.remove_tree(descriptor, "tree")
    assert os.listdir(path) == []


@pytest.mark.root
def test_what_is_filled_beside_what_cannot_be_removed_goes_all_the_same(room, monkeypatch):
    path, descriptor = room
    (path / "tree" / "held").mkdir(parents=True)
    (path / "tree" / "filled").mkdir()
    (path / "tree" / "held" / "file").touch()
    unlink, rmdir = os.unlink, os.rmdir

    def refusing(name, **where):
        if name == b"file":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        unlink(name, **where)

    def refilling(name, **where):
        if name == b"filled" and not refilled:
            refilled.append((path / "tree" / "filled" / "late").touch())
        rmdir(name, **where)

    refilled = []
    monkeypatch.setattr(os, "unlink", refusing)
    monkeypatch.setattr(os, "rmdir", refilling)
    with pytest.raises(PermissionError, match=r"\(1 cannot be removed, the first is 'tree/held/file'\)"):
        tree_removal.remove_tree(descriptor, "tree")
    assert refilled
    assert os.listdir(path / "tree") == ["held"]


def test_a_server_that_is_away_ends_a_removal_at_once(room, monkeypatch):
    path, descriptor = room
    furnish(path / "tree")
    asked = []

    def away(name, **_where):
        asked.append(name)
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT), name)

    monkeypatch.setattr(os, "unlink", away)
    with pytest.raises(TimeoutError):
        tree_removal.remove_tree(descriptor, "tree")
    assert len(asked) == 1


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
            tree_removal.remove_tree(descriptor, "tree")
        assert "2 mounted below it" in str(caught.value)
        assert du(foreign) == before
        assert os.listdir(tree) == ["sub"]
        assert sorted(os.listdir(tree / "sub")) == ["mounted", "mounted-file"]
    finally:
        subprocess.run(["umount", tree / "sub" / "mounted", tree / "sub" / "mounted-file"], check=True)
    tree_removal.remove_tree(descriptor, "tree")
    assert not tree.exists()


def test_a_removal_stops_when_told_and_can_be_done_again(room):
    path, descriptor = room
    furnish(path / "tree")
    asked = []
    with pytest.raises(WalkStopped):
        tree_removal.remove_tree(descriptor, "tree", should_stop=lambda: len(asked) > 2 or asked.append(1))
    assert (path / "tree").exists()
    tree_removal.remove_tree(descriptor, "tree")
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
    tree_removal.remove_tree(descriptor, "tree")
    thread.join()
    assert os.listdir(path) == []


def test_deep_branches_that_part_far_down_are_measured_and_removed(room):
    path, descriptor = room
    for branch in ("x", "y", "z"):
        # They part 75 levels down, where the first levels are closed already; each goes 70 further.
        (path / "/".join(["a"] * 75) / "/".join([branch] * 70)).mkdir(parents=True)
    assert measure(path).inodes == 1 + 75 + 3 * 70
    tree_removal.remove_tree(descriptor, "a")
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
        tree_removal.remove_tree(descriptor, "nested-directory")
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
        tree_removal.remove_tree(descriptor, "tree")
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
    tree_removal.remove_tree(descriptor, "tree")
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
