"""Orphans: what this node remembers of pods and volumes for which the kubelet will never call again.

A node that was lost and comes back with its kubelet's state wiped gets no Unpublish: an inline volume would stay for good, with its
data. Nobody says so, but three things tell it together: nothing is mounted at any of its targets (mountinfo), none of the targets is
there, and the pod's whole directory below the kubelet's is gone. The kubelet removes that last, after Unpublish. Where the kubelet's
`pods` shows no pod at all it may as well be that we do not see it, and nothing is concluded.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from csi_driver.errors import OperationPending, TatamiError
from csi_driver.linux.mountinfo import topmost_mount_at
from csi_driver.volumes.node_state import NodeVolumeRecord
from csi_driver.volumes.node_volumes import NodeVolumes

_log = logging.getLogger(__name__)


class Orphans:
    """Finds them among this node's records. `remove_inline` deletes the inline volumes that have no target any more."""

    def __init__(self, volumes: NodeVolumes, kubelet_dir: Path, remove_inline: Callable[[], None]) -> None:
        self._volumes = volumes
        self._state = volumes.state
        self._pods = kubelet_dir / "pods"
        self._remove_inline = remove_inline
        self._suspects: set[str] = set()

    def sweep(self, *, patient: bool) -> int:
        """Remove orphans, where `patient` only those that were orphans a round ago as well, and return how many. Raises OSError."""
        found = {known.token: known for known in self._state.volumes.readable() if self._is_orphan(known)}
        due = [known for token, known in found.items() if not patient or token in self._suspects]
        self._suspects = set(found)
        return sum(self._remove(known) for known in due)

    def _remove(self, seen: NodeVolumeRecord) -> int:
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
            if seen.ephemeral:
                self._remove_inline()
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
