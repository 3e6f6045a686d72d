"""Nodes: which node ids there can be, and how this one is called.

The driver asks no API server which nodes exist; the id itself has to show whether it can be one of ours.
"""

import ipaddress
import re
import socket
from collections.abc import Iterable

from csi_driver.errors import NotFound, quoted

_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"(?=.{1,63}\Z)[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?")


class Nodes:
    """Tells whether a node id is one that this installation gives out."""

    def __init__(self, own_node_id: str, *, only_own: bool, with_address: bool = False) -> None:
        """Take ids of the shape `name@address` with `with_address`, and plain names without."""
        self._own = own_node_id
        self._only_own = only_own
        self._with_address = with_address

    def check(self, node_id: str) -> None:
        """Raise NotFound for an id that no node of this installation has (of node-local pools: any but this node's)."""
        if self._only_own and node_id != self._own:
            raise NotFound(f"node {quoted(node_id)} does not exist here: these volumes live on node {quoted(self._own)}")
        name, separator, address = node_id.partition("@")
        if not _NAME.fullmatch(name) or bool(separator) != self._with_address or (separator and not _is_address(address)):
            shape = "a node's name, `@` and its address" if self._with_address else "node names"
            raise NotFound(f"node {quoted(node_id)} does not exist: node ids of this driver are {shape}")


def topology_value(node_id: str, tag: str) -> str:
    """Return the label value that stands for a node: its name, or its tag where the name is too long for a label."""
    return node_id if _LABEL_VALUE.fullmatch(node_id) else tag


def address_towards(servers: Iterable[str]) -> str:
    """Find the address from which this machine speaks to the first of `servers` that it has a way to. Nothing is sent.

    Where none can be resolved, it is the address of the default route; raises NotFound where there is no route at all.
    """
    # The last ones are never anybody's (RFC 5737, RFC 3849), and only asked for their route.
    for server in (*servers, "192.0.2.1", "2001:db8::1"):
        try:
            found = socket.getaddrinfo(server.strip("[]"), 2049, type=socket.SOCK_DGRAM)
        except OSError:
            continue
        for family, kind, protocol, _, place in found:
            try:
                with socket.socket(family, kind, protocol) as probe:
                    probe.connect(place)  # of a datagram socket: the kernel chooses the route and the source, connect(2)
                    return str(probe.getsockname()[0]).partition("%")[0]
            except OSError:
                continue
    raise NotFound("this node has no address and no route to a server: give it one by --node-id NAME@ADDRESS")


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
