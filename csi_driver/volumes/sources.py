"""Content sources: the snapshot or volume that a new volume is filled from."""

from csi_driver.errors import NotFound, quoted
from csi_driver.volumes.contents import Source
from csi_driver.volumes.model import ContentSource, Phase, SnapshotRecord, SourceKind, VolumeRecord
from csi_driver.volumes.pools import Pools, PoolStore


class Sources:
    """Finds what a request names as its source."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def size_of(self, source: ContentSource) -> int:
        """Return the least size in bytes that a volume with this content needs. Raises NotFound, ResourceExhausted."""
        _, record = self._find(source)
        return record.size_bytes if isinstance(record, SnapshotRecord) else record.capacity_bytes

    def open(self, source: ContentSource) -> Source:
        """Return where the content lies. Raises NotFound; ResourceExhausted where it lies on another node."""
        store, record = self._find(source)
        directory = record.directory if isinstance(record, VolumeRecord) else ""
        return Source(store, source.kind, record.id, directory)

    def volume(self, handle: str) -> tuple[PoolStore, VolumeRecord]:
        """Find a volume to take a snapshot of. Raises NotFound, FailedPrecondition where it is another node's."""
        located = self._pools.locate(handle)
        record = located[0].volumes.get(located[1]) if located else None
        if located is None or record is None or record.phase is not Phase.READY:
            raise NotFound(f"source volume {quoted(handle)} does not exist")
        return located[0], record

    def _find(self, source: ContentSource) -> tuple[PoolStore, VolumeRecord | SnapshotRecord]:
        located = self._pools.locate_source(source.handle)
        if located is not None:
            store, record_id = located
            record: VolumeRecord | SnapshotRecord | None
            record = store.snapshots.get(record_id) if source.kind is SourceKind.SNAPSHOT else store.volumes.get(record_id)
            if record is not None and record.phase is Phase.READY:
                return store, record
        raise NotFound(f"the {source.kind} {quoted(source.handle)} that volume_content_source names does not exist")
