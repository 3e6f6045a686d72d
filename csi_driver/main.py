"""The composition root: configuration in, a running driver out. With installation.py, the only module that knows every class."""

import dataclasses
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType

from csi_driver import __version__
from csi_driver.backends.base import in_background
from csi_driver.config import DriverSettings, NfsPool, ServeOptions, parse_endpoint
from csi_driver.errors import TatamiError, Unavailable
from csi_driver.installation import installation
from csi_driver.rpc.registration import KubeletRegistration
from csi_driver.rpc.server import CsiServer
from csi_driver.telemetry import logs
from csi_driver.telemetry.http_endpoint import ALIVE_SECONDS, serve_metrics
from csi_driver.telemetry.metrics import JobUsage, Metrics, PoolUsage, PrometheusMetrics
from csi_driver.volumes.assembly import Domain, assemble
from csi_driver.volumes.leftovers import SweepReport
from csi_driver.volumes.pool_layout import TRASH
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.promises import Promises
from csi_driver.volumes.sweeper import Observe

STOP_SECONDS = 20.0
"""How long a stop waits for calls and jobs that run; Kubernetes kills after 30 (terminationGracePeriodSeconds)."""

_log = logging.getLogger(__name__)


def serve(options: ServeOptions, settings: DriverSettings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code: 0 after a clean stop, 1 where the driver could not start.

    Raises ConfigError for settings that this build cannot serve.
    """
    logs.configure(options.log_format, options.log_level)
    domain = assemble(installation(options, settings))
    metrics = _metrics(options, settings, domain)
    topology = any(isinstance(pool, NfsPool) or not pool.shared for pool in settings.pools.values())
    registration = _registration(options, settings)
    try:
        with ExitStack() as running:
            stopping = running.enter_context(_stop_signals())
            domain.prepare()
            server = CsiServer(
                domain.services,
                driver_name=settings.name,
                topology=topology,
                socket_path=parse_endpoint(options.endpoint),
                metrics=metrics,
                pools=[store.name for store in domain.pools],
            )
            # First, while there are no other threads: making the socket takes the process' umask for a moment.
            server.start()
            domain.sweeper.start(_observer(metrics, domain.sweeper.names))
            if options.metrics_address is not None:
                ready, alive = _ready(domain, registration), _alive(server)
                running.callback(serve_metrics(options.metrics_address, metrics, ready, alive).stop)
            with registration or nullcontext():
                _log.info(
                    "driver started",
                    extra={
                        "driver": settings.name,
                        "version": __version__,
                        "role": options.role,
                        "node": options.node_id,
                        "pools": ", ".join(settings.pools),
                    },
                )
                os.read(stopping, 1)
            _log.info("stopping")
            ended = server.stop(STOP_SECONDS)
            domain.stop(5.0)
            _log.info("stopped", extra={"all_calls_ended": ended})
            if not ended:
                # What hangs in the kernel would hang the interpreter's tidying up, too: whatever is left, the next start completes.
                logging.shutdown()
                os._exit(0)
    except (TatamiError, OSError) as error:
        _log.error("the driver cannot start", extra={"error": str(error)})
        return 1
    return 0


def _registration(options: ServeOptions, settings: DriverSettings) -> KubeletRegistration | None:
    if options.kubelet_registration_path is None:
        return None
    endpoint = parse_endpoint(str(options.kubelet_registration_path))
    return KubeletRegistration(settings.name, options.kubelet_dir / "plugins_registry", endpoint)


def _ready(domain: Domain, registration: KubeletRegistration | None) -> Callable[[], str | None]:
    def ready() -> str | None:
        return domain.services.health.ready() or (registration.problem() if registration else None)

    return ready


def _alive(server: CsiServer) -> Callable[[], str | None]:
    return lambda: server.silence(ALIVE_SECONDS)


@contextmanager
def inspect(settings: DriverSettings, node_id: str) -> Iterator[Domain]:
    """Give the objects of a process that looks into the pools beside those that serve them: nothing is prepared, served or swept.

    A share gets a mount of its own, for a short while: the driver's is the driver's. Raises ConfigError.
    """
    logs.configure("text", "error")
    place = Path(tempfile.mkdtemp(prefix="tatami-")) if settings.backend == "nfs" else Path("/var/lib/kubelet")
    options = ServeOptions(None, "controller", "unix:///csi/csi.sock", node_id, place, None, None, "text", "error").checked()
    domain = assemble(installation(options, _as_seen_here(settings)))
    try:
        yield domain
    finally:
        domain.stop(2.0)
        if settings.backend == "nfs":
            _remove_mount_points(place, [place / "plugins" / settings.name / "pools" / store.name for store in domain.pools])


def _as_seen_here(settings: DriverSettings) -> DriverSettings:
    """Look through the share where this machine does not have its data."""
    pools = {
        name: dataclasses.replace(pool, data=None)
        if isinstance(pool, NfsPool) and pool.data and not pool.data.is_dir()
        else pool
        for name, pool in settings.pools.items()
    }
    return dataclasses.replace(settings, pools=pools)


def _remove_mount_points(top: Path, places: Sequence[Path]) -> None:
    """Remove empty directories alone: where a share could not be unmounted, what is below is the share's."""
    for place in places:
        with suppress(OSError):
            for directory in (place, *place.parents):
                directory.rmdir()
                if directory == top:
                    break


@contextmanager
def _stop_signals() -> Iterator[int]:
    """Give a descriptor that can be read from once SIGTERM or SIGINT has come.

    Of two signals at once the kernel may hand both to another thread. Python's handlers run in the main thread only, and nothing
    would wake it from waiting for an Event or a queue; the wake-up descriptor is written to by whichever thread it is.
    """
    stopping, wake_up = os.pipe()
    os.set_blocking(wake_up, False)
    signal.set_wakeup_fd(wake_up, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ignore)
    try:
        yield stopping
    finally:
        signal.set_wakeup_fd(-1)
        os.close(stopping)
        os.close(wake_up)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the wake-up descriptor has it. SIG_IGN would not write to it."""


def _metrics(options: ServeOptions, settings: DriverSettings, domain: Domain) -> Metrics:
    if options.metrics_address is None:
        return Metrics()
    metrics = PrometheusMetrics(settings.name, {"backend": settings.backend, "role": options.role})
    for store in domain.pools:
        if store.backend.remote and options.role == "node":
            continue  # the controller measures it; a node would have to mount the share for that
        metrics.watch_pool(store.name, _usage_of(store, domain.promises))
    metrics.watch_jobs(_jobs_of(domain))
    return metrics


def _jobs_of(domain: Domain) -> Callable[[], JobUsage]:
    def read() -> JobUsage:
        jobs = [*domain.jobs.running(), *domain.node_jobs.running()]
        waiting = sum(job.ahead > 0 for job in jobs)
        return JobUsage(running=len(jobs) - waiting, waiting=waiting, bytes=domain.jobs.bytes() + domain.node_jobs.bytes())

    return read


def _usage_of(store: PoolStore, promises: Promises) -> Callable[[], PoolUsage]:
    def read() -> PoolUsage:
        in_background.set(True)  # a scrape does not keep a share mounted
        if store.backend.dormant:
            raise Unavailable(f"pool {store.name} is not in use, and its share is not mounted for a scrape")
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
            promised_bytes=promises.room(store, space).promised_bytes,
        )

    return read


def _observer(metrics: Metrics, pools: Sequence[str]) -> Observe:
    for pool in pools:
        metrics.sweeper_opened(pool)

    def observe(pool: str, seconds: float, report: SweepReport) -> None:
        counts = dataclasses.asdict(report)
        failed = counts.pop("failed")
        metrics.sweep_finished(pool, seconds, counts, failed)

    return observe
