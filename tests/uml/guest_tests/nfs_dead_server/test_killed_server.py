"""A server that is gone for good: pods are taken away from it within their deadline, and the next server is mounted at once."""

import time

import pytest
from driver_in_guest import RWO, RWX, Cluster, pool_of, refused, shell, sources
from outage import Pods, waiting_for_servers

from csi_driver.rpc import csi_pb2 as csi

DEADLINE_SECONDS = 110  # the kubelet gives up after two minutes


@pytest.fixture
def servers(make_server):
    """Two servers with an exported XFS each."""
    pair = make_server("doomed"), make_server("other")
    for server in pair:
        server.export(server.filesystem("xfs", name=server.name))
    return pair


@pytest.fixture
def cluster(network, servers):
    """A controller and a node with a pool on each."""
    with Cluster(
        network, [pool_of(server, f"/srv/{server.name}", server.name.partition("-")[0]) for server in servers], nodes=1
    ) as cluster:
        yield cluster


def test_pods_are_taken_from_a_dead_server_and_the_next_server_is_mounted_at_once(cluster, servers):
    doomed, _ = servers
    shared = [cluster.use(cluster.create(f"shared-{number}", pool="doomed"), mode=RWX) for number in range(3)]
    own = cluster.use(cluster.create("own", pool="doomed"), mode=RWO)
    for use in (*shared, own):
        cluster.mount(use)
    waiting = cluster.use(cluster.create("waiting", pool="other"))
    cluster.attach(waiting)
    pods = Pods([*shared, own])
    pods.wait_until_all_write(time.monotonic(), 60)
    # Written, and not yet with the server when it dies.
    shell(own, f"head -c 3000000 /dev/urandom >{own.target}/late")
    doomed.kill()
    node = own.driver

    began = time.monotonic()
    cluster.stage(waiting)
    cluster.publish(waiting)
    shell(waiting, f"echo content >{waiting.target}/file")
    print(f"another server's volume was mounted and written to in {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 60  # a mount that waits for the dead one has no end

    # The kubelet kills the pods, and takes each volume away.
    pods.process.kill()
    for use in (*shared, own):
        began = time.monotonic()
        cluster.unpublish(use, timeout=DEADLINE_SECONDS)
        print(f"unpublished in {time.monotonic() - began:.1f} s")
        assert str(use.target) not in sources(node.node)
        assert not node.node.path(use.target).exists()
    for use in shared:
        began = time.monotonic()
        cluster.unstage(use, timeout=DEADLINE_SECONDS)
        print(f"unstaged in {time.monotonic() - began:.1f} s")
        assert str(use.staging) not in sources(node.node)
    # What one node at a time may write stays until its writes are with the server: it must not come late, after another's.
    with refused("UNAVAILABLE", "stays mounted"):
        cluster.unstage(own, timeout=DEADLINE_SECONDS)
    assert str(own.staging) in sources(node.node)
    # Of a server that is dead nothing final is said about volumes.
    with refused("UNAVAILABLE", "doomed"):
        cluster.controller.call("DeleteVolume", csi.DeleteVolumeRequest(volume_id=own.volume.handle))
    # The node process can be replaced meanwhile, and says the same.
    node.stop()
    node.start()
    with refused("UNAVAILABLE", "stays mounted"):
        cluster.unstage(own, timeout=DEADLINE_SECONDS)
    cluster.unmount(waiting)
    until = time.monotonic() + 30
    while (node.children() or waiting_for_servers(node)) and time.monotonic() < until:
        time.sleep(0.5)
    assert not node.children()
    assert not waiting_for_servers(node)


def test_unstage_of_a_writable_single_node_volume_goes_through_once_its_server_is_back(cluster, servers):
    doomed, _ = servers
    use = cluster.use(cluster.create("late", pool="doomed"), mode=RWO)
    directory = cluster.attach(use)["directory"]
    cluster.stage(use)
    cluster.publish(use)
    shell(use, f"echo early >{use.target}/early && sync {use.target}/early")
    doomed.freeze()
    # Into the page cache alone: the create would ask the server, an append to what is open does not.
    use.driver.node.popen(["/bin/sh", "-c", f"echo late >>{use.target}/early"])
    time.sleep(1)
    cluster.unpublish(use, timeout=DEADLINE_SECONDS)
    with refused("UNAVAILABLE", "stays mounted"):
        cluster.unstage(use, timeout=DEADLINE_SECONDS)
    doomed.thaw()
    use.driver.insist(
        "NodeUnstageVolume", csi.NodeUnstageVolumeRequest(volume_id=use.volume.handle, staging_target_path=str(use.staging))
    )
    assert str(use.staging) not in sources(use.driver.node)
    assert doomed.tree(f"/srv/{doomed.name}/{directory}/early").read_text().startswith("early\n")
