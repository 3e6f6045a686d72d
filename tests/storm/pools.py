"""One driver with a pool on each kind of filesystem: what copies (ext4), what shares blocks (XFS), what has subvolumes (btrfs)."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.driver_process import DriverProcess
from tests.storm.disk import Pool

SIZES = {"btrfs": "768M", "xfs": "768M", "ext4": "512M"}
METHODS = {"btrfs": "subvolume", "xfs": "reflink", "ext4": "copy_file_range"}


@contextmanager
def filesystems(home: Path) -> Iterator[dict[str, Pool]]:
    """Mount a small filesystem of each kind, write the driver's configuration, and give the pools; unmounted in the end."""
    lines = ["[driver]", 'backend = "hostpath"', 'default_pool = "ext4"']
    found = {}
    with ExitStack() as mounted:
        for kind, size in SIZES.items():
            place, image = home / kind, home / f"{kind}.img"
            place.mkdir()
            subprocess.run(["truncate", "-s", size, image], check=True)
            subprocess.run(
                [f"mkfs.{kind}", "-q", image], check=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
            )
            done = subprocess.run(["mount", "-o", "loop", image, place], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"needs to mount a {kind}: {done.stderr.strip()}")
            mounted.callback(subprocess.run, ["umount", "-q", "-l", place], check=False)  # the driver process' end does it, too
            lines += [f"[pools.{kind}]", f'path = "{place}/pool"', "inline = true"]
            found[kind] = Pool(place / "pool")
        (home / "pools.toml").write_text("\n".join(lines) + "\n")
        yield found


@contextmanager
def driver_on_filesystems(home: Path) -> Iterator[tuple[DriverProcess, dict[str, Pool]]]:
    """Give a driver that serves these pools, not started yet."""
    with filesystems(home) as pools:
        process = DriverProcess(home)
        try:
            yield process, pools
        finally:
            if process.process is not None and process.process.poll() is None:
                process.kill()
            process.close()
