"""Which ways of use a pool can serve, and which two uses of one volume get along."""

from collections.abc import Iterable

from csi_driver.backends.base import PoolBackend
from csi_driver.errors import FailedPrecondition, InvalidArgument
from csi_driver.volumes.model import AccessMode, AccessType, Capability, NodePublication, Ownership


def unsupported(capability: Capability, pool: PoolBackend) -> str | None:
    """Say why `pool` cannot serve `capability`; None where it can."""
    if capability.access_type is AccessType.BLOCK:
        return f"volume_capability.block: a volume of pool {pool.name} is a directory; only volumeMode Filesystem is served"
    if pool.node_local and not capability.access_mode.single_node:
        return (
            f"volume_capability.access_mode is {capability.access_mode}: pool {pool.name} lives on one node; allowed are the SINGLE_NODE "
            "modes (ReadWriteOnce, ReadWriteOncePod); several nodes need an NFS pool, or `shared = true` on a directory that is shared"
        )
    try:
        pool.check_flags(capability.mount_flags, "volume_capability.mount.mount_flags")
    except InvalidArgument as error:
        return str(error)
    return None


def check_ownership(wanted: Ownership, pool: PoolBackend) -> None:
    """Raise FailedPrecondition where a class asks for an owner and the pool's server lets nobody give files away."""
    if pool.squashed_to is not None and (wanted.uid is not None or wanted.gid is not None):
        raise FailedPrecondition(
            f"parameters ask for a uid or gid, but the server of pool {pool.name} squashes root to uid {pool.squashed_to}: export it to "
            "the controller with `no_root_squash`, or ask for a `mode` only"
        )


def is_writer(publication: NodePublication) -> bool:
    """Tell whether a node with this publication may write."""
    return not (publication.readonly or publication.access_mode.reader_only)


def check_compatible(handle: str, wanted: NodePublication, others: Iterable[NodePublication]) -> None:
    """Raise FailedPrecondition, naming the node, where `wanted` and what other nodes have of the volume exclude each other."""
    for other in others:
        if wanted.access_mode.single_node or other.access_mode.single_node:
            raise FailedPrecondition(
                f"volume {handle} is published to node {other.node_id} with {other.access_mode}: it can be on one node at a time; it "
                f"comes to {wanted.node_id} once it has been unpublished there"
            )
        one_writer = AccessMode.MULTI_NODE_SINGLE_WRITER in (wanted.access_mode, other.access_mode)
        if one_writer and is_writer(wanted) and is_writer(other):
            raise FailedPrecondition(f"volume {handle} has its one writer on node {other.node_id} ({other.access_mode})")
