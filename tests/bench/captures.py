"""`make bench`: how long captures take, beside other tools in the same run, on filesystems made for it. Needs root and loop devices.

Prints tables, or with `--output json` one object. The exit code is 1 where a target was missed.
"""

import argparse
import os
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path

from tests.bench import copies, latency, many, nfs
from tests.bench.copies import LARGE, SMALL, Tree
from tests.bench.report import Report
from tests.bench.site import MIB, Site, site

PARTS = ("copies", "latency", "many", "nfs")
KINDS = ("xfs", "btrfs", "ext4")
LEAST_BYTES = 2048 * MIB
LEAST_SCALE_TO_WRITE_OUT = 0.1


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    if os.geteuid() != 0:
        sys.exit("benchmarks make filesystems and mount them: they need root (sudo make bench)")
    report = Report(options.output == "json")
    with tempfile.TemporaryDirectory(prefix="tatami-bench-", dir=options.directory) as name:
        for part in (_copies, _latency, _many, _nfs):
            if part.__name__.strip("_") in options.only:
                part(options, Path(name), report)
    return report.conclude(scale=options.scale, runs=options.runs)


def _copies(options: argparse.Namespace, work: Path, report: Report) -> None:
    for kind in options.filesystems:
        shown = {}
        with _site(kind, work, 6144 * MIB, options.scale) as place:
            for whole in (LARGE, SMALL):
                tree = Tree(whole.name, max(2, int(whole.files * options.scale)), int(whole.bytes * options.scale))
                with report.doing(f"copies on {kind}: {tree.files} files of {tree.bytes // MIB} MiB in all"):
                    median = copies.compare(place, tree, options.runs)
                report.add(f"{kind} {tree.name}", median, copies.judge(kind, tree, median))
                shown[f"{tree.files} files, {tree.bytes // MIB} MiB"] = median
        report.side_by_side(f"copies on {kind}, medians of {options.runs}, each with syncfs", shown)


def _site(kind: str, work: Path, size: int, scale: float) -> AbstractContextManager[Site]:
    """Make a site of `size` bytes times the scale. Where the scale is small, nobody waits until all of its blocks are written."""
    return site(kind, work, max(LEAST_BYTES, int(size * scale)), write_out=scale >= LEAST_SCALE_TO_WRITE_OUT)


def _latency(options: argparse.Namespace, work: Path, report: Report) -> None:
    size = int(4096 * MIB * options.scale)
    with (
        _site("ext4", work, 12288 * MIB, options.scale) as place,
        report.doing(f"latency beside a plain copy of {size // MIB} MiB"),
    ):
        taken = latency.latencies(place, size, 20 * options.scale + 1)
    shown: dict[str, float] = {}
    for call, values in taken.items():
        shown |= {f"{call} p50": latency.percentile(values, 50), f"{call} p99": latency.percentile(values, 99)}
        shown[f"{call} calls"] = len(values)
    report.add("latency", shown, latency.judge(taken))
    report.list(f"latency beside a plain copy of {size // MIB} MiB on ext4, seconds", shown)


def _many(options: argparse.Namespace, work: Path, report: Report) -> None:
    files = max(10, int(1_000_000 * options.scale))
    for kind in options.filesystems:
        with (
            _site(kind, work, 24576 * MIB, options.scale) as place,
            report.doing(f"{files} files on {kind}"),
        ):
            found = many.many_files(place, files)
        report.add(f"{kind} many", found, many.judge(found))
        report.list(f"{files} files in one volume on {kind}", found)


def _nfs(options: argparse.Namespace, _work: Path, report: Report) -> None:
    with report.doing("NFS in a guest"):
        figures = nfs.measure(options.scale)
    report.add("nfs", figures, nfs.judge(figures))
    report.list("NFS, kernel server and client in user-mode Linux, seconds", figures)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench ARGS=…", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--filesystems", nargs="+", choices=KINDS, default=KINDS, help="for the parts copies and many")
    parser.add_argument("--runs", type=int, default=5, help="how often each way is taken (default: %(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the sizes; below 1 the targets mean little")
    parser.add_argument(
        "--directory", type=Path, help="where the images are put, up to 24 GiB (default: the temporary directory)"
    )
    parser.add_argument("--output", choices=("table", "json"), default="table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
