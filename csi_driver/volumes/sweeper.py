"""The sweeper: completes what nobody will ask for again, removes what a crash left, and lets the reaper empty the trash.

It never works on what somebody holds: each thing is taken only under the lock that its operation would hold. And it never gets in
anybody's way: what looks left over may be in the making, so it is only touched when it looks the same a round later.

Nobody waits for it: a call completes what was cut off at its own id, and is told to come back where it meets another's.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

from csi_driver.errors import TatamiError
from csi_driver.volumes.groups import Groups
from csi_driver.volumes.lapses import Lapses
from csi_driver.volumes.leftovers import Leftovers, SweepReport
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.orphans import Orphans
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.reaper import Reaper
from csi_driver.volumes.removal import SnapshotRemoval, VolumeRemoval
from csi_driver.volumes.rounds import Rounds

_log = logging.getLogger(__name__)

Observe = Callable[[str, float, SweepReport], None]
"""Told of each round: of which pool it was ("": the node's own records), how many seconds it took and what it did."""
_Step = Callable[[PoolStore, SweepReport, bool], None]


class Sweeper:
    """A background thread for each pool, woken by its `trash_filled`; and one for the node's `orphans`, where this process serves it."""

    def __init__(
        self,
        pools: Pools,
        locks: KeyedLocks,
        volumes: VolumeRemoval,
        snapshots: SnapshotRemoval,
        groups: Groups,
        lapses: Lapses,
        orphans: Orphans | None = None,
    ) -> None:
        self._pools = pools
        self._orphans = orphans
        self._stop = threading.Event()
        self._leftovers = Leftovers(locks, volumes, snapshots, groups, lapses, self._stop.is_set)
        self._reaper = Reaper(self._stop.is_set)
        self._rounds: list[Rounds] = []
        self._suspects: dict[str, set[str]] = {}  # by pool, and so each thread's own

    @property
    def names(self) -> list[str]:
        """Of what there are rounds: pools, and "" for this node's own records."""
        return [*(store.name for store in self._pools), *([] if self._orphans is None else [""])]

    def start(self, observe: Observe = lambda _pool, _seconds, _report: None) -> None:
        """Sweep now and from then on, until `stop`."""
        for store in self._pools:
            work = partial(self._observed, observe, store.name, partial(self._come_by, store))
            self._rounds.append(Rounds(f"sweeper {store.name}", work, store.trash_filled, self._stop))
        if self._orphans is not None:
            work = partial(self._observed, observe, "", lambda report, _: self._sweep_orphans(report, patient=True))
            self._rounds.append(Rounds("sweeper", work, threading.Event(), self._stop))
        for rounds in self._rounds:
            rounds.start()

    def stop(self, timeout: float) -> None:
        """End the threads, waiting at most `timeout` seconds; what they leave is swept by the next ones."""
        self._stop.set()
        for rounds in self._rounds:
            rounds.end()
        until = time.monotonic() + timeout
        for rounds in self._rounds:
            rounds.join(max(0.0, until - time.monotonic()))

    @staticmethod
    def _observed(observe: Observe, name: str, work: Callable[[SweepReport, bool], None], is_due: bool) -> None:
        started, report = time.monotonic(), SweepReport()
        try:
            work(report, is_due)
        except Exception:
            report.failed += 1
            raise
        finally:
            observe(name, time.monotonic() - started, report)

    def _come_by(self, store: PoolStore, report: SweepReport, is_due: bool) -> None:
        self._sweep_pool(store, report, self._all_steps() if is_due else (self._empty_trash,), patient=True)

    def sweep(self) -> SweepReport:
        """Go through everything once, at once: for whoever wants to see the result."""
        report = SweepReport()
        self._sweep_orphans(report, patient=False)
        for store in self._pools:
            self._sweep_pool(store, report, self._all_steps(), patient=False)
        return report

    def _all_steps(self) -> Sequence[_Step]:
        # The limits last: a volume from another disk is walked file by file, which may take hours.
        return (self._sweep_leftovers, self._empty_trash, self._renew_limits)

    def _sweep_pool(self, store: PoolStore, report: SweepReport, steps: Sequence[_Step], *, patient: bool) -> None:
        for step in steps:
            if store.backend.dormant:
                return  # nobody has used it since it was swept last
            try:
                step(store, report, patient)
            except (TatamiError, OSError) as error:
                if self._stop.is_set():
                    return
                report.failed += 1
                _log.warning("sweeping failed", extra={"pool": store.name, "error": str(error)})
                if store.backend.problem() is not None:
                    return  # the other steps would wait for the same

    def _sweep_orphans(self, report: SweepReport, *, patient: bool) -> None:
        if self._orphans is None:
            return
        try:
            report.orphans += self._orphans.sweep(patient=patient)
        except (TatamiError, OSError) as error:
            report.failed += 1
            _log.warning("this node's records cannot be swept", extra={"error": str(error)})

    def _empty_trash(self, store: PoolStore, report: SweepReport, _patient: bool) -> None:
        removed, failed = self._reaper.empty(store)
        report.trash += removed
        report.failed += failed
        self._leftovers.require_more(store)

    def _renew_limits(self, store: PoolStore, report: SweepReport, _patient: bool) -> None:
        self._leftovers.renew_limits(store, report)

    def _sweep_leftovers(self, store: PoolStore, report: SweepReport, patient: bool) -> None:
        before: set[str] = self._suspects.get(store.name, set())
        seen: set[str] = set()

        def stale(thing: str) -> bool:
            seen.add(thing)
            return not patient or thing in before

        self._leftovers.sweep(store, report, stale)
        self._suspects[store.name] = seen
