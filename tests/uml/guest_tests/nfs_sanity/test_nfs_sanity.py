"""csi-sanity against NFS pools: a controller in one node, a node process in another, four kinds of servers."""

import os
import pathlib

import pytest
from driver_in_guest import CHECKOUT, KUBELET, Cluster, Pool, sources

from tests.sanity.test_sanity import counts_of, sanity_command

EXPECTED = {"passed": 102, "failed": 0, "pending": 1, "skipped": 0}


@pytest.fixture(scope="module")
def binary():
    """The suite, as `make sanity` builds it."""
    built = sorted((CHECKOUT / ".cache/bin").glob("csi-sanity-*"))
    found = os.environ.get("CSI_SANITY") or (str(built[-1]) if built else "")
    assert found, "no csi-sanity: run `make sanity`, or name it in CSI_SANITY"
    return found


def run_sanity(binary: str, network, pool: Pool, home: pathlib.Path, *, v3: bool = False) -> None:
    """Let the suite run once, in the node; nothing may stay mounted, and no volume, snapshot or content in the pool."""
    with Cluster(network, [pool], nodes=1, driver_options="max_volumes_per_node = 8", v3=v3) as cluster:
        node = cluster.nodes[0]
        command = sanity_command(binary, home, node.endpoint, cluster.controller.endpoint, KUBELET)
        done = node.node.run(command, timeout=400, check=False)
        counts = counts_of(done.stdout + done.stderr)
        print("csi-sanity:", counts)
        assert counts == EXPECTED, f"{done.stdout[-20000:]}\n{node.tail()}\n{cluster.controller.tail()}"
        assert done.returncode == 0
        assert not sources(node.node)


@pytest.mark.parametrize("version", ["4.2", "4.1"])
def test_kernel_nfs_on_xfs(binary, network, server, xfs, tmp_path, version):
    path = xfs / f"sanity-{version}"
    server.tree(path).mkdir()
    run_sanity(binary, network, Pool("default", server.address, str(path), (f"vers={version}", "hard")), tmp_path)


def test_kernel_nfs_3_on_xfs(binary, network, make_server, tmp_path):
    server = make_server("server3", v3=True)
    path = server.filesystem("xfs", name="v3")
    server.export(path)
    run_sanity(binary, network, Pool("default", server.address, str(path), ("vers=3", "hard")), tmp_path, v3=True)


def test_ganesha(binary, network, make_ganesha, tmp_path):
    ganesha = make_ganesha()
    path = pathlib.Path("/scratch/ganesha-sanity")
    path.mkdir()
    ganesha.export(path)
    run_sanity(binary, network, Pool("default", ganesha.address, str(path), ("vers=4.2", "hard")), tmp_path)
