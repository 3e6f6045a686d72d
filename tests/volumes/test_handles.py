import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.volumes.handles import GROUP, ID_PATTERN, SNAPSHOT, VOLUME, Handle, derive_id, node_tag, parse_handle

POOLS = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?", fullmatch=True)
ID = "abcdefghijklmnopqrstuvwxyz"
TAG = "abcdefghij"


@given(POOLS, st.text(), st.none() | st.text(min_size=1).filter(lambda node: node.isascii()), st.text())
def test_a_handle_that_was_made_of_a_name_is_read_back_as_it_was(pool, driver, node, name):
    handle = Handle(pool, derive_id(VOLUME, driver, node, name), node_tag(node) if node else None)
    assert parse_handle(str(handle)) == handle


@given(st.text())
def test_any_string_is_either_no_handle_or_exactly_the_one_that_it_says(text):
    handle = parse_handle(text)
    assert handle is None or str(handle) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ID,
        f"default.{ID}\n",
        f"default.{ID} ",
        f" default.{ID}",
        f"default.{ID[:-1]}",
        f"default.{ID}a",
        f"Default.{ID}",
        f"default.{ID.upper()}",
        f"default.{ID[:-1]}1",
        f"default..{ID}",
        f"-default.{ID}",
        f"default-.{ID}",
        f"{'p' * 33}.{ID}",
        f"default.{TAG}.{TAG}.{ID}",
        f"default.{TAG[:-1]}.{ID}",
        f"../{ID}",
        f"default/../x.{ID}",
        f"default.{ID}/..",
        f"default.{ID}\0",
        f"defäult.{ID}",
        "a" * 100_000,
    ],
)
def test_what_differs_in_a_single_letter_is_no_handle(text):
    assert parse_handle(text) is None


def test_ids_are_26_letters_that_never_need_escaping():
    for kind in (VOLUME, SNAPSHOT, GROUP):
        assert ID_PATTERN.fullmatch(derive_id(kind, "driver", None, "pvc-1\0/../\udc80 ä"))
    assert re.fullmatch(r"[a-z2-7]{10}", node_tag("node.with.dots" * 10))


def test_kind_driver_node_and_name_each_make_another_id():
    ids = {
        derive_id(kind, driver, tag, name)
        for kind in (VOLUME, SNAPSHOT, GROUP)
        for driver in ("a", "b")
        for tag in (None, "tag")
        for name in ("x", "y")
    }
    assert len(ids) == 24


def test_an_id_is_the_same_for_ever():
    # On disk for years: another derivation would lose every volume.
    assert derive_id("volume", "d", None, "n") == "4fp6ny4mhro6nc7qvhmbkan3yj"
    assert node_tag("node-1") == "ubvd6zv5qo"
