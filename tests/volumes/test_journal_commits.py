"""What it costs to make things last, counted: commits of a journal. On a busy disk each of them waits for all others' writes."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench import Bench, make_bench

from csi_driver.config import HostPathPool
from csi_driver.linux import files

pytestmark = pytest.mark.root
_TRIES = 5  # one commit comes from a timer every 5 s, and may fall in between


def formatted(tmp_path: Path, *options: str) -> Path:
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4")
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    subprocess.run(["truncate", "-s", "64M", image], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-E", "lazy_itable_init=0,lazy_journal_init=0", *options, image], check=True)
    done = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs to mount an ext4: {done.stderr.strip()}")
    return place


@pytest.fixture
def journaled(tmp_path: Path) -> Iterator[Path]:
    place = formatted(tmp_path)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.fixture
def without_journal(tmp_path: Path) -> Iterator[Path]:
    place = formatted(tmp_path, "-O", "^has_journal")
    yield place
    subprocess.run(["umount", place], check=True)


def commits(place: Path) -> int:
    """Count the commits of the filesystem's journal so far (jbd2, first word of its info)."""
    device = os.stat(place).st_dev
    name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
    (info,) = Path("/proc/fs/jbd2").glob(f"{name}-*/info")
    return int(info.read_text().split()[0])


def fewest_commits(place: Path, act: Callable[[int], object]) -> int:
    taken = []
    for number in range(_TRIES):
        os.sync()
        before = commits(place)
        act(number)
        taken.append(commits(place) - before)
    return min(taken)


@pytest.fixture
def driver(journaled: Path) -> Bench:
    return make_bench(journaled, (HostPathPool("default", journaled / "pool"),))


def test_a_volume_costs_two_commits(driver, journaled):
    driver.create("first")  # finds out what the pool can do
    assert fewest_commits(journaled, lambda number: driver.create(f"volume-{number}")) == 2


def test_a_snapshot_and_what_is_made_of_it_cost_five_commits_each(driver, journaled):
    source = driver.create("source")
    (driver.path(source) / "file").write_bytes(os.urandom(10_000))
    snapshots = [driver.snapshot("first", source)]
    assert fewest_commits(journaled, lambda number: snapshots.append(driver.snapshot(f"s-{number}", source))) <= 5
    assert fewest_commits(journaled, lambda number: driver.restore(f"r-{number}", snapshots[0])) <= 5
    assert fewest_commits(journaled, lambda number: driver.clone(f"c-{number}", source)) <= 5


def test_order_costs_nothing_where_a_journal_keeps_it(journaled):
    def change_and_order(number: int) -> None:
        (journaled / f"directory-{number}").mkdir()
        descriptor = os.open(journaled, os.O_RDONLY)
        files.order_directory(descriptor)
        os.close(descriptor)

    assert fewest_commits(journaled, change_and_order) == 0


def test_without_a_journal_order_is_had_by_syncing(without_journal, tmp_path):
    (without_journal / "pool").mkdir()
    os.sync()
    (without_journal / "pool/name").mkdir()
    descriptor = os.open(without_journal / "pool", os.O_RDONLY)
    files.order_directory(descriptor)
    os.close(descriptor)
    # What a power cut would leave: what the image holds now, nothing of the page cache.
    shutil.copy(tmp_path / "image", tmp_path / "lost")
    shown = subprocess.run(["debugfs", "-R", "ls -p /pool", tmp_path / "lost"], capture_output=True, text=True, check=True)
    assert "/name/" in shown.stdout
