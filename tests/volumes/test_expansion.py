"""Expansions of node-local volumes: said centrally, done on the node."""

import grpc
import pytest

from csi_driver.errors import OutOfRange
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import csi_pb2_grpc
from csi_driver.volumes.requests import CapacityRange
from tests.driver_process import DriverProcess
from tests.volumes.bench import MIB


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


def test_a_central_process_says_that_the_nodes_expand_and_does_nothing_else(tmp_path):
    """What external-resizer asks for at its start. With EXPAND_VOLUME at the controller no refused expansion could be taken back."""
    driver = DriverProcess(tmp_path, role="expansion")
    driver.start()
    try:
        with driver.channel() as channel:
            controller, node = csi_pb2_grpc.ControllerStub(channel), csi_pb2_grpc.NodeStub(channel)
            assert (
                list(controller.ControllerGetCapabilities(csi.ControllerGetCapabilitiesRequest(), timeout=5).capabilities) == []
            )
            (able,) = node.NodeGetCapabilities(csi.NodeGetCapabilitiesRequest(), timeout=5).capabilities
            assert able.rpc.type == csi.NodeServiceCapability.RPC.EXPAND_VOLUME
            for call, request in (
                (controller.ControllerExpandVolume, csi.ControllerExpandVolumeRequest(volume_id="any")),
                (controller.DeleteVolume, csi.DeleteVolumeRequest(volume_id="any")),
                (node.NodeExpandVolume, csi.NodeExpandVolumeRequest(volume_id="any")),
            ):
                with pytest.raises(grpc.RpcError) as refused:
                    call(request, timeout=5)
                assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
            identity = csi_pb2_grpc.IdentityStub(channel)
            services = identity.GetPluginCapabilities(csi.GetPluginCapabilitiesRequest(), timeout=5).capabilities
            assert csi.PluginCapability.Service.CONTROLLER_SERVICE in {s.service.type for s in services}
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
