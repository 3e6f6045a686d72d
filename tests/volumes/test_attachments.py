import threading

import pytest
from bench import MIB, NODE, make_bench, mount_capability

from csi_driver.config import HostPathPool
from csi_driver.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from csi_driver.volumes.model import AccessMode, AccessType, NodePublication
from csi_driver.volumes.requests import Capability, CapacityRange

WRITER, READERS = AccessMode.MULTI_NODE_MULTI_WRITER, AccessMode.MULTI_NODE_READER_ONLY
ONE_WRITER, ONE_NODE = AccessMode.MULTI_NODE_SINGLE_WRITER, AccessMode.SINGLE_NODE_MULTI_WRITER


@pytest.fixture
def shared(tmp_path):
    """Pools that every node sees, and a driver that serves all nodes."""
    pools = tuple(HostPathPool(name, tmp_path / name, shared=True) for name in ("default", "second"))
    return make_bench(tmp_path, pools)


def publish(bench, volume, node, mode=WRITER, readonly=False):
    return bench.attachments.publish(
        volume.record.handle, NodePublication(node, mode, readonly), mount_capability(mode), volume.context
    )


def nodes(bench, volume):
    return [publication.node_id for publication in bench.volumes.get(volume.record.handle).record.published]


def test_a_node_that_gets_a_volume_is_written_down_and_told_where_it_lies(shared):
    volume = shared.create("v", directory="team/data")
    context = publish(shared, volume, "node-a")
    assert context == {"directory": "team/data", "layout": "directory", "epoch": "1"}
    assert nodes(shared, volume) == ["node-a"]
    assert publish(shared, volume, "node-a") == context
    assert nodes(shared, volume) == ["node-a"]


def test_the_epoch_grows_with_every_node(shared):
    volume = shared.create("v")
    assert [publish(shared, volume, f"node-{n}")["epoch"] for n in range(3)] == ["1", "2", "3"]
    shared.attachments.unpublish(volume.record.handle, "node-1")
    assert publish(shared, volume, "node-1")["epoch"] == "4"


@pytest.mark.parametrize("mode", [mode for mode in AccessMode if mode.single_node])
def test_a_volume_for_one_node_is_refused_to_a_second_by_name_of_the_first(shared, mode):
    volume = shared.create("v")
    publish(shared, volume, "node-a", mode)
    for other in (mode, WRITER, READERS):
        with pytest.raises(FailedPrecondition, match="node-a"):
            publish(shared, volume, "node-b", other, readonly=True)
    assert nodes(shared, volume) == ["node-a"]
    shared.attachments.unpublish(volume.record.handle, "node-a")
    publish(shared, volume, "node-b", mode)
    assert nodes(shared, volume) == ["node-b"]


def test_a_volume_on_many_nodes_is_refused_to_one_that_wants_it_alone(shared):
    volume = shared.create("v")
    publish(shared, volume, "node-a", WRITER)
    with pytest.raises(FailedPrecondition, match="node-a"):
        publish(shared, volume, "node-b", ONE_NODE)


@pytest.mark.parametrize(
    ("first", "second", "get_along"),
    [
        ((WRITER, False), (WRITER, False), True),
        ((READERS, False), (READERS, False), True),
        ((READERS, False), (WRITER, False), True),
        ((ONE_WRITER, False), (ONE_WRITER, False), False),
        ((ONE_WRITER, False), (ONE_WRITER, True), True),
        ((ONE_WRITER, True), (ONE_WRITER, False), True),
        ((ONE_WRITER, False), (READERS, False), True),
        ((ONE_WRITER, False), (WRITER, False), False),
        ((WRITER, False), (ONE_WRITER, False), False),
        ((WRITER, True), (ONE_WRITER, False), True),
    ],
)
def test_modes_of_many_nodes_get_along_unless_there_would_be_two_writers(shared, first, second, get_along):
    volume = shared.create("v")
    publish(shared, volume, "node-a", *first)
    if get_along:
        publish(shared, volume, "node-b", *second)
        assert nodes(shared, volume) == ["node-a", "node-b"]
    else:
        with pytest.raises(FailedPrecondition, match="one writer on node node-a"):
            publish(shared, volume, "node-b", *second)


@pytest.mark.parametrize("change", [{"mode": READERS}, {"readonly": True}])
def test_the_same_node_in_another_way_is_refused(shared, change):
    volume = shared.create("v")
    publish(shared, volume, "node-a")
    with pytest.raises(AlreadyExists, match="node-a"):
        publish(shared, volume, "node-a", **change)


def test_of_two_nodes_that_ask_at_once_for_a_volume_for_one_only_one_gets_it(shared):
    for round_ in range(10):
        volume = shared.create(f"v{round_}")
        start = threading.Barrier(4)
        got = []

        def ask(node, volume=volume, start=start, got=got):
            start.wait()
            try:
                publish(shared, volume, node, ONE_NODE)
                got.append(node)
            except Exception:
                return

        threads = [threading.Thread(target=ask, args=(f"node-{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        assert nodes(shared, volume) == got


def test_a_node_is_full_at_its_limit_counted_over_all_pools(tmp_path):
    pools = tuple(HostPathPool(name, tmp_path / name, shared=True) for name in ("default", "second"))
    bench = make_bench(tmp_path, pools, max_volumes_per_node=2)
    one, two, three = bench.create("one"), bench.create("two", pool="second"), bench.create("three")
    publish(bench, one, "node-a")
    publish(bench, two, "node-a")
    with pytest.raises(ResourceExhausted, match=r"its limit .* is 2"):
        publish(bench, three, "node-a")
    publish(bench, two, "node-a")
    publish(bench, three, "node-b")
    bench.attachments.unpublish(one.record.handle, "node-a")
    publish(bench, three, "node-a")


def test_the_last_place_on_a_node_is_given_once_even_to_volumes_of_two_pools(tmp_path):
    pools = tuple(HostPathPool(name, tmp_path / name, shared=True) for name in ("default", "second"))
    bench = make_bench(tmp_path, pools, max_volumes_per_node=1)
    for round_ in range(20):
        node = f"node-{round_}"
        volumes = [bench.create(f"v{round_}-{n}-{pool.name}", pool=pool.name) for n in range(2) for pool in pools]
        start = threading.Barrier(len(volumes))

        def ask(volume, start=start, node=node):
            start.wait()
            try:
                publish(bench, volume, node)
            except Exception:
                return

        threads = [threading.Thread(target=ask, args=(volume,)) for volume in volumes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(node in nodes(bench, volume) for volume in volumes) <= 1, round_


def test_unpublishing_what_is_not_published_is_done_already(shared):
    volume = shared.create("v")
    for node in ("node-a", "node-b"):
        publish(shared, volume, node)
    shared.attachments.unpublish(volume.record.handle, "node-c")
    assert nodes(shared, volume) == ["node-a", "node-b"]
    shared.attachments.unpublish(volume.record.handle, "node-a")
    shared.attachments.unpublish(volume.record.handle, "node-a")
    assert nodes(shared, volume) == ["node-b"]
    publish(shared, volume, "node-a")
    shared.attachments.unpublish(volume.record.handle, "")
    assert nodes(shared, volume) == []
    shared.attachments.unpublish("not-ours", "node-a")
    shared.attachments.unpublish(shared.pool().handle_of("a" * 26), "")


@pytest.mark.parametrize("node", ["", "Node", "no de", "node/..", "n" * 254, "node\n", "-node", "nöde", "node\0"])
def test_a_node_id_that_cannot_be_is_not_found(shared, node):
    volume = shared.create("v")
    with pytest.raises(NotFound, match="node"):
        publish(shared, volume, node)


def test_a_volume_that_lives_on_one_node_is_published_there_only(bench):
    volume = bench.create("v")
    publish(bench, volume, NODE, ONE_NODE)
    with pytest.raises(NotFound, match="node-2"):
        publish(bench, volume, "node-2", ONE_NODE)
    with pytest.raises(InvalidArgument, match="lives on one node"):
        publish(bench, volume, NODE, WRITER)


@pytest.mark.parametrize("handle", ["not-ours", "", f"default.{'a' * 26}"])
def test_a_volume_that_does_not_exist_is_not_found(shared, handle):
    with pytest.raises(NotFound):
        shared.attachments.publish(handle, NodePublication("node-a", WRITER), mount_capability(WRITER), {})


def test_a_capability_that_the_pool_lacks_is_refused(shared):
    volume = shared.create("v")
    with pytest.raises(InvalidArgument, match="the volume is a directory"):
        shared.attachments.publish(
            volume.record.handle, NodePublication("node-a", WRITER), Capability(AccessType.BLOCK, WRITER), {}
        )


def test_a_static_volume_is_published_with_the_place_that_its_author_gave(shared):
    (shared.pool().backend.root() / "data/old").mkdir(parents=True)
    context = shared.attachments.publish(
        "an-admins-volume",
        NodePublication("node-a", WRITER),
        mount_capability(WRITER),
        {"pool": "default", "directory": "data/old"},
    )
    assert context == {"directory": "data/old", "layout": "directory", "epoch": "0"}
    with pytest.raises(InvalidArgument):
        shared.attachments.publish(
            "an-admins-volume",
            NodePublication("node-a", WRITER),
            mount_capability(WRITER),
            {"pool": "default", "directory": ".csi"},
        )


def test_a_publication_survives_what_else_changes_the_record(shared):
    volume = shared.create("v")
    publish(shared, volume, "node-a")
    shared.volumes.expand(volume.record.handle, CapacityRange(2 * MIB), None)
    assert nodes(shared.restarted(), volume) == ["node-a"]
