"""Expansion of node-local volumes as it is seen from afar: the handle says that it is one of ours, and the node does the rest."""

from collections.abc import Sequence

from csi_driver.errors import FailedPrecondition, InvalidArgument, NotFound, quoted
from csi_driver.volumes.handles import parse_handle
from csi_driver.volumes.model import CapacityRange


class NodeExpansion:
    """The ExpansionService (services.py). `pools` are the names of the node-local pools."""

    def __init__(self, pools: Sequence[str]) -> None:
        self._pools = pools

    def expand(self, handle: str, capacity: CapacityRange) -> int:
        """Return the size in bytes that the node is to give the volume; whether its pool has that much, the node knows.

        Raises NotFound for a handle that no node-local pool can have given (a static volume's, say), FailedPrecondition for
        one of a pool that is not configured, InvalidArgument where no size is required.
        """
        parsed = parse_handle(handle)
        if parsed is None or parsed.node_tag is None:
            raise NotFound(f"volume {quoted(handle)} does not exist in a pool of a node")
        if parsed.pool not in self._pools:
            raise FailedPrecondition(
                f"{quoted(handle)} is in pool {parsed.pool}, which is not configured here (pools: {', '.join(self._pools)})"
            )
        if not capacity.required_bytes:
            raise InvalidArgument("capacity_range.required_bytes is missing: the size that the node has is not known here")
        return capacity.required_bytes
