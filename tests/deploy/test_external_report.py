"""What the runner of Kubernetes' external-storage suite makes of ginkgo's report (tests/cluster/external/report.py)."""

import json
from pathlib import Path

import pytest

from tests.cluster.external import report


def spec(state: str, message: str = "", kind: str = "It", text: str = "should work") -> dict[str, object]:
    failure = {"Failure": {"Message": message}} if message else {}
    return {
        "ContainerHierarchyTexts": ["External Storage", "[Testpattern: Dynamic PV]"],
        "LeafNodeType": kind,
        "LeafNodeText": text,
        "State": state,
        "RunTime": 2_000_000_000,
    } | failure


@pytest.fixture
def run(tmp_path):
    def made(*specs, broken=None):
        path: Path = tmp_path / "report.json"
        path.write_text(
            json.dumps([{"RunTime": 90_000_000_000, "SpecialSuiteFailureReasons": broken, "SpecReports": list(specs) or None}])
        )
        return report.read(path)

    return made


def test_specs_that_nobody_selected_are_not_counted_as_skipped(run):
    found = run(spec("passed"), spec("skipped"), spec("pending"), spec("passed", kind="BeforeSuite"))
    assert [one.state for one in found.specs] == ["passed"]
    assert found.specs[0].name == "External Storage [Testpattern: Dynamic PV] should work"
    assert found.is_good


@pytest.mark.parametrize("state", ["failed", "panicked", "timedout", "interrupted", "aborted"])
def test_whatever_ends_otherwise_than_passed_or_skipped_is_a_failure(run, state):
    found = run(spec("passed"), spec(state, "timed out waiting\nfor a pod"))
    assert [one.state for one in found.failed] == [state]
    assert not found.is_good
    assert "timed out waiting" in report.table({"hostpath": found})


def test_a_suite_that_broke_before_its_specs_is_a_failure(run):
    found = run(spec("passed"), spec("failed", "no nodes", kind="SynchronizedBeforeSuite", text=""))
    assert [one.name.split()[-1] for one in found.failed] == ["SynchronizedBeforeSuite"]
    assert not run(spec("passed"), broken=["Suite Timeout Elapsed"]).is_good


def test_a_run_in_which_nothing_passed_is_no_success(run):
    assert not run().is_good
    assert not run(spec("skipped", 'Driver "d" does not support topology - skipping')).is_good


def test_a_spec_that_one_part_runs_is_not_left_out_by_another(run):
    one = run(spec("passed", text="[Slow] a copy"), spec("skipped", text="[Slow] an image"))
    other = run(spec("skipped", text="[Slow] a copy"), spec("skipped", text="[Slow] an image"))
    assert "not selected, not asked for: 1\n" in report.table({"copies": one, "images": other})


def test_skips_are_counted_by_their_reason(run):
    message = 'Driver "hostpath.csi.tatami.dev" does not support volume type "InlineVolume" - skipping'
    found = run(spec("passed"), *[spec("skipped", message)] * 3, spec("skipped", "Driver d does not support snapshot metadata"))
    shown = report.table({"hostpath": found})
    assert "   3  volumes of drivers that are compiled into Kubernetes" in shown
    assert f"skipped, {report.NOT_OURS}: 1" in shown
    assert found.is_good


def test_a_skip_that_nobody_has_judged_makes_the_run_fail(run):
    found = run(spec("passed"), spec("skipped", "the moon is full"))
    assert not found.is_good
    assert f"skipped, {report.UNKNOWN}: 1\n     1  the moon is full" in report.table({"hostpath": found})


def test_specs_that_cannot_be_had_are_named_with_the_reason_why_they_were_not_selected(run):
    found = run(
        spec("passed"), spec("skipped", text="[Disruptive] should survive"), spec("skipped", text="[Slow] [Disruptive] both")
    )
    shown = report.table({"hostpath": found})
    assert f"not selected, {report.NOT_HERE}: 2\n     2  they stop the kubelet over ssh" in shown
    assert found.is_good
