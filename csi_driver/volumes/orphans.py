"""Orphans: what this node remembers of pods and volumes for which the kubelet will never call again.

A node that was lost and comes back with its kubelet's state wiped gets no Unpublish: an inline volume would stay for good, with its
data. Nobody says so, but three things tell it together: nothing is mounted at any of its targets (mountinfo), none of the targets is
there, and the pod's whole directory below the kubelet's is gone. The kubelet removes that last, after Unpublish. Where the kubelet's
`pods` shows no pod at all it may as well be that we do not see it, and nothing is concluded.

What is forgotten here is removed from its pool, as is what an Unpublish had to leave because the pool's server was away: each pool's in
a thread of its own, for as long as there is anything, so that no pool waits for another's server.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from csi_driver.errors import OperationPending, TatamiError
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.node_state import NodeVolumeRecord
from csi_driver.volumes.node_volumes import NodeVolumes

_PATIENCE_SECONDS = 5.0
"""How long a round waits for inline volumes to be removed; what takes longer goes on by itself."""

_log = logging.getLogger(__name__)


class Orphans:
    """Finds them among this node's records. `remove_inline` deletes the inline volumes of a pool that have no target any more."""

    def __init__(self, volumes: NodeVolumes, kubelet_dir: Path, remove_inline: Callable[[str], None]) -> None:
        self._volumes = volumes
        self._state = volumes.state
        self._pods = kubelet_dir / "pods"
        self._remove_inline = remove_inline
        self._suspects: set[str] = set()
        self._removing: dict[str, threading.Thread] = {}

    def sweep(self, *, patient: bool) -> int:
        """Remove orphans, where `patient` only those that were orphans a round ago as well, and return how many. Raises OSError."""
        found = {known.token: known for known in self._state.volumes.readable() if self._is_orphan(known)}
        due = [known for token, known in found.items() if not patient or token in self._suspects]
        self._suspects = set(found)
        removed = sum(self._forget(known) for known in due)
        self._remove_inline_volumes()
        return removed

    def _remove_inline_volumes(self) -> None:
        pools = {known.pool for known in self._state.volumes.readable() if known.ephemeral and not known.targets}
        for pool in pools:
            if pool not in self._removing or not self._removing[pool].is_alive():
                thread = threading.Thread(target=self._remove_inline_of, args=(pool,), name=f"inline {pool}", daemon=True)
                self._removing[pool] = thread
                thread.start()
        until = time.monotonic() + _PATIENCE_SECONDS
        for pool in pools:
            self._removing[pool].join(max(0.0, until - time.monotonic()))

    def _remove_inline_of(self, pool: str) -> None:
        try:
            self._remove_inline(pool)
        except (TatamiError, OSError) as error:
            _log.warning("inline volumes cannot be removed yet", extra={"pool": pool, "error": str(error)})

    def _forget(self, seen: NodeVolumeRecord) -> int:
        try:
            with self._volumes.lock(seen.handle):
                known = self._state.get(seen.handle)
                if known is None or known != seen or not self._is_orphan(known):
                    return 0
                if known.ephemeral:
                    self._state.keep(replace(known, targets=()))
                else:
                    self._state.volumes.remove(known.id)
            _log.warning("the kubelet will not ask for this volume again: it is forgotten", extra={"volume": seen.handle})
        except OperationPending:
            return 0  # it is in use after all
        except (TatamiError, OSError) as error:
            _log.warning("an orphan cannot be removed yet", extra={"volume": seen.handle, "error": str(error)})
            return 0
        return 1

    def _is_orphan(self, known: NodeVolumeRecord) -> bool:
        if known.ephemeral:
            return bool(known.targets) and self._sees_pods() and all(self._is_gone(Path(at.path)) for at in known.targets)
        # Of a volume that could not be staged for good, the record is kept for its fault, for as long as the kubelet tries.
        return (
            bool(known.fault and known.staging_path)
            and not known.targets
            and _has_gone(Path(known.staging_path).parent)
            and not self._volumes.is_anywhere(known)
        )

    def _sees_pods(self) -> bool:
        try:
            with os.scandir(self._pods) as entries:
                return any(entry.is_dir(follow_symlinks=False) for entry in entries)
        except OSError:
            return False

    def _is_gone(self, target: Path) -> bool:
        if not target.is_relative_to(self._pods) or target == self._pods:
            return False
        pod = self._pods / target.relative_to(self._pods).parts[0]
        return _has_gone(pod) and topmost_mount_at(target) is None


def _has_gone(path: Path) -> bool:
    """Say that there is nothing at a path; whatever else keeps us from seeing it is no answer."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False
