import errno
import os
import subprocess
import time
from pathlib import Path

import pytest
from bench import MIB, make_bench, mount_capability
from trees import fill

from csi_driver.config import HostPathPool
from csi_driver.errors import AlreadyExists, FailedPrecondition, InvalidArgument, RecordDamaged, ResourceExhausted
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.handles import VOLUME
from csi_driver.volumes.inline import inline_name
from csi_driver.volumes.lookup import volume_as_shown
from csi_driver.volumes.model import AccessMode, OnDelete
from csi_driver.volumes.parameters import EPHEMERAL
from csi_driver.volumes.requests import DEFAULT_CAPACITY_BYTES, Page

pytestmark = pytest.mark.root


def publish(bench, handle="csi-1", pod="pod", capability=None, readonly=False, **words):
    context = {EPHEMERAL: "true", "csi.storage.k8s.io/pod.name": "a-pod", **words}
    return bench.publish(handle, pod, capability, readonly, volume_context=context)


def records(bench):
    return [record for store in bench.domain.pools for record in store.volumes.readable()]


def test_an_inline_volume_is_made_for_its_pod_and_gone_with_it(bench):
    target = publish(bench, size="100Mi")
    fill(target)
    assert target.stat().st_mode & 0o7777 == 0o777
    (record,) = records(bench)
    assert (record.pool, record.capacity_bytes, record.ephemeral) == ("default", 100 * MIB, True)
    assert bench.node.stats("csi-1", str(target), time.monotonic() + 30).bytes.total == 100 * MIB
    assert bench.node.health("csi-1", str(target), "").entries == ()
    bench.node.unpublish("csi-1", str(target))
    assert not target.exists()
    assert records(bench) == []
    assert bench.domain.state.get("csi-1") is None
    bench.sweep()
    assert bench.leftovers() == []
    bench.node.unpublish("csi-1", str(target))


def test_an_inline_volume_that_nothing_holds_to_its_size_says_so_in_its_record(bench):
    target = publish(bench, size="1Mi")
    (target / "more").write_bytes(bytes(2 * MIB))
    (record,) = records(bench)
    assert record.limit.limiter == "none"
    assert record.limit.level.startswith("none: ")
    assert volume_as_shown(bench.pool(), record).context["limit"] == record.limit.level


def test_publishing_twice_keeps_what_the_pod_has_written(bench):
    target = publish(bench)
    (target / "written").write_text("x")
    assert publish(bench.restarted()) == target
    assert (target / "written").read_text() == "x"
    assert [record.capacity_bytes for record in records(bench)] == [DEFAULT_CAPACITY_BYTES]


def test_the_cluster_sees_nothing_of_inline_volumes(bench):
    publish(bench)
    assert bench.volumes.list(Page()) == ([], "")
    assert bench.health.list(Page()) == ([], "")


def test_a_pod_may_name_a_pool_only_where_the_admin_allows_it(bench):
    publish(bench, "csi-1", "one", pool="other")
    assert [record.pool for record in records(bench)] == ["other"]
    for pool in ("spread", "fast"):
        with pytest.raises(
            InvalidArgument, match=f'volume_context\\["pool"\\] is .{pool}.: pools that take inline volumes: default, other'
        ):
            publish(bench, "csi-2", "two", pool=pool)
    assert len(records(bench)) == 1


def test_a_default_pool_takes_no_inline_volumes_unless_the_admin_says_so(tmp_path):
    for name in ("closed", "without"):
        (tmp_path / name).mkdir()
    closed = make_bench(
        tmp_path / "closed", (HostPathPool("default", tmp_path / "one"), HostPathPool("scratch", tmp_path / "two", inline=True))
    )
    for words in ({}, {"pool": "default"}):
        with pytest.raises(InvalidArgument, match="take inline volumes: scratch"):
            publish(closed, **words)
    publish(closed, pool="scratch")
    assert [record.pool for record in records(closed)] == ["scratch"]
    closed.node.unpublish("csi-1", closed.target("pod"))
    without = make_bench(tmp_path / "without", (HostPathPool("default", tmp_path / "three"),))
    with pytest.raises(
        InvalidArgument, match=r"the default pool default takes no inline volumes; .* none \(`inline = true` in pools.toml\)"
    ):
        publish(without)
    assert records(without) == []


@pytest.mark.parametrize(
    "words",
    [
        {"directory": "../.."},
        {"path": "/etc"},
        {"onDelete": "retain"},
        {"mode": "4777"},
        {"uid": "0"},
        {"size": "lots"},
        {"size": "-1"},
        {"pool": "../x"},
    ],
)
def test_what_a_pod_author_may_not_say_is_refused_and_nothing_is_made(bench, words):
    with pytest.raises(InvalidArgument, match="volume_context"):
        publish(bench, **words)
    assert records(bench) == []
    assert not Path(bench.target("pod")).exists()
    assert bench.leftovers() == []


def test_more_than_the_pool_holds_is_refused(bench):
    with pytest.raises(ResourceExhausted):
        publish(bench, size="7Ei")
    assert records(bench) == []


def test_what_is_asked_otherwise_the_second_time_is_refused(bench):
    publish(bench, size="1Mi")
    with pytest.raises(AlreadyExists, match="capacity_range"):
        publish(bench, size="2Mi")
    with pytest.raises(AlreadyExists, match="readonly"):
        publish(bench, size="1Mi", readonly=True)


def test_an_inline_volume_may_be_read_only_or_without_programs(bench):
    reader = publish(bench, "csi-1", "reader", readonly=True)
    with pytest.raises(OSError, match="Read-only"):
        (reader / "x").touch()
    flagged = publish(bench, "csi-2", "flagged", mount_capability(AccessMode.SINGLE_NODE_WRITER, "noexec"))
    (flagged / "script").write_text("#!/bin/sh\n")
    (flagged / "script").chmod(0o755)
    with pytest.raises(PermissionError):
        subprocess.run([flagged / "script"], check=True)


def test_an_inline_volume_that_was_made_but_not_written_down_goes_with_unpublish(bench):
    # As after a kill between the two: the pool has the volume, the node knows nothing of it.
    bench.node._publisher._inline.create("csi-1", bench.pool(), mount_capability(), {EPHEMERAL: "true"})
    assert len(records(bench)) == 1
    bench.restarted().node.unpublish("csi-1", bench.target("pod"))
    assert records(bench) == []
    bench.sweep()
    assert bench.leftovers() == []


def test_a_claims_volume_is_never_taken_for_an_inline_one(bench):
    volume = bench.create("csi-1")
    bench.node.unpublish("csi-1", bench.target("pod"))
    bench.node.unpublish(volume.record.handle, bench.target("pod"))
    assert bench.volumes.get(volume.record.handle) == volume
    bench.stage(volume.record.handle)
    with pytest.raises(AlreadyExists, match="no inline volume"):
        publish(bench, volume.record.handle)
    assert len(records(bench)) == 1


def test_foreign_files_at_the_target_are_left_and_unpublish_removes_the_volume(bench):
    target = Path(bench.target("pod"))
    target.mkdir()
    (target / "theirs").write_text("kept")
    with pytest.raises(FailedPrecondition, match="left as they are"):
        publish(bench)
    bench.node.unpublish("csi-1", str(target))
    assert (target / "theirs").read_text() == "kept"
    assert records(bench) == []


def test_what_on_delete_keeps_is_never_an_inline_volume(bench):
    target = publish(bench)
    handle = bench.pool().handle_of(bench.pool().id_of(VOLUME, inline_name("csi-1")))
    bench.volumes.modify(handle, OnDelete.RETAIN)
    bench.node.unpublish("csi-1", str(target))
    bench.sweep()
    assert bench.leftovers() == []


def test_without_a_default_pool_the_pod_must_name_one(tmp_path):
    bench = make_bench(
        tmp_path, (HostPathPool("one", tmp_path / "one", inline=True), HostPathPool("two", tmp_path / "two")), default_pool=None
    )
    with pytest.raises(InvalidArgument, match="pool"):
        publish(bench)
    publish(bench, pool="one")
    bench.node.unpublish("csi-1", bench.target("pod"))


def damage(bench, handle):
    """Make the pool's record of an inline volume one that cannot be read, and return what mends it."""
    (record,) = (record for record in records(bench) if record.name == inline_name(handle))
    path = bench.pool().backend.root() / ".csi/volumes" / f"{record.id}.json"
    whole = path.read_text()
    path.write_text("{")
    return lambda: path.write_text(whole)


def test_an_inline_volume_that_cannot_be_deleted_keeps_no_pod_and_goes_when_it_can_be(bench):
    targets = {handle: publish(bench, handle, handle) for handle in ("csi-1", "csi-2", "csi-3", "csi-4")}
    (targets["csi-2"] / "data").write_text("content")
    mend = damage(bench, "csi-2")
    for handle, target in targets.items():
        bench.node.unpublish(handle, str(target))
        assert not target.exists()
    assert [known.handle for known in bench.domain.state.volumes.readable()] == ["csi-2"]
    fresh = bench.restarted()
    fresh.sweep()
    assert [known.handle for known in fresh.domain.state.volumes.readable()] == ["csi-2"]
    mend()
    fresh.sweep()
    assert list(fresh.domain.state.volumes.readable()) == []
    assert records(fresh) == []
    assert fresh.leftovers() == []


def test_an_inline_volume_of_which_the_node_remembers_nothing_is_not_given_up_when_it_cannot_be_deleted(bench):
    bench.node._publisher._inline.create("csi-1", bench.pool(), mount_capability(), {EPHEMERAL: "true"})
    mend = damage(bench, "csi-1")
    with pytest.raises(RecordDamaged):
        bench.node.unpublish("csi-1", bench.target("pod"))
    mend()
    bench.node.unpublish("csi-1", bench.target("pod"))
    assert records(bench) == []


# --- whose Unpublish never comes --------------------------------------------------------------------------------------------------


def lost_node(bench, target, wiped=True):
    """The node was lost: nothing is mounted any more, and, if it was `wiped`, nor is there anything of the pod."""
    subprocess.run(["umount", target], check=True)
    if wiped:
        target.rmdir()
        target.parent.rmdir()


def test_an_inline_volume_whose_pod_is_gone_without_an_unpublish_is_removed_with_its_record(bench):
    target, other = publish(bench), publish(bench, "csi-2", "other")
    (target / "data").write_text("content")
    lost_node(bench, target)
    fresh = bench.restarted()
    assert [fresh.domain.sweeper._orphans.sweep(patient=True) for _ in range(3)] == [0, 1, 0]
    assert [known.handle for known in fresh.domain.state.volumes.readable()] == ["csi-2"]
    assert [record.name for record in records(fresh)] == [inline_name("csi-2")]
    assert topmost_mount_at(other) is not None
    fresh.sweep()
    assert fresh.leftovers() == []
    fresh.node.unpublish("csi-1", str(target))


@pytest.mark.parametrize("left", ["its mount", "its directory", "its pod's directory", "no pod at all"])
def test_an_inline_volume_of_which_the_kubelet_has_anything_left_stays(bench, left):
    target = publish(bench)
    if left != "no pod at all":
        publish(bench, "csi-2", "other")
    if left != "its mount":
        lost_node(bench, target, wiped=left == "no pod at all")
    if left == "its pod's directory":
        target.rmdir()
    for _ in range(3):
        bench.sweep()
    assert inline_name("csi-1") in [record.name for record in records(bench)]
    assert bench.domain.state.get("csi-1") is not None


def test_an_inline_volume_whose_pods_directory_cannot_be_read_stays(bench, monkeypatch):
    target, _ = publish(bench), publish(bench, "csi-2", "other")
    lost_node(bench, target, wiped=False)
    lstat = os.lstat

    def broken(path, **named):
        if Path(path) == target.parent:
            raise OSError(errno.EIO, "the disk is broken")
        return lstat(path, **named)

    monkeypatch.setattr(os, "lstat", broken)
    for _ in range(3):
        bench.domain.sweeper._orphans.sweep(patient=True)
    monkeypatch.undo()
    assert bench.domain.state.get("csi-1") is not None
    assert inline_name("csi-1") in [record.name for record in records(bench)]


def test_an_inline_volume_that_its_pod_gets_again_meanwhile_stays(bench):
    target, _ = publish(bench), publish(bench, "csi-2", "other")
    lost_node(bench, target)
    orphans = bench.domain.sweeper._orphans
    assert orphans.sweep(patient=True) == 0
    publish(bench)
    assert orphans.sweep(patient=True) == 0
    assert topmost_mount_at(target) is not None
