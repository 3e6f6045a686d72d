import subprocess
import time
from pathlib import Path

import pytest
from bench import MIB, make_bench

from csi_driver.config import HostPathPool
from csi_driver.errors import NotFound, Unavailable
from csi_driver.volumes.answers import HealthLevel
from csi_driver.volumes.requests import Page

pytestmark = pytest.mark.root


@pytest.fixture
def small(tmp_path, make_disk):
    """A bench whose one pool lies on a small disk of its own."""
    (tmp_path / "small").mkdir()
    return make_bench(
        tmp_path / "small", (HostPathPool("default", make_disk("small", size="8M", options="nr_inodes=400") / "pool"),)
    )


def reasons(entries):
    return [entry.reason for entry in entries]


def of(bench, volume):
    return reasons(bench.health.volume(volume.record.handle).entries)


def unwell(bench):
    return {health.volume_handle: reasons(health.entries) for health in bench.health.list(Page())[0]}


def test_a_well_volume_and_pool_have_nothing_to_say(bench):
    volume = bench.create("v")
    assert of(bench, volume) == []
    assert unwell(bench) == {}
    assert list(bench.health.storage()) == []
    assert bench.health.ready() is None


def test_a_volume_whose_directory_is_gone_has_lost_its_data(bench):
    volume, well = bench.create("v"), bench.create("well")
    bench.path(volume).rmdir()
    (entry,) = bench.health.volume(volume.record.handle).entries
    assert (entry.level, entry.reason) == (HealthLevel.DATA_LOSS, "DirectoryMissing")
    assert volume.record.directory in entry.message
    assert unwell(bench) == {volume.record.handle: ["DirectoryMissing"]}
    assert of(bench, well) == []


@pytest.mark.parametrize("what", ["a file", "a symlink"])
def test_a_volume_whose_directory_is_something_else_is_not_well(bench, what):
    volume = bench.create("v")
    bench.path(volume).rmdir()
    if what == "a file":
        bench.path(volume).touch()
    else:
        bench.path(volume).symlink_to("/etc")
    assert len(of(bench, volume)) == 1
    assert unwell(bench) == {volume.record.handle: of(bench, volume)}


def test_a_damaged_record_is_told_and_the_data_left(bench):
    volume, well = bench.create("v"), bench.create("well")
    (bench.pool().backend.root() / f".csi/volumes/{volume.record.id}.json").write_text("{}")
    (entry,) = bench.health.volume(volume.record.handle).entries
    assert entry.reason == "RecordDamaged"
    assert volume.record.id in entry.message
    assert unwell(bench) == {volume.record.handle: ["RecordDamaged"]}
    assert of(bench, well) == []
    assert bench.path(volume).is_dir()


def test_a_full_pool_is_told_by_every_volume_in_it_and_by_no_other(small, bench):
    volume, elsewhere = small.create("v"), bench.create("elsewhere")
    large = small.path(volume) / "large"
    with pytest.raises(OSError, match="No space"), large.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(MIB // 8))
    assert of(small, volume) == ["PoolFull"]
    assert unwell(small) == {volume.record.handle: ["PoolFull"]}
    (entry,) = small.health.storage()
    assert (entry.level, entry.reason) == (HealthLevel.DEGRADED, "PoolFull")
    assert small.health.ready() is None
    assert of(bench, elsewhere) == []
    large.unlink()
    assert of(small, volume) == []


def test_a_pool_without_inodes_is_told(small):
    volume = small.create("v")
    with pytest.raises(OSError, match="No space"):
        for number in range(1000):
            (small.path(volume) / str(number)).touch()
    assert of(small, volume) == ["PoolOutOfInodes"]


def test_a_read_only_pool_is_told_and_can_still_be_started_and_read(small):
    volume = small.create("v")
    disk = small.pool().backend.root().parent
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert of(small, volume) == ["PoolReadOnly"]
    assert reasons(small.health.storage()) == ["PoolReadOnly"]
    with pytest.raises(OSError, match="Read-only"):
        small.create("w")
    after = small.restarted()
    assert after.volumes.get(volume.record.handle) == volume
    after.sweep()


def test_a_pool_that_is_not_there_is_unreachable_and_no_data_is_called_lost(small, make_disk):
    volume = small.create("v")
    disk = small.pool().backend.root().parent
    subprocess.run(["umount", disk], check=True)
    for expected in (1, 2):
        (entry,) = small.health.volume(volume.record.handle).entries
        assert (entry.level, entry.reason) == (HealthLevel.INACCESSIBLE, "PoolUnreachable")
        assert reasons(small.health.storage()) == ["PoolUnreachable"]
        assert "pool" in small.health.ready()
        with pytest.raises(Unavailable):
            small.health.list(Page())
        for call in (
            lambda: small.create("w"),
            lambda: small.volumes.get(volume.record.handle),
            lambda: small.volumes.delete(volume.record.handle),
            lambda: small.volumes.list(Page()),
        ):
            with pytest.raises(Unavailable):
                call()
        if expected == 1:  # and so when its empty mount point is there
            small.pool().backend.root().mkdir(parents=True)
    assert not any(small.pool().backend.root().iterdir())


def test_what_does_not_exist_is_not_found(bench):
    for handle in ("", "not-ours", bench.pool().handle_of("a" * 26)):
        with pytest.raises(NotFound):
            bench.health.volume(handle)
    volume = bench.create("v")
    bench.volumes.delete(volume.record.handle)
    with pytest.raises(NotFound):
        bench.health.volume(volume.record.handle)


def test_pages_of_the_unwell_hold_each_once(bench):
    volumes = [bench.create(f"v{n}", pool=("default", "other")[n % 2]) for n in range(8)]
    sick = {volume.record.handle for volume in volumes[:5]}
    for volume in volumes[:5]:
        bench.path(volume).rmdir()
    token, found = "", []
    while True:
        entries, token = bench.health.list(Page(2, token))
        found += [entry.volume_handle for entry in entries]
        if not token:
            break
    assert len(found) == len(set(found))
    assert set(found) == sick


def test_a_mount_that_is_missing_on_the_node_is_told(bench):
    volume = bench.create("v")
    handle = volume.record.handle
    staging = bench.stage(handle)
    target = bench.publish(handle, "pod")

    def seen():
        return reasons(bench.node.health(handle, str(target), staging).entries)

    assert seen() == []
    subprocess.run(["umount", target], check=True)
    assert seen() == ["MountMissing"]
    subprocess.run(["umount", staging], check=True)
    assert seen() == ["MountMissing", "StagingMissing"]
    bench.path(volume).rmdir()
    assert seen() == ["DirectoryMissing", "MountMissing", "StagingMissing"]
    with pytest.raises(NotFound):
        bench.node.health("not-ours", str(target), staging)


def test_a_published_volume_that_was_never_mounted_at_a_path_is_not_missing_there(bench):
    volume = bench.create("v")
    bench.stage(volume.record.handle)
    assert bench.node.health(volume.record.handle, bench.target("other"), "").entries == ()


def test_looking_changes_nothing(bench):
    volume = bench.create("v")
    before = Path(bench.path(volume)).stat()
    time.sleep(0.02)
    bench.health.volume(volume.record.handle)
    bench.health.list(Page())
    after = Path(bench.path(volume)).stat()
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
    assert bench.volumes.get(volume.record.handle) == volume
