"""Leftovers: what a crash left in a pool, or what nobody will ask for again, is completed or taken back, thing by thing.

Each is taken only under the lock that its operation would hold, and known by its token: what has its id by then may be another.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from csi_driver.errors import OperationPending, RecordDamaged, TatamiError, Unavailable
from csi_driver.linux import files
from csi_driver.volumes.attempts import trash_staging
from csi_driver.volumes.groups import Groups
from csi_driver.volumes.handles import GROUP, ID_PATTERN, VOLUME
from csi_driver.volumes.lapses import Lapses
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import GroupRecord, Phase, SnapshotRecord, VolumeRecord
from csi_driver.volumes.parents import remove_empty_parents
from csi_driver.volumes.pool_layout import GROUPS, MANIFESTS, PARENTS, SNAPSHOTS, STAGING, VOLUMES
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.records import RecordFolder
from csi_driver.volumes.removal import SnapshotRemoval, VolumeRemoval
from csi_driver.volumes.trash import Deletion, unfinished_deletions

_log = logging.getLogger(__name__)

ABANDONED_SECONDS = 24 * 3600.0
"""After this long, a creation that was cut off and never asked for again will not be: the orchestrator has given up on it."""
_TEMPORARY_SECONDS = 3600.0

_Record = TypeVar("_Record", VolumeRecord, SnapshotRecord, GroupRecord)


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


Stale = Callable[[str], bool]
"""Tells of a thing, by name or token, whether it has looked left over for long enough to be touched."""


class Leftovers:
    """Completes and takes back. `should_stop` is asked before each thing; so is whether the pool answers."""

    def __init__(
        self,
        locks: KeyedLocks,
        volumes: VolumeRemoval,
        snapshots: SnapshotRemoval,
        groups: Groups,
        lapses: Lapses,
        should_stop: Callable[[], bool],
    ) -> None:
        self._locks = locks
        self._volumes = volumes
        self._snapshots = snapshots
        self._groups = groups
        self._lapses = lapses
        self._should_stop = should_stop

    def sweep(self, store: PoolStore, report: SweepReport, stale: Stale) -> None:
        """Go through a pool once. Raises Unavailable where it does not answer any more, or the driver stops; TatamiError, OSError."""
        self._sweep_staging(store, report, stale)
        self._complete_deletions(store, report, stale)
        self._complete_volumes(store, report, stale)
        self._complete_snapshots(store, report)
        report.parents += remove_empty_parents(store, self._locks, stale)
        for folder in (VOLUMES, SNAPSHOTS, GROUPS, PARENTS, MANIFESTS):
            with store.open(folder) as opened:
                files.remove_leftover_temporaries(opened, _TEMPORARY_SECONDS)

    def renew_limits(self, store: PoolStore, report: SweepReport) -> None:
        """Hold volumes again whose limits went when quotas were switched off, or that came with their pool from another disk."""
        for record_id in self._lapses.lost(store):
            with self._one(store, report), self._hold(store, record_id):
                current = store.volumes.get(record_id)
                if current is not None and current.phase is Phase.READY:
                    renewed = self._lapses.renew(store, current, self._should_stop)
                    if renewed != current:
                        store.volumes.replace(renewed, self._locks.gate(store, f"volume:{record_id}"))
                    level = renewed.limit.level if renewed.limit is not None else ""
                    _log.info("a volume is held to its size again", extra={"volume": current.handle, "limit": level})

    def require_more(self, store: PoolStore) -> None:
        """Go on only while the driver runs and the pool answers. Raises Unavailable."""
        if self._should_stop():
            raise Unavailable("the driver is shutting down")
        store.require_answer()

    def _sweep_staging(self, store: PoolStore, report: SweepReport, stale: Stale) -> None:
        """Throw away staging that nobody is building: a retry always builds anew."""
        with store.open(STAGING) as staging:
            names = os.listdir(staging)
        for record_id in {name.partition(".")[0] for name in names if stale(name)}:
            with self._one(store, report), self._hold(store, record_id):
                trash_staging(store, record_id)
                report.staging += 1

    def _complete_deletions(self, store: PoolStore, report: SweepReport, stale: Stale) -> None:
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

    def _complete_volumes(self, store: PoolStore, report: SweepReport, stale: Stale) -> None:
        """Finish what says `deleting`, because it is archived, and take back creations that were abandoned."""

        def left_over(record: VolumeRecord) -> bool:
            return (record.phase is Phase.DELETING and stale(record.token)) or _is_abandoned(record)

        for volume in [record for record in self._each(store, store.volumes) if left_over(record)]:
            with self._one(store, report), self._hold(store, volume.id):
                if current := _same(store.volumes, volume):
                    self._volumes.remove(store, current)
                    if current.phase is Phase.DELETING:
                        report.deletions_completed += 1
                    else:
                        report.creations_abandoned += 1

    def _complete_snapshots(self, store: PoolStore, report: SweepReport) -> None:
        """Take back, or complete, creations that were abandoned: groups first, what they hold goes with them."""
        for group in [record for record in self._each(store, store.groups) if _is_abandoned(record)]:
            with self._one(store, report), self._locks.hold(store, f"group:{group.id}"):
                if begun := _same(store.groups, group):
                    self._groups.remove(store, begun)
                    report.creations_abandoned += 1
        alone = (record for record in self._each(store, store.snapshots) if record.group_handle is None)
        for snapshot in [record for record in alone if _is_abandoned(record)]:
            with self._one(store, report), self._hold(store, snapshot.id):
                if found := _same(store.snapshots, snapshot):
                    self._snapshots.abandon(store, found)
                    report.creations_abandoned += 1

    def _each(self, store: PoolStore, folder: RecordFolder[_Record]) -> Iterator[_Record]:
        """Read the records that can be read, for as long as there is anybody to read them from. Raises Unavailable, OSError."""
        for record in folder.each():
            self.require_more(store)
            if not isinstance(record, RecordDamaged):
                yield record

    @contextmanager
    def _one(self, store: PoolStore, report: SweepReport) -> Iterator[None]:
        """Keep what happens to one thing from the next: it may be in use, then a later round finds it, or beyond our means.

        Raises Unavailable, before anything is done, where there is no next one: the pool does not answer any more, or the driver stops.
        """
        self.require_more(store)
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


def _is_abandoned(record: VolumeRecord | SnapshotRecord | GroupRecord) -> bool:
    return record.phase is Phase.CREATING and record.created_at_ns < time.time_ns() - int(ABANDONED_SECONDS * 1e9)


def _same(records: RecordFolder[_Record], seen: _Record) -> _Record | None:
    """Read a record again, now that it is held; None where it is another by now: who has its id may have been begun anew."""
    current = records.get(seen.id)
    return current if current is not None and (current.phase, current.token) == (seen.phase, seen.token) else None
