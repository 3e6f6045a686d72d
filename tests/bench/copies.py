"""Snapshot, restore and clone beside `cp -a` and `tar czf` of the same tree, taken in turns, so that the machine is the same for all."""

import itertools
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

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


def compare(site: Site, tree: Tree, runs: int) -> dict[str, float]:
    """Return the median seconds of each way; the first run warms up and does not count."""
    volume = site.create(f"source-{next(NAMES)}")
    source = site.path(volume)
    fill(source, tree.files, tree.bytes, per_directory=min(100, tree.files))
    empty = site.create(f"empty-{next(NAMES)}")
    out = site.place / "out"
    ways = {"cp -a": ("cp", "-a", "--reflink=never", str(source), str(out))}
    if site.kind != "ext4":
        ways["cp -a --reflink=always"] = ("cp", "-a", "--reflink=always", str(source), str(out))
    ways["tar czf"] = ("tar", "czf", str(out), "-C", str(source), ".")
    taken: dict[str, list[float]] = {}
    for run in range(runs + 1):
        seconds = _captures(site, volume.volume_id)
        nothing = _captures(site, empty.volume_id)
        seconds |= {f"{name} of nothing": value for name, value in nothing.items()}
        for name, command in ways.items():
            if name == "tar czf" and run > 2:
                continue  # takes half a minute each
            site.settle()
            seconds[name] = elapsed(shell(site, *SAME_PRIORITY, *command))
            _remove(out)
        for name, value in seconds.items():
            if run:
                taken.setdefault(name, []).append(value)
    for made in (volume, empty):
        site.delete_volume(made.volume_id)
    site.settle()
    return {name: statistics.median(values) for name, values in taken.items()}


def _captures(site: Site, handle: str) -> dict[str, float]:
    """Take each way once. What was made goes before the next is made, so that all of them write to the same part of the disk."""
    name = f"copy-{next(NAMES)}"
    seconds: dict[str, float] = {}
    made: list = []
    site.settle()
    seconds["snapshot"] = elapsed(lambda: made.append(site.snapshot(name, handle)))
    snapshot = made[0].snapshot_id
    for what, act in (
        ("restore", lambda: site.create(f"{name}-r", snapshot=snapshot)),
        ("clone", lambda: site.create(f"{name}-c", volume=handle)),
    ):
        site.settle()
        seconds[what] = elapsed(lambda act=act: made.append(act()))
        site.delete_volume(made[-1].volume_id)
    site.delete_snapshot(snapshot)
    site.settle()
    return seconds


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
