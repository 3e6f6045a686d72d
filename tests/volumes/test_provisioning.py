import os
import threading
import time
from dataclasses import replace

import pytest
from bench import DRIVER, MIB, NODE, copying_stands_still_at, make_bench, mount_capability, until
from trees import fill, seen

from csi_driver.config import HostPathPool
from csi_driver.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OperationPending,
    OutOfRange,
    RecordDamaged,
    ResourceExhausted,
)
from csi_driver.volumes.model import AccessMode, AccessType, ContentSource, NodePublication, OnDelete, Ownership, SourceKind
from csi_driver.volumes.placement import find_static
from csi_driver.volumes.requests import DEFAULT_CAPACITY_BYTES, Capability, CapacityRange, Page

HERE = {f"topology.{DRIVER}/node": NODE}


def handles(bench):
    return [volume.record.handle for volume in bench.volumes.list(Page())[0]]


# --- create -----------------------------------------------------------------------------------------------------------------------


def test_a_new_volume_is_an_empty_directory_of_its_pool_that_its_handle_names(bench):
    volume = bench.create("pvc-1")
    record = volume.record
    assert (record.name, record.pool, record.capacity_bytes, record.driver) == ("pvc-1", "default", MIB, DRIVER)
    assert bench.path(volume).parent == bench.pool().backend.root()
    assert os.listdir(bench.path(volume)) == []
    assert bench.path(volume).stat().st_mode & 0o7777 == 0o755
    assert record.handle.startswith("default.")
    assert volume.topology == HERE
    assert volume.context.items() >= {"pool": "default", "layout": "directory", "limiter": "none"}.items()
    assert volume.context["limit"].startswith("none: its ")
    assert bench.volumes.get(record.handle) == volume


def test_the_context_of_a_volume_says_nothing_of_where_it_lies(bench):
    volume = bench.create("pvc-1", directory="secret/place")
    assert "secret" not in str(volume.context)
    assert str(bench.root) not in str(volume.context)


def test_asking_again_gives_the_same_volume_and_leaves_its_content(bench):
    volume = bench.create("v")
    fill(bench.path(volume))
    before = seen(bench.path(volume))
    assert bench.create("v") == volume
    assert bench.restarted().create("v") == volume
    assert seen(bench.path(volume)) == before
    assert handles(bench) == [volume.record.handle]


def test_many_who_ask_for_one_name_at_once_get_one_volume_or_are_told_to_come_back(bench):
    answers = []
    start = threading.Barrier(8)

    def ask():
        start.wait()
        try:
            answers.append(bench.create("v"))
        except OperationPending:
            answers.append(None)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = {volume.record.handle for volume in answers if volume is not None}
    assert len(made) == 1
    assert handles(bench) == list(made)
    assert bench.create("v").record.handle in made


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": 2 * MIB}, "capacity_range"),
        ({"size": 0, "limit": MIB // 2}, "capacity_range"),
        ({"directory": "elsewhere"}, "parameters.directory"),
        ({"ownership": Ownership(uid=1)}, "parameters.uid, gid or mode"),
        ({"ownership": Ownership(gid=1)}, "parameters.uid, gid or mode"),
        ({"ownership": Ownership(mode=0o700)}, "parameters.uid, gid or mode"),
        ({"pool": "other"}, "in pool default"),
        ({"pool": "spread"}, "in pool default"),
    ],
)
def test_the_same_name_with_another_wish_is_refused_by_what_differs(bench, changes, named):
    volume = bench.create("v")
    with pytest.raises(AlreadyExists, match=named) as refusal:
        bench.create("v", **changes)
    assert volume.record.handle in str(refusal.value)
    assert bench.volumes.get(volume.record.handle) == volume
    assert bench.leftovers() == []


def test_the_same_name_with_another_source_is_refused(bench):
    one, two = bench.create("one"), bench.create("two")
    snapshot = bench.snapshot("s", one)
    bench.clone("copy", one)
    bench.restore("restored", snapshot)
    for attempt in (
        lambda: bench.create("copy"),
        lambda: bench.clone("copy", two),
        lambda: bench.restore("copy", snapshot),
        lambda: bench.clone("restored", one),
        lambda: bench.clone("one", two),
    ):
        with pytest.raises(AlreadyExists, match="volume_content_source"):
            attempt()


def test_the_size_that_a_range_admits_is_the_same_volume(bench):
    volume = bench.create("v", size=4 * MIB, limit=8 * MIB)
    assert bench.create("v", size=2 * MIB) == volume
    assert bench.create("v", size=0) == volume
    assert bench.create("v", size=0, limit=4 * MIB) == volume


def test_on_delete_may_differ_for_it_can_be_modified(bench):
    volume = bench.create("v")
    assert bench.create("v", on_delete=OnDelete.RETAIN) == volume


@pytest.mark.parametrize("other_pool", [False, True])
def test_who_joins_a_job_that_makes_what_another_request_asked_for_is_refused(bench, other_pool):
    # Both asked before either had a record: the second meets the first one's job.
    one, two = bench.create("one"), bench.create("two", pool="other")
    made = bench.create("first", source=bench.volume_source(one), pool="other" if other_pool else None)
    join_key = bench.pool().id_of("volume", "second")
    begun, go_on = threading.Event(), threading.Event()

    def first(_job):
        begun.set()
        go_on.wait(10)
        return made

    job = threading.Thread(target=lambda: bench.domain.jobs.run(join_key, first, time.monotonic() + 30))
    job.start()
    begun.wait(10)
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(_outcome(lambda: bench.clone("second", two if not other_pool else one)))
    )
    asking.start()
    time.sleep(0.1)
    go_on.set()
    asking.join()
    job.join()
    assert isinstance(answers[0], AlreadyExists)
    assert ("pool other" if other_pool else "volume_content_source") in str(answers[0])


def _outcome(call):
    try:
        return call()
    except Exception as error:
        return error


# --- capacity ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "limit", "made"),
    [
        (0, 0, DEFAULT_CAPACITY_BYTES),
        (0, MIB, MIB),
        (0, 2**50, DEFAULT_CAPACITY_BYTES),
        (MIB, 0, MIB),
        (MIB, MIB, MIB),
        (1, 0, 1),
    ],
)
def test_the_size_is_the_least_that_the_range_asks_for(bench, size, limit, made):
    assert bench.create("v", size=size, limit=limit).record.capacity_bytes == made


def test_a_range_that_cannot_be_is_out_of_range(bench):
    with pytest.raises(OutOfRange):
        bench.create("v", size=2 * MIB, limit=MIB)
    assert handles(bench) == []


def test_more_than_the_pool_can_ever_hold_is_refused_and_leaves_nothing(bench):
    with pytest.raises(ResourceExhausted, match="bytes free"):
        bench.create("v", size=2**62)
    assert handles(bench) == []
    assert bench.leftovers() == []


# --- pools and topology -------------------------------------------------------------------------------------------------------------


def test_the_class_chooses_the_pool(bench):
    assert bench.create("a").record.pool == "default"
    assert bench.create("b", pool="other").record.pool == "other"
    spread = bench.create("c", pool="spread")
    assert (spread.record.pool, spread.topology) == ("spread", None)
    assert spread.record.handle.count(".") == 1


def test_an_unknown_pool_is_refused_with_those_that_are_there(bench):
    with pytest.raises(InvalidArgument, match="allowed are default, other, spread"):
        bench.create("v", pool="fast")


def test_without_a_default_the_class_must_name_a_pool(tmp_path, pools):
    bench = make_bench(tmp_path, pools, default_pool=None)
    with pytest.raises(InvalidArgument, match='parameters\\["pool"\\] is missing'):
        bench.create("v")
    assert bench.create("v", pool="other").record.pool == "other"


def test_a_topology_that_does_not_reach_the_pool_exhausts_it_so_that_another_node_is_tried(bench):
    elsewhere = {f"topology.{DRIVER}/node": "node-2"}
    request = replace(bench.request("v"), requisite=(elsewhere,))
    with pytest.raises(ResourceExhausted, match="only be reached"):
        bench.volumes.create(request, time.monotonic() + 60)
    assert bench.volumes.create(replace(request, requisite=(elsewhere, HERE)), time.monotonic() + 60).topology == HERE
    spread = replace(bench.request("w", pool="spread"), requisite=(elsewhere,))
    assert bench.volumes.create(spread, time.monotonic() + 60).topology is None


@pytest.mark.parametrize(
    ("pool", "capability", "problem"),
    [
        ("default", Capability(AccessType.BLOCK, AccessMode.SINGLE_NODE_WRITER), "block"),
        ("spread", Capability(AccessType.BLOCK, AccessMode.SINGLE_NODE_WRITER), "block"),
        ("default", mount_capability(AccessMode.MULTI_NODE_MULTI_WRITER), "lives on one node"),
        ("default", mount_capability(AccessMode.MULTI_NODE_READER_ONLY), "lives on one node"),
    ],
)
def test_a_capability_that_a_pool_lacks_is_refused_at_creation(bench, pool, capability, problem):
    request = replace(bench.request("v", pool=pool), capabilities=(mount_capability(), capability))
    with pytest.raises(InvalidArgument, match=problem):
        bench.volumes.create(request, time.monotonic() + 60)
    volume = bench.create("v", pool=pool)
    assert problem in bench.volumes.validate(volume.record.handle, [mount_capability(), capability], {})
    assert bench.volumes.validate(volume.record.handle, [mount_capability()], volume.context) is None


def test_a_shared_pool_serves_many_nodes(bench):
    modes = [mount_capability(mode) for mode in AccessMode]
    volume = bench.create("v", pool="spread")
    assert bench.volumes.validate(volume.record.handle, modes, volume.context) is None
    assert "volume_context" in bench.volumes.validate(volume.record.handle, modes, {"pool": "another"})


# --- content ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_clones_and_restores_are_whole_and_their_own(bench):
    source = bench.create("source")
    fill(bench.path(source))
    snapshot = bench.snapshot("s", source)
    whole = seen(bench.path(source))
    (bench.path(source) / "plain").write_text("changed")
    restored, clone = bench.restore("restored", snapshot), bench.clone("clone", source)
    assert seen(bench.path(restored)) == whole
    assert seen(bench.path(clone)) == seen(bench.path(source)) != whole
    (bench.path(clone) / "plain").write_text("the clone's")
    assert (bench.path(source) / "plain").read_text() == "changed"
    assert restored.record.capture.files == 6
    assert restored.record.source == ContentSource(SourceKind.SNAPSHOT, snapshot.record.handle)


@pytest.mark.root
def test_a_copy_has_the_owner_of_its_source_unless_the_class_says_another(bench):
    source = bench.create("source", ownership=Ownership(1000, 2000, 0o2770))
    assert _owner(bench.path(bench.clone("clone", source))) == (1000, 2000, 0o2770)
    owned = bench.create("owned", source=bench.volume_source(source), ownership=Ownership(uid=7))
    assert _owner(bench.path(owned)) == (7, 2000, 0o2770)


def _owner(path):
    status = path.stat()
    return status.st_uid, status.st_gid, status.st_mode & 0o7777


def test_content_may_come_from_another_pool(bench):
    source = bench.create("source")
    fill(bench.path(source))
    copy = bench.create("copy", source=bench.volume_source(source), pool="spread")
    assert seen(bench.path(copy)) == seen(bench.path(source))


@pytest.mark.parametrize("kind", SourceKind)
def test_a_source_that_does_not_exist_is_not_found(bench, kind):
    gone = bench.pool().handle_of("a" * 26)
    for handle in (gone, "not-ours", ""):
        with pytest.raises(NotFound, match="volume_content_source"):
            bench.create("v", source=ContentSource(kind, handle))
    assert handles(bench) == []
    assert bench.leftovers() == []


def test_a_snapshot_is_no_volume_and_a_volume_no_snapshot(bench):
    volume = bench.create("v")
    snapshot = bench.snapshot("s", volume)
    for kind, handle in ((SourceKind.VOLUME, snapshot.record.handle), (SourceKind.SNAPSHOT, volume.record.handle)):
        with pytest.raises(NotFound):
            bench.create("w", source=ContentSource(kind, handle))


@pytest.mark.parametrize("kind", SourceKind)
def test_a_source_on_another_node_is_exhausted_so_that_that_node_is_tried(bench, tmp_path, kind):
    place = tmp_path / "elsewhere"
    place.mkdir()
    elsewhere = make_bench(place, (HostPathPool("default", place / "pool"),), node_id="node-2")
    source = elsewhere.create("source")
    handle = elsewhere.snapshot("s", source).record.handle if kind is SourceKind.SNAPSHOT else source.record.handle
    with pytest.raises(ResourceExhausted, match="another node"):
        bench.create("copy", source=ContentSource(kind, handle))
    assert handles(bench) == []


def test_a_volume_smaller_than_its_source_is_out_of_range(bench):
    source = bench.create("source", size=4 * MIB)
    snapshot = bench.snapshot("s", source)
    bench.volumes.expand(source.record.handle, CapacityRange(8 * MIB), None)
    with pytest.raises(OutOfRange, match=str(8 * MIB)):
        bench.clone("clone", source, size=4 * MIB)
    with pytest.raises(OutOfRange, match=str(4 * MIB)):
        bench.restore("restored", snapshot, size=2 * MIB)
    with pytest.raises(OutOfRange):
        bench.create("limited", size=0, limit=MIB, source=bench.volume_source(source))
    assert bench.restore("restored", snapshot, size=0).record.capacity_bytes == 4 * MIB
    assert bench.clone("clone", source, size=0).record.capacity_bytes == 8 * MIB


def test_a_copy_that_outlasts_the_call_is_joined_by_the_retry_and_made_once(bench):
    source = bench.create("source")
    (bench.path(source) / "a").write_text("a")
    request = bench.request("clone", source=bench.volume_source(source))
    with copying_stands_still_at(bench.path(source) / "leased"):
        for _ in range(2):
            with pytest.raises(OperationPending, match="try again"):
                bench.volumes.create(request, time.monotonic() + 1.1)
        assert len(bench.domain.jobs.running()) == 1
        assert handles(bench) == [source.record.handle]
        with pytest.raises(NotFound):
            bench.volumes.get(bench.pool().handle_of(bench.pool().id_of("volume", "clone")))
    clone = bench.volumes.create(request, time.monotonic() + 60)
    assert seen(bench.path(clone)) == seen(bench.path(source))
    assert bench.leftovers() == []


def test_a_copy_that_is_stopped_with_the_driver_leaves_nothing_and_begins_anew(bench):
    source = bench.create("source")
    request = bench.request("clone", source=bench.volume_source(source))
    with copying_stands_still_at(bench.path(source) / "leased"):
        with pytest.raises(OperationPending):
            bench.volumes.create(request, time.monotonic() + 1.1)
        bench.domain.stop(10)
    after = bench.restarted()
    after.sweep()
    assert after.leftovers() == []
    assert seen(after.path(after.clone("clone", source))) == seen(after.path(source))


# --- ownership ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("mode", [0, 0o700, 0o1777, 0o3770])
def test_owner_group_and_mode_are_what_the_class_says_whatever_the_umask(bench, mode):
    before = os.umask(0o077)
    try:
        volume = bench.create("v", ownership=Ownership(1234, 5678, mode))
    finally:
        os.umask(before)
    assert _owner(bench.path(volume)) == (1234, 5678, mode)


# --- directory templates --------------------------------------------------------------------------------------------------------------


def test_a_template_gives_the_volume_its_directory_and_makes_those_above(bench):
    volume = bench.create("v", directory="team/app/data")
    assert bench.path(volume) == bench.pool().backend.root() / "team/app/data"
    assert (bench.path(volume).parent.stat().st_mode & 0o7777) == 0o711
    sibling = bench.create("w", directory="team/app/more")
    assert bench.path(sibling).is_dir()
    assert bench.create("v", directory="team/app/data") == volume


@pytest.mark.parametrize("make", ["empty", "full", "file", "symlink", "dangling"])
def test_an_existing_directory_is_refused_by_name_and_left_as_it_is(bench, make, tmp_path):
    there = bench.pool().backend.root() / "theirs"
    outside = tmp_path / "outside"
    outside.mkdir()
    if make in ("empty", "full"):
        there.mkdir(mode=0o711)
        if make == "full":
            fill(there)
    elif make == "file":
        there.write_text("a file")
    else:
        there.symlink_to(outside if make == "symlink" else tmp_path / "nowhere")
    before = there.lstat()
    with pytest.raises(InvalidArgument, match="'theirs' exists already"):
        bench.create("v", directory="theirs")
    after = there.lstat()
    assert (before.st_ino, before.st_mode, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_ino,
        after.st_mode,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )
    assert handles(bench) == []
    bench.sweep()
    assert bench.leftovers("theirs") == []
    assert not (tmp_path / "nowhere").exists()
    assert os.listdir(outside) == []
    assert bench.create("v", directory="free")


@pytest.mark.parametrize("parent", ["a file", "a symlink"])
def test_a_template_whose_parent_is_no_directory_is_refused(bench, parent, tmp_path):
    there = bench.pool().backend.root() / "parent"
    if parent == "a file":
        there.write_text("")
    else:
        there.symlink_to(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(InvalidArgument, match="no directory"):
        bench.create("v", directory="parent/data")
    assert sorted(os.listdir(tmp_path)) == before
    bench.sweep()
    assert bench.leftovers("parent") == []


@pytest.mark.parametrize("inside", ["outer/inner", "outer/deep/inner"])
def test_a_template_inside_another_volume_is_refused(bench, inside):
    outer = bench.create("outer", directory="outer")
    with pytest.raises(InvalidArgument, match="would lie inside volume"):
        bench.create("inner", directory=inside)
    assert os.listdir(bench.path(outer)) == []
    plain = bench.create("plain")
    with pytest.raises(InvalidArgument, match="would lie inside volume"):
        bench.create("inner", directory=f"{plain.record.directory}/inner")


@pytest.mark.parametrize("inside", ["team/two", "team/deep/two"])
def test_a_template_inside_retained_data_is_refused(bench, inside):
    """By now it may be somebody's static volume: then a directory in there would belong to two."""
    retained = bench.create("one", directory="team", on_delete=OnDelete.RETAIN)
    bench.volumes.delete(retained.record.handle)
    assert find_static(bench.pool(), {"pool": "default", "directory": "team"}) == "team"
    for _ in range(2):
        with pytest.raises(InvalidArgument, match="lie inside team of pool default, the data that volume"):
            bench.create("two", directory=inside)
    assert os.listdir(bench.path(retained)) == []
    assert find_static(bench.pool(), {"pool": "default", "directory": "team"}) == "team"
    assert bench.pool().volumes.ids() == []
    (record,) = (bench.pool().backend.root() / ".csi/retained").iterdir()
    with pytest.raises(InvalidArgument, match=record.name):
        bench.create("two", directory=inside)
    record.unlink()
    assert bench.create("two", directory=inside).record.directory == inside


def test_a_template_goes_beside_retained_data(bench):
    retained = bench.create("one", directory="team/one", on_delete=OnDelete.RETAIN)
    bench.volumes.delete(retained.record.handle)
    assert bench.create("two", directory="team/two").record.directory == "team/two"
    assert bench.restarted().create("three", directory="team/three").record.directory == "team/three"


def test_a_template_is_not_kept_out_by_retained_data_that_an_admin_has_removed(bench):
    retained = bench.create("one", directory="team", on_delete=OnDelete.RETAIN)
    bench.volumes.delete(retained.record.handle)
    bench.path(retained).rmdir()
    for driver, name in ((bench, "two"), (bench, "three"), (bench.restarted(), "four")):
        assert driver.create(name, directory=f"team/{name}").record.directory == f"team/{name}"


@pytest.mark.parametrize("damage", ["", "{", "[]"])
def test_a_retained_record_that_cannot_be_read_keeps_no_template_out(bench, damage):
    retained = bench.create("one", directory="elsewhere", on_delete=OnDelete.RETAIN)
    bench.volumes.delete(retained.record.handle)
    (record,) = (bench.pool().backend.root() / ".csi/retained").iterdir()
    record.write_text(damage)
    (bench.pool().backend.root() / "team").mkdir()
    assert bench.create("two", directory="team/two").record.directory == "team/two"


def test_a_template_above_another_volume_is_refused(bench):
    inner = bench.create("inner", directory="outer/inner")
    with pytest.raises(InvalidArgument, match="'outer' exists already"):
        bench.create("outer", directory="outer")
    assert bench.path(inner).is_dir()


def test_two_volumes_never_get_one_directory(bench):
    first = bench.create("first", directory="data")
    (bench.path(first) / "precious").write_text("kept")
    with pytest.raises(InvalidArgument, match="'data' exists already"):
        bench.create("second", directory="data")
    assert (bench.path(first) / "precious").read_text() == "kept"
    bench.volumes.delete(first.record.handle)
    second = bench.create("second", directory="data")
    assert os.listdir(bench.path(second)) == []


def test_of_many_templates_that_overlap_at_once_none_lies_in_another(bench):
    for round_ in range(12):
        wishes = [f"r{round_}", f"r{round_}/a", f"r{round_}/a/b", f"r{round_}/a"]
        start = threading.Barrier(len(wishes))

        def make(number, wish, round_=round_, start=start):
            start.wait()
            _outcome(lambda: bench.create(f"v{round_}-{number}", directory=wish))

        threads = [threading.Thread(target=make, args=wish) for wish in enumerate(wishes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    made = [record.directory for record in bench.pool().volumes.readable() if record.phase == "ready"]
    assert made
    assert len(set(made)) == len(made)
    assert not [(one, other) for one in made for other in made if other.startswith(one + "/")]
    for directory in made:
        assert bench.pool().path_of(directory).is_dir()


@pytest.mark.root
def test_a_directory_that_was_a_parent_once_is_looked_at_anew_when_it_is_a_volume(tmp_path, make_disk):
    disk = make_disk("small", size="8M", kind="ext4")  # where the number of a removed directory is the next to be given
    bench = make_bench(tmp_path, (HostPathPool("default", disk / "pool"),))
    parent = disk / "pool/place"
    for name in ("one", "two"):
        volume = bench.create(name, directory=f"place/{name}")
        before = parent.stat().st_ino
        bench.volumes.delete(volume.record.handle)
    bench.sweep()
    assert not parent.exists()  # it was the driver's own, and nothing is left in it
    for lower in range(6):  # so many lower numbers go to the records that are written before the directory is made
        plugs = [disk / "plug"]
        plugs[0].touch()
        while plugs[-1].stat().st_ino != before:
            plugs.append(disk / f"plug{len(plugs)}")
            plugs[-1].touch()
        for plug in plugs[-1 - lower :]:
            plug.unlink()
        volume = bench.create("volume", directory="place")
        if parent.stat().st_ino == before:
            break
        bench.volumes.delete(volume.record.handle)
        bench.sweep()
    else:
        pytest.skip("this file system did not give the number again")
    with pytest.raises(InvalidArgument, match="would lie inside volume"):
        bench.create("inside", directory="place/inside")
    assert os.listdir(parent) == []


# --- expansion and modification ---------------------------------------------------------------------------------------------------------


def test_a_volume_grows_and_never_shrinks(bench):
    handle = bench.create("v", size=4 * MIB).record.handle
    assert bench.volumes.expand(handle, CapacityRange(8 * MIB), mount_capability()) == 8 * MIB
    assert bench.volumes.expand(handle, CapacityRange(2 * MIB), None) == 8 * MIB
    assert bench.volumes.expand(handle, CapacityRange(0), None) == 8 * MIB
    for impossible in (CapacityRange(2 * MIB, 4 * MIB), CapacityRange(0, MIB), CapacityRange(16 * MIB, 12 * MIB)):
        with pytest.raises(OutOfRange):
            bench.volumes.expand(handle, impossible, None)
    assert bench.volumes.get(handle).record.capacity_bytes == 8 * MIB


def test_growing_beyond_the_pool_is_out_of_range(bench):
    handle = bench.create("v").record.handle
    with pytest.raises(OutOfRange, match="bytes free"):
        bench.volumes.expand(handle, CapacityRange(2**62), None)


def test_growing_with_a_capability_that_the_volume_lacks_is_refused(bench):
    handle = bench.create("v").record.handle
    with pytest.raises(InvalidArgument, match="the volume is a directory"):
        bench.volumes.expand(handle, CapacityRange(2 * MIB), Capability(AccessType.BLOCK, AccessMode.SINGLE_NODE_WRITER))


def test_what_becomes_of_the_data_can_be_changed(bench):
    volume = bench.create("v")
    bench.volumes.modify(volume.record.handle, OnDelete.RETAIN)
    bench.volumes.modify(volume.record.handle, None)
    assert bench.volumes.get(volume.record.handle).record.on_delete is OnDelete.RETAIN
    bench.volumes.delete(volume.record.handle)
    assert bench.path(volume).is_dir()


@pytest.mark.parametrize("handle", ["", "not-ours", "default.aaaaaaaaaaaaaaaaaaaaaaaaaaa"])
def test_what_is_no_volume_cannot_be_changed(bench, handle):
    for call in (
        lambda: bench.volumes.get(handle),
        lambda: bench.volumes.expand(handle, CapacityRange(1), None),
        lambda: bench.volumes.modify(handle, OnDelete.RETAIN),
        lambda: bench.volumes.validate(handle, [mount_capability()], {}),
    ):
        with pytest.raises(NotFound):
            call()


# --- deletion ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_deleted_volume_is_gone_and_its_name_and_place_are_free(bench):
    volume = bench.create("v")
    fill(bench.path(volume))
    bench.volumes.delete(volume.record.handle)
    bench.volumes.delete(volume.record.handle)
    assert not bench.path(volume).exists()
    with pytest.raises(NotFound):
        bench.volumes.get(volume.record.handle)
    again = bench.create("v", size=2 * MIB)
    assert again.record.directory == volume.record.directory
    assert os.listdir(bench.path(again)) == []
    report = bench.sweep()
    assert report.trash == 1
    assert report.failed == 0
    assert bench.leftovers() == []
    assert bench.volumes.get(again.record.handle) == again


@pytest.mark.root
def test_retained_data_keeps_its_place_and_the_name_is_free(bench):
    volume = bench.create("v", on_delete=OnDelete.RETAIN)
    fill(bench.path(volume))
    before = seen(bench.path(volume))
    for size in (2 * MIB, 3 * MIB):
        again = bench.create("v", size=size) if size != 2 * MIB else None
        if again is None:
            bench.volumes.delete(volume.record.handle)
            again = bench.create("v", size=size)
        assert again.record.directory != volume.record.directory
        assert os.listdir(bench.path(again)) == []
        bench.volumes.delete(again.record.handle)
    bench.sweep()
    assert seen(bench.path(volume)) == before
    (kept,) = os.listdir(bench.pool().backend.root() / ".csi/retained")
    assert kept.startswith(volume.record.id)
    assert bench.leftovers() == []


@pytest.mark.root
def test_archived_data_moves_aside_and_its_place_is_free(bench):
    archive = bench.pool().backend.root() / "archived"
    for round_ in (1, 2):
        volume = bench.create("v", directory="apps/data", on_delete=OnDelete.ARCHIVE)
        (bench.path(volume) / "round").write_text(str(round_))
        bench.volumes.delete(volume.record.handle)
    assert sorted((place / "round").read_text() for place in archive.iterdir()) == ["1", "2"]
    assert all(place.name.startswith("data.") for place in archive.iterdir())
    assert archive.stat().st_mode & 0o777 == 0o700
    assert len(os.listdir(bench.pool().backend.root() / ".csi/archived")) == 2
    bench.sweep()
    assert len(os.listdir(archive)) == 2
    assert bench.leftovers("apps") == []


def test_deleting_what_is_not_ours_succeeds_and_touches_nothing(bench):
    bench.create("v")
    before = seen(bench.pool().backend.root())
    for handle in ("", "not-ours", "../../etc", "default", bench.pool().handle_of("a" * 26), f"default.{'a' * 27}"):
        bench.volumes.delete(handle)
    assert seen(bench.pool().backend.root()) == before


def test_a_volume_of_another_node_is_never_deleted_by_an_ok(bench, tmp_path, pools):
    elsewhere = make_bench(tmp_path, pools, node_id="node-2")
    volume = elsewhere.create("v")
    for call in (bench.volumes.delete, bench.volumes.get, lambda handle: bench.volumes.expand(handle, CapacityRange(1), None)):
        with pytest.raises(FailedPrecondition, match="another node"):
            call(volume.record.handle)
    assert elsewhere.path(volume).is_dir()


def test_a_volume_of_a_pool_that_is_no_longer_configured_is_never_deleted_by_an_ok(bench, tmp_path, pools):
    volume = bench.create("v", pool="other")
    fewer = make_bench(tmp_path, tuple(pool for pool in pools if pool.name != "other"))
    with pytest.raises(FailedPrecondition, match="pool other, which is not configured here"):
        fewer.volumes.delete(volume.record.handle)
    assert bench.path(volume).is_dir()


@pytest.mark.root
def test_a_volume_that_is_mounted_on_the_node_is_not_deleted(bench):
    volume = bench.create("v")
    staging = bench.stage(volume.record.handle)
    bench.publish(volume.record.handle, "pod")
    for undo in (
        lambda: bench.node.unpublish(volume.record.handle, bench.target("pod")),
        lambda: bench.node.unstage(volume.record.handle, staging),
    ):
        with pytest.raises(FailedPrecondition, match="still mounted at"):
            bench.volumes.delete(volume.record.handle)
        undo()
    bench.volumes.delete(volume.record.handle)
    assert not bench.path(volume).exists()


def test_a_volume_that_is_published_to_a_node_is_not_deleted(bench):
    volume = bench.create("v", pool="spread")
    bench.attachments.publish(
        volume.record.handle, NodePublication(NODE, AccessMode.MULTI_NODE_MULTI_WRITER), mount_capability(), {}
    )
    with pytest.raises(FailedPrecondition, match=f"still published to {NODE}"):
        bench.volumes.delete(volume.record.handle)
    bench.attachments.unpublish(volume.record.handle, NODE)
    bench.volumes.delete(volume.record.handle)


def test_a_volume_that_is_being_copied_is_not_deleted_until_the_copy_is_done(bench):
    source = bench.create("source")
    request = bench.request("clone", source=bench.volume_source(source))
    with copying_stands_still_at(bench.path(source) / "leased"):
        with pytest.raises(OperationPending):
            bench.volumes.create(request, time.monotonic() + 1.1)
        with pytest.raises(OperationPending, match="content:"):
            bench.volumes.delete(source.record.handle)
    clone = bench.volumes.create(request, time.monotonic() + 60)
    bench.volumes.delete(source.record.handle)
    assert (bench.path(clone) / "leased").exists()


def test_deleting_a_volume_that_is_being_made_stops_its_copy(bench):
    source = bench.create("source")
    handle = bench.pool().handle_of(bench.pool().id_of("volume", "clone"))
    with copying_stands_still_at(bench.path(source) / "leased"):
        with pytest.raises(OperationPending):
            bench.volumes.create(bench.request("clone", source=bench.volume_source(source)), time.monotonic() + 1.1)
        with pytest.raises(OperationPending):
            bench.volumes.delete(handle)
        until(lambda: not bench.domain.jobs.running())
    bench.volumes.delete(handle)
    bench.sweep()
    assert handles(bench) == [source.record.handle]
    assert bench.leftovers() == []
    assert os.listdir(bench.path(bench.create("clone"))) == []


def test_a_volume_whose_directory_was_lost_can_be_deleted(bench):
    volume = bench.create("v")
    bench.path(volume).rmdir()
    bench.volumes.delete(volume.record.handle)
    bench.sweep()
    assert bench.leftovers() == []


# --- no room ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_copy_that_fills_the_disk_is_refused_and_gives_every_block_back(tmp_path, make_disk, kind):
    disk = make_disk("small", size="16M", kind=kind)
    bench = make_bench(tmp_path, (HostPathPool("default", disk / "pool"),))
    source = bench.create("source")
    (bench.path(source) / "large").write_bytes(os.urandom(10 * MIB))
    free = os.statvfs(disk).f_bfree
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            bench.clone("clone", source)
        bench.sweep()
        assert bench.leftovers() == []
        assert os.statvfs(disk).f_bfree >= free - 4
    assert handles(bench) == [source.record.handle]
    with pytest.raises(OSError, match="No space left"):
        bench.snapshot("snapshot", source)
    bench.sweep()
    assert bench.leftovers() == []
    assert bench.snapshots.list(Page(), "", "") == ([], "")
    bench.volumes.delete(source.record.handle)
    bench.sweep()
    assert bench.clone("clone", bench.create("another")).record.capacity_bytes == MIB


# --- listing ------------------------------------------------------------------------------------------------------------------------------


def pages(bench, size, between=lambda: None):
    token, found = "", []
    while True:
        entries, token = bench.volumes.list(Page(size, token))
        assert len(entries) == size or not token
        found += [volume.record.handle for volume in entries]
        if not token:
            return found
        between()


@pytest.mark.parametrize("size", [1, 3, 5, 10, 11])
def test_pages_of_any_size_hold_every_volume_of_every_pool_once(bench, size):
    made = {bench.create(f"v{n}", pool=("default", "other", "spread")[n % 3]).record.handle for n in range(10)}
    found = pages(bench, size)
    assert len(found) == 10
    assert set(found) == made
    assert found == handles(bench)


def test_pages_while_volumes_come_and_go_repeat_none_and_miss_none_that_stayed(bench):
    stay = {bench.create(f"stay{n}").record.handle for n in range(30)}
    go = [bench.create(f"go{n}").record.handle for n in range(30)]
    made = iter(range(1000))

    def churn():
        bench.create(f"new{next(made)}")
        if go:
            bench.volumes.delete(go.pop())

    found = pages(bench, 4, churn)
    assert len(set(found)) == len(found)
    assert stay <= set(found)


def test_a_page_goes_on_behind_an_entry_that_is_gone(bench):
    for n in range(4):
        bench.create(f"v{n}")
    first, token = bench.volumes.list(Page(2))
    for volume in first:
        bench.volumes.delete(volume.record.handle)
    rest, end = bench.volumes.list(Page(2, token))
    assert len(rest) == 2
    assert not end
    assert not {v.record.handle for v in first} & {v.record.handle for v in rest}


@pytest.mark.parametrize(
    "token", ["x", "e30=", "WzEsICJkZWZhdWx0IiwgIi4uIl0=", "=" * 40, "ä", "\0", "1" * 5000, "WzJd", "bnVsbA=="]
)
def test_a_token_that_is_not_ours_is_refused(bench, token):
    for listing in (
        bench.volumes.list,
        bench.health.list,
        lambda page: bench.snapshots.list(page, "", ""),
    ):
        with pytest.raises(OperationPending, match="starting_token"):
            listing(Page(1, token))


def test_a_damaged_record_hides_only_its_own_volume(bench):
    volumes = [bench.create(f"v{n}") for n in range(5)]
    broken = volumes[2].record
    (bench.pool().backend.root() / f".csi/volumes/{broken.id}.json").write_text("{")
    assert handles(bench) == sorted(v.record.handle for v in volumes if v.record.id != broken.id)
    assert pages(bench, 2) == handles(bench)
    for call in (
        lambda: bench.volumes.get(broken.handle),
        lambda: bench.volumes.delete(broken.handle),
        lambda: bench.create("v2"),
        lambda: bench.clone("copy", volumes[2]),
    ):
        with pytest.raises(RecordDamaged, match=broken.id):
            call()
    assert bench.path(volumes[2]).is_dir()
    bench.sweep()
    assert bench.path(volumes[2]).is_dir()
    assert bench.create("another")


@pytest.mark.minutes
def test_ten_thousand_volumes_come_in_pages_of_a_hundred_each_exactly_once_while_others_come_and_go(tmp_path, make_disk):
    disk = make_disk("many", size="512M")
    bench = make_bench(tmp_path, (HostPathPool("default", disk / "pool"),))
    stay = {bench.create(f"stay{n}", 1024).record.handle for n in range(10_000)}
    stop = threading.Event()
    failures = []

    def churn(number):
        count = 0
        while not stop.is_set():
            try:
                volume = bench.create(f"go{number}-{count}", 1024)
                bench.volumes.delete(volume.record.handle)
            except Exception as error:
                failures.append(error)
                return
            count += 1

    threads = [threading.Thread(target=churn, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    found = pages(bench, 100)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(set(found)) == len(found)
    assert stay <= set(found)
    assert set(pages(bench, 100)) == stay


# --- one name, two pools, at the same moment --------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, "team/v"], ids=["an empty volume", "a volume of a template"])
@pytest.mark.parametrize("who", ["another controller", "another call"])
def test_of_one_name_in_two_pools_at_once_there_is_one_volume_at_most(bench, monkeypatch, who, template):
    other = bench.restarted() if who == "another controller" else bench
    refused = OperationPending if who == "another call" else AlreadyExists
    records, outcomes = bench.pool("default").volumes, []
    add = records.add

    def meanwhile(record, *gate):
        monkeypatch.undo()
        try:
            outcomes.append(other.create("v", pool="spread", directory=template).record)
        except refused as error:
            outcomes.append(error)
        return add(record, *gate)

    monkeypatch.setattr(records, "add", meanwhile)
    if who == "another controller":
        with pytest.raises(AlreadyExists, match="exists in pool spread"):
            bench.create("v", pool="default", directory=template)
    else:
        bench.create("v", pool="default", directory=template)
        assert isinstance(outcomes[0], OperationPending)
    made = [record.handle for store in bench.domain.pools for record in store.volumes.readable()]
    assert len(made) == 1
    bench.sweep()
    assert bench.leftovers("team") == []
