import os
import random
import subprocess
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.linux import mountinfo
from csi_driver.linux.mountinfo import (
    Mount,
    mounts_at,
    mounts_below,
    parse_line,
    read_mounts,
    topmost_mount_at,
    unescape,
    visible_stack,
)

AWKWARD = ["with space", "tab\tand\nnewline", "back\\slash", r"fake\040escape", "#hash", "雪 ünï", "-", "a,b", b"\xff\xfe"]


def kernels_escape(name):
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else bytes([byte]) for byte in name)


def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)


def test_a_line_is_parsed_into_every_field():
    line = rb"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:7 - ext3 /dev/root ro,errors=continue"
    assert parse_line(line) == Mount(
        mount_id=36,
        parent_id=35,
        device="98:0",
        root="/mnt1",
        mount_point="/mnt2",
        options=frozenset({"rw", "noatime"}),
        propagation=frozenset({"master:1", "shared:7"}),
        fs_type="ext3",
        source="/dev/root",
        super_options=frozenset({"ro", "errors=continue"}),
    )


def test_an_empty_source_and_a_mount_point_called_dash_are_not_mistaken_for_field_borders():
    parsed = parse_line(b"36 35 0:9 / - rw - tmpfs  rw")
    assert (parsed.mount_point, parsed.source, parsed.propagation) == ("-", "", frozenset())


@pytest.mark.parametrize(
    "line", [b"", b"36 35 98:0 / /mnt rw", b"x y 98:0 / /mnt rw - ext4 a rw", b"36 35 98:0 / /mnt rw - ext4"]
)
def test_a_line_of_another_shape_is_an_error_and_not_an_omission(line):
    with pytest.raises(ValueError, match="mountinfo is not understood"):
        parse_line(line)


@pytest.mark.parametrize(("options", "super_options", "read_only"), [("ro", "rw", 1), ("rw", "ro", 1), ("rw", "rw", 0)])
def test_a_mount_is_read_only_by_itself_or_by_its_filesystem(options, super_options, read_only):
    assert parse_line(f"1 2 0:9 / /m {options} - tmpfs t {super_options}".encode()).read_only == bool(read_only)


@given(st.binary(min_size=1).filter(lambda name: b"\0" not in name))
def test_every_name_comes_back_from_the_kernels_escapes(name):
    assert os.fsencode(unescape(kernels_escape(name))) == name


@given(st.binary(min_size=1), st.binary(min_size=1))
def test_no_name_breaks_out_of_its_field(root, mount_point):
    line = b"36 35 98:0 %s %s rw - ext4 src rw" % (kernels_escape(root), kernels_escape(mount_point))
    parsed = parse_line(line)
    assert (os.fsencode(parsed.root), os.fsencode(parsed.mount_point), parsed.fs_type) == (root, mount_point, "ext4")


@pytest.mark.root
@pytest.mark.parametrize("name", AWKWARD)
def test_a_real_mount_with_an_awkward_name_is_found_by_that_name(mount_room, name):
    name = os.fsdecode(name)
    point, source = mount_room / name, mount_room / (name + "2")
    point.mkdir()
    source.mkdir()
    mount("--bind", source, point)
    found = topmost_mount_at(point)
    assert (found.mount_point, found.root) == (str(point), f"/{name}2")
    assert topmost_mount_at(source) is None


@pytest.mark.root
def test_every_mount_of_this_machine_is_understood():
    with open("/proc/self/mountinfo", "rb") as table:
        lines = table.read().splitlines()
    assert len(read_mounts()) == len(lines) > 3


@pytest.mark.root
def test_a_stack_is_listed_bottom_to_top_and_the_top_is_what_is_seen(mount_room):
    for size in (1, 2, 3):
        mount("-t", "tmpfs", "-o", f"size={size}m", f"layer{size}", mount_room)
    stack = mounts_at(mount_room)
    assert [layer.source for layer in stack] == ["room", "layer1", "layer2", "layer3"]
    assert topmost_mount_at(mount_room).device == device_of(mount_room)
    for _ in range(3):
        subprocess.run(["umount", mount_room], check=True)


@pytest.mark.root
def test_an_older_mount_moved_onto_a_newer_one_is_the_topmost(mount_room):
    elsewhere, target = mount_room / "elsewhere", mount_room / "target"
    elsewhere.mkdir()
    target.mkdir()
    mount("-t", "tmpfs", "older", elsewhere)
    mount("-t", "tmpfs", "newer", target)
    mount("--move", elsewhere, target)
    assert [layer.source for layer in mounts_at(target)] == ["newer", "older"]
    assert topmost_mount_at(target).device == device_of(target)


@pytest.mark.root
def test_a_mount_hidden_by_one_on_its_parent_is_not_seen(mount_room):
    target = mount_room / "parent" / "target"
    target.mkdir(parents=True)
    mount("-t", "tmpfs", "hidden", target)
    mount("-t", "tmpfs", "cover", target.parent)
    assert topmost_mount_at(target) is None
    target.mkdir()
    assert topmost_mount_at(target) is None
    mount("-t", "tmpfs", "seen", target)
    assert [layer.source for layer in mounts_at(target)] == ["seen"]


@pytest.mark.root
def test_a_mount_hidden_by_an_older_one_that_was_moved_over_it_is_not_seen(mount_room):
    target, elsewhere = mount_room / "parent" / "target", mount_room / "elsewhere"
    target.mkdir(parents=True)
    elsewhere.mkdir()
    mount("-t", "tmpfs", "older", elsewhere)
    mount("-t", "tmpfs", "hidden", target)
    mount("--move", elsewhere, target.parent)
    assert not target.exists()
    assert topmost_mount_at(target) is None
    assert topmost_mount_at(target.parent).source == "older"


def table(*rows):
    return [
        parse_line(f"{mount_id} {parent} 0:9 / {point} rw - tmpfs {mount_id} rw".encode()) for mount_id, parent, point in rows
    ]


@pytest.mark.parametrize("parent_of_root", [1, 20])
def test_the_walk_starts_where_the_parent_is_unknown_or_itself(parent_of_root):
    mounts = table((30, 20, "/a"), (20, parent_of_root, "/"), (31, 30, "/a/b"))
    assert [mount.mount_id for mount in visible_stack(mounts, "/a/b")] == [31]
    assert [mount.mount_id for mount in visible_stack(mounts, "/")] == [20]


def test_in_a_chroot_that_is_no_mount_point_the_mounts_below_it_are_found():
    mounts = table((30, 20, "/proc"), (31, 20, "/a"), (32, 31, "/a"))
    assert [mount.mount_id for mount in visible_stack(mounts, "/a")] == [31, 32]
    assert visible_stack(mounts, "/") == ()


def test_a_torn_table_whose_parents_form_a_ring_ends_the_walk():
    mounts = table((20, 1, "/"), (30, 20, "/a"), (31, 30, "/a"), (30, 31, "/a"))
    assert len(visible_stack(mounts, "/a")) <= 3


@pytest.mark.root
def test_a_symlinked_parent_is_resolved_and_a_symlink_at_the_end_is_not(mount_room):
    target = mount_room / "real" / "target"
    target.mkdir(parents=True)
    mount("-t", "tmpfs", "mine", target)
    (mount_room / "way").symlink_to("real")
    (mount_room / "link").symlink_to("real/target")
    assert topmost_mount_at(mount_room / "way" / "target").source == "mine"
    assert topmost_mount_at(str(target) + "/").source == "mine"
    assert topmost_mount_at(mount_room / "link") is None
    assert topmost_mount_at(mount_room / "no" / "such" / "directory") is None


@pytest.mark.parametrize("path", ["relative", "relative/name", "", "/tmp/..", "/tmp/."])
def test_a_path_that_names_nothing_absolute_is_refused(path):
    with pytest.raises(ValueError, match="not an absolute path"):
        topmost_mount_at(path)


def test_the_root_of_everything_is_a_mount():
    assert topmost_mount_at("/").device == device_of("/")


@pytest.mark.root
def test_mounts_below_are_listed_deepest_last_without_the_mount_itself_and_its_neighbours(mount_room):
    for name in ("a", "a/b", "ab"):
        (mount_room / name).mkdir()
        mount("-t", "tmpfs", name, mount_room / name)
    below = [mount.source for mount in mounts_below(mount_room)]
    assert (set(below[:2]), below[2:]) == ({"a", "ab"}, ["a/b"])
    assert [mount.source for mount in mounts_below(mount_room / "a")] == ["a/b"]
    assert mounts_below(mount_room / "a" / "b") == ()


@pytest.mark.root
def test_a_removed_source_is_told_from_one_that_only_looks_so(mount_room):
    gone, lookalike = mount_room / "gone", mount_room / "x (deleted)"
    for source in (gone, lookalike):
        source.mkdir()
        (mount_room / (source.name + " point")).mkdir()
        mount("--bind", source, mount_room / (source.name + " point"))
    gone.rmdir()
    assert topmost_mount_at(mount_room / "gone point").root == "/gone//deleted"
    assert topmost_mount_at(mount_room / "gone point").root_deleted
    assert not topmost_mount_at(mount_room / "x (deleted) point").root_deleted


@pytest.mark.root
def test_a_dead_filesystem_is_described_without_being_asked(dead_filesystem):
    started = time.monotonic()
    assert topmost_mount_at(dead_filesystem.path).fs_type == "fuse"
    assert mounts_below(dead_filesystem.path) == ()
    assert time.monotonic() - started < 5


@pytest.mark.root
def test_mounts_that_stand_still_are_never_missed_in_a_storm(mount_room):
    # Enough for several pages of mountinfo, so that the kernel lets go of its lock in between.
    still = [mount_room / f"still-{number}-{'x' * 100}" for number in range(60)]
    stormy = [mount_room / f"storm-{number}" for number in range(8)]
    for directory in still + stormy:
        directory.mkdir()
    for directory in still:
        mount("--bind", mount_room, directory)
    stop = threading.Event()

    def storm():
        libc, chooser = mountinfo_libc(), random.Random(1)
        while not stop.is_set():
            target = os.fsencode(chooser.choice(stormy))
            libc.mount(os.fsencode(mount_room), target, None, 4096, None)
            libc.umount2(target, 2)

    threads = [threading.Thread(target=storm) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            points = {mount.mount_point for mount in read_mounts()}
            assert not {str(directory) for directory in still} - points
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.root
def test_a_table_that_changes_while_it_is_read_is_known_to_be_torn(mount_room, monkeypatch):
    really_read = os.read
    target = mount_room / "target"
    target.mkdir()

    def read_while_somebody_mounts(fd, size):
        piece = really_read(fd, size)
        if not piece and not target_mounted:
            target_mounted.append(True)
            mount("-t", "tmpfs", "late", target)
        return piece

    target_mounted = []
    monkeypatch.setattr(mountinfo.os, "read", read_while_somebody_mounts)
    assert "late" in {mount.source for mount in read_mounts()}


def mountinfo_libc():
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def device_of(path):
    device = os.stat(path).st_dev
    return f"{os.major(device)}:{os.minor(device)}"
