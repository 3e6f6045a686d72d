import json
import shutil
import subprocess
import threading
import time

import pytest
from bench import make_bench
from crash import every_crash, runs_to_its_end
from trees import fill

from csi_driver.backends.hostpath import HostPathBackend
from csi_driver.config import HostPathPool
from csi_driver.errors import FailedPrecondition, RecordDamaged, Unavailable
from csi_driver.volumes.pool_store import PoolStore

DRIVER = "hostpath.csi.tatami.dev"


def store(path, name="default", driver=DRIVER):
    return PoolStore(HostPathBackend(HostPathPool(name, path), {}), driver, "node-1")


def test_a_new_pool_gets_a_control_directory_for_root_alone_and_an_identity(tmp_path):
    identity = store(tmp_path / "a/b/pool").prepare()
    control = tmp_path / "a/b/pool/.csi"
    assert control.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in control.iterdir() if path.is_dir()} == {0o700}
    assert json.loads((control / "format.json").read_text()) == {
        "schema_version": 1,
        "pool_id": identity,
        "driver": DRIVER,
        "pool": "default",
    }


def test_the_identity_stays_and_every_pool_has_its_own(tmp_path):
    first = store(tmp_path / "one").prepare()
    assert store(tmp_path / "one").prepare() == first
    assert store(tmp_path / "one").prepare(first) == first
    assert store(tmp_path / "two").prepare() != first


def test_a_directory_that_holds_files_becomes_a_pool_and_keeps_them(tmp_path):
    fill(tmp_path)
    store(tmp_path).prepare()
    assert (tmp_path / "plain").read_text() == "content"


def test_a_control_directory_that_others_could_read_is_closed(tmp_path):
    store(tmp_path).prepare()
    (tmp_path / ".csi").chmod(0o755)
    store(tmp_path).prepare()
    assert (tmp_path / ".csi").stat().st_mode & 0o777 == 0o700


def test_many_processes_that_prepare_at_once_agree_on_one_identity(tmp_path):
    for round_ in range(5):
        place, start, found = tmp_path / str(round_), threading.Barrier(6), []

        def prepare(place=place, start=start, found=found):
            start.wait()
            found.append(store(place).prepare())

        threads = [threading.Thread(target=prepare) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 6
        assert len(set(found)) == 1


def test_a_start_that_is_killed_at_any_step_is_completed_by_the_next(tmp_path):
    number = iter(range(1000))
    place = None

    def start(_change):
        nonlocal place
        place = tmp_path / str(next(number))
        return lambda: store(place).prepare()

    for _ in every_crash(start):
        identity = store(place).prepare()
        assert store(place).prepare(identity) == identity


@pytest.mark.root
def test_a_disk_that_is_not_mounted_at_the_next_start_is_noticed_and_its_mount_point_stays_clean(tmp_path, make_disk):
    disk = make_disk("disk")
    pools = (HostPathPool("default", disk),)
    bench = make_bench(tmp_path, pools)
    bench.create("v")
    subprocess.run(["umount", disk], check=True)
    for _ in range(2):
        with pytest.raises(Unavailable, match="is its disk mounted"):
            bench.restarted()
    assert list(disk.iterdir()) == []


@pytest.mark.root
def test_another_disk_in_its_place_is_noticed(tmp_path, make_disk):
    disk = make_disk("disk")
    bench = make_bench(tmp_path, (HostPathPool("default", disk),))
    other = tmp_path / "other"
    other.mkdir()
    make_bench(other, (HostPathPool("default", tmp_path / "elsewhere"),))
    shutil.rmtree(disk / ".csi")
    shutil.copytree(tmp_path / "elsewhere/.csi", disk / ".csi")
    with pytest.raises(Unavailable, match="not the pool that this node knows"):
        bench.restarted()


def test_a_pool_that_was_meant_to_be_new_starts_once_the_node_has_forgotten_it(bench, pools):
    shutil.rmtree(pools[0].path)
    with pytest.raises(Unavailable, match=r"pools\.json"):
        bench.restarted()
    known = bench.installation.state_directory / "pools.json"
    known.write_text(json.dumps({name: i for name, i in json.loads(known.read_text()).items() if name != "default"}))
    assert bench.restarted().create("v")


def test_what_the_node_knows_of_its_pools_is_never_guessed(bench):
    (bench.installation.state_directory / "pools.json").write_text("{")
    with pytest.raises(FailedPrecondition, match=r"pools\.json is damaged"):
        bench.restarted()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"schema_version": 2}, FailedPrecondition, "format 2, this driver knows 1"),
        ({"driver": "nfs.csi.tatami.dev"}, FailedPrecondition, "nfs.csi.tatami.dev"),
        ({"pool": "another"}, FailedPrecondition, "is pool another"),
        ({"pool_id": None, "schema_version": None}, FailedPrecondition, "format None"),
    ],
)
def test_a_pool_that_is_not_this_drivers_is_refused_and_left_as_it_is(tmp_path, change, error, words):
    store(tmp_path).prepare()
    path = tmp_path / ".csi/format.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    before = path.read_bytes()
    with pytest.raises(error, match=words):
        store(tmp_path).prepare()
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "{}", '{"schema_version": 1}'])
def test_a_damaged_format_is_told_and_never_written_over(tmp_path, damage):
    store(tmp_path).prepare()
    (tmp_path / ".csi/format.json").write_text(damage)
    with pytest.raises(RecordDamaged, match=r"format\.json"):
        store(tmp_path).prepare()
    assert (tmp_path / ".csi/format.json").read_text() == damage


@pytest.mark.parametrize("what", ["a symlink", "a file"])
def test_a_control_directory_that_is_none_is_refused(tmp_path, what):
    pool = tmp_path / "pool"
    pool.mkdir()
    (tmp_path / "elsewhere").mkdir()
    if what == "a symlink":
        (pool / ".csi").symlink_to(tmp_path / "elsewhere")
    else:
        (pool / ".csi").touch()
    with pytest.raises(FailedPrecondition, match="must be a directory"):
        store(pool).prepare()
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.root
def test_a_control_directory_of_somebody_else_is_refused(tmp_path):
    import os

    (tmp_path / ".csi").mkdir()
    os.chown(tmp_path / ".csi", 1000, 1000)
    with pytest.raises(FailedPrecondition, match="must be a directory that belongs to"):
        store(tmp_path).prepare()


def test_a_path_that_can_be_no_directory_is_unavailable(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable):
        store(tmp_path / "file").prepare()
    with pytest.raises(Unavailable):
        store(tmp_path / "file/below").prepare()


def test_what_a_killed_driver_was_writing_on_the_node_is_removed_at_the_next_start(bench):
    bench.create("v")
    assert not runs_to_its_end(lambda: bench.domain.state.remember({"x": "y"}), 2)
    assert len([path for path in bench.installation.state_directory.iterdir() if path.name.startswith(".tmp.")]) == 1
    bench.age_temporaries()
    bench.restarted()
    assert not [path for path in bench.installation.state_directory.iterdir() if path.name.startswith(".tmp.")]


def test_a_pool_that_is_not_there_blocks_only_what_is_asked_of_it(bench, pools, caplog):
    volume = bench.create("v", pool="other")
    for pool in (pools[0], pools[2]):  # one before and one behind the pool that is asked, in the order of names
        pool.path.rename(bench.root / f"{pool.name} unplugged")
    new = bench.create("new", pool="other")
    snapshot = bench.snapshot("s", volume)
    group = bench.groups.create("g", [volume.record.handle, new.record.handle], time.monotonic() + 30)
    assert {record.pool for record in (new.record, snapshot.record, group.record)} == {"other"}
    told = [record.pool for record in caplog.records if record.message == "a pool was not looked into"]
    assert set(told) == {"default", "spread"}
    with pytest.raises(Unavailable, match="default"):
        bench.create("here", pool="default")
    for pool in (pools[0], pools[2]):
        (bench.root / f"{pool.name} unplugged").rename(pool.path)


def test_a_pool_that_the_driver_makes_is_roots_alone_and_one_that_it_finds_stays_as_it_is(tmp_path):
    (tmp_path / "found").mkdir(mode=0o755)
    (tmp_path / "found").chmod(0o755)
    made = make_bench(tmp_path, (HostPathPool("default", tmp_path / "made"), HostPathPool("found", tmp_path / "found")))
    assert (tmp_path / "made").stat().st_mode & 0o7777 == 0o700
    assert (tmp_path / "found").stat().st_mode & 0o7777 == 0o755
    volume = made.create("v", directory="team/app")
    assert made.path(volume).parent.stat().st_mode & 0o7777 == 0o711
