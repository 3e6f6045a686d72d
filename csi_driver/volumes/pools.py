"""All pools of an installation, and in which of them a handle lies."""

from collections.abc import Iterator, Mapping

from csi_driver.errors import FailedPrecondition, ResourceExhausted, quoted
from csi_driver.volumes.handles import parse_handle
from csi_driver.volumes.pool_store import PoolStore

_SOURCE_ELSEWHERE = (
    "Restore or clone with a StorageClass that has volumeBindingMode: Immediate (the chart's tatami-copies), and the pod follows its "
    "volume; or put the pod on the source's node: the nodeAffinity of the source claim's PersistentVolume names it, and the label "
    "snapshot.storage.kubernetes.io/managed-by of a VolumeSnapshotContent"
)
"""What an admin reads in the events of a claim that waits for its first consumer (WaitForFirstConsumer) on the wrong node."""


class Pools:
    """All pools of an installation."""

    def __init__(self, stores: Mapping[str, PoolStore], default: str | None) -> None:
        self._stores = dict(sorted(stores.items()))
        self.default = default

    def __iter__(self) -> Iterator[PoolStore]:
        return iter(self._stores.values())

    def names(self) -> str:
        return ", ".join(self._stores)

    def find(self, name: str) -> PoolStore | None:
        return self._stores.get(name)

    def locate(self, text: str) -> tuple[PoolStore, str] | None:
        """Find the pool and id of a handle; None for a handle that this driver cannot have given.

        Raises FailedPrecondition for one of ours that cannot be served here: another node's, or of a pool that is not configured.
        Neither is "not found": the data is somewhere.
        """
        handle = parse_handle(text)
        if handle is None:
            return None
        store = self._stores.get(handle.pool)
        if store is None:
            raise FailedPrecondition(
                f"{quoted(text)} is in pool {handle.pool}, which is not configured here (pools: {self.names()}): "
                "its data may still exist; configure the pool again"
            )
        if handle.node_tag != store.node_tag:
            raise ForeignNode(
                f"{quoted(text)} lives on another node (tag {handle.node_tag}) than {store.node_id} (tag {store.node_tag})"
            )
        return store, handle.id

    def locate_source(self, text: str) -> tuple[PoolStore, str] | None:
        """Like `locate`, but another node's content is RESOURCE_EXHAUSTED: external-provisioner then tries that node."""
        try:
            return self.locate(text)
        except ForeignNode as error:
            raise ResourceExhausted(f"the content source {error}. {_SOURCE_ELSEWHERE}") from error


class ForeignNode(FailedPrecondition):
    """The handle belongs to the same driver on another node."""
