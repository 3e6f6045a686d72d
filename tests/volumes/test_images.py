"""Image volumes with a filesystem, on hostPath: real loop devices, real mounts."""

import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from bench import make_bench, mount_capability
from images import LEAST, MIB, block, devices_below, devices_of, filesystem, make_image, take_down

from csi_driver.config import HostPathPool
from csi_driver.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
)
from csi_driver.linux import loop_devices, mountinfo
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.model import AccessMode, AccessType, Layout, LimitPolicy, Ownership
from csi_driver.volumes.requests import Capability, ClassParameters, StageVolume

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("own_mounts")]
KINDS = ("ext4", "xfs")


@pytest.fixture(autouse=True)
def no_loop_device_is_left(tmp_path: Path):
    yield
    take_down(tmp_path)


def image_of(bench, volume) -> Path:
    return bench.path(volume) / "image"


def fill(place: Path, user: int = 0) -> tuple[int, str]:
    """Write until nothing more fits; return how many bytes did, and what the writer was told."""
    done = subprocess.run(
        ["dd", "if=/dev/zero", "of=filler", "bs=64k", "conv=fsync"],
        cwd=place,  # which another user could not look up
        user=user,
        capture_output=True,
        text=True,
        check=False,
    )
    return (place / "filler").stat().st_size, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_one_sparse_file_that_no_tenant_can_reach(bench, kind):
    volume = make_image(bench, "v", filesystem(kind))
    assert bench.path(volume).stat().st_mode & 0o777 == 0o700
    assert os.listdir(bench.path(volume)) == ["image"]
    status = image_of(bench, volume).stat()
    assert (status.st_size, status.st_mode & 0o777) == (LEAST[kind], 0o600)
    assert status.st_blocks * 512 < (MIB if kind == "ext4" else 70 * MIB)
    assert volume.context["layout"] == "image"


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_pod_writes_is_there_again_after_the_volume_was_away(bench, kind):
    handle = make_image(bench, "v", filesystem(kind)).record.handle
    for turn in range(2):
        staging = bench.stage(handle, filesystem(kind))
        target = bench.publish(handle, "pod", filesystem(kind))
        mounted = topmost_mount_at(target)
        assert mounted is not None
        assert mounted.fs_type == kind
        assert "nodev" in mounted.options
        assert "discard" in mounted.super_options
        if turn:
            assert (target / "file").read_text() == "content"
        (target / "file").write_text("content")
        bench.node.unpublish(handle, str(target))
        bench.node.unstage(handle, staging)
        assert not target.exists()
        assert devices_below(bench.root) == []
        assert mountinfo.mounts_below(bench.kubelet) == ()


def test_the_class_says_who_owns_the_filesystem(bench):
    for kind in KINDS:
        volume = make_image(bench, kind, filesystem(kind), ownership=Ownership(1000, 1001, 0o2770))
        status = os.stat(bench.stage(volume.record.handle, filesystem(kind)))
        assert (status.st_uid, status.st_gid, status.st_mode & 0o7777) == (1000, 1001, 0o2770)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("user", [0, 1000])
def test_writes_stop_at_the_size_for_everybody(bench, kind, user):
    volume = make_image(bench, "v", filesystem(kind))
    handle = volume.record.handle
    bench.stage(handle, filesystem(kind))
    target = bench.publish(handle, "pod", filesystem(kind))
    target.chmod(0o777)
    empty = bench.node.stats(handle, str(target), 1e12).bytes.used
    written, said = fill(target, user)
    assert "No space left on device" in said
    assert 0.6 * LEAST[kind] < written <= LEAST[kind]
    assert image_of(bench, volume).stat().st_blocks * 512 <= LEAST[kind] + MIB
    stats = bench.node.stats(handle, str(target), 1e12)
    counted = int(subprocess.run(["du", "-sk", target], capture_output=True, text=True, check=True).stdout.split()[0]) * 1024
    shown = subprocess.run(["df", "-k", "--output=size,used", target], capture_output=True, text=True, check=True).stdout
    size, used = (int(word) * 1024 for word in shown.splitlines()[1].split())
    assert (stats.bytes.total, stats.bytes.used) == (size, used)
    # XFS counts what it keeps for its own trees as used, and so does df; what is written counts as du counts it.
    assert abs(stats.bytes.used - empty - counted) <= 0.01 * counted
    assert stats.bytes.available == 0 or stats.bytes.available < 0.01 * size


def test_staging_twice_attaches_once_also_after_a_restart(bench):
    handle = make_image(bench, "v", filesystem()).record.handle
    staging = bench.stage(handle, filesystem())
    before = topmost_mount_at(staging), devices_below(bench.root)
    assert len(before[1]) == 1
    bench.stage(handle, filesystem())
    bench.restarted().stage(handle, filesystem())
    assert (topmost_mount_at(staging), devices_below(bench.root)) == before


def test_a_restarted_driver_takes_the_volume_away(bench):
    handle = make_image(bench, "v", filesystem()).record.handle
    staging = bench.stage(handle, filesystem())
    target = bench.publish(handle, "pod", filesystem())
    other = bench.restarted()
    other.node.unpublish(handle, str(target))
    other.node.unstage(handle, staging)
    assert devices_below(bench.root) == []
    bench.volumes.delete(handle)
    assert bench.leftovers() == [] or all("trash" in left for left in bench.leftovers())


def test_a_node_that_has_lost_its_record_takes_the_volume_away(bench):
    handle = make_image(bench, "v", filesystem()).record.handle
    staging = bench.stage(handle, filesystem())
    target = bench.publish(handle, "pod", filesystem())
    for record in (bench.installation.state_directory / "volumes").iterdir():
        record.unlink()
    bench.node.unpublish(handle, str(target))
    bench.node.unstage(handle, staging)
    assert devices_below(bench.root) == []
    assert mountinfo.mounts_below(bench.kubelet) == ()


def test_a_volume_that_is_staged_is_not_deleted(bench):
    handle = make_image(bench, "v", filesystem()).record.handle
    bench.stage(handle, filesystem())
    with pytest.raises(FailedPrecondition, match="still mounted"):
        bench.volumes.delete(handle)


def test_a_read_only_publication_cannot_be_written(bench):
    handle = make_image(bench, "v", filesystem()).record.handle
    bench.stage(handle, filesystem())
    target = bench.publish(handle, "reader", filesystem(), readonly=True)
    with pytest.raises(OSError, match="Read-only"):
        (target / "file").write_text("x")
    writer = bench.publish(handle, "writer", filesystem())
    (writer / "file").write_text("x")
    assert (target / "file").read_text() == "x"


def test_a_filesystem_in_use_is_not_taken_away_behind_its_user(bench):
    handle = make_image(bench, "v", filesystem()).record.handle
    staging = bench.stage(handle, filesystem())
    target = bench.publish(handle, "pod", filesystem())
    with (target / "file").open("w") as busy:
        bench.node.unpublish(handle, str(target))
        with pytest.raises(Unavailable, match="still in use"):
            bench.node.unstage(handle, staging)
        (attached,) = devices_below(bench.root)
        with pytest.raises(Unavailable, match="still in use on this node from before"):
            bench.stage(handle, filesystem())  # a second device would be a second filesystem on the same bytes
        assert devices_below(bench.root) == [attached]
        busy.write("late")
    bench.node.unstage(handle, staging)
    assert devices_below(bench.root) == []
    assert Path(bench.stage(handle, filesystem()), "file").read_text() == "late"


def test_a_restarted_driver_finds_raw_blocks_whose_file_lost_its_name_with_the_mounts_of_the_one_before(bench):
    volume, other = (make_image(bench, name, block()) for name in ("v", "other"))
    handle = volume.record.handle
    for one in (volume, other):
        bench.stage(one.record.handle, block())
    first = bench.publish(handle, "first", block())
    first.write_bytes(b"kept")
    # As when the old driver's container is gone, and with it the mount through which the device had its file.
    for one in (volume, other):
        image = image_of(bench, one)
        (place,) = (
            found.mount_point for found in mountinfo.mounts_below(bench.kubelet) if found.root.endswith(image.parent.name)
        )
        subprocess.run(["umount", "-l", place], check=True)
        subprocess.run(["mount", "--bind", image.parent, place], check=True)
        assert {loop_devices.backing_file(name) for name in devices_of(image)} == {"/image"}
    again = bench.restarted()
    assert again.publish(handle, "first", block()) == first
    assert again.publish(handle, "second", block()).read_bytes()[:4] == b"kept"
    # The other's device has the same name by now, and is not taken for this one's.
    (foreign,) = devices_of(image_of(bench, other))
    again.domain.state.keep(replace(again.domain.state.get(handle), device=foreign))
    with pytest.raises(FailedPrecondition, match="is not staged"):
        again.publish(handle, "third", block())


def test_the_size_of_raw_block_is_told_wherever_the_kubelet_shows_it_and_nowhere_else(bench):
    volume, other = (make_image(bench, name, block()) for name in ("v", "other"))
    for one in (volume, other):
        bench.stage(one.record.handle, block())
        bench.publish(one.record.handle, one.record.name, block())
    shown = bench.kubelet / "plugins/kubernetes.io/csi/volumeDevices/pv/dev"
    shown.mkdir(parents=True)
    (shown / "pod").touch()
    subprocess.run(["mount", "--bind", bench.target("v"), shown / "pod"], check=True)
    try:
        handle = volume.record.handle
        places = [bench.target("v"), bench.staging_of(handle), str(shown / "pod"), f"{shown}/../dev/pod"]
        assert [bench.node.stats(handle, place, 1e12).bytes.total for place in places] == [volume.record.capacity_bytes] * 4
        for place in (bench.target("other"), str(shown), str(bench.kubelet), "/dev/null"):
            with pytest.raises(NotFound, match="is not mounted at"):
                bench.node.stats(handle, place, 1e12)
    finally:
        subprocess.run(["umount", shown / "pod"], check=True)


def test_raw_block_in_use_is_not_staged_on_the_device_that_is_ending(bench):
    handle = make_image(bench, "v", block()).record.handle
    staging = bench.stage(handle, block())
    (attached,) = devices_below(bench.root)
    with Path(f"/dev/{attached}").open("r+b", buffering=0) as busy:
        with pytest.raises(Unavailable, match="still in use"):
            bench.node.unstage(handle, staging)
        with pytest.raises(Unavailable, match="still in use on this node from before"):
            bench.stage(handle, block())  # the device would be the next volume's as soon as its last user lets go
        busy.write(b"late" * 128)
    bench.stage(handle, block())
    (attached,) = devices_below(bench.root)
    assert Path(f"/dev/{attached}").read_bytes()[:4] == b"late"


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_filesystem_is_refused_named_in_health_and_left_as_it_is(bench, kind):
    volume = make_image(bench, "v", filesystem(kind))
    handle, image = volume.record.handle, image_of(bench, volume)
    with image.open("r+b") as opened:
        for place in (8, 300) if kind == "xfs" else (1024 + 200, 1024 + 240):
            opened.seek(place)
            opened.write(b"\xff" * 120)
        if kind == "ext4":
            opened.seek(4096)
            opened.write(b"\xff" * 65536)
    before = image.read_bytes()
    with pytest.raises(FailedPrecondition):
        bench.stage(handle, filesystem(kind))
    entries = bench.node.health(handle, "", "").entries
    assert [entry.reason for entry in entries] == ["FilesystemDamaged"]
    assert devices_below(bench.root) == []  # for the kubelet the refusal is final: no Unstage will come
    assert not (image.parent / "holder.json").exists()
    assert image.read_bytes() == before
    bench.volumes.delete(handle)


def test_what_is_no_filesystem_any_more_is_never_formatted(bench):
    volume = make_image(bench, "v", filesystem())
    image_of(bench, volume).write_bytes(b"my own bytes".ljust(16 * MIB))
    with pytest.raises(FailedPrecondition, match="does not begin with"):
        bench.stage(volume.record.handle, filesystem())
    assert image_of(bench, volume).read_bytes().startswith(b"my own bytes")


def test_after_a_power_cut_the_filesystem_is_checked_and_whole(bench):
    volume = make_image(bench, "v", filesystem())
    staging = bench.stage(volume.record.handle, filesystem())
    Path(staging, "file").write_text("content")
    os.sync()
    torn = image_of(bench, volume).read_bytes()
    bench.node.unstage(volume.record.handle, staging)
    image_of(bench, volume).write_bytes(torn)
    staging = bench.stage(volume.record.handle, filesystem())
    assert Path(staging, "file").read_text() == "content"


def test_a_pod_s_group_is_given_the_filesystem(bench):
    capability = Capability(AccessType.MOUNT, AccessMode.SINGLE_NODE_MULTI_WRITER, fs_type="ext4", mount_group="4321")
    handle = make_image(bench, "v", capability).record.handle
    bench.stage(handle, capability)
    assert bench.publish(handle, "pod", capability).stat().st_gid == 4321


def test_a_missing_image_is_named_in_health_and_made_by_nobody(bench):
    volume = make_image(bench, "v", filesystem())
    image_of(bench, volume).unlink()
    assert [entry.reason for entry in bench.health.volume(volume.record.handle).entries] == ["ImageMissing"]
    with pytest.raises(NotFound, match="not there"):
        bench.stage(volume.record.handle, filesystem())
    bench.node.unstage(volume.record.handle, bench.staging_of(volume.record.handle))
    assert os.listdir(bench.path(volume)) == []


# --- what is asked for --------------------------------------------------------------------------------------------------------------


def test_other_filesystems_are_refused_by_name(bench):
    with pytest.raises(InvalidArgument, match="ext4 or xfs"):
        make_image(bench, "v", filesystem("btrfs"))
    assert bench.leftovers() == []


def test_several_nodes_are_refused(bench):
    with pytest.raises(InvalidArgument, match="one node at a time"):
        make_image(bench, "v", filesystem("ext4", AccessMode.MULTI_NODE_MULTI_WRITER), pool="spread")


def test_a_volume_is_staged_with_the_filesystem_that_it_has(bench):
    handle = make_image(bench, "v", filesystem("ext4")).record.handle
    with pytest.raises(InvalidArgument, match="an image with ext4"):
        bench.stage(handle, filesystem("xfs"))
    bench.stage(handle, mount_capability())


def test_the_same_name_with_another_layout_is_another_volume(bench):
    make_image(bench, "v", filesystem())
    for other in (filesystem("xfs"), block()):
        with pytest.raises(AlreadyExists, match="filesystem"):
            make_image(bench, "v", other)
    with pytest.raises(AlreadyExists, match="layout"):
        bench.create("v", size=16 * MIB, layout=Layout.DIRECTORY)


def test_a_filesystem_gets_the_least_size_that_it_can_have(bench):
    assert make_image(bench, "a", filesystem("xfs"), size=MIB).record.capacity_bytes == LEAST["xfs"]
    with pytest.raises(OutOfRange, match="limit_bytes"):
        make_image(bench, "b", filesystem("xfs"), size=MIB, limit=10 * MIB)
    assert make_image(bench, "c", filesystem(), size=20 * MIB + 1).record.capacity_bytes == 20 * MIB + 4096


def test_the_least_size_is_told_with_the_capacity(bench):
    capacity = bench.domain.services.capacity
    images = ClassParameters(layout=Layout.IMAGE)
    assert capacity.available(images, [filesystem("xfs")], None).minimum_volume_bytes == LEAST["xfs"]
    assert capacity.available(images, [block()], None).minimum_volume_bytes == MIB
    assert capacity.available(ClassParameters(), [mount_capability()], None).minimum_volume_bytes is None
    assert capacity.available(ClassParameters(layout=Layout.DIRECTORY), [block()], None).available_bytes == 0


def test_a_pool_without_room_for_the_filesystem_says_so_and_keeps_nothing(tmp_path, make_disk):
    small = make_bench(tmp_path, (HostPathPool("default", make_disk("small", size="40M") / "pool"),))
    try:
        with pytest.raises(ResourceExhausted, match="are asked for"):
            make_image(small, "v", filesystem("xfs"))
        assert small.leftovers() == [] or all("trash" in left for left in small.leftovers())
    finally:
        small.domain.stop(5)


def test_flags_of_the_mount_are_honoured_and_others_refused(bench):
    handle = make_image(bench, "v", filesystem()).record.handle
    wanted = filesystem("ext4", AccessMode.SINGLE_NODE_MULTI_WRITER, "noexec", "noatime")
    staging = bench.stage(handle, wanted)
    mounted = topmost_mount_at(staging)
    assert mounted is not None
    assert {"noexec", "noatime"} <= mounted.options
    with pytest.raises(InvalidArgument, match="data"):
        bench.stage(handle, filesystem("ext4", AccessMode.SINGLE_NODE_MULTI_WRITER, "data=writeback"))


# --- limits -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_quotas(tmp_path, make_disk):
    """A bench whose pool can hold no directory to a size."""
    (tmp_path / "bare").mkdir()
    found = make_bench(tmp_path / "bare", (HostPathPool("default", make_disk("bare", size="512M") / "pool"),))
    with pytest.raises(ResourceExhausted, match="limit: required"):
        found.volumes.create(replace(found.request("d", MIB), parameters=REQUIRED), time.monotonic() + 60)
    return found


REQUIRED = ClassParameters(limit=LimitPolicy.REQUIRED)


@pytest.mark.parametrize("capability", [filesystem("ext4"), filesystem("xfs"), block()], ids=["ext4", "xfs", "block"])
def test_a_required_limit_is_had_by_an_image_on_a_pool_that_has_no_quotas(without_quotas, capability):
    volume = make_image(without_quotas, "v", capability, limit_policy=LimitPolicy.REQUIRED)
    assert (volume.context["limiter"], volume.context["limit"]) == ("image", "hard")
    assert volume.record.limit.mark is None
    assert without_quotas.health.volume(volume.record.handle).entries == ()


def test_capacity_of_a_required_limit_is_none_for_directories_and_the_pools_for_images(without_quotas):
    def available(layout, *capabilities, **parameters):
        asked = replace(REQUIRED, layout=layout, **parameters)
        return without_quotas.domain.services.capacity.available(asked, capabilities, None).available_bytes

    assert available(Layout.DIRECTORY) == available(None, mount_capability()) == 0
    free = available(Layout.IMAGE)
    assert free > 500 * MIB
    assert available(Layout.IMAGE, filesystem("xfs")) == available(None, block()) == free
    assert available(Layout.IMAGE, inodes=100) == 0


def test_an_image_counts_no_files_and_says_so_or_is_refused(without_quotas):
    with pytest.raises(ResourceExhausted, match="not the number of files"):
        make_image(without_quotas, "v", filesystem(), limit_policy=LimitPolicy.REQUIRED, inodes=100)
    without_quotas.sweep()
    assert without_quotas.leftovers() == []
    volume = make_image(without_quotas, "v", filesystem(), inodes=100)
    assert volume.context["limit"] == "hard; the number of files is not limited"


def test_a_fault_is_forgotten_once_the_kubelet_has_given_the_volume_up(bench):
    volume = make_image(bench, "v", filesystem())
    (bench.path(volume) / "image").write_bytes(bytes(16 * MIB))
    staging = bench.kubelet / "plugins/kubernetes.io/csi/driver/0123/globalmount"
    staging.parent.mkdir(parents=True)
    for _ in range(2):
        with pytest.raises(FailedPrecondition, match="does not begin with"):
            bench.node.stage(StageVolume(volume.record.handle, str(staging), filesystem()))
    bench.sweep()
    assert "does not begin with" in bench.domain.state.get(volume.record.handle).fault
    shutil.rmtree(staging.parent)
    bench.sweep()
    assert bench.domain.state.get(volume.record.handle) is None
