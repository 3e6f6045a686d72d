"""csi-sanity, the conformance suite that every CSI driver is measured by: nothing may fail and nothing may be skipped."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.driver_process import DriverProcess, write_pools
from tests.own_mounts import have_own_mounts

pytestmark = [pytest.mark.minutes, pytest.mark.root]

SUMMARY = re.compile(r"(\d+) Passed.*?(\d+) Failed.*?(\d+) Pending.*?(\d+) Skipped")
RUNS_IN_A_ROW = 20


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_pools(tmp_path, "max_volumes_per_node = 8")
    return tmp_path


def sanity_command(
    binary: str, home: Path, endpoint: str, controller_endpoint: str, kubelet: Path, form: str = "directory"
) -> list[str]:
    """Say how the suite is run: everything that it can be asked to look at. `form` is directory, image or block."""
    parameters = home / "parameters.yaml"
    parameters.write_text("layout: image\n")
    more = {
        "directory": [],
        "image": [f"--csi.testvolumeparameters={parameters}"],
        "block": ["--csi.testvolumeaccesstype=block"],
    }
    mutable = home / "mutable.yaml"
    mutable.write_text("onDelete: retain\n")
    return [
        binary,
        f"--csi.endpoint={endpoint}",
        f"--csi.controllerendpoint={controller_endpoint}",
        f"--csi.mountdir={kubelet}/sanity-mount",
        f"--csi.stagingdir={kubelet}/sanity-staging",
        "--csi.testvolumesize=16777216",
        "--csi.testvolumeexpandsize=33554432",
        "--csi.testnodevolumeattachlimit=true",
        f"--csi.testvolumemutableparameters={mutable}",
        "--ginkgo.no-color",
        *more[form],
    ]


def counts_of(output: str) -> dict[str, int]:
    found = SUMMARY.search(output)
    assert found, output[-6000:]
    return dict(zip(("passed", "failed", "pending", "skipped"), map(int, found.groups()), strict=True))


def run_sanity(home: Path, endpoint: str, controller_endpoint: str, kubelet: Path, form: str = "directory") -> dict[str, int]:
    """Run the suite once and return its counts; the whole output is in the assertion where something failed."""
    binary = os.environ.get("CSI_SANITY")
    assert binary, "CSI_SANITY must name the csi-sanity binary: run `make sanity`"
    command = sanity_command(binary, home, endpoint, controller_endpoint, kubelet, form)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    counts = counts_of(done.stdout + done.stderr)
    print("csi-sanity:", counts)
    assert (counts["failed"], counts["skipped"], done.returncode) == (0, 0, 0), done.stdout[-20000:]
    return counts


def assert_nothing_left(driver: DriverProcess) -> None:
    assert not [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {driver.kubelet}/" in line]


def test_one_process_passes_twenty_runs_in_a_row(home: Path):
    driver = DriverProcess(home).start()
    try:
        for _ in range(RUNS_IN_A_ROW):
            counts = run_sanity(home, driver.endpoint, driver.endpoint, driver.kubelet)
            assert counts == {"passed": 102, "failed": 0, "pending": 1, "skipped": 0}
            assert_nothing_left(driver)
        assert driver.stop() == 0
    finally:
        driver.close()


@pytest.mark.parametrize("form", ["image", "block"])
def test_images_pass_and_leave_no_loop_device(home: Path, form: str):
    have_own_mounts()
    driver = DriverProcess(home).start()
    try:
        for _ in range(2):
            counts = run_sanity(home, driver.endpoint, driver.endpoint, driver.kubelet, form)
            assert counts == {"passed": 102, "failed": 0, "pending": 1, "skipped": 0}
            assert_nothing_left(driver)
            loops = subprocess.run(
                ["losetup", "-l", "-n", "-O", "BACK-FILE"], capture_output=True, text=True, check=True
            ).stdout
            assert str(home) not in loops
        assert driver.stop() == 0
    finally:
        driver.close()


def test_controller_and_node_as_two_processes_pass(home: Path):
    controller = DriverProcess(home, role="controller", name="controller")
    node = DriverProcess(home, role="node", name="node")
    try:
        controller.start()
        node.start()
        counts = run_sanity(home, node.endpoint, controller.endpoint, node.kubelet)
        assert counts == {"passed": 102, "failed": 0, "pending": 1, "skipped": 0}
        assert_nothing_left(node)
    finally:
        node.close()
        controller.close()
