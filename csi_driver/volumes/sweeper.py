"""The sweeper: completes what nobody will ask for again, removes what a crash left, and lets the reaper empty the trash.

It never works on what somebody holds: each thing is taken only under the lock that its operation would hold. And it never gets in
anybody's way: what looks left over may be in the making, so it is only touched when it looks the same a round later.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from csi_driver.backends.base import in_background
from csi_driver.errors import OperationPending, TatamiError
from csi_driver.linux import files
from csi_driver.volumes.attempts import trash_staging
from csi_driver.volumes.groups import Groups
from csi_driver.volumes.handles import GROUP, ID_PATTERN, VOLUME
from csi_driver.volumes.lapses import Lapses
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import GroupRecord, Phase, SnapshotRecord, VolumeRecord
from csi_driver.volumes.orphans import Orphans
from csi_driver.volumes.parents import remove_empty_parents
from csi_driver.volumes.pool_layout import GROUPS, MANIFESTS, PARENTS, SNAPSHOTS, STAGING, VOLUMES
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.reaper import Reaper
from csi_driver.volumes.removal import SnapshotRemoval, VolumeRemoval
from csi_driver.volumes.trash import Deletion, unfinished_deletions

_log = logging.getLogger(__name__)

INTERVAL_SECONDS = 30.0
ABANDONED_SECONDS = 24 * 3600.0
"""After this long, a creation that was cut off and never asked for again will not be: the orchestrator has given up on it."""
_TEMPORARY_SECONDS = 3600.0


@dataclass
class SweepReport:
    """What one round did, in things."""

    trash: int = 0
    staging: int = 0
    deletions_completed: int = 0
    creations_abandoned: int = 0
    parents: int = 0
    orphans: int = 0
    failed: int = 0


class Sweeper:
    """One background thread for all pools; `trash_filled` wakes it. `orphans` are those of the node, where this process serves it."""

    def __init__(
        self,
        pools: Pools,
        locks: KeyedLocks,
        volumes: VolumeRemoval,
        snapshots: SnapshotRemoval,
        groups: Groups,
        lapses: Lapses,
        trash_filled: threading.Event,
        orphans: Orphans | None = None,
    ) -> None:
        self._pools = pools
        self._locks = locks
        self._volumes = volumes
        self._snapshots = snapshots
        self._groups = groups
        self._lapses = lapses
        self._orphans = orphans
        self._wake = trash_filled
        self._stop = threading.Event()
        self._reaper = Reaper(self._stop.is_set)
        self._thread: threading.Thread | None = None
        self._suspects: set[tuple[str, str]] = set()

    def start(self, observe: Callable[[float, SweepReport], None] = lambda _seconds, _report: None) -> None:
        """Sweep now and from then on, until `stop`; `observe` is told of each round, how long it took (seconds) and what it did."""
        self._thread = threading.Thread(target=self._run, args=(observe,), name="sweeper", daemon=True)
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """End the thread, waiting at most `timeout` seconds; what it leaves is swept by the next one."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self, observe: Callable[[float, SweepReport], None]) -> None:
        in_background.set(True)
        next_sweep = time.monotonic()
        while not self._stop.is_set():
            self._wake.clear()  # before the round: what comes into the trash from here on is seen now or in the next one
            started = time.monotonic()
            report = SweepReport()
            is_due = started >= next_sweep
            if is_due:
                self._each_pool(self._leftovers, report, patient=True)
                self._sweep_orphans(report, patient=True)
                next_sweep = started + INTERVAL_SECONDS
            self._each_pool(self._empty_trash, report, patient=True)
            if is_due:
                # Last: a volume from another disk is walked file by file, which may take hours.
                self._each_pool(self._renew_limits, report, patient=True)
            observe(time.monotonic() - started, report)
            self._wake.wait(max(0.0, next_sweep - time.monotonic()))

    def sweep_leftovers(self) -> SweepReport:
        """Complete and remove what a crash left, at once: for a start, before anybody is served.

        Trash and lapsed limits, which take as long as there are files, are left for later.
        """
        report = SweepReport()
        self._each_pool(self._leftovers, report, patient=False)
        return report

    def sweep(self) -> SweepReport:
        """Go through all pools once, trash included, at once: for whoever wants to see the result."""
        report = self.sweep_leftovers()
        self._sweep_orphans(report, patient=False)
        self._each_pool(self._empty_trash, report, patient=False)
        self._each_pool(self._renew_limits, report, patient=False)
        return report

    def _each_pool(self, step: Callable[[PoolStore, SweepReport, bool], None], report: SweepReport, *, patient: bool) -> None:
        for store in self._pools:
            if self._stop.is_set():
                return
            if store.backend.dormant:
                continue  # nobody has used it since it was swept last
            try:
                step(store, report, patient)
            except (TatamiError, OSError) as error:
                report.failed += 1
                _log.warning("sweeping failed", extra={"pool": store.name, "error": str(error)})

    def _sweep_orphans(self, report: SweepReport, *, patient: bool) -> None:
        if self._orphans is None:
            return
        try:
            report.orphans += self._orphans.sweep(patient=patient)
        except (TatamiError, OSError) as error:
            report.failed += 1
            _log.warning("this node's records cannot be swept", extra={"error": str(error)})

    # --- trash --------------------------------------------------------------------------------------------------------------------

    def _empty_trash(self, store: PoolStore, report: SweepReport, _patient: bool) -> None:
        removed, failed = self._reaper.empty(store)
        report.trash += removed
        report.failed += failed

    # --- leftovers ----------------------------------------------------------------------------------------------------------------

    def _leftovers(self, store: PoolStore, report: SweepReport, patient: bool) -> None:
        seen: set[tuple[str, str]] = set()

        def stale(thing: str) -> bool:
            seen.add((store.name, thing))
            return not patient or (store.name, thing) in self._suspects

        self._sweep_staging(store, report, stale)
        self._complete_deletions(store, report, stale)
        self._complete(store, report, stale)
        report.parents += remove_empty_parents(store, self._locks, stale)
        for folder in (VOLUMES, SNAPSHOTS, GROUPS, PARENTS, MANIFESTS):
            with store.open(folder) as opened:
                files.remove_leftover_temporaries(opened, _TEMPORARY_SECONDS)
        self._suspects = {suspect for suspect in self._suspects if suspect[0] != store.name} | seen

    def _sweep_staging(self, store: PoolStore, report: SweepReport, stale: Callable[[str], bool]) -> None:
        """Throw away staging that nobody is building: a retry always builds anew."""
        with store.open(STAGING) as staging:
            names = os.listdir(staging)
        for record_id in {name.partition(".")[0] for name in names if stale(name)}:
            with self._one(store, report), self._hold(store, record_id):
                trash_staging(store, record_id)
                report.staging += 1

    def _complete_deletions(self, store: PoolStore, report: SweepReport, stale: Callable[[str], bool]) -> None:
        """Let the data follow where a deletion was cut off after it had moved the record."""
        cut_off = [deletion for deletion in unfinished_deletions(store) if stale(deletion.record_name)]
        # Groups first: what they hold is theirs to delete.
        for deletion in sorted(cut_off, key=lambda deletion: deletion.kind != GROUP):
            with self._one(store, report):
                report.deletions_completed += self._complete_deletion(store, deletion)

    def _complete_deletion(self, store: PoolStore, deletion: Deletion) -> int:
        if deletion.kind == GROUP:
            with self._locks.hold(store, f"group:{deletion.record_id}"):
                return self._groups.complete_removal(store, deletion.record_id)
        with self._hold(store, deletion.record_id):
            removal = self._volumes if deletion.kind == VOLUME else self._snapshots
            return removal.complete(store, deletion.record_id)

    def _complete(self, store: PoolStore, report: SweepReport, stale: Callable[[str], bool]) -> None:
        """Finish what says `deleting`, and take back creations that were abandoned."""
        oldest = time.time_ns() - int(ABANDONED_SECONDS * 1e9)

        def left_over(record: VolumeRecord | SnapshotRecord | GroupRecord) -> bool:
            abandoned = record.phase is Phase.CREATING and record.created_at_ns < oldest
            return (record.phase is Phase.DELETING and stale(record.token)) or abandoned

        for volume in [record for record in store.volumes.readable() if left_over(record)]:
            with self._one(store, report), self._hold(store, volume.id):
                current = store.volumes.get(volume.id)
                if current is not None and (current.phase, current.token) == (volume.phase, volume.token):
                    self._volumes.remove(store, current)
                    _count(report, volume.phase)
        for group in [record for record in store.groups.readable() if left_over(record)]:
            with self._one(store, report), self._locks.hold(store, f"group:{group.id}"):
                if (record := store.groups.get(group.id)) is not None and record.phase is group.phase:
                    self._groups.remove(store, record)
                    _count(report, group.phase)
        for snapshot in [record for record in store.snapshots.readable() if record.group_handle is None and left_over(record)]:
            with self._one(store, report), self._hold(store, snapshot.id):
                found = store.snapshots.get(snapshot.id)
                if found is not None and (found.phase, found.token) == (snapshot.phase, snapshot.token):
                    end = self._snapshots.remove if found.phase is Phase.DELETING else self._snapshots.abandon
                    end(store, found)
                    _count(report, snapshot.phase)

    def _renew_limits(self, store: PoolStore, report: SweepReport, _patient: bool) -> None:
        """Hold volumes again whose limits went when quotas were switched off, or that came with their pool from another disk."""
        for record_id in self._lapses.lost(store):
            with self._one(store, report), self._hold(store, record_id):
                current = store.volumes.get(record_id)
                if current is not None and current.phase is Phase.READY:
                    renewed = self._lapses.renew(store, current, self._stop.is_set)
                    if renewed != current:
                        store.volumes.replace(renewed, self._locks.gate(store, f"volume:{record_id}"))
                    level = renewed.limit.level if renewed.limit is not None else ""
                    _log.info("a volume is held to its size again", extra={"volume": current.handle, "limit": level})

    @contextmanager
    def _one(self, store: PoolStore, report: SweepReport) -> Iterator[None]:
        """Keep what happens to one thing from the next: it may be in use, then a later round finds it, or beyond our means."""
        try:
            yield
        except OperationPending:
            return
        except (TatamiError, OSError) as error:
            report.failed += 1
            _log.warning("a leftover cannot be swept", extra={"pool": store.name, "error": str(error)})

    @contextmanager
    def _hold(self, store: PoolStore, record_id: str) -> Iterator[None]:
        """Hold the locks of the volume and of the snapshot that an id may stand for. Raises OperationPending."""
        with ExitStack() as held:
            if ID_PATTERN.fullmatch(record_id):
                held.enter_context(self._locks.hold(store, f"volume:{record_id}"))
                held.enter_context(self._locks.hold(store, f"snapshot:{record_id}"))
            yield


def _count(report: SweepReport, phase: Phase) -> None:
    if phase is Phase.DELETING:
        report.deletions_completed += 1
    else:
        report.creations_abandoned += 1
