"""Copying what an NFS server shows, while other clients remove it, and while the server does not know what it has.

The trees are local ones, and what is removed from them really is. Only what the kernel says of it is an NFS client's: ESTALE, for whatever
has no name any more (`gone`) or is `forgotten` by its server.
"""

import ctypes
import errno
import os
import shutil
import stat
import threading
import time

import pytest
from test_copies import MIB, copy, differences, manifest

from csi_driver.linux import copies, staleness, system_calls, tree_digests, trees, walk

NFS = 0x6969


class Server:
    """Decides which inodes are stale. `forgotten`: inode numbers, each with how often it will be stale."""

    def __init__(self):
        self.forgotten = {}
        self.answers = []
        self.asked = 0
        self._guard = threading.Lock()

    def forget(self, path, times=1_000_000):
        self.forgotten[path.stat().st_ino] = times

    def is_stale(self, descriptor):
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
            if status.st_nlink == 0:
                return True
            with self._guard:
                left = self.forgotten.get(status.st_ino, 0)
                if left:
                    self.forgotten[status.st_ino] = left - 1
                    return True
        return False

    def check(self, descriptor):
        if self.is_stale(descriptor):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.fixture
def server(monkeypatch):
    """What is read through these calls is read from an NFS server."""
    server = Server()

    def checked(call):
        def checking(descriptor, *arguments, **keywords):
            if isinstance(descriptor, int):
                server.check(descriptor)
            return call(descriptor, *arguments, **keywords)

        return checking

    for name in ("preadv", "copy_file_range", "listxattr", "getxattr"):
        monkeypatch.setattr(os, name, checked(getattr(os, name)))
    read = system_calls.DirectoryReader.read
    monkeypatch.setattr(system_calls.DirectoryReader, "read", lambda self, fd: (server.check(fd), read(self, fd))[1])
    statx, syscall = system_calls._statx, system_calls._syscall

    def stale_statx(descriptor, name, flags, mask, buffer):
        if flags & system_calls._AT_STATX_FORCE_SYNC:
            server.asked += 1
            if server.is_stale(descriptor):
                ctypes.set_errno(errno.ESTALE)
                return -1
        return statx(descriptor, name, flags, mask, buffer)

    def stale_openat2(number, descriptor, path, how, size):
        if server.is_stale(descriptor):
            ctypes.set_errno(errno.ESTALE)
            return -1
        return syscall(number, descriptor, path, how, size)

    monkeypatch.setattr(system_calls, "_statx", stale_statx)
    monkeypatch.setattr(system_calls, "_syscall", stale_openat2)
    monkeypatch.setattr(walk, "filesystem_type", lambda _: NFS)
    return server


@pytest.fixture(params=[1, 8], ids=["one thread", "a crew"])
def workers(request):
    return request.param


@pytest.fixture
def source(tmp_path):
    """Two small files around a large one, and a directory with more."""
    source = tmp_path / "source"
    (source / "directory" / "below").mkdir(parents=True)
    for name in ("a", "z", "directory/a", "directory/below/a"):
        (source / name).write_bytes(os.urandom(3000))
    (source / "large").write_bytes(os.urandom(5 * MIB))
    (source / "large").chmod(0o4711)
    os.utime(source / "large", (1, 2))
    return source


class At:
    """A `should_stop` that stops nothing, and does something as soon as so many bytes were copied."""

    def __init__(self, do, count, times=1):
        self.progress = copies.Progress()
        self._do, self._count, self._left = do, count, times
        self._guard = threading.Lock()

    def __call__(self):
        with self._guard:
            if self._left and self.progress.bytes >= self._count:
                self._left -= 1
                self._do()
        return False


def copied(source, workers, at=None, **keywords):
    target = source.with_name("target")
    if at is not None:
        keywords |= {"progress": at.progress, "should_stop": at}
    return target, copy(source, target, methods=(), workers=workers, **keywords)


def described(top):
    """A manifest without what our own looking and the removals change: access times, and when directories were changed."""
    found = manifest(top)
    for entry in found.values():
        del entry["atime"]
        if entry["type"] == stat.S_IFDIR:
            del entry["mtime"]
    return found


def of_files(top):
    return sum(path.stat().st_size for path in top.rglob("*") if path.is_file())


def replace(path, content):
    new = path.with_name("new")
    new.write_bytes(content)
    new.chmod(0o640)
    new.rename(path)


def test_a_file_that_is_removed_while_it_is_read_is_not_in_the_copy(server, source, workers):
    target, report = copied(source, workers, At((source / "large").unlink, 2 * MIB))
    assert not (target / "large").exists()
    assert (report.files, report.not_carried) == (4, {"vanished": 1})
    assert report.bytes == of_files(source)
    assert differences(described(target), described(source)) == set()


def test_a_file_that_is_replaced_while_it_is_read_is_copied_as_it_is_then(server, source, workers):
    content = os.urandom(3 * MIB)
    target, report = copied(source, workers, At(lambda: replace(source / "large", content), 2 * MIB))
    assert (report.files, report.not_carried) == (5, {})
    assert report.bytes == of_files(source)
    assert (target / "large").read_bytes() == content
    assert differences(described(target), described(source)) == set()


def test_a_file_that_is_replaced_as_fast_as_it_is_read_fails_the_copy_by_name(server, source, workers):
    with pytest.raises(OSError, match="large") as caught:
        copied(source, workers, At(lambda: replace(source / "large", os.urandom(5 * MIB)), 2 * MIB, times=1000))
    assert caught.value.errno == errno.ESTALE


def test_a_file_that_its_server_forgets_for_a_moment_is_whole_under_all_its_names(server, source, workers):
    for number in range(20):
        os.link(source / "large", source / f"name-{number}")
    for times in range(1, 4):
        server.forget(source / "large", times)
        target, report = copied(source, workers)
        assert (report.files, report.not_carried) == (25, {})
        assert differences(described(target), described(source)) == set()
        shutil.rmtree(target)


@pytest.mark.parametrize("forgotten", [["large", "."], ["directory", "."], ["directory"], ["."]])
def test_a_server_that_forgets_what_it_has_fails_the_copy(server, source, workers, forgotten):
    """An export that was taken back: whatever is asked for from then on is stale, and all of it is still there."""

    def forget():
        for name in forgotten:
            server.forget(source / name)

    with pytest.raises(OSError) as caught:
        copied(source, workers, At(forget, 2 * MIB if "large" in forgotten else 0))
    assert caught.value.errno == errno.ESTALE


def test_a_copy_that_goes_stale_itself_fails(server, source, workers):
    def forget():
        (source / "large").unlink()
        server.forget(source.with_name("target"))

    with pytest.raises(OSError) as caught:
        copied(source, workers, At(forget, 2 * MIB))
    assert caught.value.errno == errno.ESTALE


@pytest.mark.parametrize("forgotten", [".", "directory", "directory/below", "../target"])
def test_what_a_server_forgets_for_a_moment_is_carried_or_fails_the_copy_but_is_not_left_out(
    server, source, workers, forgotten
):
    whole = 0
    for times in range(1, 8):
        at = At(lambda times=times: server.forget(source / forgotten, times), 0)
        try:
            target, report = copied(source, workers, at)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        else:
            whole += 1
            assert report.not_carried == {}
            assert differences(described(target), described(source)) == set()
        server.forgotten.clear()
        shutil.rmtree(source.with_name("target"))
    assert whole or forgotten != "."


def test_a_file_of_whose_making_nothing_is_known_is_carried_or_fails_the_copy(server, source, workers, monkeypatch):
    """The server made it, and something else went stale before that was told."""
    lost, opened = [], os.open

    def lose_an_answer(path, flags, *arguments, **keywords):
        descriptor = opened(path, flags, *arguments, **keywords)
        if path == b"large" and flags & os.O_CREAT and not lost:
            lost.append(os.close(descriptor))
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return descriptor

    monkeypatch.setattr(os, "open", lose_an_answer)
    try:
        target, _ = copied(source, workers)
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
    else:
        assert differences(described(target), described(source)) == set()
    assert lost


def test_whoever_reads_a_tree_takes_what_is_gone_for_nothing_and_what_is_forgotten_for_no_answer(server, source):
    top = os.open(source, os.O_RDONLY | os.O_DIRECTORY)
    for anew in (False, True):
        with walk.Walk(top) as standing:
            standing.enter(b"directory", os.open(source / "directory", os.O_RDONLY | os.O_DIRECTORY))
            shutil.rmtree(source / "directory")
            if anew:
                (source / "directory").mkdir()
            assert list(standing.entries()) == []
        (source / "directory").mkdir(exist_ok=True)
    (source / "directory" / "file").touch()
    assert trees.measure_tree(top, deadline=time.monotonic() + 60).complete
    server.forget(source / "directory")
    assert not trees.measure_tree(top, deadline=time.monotonic() + 60).complete
    with pytest.raises(OSError) as caught:
        tree_digests.digest_tree(top, lambda _: None, copies.Progress(), lambda: False)
    assert caught.value.errno == errno.ESTALE
    os.close(top)


def test_a_directory_is_gone_or_not_whatever_happens_on_the_way_to_it(server, tmp_path):
    way = tmp_path / "a" / "b" / "c"
    way.mkdir(parents=True)
    top, held = (os.open(path, os.O_RDONLY | os.O_DIRECTORY) for path in (tmp_path, way))
    names, handle = [b"a", b"b", b"c"], system_calls.file_handle(held)
    server.forget(way.parent, 1)  # removed and made anew right after it was looked up
    assert not staleness.is_gone(top, names, handle)
    server.forget(way.parent)
    with pytest.raises(OSError) as caught:
        staleness.is_gone(top, names, handle)
    assert caught.value.errno == errno.ESTALE
    server.forgotten.clear()
    way.rmdir()
    assert staleness.is_gone(top, names, handle)
    assert staleness.is_stale(held)
    way.mkdir()
    assert staleness.is_gone(top, names, handle)
    assert not staleness.is_gone(top, names, None)
    way.rmdir()
    way.symlink_to("/")
    assert staleness.is_gone(top, names, handle)
    way.parent.rename(tmp_path / "a" / "elsewhere")
    assert staleness.is_gone(top, names, handle)
    assert not staleness.is_stale(top)
    os.close(top)
    os.close(held)


@pytest.mark.parametrize("what", ["directory", "directory/below"])
@pytest.mark.parametrize("anew", [False, True], ids=["removed", "made anew"])
def test_a_directory_that_is_removed_while_it_is_walked_costs_itself_only(server, source, workers, what, anew):
    (source / "z").rename(source / what / "z")
    for number in range(50):
        (source / what / f"file-{number}").write_bytes(b"x" * 100)
    (source / "large").rename(source / what / "large")
    untouched = {path: entry for path, entry in described(source).items() if not path.startswith(os.fsencode(what)) and path}
    untouched.pop(os.path.dirname(os.fsencode(what)), None)

    def remove():
        shutil.rmtree(source / what)
        if anew:
            (source / what).mkdir()
            (source / what / "new").write_bytes(b"new")

    target, report = copied(source, workers, At(remove, 1 * MIB))
    assert set(report.not_carried) == {"vanished"}
    found = described(target)
    assert {path: found[path] for path in untouched} == untouched
    # What was copied of it until then is whole, and its owner's alone; the file that was being read is not there.
    left = target / what
    if left.exists():
        assert stat.S_IMODE(left.stat().st_mode) == 0o700
        assert not (left / "large").exists()
        assert {path.stat().st_size for path in left.glob("file-*")} <= {100}
    assert report.files == sum(path.is_file() for path in target.rglob("*"))
    assert report.directories == 1 + sum(path.is_dir() for path in target.rglob("*"))


def test_where_nothing_goes_stale_the_server_is_asked_nothing_more(server, source, workers):
    target, _ = copied(source, workers)
    assert differences(described(target), described(source)) == set()
    assert server.asked == 0
