"""Two controllers in two nodes, one share: a byte is promised once, though neither sees the other's locks but through the server."""

import contextlib
import itertools
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from driver_in_guest import RWX, Driver, Use, Volume

from csi_driver.rpc import csi_pb2 as csi

MIB = 1 << 20
ASKED, ROOM = 100, 40


@pytest.fixture(scope="module")
def controllers(cluster, network):
    """The cluster's controller, and one in another node."""
    node = network.node("controller")
    node.start_statd()
    second = Driver(node, cluster.config, "controller")
    try:
        yield [cluster.controller, second.start()]
    finally:
        second.close()
        node.close()


def at_once(controllers, method, requests):
    """Ask the controllers in turn, all at the same moment and until each has a final answer; count the codes."""
    barrier = threading.Barrier(len(requests))
    for controller in controllers:
        controller.call("Probe", csi.ProbeRequest())

    def ask(controller, request):
        barrier.wait()
        with contextlib.suppress(grpc.RpcError):  # the first answer, for the figures; the retry gets the same or the final one
            controller.call(method, request)
            return "OK", 0
        try:
            controller.insist(method, request)
        except grpc.RpcError as error:
            return error.code().name, 1
        return "OK", 1

    with ThreadPoolExecutor(len(requests)) as threads:
        answers = list(threads.map(ask, itertools.cycle(controllers), requests))
    return Counter(code for code, _ in answers), sum(again for code, again in answers if code == "OK")


def available(controllers, pool):
    request = csi.GetCapacityRequest(parameters={"pool": pool})
    return {controller.insist("GetCapacity", request).available_capacity for controller in controllers}


@pytest.mark.parametrize("pool", ["room", "room-v3"])
def test_of_a_hundred_creations_at_two_controllers_exactly_forty_succeed_over_nfs(controllers, cluster, story_server, pool):
    capability = Use(Volume(""), cluster.controller, RWX).capability
    assert available(controllers, pool) == {ROOM * MIB}
    for number in range(2):
        requests = [
            csi.CreateVolumeRequest(
                name=f"{pool}-{number}-{which}",
                capacity_range=csi.CapacityRange(required_bytes=MIB),
                volume_capabilities=[capability],
                parameters={"pool": pool},
            )
            for which in range(ASKED)
        ]
        codes, later = at_once(controllers, "CreateVolume", requests)
        print(f"{pool}: {dict(codes)}, {later} of them not at the first try")
        assert codes == {"OK": ROOM, "RESOURCE_EXHAUSTED": ASKED - ROOM}
        records = list((story_server.tree(f"/srv/xfs/{pool}") / ".csi/volumes").glob("*.json"))
        assert len(records) == ROOM
        assert available(controllers, pool) == {0}
        handles = [f"{pool}.{record.stem}" for record in records]
        for handle in handles[:20]:
            cluster.delete(Volume(handle))
        assert available(controllers, pool) == {20 * MIB}
        grow = [
            csi.ControllerExpandVolumeRequest(volume_id=handle, capacity_range=csi.CapacityRange(required_bytes=3 * MIB))
            for handle in handles[20:]
        ]
        codes, _ = at_once(controllers, "ControllerExpandVolume", grow)
        assert codes == {"OK": 10, "OUT_OF_RANGE": 10}
        assert available(controllers, pool) == {0}
        for handle in handles[20:]:
            cluster.delete(Volume(handle))
        assert available(controllers, pool) == {ROOM * MIB}
