"""What Kubernetes' external-storage suite is told about each backend (tests/cluster/external/parts.py and its files)."""

import re

import pytest
import yaml

from tests.cluster.external.parts import HERE, backends, left_out, parts

CHART = HERE.parents[2] / "deploy" / "chart" / "tatami"


@pytest.fixture(scope="module")
def values():
    return yaml.safe_load((CHART / "values.yaml").read_text())


def classes(values, kind):
    return {one["name"] for backend in ("hostpath", "nfs") for one in values[backend][kind]}


@pytest.mark.parametrize("backend", backends())
def test_each_part_uses_classes_that_the_chart_or_a_file_has(backend, values):
    for part in parts(backend):
        for key, kind in (("StorageClass", "storageClasses"), ("SnapshotClass", "snapshotClasses")):
            wanted = part.testdriver[key]
            if file := wanted.get("FromFile"):
                assert yaml.safe_load((HERE / file).read_text())["kind"] == key
            else:
                assert wanted["FromExistingClassName"] in classes(values, kind)


@pytest.mark.parametrize("backend", backends())
def test_each_part_speaks_of_the_driver_by_the_name_that_the_chart_gives_it(backend, values):
    name = values[backend]["driverName"]
    for part in parts(backend):
        assert part.testdriver["DriverInfo"]["Name"] == name
        for file in (
            part.testdriver[key].get("FromFile") for key in ("StorageClass", "VolumeAttributesClass") if key in part.testdriver
        ):
            described = yaml.safe_load((HERE / file).read_text()) if file else {"provisioner": name}
            assert name in (described.get("provisioner"), described.get("driverName"))


def test_what_a_part_changes_leaves_the_rest_of_the_file_as_it_is():
    found = {part.name: part.testdriver for part in parts("hostpath")}
    common = found["directories"]["DriverInfo"]["Capabilities"]
    assert found["copies"]["DriverInfo"]["Capabilities"] == common | {"FSResizeFromSourceNotSupported": True}
    assert found["copies"]["StorageClass"] == {"FromExistingClassName": "tatami-copies"}
    assert found["images"]["DriverInfo"]["Capabilities"] == common
    assert set(found["images"]["DriverInfo"]["SupportedFsType"]) == {"", "ext4", "xfs"}
    assert found["images"]["InlineVolumes"] == []
    assert found["directories"]["InlineVolumes"]


def test_the_runners_own_fields_are_not_told_to_the_suite():
    for part in parts("hostpath"):
        assert not {"Parts", "LeftOut", "Name", "Focus", "Skip"} & set(part.testdriver)
    assert left_out("hostpath")


@pytest.mark.parametrize(
    ("spec", "run_by"),
    [
        ("[Testpattern: Dynamic PV (default fs)] volumes should store data", ["directories", "images"]),
        ("[Testpattern: Dynamic PV (block volmode)] volumes should store data", ["raw block"]),
        ("[Testpattern: Dynamic PV (block volmode)(allowExpansion)] volume-expand should resize", ["raw block"]),
        ("[Testpattern: Dynamic PV (default fs)] capacity provides storage capacity information", ["room"]),
    ],
)
def test_a_spec_is_run_by_the_parts_that_promise_what_it_needs(spec, run_by):
    selected = [
        part.name for part in parts("nfs") if re.search(part.focus, spec) and not (part.skip and re.search(part.skip, spec))
    ]
    assert selected == run_by


def test_only_the_part_with_raw_block_promises_it_and_images_are_on_one_node():
    claims = {part.name: part.testdriver["DriverInfo"]["Capabilities"] for part in parts("nfs")}
    assert [name for name, claimed in claims.items() if claimed.get("block")] == ["raw block"]
    assert [name for name, claimed in claims.items() if claimed["RWX"]] == ["directories", "room"]
