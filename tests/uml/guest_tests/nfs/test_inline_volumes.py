"""Inline ephemeral volumes on NFS: made and removed by the node itself, also when the server is away at the end."""

import os
import time
from contextlib import suppress

import grpc
import pytest
from driver_in_guest import KUBELET, Cluster, Volume, pool_of, refused, shell, sources

from csi_driver.rpc import csi_pb2 as csi

INLINE = {"csi.storage.k8s.io/ephemeral": "true", "size": "64Mi"}


@pytest.fixture
def servers(make_server):
    """A server that is away at times, with its exported XFS."""
    server = make_server("away")
    path = server.filesystem("xfs", name="away")
    server.export(path)
    return server, path


@pytest.fixture
def cluster(network, servers):
    server, path = servers
    with Cluster(network, [pool_of(server, path)], nodes=1) as cluster:
        yield cluster


def volumes_of(server, path) -> list[str]:
    """List the volumes' directories as the server has them."""
    return [name for name in os.listdir(server.tree(path)) if name != ".csi"]


def publish(cluster, use) -> None:
    use.driver.node.path(use.target).parent.mkdir(parents=True, exist_ok=True)
    request = csi.NodePublishVolumeRequest(
        volume_id=use.volume.handle,
        target_path=str(use.target),
        volume_capability=use.capability,
        volume_context=use.volume.context,
    )
    use.driver.call("NodePublishVolume", request)


def test_an_inline_volume_lives_as_long_as_its_pod(cluster, servers):
    server, path = servers
    use = cluster.use(Volume("csi-pod-1", INLINE), mode=csi.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
    publish(cluster, use)
    publish(cluster, use)
    shell(use, f"setpriv --reuid=1000 --regid=1000 --clear-groups touch {use.target}/file")
    (directory,) = volumes_of(server, path)
    assert sources(use.driver.node)[str(use.target)] == f"{server.address}:{path}/{directory}"
    asked = csi.NodeGetVolumeStatsRequest(volume_id=use.volume.handle, volume_path=str(use.target))
    assert use.driver.insist("NodeGetVolumeStats", asked).usage
    # Nothing that a pod's author says leads elsewhere.
    for key in ("server", "share", "directory", "options"):
        evil = cluster.use(Volume("csi-evil", {**INLINE, key: "10.99.0.253:/srv"}), mode=use.mode, pod="evil")
        with refused("INVALID_ARGUMENT", key):
            publish(cluster, evil)
    cluster.unpublish(use)
    cluster.unpublish(use)
    assert volumes_of(server, path) == []
    assert not [target for target in sources(use.driver.node) if target.startswith(f"{KUBELET}/pods")]


def test_a_pod_need_not_wait_for_a_dead_server_and_its_volume_goes_when_the_server_is_back(cluster, servers):
    server, path = servers
    use = cluster.use(Volume("csi-pod-2", INLINE), mode=csi.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
    publish(cluster, use)
    shell(use, f"touch {use.target}/file")
    server.freeze()
    time.sleep(8)
    began = time.monotonic()
    cluster.unpublish(use)
    assert time.monotonic() - began < 60
    assert str(use.target) not in sources(use.driver.node)
    server.thaw()
    # As the kubelet does, which tries again: right after a thaw the server is still said to be silent.
    other = cluster.use(Volume("csi-pod-3", INLINE), mode=use.mode, pod="other")
    until = time.monotonic() + 120
    while volumes_of(server, path) and time.monotonic() < until:
        with suppress(grpc.RpcError):
            publish(cluster, other)
        cluster.unpublish(other)
        time.sleep(1)
    assert volumes_of(server, path) == []
