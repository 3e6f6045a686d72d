"""Loop devices whose file has lost its name, and what those who have a device's node can do to it.

What is attached in a mount namespace that has ended is shown as /image, whoever's it is.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from images import CHANGE_FD, CLR_FD, ask_without_capabilities, devices_below, take_down

from csi_driver.linux import image_child, loop_devices

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


def test_a_device_that_has_another_s_image_takes_no_new_size_for_this_one(two_images):
    one, other = two_images
    (of_one,), (of_other,) = devices_below(one.parent), devices_below(other.parent)
    for image in two_images:
        os.truncate(image, 8 * MIB)
    with pytest.raises(OSError, match="has another file by now"):
        image_child.take_new_size(one.parent, of_other, 10.0)
    assert loop_devices.size_of(of_other) == 4 * MIB
    assert image_child.take_new_size(one.parent, of_one, 10.0) == 8 * MIB


def test_a_detached_device_that_another_has_got_meanwhile_is_not_waited_for(two_images, tmp_path, monkeypatch):
    one, _ = two_images
    (of_one,) = devices_below(one.parent)
    (tmp_path / "third").mkdir()
    make_file(tmp_path / "third/image")
    looks = loop_devices.has_file

    def taken_before_we_look(name, image):
        monkeypatch.setattr(loop_devices, "has_file", looks)
        script = f'mount --bind "{tmp_path}/third" "{tmp_path}/place-one" && losetup /dev/{of_one} "{tmp_path}/place-one/image"'
        subprocess.run(["unshare", "-m", "--propagation", "private", "sh", "-c", script], check=True)
        return looks(name, image)

    monkeypatch.setattr(loop_devices, "has_file", taken_before_we_look)
    assert loop_devices.detach(of_one, one, 1.0)
    assert devices_below(tmp_path / "third") == [of_one]


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


# --- who has the node of a device -----------------------------------------------------------------------------------------------------


def make_file(path: Path, content: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.write(content)
        file.truncate(4 * MIB)
    return path


def test_nobody_without_capabilities_puts_another_file_below_a_read_only_device(tmp_path):
    image, other = make_file(tmp_path / "image", b"mine"), make_file(tmp_path / "other", b"evil")
    attached = loop_devices.attach(image, read_only=True, block_size=512)
    try:
        assert attached.read_only
        assert ask_without_capabilities(attached.node, CHANGE_FD, other) == "Invalid argument"
        assert attached.node.read_bytes()[:4] == b"mine"
        with attached.node.open("r+b", buffering=0) as device, pytest.raises(OSError, match="not permitted"):
            device.write(b"x" * 512)
    finally:
        take_down(tmp_path)


def test_a_device_that_was_read_only_is_writable_for_whoever_has_it_next(tmp_path):
    image = make_file(tmp_path / "image")
    name = loop_devices.attach(image, read_only=True, block_size=512).name
    assert loop_devices.detach(name, image, 1.0)
    assert Path(f"/sys/block/{name}/ro").read_text().strip() == "0"


def test_a_device_that_its_pod_has_cleared_is_never_given_to_another_image(tmp_path, own_mounts):
    (tmp_path / "other").mkdir()
    one, other = make_file(tmp_path / "image"), make_file(tmp_path / "other/image", b"secret")
    first = loop_devices.attach(one, read_only=False, block_size=512)
    target = make_file(tmp_path / "target")
    subprocess.run(["mount", "--bind", first.node, target], check=True)
    try:
        assert ask_without_capabilities(target, CLR_FD) == ""
        second = loop_devices.attach(other, read_only=False, block_size=512)
        assert second.name != first.name
        assert not loop_devices.serves(first.name, one)
        assert loop_devices.serves(second.name, other)
    finally:
        take_down(tmp_path)


def test_a_device_with_another_file_of_the_same_name_does_not_serve_the_image(tmp_path):
    (tmp_path / "place").mkdir()
    (tmp_path / "other").mkdir()
    image, other = make_file(tmp_path / "place/image"), make_file(tmp_path / "other/image")
    script = f'mount --bind "{tmp_path}/other" "{tmp_path}/place" && exec sleep 60'
    elsewhere = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sh", "-c", script])
    try:
        while image.stat().st_ino == Path(f"/proc/{elsewhere.pid}/root{image}").stat().st_ino:
            time.sleep(0.01)
        subprocess.run(["nsenter", "-m", "-t", str(elsewhere.pid), sys.executable, "-c", ATTACH, image], check=True)
        (name,) = devices_below(other.parent)
        assert loop_devices.backing_file(name) == str(image)
        assert not loop_devices.serves(name, image)
        assert loop_devices.serves(name, other)
    finally:
        elsewhere.kill()
        elsewhere.wait()
        take_down(tmp_path)
