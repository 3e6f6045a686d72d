"""A volume of a million files: snapshot and deletion come to their end, and the driver needs no more memory for it."""

import os
import re
import time
from pathlib import Path

from tests.bench.site import Site, elapsed

FILES_PER_DIRECTORY = 1000


def many_files(site: Site, files: int) -> dict[str, float]:
    """Return seconds of snapshot, restore, deletion and its end, and the driver's peak memory (MiB) before and after."""
    volume = site.create("many")
    _make(site.path(volume), files)
    before = _peak_mib(site)
    found: dict[str, float] = {"files": files, "memory before, MiB": before}
    snapshots: list = []
    found["snapshot, s"] = elapsed(lambda: snapshots.append(site.snapshot("many", volume.volume_id)))
    found["delete the volume, s"] = elapsed(lambda: site.delete_volume(volume.volume_id))
    found["delete the snapshot, s"] = elapsed(lambda: site.delete_snapshot(snapshots[0].snapshot_id))
    found["until the trash is empty, s"] = elapsed(site.settle)
    found["memory at most, MiB"] = _peak_mib(site)
    return found


def judge(found: dict[str, float]) -> list[tuple[str, float, float]]:
    """Return (sentence, measured, target); measured must not exceed the target."""
    return [("memory that a million files add, MiB", found["memory at most, MiB"] - found["memory before, MiB"], 30.0)]


def _make(place: Path, files: int) -> None:
    for start in range(0, files, FILES_PER_DIRECTORY):
        folder = place / f"folder-{start}"
        folder.mkdir()
        descriptor = os.open(folder, os.O_RDONLY)
        for number in range(start, min(files, start + FILES_PER_DIRECTORY)):
            with os.fdopen(os.open(f"file-{number}", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=descriptor), "wb", 0) as file:
                file.write(b"content")
        os.close(descriptor)
    os.sync()


def _peak_mib(site: Site) -> float:
    time.sleep(0.1)
    status = Path(f"/proc/{site.driver.process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024
