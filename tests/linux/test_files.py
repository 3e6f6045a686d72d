import contextlib
import errno
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time

import pytest

from csi_driver.linux import beneath, files
from csi_driver.linux.byte_range_locks import ByteRangeLocks
from csi_driver.linux.directories import make_directories


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "directory"
    path.mkdir()
    return path


@pytest.fixture
def directory_fd(directory):
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def errno_of(call, *arguments, **keywords):
    with pytest.raises(OSError) as caught:
        call(*arguments, **keywords)
    return caught.value.errno


def open_by_components(directory_fd, path, flags, mode=0, *, cross_mounts=False):
    return beneath.open_by_components(directory_fd, os.fsencode(path), flags, mode, cross_mounts=cross_mounts)


both_ways = pytest.mark.parametrize("opener", [beneath.open_beneath, open_by_components])


@both_ways
def test_opens_what_lies_below_and_closes_it_on_exec(opener, directory, directory_fd):
    (directory / "a" / "b").mkdir(parents=True)
    (directory / "a" / "b" / "file").write_bytes(b"inside")
    descriptor = opener(directory_fd, "a/./b//file", os.O_RDONLY)
    assert os.read(descriptor, 10) == b"inside"
    assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(descriptor)
    made = opener(directory_fd, "a/new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    assert os.fstat(made).st_mode & 0o777 == 0o640
    os.close(made)


@both_ways
@pytest.mark.parametrize("path", ["link", "link/secret", "a/link/secret", "dangling"])
def test_refuses_symlinks_anywhere_in_the_path(opener, path, directory, directory_fd, tmp_path):
    (tmp_path / "secret").write_text("outside")
    (directory / "a").mkdir()
    (directory / "link").symlink_to(tmp_path)
    (directory / "a" / "link").symlink_to(tmp_path)
    (directory / "dangling").symlink_to(tmp_path / "new")
    assert errno_of(opener, directory_fd, path, os.O_RDONLY) in {errno.ELOOP, errno.ENOTDIR}
    assert errno_of(opener, directory_fd, path, os.O_WRONLY | os.O_CREAT, 0o600) in {errno.ELOOP, errno.ENOTDIR}
    assert not (tmp_path / "new").exists()


@both_ways
@pytest.mark.parametrize("path", ["..", "../x", "a/../../x", "/etc/passwd"])
def test_refuses_ways_out(opener, path, directory, directory_fd):
    (directory / "a").mkdir()
    assert errno_of(opener, directory_fd, path, os.O_RDONLY) == errno.EXDEV


@both_ways
def test_pins_a_symlink_itself_when_asked_for_no_more_than_a_pin(opener, directory, directory_fd):
    (directory / "link").symlink_to("/etc")
    descriptor = opener(directory_fd, "link", os.O_PATH | os.O_NOFOLLOW)
    assert os.readlink(b"", dir_fd=descriptor) == b"/etc"
    os.close(descriptor)
    assert errno_of(opener, directory_fd, "link", os.O_PATH) == errno.ELOOP


@pytest.mark.root
@both_ways
def test_enters_a_mount_only_when_allowed(opener, directory, directory_fd, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("x")
    (directory / "mounted").mkdir()
    # A bind mount of the same filesystem: the device number does not give it away.
    subprocess.run(["mount", "--bind", tmp_path / "elsewhere", directory / "mounted"], check=True)
    try:
        for path in ("mounted", "mounted/file"):
            assert errno_of(opener, directory_fd, path, os.O_RDONLY) == errno.EXDEV
            os.close(opener(directory_fd, path, os.O_RDONLY, cross_mounts=True))
    finally:
        subprocess.run(["umount", directory / "mounted"], check=True)


def test_pinning_a_fifo_or_a_file_never_waits(directory, directory_fd):
    os.mkfifo(directory / "fifo")
    os.close(beneath.pin(directory_fd, b"fifo"))


LEASE_HOLDER = """
import fcntl, os, signal, sys, time

def let_go(*_):
    time.sleep(0.3)
    fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_UNLCK)

signal.signal(signal.SIGIO, let_go)
leased = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_leased_file_is_opened_once_its_holder_lets_go(directory, directory_fd):
    (directory / "leased").write_text("content")
    holder = subprocess.Popen(
        [sys.executable, "-c", LEASE_HOLDER, directory / "leased"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        pinned = beneath.pin(directory_fd, b"leased")
        with pytest.raises(BlockingIOError):
            beneath.open_pinned(pinned, os.O_RDONLY, lambda: True)
        opened = beneath.open_pinned(pinned, os.O_RDONLY)
        assert os.read(opened, 10) == b"content"
        os.close(opened)
        os.close(pinned)
    finally:
        holder.communicate()


# --- directories -------------------------------------------------------------------------------------------------------------------


def test_makes_the_missing_directories_with_exactly_the_mode(directory, directory_fd):
    (directory / "a").mkdir(mode=0o700)
    assert make_directories(directory_fd, "a/b/c", 0o2775) == ["a/b", "a/b/c"]
    assert (directory / "a").stat().st_mode & 0o7777 == 0o700
    assert (directory / "a/b").stat().st_mode & 0o7777 == 0o2775
    assert (directory / "a/b/c").stat().st_mode & 0o7777 == 0o2775
    assert make_directories(directory_fd, "a/b/c", 0o700) == []
    assert (directory / "a/b/c").stat().st_mode & 0o7777 == 0o2775


def test_what_was_made_is_removed_again_when_something_is_in_the_way(directory, directory_fd, tmp_path):
    (tmp_path / "outside").mkdir()
    (directory / "link").symlink_to(tmp_path / "outside")
    (directory / "file").write_text("x")
    for path in ("link/a", "file/a", "link"):
        assert errno_of(make_directories, directory_fd, path, 0o755) in {
            errno.ELOOP,
            errno.ENOTDIR,
        }
    assert list((tmp_path / "outside").iterdir()) == []
    too_long = "new/deeper/" + "x" * 300
    assert errno_of(make_directories, directory_fd, too_long, 0o755) == errno.ENAMETOOLONG
    assert not (directory / "new").exists()
    assert errno_of(make_directories, directory_fd, "a/../../x", 0o755) == errno.EXDEV
    assert errno_of(make_directories, directory_fd, "/x", 0o755) == errno.EXDEV
    assert errno_of(make_directories, directory_fd, "", 0o755) == errno.EINVAL


def test_a_directory_is_moved_over_an_empty_claim_and_over_nothing_else(directory, directory_fd):
    for name in ("staged", "staged2", "claim", "taken"):
        (directory / name).mkdir()
    (directory / "staged/data").write_text("x")
    (directory / "taken/theirs").write_text("y")
    (directory / "file").write_text("z")
    assert errno_of(files.move_into_place, directory_fd, "staged", directory_fd, "taken") in {errno.ENOTEMPTY, errno.EEXIST}
    assert errno_of(files.move_into_place, directory_fd, "staged", directory_fd, "file") == errno.ENOTDIR
    assert errno_of(files.move_into_place, directory_fd, "staged", directory_fd, "../claim") == errno.EINVAL
    files.move_into_place(directory_fd, "staged", directory_fd, "claim")
    assert (directory / "claim/data").read_text() == "x"
    assert (directory / "taken/theirs").read_text() == "y"
    assert not (directory / "staged").exists()


# --- records -----------------------------------------------------------------------------------------------------------------------


def test_an_atomic_write_replaces_the_content_and_leaves_nothing_beside_it(directory, directory_fd):
    files.write_atomically(directory_fd, "record", b"old" * 1000)
    files.write_atomically(directory_fd, "record", b"new")
    assert (directory / "record").read_bytes() == b"new"
    assert (directory / "record").stat().st_mode & 0o7777 == 0o600
    assert os.listdir(directory) == ["record"]


def test_an_atomic_write_replaces_a_symlink_rather_than_following_it(directory, directory_fd, tmp_path):
    (tmp_path / "outside").write_text("untouched")
    (directory / "record").symlink_to(tmp_path / "outside")
    files.write_atomically(directory_fd, "record", b"new")
    assert (tmp_path / "outside").read_text() == "untouched"
    assert (directory / "record").read_bytes() == b"new"


def test_a_draft_is_shown_when_it_is_told_and_otherwise_leaves_nothing(directory, directory_fd):
    files.write_atomically(directory_fd, "record", b"old")
    with files.drafted(directory_fd, "record", b"new") as show:
        assert (directory / "record").read_bytes() == b"old"
        show(files.OPEN, files.sync_directory)
        assert (directory / "record").read_bytes() == b"new"
    with pytest.raises(KeyError), files.drafted(directory_fd, "record", b"newer"):
        raise KeyError
    with files.drafted(directory_fd, "record", b"newer"):
        pass
    assert (directory / "record").read_bytes() == b"new"
    assert os.listdir(directory) == ["record"]


def test_a_gate_that_refuses_leaves_the_old_record_and_no_descriptor(directory, directory_fd):
    @contextlib.contextmanager
    def refusing():
        raise KeyError
        yield

    files.write_atomically(directory_fd, "record", b"old")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(KeyError):
        files.write_atomically(directory_fd, "record", b"new", refusing())
    assert (directory / "record").read_bytes() == b"old"
    assert os.listdir(directory) == ["record"]
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.root
def test_a_full_disk_leaves_the_old_record_and_nothing_else(mount_room):
    subprocess.run(["mount", "-o", "remount,size=64k", mount_room], check=True)
    room = os.open(mount_room, os.O_RDONLY)
    try:
        files.write_atomically(room, "record", b"old")
        assert errno_of(files.write_atomically, room, "record", bytes(256 * 1024)) == errno.ENOSPC
        assert errno_of(files.create_exclusively, room, "other", bytes(256 * 1024), lambda _: True) == errno.ENOSPC
        assert (mount_room / "record").read_bytes() == b"old"
        assert os.listdir(mount_room) == ["record"]
    finally:
        os.close(room)


def test_exclusive_creation_has_one_winner(directory, directory_fd):
    won, lost = [], []

    def create(number):
        try:
            files.create_exclusively(directory_fd, "record", b"by %d" % number, lambda _: False)
            won.append(number)
        except FileExistsError:
            lost.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert len(lost) == 7
    assert (directory / "record").read_bytes() == b"by %d" % won[0]
    assert os.listdir(directory) == ["record"]


def test_an_existing_record_passes_when_it_is_recognised_as_ours(directory, directory_fd):
    files.create_exclusively(directory_fd, "record", b"token 1", lambda _: False)
    shown = []
    files.create_exclusively(directory_fd, "record", b"token 1 again", lambda found: shown.append(found) or True)
    assert shown == [b"token 1"]
    assert (directory / "record").read_bytes() == b"token 1"
    assert os.listdir(directory) == ["record"]


def test_bounded_reading_refuses_what_is_no_regular_file_or_too_large(directory, directory_fd):
    (directory / "record").write_bytes(b"x" * 100)
    os.mkfifo(directory / "fifo")
    (directory / "link").symlink_to("record")
    (directory / "sub").mkdir()
    assert files.read_bounded(directory_fd, "record", 100) == b"x" * 100
    assert errno_of(files.read_bounded, directory_fd, "record", 99) == errno.EFBIG
    assert errno_of(files.read_bounded, directory_fd, "fifo", 99) == errno.EINVAL
    assert errno_of(files.read_bounded, directory_fd, "sub", 99) == errno.EINVAL
    assert errno_of(files.read_bounded, directory_fd, "link", 100) == errno.ELOOP
    assert errno_of(files.read_bounded, directory_fd, "missing", 100) == errno.ENOENT
    for name in ("", ".", "..", "sub/x", "/etc/passwd"):
        assert errno_of(files.read_bounded, directory_fd, name, 100) == errno.EINVAL


def test_only_old_temporaries_are_removed(directory, directory_fd):
    for name in (".tmp.record.1", ".tmp.record.2", "record", ".other"):
        (directory / name).write_text("x")
    (directory / ".tmp.directory").mkdir()
    for name in (".tmp.record.1", "record", ".other", ".tmp.directory"):
        os.utime(directory / name, (1, 1))
    assert files.remove_leftover_temporaries(directory_fd, older_than_seconds=60) == 1
    assert sorted(os.listdir(directory)) == [".other", ".tmp.directory", ".tmp.record.2", "record"]


WRITER = """
import os, sys
from csi_driver.linux import files
directory = os.open(sys.argv[1], os.O_RDONLY)
print("begun", flush=True)
number = 0
while True:
    number += 1
    files.write_atomically(directory, "record", (b"%d " % number) * 20000)
    files.create_exclusively(directory, "made-%d-%s" % (number, sys.argv[2]), b"whole " * 5000, lambda _: False)
"""


def test_a_writer_killed_at_any_moment_leaves_whole_records_only(directory, directory_fd):
    seen = 0
    for run in range(25):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, directory, str(run)], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"begun\n"
        time.sleep(random.uniform(0.005, 0.08))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        files.remove_leftover_temporaries(directory_fd, older_than_seconds=-60)
        for name in os.listdir(directory):
            content = (directory / name).read_bytes()
            if name == "record":
                words = content.split()
                assert len(words) == 20000
                assert len(set(words)) == 1
            else:
                assert content == b"whole " * 5000
                seen += 1
                (directory / name).unlink()
    assert seen > 25  # the storm did write


# --- locks -------------------------------------------------------------------------------------------------------------------------


def test_a_lock_excludes_others_in_this_process_and_lets_neighbours_be(directory, directory_fd):
    locks, same = ByteRangeLocks(directory_fd, "lock"), ByteRangeLocks(directory_fd, "lock")
    held = locks.try_hold(5)
    assert held is not None
    assert locks.try_hold(5) is None
    assert same.try_hold(5) is None
    with same.try_hold(6) as neighbour, same.try_hold(2**63 - 2) as last:
        assert neighbour.still_held()
        assert last.still_held()
    assert held.still_held()  # closing others' descriptors of the file dropped nothing
    held.release()
    held.release()
    assert not held.still_held()
    with same.try_hold(5) as again:
        assert again.still_held()
    assert (directory / "lock").stat().st_size == 0


def test_a_lock_excludes_other_processes_and_falls_with_its_holder(directory, directory_fd):
    code = (
        "import os, sys\nfrom csi_driver.linux.byte_range_locks import ByteRangeLocks\n"
        "held = ByteRangeLocks(os.open(sys.argv[1], os.O_RDONLY), 'lock').try_hold(7)\n"
        "print(held is not None, flush=True)\nsys.stdin.read()"
    )

    def other():
        child = subprocess.Popen([sys.executable, "-c", code, directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return child, child.stdout.readline() == b"True\n"

    locks = ByteRangeLocks(directory_fd, "lock")
    child, took = other()
    assert took
    assert locks.try_hold(7) is None
    child.kill()
    child.communicate()
    held = locks.try_hold(7)
    assert held is not None
    child, took = other()
    child.communicate()
    assert not took
    held.release()


def test_a_child_that_is_running_does_not_keep_a_released_lock(directory, directory_fd):
    locks = ByteRangeLocks(directory_fd, "lock")
    held = locks.try_hold(1)
    child = os.fork()
    if child == 0:  # keeps a copy of the descriptor, as between fork and exec
        time.sleep(30)
        os._exit(0)
    try:
        held.release()
        again = locks.try_hold(1)
        assert again is not None
        again.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_whose_file_was_removed_is_not_held_any_more(directory, directory_fd):
    held = ByteRangeLocks(directory_fd, "lock").try_hold(1)
    (directory / "lock").unlink()
    assert not held.still_held()
    held.release()


def test_a_lock_that_another_took_meanwhile_is_not_held_any_more(directory, directory_fd):
    held = ByteRangeLocks(directory_fd, "lock").try_hold(1)
    # What a server does when the lease runs out, done by hand.
    fcntl.fcntl(held._descriptor, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", fcntl.F_UNLCK, 0, 1, 1, 0))
    other = ByteRangeLocks(directory_fd, "lock").try_hold(1)
    assert other is not None
    assert not held.still_held()
    held.release()
    assert other.still_held()
    other.release()


def test_shared_holders_share_and_keep_a_sole_one_out(directory, directory_fd):
    locks = ByteRangeLocks(directory_fd, "lock")
    with locks.try_hold(1, shared=True) as one, locks.try_hold(1, shared=True) as other:
        assert locks.try_hold(1) is None
        assert one.still_held()
        assert other.still_held()
    with locks.try_hold(1):
        assert locks.try_hold(1, shared=True) is None
