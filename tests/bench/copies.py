"""Snapshot, restore and clone beside `cp -a` and `tar czf` of the same tree, taken in turns, so that the machine is the same for all."""

import itertools
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csi_driver.rpc import csi_pb2 as csi
from tests.bench.site import MIB, Site, elapsed, fill, shell

NAMES = itertools.count()
SAME_PRIORITY = ("nice", "-n", "5", "ionice", "-c", "2", "-n", "7")
"""That of the driver's own copies (linux/priorities.py): it changes nothing on a quiet machine, and on a busy one it is a fair race."""


@dataclass(frozen=True)
class Tree:
    name: str
    files: int
    bytes: int


LARGE = Tree("large", 10, 1024 * MIB)
SMALL = Tree("small", 10_000, 100 * MIB)


_WARM_UP_RUNS = 2
"""Until then somebody is the first to write to a part of the disk, and pays for it."""
_TAR_RUNS = 3
"""It takes half a minute for the large tree, and nobody is close to it."""


@dataclass(frozen=True)
class Way:
    """One way to copy a tree: what is timed, and how its copy is removed again."""

    name: str
    make: Callable[[], object]
    remove: Callable[[Any], None]


def compare(site: Site, tree: Tree, runs: int) -> dict[str, float]:
    """Return the median seconds of each way. They take turns, each run begins with another one, and the first runs do not count."""
    volume = site.create(f"source-{next(NAMES)}")
    fill(site.path(volume), tree.files, tree.bytes, per_directory=min(100, tree.files))
    empty = site.create(f"empty-{next(NAMES)}")
    kept = [site.snapshot(f"kept-{next(NAMES)}", made.volume_id) for made in (volume, empty)]
    copies = _copies(site, site.path(volume))
    ways = _captures(site, volume, kept[0], "") + _captures(site, empty, kept[1], " of nothing") + copies[:-1]
    taken: dict[str, list[float]] = {}
    for run in range(-_WARM_UP_RUNS, runs):
        first = run % len(ways)
        for way in ways[first:] + ways[:first]:
            seconds = _time(site, way)
            if run >= 0:
                taken.setdefault(way.name, []).append(seconds)
    taken[copies[-1].name] = [_time(site, copies[-1]) for _ in range(min(runs, _TAR_RUNS))]
    for snapshot in kept:
        site.delete_snapshot(snapshot.snapshot_id)
    for made in (volume, empty):
        site.delete_volume(made.volume_id)
    site.settle()
    return {name: statistics.median(values) for name, values in taken.items()}


def _time(site: Site, way: Way) -> float:
    """Return how long it took. The copy goes before the next is made, so that all of them write to the same part of the disk."""
    made: list[object] = []
    site.settle()
    seconds = elapsed(lambda: made.append(way.make()))
    way.remove(made[0])
    return seconds


def _captures(site: Site, volume: csi.Volume, kept: csi.Snapshot, suffix: str) -> list[Way]:
    def remove(made: csi.Volume) -> None:
        site.delete_volume(made.volume_id)

    return [
        Way(
            "snapshot" + suffix,
            lambda: site.snapshot(f"copy-{next(NAMES)}", volume.volume_id),
            lambda made: site.delete_snapshot(made.snapshot_id),
        ),
        Way("restore" + suffix, lambda: site.create(f"copy-{next(NAMES)}", snapshot=kept.snapshot_id), remove),
        Way("clone" + suffix, lambda: site.create(f"copy-{next(NAMES)}", volume=volume.volume_id), remove),
    ]


def _copies(site: Site, source: Path) -> list[Way]:
    """Return the other tools' ways; tar is the last."""
    out = site.place / "out"
    commands = {"cp -a": ("cp", "-a", "--reflink=never", str(source), str(out))}
    if site.kind != "ext4":
        commands["cp -a --reflink=always"] = ("cp", "-a", "--reflink=always", str(source), str(out))
    commands["tar czf"] = ("tar", "czf", str(out), "-C", str(source), ".")
    return [Way(name, shell(site, *SAME_PRIORITY, *command), lambda _: _remove(out)) for name, command in commands.items()]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def judge(kind: str, tree: Tree, median: dict[str, float]) -> list[tuple[str, float, float]]:
    """Return what was to be shown: (sentence, measured, target); measured must not exceed the target."""
    ours = {what: median[what] for what in ("snapshot", "restore", "clone")}
    verdicts = []
    for what, seconds in ours.items():
        label = f"{kind} {tree.name}: {what}"
        if kind == "btrfs":
            verdicts.append((f"{label}, seconds", seconds, 0.100))
        if tree.name == "large" and kind in ("xfs", "btrfs"):
            verdicts.append((f"{label} beyond that of nothing, seconds", seconds - median[f"{what} of nothing"], 0.050))
        if tree.name == "small" and kind == "xfs":
            verdicts.append((f"{label} / cp -a --reflink=always", seconds / median["cp -a --reflink=always"], 1.5))
        if kind == "ext4":
            verdicts.append((f"{label} / cp -a", seconds / median["cp -a"], 1.5 if tree.name == "small" else 1.2))
            if tree.name == "large":
                verdicts.append((f"{label} / tar czf", seconds / median["tar czf"], 0.1))
    return verdicts
