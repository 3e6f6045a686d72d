"""Lanes and pools: whatever hangs on one server, calls about another find a place."""

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.errors import Unavailable
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc.lanes import Lane, Lanes, pool_of
from csi_driver.telemetry.metrics import Metrics

LANE = Lane("controller", 24, 60, 300)


def fill(places: Lanes, held: ExitStack, pool: str) -> int:
    """Let calls about `pool` hang until no more are taken; returns how many."""
    taken = 0
    while True:
        try:
            held.enter_context(places.enter(LANE, pool))
        except Unavailable:
            return taken
        taken += 1


def test_one_pool_alone_has_the_whole_lane():
    with ExitStack() as held:
        assert fill(Lanes(Metrics(), [LANE], ["fast"]), held, "fast") == LANE.capacity


def test_a_pool_that_hangs_leaves_half_of_the_lane_to_the_others():
    places = Lanes(Metrics(), [LANE], ["fast", "slow"])
    with ExitStack() as held:
        assert fill(places, held, "slow") == LANE.capacity // 2
        with pytest.raises(Unavailable, match="of pool slow"), places.enter(LANE, "slow"):
            pass
        assert fill(places, held, "fast") == LANE.capacity // 2 // 3
        assert fill(places, held, "") == LANE.capacity // 2 // 3
    with ExitStack() as held:
        assert fill(places, held, "fast") == LANE.capacity // 2, "what has ended takes no place"


@given(st.lists(st.sampled_from(["a", "b", "c", "stranger", ""]), max_size=60))
def test_however_the_others_hang_each_pool_finds_a_place(hanging):
    places = Lanes(Metrics(), [LANE], ["a", "b", "c", "d"])
    with ExitStack() as held:
        for pool in hanging:
            fill(places, held, pool)
        assert fill(places, held, "d") >= 1


def test_names_that_are_no_pools_share_one_part():
    places = Lanes(Metrics(), [LANE], ["fast", "slow"])
    with ExitStack() as held:
        fill(places, held, "fast")
        assert sum(fill(places, held, f"evil-{number}") for number in range(50)) == LANE.capacity // 2 // 3


@pytest.mark.parametrize(
    ("request_", "pool"),
    [
        (csi.NodeStageVolumeRequest(volume_id="fast.aaaa"), "fast"),
        (csi.NodeStageVolumeRequest(volume_id="an-admins", volume_context={"pool": "slow"}), "slow"),
        (csi.CreateVolumeRequest(parameters={"pool": "slow"}), "slow"),
        (csi.CreateVolumeRequest(name="v"), ""),
        (csi.CreateSnapshotRequest(source_volume_id="fast.aaaa"), "fast"),
        (csi.DeleteSnapshotRequest(snapshot_id="fast.aaaa"), "fast"),
        (csi.DeleteVolumeGroupSnapshotRequest(group_snapshot_id="fast.aaaa", snapshot_ids=["slow.b"]), "fast"),
        (csi.CreateVolumeGroupSnapshotRequest(source_volume_ids=["slow.a", "slow.b"]), "slow"),
        (csi.ListVolumesRequest(), ""),
        (csi.ProbeRequest(), ""),
    ],
)
def test_a_call_is_counted_for_the_pool_that_it_names(request_, pool):
    assert pool_of(request_) == pool
