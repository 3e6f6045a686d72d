"""Nodes: which node ids there can be, and how this one is called.

The driver asks no API server which nodes exist; the id itself has to show whether it can be one of ours.
"""

import re

from csi_driver.errors import NotFound, quoted

_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"(?=.{1,63}\Z)[A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?")


class Nodes:
    """Tells whether a node id is one that this installation gives out."""

    def __init__(self, own_node_id: str, *, only_own: bool) -> None:
        self._own = own_node_id
        self._only_own = only_own

    def check(self, node_id: str) -> None:
        """Raise NotFound for an id that no node of this installation has (of node-local pools: any but this node's)."""
        if self._only_own and node_id != self._own:
            raise NotFound(f"node {quoted(node_id)} does not exist here: these volumes live on node {quoted(self._own)}")
        if not _NAME.fullmatch(node_id):
            raise NotFound(f"node {quoted(node_id)} does not exist: node ids of this driver are node names")


def topology_value(node_id: str, tag: str) -> str:
    """Return the label value that stands for a node: its name, or its tag where the name is too long for a label."""
    return node_id if _LABEL_VALUE.fullmatch(node_id) else tag
