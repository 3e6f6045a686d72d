"""Usage: what a volume itself takes, counted, not what its disk takes.

Where no quota counts for us the tree is walked. That can outlast a call: the count goes on as a job, and its result is good for a while,
so that the kubelet's minute-by-minute question does not walk a million files each time. Whoever asks meanwhile is told the count of
before, which is soon enough and true of its time; only where there is none is he told to come back. `VolumeStats` says what it is.

A walk takes memory, on NFS a process, and how many volumes there are to be counted is up to tenants: so walks take turns, for all pools
together. Most are short, and must not wait for those that are not: whoever is not done after ten seconds gives its turn back, and begins
anew in another line. In both each pool has a turn in a round, so that none waits for all that another server does not answer.
"""

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from csi_driver.backends.base import Space, Used
from csi_driver.errors import DeadlineExceeded, OperationPending
from csi_driver.linux.trees import measure_tree
from csi_driver.volumes.answers import Usage, UsageSource, VolumeStats
from csi_driver.volumes.jobs import REPLY_MARGIN_SECONDS, JobControl, Jobs
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.turns import Turns

_log = logging.getLogger(__name__)

_FRESH_FACTOR = 20
"""A count is good for twenty times as long as it took: a small volume is counted each time, and no volume keeps a core busy."""
_SHORT_COUNT_SECONDS = 10.0
_LONGEST_COUNT_SECONDS = 3600.0
_SHORT_AT_ONCE = 3
_LONG_AT_ONCE = 1
_OLDEST_SECONDS = 3600.0
"""For how long beyond its time a count is better than none, while a new one is made."""
_PATIENCE_SECONDS = 2.0
"""How long a new count is waited for where there is an old one."""


@dataclass(frozen=True)
class _Count:
    usage: Used
    space: Space | None  # of a remote pool, which is measured in the same go
    began: float  # monotonic seconds
    until: float


class UsageCounter:
    """Counts volumes, and remembers for as long as counting them is dear."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._lines = (
            (Turns(_SHORT_AT_ONCE), _SHORT_COUNT_SECONDS),
            (Turns(_LONG_AT_ONCE), _LONGEST_COUNT_SECONDS),
        )
        self._guard = threading.Lock()
        self._counts: dict[tuple[str, str], _Count] = {}
        self._given_up: dict[tuple[str, str], float] = {}
        """Until when (monotonic seconds) it is not tried again to count what cannot be counted."""

    def stats(
        self, store: PoolStore, directory: str, capacity_bytes: int | None, deadline: float, mounted: Path
    ) -> VolumeStats:
        """Return the volume's own usage; `mounted` is where this node shows it, which is all that it sees of a remote pool.

        Raises NotFound where the directory is gone, OperationPending where it is still being counted at `deadline` (monotonic seconds)
        and was not lately.
        """
        count = self._count(store, directory, deadline, mounted)
        used, space = count.usage, count.space or store.space()
        available = space.available_bytes
        if capacity_bytes is not None:
            available = min(available, max(0, capacity_bytes - used.bytes))
        # btrfs makes inodes as they are needed and says that it has none.
        inodes = (
            Usage(used.inodes, used.inodes + space.available_inodes, space.available_inodes) if space.total_inodes else None
        )
        return VolumeStats(
            bytes=Usage(used.bytes, capacity_bytes if capacity_bytes is not None else used.bytes + available, available),
            inodes=inodes or Usage(used.inodes, None, None),
            source=UsageSource.WALK,
            age_seconds=time.monotonic() - count.began,
        )

    def _count(self, store: PoolStore, directory: str, deadline: float, mounted: Path) -> _Count:
        key = (store.name, directory)
        now = time.monotonic()
        with self._guard:
            known = self._counts.get(key)
            given_up = self._given_up.get(key, now) > now
        if known is not None and known.until > now:
            return known
        lately = known is not None and now - known.until < _OLDEST_SECONDS
        if given_up:
            if known is None or not lately:
                raise _uncountable(store, directory)
            return known
        if lately:
            deadline = min(deadline, now + _PATIENCE_SECONDS + REPLY_MARGIN_SECONDS)
        try:
            return self._jobs.run(
                f"usage of {store.name}/{directory}", lambda job: self._walk(store, directory, job, mounted), deadline
            )
        except OperationPending as pending:
            if known is None or not lately:
                raise
            _log.info("usage is being counted, an older count is told", extra={"pool": store.name, "progress": str(pending)})
            return known

    def _walk(self, store: PoolStore, directory: str, job: JobControl, mounted: Path) -> _Count:
        for turns, seconds in self._lines:
            with turns.take("all pools", store.name, job):
                used, space = _measure(store, directory, job.started + seconds, mounted)
            took = time.monotonic() - job.started
            if used.complete:
                return self._keep((store.name, directory), used, space, job.started)
            if took < seconds / 2:  # it was not cut short
                break
        with self._guard:
            self._given_up[store.name, directory] = time.monotonic() + took * _FRESH_FACTOR
        raise _uncountable(store, directory)

    def _keep(self, key: tuple[str, str], used: Used, space: Space | None, began: float) -> _Count:
        now = time.monotonic()
        count = _Count(used, space, began, now + (now - began) * _FRESH_FACTOR)
        with self._guard:
            for old in [old for old, known in self._counts.items() if known.until + _OLDEST_SECONDS < now]:
                del self._counts[old]
            for old in [old for old, until in self._given_up.items() if until < now]:
                del self._given_up[old]
            self._counts[key] = count
        return count


def _uncountable(store: PoolStore, directory: str) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"{directory} of pool {store.name} could not be counted completely: part of it cannot be read, or it is too large"
    )


def _measure(store: PoolStore, directory: str, deadline: float, mounted: Path) -> tuple[Used, Space | None]:
    if store.backend.remote:
        return store.backend.measure(mounted, deadline - time.monotonic())
    with store.open_volume(directory) as top:
        found = measure_tree(top, deadline=deadline)
    return Used(found.bytes, found.inodes, found.complete), None
