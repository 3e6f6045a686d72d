import ctypes
import errno
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from bench import MIB, NODE, make_bench, mount_capability
from trees import fill, seen

from csi_driver.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, OperationPending, OutOfRange
from csi_driver.linux import mountinfo
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.model import AccessMode, AccessType, NodePublication
from csi_driver.volumes.parameters import EPHEMERAL
from csi_driver.volumes.requests import Capability, CapacityRange, PublishVolume, StageVolume

pytestmark = pytest.mark.root
READ_ONLY = mount_capability(AccessMode.SINGLE_NODE_READER_ONLY)
ALONE = mount_capability(AccessMode.SINGLE_NODE_SINGLE_WRITER)


@pytest.fixture
def volume(bench):
    made = bench.create("v", size=4 * MIB)
    fill(bench.path(made))
    return made


@pytest.fixture
def handle(volume):
    return volume.record.handle


def write(path):
    (Path(path) / "written").write_text("x")


def mounted_below(bench):
    return [mount.mount_point for mount in mountinfo.mounts_below(bench.kubelet)]


def mount_foreign(path):
    Path(path).mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "foreign", path], check=True)
    (Path(path) / "theirs").write_text("kept")


# --- stage ------------------------------------------------------------------------------------------------------------------------


def test_a_volume_that_is_just_being_staged_is_not_deleted(bench, volume, handle, monkeypatch):
    backend, refusals = bench.pool().backend, []
    bind = backend.stage

    def delete_first(*arguments, **named):
        with pytest.raises(OperationPending) as refusal:
            bench.restarted().volumes.delete(handle)
        refusals.append(refusal)
        bind(*arguments, **named)

    monkeypatch.setattr(backend, "stage", delete_first)
    staging = bench.stage(handle)
    assert len(refusals) == 1
    assert seen(Path(staging)) == seen(bench.path(volume))
    with pytest.raises(FailedPrecondition, match="still mounted"):
        bench.volumes.delete(handle)


def test_a_volume_that_is_just_being_deleted_is_not_staged(bench, handle):
    with bench.domain.services.snapshots._locks.hold(bench.pool(), f"content:{handle.rpartition('.')[2]}"):
        for node in (bench, bench.restarted()):
            with pytest.raises(OperationPending):
                node.stage(handle)
    assert mounted_below(bench) == []
    bench.stage(handle)


def test_a_staged_volume_is_seen_at_its_staging_path(bench, volume, handle):
    staging = bench.stage(handle)
    assert seen(Path(staging)) == seen(bench.path(volume))
    write(staging)
    assert (bench.path(volume) / "written").exists()


def test_staging_twice_mounts_once(bench, handle):
    staging = bench.stage(handle)
    before = topmost_mount_at(staging)
    bench.stage(handle)
    bench.restarted().stage(handle)
    assert [m for m in mounted_below(bench) if m == staging] == [staging]
    assert topmost_mount_at(staging) == before


@pytest.mark.parametrize("other", [READ_ONLY, mount_capability(AccessMode.SINGLE_NODE_MULTI_WRITER, "noexec")])
def test_staging_in_another_way_is_refused(bench, handle, other):
    bench.stage(handle)
    with pytest.raises(AlreadyExists, match="is staged at"):
        bench.stage(handle, other)


def test_staging_at_a_second_path_is_refused(bench, handle):
    bench.stage(handle)
    with pytest.raises(AlreadyExists, match="is staged at"):
        bench.node.stage(StageVolume(handle, bench.target("second"), mount_capability()))
    assert not Path(bench.target("second")).exists()


def test_a_read_only_access_mode_is_read_only_in_the_kernel(bench, handle):
    staging = bench.stage(handle, READ_ONLY)
    target = bench.publish(handle, "pod", READ_ONLY)
    for path in (staging, target):
        with pytest.raises(OSError) as refusal:
            write(path)
        assert refusal.value.errno == errno.EROFS
    write(bench.path(bench.volumes.get(handle)))


@pytest.mark.parametrize("flags", [("nosuid", "nodev", "noexec"), ("ro",), ("noatime", "nosuid")])
def test_mount_flags_are_the_mounts_options(bench, handle, flags):
    capability = mount_capability(AccessMode.SINGLE_NODE_MULTI_WRITER, *flags)
    staging = bench.stage(handle, capability)
    target = bench.publish(handle, "pod", capability)
    for path in (staging, str(target)):
        assert set(flags) <= topmost_mount_at(path).options


@pytest.mark.parametrize("flag", ["uid=0", "bind", "rw,exec", "", "x" * 500, "nosuid\n"])
def test_a_mount_flag_that_is_unknown_is_refused_and_nothing_is_mounted(bench, handle, flag):
    with pytest.raises(InvalidArgument, match="mount_flags"):
        bench.stage(handle, mount_capability(AccessMode.SINGLE_NODE_MULTI_WRITER, flag))
    assert mounted_below(bench) == []


# --- publish ----------------------------------------------------------------------------------------------------------------------


def test_a_published_volume_is_seen_by_the_pod_and_publishing_twice_mounts_once(bench, volume, handle):
    bench.stage(handle)
    target = bench.publish(handle, "pod")
    before = topmost_mount_at(target)
    bench.publish(handle, "pod")
    bench.restarted().publish(handle, "pod")
    assert topmost_mount_at(target) == before
    assert mounted_below(bench).count(str(target)) == 1
    write(target)
    assert (bench.path(volume) / "written").exists()


def test_read_only_for_one_pod_is_read_only_in_the_kernel_and_for_that_pod_alone(bench, handle):
    bench.stage(handle)
    readers, writers = bench.publish(handle, "reader", readonly=True), bench.publish(handle, "writer")
    with pytest.raises(OSError) as refusal:
        write(readers)
    assert refusal.value.errno == errno.EROFS
    write(writers)
    assert (readers / "written").read_text() == "x"


@pytest.mark.parametrize(
    "change", [{"readonly": True}, {"capability": mount_capability(AccessMode.SINGLE_NODE_MULTI_WRITER, "noexec")}]
)
def test_the_same_target_in_another_way_is_refused(bench, handle, change):
    bench.stage(handle)
    target = bench.publish(handle, "pod")
    with pytest.raises(AlreadyExists, match="not with readonly"):
        bench.publish(handle, "pod", **change)
    write(target)


def test_a_volume_for_one_pod_is_refused_to_a_second_by_name_of_the_first(bench, handle):
    bench.stage(handle, ALONE)
    first = bench.publish(handle, "first", ALONE)
    bench.publish(handle, "first", ALONE)
    with pytest.raises(FailedPrecondition, match=str(first)):
        bench.publish(handle, "second", ALONE)
    bench.node.unpublish(handle, str(first))
    bench.publish(handle, "second", ALONE)


def test_without_its_staging_nothing_is_published(bench, handle, volume):
    with pytest.raises(FailedPrecondition, match="NodeStageVolume comes first"):
        bench.publish(handle, "pod")
    staging = bench.stage(handle)
    subprocess.run(["umount", staging], check=True)
    with pytest.raises(FailedPrecondition, match="not staged"):
        bench.publish(handle, "pod")
    assert not Path(bench.target("pod")).exists()
    bench.stage(handle)
    write(bench.publish(handle, "pod"))
    assert (bench.path(volume) / "written").exists()


def test_a_staging_path_that_shows_something_else_is_never_published(bench, handle):
    staging = bench.stage(handle)
    mount_foreign(staging)
    with pytest.raises(FailedPrecondition, match="not staged"):
        bench.publish(handle, "pod")
    subprocess.run(["umount", staging], check=True)
    bench.publish(handle, "pod")


def test_publishing_from_another_staging_path_is_refused(bench, handle):
    bench.stage(handle)
    for staging in ("", bench.target("elsewhere")):
        with pytest.raises((FailedPrecondition, InvalidArgument), match="stag"):
            bench.node.publish(
                PublishVolume(handle, bench.target("pod"), mount_capability(), readonly=False, staging_path=staging)
            )


def test_a_volume_of_another_name_is_never_shown_under_this_one(bench, handle):
    other = bench.create("other")
    bench.stage(handle)
    with pytest.raises(AlreadyExists, match="has another mount on it"):
        bench.node.stage(StageVolume(other.record.handle, bench.staging_of(handle), mount_capability()))
    bench.stage(other.record.handle)
    bench.publish(handle, "pod")
    with pytest.raises(AlreadyExists, match="has another mount on it"):
        bench.publish(other.record.handle, "pod")
    with pytest.raises(AlreadyExists, match="is staged at"):
        bench.node.stage(StageVolume(other.record.handle, bench.staging_of(handle), mount_capability()))


# --- what is not ours -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["stage", "publish", "unpublish", "unstage"])
@pytest.mark.parametrize("what", ["a mount", "files", "a file", "a symlink", "a symlink to nowhere"])
def test_what_is_foreign_at_a_path_is_left_as_it_is(bench, handle, tmp_path, what, call):
    if call == "publish":
        bench.stage(handle)
    path = Path(bench.target("foreign"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "theirs").write_text("kept")
    if what == "a mount":
        mount_foreign(path)
    elif what == "files":
        path.mkdir()
        (path / "theirs").write_text("kept")
    elif what == "a file":
        path.write_text("kept")
    else:
        path.symlink_to(outside if what == "a symlink" else tmp_path / "nowhere")
    before, mounts_before = path.lstat(), mounted_below(bench)
    requests = {
        "stage": lambda: bench.node.stage(StageVolume(handle, str(path), mount_capability())),
        "publish": lambda: bench.publish(handle, "foreign"),
        "unpublish": lambda: bench.node.unpublish(handle, str(path)),
        "unstage": lambda: bench.node.unstage(handle, str(path)),
    }
    if call in ("stage", "publish") or what == "a mount":
        with pytest.raises((AlreadyExists, FailedPrecondition), match="left as"):
            requests[call]()
    else:
        requests[call]()
    after = path.lstat()
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)
    assert mounted_below(bench) == mounts_before
    assert os.listdir(outside) == ["theirs"]
    assert not (tmp_path / "nowhere").exists()
    if what in ("a mount", "files"):
        assert (path / "theirs").read_text() == "kept"


@pytest.mark.parametrize(
    "path",
    ["/etc/x", "relative/x", "{kubelet}", "{kubelet}/", "{kubelet}/../outside/x", "{kubelet}x/y", "//etc/x", "{kubelet}/a\0b", "",
     "{kubelet}/" + "n" * 256, "{kubelet}/" + "n/" * 2100 + "n", "{state}", "{state}/volumes", "{state}/x"],
)  # fmt: skip
def test_a_path_outside_the_kubelets_directory_or_in_our_own_is_refused(bench, handle, path):
    state = bench.installation.state_directory
    asked = path.format(kubelet=bench.kubelet, state=state)
    bench.stage(handle)
    before = sorted(os.listdir(bench.root)), sorted(os.listdir(state))
    for call in (
        lambda: bench.node.stage(StageVolume(handle, asked, mount_capability())),
        lambda: bench.node.publish(
            PublishVolume(handle, asked, mount_capability(), readonly=False, staging_path=bench.staging_of(handle))
        ),
        lambda: bench.node.unpublish(handle, asked),
        lambda: bench.node.unstage(handle, asked),
    ):
        with pytest.raises(InvalidArgument, match="_path is "):
            call()
    assert (sorted(os.listdir(bench.root)), sorted(os.listdir(state))) == before


def test_a_pool_below_the_kubelets_directory_is_no_target(tmp_path, pools):
    kubelet = tmp_path / "kubelet"
    bench = make_bench(tmp_path, (replace(pools[0], path=kubelet / "pool"),))
    volume = bench.create("v")
    with pytest.raises(InvalidArgument, match="own directories"):
        bench.node.unpublish(volume.record.handle, str(bench.path(volume)))
    assert bench.path(volume).is_dir()


def test_a_target_whose_parent_is_missing_is_refused(bench, handle):
    bench.stage(handle)
    with pytest.raises(FailedPrecondition, match="parent directory does not exist"):
        bench.node.publish(
            PublishVolume(
                handle,
                str(bench.kubelet / "no/such/pod"),
                mount_capability(),
                readonly=False,
                staging_path=bench.staging_of(handle),
            )
        )


# --- unpublish and unstage ----------------------------------------------------------------------------------------------------------


def test_a_volumes_way_back_can_be_gone_twice(bench, volume, handle):
    staging = bench.stage(handle)
    target = bench.publish(handle, "pod")
    for _ in range(2):
        bench.node.unpublish(handle, str(target))
        assert not target.exists()
    for _ in range(2):
        bench.node.unstage(handle, staging)
        assert topmost_mount_at(staging) is None
    assert bench.domain.state.get(handle) is None
    assert mounted_below(bench) == []
    assert (bench.path(volume) / "plain").exists()
    bench.stage(handle)


def test_a_volume_that_is_still_published_is_not_unstaged(bench, handle):
    staging = bench.stage(handle)
    target = bench.publish(handle, "pod")
    with pytest.raises(FailedPrecondition, match=str(target)):
        bench.node.unstage(handle, staging)
    assert topmost_mount_at(staging)


def test_unpublishing_one_pod_leaves_the_other(bench, handle):
    bench.stage(handle)
    one, two = bench.publish(handle, "one"), bench.publish(handle, "two")
    bench.node.unpublish(handle, str(one))
    write(two)
    assert bench.node.stats(handle, str(two), _soon()).bytes.used


def _soon():
    return time.monotonic() + 30


def test_files_in_a_target_that_lost_its_mount_are_never_removed(bench, handle):
    bench.stage(handle)
    target = bench.publish(handle, "pod")
    subprocess.run(["umount", target], check=True)
    write(target)
    bench.node.unpublish(handle, str(target))
    assert (target / "written").exists()
    assert bench.domain.state.get(handle).targets == ()


def test_unpublishing_works_when_the_volume_its_pool_and_its_record_are_gone(bench, volume, handle):
    staging = bench.stage(handle)
    target = bench.publish(handle, "pod")
    bench.pool().backend.root().rename(bench.root / "unplugged")
    bench.node.unpublish(handle, str(target))
    bench.node.unpublish(handle, str(target))
    bench.node.unstage(handle, staging)
    bench.node.unstage(handle, staging)
    assert mounted_below(bench) == []


def test_a_busy_target_is_taken_away_all_the_same(bench, handle):
    bench.stage(handle)
    target = bench.publish(handle, "pod")
    with (target / "open").open("w") as busy:
        bench.node.unpublish(handle, str(target))
        assert not target.exists()
        busy.write("still written")
    assert mounted_below(bench) == [bench.staging_of(handle)]


def test_a_driver_that_starts_anew_finds_what_it_has_mounted(bench, volume, handle):
    staging = bench.stage(handle)
    target = bench.publish(handle, "pod")
    after = bench.restarted()
    assert after.node.stats(handle, str(target), _soon()).bytes.total == 4 * MIB
    assert after.node.expand(handle, str(target), CapacityRange(4 * MIB)) == 4 * MIB
    assert after.node.health(handle, str(target), staging).entries == ()
    with pytest.raises(FailedPrecondition, match="still mounted"):
        after.volumes.delete(handle)
    after.node.unpublish(handle, str(target))
    after.node.unstage(handle, staging)
    after.volumes.delete(handle)
    assert mounted_below(bench) == []


def test_after_a_reboot_everything_can_be_mounted_again(bench, handle, volume):
    staging = bench.stage(handle)
    target = bench.publish(handle, "pod")
    for path in (target, staging):
        subprocess.run(["umount", path], check=True)
    after = bench.restarted()
    after.stage(handle)
    write(after.publish(handle, "pod"))
    assert (bench.path(volume) / "written").exists()


def test_one_call_at_a_time_works_on_a_volume(bench, handle):
    with bench.node._here.lock(handle), pytest.raises(OperationPending):
        bench.restarted().stage(handle)
    bench.stage(handle)


# --- who may be mounted here ----------------------------------------------------------------------------------------------------------


def test_a_volume_that_does_not_exist_is_not_found(bench):
    for handle in (bench.pool().handle_of("a" * 26), "not-ours", ""):
        with pytest.raises(NotFound):
            bench.node.stage(StageVolume(handle, bench.target("x"), mount_capability()))
    assert mounted_below(bench) == []


def test_a_volume_whose_directory_is_gone_is_not_found(bench, volume, handle):
    bench.path(volume).rename(bench.root / "stolen")
    with pytest.raises(NotFound, match="missing"):
        bench.stage(handle)


def test_a_symlink_or_mount_in_a_volumes_place_is_not_mounted(bench, volume, handle):
    bench.path(volume).rename(bench.root / "stolen")
    bench.path(volume).symlink_to("/etc")
    with pytest.raises(NotFound):
        bench.stage(handle)
    bench.path(volume).unlink()
    mount_foreign(bench.path(volume))
    try:
        with pytest.raises(NotFound):
            bench.stage(handle)
    finally:
        subprocess.run(["umount", bench.path(volume)], check=True)
    assert mounted_below(bench) == []


def test_a_capability_that_the_pool_lacks_is_refused(bench, handle):
    for capability in (
        Capability(AccessType.BLOCK, AccessMode.SINGLE_NODE_WRITER),
        mount_capability(AccessMode.MULTI_NODE_MULTI_WRITER),
    ):
        with pytest.raises(InvalidArgument):
            bench.stage(handle, capability)


def test_a_publish_context_must_be_what_the_controller_gave(bench):
    volume = bench.create("shared", pool="spread")
    handle = volume.record.handle
    capability = mount_capability(AccessMode.MULTI_NODE_MULTI_WRITER)
    true = {"directory": volume.record.directory, "layout": "directory", "epoch": "1"}
    with pytest.raises(FailedPrecondition, match="not published to this node"):
        bench.stage(handle, capability, publish_context={**true, "epoch": "0"})
    given = dict(bench.attachments.publish(handle, NodePublication(NODE, AccessMode.MULTI_NODE_MULTI_WRITER), capability, {}))
    assert given == true
    for key, value in [
        ("directory", "elsewhere"), ("directory", "../.."), ("directory", ".csi"), ("layout", "image"), ("epoch", "2"), ("epoch", "-1"),
        ("epoch", ""), ("epoch", "1" * 5000), ("epoch", "\u0661"), ("epoch", "1\n"),
    ]:  # fmt: skip
        with pytest.raises((InvalidArgument, FailedPrecondition), match="publish_context"):
            bench.stage(handle, capability, publish_context={**given, key: value})
    for key in given:
        with pytest.raises(InvalidArgument, match="publish_context"):
            bench.stage(handle, capability, publish_context={k: v for k, v in given.items() if k != key})
    bench.stage(handle, capability, publish_context=given)


# --- expansion on the node --------------------------------------------------------------------------------------------------------------


def test_the_node_confirms_what_the_controller_of_a_shared_pool_has_made(bench):
    handle = bench.create("shared", pool="spread").record.handle
    staging = bench.stage(handle)
    target = bench.publish(handle, "pod")
    with pytest.raises(OutOfRange, match="ControllerExpandVolume"):
        bench.node.expand(handle, str(target), CapacityRange(8 * MIB))
    bench.volumes.expand(handle, CapacityRange(8 * MIB), None)
    for path in (str(target), staging):
        assert bench.node.expand(handle, path, CapacityRange(8 * MIB)) == 8 * MIB
    with pytest.raises(OutOfRange):
        bench.node.expand(handle, str(target), CapacityRange(0, MIB))


def test_what_is_not_mounted_at_a_path_is_not_found_there(bench, handle):
    bench.stage(handle)
    target = bench.publish(handle, "pod")
    subprocess.run(["umount", target], check=True)
    for path in (str(target), bench.target("other"), "", "/", str(bench.root)):
        with pytest.raises(NotFound, match="not mounted at"):
            bench.node.expand(handle, path, CapacityRange(0))
        with pytest.raises(NotFound, match="not mounted at"):
            bench.node.stats(handle, path, _soon())
    with pytest.raises(NotFound):
        bench.node.stats("not-ours", str(target), _soon())


# --- static volumes -----------------------------------------------------------------------------------------------------------------------


def static(bench, directory, pool="default", handle="an-admins-volume"):
    context = {"pool": pool, "directory": directory}
    bench.stage(handle, volume_context=context)
    return bench.publish(handle, "static-pod", volume_context=context)


def test_an_existing_directory_is_a_static_volume_and_never_ours_to_delete(bench):
    there = bench.pool().backend.root() / "theirs/data"
    there.mkdir(parents=True)
    fill(there)
    before = seen(there)
    target = static(bench, "theirs/data")
    assert seen(target) == before
    assert bench.node.stats("an-admins-volume", str(target), _soon()).bytes.used > 0
    assert bench.node.expand("an-admins-volume", str(target), CapacityRange(9 * MIB)) == 9 * MIB
    bench.volumes.delete("an-admins-volume")
    bench.node.unpublish("an-admins-volume", str(target))
    bench.node.unstage("an-admins-volume", bench.staging_of("an-admins-volume"))
    bench.volumes.delete("an-admins-volume")
    bench.sweep()
    assert seen(there) == before


@pytest.mark.parametrize(
    "directory", [".csi", ".csi/volumes", "..", "../other", "/etc", "a/../b", "", ".", "archived", "archived/x", "-x"]
)
def test_a_static_volume_that_leaves_the_pool_is_refused(bench, directory):
    with pytest.raises(InvalidArgument, match="volume_context"):
        static(bench, directory)
    assert mounted_below(bench) == []


def test_a_static_volume_never_overlaps_a_recorded_one(bench):
    bench.create("v", directory="team/app/data")
    (bench.pool().backend.root() / "team/app/data/inside").mkdir()
    for directory in ("team", "team/app", "team/app/data", "team/app/data/inside"):
        with pytest.raises(InvalidArgument, match="overlaps volume"):
            static(bench, directory)
    (bench.pool().backend.root() / "team/app/data2").mkdir()
    write(static(bench, "team/app/data2"))


@pytest.mark.parametrize("what", ["nothing", "a file", "a symlink", "a way through a symlink", "a mount"])
def test_a_static_directory_that_is_none_is_refused_and_never_made(bench, what):
    there = bench.pool().backend.root() / "theirs"
    directory = "theirs"
    if what == "a file":
        there.write_text("")
    elif what == "a symlink":
        there.symlink_to("/etc")
    elif what == "a way through a symlink":
        there.symlink_to("/")
        directory = "theirs/etc"
    elif what == "a mount":
        mount_foreign(there)
    try:
        with pytest.raises((NotFound, InvalidArgument), match="theirs"):
            static(bench, directory)
    finally:
        if what == "a mount":
            subprocess.run(["umount", there], check=True)
    assert mounted_below(bench) == []
    assert what != "nothing" or not there.exists()


def test_a_static_volume_needs_its_context_and_a_pool_that_is_there(bench):
    with pytest.raises(NotFound, match="no volume_context"):
        bench.stage("an-admins-volume")
    with pytest.raises(InvalidArgument, match="allowed are default, other, spread"):
        static(bench, "x", pool="fast")
    with pytest.raises(InvalidArgument, match="unknown key"):
        bench.stage("an-admins-volume", volume_context={"pool": "default", "directory": "x", "server": "evil"})


def test_the_node_remembers_that_a_volume_is_static(bench):
    (bench.pool().backend.root() / "theirs").mkdir()
    write(static(bench, "theirs"))
    assert bench.domain.state.get("an-admins-volume").static


def test_binds_do_not_share_what_is_mounted_inside_a_volume_later(bench, handle):
    staging = Path(bench.stage(handle))
    target = bench.publish(handle, "pod")
    subprocess.run(["mount", "-t", "tmpfs", "inside", staging / "folder"], check=True)
    try:
        assert topmost_mount_at(target / "folder") is None
    finally:
        ctypes.CDLL(None).umount2(os.fsencode(staging / "folder"), 2)


# --- a damaged record of the node -------------------------------------------------------------------------------------------------


def damage_record(bench, handle):
    path = bench.installation.state_directory / "volumes" / f"{bench.domain.state.id_of(handle)}.json"
    assert path.is_file()
    path.write_text("{")
    return path


def test_a_damaged_node_record_keeps_no_volume_from_being_taken_away(bench, volume, handle, caplog):
    staging = bench.stage(handle)
    target = bench.publish(handle, "pod")
    record = damage_record(bench, handle)
    bench.node.unpublish(handle, str(target))
    assert not target.exists()
    bench.node.unstage(handle, staging)
    assert mounted_below(bench) == []
    assert not record.exists()
    assert "this node's record of a volume is damaged" in caplog.text
    assert (bench.path(volume) / "plain").exists()
    bench.stage(handle)
    assert (bench.publish(handle, "pod") / "plain").exists()


def test_a_damaged_node_record_takes_nobody_elses_mount_away(bench, handle):
    staging = bench.stage(handle)
    other = bench.create("other").record.handle
    bench.stage(other)
    target = bench.publish(other, "others")
    damage_record(bench, handle)
    foreign = bench.target("foreign")
    mount_foreign(foreign)
    for path in (str(target), foreign):
        with pytest.raises(FailedPrecondition, match="not volume"):
            bench.node.unpublish(handle, path)
        with pytest.raises(FailedPrecondition, match="not volume"):
            bench.node.unstage(handle, path)
    write(target)
    assert (Path(foreign) / "theirs").exists()
    bench.node.unstage(handle, staging)


def test_a_pod_whose_inline_volume_has_a_damaged_node_record_goes_with_the_volume(bench):
    target = bench.publish("csi-inline", "pod", volume_context={EPHEMERAL: "true", "size": "1Mi"})
    write(target)
    damage_record(bench, "csi-inline")
    bench.node.unpublish("csi-inline", str(target))
    assert not target.exists()
    bench.sweep()
    assert bench.leftovers() == []
    assert bench.pool().volumes.ids() == []
