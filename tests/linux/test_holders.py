import json
import os
import threading

import pytest

from csi_driver.errors import FailedPrecondition
from csi_driver.linux.holders import HOLDER, Holder, hold, release

FIRST = Holder("first", "boot-1", 3)


@pytest.fixture
def directory(tmp_path):
    opened = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield opened
    os.close(opened)


def found(tmp_path):
    body = json.loads((tmp_path / HOLDER).read_text())
    return Holder(body["node_id"], body["boot_id"], body["epoch"])


@pytest.mark.parametrize(
    "later", [FIRST, Holder("first", "boot-2", 3), Holder("first", "boot-1", 4), Holder("second", "boot-9", 4)]
)
def test_the_same_node_a_new_boot_and_a_later_publication_may_have_the_image(tmp_path, directory, later):
    hold(directory, FIRST)
    hold(directory, later)
    assert found(tmp_path) == later
    assert os.listdir(tmp_path) == [HOLDER]


@pytest.mark.parametrize(
    "other",
    [Holder("second", "boot-1", 3), Holder("second", "boot-9", 2), Holder("second", "boot-9", 0), Holder("first", "boot-1", 2)],
)
def test_everybody_else_is_refused_by_the_name_of_the_holder(tmp_path, directory, other):
    hold(directory, FIRST)
    with pytest.raises(FailedPrecondition, match=r"held by node 'first' \(boot boot-1, epoch 3"):
        hold(directory, other)
    assert found(tmp_path) == FIRST


def test_only_its_own_node_gives_an_image_back(tmp_path, directory):
    hold(directory, FIRST)
    release(directory, Holder("second", "boot-1", 9))
    assert found(tmp_path) == FIRST
    release(directory, Holder("first", "boot-2", 3))
    release(directory, FIRST)
    assert os.listdir(tmp_path) == []


def test_a_damaged_hold_is_nobody_s_to_take(tmp_path, directory):
    (tmp_path / HOLDER).write_text("{")
    with pytest.raises(FailedPrecondition, match="damaged"):
        hold(directory, FIRST)
    assert (tmp_path / HOLDER).read_text() == "{"


@pytest.mark.parametrize("turn", range(20))
def test_of_two_that_take_over_at_once_one_has_it(tmp_path, directory, turn):
    hold(directory, FIRST)
    got = []

    def take(number):
        try:
            hold(directory, Holder(f"node-{turn}-{number}", "boot", 4))
            got.append(number)
        except FailedPrecondition:
            pass

    threads = [threading.Thread(target=take, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [f"node-{turn}-{number}" for number in got] == [found(tmp_path).node_id]
    assert os.listdir(tmp_path) == [HOLDER]
