"""Pools, disks and a bench for each test; what stays mounted is unmounted."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench import Bench, make_bench, unmount_below
from hypothesis import settings

from csi_driver.config import HostPathPool
from tests.own_mounts import have_own_mounts

pytest.register_assert_rewrite("limit_stories")
settings.register_profile("whatever the machine is busy with", deadline=None)
settings.load_profile("whatever the machine is busy with")


@pytest.fixture(autouse=True)
def everything_is_unmounted_in_the_end(tmp_path: Path) -> Iterator[None]:
    yield
    unmount_below(tmp_path)


@pytest.fixture(scope="session")
def own_mounts() -> None:
    have_own_mounts()


@pytest.fixture
def pools(tmp_path: Path) -> tuple[HostPathPool, ...]:
    return (
        HostPathPool("default", tmp_path / "pools" / "default", inline=True),
        HostPathPool("other", tmp_path / "pools" / "other", inline=True),
        HostPathPool("spread", tmp_path / "pools" / "spread", shared=True),
    )


@pytest.fixture
def bench(tmp_path: Path, pools: tuple[HostPathPool, ...]) -> Iterator[Bench]:
    made = make_bench(tmp_path, pools)
    yield made
    made.domain.stop(5)


@pytest.fixture
def make_disk(tmp_path: Path) -> Callable[..., Path]:
    """Makes small filesystems of their own: `make_disk(name, size="8M", kind="tmpfs")` mounts one and returns where."""

    def make(name: str, size: str = "8M", kind: str = "tmpfs", options: str = "defaults") -> Path:
        place = tmp_path / "disks" / name
        place.mkdir(parents=True)
        if kind == "tmpfs":
            command = ["mount", "-t", "tmpfs", "-o", f"size={size},{options}", name, place]
        else:
            image = tmp_path / "disks" / f"{name}.img"
            subprocess.run(["truncate", "-s", size, image], check=True)
            subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
            command = ["mount", "-o", f"loop,{options}", image, place]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            pytest.skip(f"needs to mount a {kind}: {mounted.stderr.strip()}")
        return place

    return make


def pytest_collection_modifyitems(items):
    if os.geteuid() != 0:
        for item in items:
            if item.get_closest_marker("root"):
                item.add_marker(pytest.mark.skip(reason="needs root: mounts, devices, ownership"))
