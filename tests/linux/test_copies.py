"""Copies are compared by manifests: everything that can be asked about every entry, by name."""

import errno
import fcntl
import functools
import hashlib
import os
import resource
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager

import pytest

from csi_driver.errors import FailedPrecondition
from csi_driver.linux import beneath, copies, inode_flags, tree_removal, trees
from csi_driver.linux.carriers import Carrier, Shared
from csi_driver.linux.contents import METHODS
from csi_driver.linux.folders import Folder
from csi_driver.linux.hard_links import HardLinks, Place
from csi_driver.linux.walk import WalkStopped

MIB = 1024 * 1024
HOLEY_BYTES = 8 * MIB
# struct vfs_cap_data, revision 2: cap_net_raw, permitted and effective.
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)


def acl(*entries):
    """A POSIX ACL as system.posix_acl_* hold it: entries of (tag, permissions, id)."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


NOBODY_IN_PARTICULAR = 0xFFFFFFFF
ACCESS_ACL = acl((1, 7, NOBODY_IN_PARTICULAR), (2, 5, 4321), (4, 4, NOBODY_IN_PARTICULAR), (16, 5, NOBODY_IN_PARTICULAR), (32, 0, NOBODY_IN_PARTICULAR))  # fmt: skip


def open_directory(path):
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def copy(source, target, **keywords):
    target.mkdir(exist_ok=True)
    source_fd, target_fd = open_directory(source), open_directory(target)
    try:
        return copies.copy_tree(source_fd, target_fd, **keywords)
    finally:
        os.close(source_fd)
        os.close(target_fd)


def remove(path):
    parent = open_directory(path.parent)
    tree_removal.remove_tree(parent, path.name)
    os.close(parent)


# --- the manifest ------------------------------------------------------------------------------------------------------------------


def manifest(top):
    """Return {path: {what: value}} for the tree, times and links included; reading it changes no access time."""
    top = os.fsencode(top)
    found = {}
    first_name = {}
    pending = [b""]
    while pending:
        path = pending.pop()
        whole = os.path.join(top, path) if path else top
        status = os.lstat(whole)
        entry = {
            "type": stat.S_IFMT(status.st_mode),
            "owner": (status.st_uid, status.st_gid),
            "mode": status.st_mode & 0o1777,
            "setuid": status.st_mode & 0o6000,
            "mtime": status.st_mtime_ns,
            "atime": None if stat.S_ISLNK(status.st_mode) else status.st_atime_ns,  # reading a link may set it
            "xattrs": {
                name: os.getxattr(whole, name, follow_symlinks=False)
                for name in os.listxattr(whole, follow_symlinks=False)
                if not name.startswith("trusted.SGI_ACL")
            },
        }
        if not stat.S_ISDIR(status.st_mode):
            entry["device"] = status.st_rdev
            entry["links"] = status.st_nlink
            entry["same as"] = first_name.setdefault(status.st_ino, None)
        if stat.S_ISLNK(status.st_mode):
            entry["link"] = os.readlink(whole)
        elif stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            descriptor = os.open(whole, os.O_RDONLY | os.O_NOATIME | os.O_NOFOLLOW)
            entry["flags"] = inode_flags.read_flags(descriptor) & (
                inode_flags.HOLDING | inode_flags.NODUMP | inode_flags.NOATIME | inode_flags.SYNC | inode_flags.DIRSYNC
            )
            if stat.S_ISREG(status.st_mode):
                entry["size"] = status.st_size
                entry["content"] = hashlib.sha256(os.pread(descriptor, 64 * MIB, 0)).hexdigest()
                entry["holes"] = extents(descriptor, status.st_size)
            else:
                pending += [os.path.join(path, os.fsencode(name)) for name in os.listdir(descriptor)]
            os.close(descriptor)
        found[path] = entry
    # Which names are one inode, whatever the order they were met in.
    names = {}
    for path in sorted(found):
        if "same as" in found[path]:
            inode = os.lstat(os.path.join(top, path)).st_ino
            found[path]["same as"] = names.setdefault(inode, path)
    return found


def extents(descriptor, size):
    found, position = [], 0
    while position < size:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError:
            break
        position = os.lseek(descriptor, start, os.SEEK_HOLE)
        found.append((start, position))
    return found


def differences(one, other):
    return {
        (path, what)
        for path in one.keys() | other.keys()
        for what in one.get(path, {}).keys() | other.get(path, {}).keys()
        if one.get(path, {}).get(what) != other.get(path, {}).get(what)
    }


def build_everything(top):
    """Build a tree with every kind of thing that a copy must carry."""
    top.mkdir()
    raw = os.fsencode(top)
    (top / "directory" / "inner").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "file").write_bytes(os.urandom(300_000))
    (top / "nothing").touch()
    (top / "secret").write_text("x")
    (top / "setuid").write_bytes(b"#!")
    os.chown(top / "setuid", 1000, 1001)
    (top / "setuid").chmod(0o6755)
    (top / "secret").chmod(0o000)
    (top / "directory").chmod(0o3771)
    os.chown(top / "directory", 1002, 1003)
    with (top / "holey").open("wb") as holey:
        for start in (MIB, 5 * MIB):
            holey.seek(start)
            holey.write(os.urandom(128 * 1024))
        holey.truncate(HOLEY_BYTES)
    with (top / "all-hole").open("wb") as hole:
        hole.truncate(MIB)
    with (top / "small-holey").open("wb") as hole:
        hole.write(b"x")
        hole.seek(32768)
        hole.write(b"y")
    (top / "link").symlink_to("directory/nowhere")
    os.chown(top / "link", 1004, 1005, follow_symlinks=False)
    os.mkfifo(top / "fifo", 0o620)
    os.chown(top / "fifo", 1006, 1007)
    os.mknod(top / "char", stat.S_IFCHR | 0o640, os.makedev(1, 3))
    os.mknod(top / "block", stat.S_IFBLK | 0o640, os.makedev(7, 250))
    listener = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(top)  # sun_path is short
    listener.bind("socket")
    os.chdir(here)
    listener.close()
    os.link(top / "file", top / "directory" / "inner" / "file-again")
    os.link(top / "file", top / "zzz-file-again")
    os.link(top / "fifo", top / "directory" / "fifo-again")
    os.link(top / "link", top / "directory" / "link-again", follow_symlinks=False)
    for name in (b"new\nline", b"not utf-8 \xff\xfe", b" - \x01'\"", b"x" * 255):
        with open(os.path.join(raw, name), "wb") as file:
            file.write(name)
    # ACLs, default ones too: what is made in a directory inherits them, so the copy must not set them early.
    os.setxattr(top / "directory", "system.posix_acl_access", ACCESS_ACL)
    os.setxattr(top / "directory", "system.posix_acl_default", ACCESS_ACL)
    os.setxattr(top, "system.posix_acl_default", ACCESS_ACL)
    (top / "directory" / "inherits").touch()
    (top / "directory" / "plain").touch(mode=0o644)
    os.removexattr(top / "directory" / "plain", "system.posix_acl_access")
    (top / "directory" / "plain").chmod(0o644)
    os.setxattr(top / "file", "user.long", os.urandom(700))
    os.setxattr(top / "file", "user.empty", b"")
    os.setxattr(top, "user.of-the-top", b"1")
    os.setxattr(top / "directory", "trusted.of-root", b"\0\1")
    os.setxattr(top / "link", "trusted.of-a-link", b"l", follow_symlinks=False)
    os.setxattr(top / "setuid", "security.capability", CAPABILITY)
    os.setxattr(top / "fifo", "trusted.of-a-fifo", b"f")
    os.chown(top, 1010, 1011)
    top.chmod(0o2750)
    for number, path in enumerate(sorted(manifest(top), reverse=True)):
        os.utime(
            os.path.join(raw, path) if path else raw,
            ns=(10**18 + 111_111_111 * number, 10**18 + 7_654_321 * number + 1),
            follow_symlinks=False,
        )
    for name, flags in (("nothing", inode_flags.NODUMP), ("secret", inode_flags.IMMUTABLE | inode_flags.NOATIME)):
        set_flags(top / name, flags)
    set_flags(top / "zzz-file-again", inode_flags.APPEND)  # one inode of three names
    set_flags(top / "empty", inode_flags.IMMUTABLE)


def set_flags(path, flags):
    descriptor = os.open(path, os.O_RDONLY)
    inode_flags.write_flags(descriptor, inode_flags.read_flags(descriptor) | flags)
    os.close(descriptor)


@pytest.fixture(params=["ext4", "xfs", "btrfs", "tmpfs"])
def room(request, tmp_path):
    """A directory on each filesystem; `ext4` stands for whatever the tests run on."""
    if request.param == "ext4":
        path = tmp_path / "room"
        path.mkdir()
    else:
        path = request.getfixturevalue("mount_room" if request.param == "tmpfs" else f"{request.param}_room")
    yield path
    for entry in path.iterdir():
        remove(entry)


@pytest.fixture
def nodev_room(tmp_path):
    """A directory below which devices cannot be opened, as on a controller's NFS mount."""
    room = tmp_path / "nodev"
    room.mkdir()
    subprocess.run(["mount", "--bind", room, room], check=True)
    subprocess.run(["mount", "-o", "remount,bind,nodev", room], check=True)
    yield room
    for entry in room.iterdir():
        remove(entry)
    subprocess.run(["umount", "-l", room], check=True)


@pytest.fixture
def plain_room(tmp_path):
    yield tmp_path
    for entry in tmp_path.iterdir():
        if not os.path.ismount(entry):
            remove(entry)


# --- fidelity ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize(
    "methods", [("reflink", "copy_file_range", "copy"), ("copy_file_range",), ()], ids=["best", "range", "plain"]
)
def test_everything_survives(room, methods):
    build_everything(room / "source")
    before = manifest(room / "source")
    report = copy(room / "source", room / "target", methods=methods)
    assert differences(manifest(room / "source"), before) == set()  # access times included
    assert differences(manifest(room / "target"), before) == set()
    assert report.not_carried == {}
    assert report.files == sum(entry["type"] != stat.S_IFDIR for entry in before.values())
    assert report.directories == sum(entry["type"] == stat.S_IFDIR for entry in before.values())
    status = (room / "target" / "holey").stat()
    assert status.st_blocks * 512 < HOLEY_BYTES // 2
    best = "reflink" if room.name in {"xfs", "btrfs"} else "copy_file_range"
    assert report.method == {0: "copy", 1: "copy_file_range", 3: best}[len(methods)]


@pytest.mark.root
@pytest.mark.parametrize("workers", [1, 8])
def test_everything_survives_where_files_are_opened_by_their_names(nodev_room, workers):
    build_everything(nodev_room / "source")
    before = manifest(nodev_room / "source")
    for number in range(5):
        report = copy(nodev_room / "source", nodev_room / f"target-{number}", workers=workers)
        assert differences(manifest(nodev_room / "source"), before) == set()
        assert differences(manifest(nodev_room / f"target-{number}"), before) == set()
        assert report.not_carried == {}
        assert (report.files, report.directories) == (
            sum(entry["type"] != stat.S_IFDIR for entry in before.values()),
            sum(entry["type"] == stat.S_IFDIR for entry in before.values()),
        )


@pytest.mark.root
def test_a_crew_copies_what_differs_from_its_neighbours_in_one_thing_only(nodev_room):
    """What a new file in a directory gets is asked once for its kind: here each kind comes with every deviation."""
    source = nodev_room / "source"
    (source / "inherits").mkdir(parents=True)
    (source / "sgid").mkdir()
    os.setxattr(source / "inherits", "system.posix_acl_default", ACCESS_ACL)
    os.chown(source / "sgid", 0, 1003)
    (source / "sgid").chmod(0o2775)
    for directory in (source, source / "inherits", source / "sgid"):
        for number in range(60):
            path = directory / f"{number:02}"
            path.write_bytes(b"x" * (number % 7))
            os.chown(path, number % 3 and 1000, number % 2 and 1001)
            path.chmod((0o600, 0o644, 0o4755, 0o2755, 0o000)[number % 5])
            if number % 11 == 0:
                os.setxattr(path, "system.posix_acl_access", ACCESS_ACL)
            if number % 13 == 0:
                os.setxattr(path, "user.number", str(number).encode())
    for workers in (1, 8):
        copy(source, nodev_room / f"target-{workers}", workers=workers)
        assert differences(manifest(nodev_room / f"target-{workers}"), manifest(source)) == set()


TAKEN = {
    "file": lambda path: path.write_text("kept"),
    "file with another name": lambda path: (path.touch(), os.link(path, path.with_name("other"))),
    "directory": lambda path: path.mkdir(),
    "fifo": os.mkfifo,
    "dangling symlink": lambda path: path.symlink_to("nowhere"),
    "symlink": lambda path: ((path.with_name("other")).touch(), path.symlink_to("other")),
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
}


@pytest.mark.root
@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", TAKEN)
def test_a_name_that_is_taken_in_the_copy_is_left_as_it_is_over_a_network_too(nodev_room, what):
    """A directory that changes while it is read may yield a name twice."""
    (nodev_room / "source").mkdir()
    (nodev_room / "target").mkdir()
    (nodev_room / "source" / "name").write_text("later")
    TAKEN[what](nodev_room / "target" / "name")
    before = manifest(nodev_room / "target")
    ends = [open_directory(nodev_room / name) for name in ("source", "target")]
    shared = Shared(
        copies.Progress(),
        HardLinks(ends[1]),
        threading.Lock(),
        METHODS,
        lambda: False,
        beneath.Patience(),
        ends[0],
        over_network=True,
        openable=True,
    )
    Carrier(shared).carry(Folder(*ends, os.fstat(ends[0]), Place(b"", None)), b"name", 8, enter=False)
    assert differences(manifest(nodev_room / "target"), before) == set()
    for descriptor in ends:
        os.close(descriptor)


@pytest.mark.root
def test_a_device_in_place_of_a_file_is_opened_on_no_mount(mount_room, nodev_room):
    """As after a swap: the directory said "a file" of it."""
    for room, openable in ((mount_room, False), (nodev_room, True)):
        (room / "source").mkdir()
        (room / "target").mkdir()
        os.mknod(room / "source" / "name", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        ends = [open_directory(room / name) for name in ("source", "target")]
        assert beneath.starts_no_device(ends[0]) is openable
        if openable:
            with pytest.raises(PermissionError):
                beneath.open_file(ends[0], b"name")
        links = HardLinks(ends[1])
        shared = Shared(
            copies.Progress(), links, threading.Lock(), METHODS, lambda: False, beneath.Patience(), ends[0], openable=openable
        )
        Carrier(shared).carry(Folder(*ends, os.fstat(ends[0]), Place(b"", None)), b"name", 8, enter=False)
        assert stat.S_ISCHR((room / "target" / "name").stat().st_mode)
        for descriptor in ends:
            os.close(descriptor)


@pytest.mark.root
def test_everything_survives_a_change_of_filesystem(plain_room, xfs_room):
    build_everything(plain_room / "source")
    report = copy(plain_room / "source", xfs_room / "target")
    assert report.method == "copy"
    assert report.not_carried == {}
    ours, theirs = manifest(plain_room / "source"), manifest(xfs_room / "target")
    assert {what for _, what in differences(ours, theirs)} <= {"holes"}  # block sizes differ in how they keep them
    assert (xfs_room / "target" / "holey").stat().st_blocks * 512 < HOLEY_BYTES // 2
    remove(xfs_room / "target")


SABOTAGE = {
    "owner": ("owner", lambda top: os.chown(top / "fifo", 0, 1007)),
    "owner of a link": ("owner", lambda top: os.chown(top / "link", 0, 0, follow_symlinks=False)),
    "mode": ("mode", lambda top: (top / "directory").chmod(0o3770)),
    "sticky bit": ("mode", lambda top: (top / "directory").chmod(0o2771)),
    "setuid": ("setuid", lambda top: (top / "setuid").chmod(0o2755)),
    "setgid of the top": ("setuid", lambda top: top.chmod(0o750)),
    "mtime": ("mtime", lambda top: shift_mtime(top / "small-holey")),
    "mtime of a directory": ("mtime", lambda top: shift_mtime(top / "directory" / "inner")),
    "mtime of a link": ("mtime", lambda top: shift_mtime(top / "link")),
    "atime": ("atime", lambda top: os.utime(top / "holey", ns=(1, (top / "holey").stat().st_mtime_ns))),
    "access ACL": ("xattrs", lambda top: os.removexattr(top / "directory", "system.posix_acl_access")),
    "default ACL": ("xattrs", lambda top: os.removexattr(top, "system.posix_acl_default")),
    "inherited ACL": ("xattrs", lambda top: os.setxattr(top / "directory/plain", "system.posix_acl_access", ACCESS_ACL)),
    "user attribute": ("xattrs", lambda top: os.removexattr(top, "user.of-the-top")),
    "trusted attribute": ("xattrs", lambda top: os.removexattr(top / "directory", "trusted.of-root")),
    "attribute of a link": ("xattrs", lambda top: os.removexattr(top / "link", "trusted.of-a-link", follow_symlinks=False)),
    "capability": ("xattrs", lambda top: os.removexattr(top / "setuid", "security.capability")),
    "hard link": ("same as", lambda top: replace(top / "directory" / "fifo-again", os.mkfifo)),
    "hard link of a link": (
        "same as",
        lambda top: replace(top / "directory" / "link-again", lambda path: path.symlink_to("x")),
    ),
    "holes": ("holes", lambda top: fill(top / "holey")),
    "link": ("link", lambda top: replace(top / "link", lambda path: path.symlink_to("directory/elsewhere"))),
    "fifo": ("type", lambda top: replace(top / "fifo", lambda path: path.touch())),
    "device": (
        "device",
        lambda top: replace(top / "char", lambda path: os.mknod(path, stat.S_IFCHR | 0o640, os.makedev(1, 5))),
    ),
    "socket": ("type", lambda top: (top / "socket").unlink()),
    "content": ("content", lambda top: overwrite(top / "small-holey")),
    "name with a newline": ("type", lambda top: (top / "new\nline").unlink()),
    "name that is not UTF-8": ("type", lambda top: os.unlink(os.path.join(os.fsencode(top), b"not utf-8 \xff\xfe"))),
    "empty directory": ("type", lambda top: remove(top / "empty")),
    "inode flags": ("flags", lambda top: clear_flags(top / "nothing")),
    "immutable flag": ("flags", lambda top: clear_flags(top / "secret")),
    "flag of a hard link": ("flags", lambda top: clear_flags(top / "file")),
}


def shift_mtime(path):
    status = path.lstat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1), follow_symlinks=False)


def replace(path, make):
    path.unlink()
    make(path)


def fill(path):
    with path.open("r+b") as file:
        file.write(bytes(MIB))


def overwrite(path):
    with path.open("r+b") as file:
        file.write(b"z")


def clear_flags(path):
    descriptor = os.open(path, os.O_RDONLY)
    kept = inode_flags.read_flags(descriptor) & ~(inode_flags.HOLDING | inode_flags.NODUMP | inode_flags.NOATIME)
    inode_flags.write_flags(descriptor, kept)
    os.close(descriptor)


@pytest.mark.root
@pytest.mark.parametrize("dropped", SABOTAGE)
def test_the_comparison_notices_when_one_thing_is_dropped(plain_room, dropped):
    build_everything(plain_room / "source")
    copy(plain_room / "source", plain_room / "target")
    what, drop = SABOTAGE[dropped]
    before = manifest(plain_room / "source")
    assert differences(manifest(plain_room / "target"), before) == set()
    drop(plain_room / "target")
    assert what in {kind for _, kind in differences(manifest(plain_room / "target"), before)}


@pytest.mark.root
def test_what_inherits_acls_in_the_target_is_the_target_alone(plain_room):
    (plain_room / "source" / "sub").mkdir(parents=True)
    (plain_room / "source" / "file").touch()
    (plain_room / "target").mkdir()
    for kind in ("access", "default"):
        os.setxattr(plain_room / "target", f"system.posix_acl_{kind}", ACCESS_ACL)
    copy(plain_room / "source", plain_room / "target")
    assert differences(manifest(plain_room / "target"), manifest(plain_room / "source")) == set()


# --- what cannot be carried, and what must fail ------------------------------------------------------------------------------------------


@pytest.mark.root
def test_what_the_target_cannot_take_is_counted_by_kind(plain_room, mount_room):
    source = plain_room / "source"
    source.mkdir()
    (source / "file").write_text("x")
    os.setxattr(source / "file", "user.one", b"1")
    os.setxattr(source / "file", "user.two", b"2")
    os.setxattr(source / "file", "trusted.three", b"3")
    os.link(source / "file", source / "again")
    (source / "vfat").mkdir()
    os.mkfifo(source / "vfat" / "fifo")
    (source / "vfat" / "link").symlink_to("x")
    image = mount_room / "image"
    image.write_bytes(bytes(8 * MIB))
    make = next((path for path in ("/usr/sbin/mkfs.minix", "/sbin/mkfs.minix") if os.path.exists(path)), None)
    (mount_room / "minix").mkdir()
    minix = make and subprocess.run([make, "-3", image], capture_output=True, check=False).returncode == 0
    if (
        not minix
        or subprocess.run(["mount", "-o", "loop", image, mount_room / "minix"], capture_output=True, check=False).returncode
    ):
        # ramfs: no attributes either, and in every kernel.
        subprocess.run(["mount", "-t", "ramfs", "ramfs", mount_room / "minix"], check=True)
    report = copy(source, mount_room / "minix" / "target")
    assert report.not_carried == {"xattr user": 2, "xattr trusted": 1}
    assert (mount_room / "minix" / "target" / "again").stat().st_nlink == 2
    subprocess.run(["umount", mount_room / "minix"], check=True)


@pytest.mark.root
def test_a_mount_point_in_the_source_is_left_out_and_counted(plain_room):
    (plain_room / "source" / "mounted").mkdir(parents=True)
    (plain_room / "source" / "mounted-file").touch()
    (plain_room / "foreign").mkdir()
    (plain_room / "foreign" / "secret").write_text("x")
    subprocess.run(["mount", "--bind", plain_room / "foreign", plain_room / "source/mounted"], check=True)
    subprocess.run(["mount", "--bind", plain_room / "foreign/secret", plain_room / "source/mounted-file"], check=True)
    try:
        report = copy(plain_room / "source", plain_room / "target")
    finally:
        subprocess.run(["umount", plain_room / "source/mounted", plain_room / "source/mounted-file"], check=True)
    assert report.not_carried == {"mount point": 2}
    assert os.listdir(plain_room / "target") == []


# In a process of its own: one that hangs on a dead server cannot be interrupted.
AROUND_A_DEAD_SERVER = """
import os, sys, time
from csi_driver.errors import FailedPrecondition
from csi_driver.linux import copies, tree_removal, trees
source, target, parent = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in sys.argv[1:])
assert trees.measure_tree(source, deadline=time.monotonic() + 20).complete
assert copies.copy_tree(source, target).not_carried == {"mount point": 1}
try:
    tree_removal.remove_tree(parent, os.path.basename(sys.argv[1]))
except FailedPrecondition as error:
    assert "mounted" in str(error)
else:
    sys.exit("removed")
"""


@pytest.mark.root
def test_a_dead_filesystem_mounted_in_a_tree_hangs_nothing(plain_room, dead_filesystem):
    source = dead_filesystem.path.parent
    (source / "file").write_text("x")
    (plain_room / "target").mkdir()
    arguments = [sys.executable, "-c", AROUND_A_DEAD_SERVER, source, plain_room / "target", source.parent]
    child = subprocess.Popen(arguments)
    try:
        assert child.wait(timeout=20) == 0
    finally:
        dead_filesystem.give_up()
        child.kill()
        child.wait()


@pytest.mark.root
def test_a_full_target_fails(plain_room, mount_room):
    subprocess.run(["mount", "-o", "remount,size=1m", mount_room], check=True)
    (plain_room / "source").mkdir()
    (plain_room / "source" / "file").write_bytes(os.urandom(4 * MIB))
    with pytest.raises(OSError) as caught:
        copy(plain_room / "source", mount_room / "target")
    assert caught.value.errno == errno.ENOSPC


def test_a_target_that_holds_something_is_refused(plain_room):
    (plain_room / "source").mkdir()
    (plain_room / "target").mkdir()
    (plain_room / "target" / "theirs").write_text("kept")
    with pytest.raises(OSError) as caught:
        copy(plain_room / "source", plain_room / "target")
    assert caught.value.errno == errno.ENOTEMPTY
    assert (plain_room / "target" / "theirs").read_text() == "kept"


def test_a_copy_stops_between_entries_and_inside_a_large_file(plain_room):
    (plain_room / "source").mkdir()
    (plain_room / "source" / "file").write_bytes(bytes([1]) * (40 * MIB))
    for methods in (("copy_file_range",), ()):
        progress = copies.Progress()
        with pytest.raises(WalkStopped):
            copy(
                plain_room / "source",
                plain_room / "target",
                methods=methods,
                progress=progress,
                should_stop=lambda p=progress: p.bytes > 0,
            )
        assert 0 < progress.bytes < 40 * MIB
        remove(plain_room / "target")


@contextmanager
def leased(paths):
    """Hold write leases on files and never give them back."""
    told = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel's request to do so
    held = [os.open(path, os.O_RDWR) for path in paths]
    try:
        for descriptor in held:
            fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        signal.signal(signal.SIGIO, told)


@pytest.mark.parametrize("workers", [1, 8])
def test_a_copy_waits_for_write_leases_once_however_many_files_have_them(plain_room, workers):
    source = plain_room / "source"
    source.mkdir()
    for number in range(20):
        (source / f"{number:02}").write_bytes(b"content")
    began = time.monotonic()
    with leased(source.iterdir()), pytest.raises(BlockingIOError) as refused:
        copy(source, plain_room / "target", workers=workers, patience=beneath.Patience(1.0))
    assert 0.9 < time.monotonic() - began < 10
    assert (source / refused.value.filename).exists()


def test_a_file_that_grows_is_copied_up_to_where_it_was(plain_room):
    (plain_room / "source").mkdir()
    log = plain_room / "source" / "log"
    log.write_bytes(bytes([1]) * (2 * MIB))

    def grow():
        with log.open("ab") as file:
            file.write(bytes([2]) * MIB)
        return False

    for methods in (("copy_file_range",), ()):
        size = log.stat().st_size
        asked = iter([False, True, True, True, True, True, True, True, True, True])

        def should_stop(asked=asked):
            return next(asked, False) and grow()

        report = copy(plain_room / "source", plain_room / "target", methods=methods, should_stop=should_stop)
        assert report.bytes == (plain_room / "target" / "log").stat().st_size == size
        assert log.stat().st_size > size
        remove(plain_room / "target")


def test_a_file_that_shrinks_is_copied_as_far_as_it_goes(plain_room):
    (plain_room / "source").mkdir()
    log = plain_room / "source" / "log"
    for methods in (("copy_file_range",), ()):
        log.write_bytes(bytes([1]) * (40 * MIB))
        asked = []

        def should_stop(asked=asked):
            asked.append(1)
            if len(asked) == 3:
                os.truncate(log, 30 * MIB + 5)
            return False

        report = copy(plain_room / "source", plain_room / "target", methods=methods, should_stop=should_stop)
        assert (plain_room / "target" / "log").read_bytes() == bytes([1]) * (30 * MIB + 5)
        assert report.bytes == 30 * MIB + 5
        remove(plain_room / "target")


@pytest.mark.root
def test_a_file_without_copy_on_write_stays_so_and_shares_its_extents(btrfs_room):
    (btrfs_room / "source").mkdir()
    (btrfs_room / "source" / "database").touch()
    set_flags(btrfs_room / "source" / "database", inode_flags.NOCOW)
    (btrfs_room / "source" / "database").write_bytes(os.urandom(MIB))
    report = copy(btrfs_room / "source", btrfs_room / "target")
    assert report.method == "reflink"
    descriptor = os.open(btrfs_room / "target" / "database", os.O_RDONLY)
    assert inode_flags.read_flags(descriptor) & inode_flags.NOCOW
    os.close(descriptor)


@pytest.mark.root
def test_the_top_stays_movable_when_the_source_is_immutable(plain_room):
    (plain_room / "source").mkdir()
    (plain_room / "source" / "file").touch()
    set_flags(plain_room / "source", inode_flags.IMMUTABLE)
    report = copy(plain_room / "source", plain_room / "target")
    assert report.not_carried == {"inode flags": 1}
    (plain_room / "target").rename(plain_room / "moved")


# --- holes that nobody tells of ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def untold_holes(monkeypatch):
    """What NFS before 4.2 answers to SEEK_DATA and SEEK_HOLE: all is data, up to the end."""
    seek = os.lseek

    def tell_nothing(descriptor, position, how):
        if how == os.SEEK_DATA:
            return position
        return os.fstat(descriptor).st_size if how == os.SEEK_HOLE else seek(descriptor, position, how)

    monkeypatch.setattr(os, "lseek", tell_nothing)


SPARSE = {
    "both ends": {0: 10_000, 32 * MIB - 3: 5000, 64 * MIB - 5000: 5000},
    "the middle": {20 * MIB + 1: 4096},
    "a beginning": {0: 1},
    "nothing": {},
    "a whole piece": {5 * MIB: MIB},
}


@pytest.mark.parametrize("workers", [1, 4])
def test_holes_that_nobody_tells_of_stay_holes(plain_room, untold_holes, workers):
    size = 64 * MIB
    (plain_room / "source").mkdir()
    for name, places in SPARSE.items():
        with (plain_room / "source" / name).open("wb") as file:
            for start, length in places.items():
                file.seek(start)
                file.write(os.urandom(length))
            file.truncate(size)
    report = copy(plain_room / "source", plain_room / "target", methods=("copy_file_range",), workers=workers)
    assert report.method == "copy"
    allowed = sum(length + 2 * 4096 for places in SPARSE.values() for length in places.values())
    assert report.bytes <= allowed
    for name in SPARSE:
        ends = [(plain_room / where / name) for where in ("source", "target")]
        assert ends[1].stat().st_size == size
        assert ends[1].stat().st_blocks <= ends[0].stat().st_blocks
        assert ends[0].read_bytes() == ends[1].read_bytes()


def test_reading_zeros_stops_when_it_shall(plain_room, untold_holes):
    (plain_room / "source").mkdir()
    with (plain_room / "source" / "hole").open("wb") as file:
        file.truncate(64 * MIB)
    asked = []
    with pytest.raises(WalkStopped):
        copy(plain_room / "source", plain_room / "target", should_stop=lambda: asked.append(1) or len(asked) > 10)
    assert len(asked) == 11


def test_a_file_with_untold_holes_that_shrinks_is_copied_as_far_as_it_goes(plain_room, untold_holes):
    (plain_room / "source").mkdir()
    hole = plain_room / "source" / "hole"
    with hole.open("wb") as file:
        file.truncate(64 * MIB)
    asked = []
    copy(
        plain_room / "source",
        plain_room / "target",
        should_stop=lambda: asked.append(1) or (len(asked) == 10 and os.truncate(hole, 30 * MIB + 5)),
    )
    assert (plain_room / "target" / "hole").stat().st_size == 30 * MIB + 5


@pytest.mark.root
@pytest.mark.timeout(60)
@pytest.mark.parametrize("workers", [1, 4])
def test_a_file_of_untold_holes_larger_than_the_disk_is_refused_by_name(mount_room, untold_holes, workers):
    room = os.statvfs(mount_room)
    size = room.f_blocks * room.f_frsize + 1
    (mount_room / "source" / "below").mkdir(parents=True)
    with (mount_room / "source" / "below" / "absurd").open("wb") as file:
        file.truncate(size)
    with pytest.raises(FailedPrecondition, match=rf"'below/absurd'.* {size} bytes .*4\.2"):
        copy(mount_room / "source", mount_room / "target", workers=workers)


# --- size --------------------------------------------------------------------------------------------------------------------------


def test_a_tree_deeper_than_any_path_is_copied_with_its_hard_links(plain_room):
    (plain_room / "source").mkdir()
    here = open_directory(plain_room / "source")
    first = os.open("first", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=here)
    os.write(first, b"linked")
    depth = 2000
    for level in range(depth):
        name = f"directory-{level}"
        os.mkdir(name, dir_fd=here)
        below = os.open(name, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
        if level % 500 == 499:
            os.link(f"/proc/self/fd/{first}", "again", dst_dir_fd=here, follow_symlinks=True)
            os.close(os.open("file", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=here))
    # Two names that only meet deep down, so that the first copy has to be found again there.
    deep = os.open("file-a", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=here)
    os.mkdir("z", dir_fd=here)
    bottom = os.open("z", os.O_RDONLY, dir_fd=here)
    os.link(f"/proc/self/fd/{deep}", "file-b", dst_dir_fd=bottom, follow_symlinks=True)
    for descriptor in (here, first, deep, bottom):
        os.close(descriptor)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        report = copy(plain_room / "source", plain_room / "target")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert report.not_carried == {}
    assert report.directories == depth + 2
    usages = []
    for name in ("source", "target"):
        descriptor = open_directory(plain_room / name)
        usages.append(trees.measure_tree(descriptor, deadline=time.monotonic() + 60))
        os.close(descriptor)
    assert usages[0] == usages[1]
    assert (plain_room / "target" / "first").stat().st_nlink == 1 + depth // 500


# In a process of its own, that has nothing else open.
BY_A_CREW = """
import os, resource, sys
from csi_driver.linux import copies
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[3]),) * 2)
source, target = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in sys.argv[1:3])
report = copies.copy_tree(source, target, workers=16)
print(report.files, report.directories, report.not_carried, len(os.listdir("/proc/self/fd")))
"""


@pytest.mark.parametrize(("files", "limit"), [(6, 256), (1, 400)])
def test_a_crew_needs_no_more_descriptors_in_a_deep_tree(plain_room, files, limit):
    """Most of all where each waiting file lies in another directory: two for each of 80."""
    (plain_room / "source").mkdir()
    (plain_room / "target").mkdir()
    here = open_directory(plain_room / "source")
    depth = 600
    for level in range(depth):
        for number in range(files):
            # Whether a name is read before its neighbour "next" follows from the name.
            file = os.open(f"file-{level}-{number}", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=here)
            os.write(file, b"content")
            os.close(file)
        os.mkdir("next", dir_fd=here)
        below = os.open("next", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    done = subprocess.run(
        [sys.executable, "-c", BY_A_CREW, plain_room / "source", plain_room / "target", str(limit)],
        capture_output=True,
        text=True,
        check=False,
    )
    # Of its own it has the standard three, both tops, and the one that lists them.
    assert done.stdout == f"{files * depth} {depth + 1} {{}} 6\n", done.stderr


@pytest.mark.minutes
def linked(top, number, where=("one", "two")):
    """Make files that have a name in each of these directories."""
    for folder in where:
        (top / folder).mkdir(parents=True, exist_ok=True)
    for count in range(number):
        (top / where[0] / str(count)).write_bytes(b"content")
        for folder in where[1:]:
            os.link(top / where[0] / str(count), top / folder / str(count))


def test_more_open_hard_links_than_memory_is_kept_for_are_refused_by_name(plain_room, monkeypatch):
    monkeypatch.setattr(copies, "HardLinks", functools.partial(HardLinks, most_open=10))
    linked(plain_room / "few", 10)
    assert copy(plain_room / "few", plain_room / "copied").files == 20
    assert differences(manifest(plain_room / "few"), manifest(plain_room / "copied")) == set()
    linked(plain_room / "many", 11)
    with pytest.raises(FailedPrecondition, match=r"too many hard links .* 10 files .*'(one|two)/\d+'"):
        copy(plain_room / "many", plain_room / "refused")


def test_links_whose_names_were_all_met_take_no_memory(plain_room, monkeypatch):
    monkeypatch.setattr(copies, "HardLinks", functools.partial(HardLinks, most_open=3))
    for number in range(10):
        linked(plain_room / "source" / str(number), 3)
    copy(plain_room / "source", plain_room / "target")
    assert differences(manifest(plain_room / "source"), manifest(plain_room / "target")) == set()


def test_a_hundred_thousand_files_in_one_directory_are_copied_in_flat_memory(plain_room):
    (plain_room / "source").mkdir()
    here = open_directory(plain_room / "source")
    for number in range(100_000):
        os.mknod(f"a-file-with-a-long-enough-name-{number}", 0o100600, dir_fd=here)
    os.close(here)
    tracemalloc.start()
    try:
        report = copy(plain_room / "source", plain_room / "target")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.files == 100_000
    assert len(os.listdir(plain_room / "target")) == 100_000
    assert peak < 4 * MIB


# --- a tenant at work under the walker -----------------------------------------------------------------------------------------------

SWAPPER = """
import os, stat, sys
tree, outside = os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2])
j = os.path.join
def attempt(step, *arguments):
    try:
        step(*arguments)
    except OSError:
        pass
def drop(path):
    attempt(os.unlink, path)
    attempt(os.rmdir, path)
print("begun", flush=True)
number = 0
while True:
    number += 1
    for d in (b"d0", b"d1", b"d2"):
        here = j(tree, d)
        # a directory that is a symlink to the outside from one moment to the next
        attempt(os.rename, j(here, b"sub"), j(here, b"sub-away"))
        attempt(os.symlink, outside, j(here, b"sub"))
        attempt(os.rename, here, j(tree, d + b"-away"))
        attempt(os.symlink, outside, here)
        attempt(os.unlink, here)
        attempt(os.rename, j(tree, d + b"-away"), here)
        drop(j(here, b"sub"))
        attempt(os.rename, j(here, b"sub-away"), j(here, b"sub"))
        # a file that is a symlink, a fifo, a device, a directory, another file
        for f in (b"f0", b"f1", b"sub/f0"):
            path = j(here, f)
            drop(path)
            kind = number % 6
            if kind == 0: attempt(os.symlink, j(outside, b"canary"), path)
            elif kind == 1: attempt(os.mkfifo, path)
            elif kind == 2: attempt(os.mknod, path, stat.S_IFCHR | 0o666, os.makedev(120, 7))  # ENXIO to whoever opens it
            elif kind == 3: attempt(os.mkdir, path)
            elif kind == 4: attempt(os.link, j(here, b"f2"), path)
            else:
                try:
                    with open(path, "xb") as file: file.write(b"tenant's own " * 1000)
                except OSError: pass
        # what vanished under remove() comes back
        attempt(os.mkdir, tree)
        attempt(os.mkdir, here)
        attempt(os.mkdir, j(here, b"sub"))
        attempt(os.link, j(here, b"f1"), j(here, b"f2"))
"""


def build_playground(top):
    for name in ("d0", "d1", "d2"):
        (top / name / "sub").mkdir(parents=True)
        for file in ("f0", "f1", "f2", "sub/f0", "sub/f1"):
            (top / name / file).write_bytes(b"tenant's own " * 1000)


def canary_manifest(outside):
    # Change times too: a chmod or chown to the same value, a link made and removed would show there.
    found = manifest(outside)
    for path, entry in found.items():
        status = os.lstat(os.path.join(os.fsencode(outside), path))
        entry["ctime"] = status.st_ctime_ns
        entry["inode"] = status.st_ino
    return found


@pytest.fixture
def swapped_tree(tmp_path):
    """A playground whose directories and files change places with the outside for as long as the test runs."""
    outside = tmp_path / "outside"
    (outside / "sub").mkdir(parents=True)
    for name in ("canary", "f0", "f1", "f2", "sub/f0", "sub/canary"):
        (outside / name).write_bytes(b"CANARY" * 1000)
        os.utime(outside / name, (1, 10))  # so old that any reading, relatime or not, would set it
    for name in ("sub", "."):
        os.utime(outside / name, (1, 10))
    tree = tmp_path / "tree"
    build_playground(tree)
    before = canary_manifest(outside)
    swapper = subprocess.Popen([sys.executable, "-c", SWAPPER, tree, outside], stdout=subprocess.PIPE)
    assert swapper.stdout.readline() == b"begun\n"
    yield tree, outside
    swapper.kill()
    swapper.communicate()
    after = canary_manifest(outside)
    # The tenant itself follows nothing, so whatever happened out there was us.
    assert differences(after, before) == set()


def for_seconds(seconds):
    end = time.monotonic() + seconds
    rounds = 0
    while time.monotonic() < end:
        yield rounds
        rounds += 1


@pytest.mark.root
@pytest.mark.timeout(180)
@pytest.mark.parametrize("how", ["one thread", "a crew, by names"])
def test_copying_a_tree_that_a_tenant_swaps_reads_nothing_outside(swapped_tree, tmp_path, how, request):
    tree, _ = swapped_tree
    workers = 1
    if how != "one thread":
        subprocess.run(["mount", "--bind", tmp_path, tmp_path], check=True)
        request.addfinalizer(lambda: subprocess.run(["umount", "-l", tmp_path], check=True))
        subprocess.run(["mount", "-o", "remount,bind,nodev", tmp_path], check=True)
        workers = 8
    carried, kinds = 0, set()
    for _ in for_seconds(10):
        report = copy(tree, tmp_path / "target", workers=workers)
        carried += report.files
        kinds |= report.not_carried.keys()
        for directory, _, names in os.walk(tmp_path / "target"):
            for name in names:
                path = os.path.join(directory, name)
                if stat.S_ISREG(os.lstat(path).st_mode):
                    with open(path, "rb") as file:
                        assert b"CANARY" not in file.read()
        remove(tmp_path / "target")
    assert carried > 500
    assert kinds <= {"vanished"}


@pytest.mark.root
@pytest.mark.timeout(180)
def test_removing_and_measuring_a_tree_that_a_tenant_swaps_touches_nothing_outside(swapped_tree, tmp_path):
    tree, _ = swapped_tree
    parent = open_directory(tmp_path)
    removed = measured = 0
    for _ in for_seconds(10):
        try:
            descriptor = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            pass
        else:
            usage = trees.measure_tree(descriptor, deadline=time.monotonic() + 5)
            measured += usage.inodes
            os.close(descriptor)
        try:
            tree_removal.remove_tree(parent, "tree")
            removed += 1
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # the tenant may fill it as fast
                raise
    os.close(parent)
    assert removed > 50
    assert measured > 500


def test_a_reader_of_the_progress_sees_it_grow(plain_room):
    (plain_room / "source").mkdir()
    for number in range(300):
        (plain_room / "source" / f"{number}").write_bytes(b"x" * 5000)
    progress = copies.Progress()
    seen = []
    done = threading.Event()

    def watch():
        while not done.is_set():
            seen.append((progress.files, progress.bytes))
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    copy(plain_room / "source", plain_room / "target", progress=progress)
    done.set()
    watcher.join()
    assert seen == sorted(seen)
    assert (progress.files, progress.directories, progress.bytes) == (300, 1, 1_500_000)
