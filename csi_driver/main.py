"""The composition root: configuration in, a running driver out. The only module that knows every class."""

import dataclasses
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType

from csi_driver import __version__
from csi_driver.backends.base import PoolBackend, in_background
from csi_driver.backends.hostpath import HostPathBackend
from csi_driver.backends.nfs import NfsBackend
from csi_driver.config import (
    ConfigError,
    DriverSettings,
    HostPathPool,
    NfsPool,
    ServeOptions,
    parse_endpoint,
)
from csi_driver.config.values import shown
from csi_driver.errors import InvalidArgument, TatamiError, Unavailable
from csi_driver.rpc.registration import KubeletRegistration
from csi_driver.rpc.server import CsiServer
from csi_driver.telemetry import logs
from csi_driver.telemetry.http_endpoint import ALIVE_SECONDS, serve_metrics
from csi_driver.telemetry.metrics import JobUsage, Metrics, PoolUsage, PrometheusMetrics
from csi_driver.volumes.assembly import Domain, Installation, assemble
from csi_driver.volumes.handles import node_tag
from csi_driver.volumes.model import Topology
from csi_driver.volumes.nodes import address_towards, topology_value
from csi_driver.volumes.pool_layout import TRASH
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.promises import Promises
from csi_driver.volumes.sweeper import Observe, SweepReport

STOP_SECONDS = 20.0
"""How long a stop waits for calls and jobs that run; Kubernetes kills after 30 (terminationGracePeriodSeconds)."""

_log = logging.getLogger(__name__)


def serve(options: ServeOptions, settings: DriverSettings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit code: 0 after a clean stop, 1 where the driver could not start.

    Raises ConfigError for settings that this build cannot serve.
    """
    logs.configure(options.log_format, options.log_level)
    domain = assemble(_installation(options, settings))
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
    domain = assemble(_installation(options, _as_seen_here(settings)))
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


def _installation(options: ServeOptions, settings: DriverSettings) -> Installation:
    state_directory = options.kubelet_dir / "plugins" / settings.name
    if settings.backend == "nfs":
        if options.role == "expansion":
            raise ConfigError("--role expansion is for pools of nodes: those of NFS servers are expanded by their controller")
        pools = [pool for pool in settings.pools.values() if isinstance(pool, NfsPool)]
        if options.role == "node":  # the data is the controller's, and this machine hardly the server's
            pools = [dataclasses.replace(pool, data=None) for pool in pools]
        backends = _nfs_backends(pools, state_directory)
        # Says which nodes run this driver. Volumes are bound to none of them: whoever has a way to the server can mount them.
        client = {f"topology.{settings.name}/client": "nfs"}
        return _installed(options, settings, backends, _node_with_address(options, pools), client, state_directory)
    node_id = options.node_id.partition("@")[0]
    topology = {f"topology.{settings.name}/node": topology_value(node_id, node_tag(node_id))}
    places = [pool for pool in settings.pools.values() if isinstance(pool, HostPathPool)]
    if len({pool.shared for pool in places}) > 1:
        raise ConfigError(
            "[pools]: some pools are `shared = true` and some are not: shared pools are served by one controller, the others by each "
            "node, so they need two installations"
        )
    _refuse_kubelets_places(places, options.kubelet_dir)
    if options.role == "expansion":
        if places[0].shared:
            raise ConfigError("--role expansion is for pools of nodes: shared ones are expanded by their controller")
        return dataclasses.replace(_installed(options, settings, {}, node_id, None, state_directory), expansion=True)
    directories = {pool.name: HostPathBackend(pool, topology) for pool in places}
    return _installed(options, settings, directories, node_id, None if places[0].shared else topology, state_directory)


def _refuse_kubelets_places(places: Sequence[HostPathPool], kubelet_dir: Path) -> None:
    for pool in places:
        if pool.path.is_relative_to(kubelet_dir) or kubelet_dir.is_relative_to(pool.path):
            raise ConfigError(
                f"[pools.{pool.name}] path = {shown(str(pool.path))}: must be neither the kubelet's directory {kubelet_dir} (--kubelet-dir) nor "
                "above or below it: volumes would lie among what the kubelet makes and clears away"
            )


def _nfs_backends(pools: Sequence[NfsPool], state_directory: Path) -> dict[str, PoolBackend]:
    try:
        return {pool.name: NfsBackend(pool, state_directory / "pools" / pool.name) for pool in pools}
    except InvalidArgument as error:
        raise ConfigError(str(error)) from error


def _node_with_address(options: ServeOptions, pools: Sequence[NfsPool]) -> str:
    """Return `name@address`: the address lets an exporter know whom to let in without asking Kubernetes."""
    if "@" in options.node_id or options.role == "controller":
        return options.node_id
    return f"{options.node_id}@{address_towards(pool.server for pool in pools)}"


def _installed(
    options: ServeOptions,
    settings: DriverSettings,
    backends: Mapping[str, PoolBackend],
    node_id: str,
    topology: Topology | None,
    state_directory: Path,
) -> Installation:
    return Installation(
        driver=settings.name,
        backends=backends,
        default_pool=settings.default_pool,
        node_id=node_id,
        topology=topology,
        state_directory=state_directory,
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
