"""Attachments: which node may use which volume, written in the volume's record before the node is told.

This is what keeps a ReadWriteOnce volume on one node: the second node is refused, by name of the first.
"""

from collections.abc import Mapping
from dataclasses import replace

from csi_driver.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted, quoted
from csi_driver.volumes import access
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import Form, NodePublication, Phase, VolumeRecord
from csi_driver.volumes.nodes import Nodes
from csi_driver.volumes.placement import find_static, publish_context, static_store
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.requests import Capability


class Attachments:
    """The AttachmentService (services.py). `max_volumes_per_node` 0 means no limit."""

    def __init__(self, pools: Pools, locks: KeyedLocks, nodes: Nodes, max_volumes_per_node: int) -> None:
        self._pools = pools
        self._locks = locks
        self._nodes = nodes
        self._limit = max_volumes_per_node

    def publish(
        self, handle: str, publication: NodePublication, capability: Capability, context: Mapping[str, str]
    ) -> Mapping[str, str]:
        """Record that a node may use the volume, and return what that node must be told (publish_context).

        Raises NotFound (volume, node), AlreadyExists (this node has it in another way), FailedPrecondition (another node has it),
        ResourceExhausted (the node's limit).
        """
        located = self._pools.locate(handle)
        if located is None and context:
            # A static volume has no record: whoever made the PV answers for its use.
            static = static_store(self._pools, handle, context)
            self._nodes.check(publication.node_id)
            if problem := access.unsupported(capability, static.backend, Form()):
                raise InvalidArgument(problem)
            return publish_context(static, find_static(static, context), None)
        store, record = self._find(located, handle)
        self._nodes.check(publication.node_id)
        if problem := access.unsupported(capability, store.backend, record.form):
            raise InvalidArgument(problem)
        with self._locks.hold(store, f"volume:{record.id}"):
            _, record = self._find(located, handle)
            mine = [known for known in record.published if known.node_id == publication.node_id]
            others = [known for known in record.published if known.node_id != publication.node_id]
            if mine and mine[0] != publication:
                raise AlreadyExists(
                    f"volume {handle} is published to {publication.node_id} with {mine[0].access_mode}, readonly {mine[0].readonly}: "
                    "unpublish it before it is published in another way"
                )
            if not mine:
                access.check_compatible(handle, publication, others)
                record = self._attach(store, record, publication)
            return publish_context(store, record.directory, record)

    def _attach(self, store: PoolStore, record: VolumeRecord, publication: NodePublication) -> VolumeRecord:
        attached = replace(record, published=(*record.published, publication), epoch=record.epoch + 1)
        gate = self._locks.gate(store, f"volume:{record.id}")
        if not self._limit:
            return store.volumes.replace(attached, gate)
        # Counted under the node's own lock, the same for the volumes of all pools, or two could take the last place at once.
        # A pool whose server is away is left out of both: its volumes are not counted, and nobody else waits for them.
        present = [pool for pool in self._pools if pool is store or pool.backend.problem() is None]
        with self._locks.hold(present[0], f"node:{publication.node_id}"):
            used = sum(
                any(known.node_id == publication.node_id for known in other.published)
                for pool in present
                for other in pool.volumes.readable()
            )
            if used >= self._limit:
                raise ResourceExhausted(
                    f"node {publication.node_id} has {used} volumes; its limit (max_volumes_per_node) is {self._limit}"
                )
            return store.volumes.replace(attached, gate)

    def unpublish(self, handle: str, node_id: str) -> None:
        """Record that a node (empty: every node) no longer uses the volume. What is not published is unpublished already."""
        located = self._pools.locate(handle)
        if located is None:
            return
        store, record_id = located
        with self._locks.hold(store, f"volume:{record_id}"):
            record = store.volumes.get(record_id)
            if record is None:
                return
            left = tuple(known for known in record.published if node_id and known.node_id != node_id)
            if left != record.published:
                store.volumes.replace(replace(record, published=left), self._locks.gate(store, f"volume:{record_id}"))

    def _find(self, located: tuple[PoolStore, str] | None, handle: str) -> tuple[PoolStore, VolumeRecord]:
        record = located[0].volumes.get(located[1]) if located else None
        if located is None or record is None:
            raise NotFound(f"volume {quoted(handle)} does not exist")
        if record.phase is not Phase.READY:
            raise FailedPrecondition(f"volume {quoted(handle)} is {record.phase}")
        return located[0], record
