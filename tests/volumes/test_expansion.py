"""Expansions of node-local volumes: said centrally, done on the node."""

import grpc
import pytest

from csi_driver.errors import FailedPrecondition, InvalidArgument, NotFound, OutOfRange
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc
from csi_driver.volumes.expansion import NodeExpansion
from csi_driver.volumes.model import CapacityRange
from tests.driver_process import DriverProcess
from tests.volumes.bench import MIB

HANDLE = f"default.{'a' * 10}.{'b' * 26}"


def test_the_size_that_is_asked_for_is_passed_on():
    assert NodeExpansion(["default"]).expand(HANDLE, CapacityRange(8 * MIB, 9 * MIB)) == 8 * MIB


@pytest.mark.parametrize("handle", ["an-admins-volume", f"default.{'b' * 26}", HANDLE + "x", HANDLE.upper()])
def test_what_no_node_can_have_made_is_not_found(handle):
    with pytest.raises(NotFound):
        NodeExpansion(["default"]).expand(handle, CapacityRange(8 * MIB))


def test_a_pool_that_is_not_configured_is_named():
    with pytest.raises(FailedPrecondition, match="pool default, which is not configured here"):
        NodeExpansion(["other"]).expand(HANDLE, CapacityRange(8 * MIB))


def test_a_size_is_needed():
    with pytest.raises(InvalidArgument, match="required_bytes"):
        NodeExpansion(["default"]).expand(HANDLE, CapacityRange(0, 8 * MIB))


@pytest.mark.root
def test_the_node_makes_a_volume_of_its_pool_larger_itself(bench):
    handle = bench.create("grows").record.handle
    bench.stage(handle)
    target = bench.publish(handle, "pod")
    assert bench.node.expand(handle, str(target), CapacityRange(8 * MIB)) == 8 * MIB
    assert bench.volumes.get(handle).record.capacity_bytes == 8 * MIB
    assert bench.node.expand(handle, str(target), CapacityRange(2 * MIB)) == 8 * MIB
    with pytest.raises(OutOfRange, match="but pool default has"):
        bench.node.expand(handle, str(target), CapacityRange(2**62))


def test_a_central_process_expands_and_does_nothing_else(tmp_path):
    driver = DriverProcess(tmp_path, role="expansion")
    driver.start()
    try:
        with driver.channel() as channel:
            controller = csi_pb2_grpc.ControllerStub(channel)
            answer = controller.ControllerGetCapabilities(csi.ControllerGetCapabilitiesRequest(), timeout=5)
            kinds = {capability.rpc.type for capability in answer.capabilities}
            assert csi.ControllerServiceCapability.RPC.EXPAND_VOLUME in kinds
            assert csi.ControllerServiceCapability.RPC.MODIFY_VOLUME not in kinds
            size = csi.CapacityRange(required_bytes=8 * MIB)
            request = csi.ControllerExpandVolumeRequest(volume_id=HANDLE, capacity_range=size)
            expanded = controller.ControllerExpandVolume(request, timeout=5)
            assert (expanded.capacity_bytes, expanded.node_expansion_required) == (8 * MIB, True)
            with pytest.raises(grpc.RpcError) as refused:
                controller.DeleteVolume(csi.DeleteVolumeRequest(volume_id=HANDLE), timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
            identity = csi_pb2_grpc.IdentityStub(channel)
            services = identity.GetPluginCapabilities(csi.GetPluginCapabilitiesRequest(), timeout=5).capabilities
            assert csi.PluginCapability.Service.VOLUME_ACCESSIBILITY_CONSTRAINTS in {s.service.type for s in services}
        assert driver.stop() == 0
        # Neither pools nor state: it runs on a read-only root, as nobody.
        assert not (tmp_path / "pools").exists()
        assert list(driver.kubelet.iterdir()) == []
    finally:
        driver.close()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('[driver]\nbackend = "nfs"\n[pools.a]\nserver = "s"\npath = "/a"\n', "those of NFS servers"),
        ('[pools.a]\npath = "/a"\nshared = true\n', "shared ones"),
    ],
)
def test_pools_with_a_controller_have_no_use_for_it(tmp_path, config, said):
    (tmp_path / "pools.toml").write_text(config)
    driver = DriverProcess(tmp_path, role="expansion")
    driver.spawn()
    try:
        assert driver.process.wait(30) == 2
        assert said in driver.tail()
    finally:
        driver.close()
