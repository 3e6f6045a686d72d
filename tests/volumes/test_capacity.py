import shutil

import pytest
from bench import DRIVER, MIB, NODE, make_bench, mount_capability

from csi_driver.config import HostPathPool
from csi_driver.errors import InvalidArgument, Unavailable
from csi_driver.volumes.model import AccessMode, AccessType
from csi_driver.volumes.requests import Capability, ClassParameters

pytestmark = pytest.mark.root
HERE = {f"topology.{DRIVER}/node": NODE}
ELSEWHERE = {f"topology.{DRIVER}/node": "node-2"}


@pytest.fixture
def bench(tmp_path, make_disk):
    pools = (
        HostPathPool("small", make_disk("small", size="4M") / "pool"),
        HostPathPool("large", make_disk("large", size="16M") / "pool"),
        HostPathPool("spread", make_disk("spread", size="8M") / "pool", shared=True),
    )
    return make_bench(tmp_path, pools, default_pool="small")


def available(bench, pool=None, topology=None, *capabilities):
    return bench.domain.services.capacity.available(ClassParameters(pool=pool), capabilities, topology)


def test_the_capacity_of_a_class_is_its_pools(bench):
    for pool, size in ((None, 4), ("small", 4), ("large", 16), ("spread", 8)):
        found = available(bench, pool)
        assert (size - 1) * MIB < found.available_bytes <= size * MIB
        assert found.maximum_volume_bytes == found.available_bytes


def test_what_is_taken_is_no_longer_available(bench):
    before = available(bench, "large").available_bytes
    volume = bench.create("v", pool="large")
    (bench.path(volume) / "data").write_bytes(bytes(4 * MIB))
    assert before - 5 * MIB < available(bench, "large").available_bytes <= before - 4 * MIB


def test_without_a_pool_and_a_default_the_roomiest_counts(tmp_path, bench):
    pools = tuple(store.backend._settings for store in bench.domain.pools)
    (tmp_path / "second").mkdir()
    assert available(make_bench(tmp_path / "second", pools, default_pool=None)).maximum_volume_bytes > 15 * MIB


def test_a_node_from_which_the_pool_cannot_be_reached_has_none_of_it(bench):
    assert available(bench, "large", HERE).available_bytes > 0
    assert available(bench, "large", ELSEWHERE).available_bytes == 0
    assert available(bench, "spread", ELSEWHERE).available_bytes > 0


def test_a_capability_that_the_pool_lacks_has_no_room_in_it(bench):
    block = Capability(AccessType.BLOCK, AccessMode.SINGLE_NODE_WRITER)
    many = mount_capability(AccessMode.MULTI_NODE_MULTI_WRITER)
    assert available(bench, "large", None, block, mount_capability()).available_bytes == 0
    assert available(bench, "large", None, many).available_bytes == 0
    assert available(bench, "spread", None, many).available_bytes > 0


def test_an_unknown_pool_is_refused(bench):
    with pytest.raises(InvalidArgument, match="allowed are large, small, spread"):
        available(bench, "fast")


def test_what_cannot_be_measured_is_not_zero(bench, pools, tmp_path):
    root = bench.pool("large").backend.root()
    shutil.rmtree(root)
    with pytest.raises(Unavailable):
        available(bench, "large")


def test_a_pool_that_nobody_can_write_to_has_no_room(bench):
    import subprocess

    disk = bench.pool("large").backend.root().parent
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert available(bench, "large").available_bytes == 0
