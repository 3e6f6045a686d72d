"""Volumes on XFS and ext4 with project quota: sizes that hold, and who passes."""

import itertools
import json
import os
import random
import subprocess
import time

import pytest
from bench import MIB
from limit_stories import *  # noqa: F403 - the tests that every limiter has to pass
from limit_stories import (
    SIZE,
    Held,
    bench_on,
    complaints,
    du,
    limits_at,
    marks_in_use,
    stops_at,
    unlimited,
    wait_for,
    write,
)

from csi_driver.errors import FailedPrecondition, InvalidArgument, OutOfRange, ResourceExhausted
from csi_driver.linux import project_limits, quota
from csi_driver.linux.project_limits import FIRST, LAST, claim
from csi_driver.linux.projects import Project, project_of, set_project
from csi_driver.volumes.limiters import OWNERS, PRIVILEGED
from csi_driver.volumes.model import LimitPolicy
from csi_driver.volumes.requests import CapacityRange, ClassParameters

NONE_POSSIBLE = {"tmpfs": "no project quota", "ext4": "prjquota", "xfs": "prjquota"}
CHANGE = """
import fcntl, os, struct, sys
place, project = sys.argv[1], int(sys.argv[2])
found = os.open(place, os.O_RDONLY)
flags, *rest = struct.unpack("=IIIII8x", fcntl.ioctl(found, 2 << 30 | 28 << 16 | ord("X") << 8 | 31, bytes(28)))
rest[2] = project
fcntl.ioctl(found, 1 << 30 | 28 << 16 | ord("X") << 8 | 32, struct.pack("=IIIII8x", flags, *rest))
"""


def opened(path):
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def change_project(directory, name, project, uid, *prefix):
    command = [*prefix, "/usr/bin/python3", "-I", "-c", CHANGE, name, str(project)]
    done = subprocess.run(
        command, cwd=directory, user=uid, group=uid, extra_groups=[], capture_output=True, text=True, check=False
    )
    return done.returncode == 0


# --- who passes -------------------------------------------------------------------------------------------------------------------


def test_an_owner_can_take_his_files_out_of_the_limit_unless_in_a_user_namespace_and_the_level_says_so(held):
    volume = held.create("v")
    top = held.bench.path(volume)
    assert write(top, name="mine", uid=1000, most=MIB) == (MIB, "-")
    assert not change_project(top, "mine", 0, 1001)
    assert not change_project(top, "mine", 0, 1000, "unshare", "--user", "--map-root-user")
    assert change_project(top, "mine", 0, 1000)
    assert OWNERS in volume.context["limit"]


def test_a_tenant_who_takes_the_project_of_another_volume_for_his_top_directory_reaches_no_limit_of_it(held):
    victim, other = held.create("victim"), held.create("other")
    top = opened(held.bench.path(other))
    try:
        set_project(top, Project(victim.record.limit.mark, inherit=True))
    finally:
        os.close(top)
    held.bench.volumes.expand(other.record.handle, CapacityRange(4 * SIZE), None)
    assert held.held_to(victim)[0] == SIZE
    held.bench.volumes.delete(other.record.handle)
    held.bench.sweep()
    assert held.held_to(victim)[0] == SIZE


# --- project ids ------------------------------------------------------------------------------------------------------------------


def test_what_is_in_the_trash_retained_or_somebody_elses_keeps_its_project_id(held, monkeypatch):
    deleted = held.create("deleted").record.limit.mark
    drawn = iter([deleted, deleted + 1, deleted + 2, deleted + 2, deleted + 1, deleted])
    monkeypatch.setattr(project_limits.secrets, "randbelow", lambda most: next(drawn) - FIRST)  # as if it always met those
    descriptor = opened(held.disk)
    quota.set_limits(descriptor, deleted + 1, 1 << 20, 0)  # another program's, which has nothing yet
    held.bench.volumes.delete(held.bench.pool().handle_of(held.bench.pool().id_of("volume", "deleted")))
    assert held.create("next").record.limit.mark == deleted + 2
    held.bench.sweep()
    assert wait_for(lambda: quota.read_quota(descriptor, deleted).unused)
    assert held.create("again").record.limit.mark == deleted
    os.close(descriptor)


def test_the_id_of_one_volume_says_nothing_of_the_next(held):
    marks = [held.create(f"v{number}").record.limit.mark for number in range(4)]
    assert all(FIRST <= mark <= LAST for mark in marks)
    assert min(abs(one - other) for one, other in itertools.combinations(marks, 2)) > 1000


def test_whoever_takes_an_id_at_the_same_moment_gives_way(held, monkeypatch, tmp_path):
    (held.disk / "one").mkdir()
    (held.disk / "two").mkdir()
    one, two = opened(held.disk / "one"), opened(held.disk / "two")
    drawn = itertools.count(7)
    monkeypatch.setattr(project_limits.secrets, "randbelow", lambda most: next(drawn))
    raced = []

    def race(top, project):
        set_project(top, project)
        if not raced:
            raced.append(project.id)
            set_project(two, project)  # he looked when we did, and is as quick

    monkeypatch.setattr(project_limits, "set_project", race)
    taken = claim(one)
    assert taken != raced[0]
    assert quota.read_quota(one, taken).used_inodes == 1
    os.close(one)
    os.close(two)


def test_two_controllers_never_give_one_project_to_two_volumes(held, monkeypatch):
    monkeypatch.setattr(project_limits.secrets, "randbelow", lambda most: random.randrange(150))
    made = [os.pipe(), os.pipe()]
    children = []
    for number, (_, write_end) in enumerate(made):
        children.append(os.fork())
        if children[-1] == 0:
            bench = held.bench.restarted()
            marks = [bench.create(f"v{number}-{volume}", MIB).record.limit.mark for volume in range(40)]
            os.write(write_end, json.dumps(marks).encode())
            os._exit(0)
        os.close(write_end)
    marks = []
    for child, (read_end, _) in zip(children, made, strict=True):
        with os.fdopen(read_end, "rb") as pipe:
            marks += json.loads(pipe.read())
        assert os.waitpid(child, 0)[1] == 0
    assert len(marks) == len(set(marks)) == 80
    assert max(marks) - min(marks) < 2**16  # they were looking in the same place


def test_nothing_of_a_snapshot_belongs_to_the_volumes_project(held):
    volume = held.create("v")
    (held.bench.path(volume) / "d").mkdir()
    (held.bench.path(volume) / "d" / "f").write_text("content")
    data = held.snapshot_data(held.bench.snapshot("s", volume))
    for place in (data, data / "d", data / "d" / "f"):
        found = os.open(place, os.O_RDONLY)
        assert project_of(found) == Project(0, inherit=False)
        os.close(found)


# --- where nothing can hold -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(NONE_POSSIBLE))
def test_without_quotas_a_required_limit_is_refused_and_a_preferred_one_is_said_to_be_none(tmp_path, make_disk, kind):
    disk = tmp_path if kind == "tmpfs" else make_disk(kind, quota=False)
    bare = Held(bench_on(tmp_path, disk), disk)
    with pytest.raises(ResourceExhausted, match="limit: required"):
        bare.create("v", limit=LimitPolicy.REQUIRED)
    assert bare.bench.leftovers() == []
    assert list(bare.bench.pool().volumes.each()) == []
    room = bare.bench.domain.services.capacity
    assert room.available(ClassParameters(limit=LimitPolicy.REQUIRED), (), None).available_bytes == 0
    assert room.available(ClassParameters(), (), None).available_bytes > 0
    volume = bare.create("v")
    assert volume.context["limiter"] == "none"
    assert NONE_POSSIBLE[kind] in volume.context["limit"]
    assert write(bare.bench.path(volume), uid=1000, most=2 * SIZE) == (2 * SIZE, "-")
    assert bare.stats(volume).source == "walk"


def test_quota_that_counts_but_does_not_hold_is_none(tmp_path, make_disk):
    disk = make_disk("xfs", "pqnoenforce")
    assert "holds nobody" in Held(bench_on(tmp_path, disk), disk).create("v").context["limit"]


def test_a_pool_inside_another_project_has_no_limits_of_its_own_and_works(tmp_path, held):
    (held.disk / "theirs").mkdir()
    theirs = opened(held.disk / "theirs")
    set_project(theirs, Project(42, inherit=True))
    os.close(theirs)
    (tmp_path / "inside").mkdir()
    inside = Held(bench_on(tmp_path / "inside", held.disk / "theirs"), held.disk)
    volume = inside.create("v")
    assert "project 42" in volume.context["limit"]
    assert write(inside.bench.path(volume), uid=1000, most=MIB) == (MIB, "-")


def test_a_template_that_leads_into_another_project_is_refused_and_nothing_is_left(held):
    team = held.bench.pool().backend.root() / "team"
    team.mkdir()
    theirs = opened(team)
    set_project(theirs, Project(42, inherit=True))
    os.close(theirs)
    with pytest.raises(InvalidArgument, match="hands on a project"):
        held.create("v", directory="team/v")
    held.bench.sweep()
    assert held.bench.leftovers("team") == []
    assert os.listdir(team) == []
    assert marks_in_use(held) == []


def test_quotas_that_were_switched_off_are_missed_by_an_expansion_and_by_nobody_else(held):
    volume = held.create("v")
    write(held.bench.path(volume), uid=1000, most=SIZE // 2)
    (held.bench.path(volume) / "more").write_text("more")
    kind = switch_off(held.disk)
    if kind == "ext4":  # goes on counting, and takes limits for the time when it is switched on again
        assert held.bench.volumes.expand(volume.record.handle, CapacityRange(2 * SIZE), None) == 2 * SIZE
    else:
        with pytest.raises(FailedPrecondition, match="switched off"):
            held.bench.volumes.expand(volume.record.handle, CapacityRange(2 * SIZE), None)
    stats = held.stats(volume)
    assert (stats.source, stats.bytes.used) == ("walk", du(held.bench.path(volume)))
    assert held.create("other").context["limiter"] == "none"
    held.bench.node.unstage(volume.record.handle, held.bench.staging_of(volume.record.handle))
    held.bench.volumes.delete(volume.record.handle)
    held.bench.sweep()


def test_health_says_that_quotas_are_off_until_they_are_on_again(held):
    volume = held.create("v")
    assert complaints(held, volume) == []
    kind = switch_off(held.disk)
    assert complaints(held, volume) == ["LimitOff", "LimitsOff"]
    switch_on(held.disk, kind)
    assert complaints(held, volume) == []
    stops_at(write(held.bench.path(volume), uid=1000), SIZE)


def switch_on(disk, kind):
    if kind == "ext4":
        subprocess.run(["quotaon", "-P", disk], check=True)
        return
    source = subprocess.run(["findmnt", "-no", "SOURCE", disk], check=True, capture_output=True, text=True).stdout.strip()
    image = subprocess.run(["losetup", "-nO", "BACK-FILE", source], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["umount", disk], check=True)
    subprocess.run(["mount", "-o", "loop,prjquota", image, disk], check=True)


def switch_off(disk):
    source = subprocess.run(["findmnt", "-no", "SOURCE", disk], check=True, capture_output=True, text=True).stdout.strip()
    kind = subprocess.run(["findmnt", "-no", "FSTYPE", disk], check=True, capture_output=True, text=True).stdout.strip()
    if kind == "ext4":
        subprocess.run(["quotaoff", "-P", disk], check=True)
        return kind
    image = subprocess.run(["losetup", "-nO", "BACK-FILE", source], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run(["umount", disk], check=True)
    subprocess.run(["mount", "-o", "loop,noquota", image, disk], check=True)
    return kind


def test_a_limit_is_there_before_a_copy_begins(held):
    """A copy of what is too much for the new volume stops in the midst of it where the driver is held, too, and is refused anyway."""
    source = held.create("source")
    descriptor = opened(held.disk)
    quota.set_limits(descriptor, source.record.limit.mark, 0, 0)
    for number in range(8):
        write(held.bench.path(source), name=f"f{number}", uid=1000, most=SIZE)
    held.sync()
    free = os.statvfs(held.disk)
    least = free.f_bfree
    with pytest.raises((OutOfRange, OSError)):
        held.bench.clone("copy", source, SIZE)
    assert limits_at(descriptor, source.record.limit)[0] == 0
    if PRIVILEGED not in held.means.level:
        trash = held.bench.pool().backend.root() / ".csi/trash"
        assert sum(du(entry) for entry in trash.iterdir()) <= SIZE + MIB
        assert os.statvfs(held.disk).f_bfree > least - 2 * SIZE // free.f_frsize
    held.bench.sweep()
    assert held.bench.leftovers() == []
    os.close(descriptor)


def test_stats_are_quick_whatever_is_in_the_volume(held):
    volume = held.create("v", 256 * MIB)
    for directory in range(20):
        (held.bench.path(volume) / str(directory)).mkdir()
        for number in range(200):
            (held.bench.path(volume) / str(directory) / str(number)).touch()
    held.sync()
    started = time.monotonic()
    assert held.limits.stats(held.bench.pool(), held.bench.volumes.get(volume.record.handle).record).inodes.used == 4021
    assert time.monotonic() - started < 0.5


# --- a pool that moves ------------------------------------------------------------------------------------------------------------


def disk_kind(disk):
    return subprocess.run(["findmnt", "-no", "FSTYPE", disk], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("carried", [False, True], ids=["project ids left behind", "project ids brought along"])
def test_a_volume_that_came_from_another_disk_is_held_again_and_never_touches_whose_id_it_had(
    held, tmp_path, make_disk, carried
):
    volume = held.create("v", inodes=50)
    mark = volume.record.limit.mark
    (held.bench.path(volume) / "deep" / "er").mkdir(parents=True)
    (held.bench.path(volume) / "deep").chmod(0o777)
    write(held.bench.path(volume) / "deep", name="before", uid=1000, most=SIZE // 2)
    os.mkfifo(held.bench.path(volume) / "fifo")
    (held.bench.path(volume) / "link").symlink_to("/etc")
    disk = make_disk(disk_kind(held.disk))
    foreign = disk / "foreign"
    foreign.mkdir()
    theirs = opened(foreign)
    set_project(theirs, Project(mark, inherit=True))
    quota.set_limits(theirs, mark, 8 * SIZE, 0)
    subprocess.run(["cp", "-a", held.disk / "pool", disk / "pool"], check=True)
    held.bench.domain.stop(5)
    (tmp_path / "moved").mkdir()
    there = Held(bench_on(tmp_path / "moved", disk), disk)
    if carried:
        top = opened(there.bench.path(volume))
        set_project(top, Project(mark, inherit=True))
        os.close(top)
    assert complaints(there, volume) == ["LimitOff"]
    assert there.stats(volume).source == "walk"
    there.bench.volumes.expand(volume.record.handle, CapacityRange(SIZE + MIB), None)
    assert quota.read_quota(theirs, mark).limit_bytes == 8 * SIZE
    there.bench.sweep()
    assert complaints(there, volume) == []
    assert there.held_to(volume) == (SIZE + MIB, 50)
    new_mark = there.bench.volumes.get(volume.record.handle).record.limit.mark
    assert new_mark != mark
    assert there.stats(volume).inodes.used == 4  # a symbolic link and a fifo cannot be given a project
    stops_at(write(there.bench.path(volume), name="after", uid=1000), SIZE // 2 + MIB)
    there.bench.node.unstage(volume.record.handle, there.bench.staging_of(volume.record.handle))
    there.bench.volumes.delete(volume.record.handle)
    there.bench.sweep()
    assert quota.read_quota(theirs, mark).limit_bytes == 8 * SIZE
    os.close(theirs)
    there.bench.domain.stop(5)


def test_a_snapshot_of_a_held_volume_may_be_as_large_as_the_volume_is_or_has_become(held):
    volume, store = held.create("v"), held.bench.pool()
    record = held.bench.volumes.get(volume.record.handle).record
    write(held.bench.path(volume), uid=1000, most=SIZE // 2)
    held.sync()
    assert held.limits.most_bytes(store, record) == SIZE
    assert held.bench.snapshot("s", volume).record.size_bytes == SIZE
    with unlimited(held, volume):
        write(held.bench.path(volume), name="more", uid=1000, most=SIZE)
        held.sync()
    assert 1.5 * SIZE <= held.limits.most_bytes(store, record) < 1.6 * SIZE
    assert 1.5 * SIZE <= held.bench.snapshot("large", volume).record.size_bytes < 1.6 * SIZE
