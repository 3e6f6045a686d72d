"""Filesystems with project quota, and the domain's own bench on them; the stories are those of tests/volumes/limit_stories.py."""

import itertools
import pathlib
import subprocess
import sys

import pytest
from servers import IMAGES, MKFS, MOUNT_OPTIONS

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "volumes"))
pytest.register_assert_rewrite("limit_stories")

from bench import unmount_below  # noqa: E402 - found by the line above
from limit_stories import Held, bench_on  # noqa: E402

_numbers = itertools.count(1)


@pytest.fixture
def make_disk(tmp_path):
    """`make_disk(kind, options=)`: a filesystem of 1 GiB, mounted below the test's directory until the test has ended."""
    made = []

    def make(kind, options=None, quota=True):
        IMAGES.mkdir(parents=True, exist_ok=True)
        image = IMAGES / f"limits-{next(_numbers)}"
        with image.open("xb") as file:
            file.truncate(1 << 30)
        command = MKFS[kind] if quota else [f"mkfs.{kind}", "-q"]
        subprocess.run([*command, image], check=True)
        place = tmp_path / image.name
        place.mkdir()
        mount = ["mount", "-t", kind, "-o", f"loop,{options or (MOUNT_OPTIONS[kind] if quota else 'noatime')}", image, place]
        subprocess.run(mount, check=True)
        made.append((place, image))
        return place

    yield make
    unmount_below(tmp_path)
    for _, image in made:
        image.unlink()


@pytest.fixture(params=["xfs", "ext4"])
def held(request, tmp_path, make_disk):
    disk = make_disk(request.param)
    found = Held(bench_on(tmp_path, disk), disk)
    yield found
    found.bench.domain.stop(5)
