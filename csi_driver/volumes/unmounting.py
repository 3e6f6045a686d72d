"""Taking volumes away from a node, also when they are busy, or when their server is gone for good.

A pod's target always goes, lazily if need be: the kubelet waits for it. So does the staging of a volume that several nodes may write.
But what one node at a time may write stays until all that was written here is with its server: late pages after another node has the
volume would be corruption. (An unmount that waits does not help against that: the kernel takes the mount away first and writes
afterwards, and volumes of one export share their pages' keeper, so that an unmount of one of them need not write at all.)
"""

import logging
from pathlib import Path

from csi_driver.errors import DeadlineExceeded, FailedPrecondition, Unavailable, quoted
from csi_driver.linux import mounts
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.handles import VOLUME
from csi_driver.volumes.inline import inline_name
from csi_driver.volumes.node_state import NodeVolumeRecord
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools

UNMOUNT_SECONDS = 10.0
_FLUSH_SECONDS = 45.0

_log = logging.getLogger(__name__)


class Unmounting:
    """Unmounts what is a volume's, and leaves what is not."""

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    def unmount_clean(self, known: NodeVolumeRecord, staging: Path) -> None:
        """Unmount what one node at a time may write, once all that was written is with its server. Raises Unavailable."""
        if topmost_mount_at(staging) is None:
            return
        late = f"volume {quoted(known.handle)} stays mounted at {staging}, so that what was written here cannot meet another node's writes"
        store = self._pools.find(known.pool)
        try:
            if store is not None:
                store.backend.flush(staging, _FLUSH_SECONDS)
        except Unavailable as error:
            raise Unavailable(f"the server of {known.source} does not answer; {late}; try again when it does") from error
        except OSError as error:
            # The server said no, so nothing will be written late.
            _log.error("writes are lost", extra={"volume": known.handle, "error": error.strerror})
        try:
            while topmost_mount_at(staging) is not None:
                mounts.unmount(staging, timeout=UNMOUNT_SECONDS)
        except (OSError, DeadlineExceeded) as error:
            raise Unavailable(f"{staging} cannot be unmounted ({error}); {late}") from error

    def detach(self, handle: str, path: Path) -> None:
        if mounts.unmount_all(path, UNMOUNT_SECONDS):
            _log.warning(
                "a busy mount was detached: it goes when its last user does", extra={"path": str(path), "volume": handle}
            )

    def unmount(self, known: NodeVolumeRecord | None, handle: str, path: Path) -> None:
        mounted = topmost_mount_at(path)
        if mounted is None:
            return
        if not self._is_ours(known, handle, path):
            raise FailedPrecondition(
                f"{path} has a mount that is not volume {quoted(handle)}: {mounted.source}; it is left as it is"
            )
        self.detach(handle, path)

    def _is_ours(self, known: NodeVolumeRecord | None, handle: str, target: Path) -> bool:
        if known is not None and str(target) in known.paths():
            return True
        if known is not None and (store := self._pools.find(known.pool)):
            return store.backend.is_staged(known.directory, target, known.source)
        # This node knows nothing of it. Of a remote pool it can be anything that the pool holds: no record can be asked.
        if any(target in store.backend.mounts_of("") for store in self._pools if store.backend.remote):
            return True
        located = self._pools.locate(handle)
        if located is None:
            return any(self._is_inline_of(store, handle, target) for store in self._pools if not store.backend.remote)
        if located[0].backend.remote:
            return False
        record = located[0].volumes.get(located[1])
        return record is not None and located[0].backend.is_staged(record.directory, target)

    @staticmethod
    def _is_inline_of(store: PoolStore, handle: str, target: Path) -> bool:
        record = store.volumes.get(store.id_of(VOLUME, inline_name(handle)))
        return record is not None and store.backend.is_staged(record.directory, target)
