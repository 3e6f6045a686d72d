"""Images and raw block that grow, are captured, and are asked for by two nodes."""

import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from bench import Bench, all_turns_taken, make_bench, until
from images import (
    CHANGE_FD,
    CLR_FD,
    LEAST,
    MIB,
    SET_FD,
    SET_READ_ONLY,
    ask_without_capabilities,
    block,
    devices_below,
    devices_of,
    filesystem,
    make_image,
    take_down,
)

from csi_driver.config import HostPathPool
from csi_driver.errors import FailedPrecondition, InvalidArgument, OperationPending, OutOfRange
from csi_driver.linux import image_filesystems
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes import image_mounts
from csi_driver.volumes.model import AccessMode, ContentSource, Layout, SourceKind
from csi_driver.volumes.requests import CapacityRange

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_mounts")]
CAN_GROW_MOUNTED = ("xfs", *(("ext4",) if image_filesystems.may_grow_mounted("ext4") else ()))


@pytest.fixture(autouse=True)
def no_loop_device_is_left(tmp_path: Path):
    yield
    take_down(tmp_path)


@pytest.fixture(params=["btrfs", "xfs"])
def reflinks(request, tmp_path, make_disk):
    place = make_disk(request.param, size="3G", kind=request.param)
    made = make_bench(tmp_path, (HostPathPool("default", place / "pool"),))
    yield made
    made.domain.stop(5)
    take_down(tmp_path)


def grow(bench: Bench, handle: str, size: int, path: str) -> int:
    bench.volumes.expand(handle, CapacityRange(size), None)
    return bench.node.expand(handle, path, CapacityRange(size))


def restore(bench, name, snapshot, capability, size=0, **parameters):
    source = ContentSource(SourceKind.SNAPSHOT, snapshot.record.handle)
    return make_image(bench, name, capability, size=size, source=source, **parameters)


def publish_alone(bench, volume, capability, pod):
    bench.stage(volume.record.handle, capability)
    return bench.publish(volume.record.handle, pod, capability)


# --- raw block ----------------------------------------------------------------------------------------------------------------------


def test_raw_block_is_the_image_s_bytes_and_keeps_them(bench):
    volume = make_image(bench, "v", block(), layout=None)
    assert volume.record.form.layout is Layout.IMAGE
    target = publish_alone(bench, volume, block(), "pod")
    assert target.is_block_device()
    assert "ro" not in topmost_mount_at(target).options
    with target.open("r+b") as device:
        assert device.seek(0, os.SEEK_END) == 16 * MIB
        device.seek(MIB)
        device.write(b"mine")
        os.fsync(device)
    bench.node.unpublish(volume.record.handle, str(target))
    assert not target.exists()
    bench.node.unstage(volume.record.handle, bench.staging_of(volume.record.handle))
    assert devices_below(bench.root) == []
    assert (bench.path(volume) / "image").read_bytes()[MIB : MIB + 4] == b"mine"
    assert publish_alone(bench, volume, block(), "next").read_bytes()[MIB : MIB + 4] == b"mine"


def test_a_class_of_directories_refuses_block_and_says_what_to_use(bench):
    with pytest.raises(InvalidArgument, match="layout: image"):
        make_image(bench, "v", block(), layout=Layout.DIRECTORY)


@pytest.mark.parametrize("how", ["readonly", "mode"])
def test_read_only_block_refuses_writes_and_another_file_also_after_its_user_has_asked_the_kernel_for_more(
    bench, how, tmp_path
):
    handle = make_image(bench, "v", block()).record.handle
    capability = block(AccessMode.SINGLE_NODE_READER_ONLY) if how == "mode" else block()
    bench.stage(handle, capability)
    target = bench.publish(handle, "reader", capability, readonly=how == "readonly")
    other = tmp_path / "other/image"
    other.parent.mkdir()
    other.write_bytes(b"x" * 16 * MIB)
    assert ask_without_capabilities(target, SET_READ_ONLY) != ""
    assert ask_without_capabilities(target, CHANGE_FD, other) != ""
    assert target.read_bytes()[:4] == bytes(4)
    with pytest.raises(OSError, match=r"Read-only|not permitted|Input/output"), target.open("r+b", buffering=0) as device:
        device.write(b"x" * 4096)
        os.fsync(device)
    if how == "readonly":
        writer = bench.publish(handle, "writer", block())
        with writer.open("r+b") as device:
            device.write(b"fine")


def test_a_pod_that_takes_the_image_from_its_device_changes_nothing_for_the_next(bench, tmp_path):
    handle = make_image(bench, "v", block()).record.handle
    bench.stage(handle, block())
    first = bench.publish(handle, "first", block())
    with first.open("r+b") as device:
        device.write(b"mine")
    other = tmp_path / "of-the-pod"
    other.write_bytes(b"x" * 16 * MIB)
    (taken,) = devices_below(bench.root)
    assert ask_without_capabilities(first, CLR_FD) == ""
    with pytest.raises(FailedPrecondition, match="not staged"):
        bench.publish(handle, "second", block())
    ask_without_capabilities(first, SET_FD, other)  # or another program of this machine has the number by now
    bench.stage(handle, block())
    second = bench.publish(handle, "second", block())
    assert second.read_bytes()[:4] == b"mine"
    assert devices_below(bench.root) != [taken]
    for pod in (first, second):
        bench.node.unpublish(handle, str(pod))
    bench.node.unstage(handle, bench.staging_of(handle))
    assert devices_below(bench.root) == []
    assert all(subprocess.run(["losetup", "-d", f"/dev/{name}"], check=False).returncode == 0 for name in devices_of(other))


def test_block_is_published_once_and_again_after_a_restart(bench):
    handle = make_image(bench, "v", block()).record.handle
    bench.stage(handle, block())
    target = bench.publish(handle, "pod", block())
    before = topmost_mount_at(target), devices_below(bench.root)
    bench.publish(handle, "pod", block())
    other = bench.restarted()
    other.stage(handle, block())
    other.publish(handle, "pod", block())
    assert (topmost_mount_at(target), devices_below(bench.root)) == before
    other.node.unpublish(handle, str(target))
    other.node.unstage(handle, bench.staging_of(handle))
    assert devices_below(bench.root) == []


def test_a_target_with_something_in_it_is_left_alone(bench):
    handle = make_image(bench, "v", block()).record.handle
    bench.stage(handle, block())
    Path(bench.target("pod")).write_text("theirs")
    with pytest.raises(FailedPrecondition, match="no empty file"):
        bench.publish(handle, "pod", block())
    bench.node.unpublish(handle, bench.target("pod"))
    assert Path(bench.target("pod")).read_text() == "theirs"


def test_the_size_of_block_is_what_its_stats_say(bench):
    handle = make_image(bench, "v", block()).record.handle
    staging = bench.stage(handle, block())
    target = bench.publish(handle, "pod", block())
    for path in (staging, str(target)):
        assert bench.node.stats(handle, path, 1e12).bytes.total == 16 * MIB


def test_block_fills_up_to_its_size(bench):
    target = publish_alone(bench, make_image(bench, "v", block()), block(), "pod")
    done = subprocess.run(
        ["dd", "if=/dev/urandom", f"of={target}", "bs=1M", "oflag=direct"], capture_output=True, text=True, check=False
    )
    assert "No space left on device" in done.stderr
    assert f"{16 * MIB} bytes" in done.stderr


# --- grow ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CAN_GROW_MOUNTED)
def test_a_full_filesystem_goes_on_after_it_has_grown_under_its_user(bench, kind):
    volume = make_image(bench, "v", filesystem(kind))
    target = publish_alone(bench, volume, filesystem(kind), "pod")
    with (target / "filler").open("wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(MIB))
        before = os.statvfs(target)
        assert grow(bench, volume.record.handle, 2 * LEAST[kind], str(target)) == 2 * LEAST[kind]
        after = os.statvfs(target)
        assert after.f_blocks * after.f_frsize >= 1.8 * before.f_blocks * before.f_frsize
        for _ in range(8):
            file.write(bytes(MIB))
        os.fsync(file)


def test_a_growth_that_is_under_way_is_not_taken_for_a_larger_one(bench, monkeypatch):
    handle = make_image(bench, "v", filesystem("xfs")).record.handle
    bench.stage(handle, filesystem("xfs"))
    target = bench.publish(handle, "pod", filesystem("xfs"))
    monkeypatch.setattr(image_mounts, "_CHECK_WAIT_SECONDS", 0.2)
    goes_on, grow_mounted = threading.Event(), image_filesystems.grow_mounted

    def slow(*arguments):
        # The first one was begun with the first size, and ends as it was begun.
        goes_on.wait(30)

    monkeypatch.setattr(image_filesystems, "grow_mounted", slow)
    with pytest.raises(OperationPending, match="growing the filesystem"):
        grow(bench, handle, LEAST["xfs"] + 64 * MIB, str(target))
    monkeypatch.setattr(image_filesystems, "grow_mounted", grow_mounted)
    monkeypatch.setattr(image_mounts, "_CHECK_WAIT_SECONDS", 60.0)
    threading.Timer(2, goes_on.set).start()
    wanted = 2 * LEAST["xfs"]
    assert grow(bench, handle, wanted, str(target)) == wanted
    shown = os.statvfs(target)
    assert shown.f_blocks * shown.f_frsize > 0.8 * wanted


@pytest.mark.skipif("ext4" in CAN_GROW_MOUNTED, reason="this machine can grow a mounted ext4")
def test_an_ext4_that_may_not_grow_now_grows_when_it_is_staged_next(bench):
    volume = make_image(bench, "v", filesystem())
    handle = volume.record.handle
    target = publish_alone(bench, volume, filesystem(), "pod")
    (target / "file").write_text("content")
    with pytest.raises(FailedPrecondition, match="CAP_SYS_RESOURCE"):
        grow(bench, handle, 64 * MIB, str(target))
    bench.node.unpublish(handle, str(target))
    bench.node.unstage(handle, bench.staging_of(handle))
    target = publish_alone(bench, volume, filesystem(), "pod")
    assert os.statvfs(target).f_blocks * os.statvfs(target).f_frsize > 50 * MIB
    assert (target / "file").read_text() == "content"
    assert bench.node.stats(handle, str(target), 1e12).bytes.total > 50 * MIB


@pytest.mark.skipif("ext4" in CAN_GROW_MOUNTED, reason="this machine can grow a mounted ext4")
def test_a_growth_that_outlasts_its_call_goes_on_is_joined_and_is_not_cut_off_by_unstage(bench, tmp_path, monkeypatch):
    volume = make_image(bench, "v", filesystem())
    handle = volume.record.handle
    bench.volumes.expand(handle, CapacityRange(64 * MIB), None)
    runs, go_on = tmp_path / "runs", tmp_path / "go on"
    slow = tmp_path / "bin" / "resize2fs"
    slow.parent.mkdir()
    real = shutil.which("resize2fs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    slow.write_text(
        f"#!/bin/sh\necho run >> {runs}\nwhile ! test -e '{go_on}'; do sleep 0.05; done\n{real} $1\necho end >> {runs}\n"
    )
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(image_mounts, "_CHECK_WAIT_SECONDS", 3.0)
    monkeypatch.setattr(image_mounts, "_STOP_SECONDS", 0.1, raising=False)
    with pytest.raises(OperationPending, match="growing the filesystem"):
        bench.stage(handle, filesystem())
    with pytest.raises(OperationPending, match="must come to its end"):
        bench.node.unstage(handle, bench.staging_of(handle))
    go_on.touch()
    until(lambda: not bench.domain.node_jobs.running())
    staging = bench.stage(handle, filesystem())
    assert runs.read_text() == "run\nend\n"
    assert os.statvfs(staging).f_blocks * os.statvfs(staging).f_frsize > 50 * MIB


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_what_has_grown_while_it_was_away_is_large_when_it_comes_back(bench, kind):
    volume = make_image(bench, "v", filesystem(kind))
    bench.volumes.expand(volume.record.handle, CapacityRange(2 * LEAST[kind]), None)
    staging = bench.stage(volume.record.handle, filesystem(kind))
    assert os.statvfs(staging).f_blocks * os.statvfs(staging).f_frsize > 1.5 * LEAST[kind]


def test_a_staging_that_was_cut_off_before_it_grew_grows_when_it_is_asked_for_again(bench, monkeypatch):
    volume = make_image(bench, "v", filesystem("xfs"))
    bench.volumes.expand(volume.record.handle, CapacityRange(2 * LEAST["xfs"]), None)
    with monkeypatch.context() as cut_off:
        cut_off.setattr(image_filesystems, "grow_mounted", lambda *_: (_ for _ in ()).throw(OSError(5, "cut off")))
        with pytest.raises(OSError, match="cut off"):
            bench.stage(volume.record.handle, filesystem("xfs"))
    staging = bench.restarted().stage(volume.record.handle, filesystem("xfs"))
    assert os.statvfs(staging).f_blocks * os.statvfs(staging).f_frsize > 1.5 * LEAST["xfs"]


def test_the_running_user_of_block_sees_its_new_size(bench):
    handle = make_image(bench, "v", block()).record.handle
    bench.stage(handle, block())
    target = bench.publish(handle, "pod", block())
    reader = bench.publish(handle, "reader", block(), readonly=True)
    with target.open("rb") as device, reader.open("rb") as other:
        assert grow(bench, handle, 40 * MIB, str(target)) == 40 * MIB
        assert (device.seek(0, os.SEEK_END), other.seek(0, os.SEEK_END)) == (40 * MIB, 40 * MIB)


def test_nothing_ever_shrinks(bench):
    volume = make_image(bench, "v", block(), size=32 * MIB)
    assert bench.volumes.expand(volume.record.handle, CapacityRange(16 * MIB), None) == 32 * MIB
    with pytest.raises(OutOfRange):
        bench.volumes.expand(volume.record.handle, CapacityRange(16 * MIB, 16 * MIB), None)
    assert (bench.path(volume) / "image").stat().st_size == 32 * MIB


def test_an_expansion_that_was_cut_off_is_completed_by_its_retry(bench, monkeypatch):
    volume = make_image(bench, "v", block())
    target = publish_alone(bench, volume, block(), "pod")
    monkeypatch.setattr(bench.volumes._creation._contents, "resize", lambda *_: (_ for _ in ()).throw(OSError(5, "cut off")))
    with pytest.raises(OSError, match="cut off"):
        bench.volumes.expand(volume.record.handle, CapacityRange(40 * MIB), None)
    with target.open("rb") as device:
        assert device.seek(0, os.SEEK_END) == 16 * MIB
    assert grow(bench.restarted(), volume.record.handle, 40 * MIB, str(target)) == 40 * MIB


# --- captures -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_snapshot_taken_under_a_writer_is_a_sound_filesystem_of_one_moment(reflinks, kind):
    volume = make_image(reflinks, "v", filesystem(kind))
    target = publish_alone(reflinks, volume, filesystem(kind), "pod")
    (target / "before").write_text("content")
    os.sync()
    stop = threading.Event()

    def write():
        count = 0
        while not stop.is_set():
            place = target / f"file-{count % 50}"
            place.write_bytes(os.urandom(20000))
            if count % 7 == 0:
                place.unlink()
            count += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        time.sleep(0.3)
        snapshots = [reflinks.snapshot(f"s{turn}", volume) for turn in range(3)]
    finally:
        stop.set()
        writer.join()
    for turn, snapshot in enumerate(snapshots):
        assert snapshot.record.consistency == "point in time"
        assert snapshot.record.capture.method in {"reflink", "subvolume"}
        restored = restore(reflinks, f"r{turn}", snapshot, filesystem(kind))
        assert os.listdir(reflinks.path(restored)) == ["image"]
        at = publish_alone(reflinks, restored, filesystem(kind), f"restored-{turn}")  # beside the origin: the same UUID
        assert (at / "before").read_text() == "content"
        reflinks.node.unpublish(restored.record.handle, str(at))
        reflinks.node.unstage(restored.record.handle, reflinks.staging_of(restored.record.handle))
        image = reflinks.path(restored) / "image"
        checker = ["e2fsck", "-f", "-n", image] if kind == "ext4" else ["xfs_repair", "-n", image]
        assert subprocess.run(checker, capture_output=True, check=False).returncode == 0


def test_a_clone_is_another_image_and_larger_if_it_shall_be(reflinks):
    volume = make_image(reflinks, "v", filesystem())
    target = publish_alone(reflinks, volume, filesystem(), "pod")
    (target / "file").write_text("content")
    os.sync()
    clone = make_image(reflinks, "clone", filesystem(), size=64 * MIB, source=reflinks.volume_source(volume))
    at = publish_alone(reflinks, clone, filesystem(), "clone")
    assert (at / "file").read_text() == "content"
    assert os.statvfs(at).f_blocks * os.statvfs(at).f_frsize > 50 * MIB
    (at / "file").write_text("changed")
    assert (target / "file").read_text() == "content"


def test_an_image_that_grows_before_it_is_captured_gives_its_snapshot_its_new_size_and_is_too_large_for_a_clone(
    tmp_path, make_disk
):
    bench = make_bench(tmp_path, (HostPathPool("default", make_disk("xfs", size="1G", kind="xfs") / "pool"),))
    volume = make_image(bench, "v", block())
    made, refused = [], []

    def clone():
        with pytest.raises(OutOfRange, match="33554432 bytes by now"):
            make_image(bench, "clone", block(), size=16 * MIB, source=bench.volume_source(volume))
        refused.append("clone")

    with all_turns_taken(bench):
        asked = [threading.Thread(target=lambda: made.append(bench.snapshot("snap", volume))), threading.Thread(target=clone)]
        for thread in asked:
            thread.start()
        until(lambda: sum(bool(job.ahead) for job in bench.domain.jobs.running()) == 2)
        bench.volumes.expand(volume.record.handle, CapacityRange(32 * MIB), None)
    for thread in asked:
        thread.join()
    assert refused == ["clone"]
    assert made[0].record.size_bytes == 32 * MIB
    with pytest.raises(OutOfRange, match="the content source needs 33554432"):
        restore(bench, "restored", made[0], block(), size=16 * MIB)
    assert os.stat(bench.path(restore(bench, "restored", made[0], block(), size=32 * MIB)) / "image").st_size == 32 * MIB
    bench.sweep()
    assert bench.leftovers() == []
    bench.domain.stop(5)


def test_block_is_cloned_and_restored_bit_by_bit(bench):
    volume = make_image(bench, "v", block())
    target = publish_alone(bench, volume, block(), "pod")
    with target.open("r+b") as device:
        device.seek(5 * MIB)
        device.write(b"mine")
    bench.node.unpublish(volume.record.handle, str(target))
    bench.node.unstage(volume.record.handle, bench.staging_of(volume.record.handle))
    snapshot = bench.snapshot("s", volume)
    clone = make_image(bench, "c", block(), source=bench.volume_source(volume))
    restored = restore(bench, "r", snapshot, block(), size=32 * MIB)
    for copy, size in ((clone, 16 * MIB), (restored, 32 * MIB)):
        content = publish_alone(bench, copy, block(), copy.record.id).read_bytes()
        assert (len(content), content[5 * MIB : 5 * MIB + 4]) == (size, b"mine")


def test_an_image_in_use_is_not_copied_bit_by_bit(bench):
    if bench.domain.services.volumes._creation._contents._captures.abilities_of(bench.pool()).best in {"subvolume", "reflink"}:
        pytest.skip("needs a scratch directory on a filesystem without reflinks")
    volume = make_image(bench, "v", filesystem())
    staging = bench.stage(volume.record.handle, filesystem())
    with pytest.raises(FailedPrecondition, match="reflinks"):
        bench.snapshot("s", volume)
    with pytest.raises(FailedPrecondition, match="reflinks"):
        make_image(bench, "c", filesystem(), source=bench.volume_source(volume))
    bench.node.unstage(volume.record.handle, staging)
    snapshot = bench.snapshot("s", volume)
    assert snapshot.record.consistency == "point in time"


def test_content_keeps_its_form(bench):
    image, raw, plain = make_image(bench, "i", filesystem()), make_image(bench, "b", block()), bench.create("d", size=16 * MIB)
    wrong = [
        (image, block(), Layout.IMAGE),
        (image, filesystem("xfs"), Layout.IMAGE),
        (image, filesystem(), Layout.DIRECTORY),
        (raw, filesystem(), Layout.IMAGE),
        (raw, filesystem(), None),
        (plain, filesystem(), Layout.IMAGE),
        (plain, block(), None),
    ]
    for number, (volume, capability, layout) in enumerate(wrong):
        with pytest.raises(InvalidArgument, match="content keeps its"):
            make_image(bench, f"x{number}", capability, size=400 * MIB, source=bench.volume_source(volume), layout=layout)
    clone = make_image(bench, "same", filesystem(""), size=16 * MIB, source=bench.volume_source(image), layout=None)
    assert clone.record.form == image.record.form


# --- two nodes ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_nodes(tmp_path):
    pool = HostPathPool("default", tmp_path / "pools" / "shared", shared=True)
    first = make_bench(tmp_path, (pool,), node_id="first")
    second = make_bench(
        tmp_path, (pool,), node_id="second", kubelet_dir=tmp_path / "second", state_directory=tmp_path / "second" / "state"
    )
    second.kubelet = tmp_path / "second"
    second.kubelet.mkdir(exist_ok=True)
    yield first, second
    first.domain.stop(5)
    second.domain.stop(5)


@pytest.mark.parametrize("capability", [filesystem(), block()], ids=["mount", "block"])
def test_a_second_node_is_refused_by_the_name_of_the_first_until_that_lets_go(two_nodes, capability):
    first, second = two_nodes
    volume = make_image(first, "v", capability)
    handle = volume.record.handle
    staging = first.stage(handle, capability)
    before = (first.path(volume) / "image").read_bytes()
    with pytest.raises(FailedPrecondition, match="held by node 'first'"):
        second.stage(handle, capability)
    assert devices_below(first.root) == devices_below(first.root / "kubelet")
    assert list(second.domain.state.volumes.readable()) == []  # for the kubelet that was final: no Unstage comes
    assert (first.path(volume) / "image").read_bytes() == before
    second.node.unstage(handle, second.staging_of(handle))
    first.stage(handle, capability)
    first.node.unstage(handle, staging)
    second.stage(handle, capability)


def test_of_two_nodes_at_once_one_gets_it(two_nodes):
    handle = make_image(two_nodes[0], "v", filesystem()).record.handle
    got, refused = [], []

    def stage(node):
        try:
            node.stage(handle, filesystem())
            got.append(node)
        except FailedPrecondition as error:
            refused.append(str(error))

    threads = [threading.Thread(target=stage, args=(node,)) for node in two_nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 1)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("holder_now", ["another node", "nobody"])
def test_a_node_that_lost_the_image_writes_nothing_more_when_it_takes_it_away(bench, kind, holder_now):
    # The kernel writes back by itself every few seconds, and whenever somebody on the machine calls sync(2): once, twice, but not each time.
    changed = [taken_away_by_a_node_that_lost_it(bench, f"v{attempt}", kind, holder_now) for attempt in range(3)]
    assert [] in changed


def taken_away_by_a_node_that_lost_it(bench, name, kind, holder_now):
    """Unstage an image that another node has, or nobody; return where it changed meanwhile."""
    volume = make_image(bench, name, filesystem(kind))
    staging = bench.stage(volume.record.handle, filesystem(kind))
    target = bench.publish(volume.record.handle, f"pod-{name}", filesystem(kind))
    (target / "old").write_bytes(b"x" * 4 * MIB)
    os.sync()
    (target / "old").unlink()  # a trim would now punch holes, by this node's idea of what is free
    (target / "late").write_text("not synced")
    holder, image = bench.path(volume) / "holder.json", bench.path(volume) / "image"
    if holder_now == "nobody":
        holder.unlink()
    else:
        holder.write_text(json.dumps({**json.loads(holder.read_text()), "node_id": "other", "epoch": 7}))
    left = holder.read_text() if holder.exists() else None
    bench.node.unpublish(volume.record.handle, str(target))
    before = image.read_bytes()
    bench.node.unstage(volume.record.handle, staging)
    after = image.read_bytes()
    assert len(after) == len(before)
    assert (holder.read_text() if holder.exists() else None) == left
    assert devices_below(bench.root) == []
    return [at for at in range(0, len(after), 4096) if after[at : at + 4096] != before[at : at + 4096]]


def test_what_a_node_held_before_it_was_started_anew_it_may_have_again(bench):
    volume = make_image(bench, "v", filesystem())
    staging = bench.stage(volume.record.handle, filesystem())
    holder = bench.path(volume) / "holder.json"
    body = json.loads(holder.read_text())
    holder.write_text(json.dumps({**body, "boot_id": "an earlier one"}))
    take_down(bench.root)  # what a boot does
    bench.restarted().stage(volume.record.handle, filesystem())
    assert json.loads(holder.read_text()) == body
    bench.node.unstage(volume.record.handle, staging)
    assert not holder.exists()
