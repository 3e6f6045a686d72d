"""The sweeper: empties the trash, completes what nobody will ask for again, and removes what a crash left.

It never works on what somebody holds: each thing is taken only under the lock that its operation would hold, and nothing is removed
that lies outside `.csi`.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from csi_driver.errors import OperationPending, TatamiError
from csi_driver.linux import files
from csi_driver.linux.trees import remove_tree
from csi_driver.volumes.groups import Groups
from csi_driver.volumes.handles import ID_PATTERN
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import Phase
from csi_driver.volumes.pools import GROUPS, SNAPSHOTS, STAGING, TRASH, VOLUMES, Pools, PoolStore
from csi_driver.volumes.removal import SnapshotRemoval, VolumeRemoval

_log = logging.getLogger(__name__)

INTERVAL_SECONDS = 30.0
ABANDONED_SECONDS = 24 * 3600.0
"""After this long, a creation that was cut off and never asked for again will not be: the orchestrator has given up on it."""
_TEMPORARY_SECONDS = 3600.0
_REAPING = "reaping."


@dataclass
class SweepReport:
    """What one round did, in things."""

    trash_removed: int = 0
    staging_removed: int = 0
    completed: int = 0
    abandoned: int = 0
    failed: int = 0


class Sweeper:
    """One background thread for all pools; `trash_filled` wakes it."""

    def __init__(
        self,
        pools: Pools,
        locks: KeyedLocks,
        volumes: VolumeRemoval,
        snapshots: SnapshotRemoval,
        groups: Groups,
        trash_filled: threading.Event,
    ) -> None:
        self._pools = pools
        self._locks = locks
        self._volumes = volumes
        self._snapshots = snapshots
        self._groups = groups
        self._wake = trash_filled
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.last = SweepReport()

    def start(self) -> None:
        """Sweep now and from then on, until `stop`."""
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread, waiting at most `timeout` seconds; what it leaves is swept by the next one."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()  # before the sweep: what comes into the trash from here on is seen now or in the next round
            self.last = self.sweep()
            self._wake.wait(INTERVAL_SECONDS)

    def sweep(self) -> SweepReport:
        """Go through all pools once."""
        report = SweepReport()
        for store in self._pools:
            for step in (self._sweep_staging, self._complete, self._reap, self._sweep_temporaries):
                if self._stop.is_set():
                    return report
                try:
                    step(store, report)
                except (TatamiError, OSError) as error:
                    report.failed += 1
                    _log.warning(
                        "sweeping failed", extra={"pool": store.name, "step": step.__name__.strip("_"), "error": str(error)}
                    )
        return report

    # --- steps --------------------------------------------------------------------------------------------------------------------

    def _sweep_staging(self, store: PoolStore, report: SweepReport) -> None:
        """Throw away staging that nobody is building: a retry always builds anew."""
        with store.open(STAGING) as staging:
            names = os.listdir(staging)
        for record_id in {name.partition(".")[0] for name in names}:
            with self._unless_busy(store, record_id) as free:
                if free:
                    store.trash_staging(record_id)
                    report.staging_removed += 1

    def _complete(self, store: PoolStore, report: SweepReport) -> None:
        """Finish deletions that were cut off, and take back creations that were abandoned."""
        oldest = time.time_ns() - int(ABANDONED_SECONDS * 1e9)
        for volume in list(store.volumes.readable()):
            if volume.phase is Phase.DELETING or (volume.phase is Phase.CREATING and volume.created_at_ns < oldest):
                with self._unless_busy(store, volume.id) as free:
                    current = store.volumes.get(volume.id) if free else None
                    if current is not None and (current.phase, current.token) == (volume.phase, volume.token):
                        self._volumes.remove(store, current)
                        self._count(report, volume.phase)
        for group in list(store.groups.readable()):
            if group.phase is Phase.DELETING or (group.phase is Phase.CREATING and group.created_at_ns < oldest):
                with self._locks.hold(store, f"group:{group.id}"):
                    if (record := store.groups.get(group.id)) is not None and record.phase is group.phase:
                        self._groups.finish_removal(store, record)
                        self._count(report, group.phase)
        for snapshot in list(store.snapshots.readable()):
            stale = snapshot.phase is Phase.CREATING and snapshot.created_at_ns < oldest and snapshot.group_handle is None
            if snapshot.phase is Phase.DELETING or stale:
                with self._unless_busy(store, snapshot.id) as free:
                    found = store.snapshots.get(snapshot.id) if free else None
                    if found is not None and (found.phase, found.token) == (snapshot.phase, snapshot.token):
                        self._snapshots.remove(store, found)
                        self._count(report, snapshot.phase)

    def _count(self, report: SweepReport, phase: Phase) -> None:
        if phase is Phase.DELETING:
            report.completed += 1
        else:
            report.abandoned += 1

    def _reap(self, store: PoolStore, report: SweepReport) -> None:
        """Remove what is in the trash, for good."""
        with store.open(TRASH) as trash:
            for name in sorted(os.listdir(trash)):
                if self._stop.is_set():
                    return
                taken = name if name.startswith(_REAPING) else self._take(store, trash, name)
                if taken is None:
                    continue
                try:
                    remove_tree(trash, taken, should_stop=self._stop.is_set)
                    report.trash_removed += 1
                except (TatamiError, OSError) as error:
                    report.failed += 1
                    _log.warning("the trash cannot be emptied", extra={"pool": store.name, "entry": taken, "error": str(error)})

    def _take(self, store: PoolStore, trash: int, name: str) -> str | None:
        # A deletion puts its data in first and its record last: the entry is ours to remove once nobody holds its lock.
        with self._unless_busy(store, name.partition(".")[0]) as free:
            if not free:
                return None
            os.rename(name, _REAPING + name, src_dir_fd=trash, dst_dir_fd=trash)
            return _REAPING + name

    def _sweep_temporaries(self, store: PoolStore, _report: SweepReport) -> None:
        for folder in (VOLUMES, SNAPSHOTS, GROUPS):
            with store.open(folder) as opened:
                files.remove_leftover_temporaries(opened, _TEMPORARY_SECONDS)

    @contextmanager
    def _unless_busy(self, store: PoolStore, record_id: str) -> Iterator[bool]:
        """Hold the locks of the volume and of the snapshot that an id may stand for; False where somebody has one."""
        with ExitStack() as held:
            try:
                if ID_PATTERN.fullmatch(record_id):
                    held.enter_context(self._locks.hold(store, f"volume:{record_id}"))
                    held.enter_context(self._locks.hold(store, f"snapshot:{record_id}"))
                free = True
            except OperationPending:
                free = False
            yield free
