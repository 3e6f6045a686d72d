import os
import threading
from pathlib import Path

import pytest

from csi_driver.linux.listings import list_steadily

NAMES = {f"record-{number}" for number in range(300)}


@pytest.mark.root
@pytest.mark.parametrize("kind", ["btrfs", "tmpfs"])
def test_a_file_that_is_replaced_again_and_again_is_in_every_listing(kind, make_disk):
    place = make_disk("disk", "128M", kind) / "records"
    place.mkdir()
    for name in NAMES:
        (place / name).touch()
    stop = threading.Event()
    replacing = threading.Thread(target=_replace, args=(place, stop))
    replacing.start()
    descriptor = os.open(place, os.O_RDONLY)
    try:
        for _ in range(300):
            assert NAMES - list_steadily(descriptor).keys() == set()
    finally:
        stop.set()
        replacing.join()
        os.close(descriptor)


def _replace(place: Path, stop: threading.Event) -> None:
    while True:
        for name in NAMES:
            if stop.wait(0.001):  # a record every millisecond is more than any cluster does
                return
            temporary = place / f".{name}"
            temporary.touch()
            temporary.rename(place / name)


def test_a_directory_that_rests_is_listed_once_with_the_inodes_of_its_files(tmp_path):
    (tmp_path / "one").touch()
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        assert list_steadily(descriptor) == {"one": (tmp_path / "one").stat().st_ino}
        (tmp_path / "two").touch()
        assert list_steadily(descriptor).keys() == {"one", "two"}
    finally:
        os.close(descriptor)
