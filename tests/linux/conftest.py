"""Real places to mount in, and a filesystem whose server has died."""

import ctypes
import os
import select
import shutil
import struct
import subprocess
import threading

import pytest

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture
def mount_room(tmp_path):
    """An empty tmpfs of its own, private, that takes everything mounted in it along when it goes."""
    room = tmp_path / "room"
    room.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "room", room], check=True)
    subprocess.run(["mount", "--make-private", room], check=True)
    yield room
    subprocess.run(["umount", "-l", room], check=True)


class DeadFilesystem:
    """A FUSE mount whose daemon greets the kernel, then takes every request and answers none.

    The kernel waits for a taken request without end, and no signal wakes it up: worse than NFS, where SIGKILL does.
    """

    _INIT = 26
    _WRITE = struct.Struct("<IiQ")

    def __init__(self, path, fs_type="fuse", source="dead"):
        self.path = path
        self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._stop, self._stopper = os.pipe()
        self.somebody_waits = threading.Event()
        options = f"fd={self._device},rootmode=40000,user_id=0,group_id=0".encode()
        if _libc.mount(os.fsencode(source), os.fsencode(path), fs_type.encode(), 0, options) != 0:
            raise OSError(ctypes.get_errno(), f"mount of {fs_type}")
        self._thread = threading.Thread(target=self._take_requests, daemon=True)
        self._thread.start()

    def _take_requests(self):
        while self._stop not in select.select([self._device, self._stop], [], [])[0]:
            try:
                request = os.read(self._device, 1 << 17)
            except OSError:
                return  # unmounted
            _, opcode, unique = struct.unpack_from("<IIQ", request)
            if opcode == self._INIT:
                answer = struct.pack("<IIIIHHI", 7, 31, 65536, 0, 12, 9, 65536).ljust(64, b"\0")
                os.write(self._device, self._WRITE.pack(16 + len(answer), 0, unique) + answer)
            else:
                self.somebody_waits.set()

    def give_up(self):
        """Close the daemon's side: everybody who waits gets ENOTCONN. May be called again."""
        if self._device < 0:
            return
        os.write(self._stopper, b"x")
        self._thread.join()
        for fd in (self._device, self._stop, self._stopper):
            os.close(fd)
        self._device = -1


@pytest.fixture
def dead_filesystem(mount_room):
    """A filesystem on which every look hangs."""
    yield from _dead_filesystem(mount_room)


@pytest.fixture
def filesystem_that_dies_unmounting(mount_room, tmp_path):
    """A filesystem (fuseblk, on a loop device) whose daemon is asked at the end of an unmount, and does not answer."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    found = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=False)
    if found.returncode != 0:
        pytest.skip(f"needs a loop device: {found.stderr.strip()}")
    device = found.stdout.strip()
    try:
        yield from _dead_filesystem(mount_room, "fuseblk", device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def _dead_filesystem(mount_room, *what):
    if not os.path.exists("/dev/fuse"):
        pytest.skip("needs /dev/fuse to play a dead server")
    path = mount_room / "dead"
    path.mkdir()
    dead = DeadFilesystem(path, *what)
    yield dead
    dead.give_up()
    _libc.umount2(os.fsencode(path), 2)


def pytest_collection_modifyitems(items):
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root: mounts, devices, ownership"))


def _loop_filesystem(tmp_path, kind, *options):
    """A small filesystem of the kind in an image of its own."""
    make = shutil.which(f"mkfs.{kind}") or shutil.which(f"mkfs.{kind}", path="/usr/sbin:/sbin")
    if make is None:
        pytest.skip(f"needs mkfs.{kind}")
    image, room = tmp_path / f"{kind}.image", tmp_path / kind
    with image.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run([make, "-q", *options, image], check=True)
    room.mkdir()
    mounted = subprocess.run(["mount", "-o", "loop", image, room], capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"needs a loop device and {kind}: {mounted.stderr.strip()}")
    yield room
    subprocess.run(["umount", "-l", room], check=True)


@pytest.fixture
def xfs_room(tmp_path):
    """An empty XFS with reflinks."""
    yield from _loop_filesystem(tmp_path, "xfs")


@pytest.fixture
def btrfs_room(tmp_path):
    """An empty btrfs."""
    yield from _loop_filesystem(tmp_path, "btrfs")
