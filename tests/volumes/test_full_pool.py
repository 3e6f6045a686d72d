"""A pool without a free byte: whoever deletes must get through, for nothing else makes room again."""

import errno
import itertools
import os
import time

import pytest
from bench import make_bench, until

from csi_driver.config import HostPathPool
from csi_driver.errors import NotFound, ResourceExhausted
from csi_driver.volumes.model import OnDelete
from csi_driver.volumes.requests import Page

pytestmark = pytest.mark.root

DISKS = [("tmpfs", "16M"), ("ext4", "48M"), ("xfs", "320M")]


FILE_BYTES = 1024**2


def free_bytes(disk):
    status = os.statvfs(disk)
    return status.f_bfree * status.f_frsize


def again_and_again(call):
    """Call as a sidecar does: what fails for want of room in the trash itself (XFS keeps few names inside an inode) is asked for again."""

    def done():
        try:
            call()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return False
        return True

    until(done)


def fill_to_the_last_byte(top, name="filler"):
    """Write until not a byte fits, then make files until not one more does."""
    with open(top / name, "wb", buffering=0) as filler:
        for size in (1024**2, 4096, 1):
            with pytest.raises(OSError, match="No space left"):
                while True:
                    filler.write(b"x" * size)
        os.fsync(filler.fileno())
    with pytest.raises(OSError, match="No space left"):
        for number in itertools.count():
            (top / f"{name}{number:0100}").write_bytes(b"x" * 4096)


@pytest.fixture(params=DISKS, ids=[kind for kind, _ in DISKS])
def small_disk(request, tmp_path, make_disk):
    """A bench whose pool has a small disk of its own, and that disk."""
    kind, size = request.param
    disk = make_disk("full", size=size, kind=kind)
    bench = make_bench(tmp_path, (HostPathPool("default", disk / "pool"),))
    yield bench, disk
    bench.domain.stop(5)


def test_a_pool_that_is_full_to_the_last_byte_is_emptied_by_deleting(small_disk):
    bench, disk = small_disk
    small = bench.create("small")
    (bench.path(small) / "data").write_bytes(b"x" * FILE_BYTES)
    snapshot = bench.snapshot("s", small)
    members = [bench.create(name) for name in ("one", "two")]
    group = bench.groups.create("g", [member.record.handle for member in members], time.monotonic() + 30)
    kept = bench.create("kept", on_delete=OnDelete.RETAIN)
    large = bench.create("large")
    fill_to_the_last_byte(bench.path(large))
    with pytest.raises(ResourceExhausted, match="bytes free"):
        bench.create("another")

    bench.snapshots.delete(snapshot.record.handle)
    bench.volumes.delete(small.record.handle)
    assert bench.snapshots.list(Page(), snapshot.record.handle, "") == ([], "")
    with pytest.raises(NotFound):
        bench.volumes.get(small.record.handle)
    before = free_bytes(disk)
    assert bench.sweep().failed == 0
    until(lambda: free_bytes(disk) > before + FILE_BYTES - 65536)  # XFS frees in the background, and lets the two share blocks

    # What was freed is used up at once, and all the rest goes while the trash is emptied beside it.
    fill_to_the_last_byte(bench.path(large), "again")
    bench.domain.sweeper.start()
    again_and_again(lambda: bench.groups.delete(group.record.handle, []))
    for volume in (kept, *members, large):
        again_and_again(lambda handle=volume.record.handle: bench.volumes.delete(handle))
    assert bench.volumes.list(Page()) == ([], "")
    assert bench.snapshots.list(Page(), "", "") == ([], "")
    bench.domain.sweeper.stop(20)
    assert bench.restarted().sweep().failed == 0
    assert bench.leftovers() == []
    until(lambda: os.statvfs(disk).f_bfree > os.statvfs(disk).f_blocks * 0.7)
    assert bench.create("another")
