"""Content sources: the snapshot or volume that a new volume is filled from."""

from collections.abc import Iterator
from contextlib import contextmanager

from csi_driver.errors import LockLost, NotFound, quoted
from csi_driver.volumes.contents import Source, content_key
from csi_driver.volumes.limits import Limits
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.lookup import is_shown
from csi_driver.volumes.model import ContentSource, Form, Phase, SnapshotRecord, SourceKind, VolumeRecord
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools


class Sources:
    """Finds what a request names as its source."""

    def __init__(self, pools: Pools, locks: KeyedLocks, limits: Limits) -> None:
        self._pools = pools
        self._locks = locks
        self._limits = limits

    def size_of(self, source: ContentSource) -> int:
        """Return the least size in bytes that a volume with this content needs. Raises NotFound, ResourceExhausted."""
        _, record = self._find(source)
        return record.size_bytes if isinstance(record, SnapshotRecord) else record.capacity_bytes

    def form_of(self, source: ContentSource) -> Form:
        """Return the form that this content has. Raises NotFound, ResourceExhausted."""
        return self._find(source)[1].form

    @contextmanager
    def hold(self, source: ContentSource) -> Iterator[Source]:
        """Hold a source for reading, so that it cannot be deleted until the context ends, and say where its content lies.

        Raises NotFound, OperationPending while it is being deleted, ResourceExhausted where it lies on another node; at its end LockLost
        where somebody may have deleted it meanwhile, so that what was read is not to be trusted.
        """
        store, record = self._find(source)
        with self._locks.hold(store, content_key(record.id), shared=True) as held:
            _, record = self._find(source)  # it may have gone, and its directory be another's, before it was held
            directory = record.directory if isinstance(record, VolumeRecord) else ""
            known = record.capture.bytes if isinstance(record, SnapshotRecord) and record.capture else None
            origin = record.source_handle if isinstance(record, SnapshotRecord) else record.handle
            yield Source(store, source.kind, record.id, directory, known, record.form, origin)
            if not held.still_held() or self._has_gone(source, record.token):
                raise LockLost(f"the lock of {source.kind} {source.handle} was lost while it was read; try again")

    def _has_gone(self, source: ContentSource, token: str) -> bool:
        try:
            return self._find(source)[1].token != token
        except NotFound:
            return True

    def volume(self, handle: str) -> tuple[PoolStore, VolumeRecord]:
        """Find a volume to take a snapshot of. Raises NotFound, FailedPrecondition where it is another node's."""
        located = self._pools.locate(handle)
        record = located[0].volumes.get(located[1]) if located else None
        if located is None or record is None or record.phase is not Phase.READY:
            raise NotFound(f"source volume {quoted(handle)} does not exist")
        return located[0], record

    def most_bytes_of(self, handle: str) -> int | None:
        """Say how much a volume can hold just now (limits.py); None where nobody knows. Raises NotFound, OSError."""
        return self._limits.most_bytes(*self.volume(handle))

    def _find(self, source: ContentSource) -> tuple[PoolStore, VolumeRecord | SnapshotRecord]:
        located = self._pools.locate_source(source.handle)
        if located is not None:
            store, record_id = located
            record: VolumeRecord | SnapshotRecord | None
            record = store.snapshots.get(record_id) if source.kind is SourceKind.SNAPSHOT else store.volumes.get(record_id)
            shown = (
                is_shown(store, record)
                if isinstance(record, SnapshotRecord)
                else record is not None and record.phase is Phase.READY
            )
            if record is not None and shown:
                return store, record
        raise NotFound(f"the {source.kind} {quoted(source.handle)} that volume_content_source names does not exist")
