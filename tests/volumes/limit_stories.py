"""What must be true of a volume that is held to its size, by whatever: the tests, for every filesystem that can.

`test_limits_btrfs.py` runs them on the machine, `tests/uml/guest_tests/quota` in the guest on XFS and ext4; each brings its `held`.
"""

import errno
import itertools
import os
import struct
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from bench import MIB, Bench, make_bench
from crash import runs_to_its_end
from trees import seen

from csi_driver.config import HostPathPool
from csi_driver.errors import AlreadyExists, OutOfRange, ResourceExhausted
from csi_driver.linux import btrfs_qgroups, projects, quota
from csi_driver.linux.project_limits import FIRST, LAST
from csi_driver.linux.system_calls import sync_filesystem
from csi_driver.volumes.limiters import LIMITERS, PRIVILEGED
from csi_driver.volumes.model import ContentSource, LimitPolicy, OnDelete, SourceKind
from csi_driver.volumes.parameters import EPHEMERAL
from csi_driver.volumes.requests import CapacityRange, ClassParameters

SIZE = 32 * MIB
NO_ROOM = {"ENOSPC", "EDQUOT"}
WRITER = """
import errno, os, sys
target = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
block = os.urandom(65536)
def write():
    written = 0
    try:
        while written < int(sys.argv[2]):
            written += os.write(target, block)
            if written % (1 << 20) == 0:
                os.fsync(target)
        os.fsync(target)
    except OSError as error:
        return written, errno.errorcode[error.errno]
    return written, "-"
print(*write(), flush=True)
while sys.stdin.readline():
    print(*write(), flush=True)
"""
WITHOUT_PRIVILEGE = ["setpriv", "--bounding-set", "-sys_resource", "--inh-caps", "-all"]


@dataclass(frozen=True)
class Held:
    """A bench whose pool holds volumes, and its disk."""

    bench: Bench
    disk: Path

    @property
    def shown_by_df(self) -> bool:
        return self.counts_inodes

    @property
    def counts_inodes(self) -> bool:
        return self.means.limiter.counts_inodes

    @property
    def means(self):
        return self.limits.means_of(self.bench.pool())

    @property
    def limits(self):
        return self.bench.volumes._creation._limits

    def create(self, name, size=SIZE, source=None, **parameters):
        request = replace(self.bench.request(name, size, source), parameters=ClassParameters(**parameters))
        volume = self.bench.volumes.create(request, time.monotonic() + 60)
        self.bench.path(volume).chmod(0o777)
        return volume

    def snapshot_data(self, snapshot):
        return self.bench.pool().backend.root() / ".csi/snapshots-data" / snapshot.record.id

    def sync(self):
        descriptor = os.open(self.disk, os.O_RDONLY)
        try:
            sync_filesystem(descriptor)
        finally:
            os.close(descriptor)

    def held_to(self, volume):
        """The limits that the filesystem has for the volume: bytes, inodes."""
        limit = self.bench.volumes.get(volume.record.handle).record.limit
        descriptor = os.open(self.disk, os.O_RDONLY)
        try:
            return limits_at(descriptor, limit)
        finally:
            os.close(descriptor)

    def stats(self, volume):
        """What NodeGetVolumeStats says of the volume, which is staged for that."""
        self.sync()
        staging = self.bench.stage(volume.record.handle)
        return self.bench.node.stats(volume.record.handle, staging, time.monotonic() + 60)


def limits_at(descriptor, limit):
    if limit.limiter == "btrfs qgroup":
        return btrfs_qgroups.read_qgroup(descriptor, limit.mark).limit_bytes, 0
    found = quota.read_quota(descriptor, limit.mark)
    return found.limit_bytes, found.limit_inodes


def bench_on(tmp_path, disk):
    return make_bench(tmp_path, (HostPathPool("default", disk / "pool", inline=True),))


class Writer:
    """A tenant's process that has a file open and writes to it until it may not, each time it is told to."""

    def __init__(self, directory, name="data", uid=0, most=4 * SIZE, privileged=False):
        prefix = [] if uid or privileged else WITHOUT_PRIVILEGE
        self._process = subprocess.Popen(
            [*prefix, "/usr/bin/python3", "-I", "-c", WRITER, name, str(most)],
            cwd=directory,  # entered before the user changes: what lies above is not the tenant's to see
            user=uid,
            group=uid,
            extra_groups=[],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def outcome(self):
        """How many bytes were written, and the error that ended it (`-`: none)."""
        written, problem = self._process.stdout.readline().split()
        return int(written), problem

    def again(self):
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.outcome()

    def close(self):
        self._process.communicate(timeout=60)


@contextmanager
def writer(directory, **how):
    started = Writer(directory, **how)
    try:
        yield started
    finally:
        started.close()


def write(directory, **how):
    with writer(directory, **how) as once:
        return once.outcome()


def du(path):
    return int(subprocess.run(["du", "-sB1", path], check=True, capture_output=True, text=True).stdout.split()[0])


def stops_at(outcome, size):
    written, problem = outcome
    assert problem in NO_ROOM
    assert 0.95 * size <= written <= size


# --- the size holds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uid", [0, 1000], ids=["root", "a user"])
def test_writes_stop_at_the_size_of_the_volume(held, uid):
    volume = held.create("v")
    stops_at(write(held.bench.path(volume), uid=uid), SIZE)
    assert du(held.bench.path(volume)) <= SIZE


def test_neighbours_can_write_when_a_volume_is_full(held):
    full, other = held.create("full"), held.create("other")
    stops_at(write(held.bench.path(full), uid=1000), SIZE)
    assert write(held.bench.path(other), uid=1000, most=SIZE // 2) == (SIZE // 2, "-")


def test_what_the_context_says_of_privileged_processes_is_true(held):
    volume = held.create("v")
    _, problem = write(held.bench.path(volume), privileged=True)
    if problem == "-":
        assert PRIVILEGED in volume.context["limit"]
    else:
        assert problem in NO_ROOM


def test_the_context_says_what_holds_a_volume_and_who_passes(held):
    volume = held.create("v")
    assert volume.context["limiter"] in LIMITERS
    assert volume.context["limit"].startswith("hard but for ")
    assert held.bench.volumes.get(volume.record.handle) == volume


def test_stats_come_from_the_quota_and_agree_with_du_within_1_percent(held):
    volume = held.create("v")
    write(held.bench.path(volume), uid=1000, most=3 * SIZE // 4)
    stats = held.stats(volume)
    assert stats.source == volume.context["limiter"]
    assert stats.bytes.used == pytest.approx(du(held.bench.path(volume)), rel=0.01)
    assert stats.bytes.total == SIZE
    assert stats.bytes.available == SIZE - stats.bytes.used
    if held.counts_inodes:
        assert stats.inodes.used == 2


def test_df_in_the_pod_shows_the_volume_and_not_the_disk(held):
    if not held.shown_by_df:
        pytest.skip("btrfs shows the whole filesystem (statfs takes no notice of quota groups)")
    volume = held.create("v", inodes=100)
    write(held.bench.path(volume), uid=1000, most=3 * SIZE // 4)
    held.bench.stage(volume.record.handle)
    seen_by_pod = os.statvfs(held.bench.publish(volume.record.handle, "pod"))
    assert seen_by_pod.f_blocks * seen_by_pod.f_frsize == SIZE
    used = (seen_by_pod.f_blocks - seen_by_pod.f_bfree) * seen_by_pod.f_frsize
    assert used == pytest.approx(du(held.bench.path(volume)), rel=0.01)
    assert seen_by_pod.f_files == 100


def test_an_expansion_lets_a_writer_go_on_at_once(held):
    volume = held.create("v")
    held.bench.stage(volume.record.handle)
    pod = held.bench.publish(volume.record.handle, "pod")
    with writer(pod, uid=1000) as tenant:
        stops_at(tenant.outcome(), SIZE)
        assert held.bench.volumes.expand(volume.record.handle, CapacityRange(2 * SIZE), None) == 2 * SIZE
        stops_at(tenant.again(), SIZE)
    assert held.stats(volume).bytes.total == 2 * SIZE


def expand(held, volume, size):
    return held.bench.volumes.expand(volume.record.handle, CapacityRange(size), None)


def test_an_expansion_that_was_cut_off_is_completed_by_a_retry_also_by_one_that_asks_for_less(held):
    volume = held.create("v")
    for crash in itertools.count(1):
        done = runs_to_its_end(lambda: expand(held, volume, 4 * SIZE), crash, changes_a_quota)  # noqa: B023 - called at once
        recorded = held.bench.volumes.get(volume.record.handle).record.capacity_bytes
        for retried in (SIZE, 2 * SIZE, 3 * SIZE, 4 * SIZE):
            assert expand(held, volume, retried) == max(retried, recorded)
            assert held.held_to(volume)[0] == max(retried, recorded)
        if done:
            assert crash > 3
            return
        held.bench.volumes.delete(volume.record.handle)  # the pool promises nothing twice
        volume = held.create(f"v{crash}")


def test_a_volume_never_shrinks(held):
    volume = held.create("v")
    assert held.bench.volumes.expand(volume.record.handle, CapacityRange(SIZE // 2), None) == SIZE
    with pytest.raises(OutOfRange):
        held.bench.volumes.expand(volume.record.handle, CapacityRange(SIZE // 2, SIZE // 2), None)
    assert held.held_to(volume)[0] == SIZE


def test_a_volume_that_is_deleted_and_made_again_has_its_whole_size(held):
    for _ in range(3):
        volume = held.create("v")
        stops_at(write(held.bench.path(volume), uid=1000), SIZE)
        held.bench.volumes.delete(volume.record.handle)


def test_an_inline_volume_is_held_to_its_size_and_gives_all_of_it_back(held):
    held.sync()
    free, kept = free_bytes(held), marks_in_use(held)
    for _ in range(2):
        target = held.bench.publish("csi-inline", "pod", volume_context={EPHEMERAL: "true", "size": str(SIZE)})
        (record,) = held.bench.pool().volumes.readable()
        assert (record.ephemeral, record.limit.mark is not None) == (True, True)
        with writer(target, uid=1000) as tenant:
            stops_at(tenant.outcome(), SIZE)
        if PRIVILEGED not in held.means.level:
            assert write(target, uid=0, most=2 * MIB)[0] <= MIB  # into the same file: there may be no room for a name
        held.bench.node.unpublish("csi-inline", str(target))
        held.bench.sweep()
        assert held.bench.leftovers() == []
        assert marks_in_use(held) == kept
        # btrfs frees in the background, and keeps some megabytes for metadata once they were needed.
        assert wait_for(lambda: free_bytes(held) > free - SIZE // 2, 20), free - free_bytes(held)


def free_bytes(held):
    if held.counts_inodes:
        held.sync()
    else:  # wakes the kernel's cleaner of deleted subvolumes as well, which comes by every 30 s otherwise
        subprocess.run(["btrfs", "filesystem", "sync", held.disk], check=True, capture_output=True)
    found = os.statvfs(held.disk)
    return found.f_bfree * found.f_frsize


def complaints(held, volume):
    """What health says of the volume and of its pool."""
    entries = (*held.bench.health.volume(volume.record.handle).entries, *held.bench.health.storage())
    return [entry.reason for entry in entries]


# --- copies -----------------------------------------------------------------------------------------------------------------------


def test_snapshots_neither_count_for_the_volume_nor_hold_it_up(held):
    volume = held.create("v")
    write(held.bench.path(volume), name="one", uid=1000, most=SIZE // 2)
    held.sync()
    before = held.stats(volume).bytes.used
    snapshots = [held.bench.snapshot(f"s{number}", volume) for number in range(3)]
    assert held.stats(volume).bytes.used == before
    # All of it anew: the old blocks are the snapshots' now.
    (held.bench.path(volume) / "one").unlink()
    stops_at(write(held.bench.path(volume), name="two", uid=1000), SIZE)
    assert {du(held.snapshot_data(snapshot)) // MIB for snapshot in snapshots} == {SIZE // 2 // MIB}


@pytest.mark.parametrize("by", ["restore", "clone"])
def test_a_copy_counts_and_is_held_to_its_own_size(held, by):
    source = held.create("source")
    written, _ = write(held.bench.path(source), name="old", uid=1000, most=SIZE // 2)
    origin = held.bench.volume_source(source)
    if by == "restore":
        origin = ContentSource(SourceKind.SNAPSHOT, held.bench.snapshot("snapshot", source).record.handle)
    copy = held.create("copy", 2 * SIZE, origin)
    stops_at(write(held.bench.path(copy), name="new", uid=1000), 2 * SIZE - written)
    assert held.stats(copy).bytes.used == pytest.approx(du(held.bench.path(copy)), rel=0.01)
    assert write(held.bench.path(source), name="more", uid=1000, most=MIB) == (MIB, "-")


def test_content_that_does_not_fit_is_refused_and_nothing_is_left(held):
    source = held.create("source")
    with unlimited(held, source):
        assert write(held.bench.path(source), uid=1000, most=2 * SIZE) == (2 * SIZE, "-")
        held.sync()
    with pytest.raises((OutOfRange, OSError)) as refused:
        held.bench.clone("copy", source, SIZE)
    assert isinstance(refused.value, OutOfRange) or refused.value.errno in {errno.ENOSPC, errno.EDQUOT}
    held.bench.sweep()
    assert held.bench.leftovers() == []
    assert [record.name for record in held.bench.pool().volumes.readable()] == ["source"]


@contextmanager
def unlimited(held, volume):
    record = held.bench.volumes.get(volume.record.handle).record
    held.limits.change(held.bench.pool(), record, 1 << 40)
    yield
    held.limits.change(held.bench.pool(), record, record.capacity_bytes)


# --- what a class may ask for -----------------------------------------------------------------------------------------------------


def test_a_required_limit_is_had_where_there_is_a_limiter(held):
    volume = held.create("v", limit=LimitPolicy.REQUIRED)
    assert volume.record.limit.mark is not None
    with pytest.raises(AlreadyExists, match="limit"):
        held.bench.create("v", SIZE)


def test_inodes_are_limited_or_refused_or_said_to_be_unlimited(held):
    if held.counts_inodes:
        volume = held.create("v", inodes=50, limit=LimitPolicy.REQUIRED)
        made = make_files(held.bench.path(volume), 100)
        assert made == 49  # and the top directory
        assert held.stats(volume).inodes == replace(held.stats(volume).inodes, used=50, total=50, available=0)
        return
    with pytest.raises(ResourceExhausted, match="counts no files"):
        held.create("v", inodes=50, limit=LimitPolicy.REQUIRED)
    assert held.bench.leftovers() == []
    assert "number of files is not limited" in held.create("v", inodes=50).context["limit"]


def make_files(directory, count):
    code = "import sys\nfor n in range(int(sys.argv[1])): open(str(n), 'x')"
    subprocess.run(
        [*WITHOUT_PRIVILEGE, "/usr/bin/python3", "-I", "-c", code, str(count)], cwd=directory, capture_output=True, check=False
    )
    return len(list(directory.iterdir()))


# --- kill -9 ----------------------------------------------------------------------------------------------------------------------

_SETS = {projects._SET, btrfs_qgroups._SET_LIMIT}


def changes_a_quota(event, args):
    return event == "quota.set_limits" or (event == "fcntl.ioctl" and args[1] in _SETS)


def crashes(held, operation, check):
    """Run the operation with a kill before every change, then again by a new process, and check each time; then sweep."""
    change = 0
    while True:
        change += 1
        done = runs_to_its_end(lambda: operation(held.bench.restarted(), change), change, changes_a_quota)  # noqa: B023 - called at once
        again = Held(held.bench.restarted(), held.disk)
        again.bench.age_temporaries()
        check(again, operation(again.bench, change), change)
        if done:
            assert change > 5
            return


@pytest.mark.minutes
def test_a_creation_killed_at_any_step_is_completed_and_held_and_leaves_no_limit_behind(held):
    def check(again, volume, change):
        assert again.held_to(volume)[0] == SIZE
        again.bench.volumes.delete(volume.record.handle)
        again.bench.sweep()
        assert again.bench.leftovers() == []
        assert marks_in_use(again) == []

    crashes(held, lambda bench, change: bench.create(f"v{change}", SIZE), check)


@pytest.mark.minutes
def test_a_clone_killed_at_any_step_is_completed_and_held_and_leaves_no_limit_behind(held):
    source = held.create("source")
    (held.bench.path(source) / "file").write_bytes(b"x" * 65536)
    kept = marks_in_use(held, 1)

    def check(again, volume, change):
        assert again.held_to(volume)[0] == SIZE
        assert seen(again.bench.path(volume)) == seen(again.bench.path(source))
        again.bench.volumes.delete(volume.record.handle)
        again.bench.sweep()
        assert marks_in_use(again, 1) == kept

    crashes(held, lambda bench, change: bench.clone(f"v{change}", source, SIZE), check)


@pytest.mark.minutes
@pytest.mark.parametrize("fate", list(OnDelete))
def test_a_deletion_killed_at_any_step_is_completed_and_only_what_is_kept_stays_limited(held, fate):
    volumes = {change: held.create(f"v{change}", MIB, on_delete=fate) for change in range(1, 60)}
    before = len(marks_in_use(held, 59))
    deleted = []

    def check(again, _result, change):
        deleted.append(change)
        again.bench.sweep()
        left = before - (len(deleted) if fate is OnDelete.DELETE else 0)
        assert len(marks_in_use(again, left)) == left

    crashes(held, lambda bench, change: bench.volumes.delete(volumes[change].record.handle), check)


def marks_in_use(held, expected=0):
    """The project ids of our range that something has or that have a limit; of a btrfs, the groups with a limit."""
    held.sync()
    if not held.counts_inodes:
        listed = subprocess.run(["btrfs", "subvolume", "list", held.disk], check=True, capture_output=True, text=True).stdout
        alive = {
            f"0/{line.split()[1]}" for line in listed.splitlines()
        }  # the kernel removes the groups of others when it comes to it
        shown = subprocess.run(
            ["btrfs", "qgroup", "show", "-r", "--raw", held.disk], check=True, capture_output=True, text=True
        )
        groups = [line.split() for line in shown.stdout.splitlines()[2:]]
        return [group[0] for group in groups if group[3] != "none" and group[0] in alive]
    descriptor = os.open(held.disk, os.O_RDONLY)
    found = []

    def settled():
        found[:] = [project for project in ids_known(descriptor) if not quota.read_quota(descriptor, project).unused]
        return len(found) <= expected

    try:
        wait_for(settled)
    finally:
        os.close(descriptor)
    return found


def wait_for(condition, seconds=3.0):
    """Wait a moment for what comes by itself: XFS frees the inodes of what was removed a little later."""
    until = time.monotonic() + seconds
    while not (came := condition()) and time.monotonic() < until:
        time.sleep(0.05)
    return came


def ids_known(descriptor):
    """Yield the project ids of our range that the filesystem knows anything of (Q_GETNEXTQUOTA, quotactl(2))."""
    project = FIRST
    while project <= LAST:
        found = bytearray(72)  # struct if_nextdqblk
        try:
            quota._call(descriptor, 0x800009, project, found)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return
            raise
        (project,) = struct.unpack_from("=I", found, 68)
        yield project
        project += 1
