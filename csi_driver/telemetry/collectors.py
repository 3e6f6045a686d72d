"""What is read at the moment of a scrape rather than counted along the way: the lanes' calls and the pools' room.

Both are collectors of prometheus_client (objects with `collect`), which is imported only when they are asked.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from csi_driver.telemetry.bounded import BoundedRead

if TYPE_CHECKING:
    from prometheus_client import Metric

log = logging.getLogger(__name__)

POOL_READ_SECONDS = 2.0
"""How long a scrape waits for the pools; Prometheus gives up after 10 s by default."""


@dataclass(frozen=True)
class PoolUsage:
    """What a pool holds, in bytes and pieces. None: not known, and then not reported."""

    size_bytes: int | None = None
    free_bytes: int | None = None
    used_bytes: int | None = None
    volumes: int | None = None
    snapshots: int | None = None
    trash: int | None = None
    promised_bytes: int | None = None


@dataclass(frozen=True)
class JobUsage:
    """The work that outlasts its calls: jobs that run, jobs that wait for their turn, bytes copied or read since the start."""

    running: int
    waiting: int
    bytes: int


class Jobs:
    """Asks at every scrape; `read` only looks at memory."""

    def __init__(self, read: Callable[[], JobUsage]) -> None:
        self._read = read

    def collect(self) -> Iterable["Metric"]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        usage = self._read()
        return [
            GaugeMetricFamily("tatami_jobs_running", "Copies, restores and counts at work.", usage.running),
            GaugeMetricFamily("tatami_jobs_waiting", "Copies and restores that wait for their turn.", usage.waiting),
            CounterMetricFamily("tatami_jobs_bytes", "Bytes that jobs copied or read.", usage.bytes),
        ]


_POOL_HELP = {
    "size_bytes": "Size of the pool's filesystem.",
    "free_bytes": "Bytes that can still be written to the pool.",
    "used_bytes": "Bytes in use on the pool's filesystem.",
    "volumes": "Volumes in the pool.",
    "snapshots": "Snapshots in the pool.",
    "trash": "Deleted volumes and snapshots whose content is not removed yet.",
    "promised_bytes": "Bytes that the pool has promised to volumes.",
}


class Lanes:
    """The calls in flight, by lane, with the time each began: a call that hangs is seen as an age that grows."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._capacity: dict[str, int] = {}
        self._began: dict[str, dict[object, float]] = {}

    def open(self, lane: str, capacity: int) -> None:
        with self._lock:
            self._capacity[lane] = capacity
            self._began.setdefault(lane, {})

    @contextmanager
    def enter(self, lane: str) -> Iterator[None]:
        call = object()
        with self._lock:
            self._began.setdefault(lane, {})[call] = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                del self._began[lane][call]

    def collect(self) -> Iterable["Metric"]:
        from prometheus_client.core import GaugeMetricFamily

        capacity = GaugeMetricFamily("tatami_lane_capacity", "Calls that the lane takes at once.", labels=["lane"])
        in_flight = GaugeMetricFamily("tatami_lane_calls_in_flight", "Calls in the lane now.", labels=["lane"])
        oldest = GaugeMetricFamily(
            "tatami_lane_oldest_call_age_seconds", "Age of the lane's oldest call; 0 when there is none.", labels=["lane"]
        )
        with self._lock:
            now = time.monotonic()
            for lane, calls in self._capacity.items():
                capacity.add_metric([lane], calls)
            for lane, began in self._began.items():
                in_flight.add_metric([lane], len(began))
                oldest.add_metric([lane], now - min(began.values(), default=now))
        return [capacity, in_flight, oldest]


class Pools:
    """Asks every pool at every scrape, all at once."""

    def __init__(self) -> None:
        self._reads: dict[str, BoundedRead[PoolUsage]] = {}
        self._silent: set[str] = set()

    def watch(self, pool: str, read: Callable[[], PoolUsage]) -> None:
        # A new dictionary: a scrape may be walking over the old one.
        self._reads = self._reads | {pool: BoundedRead(f"usage of pool {pool}", read, POOL_READ_SECONDS)}

    def collect(self) -> Iterable["Metric"]:
        from prometheus_client.core import GaugeMetricFamily

        readable = GaugeMetricFamily("tatami_pool_readable", "Whether the pool answered this scrape.", labels=["pool"])
        usage = {
            field.name: GaugeMetricFamily(f"tatami_pool_{field.name}", _POOL_HELP[field.name], labels=["pool"])
            for field in fields(PoolUsage)
        }
        pending = {pool: read.begin() for pool, read in self._reads.items()}
        for pool, question in pending.items():
            try:
                answer = question.result()
            except Exception as error:  # noqa: BLE001  # whatever it is, there is no number to report
                readable.add_metric([pool], 0)
                self._note_silence(pool, error)
                continue
            readable.add_metric([pool], 1)
            self._silent.discard(pool)
            for name, family in usage.items():
                value = getattr(answer, name)
                if value is not None:
                    family.add_metric([pool], value)
        return [readable, *usage.values()]

    def _note_silence(self, pool: str, error: Exception) -> None:
        if pool not in self._silent:  # once, not at every scrape
            self._silent.add(pool)
            log.warning("the pool's usage cannot be read", extra={"pool": pool, "error": str(error) or type(error).__name__})
