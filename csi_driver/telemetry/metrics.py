"""What the driver counts: calls, lanes, pools, the sweeper.

`Metrics` does nothing and is what runs unless an address for metrics is configured; `PrometheusMetrics` counts. Only the latter
imports prometheus_client, because a node pod pays for every import.

`csi_plugin_operations_seconds` has the name, labels, label values and buckets of kubernetes-csi/csi-lib-utils (metrics package), so
that dashboards made for the sidecars show this driver too; finer buckets below them, since most calls here take milliseconds.
"""

import platform
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from csi_driver import __version__
from csi_driver.telemetry.collectors import Jobs, JobUsage, Lanes, Pools, PoolUsage

__all__ = ["JobUsage", "Metrics", "PoolUsage", "PrometheusMetrics", "code_label"]

CONTENT_TYPE_TEXT = "text/plain; version=0.0.4; charset=utf-8"

_UPSTREAM_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 25, 50, 120, 300, 600)
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, *_UPSTREAM_BUCKETS)


class Metrics:
    """Counts nothing. The port that the rest of the driver knows; safe to call from any thread."""

    def lane_opened(self, lane: str, capacity: int) -> None:
        """Announce a lane and how many calls it takes at once."""

    @contextmanager
    def in_lane(self, lane: str) -> Iterator[None]:  # noqa: ARG002  # counts nothing
        """Count a call as in flight until the context ends, also when that is long after its deadline."""
        yield

    def call_rejected(self, lane: str) -> None:
        """Count a call that found its lane full."""

    def call_finished(self, method: str, code: str, seconds: float) -> None:
        """Count a call: its full method (`/csi.v1.Node/NodeStageVolume`), the name of its gRPC code (`NOT_FOUND`), its time.

        Each method becomes a label, so the caller passes methods that are served, never a name that a client made up.
        """

    def watch_pool(self, pool: str, read: Callable[[], PoolUsage]) -> None:
        """Ask `read` at every scrape. What it doesn't answer within 2 seconds, or raises, is reported as not readable."""

    def watch_jobs(self, read: Callable[[], JobUsage]) -> None:
        """Ask `read`, which must not wait for anything, at every scrape. Once."""

    def sweeper_opened(self, pool: str) -> None:
        """Announce that the sweeper comes by at a pool; "" are this node's own records."""

    def sweep_finished(self, pool: str, seconds: float, removed: Mapping[str, int], failed: int) -> None:
        """Count a run of the sweeper: how many of each kind (`staging`, `trash`, ...) it removed, and how many it could not."""

    def render(self, accept: str) -> tuple[bytes, str]:  # noqa: ARG002  # nothing to choose from
        """Return all metrics for a scrape with this Accept header, and their content type."""
        return b"", CONTENT_TYPE_TEXT


class PrometheusMetrics(Metrics):
    """Counts, in a registry of its own. `build` adds labels to `tatami_build_info` (backend, role)."""

    def __init__(self, driver_name: str, build: Mapping[str, str] | None = None) -> None:
        import prometheus_client as prometheus

        # They double the number of series and nothing here reads them.
        prometheus.disable_created_metrics()  # type: ignore[no-untyped-call]
        registry = prometheus.CollectorRegistry()
        self._registry = registry
        self._driver_name = driver_name
        self._operations = prometheus.Histogram(
            "csi_plugin_operations_seconds",
            "Container Storage Interface operation duration with gRPC error code status total",
            ["driver_name", "method_name", "grpc_status_code"],
            buckets=_BUCKETS,
            registry=registry,
        )
        self._rejected = prometheus.Counter(
            "tatami_lane_rejected", "Calls answered UNAVAILABLE because their lane was full.", ["lane"], registry=registry
        )
        self._sweeps = prometheus.Counter("tatami_sweeper_runs", "Finished runs of the sweeper.", ["pool"], registry=registry)
        self._swept = prometheus.Counter(
            "tatami_sweeper_removed", "What the sweeper removed, by kind.", ["pool", "kind"], registry=registry
        )
        self._sweep_failures = prometheus.Counter(
            "tatami_sweeper_failures", "What the sweeper could not remove.", ["pool"], registry=registry
        )
        self._sweep_time = prometheus.Gauge(
            "tatami_sweeper_last_run_seconds", "How long the last run took.", ["pool"], registry=registry
        )
        self._sweep_end = prometheus.Gauge(
            "tatami_sweeper_last_run_timestamp_seconds",
            "When the last run ended; 0 before the first.",
            ["pool"],
            registry=registry,
        )
        prometheus.Gauge(
            "tatami_threads", "Threads of the process, those left with a dead server included.", registry=registry
        ).set_function(threading.active_count)
        prometheus.Info("tatami_build", "What is running.", registry=registry).info(
            {
                **(build or {}),
                "version": __version__,
                "driver_name": driver_name,
                "python_version": platform.python_version(),
            }
        )
        prometheus.ProcessCollector(registry=registry)
        prometheus.GCCollector(registry=registry)
        self._lanes = Lanes()
        self._pools = Pools()
        registry.register(self._lanes)
        registry.register(self._pools)

    def lane_opened(self, lane: str, capacity: int) -> None:
        self._lanes.open(lane, capacity)
        self._rejected.labels(lane)  # there from the start: rate() of a series that begins with 1 shows nothing

    @contextmanager
    def in_lane(self, lane: str) -> Iterator[None]:
        with self._lanes.enter(lane):
            yield

    def call_rejected(self, lane: str) -> None:
        self._rejected.labels(lane).inc()

    def call_finished(self, method: str, code: str, seconds: float) -> None:
        self._operations.labels(self._driver_name, method, code_label(code)).observe(seconds)

    def watch_pool(self, pool: str, read: Callable[[], PoolUsage]) -> None:
        self._pools.watch(pool, read)

    def watch_jobs(self, read: Callable[[], JobUsage]) -> None:
        self._registry.register(Jobs(read))

    def sweeper_opened(self, pool: str) -> None:
        for series in (self._sweeps, self._sweep_failures, self._sweep_time, self._sweep_end):
            series.labels(pool)  # there from the start: who has never been swept is seen, too

    def sweep_finished(self, pool: str, seconds: float, removed: Mapping[str, int], failed: int) -> None:
        for kind, count in removed.items():
            self._swept.labels(pool, kind).inc(count)
        self._sweep_failures.labels(pool).inc(failed)
        self._sweep_time.labels(pool).set(seconds)
        self._sweep_end.labels(pool).set_to_current_time()
        self._sweeps.labels(pool).inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        from prometheus_client.exposition import choose_encoder

        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type


def code_label(name: str) -> str:
    """Return a gRPC code's name as Go writes it (`NotFound`), which is what dashboards select; `name` is as Python has it."""
    # Go spells this one with one l, and OK with two capitals (google.golang.org/grpc/codes).
    return {"OK": "OK", "CANCELLED": "Canceled"}.get(name) or "".join(word.capitalize() for word in name.split("_"))
