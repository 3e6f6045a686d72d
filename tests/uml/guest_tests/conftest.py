"""What guest tests are given: a network, nodes, servers. See ../README.md for how to run one."""

import pathlib
from collections.abc import Callable, Iterator

import pytest
from ganesha import Ganesha
from nodes import Network, Node
from servers import KernelNfsServer


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    """The guest's one network; what is still on it at the end is closed."""
    network = Network()
    yield network
    network.close()


@pytest.fixture
def make_node(network: Network) -> Iterator[Callable[..., Node]]:
    """`make_node(name="node")`: one more node, for this test only."""
    made: list[Node] = []

    def make(name: str = "node") -> Node:
        made.append(network.node(name))
        return made[-1]

    yield make
    for node in reversed(made):
        node.close()


@pytest.fixture
def make_server(network: Network) -> Iterator[Callable[..., KernelNfsServer]]:
    """`make_server(name="server", v3=False)`: one more kernel NFS server, for this test only: one to stop, freeze and kill."""
    made: list[KernelNfsServer] = []

    def make(name: str = "server", *, v3: bool = False) -> KernelNfsServer:
        made.append(KernelNfsServer(network, name, v3=v3))
        return made[-1]

    yield make
    for server in reversed(made):
        server.close()


@pytest.fixture
def make_ganesha(network: Network) -> Iterator[Callable[..., Ganesha]]:
    """`make_ganesha(name="ganesha")`: a ganesha server in a node of its own, for this test only."""
    made: list[Ganesha] = []

    def make(name: str = "ganesha") -> Ganesha:
        made.append(Ganesha(network.node(name)))
        return made[-1]

    yield make
    for server in reversed(made):
        server.close()


@pytest.fixture(scope="module")
def server(network: Network) -> Iterator[KernelNfsServer]:
    """A kernel NFS server that a module's tests share; they make filesystems and directories of their own on it."""
    server = KernelNfsServer(network)
    yield server
    server.close()


@pytest.fixture(scope="module")
def xfs(server: KernelNfsServer) -> pathlib.Path:
    """The shared server's XFS with project quota and reflinks, exported; the same path names it on the server and to clients."""
    path = server.filesystem("xfs")
    server.export(path)
    return path


@pytest.fixture(scope="module")
def nodes(network: Network) -> Iterator[tuple[Node, Node]]:
    """Two nodes that a module's tests share."""
    pair = network.node("node"), network.node("node")
    yield pair
    for node in pair:
        node.close()
