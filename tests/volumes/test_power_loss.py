"""What a power cut leaves: a creation that ends before each of its changes, and then only what had reached the disk by then.

The filesystem lies in an image. Right after the kill the image is copied, without a sync: what the kernel still held is lost, as it is
when the power goes. The copy is mounted, which replays its journal, and a new driver has to make sense of it.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bench import Bench, make_bench
from crash import runs_to_its_end

from csi_driver.config import HostPathPool
from csi_driver.errors import RecordDamaged
from csi_driver.volumes import leftovers
from csi_driver.volumes.model import Ownership

pytestmark = [pytest.mark.root, pytest.mark.minutes]

_SIZES = {"ext4": "32M", "xfs": "300M", "btrfs": "128M"}
_NEVER = 10**9
_OWNERSHIP = Ownership(1000, 1000, 0o2770)


@contextmanager
def mounted(kind: str, image: Path, place: Path) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", kind, "-o", "loop", image, place], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs to mount a {kind}: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", place], check=True)


def a_driver_on(place: Path) -> Bench:
    return make_bench(place, (HostPathPool("default", place / "pool"),))


def a_pool_on(place: Path) -> None:
    a_driver_on(place).create("bystander")
    os.sync()


def create(bench: Bench, directory: str | None):
    return bench.create("new", directory=directory, ownership=_OWNERSHIP)


def is_whole(bench: Bench, volume) -> None:
    top = bench.path(volume).stat()
    assert (top.st_uid, top.st_gid, top.st_mode & 0o7777) == (1000, 1000, 0o2770)
    assert list(bench.path(volume).iterdir()) == []
    assert bench.volumes.get(volume.record.handle) == volume


def nothing_is_left(bench: Bench, directory: str | None) -> None:
    bench.age_temporaries()
    bench.restarted().sweep()
    assert bench.leftovers(*([] if directory is None else [directory.partition("/")[0]])) == []
    assert {record.phase for record in bench.pool().volumes.readable()} == {"ready"}


@pytest.mark.parametrize("directory", [None, "team/data"])
@pytest.mark.parametrize("kind", _SIZES)
def test_a_power_cut_at_any_step_of_a_creation_loses_no_answer_and_leaves_nothing_that_stays(tmp_path, kind, directory):
    if shutil.which(f"mkfs.{kind}") is None:
        pytest.skip(f"needs mkfs.{kind}")
    fresh, running, lost = (tmp_path / name for name in ("fresh", "running", "lost"))
    place = tmp_path / "disk"
    subprocess.run(["truncate", "-s", _SIZES[kind], fresh], check=True)
    subprocess.run([f"mkfs.{kind}", "-q", fresh], check=True, capture_output=True)
    with mounted(kind, fresh, place):
        assert runs_to_its_end(lambda: a_pool_on(place), _NEVER)

    answered, change = False, 0
    while not answered:
        change += 1
        _copy(fresh, running)
        with mounted(kind, running, place):
            answered = runs_to_its_end(lambda: create(a_driver_on(place), directory), change)
            _copy(running, lost)

        def asked_again(answered: bool = answered) -> None:
            bench = a_driver_on(place)
            assert not [record for record in bench.pool().volumes.each() if isinstance(record, RecordDamaged)]
            if answered:
                (record,) = (record for record in bench.pool().volumes.readable() if record.name == "new")
                is_whole(bench, bench.volumes.get(record.handle))
            is_whole(bench, create(bench, directory))
            nothing_is_left(bench, directory)

        def abandoned() -> None:
            leftovers.ABANDONED_SECONDS = -1.0
            bench = a_driver_on(place)
            nothing_is_left(bench, directory)
            is_whole(bench, create(bench, directory))

        for sequel in (asked_again, abandoned):
            _copy(lost, running)
            with mounted(kind, running, place):
                assert runs_to_its_end(sequel, _NEVER), change
    assert change > 10, "so few changes: the test shows nothing"


def _copy(image: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=always", image, target], check=True)
