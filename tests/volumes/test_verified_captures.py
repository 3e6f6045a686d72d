"""Digests: made when a class says so or by hand, compared when a restore asks for it; and what a capture says when it cannot be whole."""

import errno
import functools
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from bench import MIB, Bench, copying_stands_still_at, make_bench, until
from images import block, filesystem, make_image
from rivals import Slow
from trees import fill, seen

from csi_driver.config import HostPathPool
from csi_driver.errors import FailedPrecondition, NotFound, OperationPending
from csi_driver.linux.copies import Progress
from csi_driver.linux.tree_digests import digest_tree
from csi_driver.rpc.status import to_status
from csi_driver.volumes import manifests, verification
from csi_driver.volumes.jobs import JobControl, Jobs
from csi_driver.volumes.model import ContentSource, SourceKind
from csi_driver.volumes.requests import CreateSnapshot, Page


@pytest.fixture
def source(bench):
    volume = bench.create("source")
    fill(bench.path(volume))
    return volume


def cut(bench, name, volume, *, digests=True):
    return bench.snapshots.create(CreateSnapshot(name, volume.record.handle, digests=digests), time.monotonic() + 60)


def data_of(bench: Bench, snapshot) -> Path:
    return bench.pool(snapshot.record.pool).backend.root() / ".csi/snapshots-data" / snapshot.record.id


def manifests_in(bench: Bench, pool="default"):
    return os.listdir(bench.pool(pool).backend.root() / ".csi/manifests")


def source_of(snapshot) -> ContentSource:
    return ContentSource(SourceKind.SNAPSHOT, snapshot.record.handle)


def restore_verified(bench, name, snapshot, **parameters):
    return bench.create(name, source=source_of(snapshot), verify=True, **parameters)


def flip_a_byte(path: Path) -> None:
    """As a disk does: neither the size nor a time shows it."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# --- digests ----------------------------------------------------------------------------------------------------------------------


def test_a_class_with_digests_makes_them_before_the_snapshot_is_ready(bench, source):
    snapshot = cut(bench, "s", source)
    assert snapshot.record.manifest.entries == sum(
        not path.is_dir() or path.is_symlink() for path in bench.path(source).rglob("*")
    )
    assert manifests_in(bench) == [snapshot.record.id]
    assert cut(bench, "plain", source, digests=False).record.manifest is None
    assert bench.restarted().snapshots.get(snapshot.record.handle) == snapshot
    bench.snapshots.delete(snapshot.record.handle)
    assert manifests_in(bench) == []


def test_digests_that_would_be_too_long_are_refused_and_leave_nothing(bench, source, monkeypatch):
    long = bench.path(source)
    for _ in range(12):
        long /= "n" * 250
    os.makedirs(long)
    monkeypatch.setattr(verification, "read_manifest", functools.partial(manifests.read_manifest, most_bytes=20_000))
    cut(bench, "short", source)
    for number in range(10):
        (long / str(number)).touch()
    with pytest.raises(FailedPrecondition, match="more than 20000 bytes"):
        cut(bench, "s", source)
    bench.sweep()
    assert len(manifests_in(bench)) == 1
    assert bench.leftovers() == []
    assert cut(bench, "s", source, digests=False)


@pytest.mark.parametrize("most_open", [1, 100])
def test_digests_of_hard_links_are_the_same_whatever_memory_is_kept_for_them(bench, source, most_open):
    for folder in ("a", "b"):
        (bench.path(source) / folder).mkdir()
    for number in range(5):
        (bench.path(source) / "a" / str(number)).write_text(f"content {number}")
        os.link(bench.path(source) / "a" / str(number), bench.path(source) / "b" / str(number))
    top = os.open(bench.path(source), os.O_RDONLY | os.O_DIRECTORY)
    found = []
    try:
        digest_tree(top, found.append, Progress(), lambda: False, most_open)
    finally:
        os.close(top)
    by_path = {entry.path: entry.digest for entry in found}
    for number in range(5):
        assert by_path[b"a/%d" % number] == by_path[b"b/%d" % number]
    assert len({by_path[b"a/%d" % number] for number in range(5)}) == 5


def test_a_snapshot_whose_digests_were_cut_off_by_a_crash_gets_them_from_the_retry(bench, source, monkeypatch):
    def crash(*_):
        raise SystemExit("killed here")

    with monkeypatch.context() as killed:
        killed.setattr(manifests.Manifest, "keep", crash)
        killed.setattr(bench.snapshots, "give_up", lambda *_: None)  # a killed process takes nothing back
        with pytest.raises(SystemExit):
            cut(bench, "s", source)
    again = cut(bench.restarted(), "s", source)
    assert again.record.manifest is not None
    assert manifests_in(bench) == [again.record.id]


def test_a_snapshot_whose_digests_were_cut_off_by_a_stop_of_the_driver_stays_as_it_was_cut(bench, source, monkeypatch):
    whole = seen(bench.path(source))
    slow = Slow(monkeypatch, bench.snapshots._verifier, "digest", lambda: cut(bench, "s", source))
    bench.domain.stop(0)
    (bench.path(source) / "plain").write_text("changed since")
    assert isinstance(slow.go_on(), OperationPending)
    after = bench.restarted()
    (record,) = after.pool().snapshots.readable()
    after.sweep()
    again = cut(after, "s", source)
    assert again.record.created_at_ns == record.created_at_ns
    assert again.record.manifest is not None
    assert seen(data_of(after, again)) == whole
    after.sweep()
    assert after.leftovers() == []


def test_deleting_a_snapshot_stops_its_digests_and_nothing_is_left(bench, source, monkeypatch):
    handle = bench.pool().handle_of(bench.pool().id_of("snapshot", "s"))
    slow = Slow(monkeypatch, bench.snapshots._verifier, "digest", lambda: cut(bench, "s", source))
    with pytest.raises(OperationPending):
        bench.snapshots.delete(handle)
    assert isinstance(slow.go_on(), OperationPending)
    assert bench.pool().snapshots.ids() == []
    bench.snapshots.delete(handle)
    bench.sweep()
    assert bench.leftovers() == []


def test_a_verified_restore_of_a_whole_snapshot_is_made_and_counts_only_what_it_copied(bench, source):
    snapshot = cut(bench, "s", source)
    restored = restore_verified(bench, "restored", snapshot)
    assert seen(bench.path(restored)) == seen(bench.path(source))
    plain = bench.restore("plain", snapshot)
    assert (restored.record.capture.files, restored.record.capture.bytes) == (
        plain.record.capture.files,
        plain.record.capture.bytes,
    )


def test_a_verified_restore_of_a_damaged_snapshot_is_refused_by_name_and_leaves_nothing(bench, source):
    snapshot = cut(bench, "s", source)
    flip_a_byte(data_of(bench, snapshot) / "folder/deep/script")
    with pytest.raises(FailedPrecondition, match=r"is damaged, nothing was restored from it: folder/deep/script \(changed\)"):
        restore_verified(bench, "restored", snapshot)
    bench.sweep()
    assert bench.leftovers() == []
    assert [volume.record.name for volume in bench.volumes.list(Page())[0]] == ["source"]
    assert bench.restore("as it is", snapshot)  # who does not ask gets what there is


def test_a_verified_restore_of_a_snapshot_without_digests_says_how_to_make_them(bench, source):
    snapshot = cut(bench, "s", source, digests=False)
    with pytest.raises(FailedPrecondition, match="tatami snapshots verify"):
        restore_verified(bench, "restored", snapshot)
    bench.domain.verifier.verify(snapshot.record.handle, JobControl("by hand"))
    assert restore_verified(bench, "restored", snapshot)


@pytest.mark.root
@pytest.mark.parametrize("capability", [filesystem("ext4"), block()], ids=["ext4", "block"])
def test_digests_of_an_image_are_of_the_image_and_tell_a_spoilt_one(bench, capability):
    volume = make_image(bench, "source", capability)
    with (bench.path(volume) / "image").open("r+b") as image:
        image.seek(8 * MIB)
        image.write(os.urandom(MIB))
    asked_for, by_hand = cut(bench, "s", volume), cut(bench, "t", volume, digests=False)
    assert asked_for.record.manifest.entries == 1
    # The first time makes them, as a class would have: the same content has the same digest.
    assert bench.domain.verifier.verify(by_hand.record.handle, JobControl("by hand")).differences == ()
    assert bench.snapshots.get(by_hand.record.handle).record.manifest == asked_for.record.manifest
    for snapshot in (asked_for, by_hand):
        assert bench.domain.verifier.verify(snapshot.record.handle, JobControl("by hand")).differences == ()
        flip_a_byte(data_of(bench, snapshot) / "image")
        found = bench.domain.verifier.verify(snapshot.record.handle, JobControl("by hand"))
        assert [(each.what, each.path) for each in found.differences] == [("changed", "image")]
    with pytest.raises(FailedPrecondition, match="image"):
        make_image(bench, "restored", capability, source=source_of(asked_for), verify=True)
    assert bench.leftovers() == []


@pytest.mark.root
def test_what_the_disk_does_not_give_back_is_damage_and_never_a_digest(tmp_path, make_disk):
    bench = make_bench(tmp_path, (HostPathPool("default", make_disk("btrfs", "256M", "btrfs") / "pool"),))
    volume = bench.create("source")
    (bench.path(volume) / "whole").write_bytes(os.urandom(MIB))
    pattern = os.urandom(MIB)
    (bench.path(volume) / "torn").write_bytes(pattern)
    snapshot = cut(bench, "s", volume, digests=False)
    kept = cut(bench, "kept", volume)
    tear(tmp_path / "disks/btrfs.img", pattern, data_of(bench, snapshot) / "torn")
    found = bench.domain.verifier.verify(snapshot.record.handle, JobControl("by hand"))
    assert [(each.what, each.path) for each in found.differences] == [("unreadable", "torn")]
    assert bench.snapshots.get(snapshot.record.handle).record.manifest is None
    found = bench.domain.verifier.verify(kept.record.handle, JobControl("by hand"))
    assert [(each.what, each.path) for each in found.differences] == [("unreadable", "torn")]
    with pytest.raises(FailedPrecondition, match="does not give back: torn"):
        cut(bench, "too late", volume)
    bench.sweep()
    assert bench.leftovers() == []
    assert manifests_in(bench) == [kept.record.id]


def tear(image: Path, pattern: bytes, file: Path) -> None:
    """Spoil what is on the disk, below the filesystem's feet; btrfs knows the checksum."""
    os.sync()
    with image.open("r+b") as disk:
        position = disk.read().find(pattern[:4096])
        assert position > 0
        disk.seek(position)
        disk.write(b"spoilt" * 100)
        os.fsync(disk.fileno())
    (device,) = subprocess.run(
        ["losetup", "-n", "-O", "NAME", "-j", image], capture_output=True, text=True, check=True
    ).stdout.split()
    for place, flags in ((file, os.O_RDONLY), (Path(device), os.O_RDONLY)):
        descriptor = os.open(place, flags)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def test_a_manifest_that_takes_hours_to_make_is_not_taken_for_left_over(bench, source, monkeypatch):
    monkeypatch.setattr(manifests, "_TOUCH_SECONDS", 0.0)
    snapshot = cut(bench, "s", source, digests=False)
    (data_of(bench, snapshot) / "leased").touch()
    with copying_stands_still_at(data_of(bench, snapshot) / "leased"):
        results = []
        verifying = threading.Thread(
            target=lambda: results.append(bench.domain.verifier.verify(snapshot.record.handle, JobControl("by hand")))
        )
        verifying.start()
        until(lambda: manifests_in(bench))
        bench.age_temporaries()
        time.sleep(0.2)
        bench.sweep()
    verifying.join()
    assert results[0].whole


# --- jobs -------------------------------------------------------------------------------------------------------------------------


def test_a_job_says_what_it_does_how_far_and_how_quick_it_is_and_how_long_it_will_take():
    job = JobControl("job")
    job.begin("copying", 40 * MIB)
    for _ in range(10):
        job.progress.add_file()
        job.progress.add_bytes(MIB)
    job.started -= 8
    assert job.describe() == "copying: 10 files, 10.0 MiB of 40.0 MiB in 8 s, 1.2 MiB/s, about 24 s to go"
    job.begin("verifying", None)
    assert job.describe() == "verifying: 0 files, 0 B in 0 s, 0 B/s"
    assert job.bytes == 10 * MIB


def test_bytes_of_all_jobs_only_grow(bench):
    jobs, go_on, seen_bytes = Jobs(), threading.Event(), []

    def work(job):
        job.begin("copying", None)
        job.progress.add_bytes(5)
        job.begin("verifying", None)
        job.progress.add_bytes(7)
        go_on.wait(10)

    running = threading.Thread(target=lambda: jobs.run("job", work, time.monotonic() + 20))
    running.start()
    until(lambda: jobs.bytes() == 12)
    go_on.set()
    while running.is_alive():
        seen_bytes.append(jobs.bytes())
    running.join()
    assert {*seen_bytes, jobs.bytes()} == {12}


def test_each_member_of_a_group_counts_its_own_files(bench):
    volumes = [bench.create(f"volume-{number}") for number in range(3)]
    for number, volume in enumerate(volumes):
        for file in range(number + 1):
            (bench.path(volume) / str(file)).write_bytes(b"x" * 1000)
    group = bench.groups.create("group", [volume.record.handle for volume in volumes], time.monotonic() + 60)
    counted = {member.record.source_handle: member.record.capture.files for member in group.members}
    assert [counted[volume.record.handle] for volume in volumes] == [1, 2, 3]


# --- snapshots that Kubernetes meets anew -------------------------------------------------------------------------------------------


def test_a_snapshot_that_was_retained_is_found_by_its_handle_alone_and_restored(bench, source):
    """A VolumeSnapshotContent with `snapshotHandle`: the sidecar lists by id, another cluster or a year later."""
    snapshot, whole = bench.snapshot("s", source), seen(bench.path(source))
    bench.volumes.delete(source.record.handle)
    bench.sweep()
    later = bench.restarted()
    (found,), token = later.snapshots.list(Page(), snapshot.record.handle, "")
    assert (found, token) == (snapshot, "")
    assert later.snapshots.get(snapshot.record.handle) == snapshot
    assert seen(later.path(later.restore("restored", found))) == whole
    later.snapshots.delete(snapshot.record.handle)
    with pytest.raises(NotFound):
        later.snapshots.get(snapshot.record.handle)


# --- what cannot be captured --------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_file_that_may_not_be_read_is_named_with_what_would_help_and_nothing_is_left(tmp_path):
    """As on a share whose server squashes root: the driver works there as somebody who may not read everything."""
    bench = make_bench(tmp_path, (HostPathPool("default", tmp_path / "pool"),))
    volume = bench.create("source")
    (bench.path(volume) / "folder").mkdir()
    (bench.path(volume) / "folder/secret").write_text("its owner's alone")
    (bench.path(volume) / "folder/secret").chmod(0o600)
    subprocess.run(["chown", "-R", "65534", tmp_path / "pool"], check=True)
    os.chown(bench.path(volume) / "folder/secret", 0, 0)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o711)
    tmp_path.chmod(0o711)
    os.seteuid(65534)
    try:
        with pytest.raises(FailedPrecondition, match=r"'folder/secret' cannot be copied whole.*no_root_squash"):
            bench.snapshot("s", volume)
    finally:
        os.seteuid(0)
        for parent in tmp_path.parents[:2]:
            parent.chmod(0o700)
    bench.sweep()
    assert bench.leftovers() == []
    assert bench.snapshots.list(Page(), "", "")[0] == []


@pytest.mark.root
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_capture_for_which_there_is_no_room_is_resource_exhausted_and_leaves_nothing(tmp_path, make_disk, kind):
    disk = make_disk(kind, {"ext4": "64M", "xfs": "320M", "btrfs": "256M"}[kind], kind)
    bench = make_bench(tmp_path, (HostPathPool("default", disk / "pool"), HostPathPool("roomy", tmp_path / "roomy")))
    source = bench.create("source", pool="roomy")
    for number in range(20):
        (bench.path(source) / str(number)).write_bytes(os.urandom(2 * MIB))
    snapshot = bench.snapshot("s", source)
    room = os.statvfs(disk)
    subprocess.run(["fallocate", "-l", str(room.f_bavail * room.f_frsize - 12 * MIB), disk / "filler"], check=True)
    for _ in range(1 if kind == "btrfs" else 2):  # what is free of a full btrfs it takes for its own tables, and keeps
        with pytest.raises(OSError) as failure:
            bench.create("restored", source=ContentSource(SourceKind.SNAPSHOT, snapshot.record.handle), pool="default")
        assert failure.value.errno == errno.ENOSPC
        code, message = to_status(failure.value)
        assert (code.name, "No space left" in message) == ("RESOURCE_EXHAUSTED", True)
        bench.sweep()
        assert bench.leftovers() == []
        free_once_written_out(disk)
    (disk / "filler").unlink()
    until(lambda: free_once_written_out(disk) > 42 * MIB)
    restored = bench.create("restored", source=ContentSource(SourceKind.SNAPSHOT, snapshot.record.handle), pool="default")
    assert seen(bench.path(restored)) == seen(bench.path(source))


def free_once_written_out(disk: Path) -> int:
    subprocess.run(["sync", "-f", disk], check=True)
    room = os.statvfs(disk)
    return room.f_bavail * room.f_frsize
