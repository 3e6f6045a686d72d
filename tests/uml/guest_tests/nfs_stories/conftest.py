"""One server with four pools in different versions, a second one to move to, a controller and two nodes, for all stories."""

import pathlib
from dataclasses import replace

import pytest
from driver_in_guest import Cluster, pool_of
from servers import KernelNfsServer

VERSIONS = {"default": "4.2", "v41": "4.1", "v3": "3", "moving": "4.2", "stale": "4.2", "room": "4.2", "room-v3": "3"}
"""Pool -> NFS version; each is a directory of one exported XFS."""


@pytest.fixture(scope="session")
def story_server(network):
    """The server, with its XFS exported, and another filesystem whose export squashes root."""
    # Debian's servers ask their own user database for a user's groups, so a pod's fsGroup (a supplementary group that no database
    # knows) would count for nothing there. This /etc is the guest's.
    configuration = pathlib.Path("/etc/nfs.conf")
    configuration.write_text(configuration.read_text().replace("manage-gids=y", "manage-gids=n"))
    server = KernelNfsServer(network, "server", v3=True)
    xfs = server.filesystem("xfs")
    server.export(xfs)
    for name in VERSIONS:
        server.tree(xfs / name).mkdir()
    squashed = server.filesystem("xfs", name="squashed")
    # What an admin does for a share that root may not own: the squashed user may write there.
    server.tree(squashed).chmod(0o777)
    server.export(squashed, "rw,sync,no_subtree_check,root_squash")
    yield server
    server.close()


@pytest.fixture(scope="session")
def story_pools(story_server):
    """Pool name -> Pool."""
    pools = {name: pool_of(story_server, f"/srv/xfs/{name}", name, f"vers={version}") for name, version in VERSIONS.items()}
    pools |= {name: replace(pools[name], size="40Mi") for name in ("room", "room-v3")}
    pools["squashed"] = pool_of(story_server, "/srv/squashed", "squashed", "vers=4.2")
    return pools


@pytest.fixture(scope="session")
def cluster(network, story_server, story_pools):
    """A controller and two nodes; the pool that a class names is its parameter `pool`."""
    with Cluster(network, story_pools.values(), v3=True) as cluster:
        yield cluster
