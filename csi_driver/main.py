"""The composition root: configuration in, a running driver out. The only module that knows every class."""

import dataclasses
import logging
import os
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

from csi_driver import __version__
from csi_driver.backends.base import PoolBackend
from csi_driver.backends.hostpath import HostPathBackend
from csi_driver.config import (
    ConfigError,
    DriverSettings,
    HostPathPool,
    ServeOptions,
    parse_endpoint,
)
from csi_driver.errors import TatamiError
from csi_driver.rpc.server import CsiServer
from csi_driver.telemetry import logs
from csi_driver.telemetry.http_endpoint import serve_metrics
from csi_driver.telemetry.metrics import Metrics, PoolUsage, PrometheusMetrics
from csi_driver.volumes.assembly import Domain, Installation, assemble
from csi_driver.volumes.handles import node_tag
from csi_driver.volumes.nodes import topology_value
from csi_driver.volumes.pools import TRASH, PoolStore
from csi_driver.volumes.sweeper import SweepReport

STOP_SECONDS = 20.0
"""How long a stop waits for calls and jobs that run; Kubernetes kills after 30 (terminationGracePeriodSeconds)."""

_log = logging.getLogger(__name__)


def serve(options: ServeOptions, settings: DriverSettings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code: 0 after a clean stop, 1 where the driver could not start.

    Raises ConfigError for settings that this build cannot serve.
    """
    logs.configure(options.log_format, options.log_level)
    stop = threading.Event()  # set by a signal; main waits for nothing else
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _setter(stop))
    domain = assemble(_installation(options, settings))
    metrics = _metrics(options, settings, domain)
    node_local = any(store.backend.node_local for store in domain.pools)
    try:
        domain.prepare()
        with ExitStack() as running:
            server = CsiServer(
                domain.services,
                driver_name=settings.name,
                topology=node_local,
                socket_path=parse_endpoint(options.endpoint),
                metrics=metrics,
            )
            domain.sweeper.sweep_leftovers()
            # First, while there are no other threads: making the socket takes the process' umask for a moment.
            server.start()
            domain.sweeper.start(_observer(metrics))
            if options.metrics_address is not None:
                ready = domain.services.health.ready
                running.callback(serve_metrics(options.metrics_address, metrics, ready).stop)
            _log.info(
                "driver started",
                extra={
                    "driver": settings.name,
                    "version": __version__,
                    "role": options.role,
                    "node": options.node_id,
                    "pools": domain.pools.names(),
                },
            )
            stop.wait()
            _log.info("stopping")
            ended = server.stop(STOP_SECONDS)
            domain.stop(5.0)
            _log.info("stopped", extra={"all_calls_ended": ended})
    except (TatamiError, OSError) as error:
        _log.error("the driver cannot start", extra={"error": str(error)})
        return 1
    return 0


def _setter(stop: threading.Event) -> Callable[[int, FrameType | None], None]:
    return lambda _number, _frame: stop.set()


def _installation(options: ServeOptions, settings: DriverSettings) -> Installation:
    topology = {f"topology.{settings.name}/node": topology_value(options.node_id, node_tag(options.node_id))}
    pools = [pool for pool in settings.pools.values() if isinstance(pool, HostPathPool)]
    if len(pools) != len(settings.pools):
        raise ConfigError('[driver] backend = "nfs": NFS pools are not served by this version; allowed is "hostpath"')
    if len({pool.shared for pool in pools}) > 1:
        raise ConfigError(
            "[pools]: some pools are `shared = true` and some are not: shared pools are served by one controller, the others by each "
            "node, so they need two installations"
        )
    backends: dict[str, PoolBackend] = {pool.name: HostPathBackend(pool, topology) for pool in pools}
    return Installation(
        driver=settings.name,
        backends=backends,
        default_pool=settings.default_pool,
        node_id=options.node_id,
        topology=None if pools[0].shared else topology,
        state_directory=options.kubelet_dir / "plugins" / settings.name,
        kubelet_dir=options.kubelet_dir,
        max_volumes_per_node=settings.max_volumes_per_node or 0,
        controller=options.role in ("controller", "all"),
        node=options.role in ("node", "all"),
    )


def _metrics(options: ServeOptions, settings: DriverSettings, domain: Domain) -> Metrics:
    if options.metrics_address is None:
        return Metrics()
    metrics = PrometheusMetrics(settings.name, {"backend": settings.backend, "role": options.role})
    for store in domain.pools:
        metrics.watch_pool(store.name, _usage_of(store))
    return metrics


def _usage_of(store: PoolStore) -> Callable[[], PoolUsage]:
    def read() -> PoolUsage:
        space = store.space()
        with store.open(TRASH) as trash:
            waiting = len(os.listdir(trash))
        return PoolUsage(
            size_bytes=space.total_bytes,
            free_bytes=space.available_bytes,
            used_bytes=space.used_bytes,
            volumes=len(store.volumes.ids()),
            snapshots=len(store.snapshots.ids()),
            trash=waiting,
        )

    return read


def _observer(metrics: Metrics) -> Callable[[float, SweepReport], None]:
    def observe(seconds: float, report: SweepReport) -> None:
        counts = dataclasses.asdict(report)
        failed = counts.pop("failed")
        metrics.sweep_finished(seconds, counts, failed)

    return observe
