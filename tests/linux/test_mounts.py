import contextlib
import errno
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.errors import AlreadyExists, DeadlineExceeded, FailedPrecondition, InvalidArgument
from csi_driver.linux import commands, mount_api, mounts
from csi_driver.linux.mountinfo import mounts_at, mounts_below, topmost_mount_at
from csi_driver.linux.mounts import (
    MountAttributes,
    bind,
    mount_is_read_only,
    parse_bind_flags,
    same_file_mounted,
    unmount,
    unmount_all,
)

WORDS = ["ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec", "noatime", "atime", "relatime", "strictatime"]
WORDS += ["nodiratime", "diratime", "nosymfollow", "symfollow"]
PLAIN = MountAttributes()
READ_ONLY = MountAttributes(read_only=True)


# --- words ------------------------------------------------------------------------------------------------------------------


def test_without_flags_a_bind_forbids_nothing():
    assert parse_bind_flags([], "mount_flags") == MountAttributes()


@pytest.mark.parametrize("word", WORDS)
def test_every_word_a_bind_can_honour_is_accepted_and_only_the_tightening_ones_set_something(word):
    tightening = word in {"ro", "relatime", "strictatime"} or word.startswith("no")
    assert parse_bind_flags([word, word], "mount_flags").words() == (frozenset({word}) if tightening else frozenset())


def test_words_that_agree_add_up():
    parsed = parse_bind_flags(["ro", "nosuid", "nodev", "noexec", "nodiratime", "nosymfollow", "strictatime"], "mount_flags")
    assert parsed == MountAttributes(True, True, True, True, True, True, "strictatime")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ro", "rw"),
        ("nosuid", "suid"),
        ("nodev", "dev"),
        ("noexec", "exec"),
        ("nodiratime", "diratime"),
        ("nosymfollow", "symfollow"),
        ("noatime", "atime"),
        ("noatime", "relatime"),
        ("relatime", "strictatime"),
        ("strictatime", "noatime"),
    ],
)
def test_words_that_contradict_each_other_are_refused_in_either_order(first, second):
    for flags in ([first, "dev", second], [second, "dev", first]) if "nodev" not in (first, second) else ([first, second],):
        with pytest.raises(InvalidArgument, match=rf"mount_flags\[{len(flags) - 1}\] is '{flags[-1]}': contradicts {flags[0]}"):
            parse_bind_flags(flags, "mount_flags")


@pytest.mark.parametrize(
    "flag", ["ro,suid", "ro ", " ro", "", "RO", "-o", "--bind", "'ro'", '"ro"', "ro\0", "ro\n", "bind", "rbind"]
)
def test_anything_else_is_refused_by_field_value_and_with_what_is_allowed(flag):
    with pytest.raises(InvalidArgument) as refused:
        parse_bind_flags(["nodev", flag], "volume_capability.mount.mount_flags")
    assert str(refused.value).startswith("volume_capability.mount.mount_flags[1] is ")
    assert all(word in str(refused.value) for word in WORDS)
    assert str(refused.value).isprintable()


@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=8)), max_size=6))
def test_flags_are_either_honoured_to_the_letter_or_refused(flags):
    try:
        words = parse_bind_flags(flags, "f").words()
    except InvalidArgument:
        return
    assert set(flags) <= set(WORDS)
    assert words <= set(flags)
    assert set(flags) - words <= {"rw", "suid", "dev", "exec", "diratime", "symfollow", "atime"}


# --- binding ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["new mount calls", "mount(8)"])
def way(request, monkeypatch):
    """Both ways of binding keep the same promises."""
    if request.param == "mount(8)":
        monkeypatch.setattr(mount_api, "supported", lambda: False)
    elif not mount_api.supported():
        pytest.skip("this kernel has no mount_setattr")
    before = leftovers()
    yield request.param
    assert leftovers() == before


def leftovers():
    mine = [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("tatami-bind-")]
    return sorted(mine), len(os.listdir("/proc/self/fd"))


@contextlib.contextmanager
def opened(path):
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def bind_path(source, target, attributes=PLAIN, **options):
    with opened(source) as source_fd:
        bind(source_fd, target, attributes, **options)


def mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)


@pytest.fixture
def source(mount_room):
    directory = mount_room / "source with space, comma\nand 雪"
    directory.mkdir()
    (directory / "canary").write_text("sings")
    return directory


@pytest.fixture
def target(mount_room):
    directory = mount_room / "pods" / "target\\040 x"
    directory.mkdir(parents=True)
    return directory


@pytest.mark.root
def test_this_kernel_has_the_new_mount_calls_or_says_why_not():
    assert mount_api.supported() is (tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 12))


@pytest.mark.root
def test_a_bound_directory_is_the_source_itself(way, source, target):
    bind_path(source, target)
    (target / "written").write_text("through the target")
    assert (source / "written").read_text() == "through the target"
    assert mount_is_read_only(target) is False


@pytest.mark.root
def test_a_file_is_bound_onto_a_file(way, source, target):
    (target / "disk").touch()
    bind_path(source / "canary", target / "disk", READ_ONLY)
    assert (target / "disk").read_text() == "sings"
    with pytest.raises(OSError) as refused:
        (target / "disk").write_text("no")
    assert refused.value.errno == errno.EROFS


@pytest.mark.root
@pytest.mark.parametrize(
    "word", ["ro", "nosuid", "nodev", "noexec", "nodiratime", "nosymfollow", "noatime", "relatime", "strictatime"]
)
def test_each_attribute_is_set_and_no_other_and_the_source_keeps_its_own(way, source, target, mount_room, word):
    before = topmost_mount_at(mount_room).options
    bind_path(source, target, parse_bind_flags([word], "f"))
    expected = {"rw", "relatime"} | ({word} if word != "strictatime" else set())
    expected -= {"rw"} if word == "ro" else set()
    expected -= {"relatime"} if word in {"noatime", "strictatime"} else set()
    assert topmost_mount_at(target).options == expected
    assert topmost_mount_at(mount_room).options == before


@pytest.mark.root
@pytest.mark.parametrize("times", ["noatime", "relatime", "strictatime"])
def test_a_bind_never_loosens_what_it_is_a_bind_of(way, source, target, mount_room, times):
    mount("-o", f"remount,bind,ro,nosuid,nodev,noexec,{times}", mount_room)
    expected = topmost_mount_at(mount_room).options
    bind_path(source, target, parse_bind_flags(["rw", "suid", "dev", "exec"], "f"))
    assert topmost_mount_at(target).options == expected >= {"ro", "nosuid", "nodev", "noexec"}
    mount("-o", "remount,bind,rw", mount_room)


@pytest.mark.root
def test_the_source_is_what_was_opened_not_what_its_name_says_now(way, source, target, mount_room):
    with opened(source) as source_fd:
        source.rename(mount_room / "renamed")
        source.symlink_to("/etc")
        bind(source_fd, target, PLAIN)
    assert os.listdir(target) == ["canary"]


@pytest.mark.root
def test_a_symlink_at_the_target_is_refused_and_not_followed(way, source, target, mount_room):
    link = mount_room / "link"
    for link_to in (target, "dangling"):
        link.symlink_to(link_to)
        with pytest.raises(FailedPrecondition, match="symbolic link"):
            bind_path(source, link)
        link.unlink()
    assert mounts_below(mount_room) == ()


@pytest.mark.root
def test_a_symlink_swapped_in_at_the_target_never_gets_the_mount(way, source, mount_room):
    target, aside, link, victim = (mount_room / name for name in ("target", "aside", "link", "victim"))
    target.mkdir()
    victim.mkdir()
    link.symlink_to("victim")
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            for old, new in ((target, aside), (link, target), (target, link), (aside, target)):
                with contextlib.suppress(OSError):  # EBUSY: it is a mount point just now
                    os.rename(old, new)

    swapper = threading.Thread(target=swap)
    swapper.start()
    outcomes = []
    try:
        least, most = (300, 5000) if way == "new mount calls" else (40, 600)
        while len(outcomes) < least or (len(set(outcomes)) < 2 and len(outcomes) < most):  # chance decides who is faster
            try:
                bind_path(source, target)
                outcomes.append("bound")
            except (FailedPrecondition, FileNotFoundError):
                outcomes.append("refused")
            assert topmost_mount_at(victim) is None
            for place in (target, aside):
                unmount_all(place, 10)
    finally:
        stop.set()
        swapper.join()
    assert set(outcomes) == {"bound", "refused"}


@pytest.mark.root
def test_a_taken_target_is_refused_and_left_as_it_is(way, source, target, mount_room):
    mount("-t", "tmpfs", "stranger", target)
    with pytest.raises(AlreadyExists, match=r"stranger \(tmpfs\)"):
        bind_path(source, target)
    assert [layer.source for layer in mounts_at(target)] == ["stranger"]


@pytest.mark.root
def test_a_bind_that_cannot_be_leaves_nothing_behind(way, source, target, mount_room):
    with pytest.raises(FileNotFoundError):
        bind_path(source, target / "missing")
    refusal = OSError if way == "new mount calls" else commands.CommandFailed
    with pytest.raises(refusal):
        bind_path(source / "canary", target)
    with pytest.raises(refusal):
        bind_path(source, source / "canary")
    with opened(target) as gone_fd:
        target.rmdir()
        with pytest.raises(refusal):
            bind(gone_fd, source, PLAIN)
    assert mounts_below(mount_room) == ()


@pytest.mark.root
def test_mounts_below_the_source_come_along_only_when_asked_and_then_with_the_same_attributes(way, source, target):
    (source / "inner").mkdir()
    mount("-t", "tmpfs", "inner", source / "inner")
    (source / "inner" / "secret").touch()
    bind_path(source, target, READ_ONLY)
    assert os.listdir(target / "inner") == []
    assert unmount_all(target, 10) is False
    bind_path(source, target, READ_ONLY, recursive=True)
    assert os.listdir(target / "inner") == ["secret"]
    with pytest.raises(OSError) as refused:
        (target / "inner" / "new").touch()
    assert refused.value.errno == errno.EROFS
    (source / "inner" / "new").touch()


@pytest.mark.root
def test_below_a_shared_mount_the_bind_reaches_its_peers_but_never_those_of_the_source(way, mount_room):
    for name in ("source", "kubelet", "host"):
        (mount_room / name).mkdir()
    mount("-t", "tmpfs", "source", mount_room / "source")
    mount("-t", "tmpfs", "kubelet", mount_room / "kubelet")
    for name in ("source", "kubelet"):
        mount("--make-shared", mount_room / name)
    mount("--bind", mount_room / "kubelet", mount_room / "host")  # the same peer group, as another namespace would be
    (mount_room / "source" / "volume").mkdir()
    (mount_room / "kubelet" / "target").mkdir()
    (mount_room / "source" / "volume" / "inner").mkdir()

    bind_path(mount_room / "source" / "volume", mount_room / "kubelet" / "target", READ_ONLY)
    here, there = topmost_mount_at(mount_room / "kubelet" / "target"), topmost_mount_at(mount_room / "host" / "target")
    assert there.root == "/volume"
    assert there.read_only
    assert here.propagation == there.propagation != frozenset()
    assert here.propagation != topmost_mount_at(mount_room / "source").propagation

    mount("-t", "tmpfs", "a pod's", mount_room / "kubelet" / "target" / "inner")
    assert topmost_mount_at(mount_room / "host" / "target" / "inner") is not None
    assert topmost_mount_at(mount_room / "source" / "volume" / "inner") is None

    unmount_all(mount_room / "kubelet" / "target", 10)
    assert topmost_mount_at(mount_room / "host" / "target") is None


@pytest.mark.root
def test_below_a_private_mount_the_bind_is_private_even_if_the_source_is_shared(way, mount_room, target):
    (mount_room / "source").mkdir()
    mount("-t", "tmpfs", "source", mount_room / "source")
    mount("--make-shared", mount_room / "source")
    bind_path(mount_room / "source", target)
    assert topmost_mount_at(target).propagation == frozenset()


WRITER = textwrap.dedent("""
    import errno, os, sys
    # The file exists in the source only, so ENOENT says "not mounted" and an open file says "mounted and writable".
    counts = {errno.ENOENT: 0, errno.EROFS: 0, 0: 0}
    path, stop = sys.argv[1:]
    print("hammering", flush=True)
    while not os.path.exists(stop):
        for _ in range(500):
            try:
                os.close(os.open(path, os.O_WRONLY))
                counts[0] += 1
            except OSError as error:
                counts[error.errno] += 1
    print(counts[errno.ENOENT], counts[errno.EROFS], counts[0])
""")


@contextlib.contextmanager
def hammering(target, stop):
    """Have a process open target/canary for writing all the time; yields a list that gets its three counts."""
    writer = subprocess.Popen([sys.executable, "-IS", "-c", WRITER, target / "canary", stop], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "hammering\n"
    counts = []
    try:
        yield counts
    finally:
        stop.touch()
        counts.extend(map(int, writer.communicate(timeout=60)[0].split()))
        assert writer.returncode == 0


@pytest.mark.root
def test_a_read_only_bind_is_read_only_from_its_first_moment(way, source, target, tmp_path):
    with hammering(target, tmp_path / "stop") as counts:
        for _ in range(200):
            bind_path(source, target, READ_ONLY)
            time.sleep(0.001)
            unmount_all(target, 10)
    unmounted, refused, written = counts
    assert written == 0
    assert refused > 200
    assert unmounted > 0


@pytest.mark.root
def test_the_writer_of_the_test_above_does_catch_a_bind_that_becomes_read_only_after_the_fact(source, target, tmp_path):
    with hammering(target, tmp_path / "stop") as counts:
        for _ in range(50):
            bind_path(source, target)
            # Fails with EBUSY when it meets an open file, which is a catch as well.
            subprocess.run(["mount", "-o", "remount,bind,ro", target], check=False, stderr=subprocess.DEVNULL)
            unmount_all(target, 10)
    assert counts[2] > 0


# --- unmounting -------------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_where_nothing_is_mounted_there_is_nothing_to_do(target):
    assert unmount_all(target, 10) is False
    assert unmount_all(target / "missing" / "deeper", 10) is False
    with pytest.raises(OSError) as refused:
        unmount(target)
    assert refused.value.errno == errno.EINVAL


@pytest.mark.root
def test_every_layer_of_a_stack_goes_and_the_directory_can_be_removed(target):
    for layer in range(3):
        mount("-t", "tmpfs", f"layer{layer}", target)
    unmount(target)
    assert [layer.source for layer in mounts_at(target)] == ["layer0", "layer1"]
    assert unmount_all(target, 10) is False
    assert mounts_at(target) == ()
    target.rmdir()


@pytest.mark.root
def test_a_busy_mount_goes_lazily_and_says_so(source, target):
    bind_path(source, target)
    with (target / "canary").open("a") as file:
        with pytest.raises(OSError) as refused:
            unmount(target)
        assert refused.value.errno == errno.EBUSY
        assert unmount_all(target, 10) is True
        assert topmost_mount_at(target) is None
        file.write(" on")
    assert (source / "canary").read_text() == "sings on"
    target.rmdir()


@pytest.mark.root
def test_what_others_mounted_below_the_target_goes_with_it(source, target):
    (source / "inner").mkdir()
    bind_path(source, target)
    mount("-t", "tmpfs", "inner", target / "inner")
    assert unmount_all(target, 10) is True
    assert mounts_below(target) == ()


@pytest.mark.root
def test_a_symlink_to_a_mount_is_not_unmounted_through(source, target, mount_room):
    bind_path(source, target)
    (mount_room / "link").symlink_to(target)
    assert unmount_all(mount_room / "link", 10) is False
    with pytest.raises(OSError) as refused:
        unmount(mount_room / "link")
    assert refused.value.errno == errno.EINVAL
    assert topmost_mount_at(target) is not None


@pytest.mark.root
@pytest.mark.parametrize("local", [True, False], ids=["in this process", "in a child"])
def test_a_symlink_swapped_in_at_the_last_moment_is_not_unmounted_through(source, target, mount_room, monkeypatch, local):
    victim = mount_room / "victim"
    victim.mkdir()
    bind_path(source, target)
    bind_path(source, victim)
    if not local:
        monkeypatch.setattr(mounts, "_LOCAL_FILESYSTEMS", frozenset())

    def look_and_then_be_too_late(path):
        layer = topmost_mount_at(path)
        subprocess.run(["umount", path], check=True)
        path.rmdir()
        path.symlink_to(victim)
        return layer

    monkeypatch.setattr(mounts.mountinfo, "topmost_mount_at", look_and_then_be_too_late)
    with pytest.raises(OSError) as refused:
        unmount(target)
    assert refused.value.errno == errno.EINVAL
    assert topmost_mount_at(victim) is not None


@pytest.mark.root
def test_a_mount_that_stays_beyond_the_deadline_is_an_error(target):
    mount("-t", "tmpfs", "stays", target)
    with pytest.raises(DeadlineExceeded, match="stays"):
        unmount_all(target, 0)
    assert topmost_mount_at(target) is not None


@pytest.mark.root
def test_many_unmounting_the_same_target_at_once_all_succeed(source, target):
    failures = []

    def unmount_it():
        try:
            unmount_all(target, 10)
        except Exception as error:
            failures.append(error)

    for _ in range(50):
        bind_path(source, target)
        threads = [threading.Thread(target=unmount_it) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert topmost_mount_at(target) is None
    assert failures == []


@pytest.mark.root
def test_a_dead_filesystem_in_use_is_detached_in_bounded_time(dead_filesystem):
    waiter = subprocess.Popen(["ls", dead_filesystem.path / "x"], stderr=subprocess.DEVNULL)
    assert dead_filesystem.somebody_waits.wait(timeout=30)
    started = time.monotonic()
    assert unmount_all(dead_filesystem.path, 10) is True
    assert time.monotonic() - started < 5
    assert topmost_mount_at(dead_filesystem.path) is None
    dead_filesystem.path.rmdir()
    assert waiter.poll() is None
    dead_filesystem.give_up()
    assert waiter.wait(timeout=10) != 0


@pytest.mark.root
def test_an_unmount_that_hangs_in_the_kernel_is_left_behind_and_the_target_is_free(filesystem_that_dies_unmounting):
    dead = filesystem_that_dies_unmounting
    started = time.monotonic()
    assert unmount_all(dead.path, 2) is True
    assert 0.9 < time.monotonic() - started < 5
    assert topmost_mount_at(dead.path) is None
    assert commands.stuck_children() == 1
    dead.path.rmdir()
    dead.give_up()
    deadline = time.monotonic() + 10
    while commands.stuck_children():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.root
def test_a_plain_unmount_that_hangs_does_not_claim_success(filesystem_that_dies_unmounting):
    with pytest.raises(DeadlineExceeded):
        unmount(filesystem_that_dies_unmounting.path, timeout=1)


# --- asking -----------------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_bind_is_known_as_its_source_and_as_nothing_else(way, source, target, mount_room):
    (source / "sub").mkdir()
    bind_path(source, target)
    for path, same in (
        (source, True),
        (target, True),
        (source / "sub", False),
        (mount_room, False),
        ("/", False),
        ("/proc", False),
    ):
        with opened(path) as fd:
            assert same_file_mounted(fd, target) is same, path
    with opened(source) as fd:
        assert not same_file_mounted(fd, source), "a directory on which nothing is mounted"
        mount("-t", "tmpfs", "on top", target)
        assert not same_file_mounted(fd, target), "what counts is what is seen"


@pytest.mark.root
def test_a_whole_filesystem_and_a_file_are_known_too(way, source, target, mount_room):
    bind_path(mount_room, target)
    with opened(mount_room) as fd:
        assert same_file_mounted(fd, target)
    unmount_all(target, 10)
    (target / "disk").touch()
    bind_path(source / "canary", target / "disk")
    with opened(source / "canary") as fd:
        assert same_file_mounted(fd, target / "disk")


@pytest.mark.root
def test_a_source_reached_through_another_bind_is_the_same_directory(way, source, target, mount_room):
    (source / "sub").mkdir()
    (mount_room / "staging").mkdir()
    bind_path(source, mount_room / "staging")
    bind_path(source / "sub", target)
    with opened(mount_room / "staging" / "sub") as fd:
        assert same_file_mounted(fd, target)


@pytest.mark.root
def test_the_same_path_on_another_filesystem_is_not_the_same(way, source, target, mount_room):
    (mount_room / "other").mkdir()
    mount("-t", "tmpfs", "other", mount_room / "other")
    twin = mount_room / "other" / source.name
    twin.mkdir()
    bind_path(source, target)
    with opened(twin) as fd:
        assert not same_file_mounted(fd, target)


@pytest.mark.root
def test_a_renamed_source_is_still_the_same_and_its_successor_is_not(way, source, target, mount_room):
    bind_path(source, target)
    renamed = source.rename(mount_room / "renamed")
    source.mkdir()
    with opened(renamed) as old, opened(source) as new:
        assert same_file_mounted(old, target)
        assert not same_file_mounted(new, target)


@pytest.mark.root
def test_a_removed_source_and_its_lookalikes_are_never_taken_for_each_other(way, target, mount_room):
    gone, lookalike = mount_room / "gone", mount_room / "gone (deleted)"
    gone.mkdir()
    lookalike.mkdir()
    other = mount_room / "other target"
    other.mkdir()
    bind_path(gone, target)
    bind_path(lookalike, other)
    with opened(gone) as gone_fd:
        gone.rmdir()
        gone.mkdir()
        assert not same_file_mounted(gone_fd, target)
        assert not same_file_mounted(gone_fd, other)
        with opened(gone) as again_fd:
            assert not same_file_mounted(again_fd, target)


@pytest.mark.root
def test_whether_a_mount_is_read_only_is_its_own_or_its_filesystems_answer(way, source, target, mount_room):
    assert mount_is_read_only(target) is None
    bind_path(source, target, READ_ONLY)
    assert mount_is_read_only(target) is True
    unmount_all(target, 10)
    bind_path(source, target)
    assert mount_is_read_only(target) is False
    mount("-o", "remount,ro", mount_room)
    assert mount_is_read_only(target) is True


@pytest.mark.root
def test_questions_about_a_dead_filesystem_are_answered_at_once(dead_filesystem, source):
    started = time.monotonic()
    with opened(source) as fd:
        assert same_file_mounted(fd, dead_filesystem.path) is False
        with pytest.raises(AlreadyExists):
            bind(fd, dead_filesystem.path, PLAIN)
    assert mount_is_read_only(dead_filesystem.path) is False
    assert time.monotonic() - started < 5


# --- without root -----------------------------------------------------------------------------------------------------------

UNPRIVILEGED = textwrap.dedent("""
    import os, pathlib, subprocess, sys
    sys.path.insert(0, sys.argv[1])
    from csi_driver.linux import mount_api, mounts
    assert mount_api.supported()
    if sys.argv[2] == "mount(8)":
        mount_api.supported = lambda: False
    room = pathlib.Path(sys.argv[3])
    subprocess.run(["mount", "-t", "tmpfs", "room", room], check=True)
    source, target = room / "source", room / "target"
    source.mkdir(); target.mkdir()
    (source / "canary").touch()
    fd = os.open(source, os.O_PATH)
    mounts.bind(fd, target, mounts.parse_bind_flags(["ro", "nosuid"], "f"))
    assert mounts.same_file_mounted(fd, target) and mounts.mount_is_read_only(target)
    try:
        os.open(target / "canary", os.O_WRONLY)
    except OSError as error:
        assert error.errno == 30, error
    else:
        raise AssertionError("written")
    assert mounts.unmount_all(target, 10) is False
    assert mounts.mount_is_read_only(target) is None
    print("done")
""")


@pytest.mark.parametrize("way_without_root", ["new mount calls", "mount(8)"])
def test_all_of_it_works_in_a_user_namespace(tmp_path, way_without_root):
    if subprocess.run(["unshare", "-Urm", "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("needs user namespaces (unshare -Urm)")
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(commands.__file__))))
    argv = ["unshare", "-Urm", sys.executable, "-c", UNPRIVILEGED, package, way_without_root, tmp_path]
    child = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (child.stdout, child.stderr) == ("done\n", "")
