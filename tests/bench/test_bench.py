"""The benchmark runs, measures every way that it compares, and says so in both forms. What it measures here means nothing."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.root, pytest.mark.minutes]


def bench(*arguments, seconds=500):
    if os.geteuid() != 0:
        pytest.skip("needs root: filesystems are made and mounted")
    argv = [sys.executable, "-m", "tests.bench.captures", "--scale", "0.005", "--runs", "1", *arguments]
    return subprocess.run(argv, capture_output=True, text=True, timeout=seconds, check=False)


def test_every_part_that_needs_no_guest_gives_figures_and_verdicts_as_json(tmp_path):
    ran = bench("--only", "copies", "latency", "many", "--output", "json", "--directory", str(tmp_path))
    assert ran.returncode in (0, 1), ran.stderr
    told = json.loads(ran.stdout)
    ways = {"snapshot", "restore", "clone", "snapshot of nothing", "cp -a", "tar czf"}
    assert ways | {"cp -a --reflink=always"} <= told["figures"]["xfs small"].keys()
    assert ways <= told["figures"]["ext4 large"].keys()
    assert told["figures"]["latency"]["busy CreateVolume calls"] > 0
    assert told["figures"]["btrfs many"]["files"] == 5000
    assert {target["what"] for target in told["targets"]} >= {
        "xfs small: clone / cp -a --reflink=always",
        "ext4 large: clone / tar czf",
        "Probe, p99 beside the copy / without",
    }
    missed = [target for target in told["targets"] if target["measured"] > target["target"]]
    assert ran.returncode == bool(missed)
    assert os.listdir(tmp_path) == []


def test_tables_in_a_pipe_have_no_colours_and_no_progress(tmp_path):
    ran = bench("--only", "copies", "--filesystems", "xfs", "--directory", str(tmp_path))
    assert ran.returncode in (0, 1), ran.stderr
    assert "cp -a --reflink=always" in ran.stdout
    assert "targets" in ran.stdout
    assert "\x1b" not in ran.stdout + ran.stderr
    assert ran.stderr == ""


def test_the_figures_of_the_guest_come_back():
    ran = bench("--only", "nfs", "--output", "json")
    assert ran.returncode in (0, 1), ran.stderr
    told = json.loads(ran.stdout)
    assert {"small files: clone", "large: snapshot", "create and delete"} <= told["figures"]["nfs"].keys()
    assert len(told["targets"]) == 5
