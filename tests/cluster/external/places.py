"""Where the suite's pods run: they tolerate no taint and ask for no node, so the others are closed to them meanwhile."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cluster import assembly
from cluster.guests import LABEL, VALUE, nfs_nodes
from cluster.kubectl import Kubectl
from cluster.nodes import Node, all_nodes


def nodes_for(backend: str) -> Sequence[Node]:
    """Return the nodes that have a backend's driver; those with NFS, and the driver for it, are brought up where they are not."""
    if backend != "nfs":
        return all_nodes()
    if not assembly.nfs_is_up():
        assembly.up_nfs()
    return nfs_nodes()


@contextmanager
def open_to_all(nodes: Sequence[Node]) -> Iterator[None]:
    """Let pods that say nothing about nodes run on these, and on these only, until the context ends."""
    client = Kubectl()
    guests = [node.name for node in nodes if node.name in {guest.name for guest in nfs_nodes()}]
    others = [node.name for node in all_nodes() if node.name not in {one.name for one in nodes}]
    if guests:
        client.run("taint", "node", *guests, f"{LABEL}-")
    if others:
        client.run("cordon", *others)
    try:
        yield
    finally:
        if guests:
            client.run("taint", "node", *guests, f"{LABEL}={VALUE}:NoSchedule", "--overwrite")
        if others:
            client.run("uncordon", *others)
