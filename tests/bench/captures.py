"""`python -m tests.bench.captures`: how long captures take, beside other tools, on filesystems made for it. Needs root and loop devices.

Prints a table, or with `--output json` one object. The exit code is 1 where a target was missed.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tests.bench import copies, latency, many
from tests.bench.copies import LARGE, SMALL, Tree
from tests.bench.site import MIB, site

PARTS = ("copies", "latency", "many")


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    result: dict[str, dict] = {}
    verdicts: list[tuple[str, float, float]] = []
    with tempfile.TemporaryDirectory(prefix="tatami-bench-", dir=options.directory) as name:
        work = Path(name)
        if "copies" in options.only:
            for kind in options.filesystems:
                with site(kind, work, max(2048 * MIB, int(6144 * MIB * options.scale))) as place:
                    for tree in (LARGE, SMALL):
                        small = Tree(tree.name, max(2, int(tree.files * options.scale)), int(tree.bytes * options.scale))
                        median = copies.compare(place, small, options.runs)
                        result[f"{kind} {tree.name}"] = median
                        verdicts += copies.judge(kind, small, median)
                        _say(options, f"{kind}, {tree.name} tree, seconds (medians of {options.runs})", median)
        if "latency" in options.only:
            with site("ext4", work, max(2048 * MIB, int(12288 * MIB * options.scale))) as place:
                taken = latency.latencies(place, int(4096 * MIB * options.scale), 20 * options.scale + 1)
            shown = {}
            for call, values in taken.items():
                shown |= {f"{call} p50": latency.percentile(values, 50), f"{call} p99": latency.percentile(values, 99)}
                shown |= {f"{call} calls": len(values)}
            result["latency"] = shown
            verdicts += latency.judge(taken)
            _say(options, "latency beside a plain copy, seconds", shown)
        if "many" in options.only:
            for kind in options.filesystems:
                with site(kind, work, max(2048 * MIB, int(24576 * MIB * options.scale))) as place:
                    found = many.many_files(place, max(10, int(1_000_000 * options.scale)))
                result[f"{kind} many"] = found
                verdicts += many.judge(found)
                _say(options, f"{kind}, many files", found)
    _conclude(options, result, verdicts)
    return int(any(measured > target for _, measured, target in verdicts))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.captures", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--filesystems", nargs="+", choices=("xfs", "btrfs", "ext4"), default=("xfs", "btrfs", "ext4"))
    parser.add_argument("--runs", type=int, default=5, help="how often each way is taken")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the sizes; below 1 the targets mean little")
    parser.add_argument("--directory", type=Path, help="where the images are put (default: the temporary directory)")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    return parser.parse_args(arguments)


def _say(options: argparse.Namespace, title: str, figures: dict[str, float]) -> None:
    if options.output == "table":
        print(f"\n{title}")
        for name, value in figures.items():
            print(f"  {name:<40} {value:>12.4f}" if isinstance(value, float) else f"  {name:<40} {value:>12}", flush=True)


def _conclude(options: argparse.Namespace, result: dict[str, dict], verdicts: list[tuple[str, float, float]]) -> None:
    if options.output == "json":
        targets = [
            {"what": what, "measured": measured, "target": target, "met": measured <= target}
            for what, measured, target in verdicts
        ]
        print(json.dumps({"scale": options.scale, "runs": options.runs, "figures": result, "targets": targets}, indent=1))
        return
    print("\ntargets")
    for what, measured, target in verdicts:
        print(f"  {'met   ' if measured <= target else 'MISSED'} {what:<68} {measured:>9.3f}  (at most {target:g})")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
