"""Loop devices whose file has lost its name: what is attached in a mount namespace that has ended is shown as /image, whoever's it is."""

import subprocess
import sys
from pathlib import Path

import pytest
from images import devices_below, take_down

from csi_driver.linux import loop_devices

pytestmark = pytest.mark.root
MIB = 1024**2
ATTACH = "import sys, pathlib; from csi_driver.linux.loop_devices import attach; attach(pathlib.Path(sys.argv[1]), read_only=False, block_size=512)"


@pytest.fixture
def two_images(tmp_path: Path):
    """Two images in directories of their own, each attached where its directory was mounted for a while."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / f"place-{name}").mkdir()
        with (tmp_path / name / "image").open("wb") as file:
            file.truncate(4 * MIB)
        script = (
            f'mount --bind "{tmp_path}/{name}" "{tmp_path}/place-{name}" && exec "$0" -c "$1" "{tmp_path}/place-{name}/image"'
        )
        subprocess.run(["unshare", "-m", "--propagation", "private", "sh", "-c", script, sys.executable, ATTACH], check=True)
    yield tmp_path / "one/image", tmp_path / "other/image"
    take_down(tmp_path)


def test_a_device_is_detached_from_its_own_image_only(two_images):
    one, other = two_images
    (of_one,), (of_other,) = devices_below(one.parent), devices_below(other.parent)
    assert loop_devices.backing_file(of_one) == loop_devices.backing_file(of_other) == "/image"
    assert loop_devices.detach(of_other, one, 1.0)
    assert devices_below(other.parent) == [of_other]
    assert loop_devices.detach(of_one, one, 1.0)
    assert devices_below(one.parent) == []
    assert devices_below(other.parent) == [of_other]


def test_a_device_that_somebody_made_read_only_once_can_be_written(tmp_path):
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(4 * MIB)
    free = subprocess.run(["losetup", "-f"], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(["blockdev", "--setro", free], check=True)
    attached = loop_devices.attach(image, read_only=False, block_size=512)
    try:
        with attached.node.open("r+b", buffering=0) as device:
            assert device.write(b"x" * 512) == 512
    finally:
        take_down(tmp_path)
        subprocess.run(["blockdev", "--setrw", free], check=True)
