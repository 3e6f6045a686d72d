"""The places of snapshots: what was built in staging is moved to `snapshots-data/<id>` in one step, and sealed there.

The place is inside `.csi` and named by the id, so nobody else can have taken it, and nothing has to be claimed: content is there complete
or not at all.
"""

import os
from dataclasses import replace

from csi_driver.linux import btrfs, files
from csi_driver.volumes.attempts import open_staged, staging_name
from csi_driver.volumes.fencing import Fence
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import Phase, SnapshotRecord
from csi_driver.volumes.pool_layout import SNAPSHOT_DATA, STAGING, exists_at
from csi_driver.volumes.pool_store import PoolStore

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class SnapshotPlaces:
    """Moves what was built for snapshots to where they are kept."""

    def __init__(self, locks: KeyedLocks) -> None:
        self._fence = Fence(locks, "snapshot")

    def place(self, store: PoolStore, record: SnapshotRecord) -> None:
        """Write the record of what was built, and move it to the snapshot's place. Raises LockLost.

        It lasts there as soon as the record that says ready does.
        """
        record_id, name = record.id, staging_name(record.id, record.token)
        store.snapshots.replace(record, self._fence.gate(store, store.snapshots, record), files.order_directory)
        with store.open(STAGING) as staging, store.open(SNAPSHOT_DATA) as data:
            with open_staged(staging, name) as content:
                files.order_directory(content)
            self._fence.require(store, store.snapshots, record)
            os.rename(name, record_id, src_dir_fd=staging, dst_dir_fd=data)
            files.order_directory(data)
            files.order_directory(staging)
        self.seal(store, record_id)

    def seal(self, store: PoolStore, record_id: str) -> None:
        """Make a snapshot that is a subvolume read-only; only then, for what is read-only cannot be moved into place."""
        with store.open(SNAPSHOT_DATA) as data:
            content = os.open(record_id, _DIRECTORY, dir_fd=data)
        try:
            btrfs.set_read_only(content, read_only=True)
        finally:
            os.close(content)

    def make_ready(self, store: PoolStore, record: SnapshotRecord) -> SnapshotRecord:
        """Say that a snapshot that is in its place is ready. Returns the record as it now is. Raises LockLost."""
        return store.snapshots.replace(replace(record, phase=Phase.READY), self._fence.gate(store, store.snapshots, record))

    def has_content(self, store: PoolStore, record_id: str) -> bool:
        """Tell whether a snapshot's content is in place: it gets there complete or not at all."""
        with store.open(SNAPSHOT_DATA) as data:
            return exists_at(data, record_id)
