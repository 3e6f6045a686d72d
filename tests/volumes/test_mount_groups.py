"""A pod's fsGroup on a hostPath volume: given by the driver, once, whoever asks in whatever order."""

from dataclasses import replace

import pytest
from bench import mount_capability

from csi_driver.linux import mounts
from csi_driver.volumes.model import AccessMode

pytestmark = pytest.mark.root


def of_group(group, *flags):
    return replace(mount_capability(AccessMode.SINGLE_NODE_MULTI_WRITER, *flags), mount_group=group)


def groups(bench, volume):
    top = bench.path(volume)
    return {path.lstat().st_gid for path in [top, *top.rglob("*")]}


def test_a_new_volume_belongs_to_the_pods_group(bench):
    volume = bench.create("v")
    bench.stage(volume.record.handle, of_group("4321"))
    target = bench.publish(volume.record.handle, "pod", of_group("4321"))
    (target / "dir").mkdir()
    assert groups(bench, volume) == {4321}
    assert bench.path(volume).stat().st_mode & 0o2070 == 0o2070


def test_restored_content_is_given_to_the_group_once(bench):
    origin = bench.create("origin")
    (bench.path(origin) / "dir").mkdir()
    (bench.path(origin) / "dir/file").touch()
    restored = bench.restore("restored", bench.snapshot("s", origin))
    bench.stage(restored.record.handle, of_group("4321"))
    assert groups(bench, restored) == {4321}
    assert groups(bench, origin) == {0}
    import os

    os.chown(bench.path(restored) / "dir/file", -1, 77)
    for _ in range(2):  # also after a restart that has forgotten what it did
        bench.restarted().node.unstage(restored.record.handle, bench.staging_of(restored.record.handle))
        bench.restarted().stage(restored.record.handle, of_group("4321"))
    assert groups(bench, restored) == {4321, 77}


def test_a_second_pod_of_another_group_gets_the_volume_too(bench):
    volume = bench.create("v")
    bench.stage(volume.record.handle, of_group("4321"))
    bench.publish(volume.record.handle, "one", of_group("4321"))
    bench.publish(volume.record.handle, "two", of_group("5000"))
    assert groups(bench, volume) == {5000}


def test_without_a_group_and_for_readers_nothing_is_changed(bench):
    volume = bench.create("v")
    reader = replace(mount_capability(AccessMode.SINGLE_NODE_READER_ONLY), mount_group="4321")
    bench.stage(volume.record.handle, reader)
    bench.publish(volume.record.handle, "pod", reader)
    assert groups(bench, volume) == {0}
    assert mounts.mount_is_read_only(bench.target("pod"))
