"""Assembly: the domain's objects, put together for one process.

Whoever serves them (main.py) and whoever tries them out builds them here, so that what is tested is what runs.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from csi_driver.backends.base import PoolBackend
from csi_driver.errors import TatamiError
from csi_driver.linux.holders import boot_id
from csi_driver.volumes.answers import NodeInfo
from csi_driver.volumes.attachments import Attachments
from csi_driver.volumes.capacity import PoolCapacity
from csi_driver.volumes.captures import Captures
from csi_driver.volumes.contents import Contents
from csi_driver.volumes.creation import VolumeCreation
from csi_driver.volumes.groups import Groups
from csi_driver.volumes.health import Health
from csi_driver.volumes.image_devices import ImageDevices
from csi_driver.volumes.image_staging import ImageStaging
from csi_driver.volumes.inline import InlineVolumes
from csi_driver.volumes.jobs import Jobs
from csi_driver.volumes.lapses import Lapses
from csi_driver.volumes.limits import Limits
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import Topology
from csi_driver.volumes.mount_groups import MountGroups
from csi_driver.volumes.node import Node
from csi_driver.volumes.node_state import NodeState
from csi_driver.volumes.node_volumes import NodeVolumes
from csi_driver.volumes.nodes import Nodes
from csi_driver.volumes.orphans import Orphans
from csi_driver.volumes.placement import Placements
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.promises import Promises
from csi_driver.volumes.provisioner import Provisioner
from csi_driver.volumes.publisher import Publisher
from csi_driver.volumes.removal import SnapshotRemoval, VolumeRemoval
from csi_driver.volumes.services import Services
from csi_driver.volumes.sizes import Expansion
from csi_driver.volumes.snapshot_places import SnapshotPlaces
from csi_driver.volumes.snapshots import Snapshots
from csi_driver.volumes.sources import Sources
from csi_driver.volumes.stager import Stager
from csi_driver.volumes.sweeper import Sweeper
from csi_driver.volumes.turns import Turns
from csi_driver.volumes.usage import UsageCounter
from csi_driver.volumes.verification import Verifier
from csi_driver.volumes.volume_places import VolumePlaces

_PREPARE_SECONDS = 10.0
"""How long a start waits for pools behind servers; what takes longer goes on by itself."""
_CLOSE_SECONDS = 7.0
"""How long a stop waits for shares to be unmounted; what is left, the next start replaces."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Installation:
    """What is assembled of: how the driver is called, its pools' backends, and this node."""

    driver: str
    backends: Mapping[str, PoolBackend]
    default_pool: str | None
    node_id: str
    topology: Topology | None
    state_directory: Path
    kubelet_dir: Path
    max_volumes_per_node: int = 0
    controller: bool = True
    node: bool = True
    expansion: bool = False
    """Says that the nodes expand their volumes themselves. Then nothing else is served, and nothing kept."""


@dataclass(frozen=True)
class Domain:
    """The objects of one process, and what has to be started and stopped."""

    services: Services
    pools: Pools
    jobs: Jobs
    node_jobs: Jobs
    sweeper: Sweeper
    state: NodeState
    verifier: Verifier
    promises: Promises

    def prepare(self) -> None:
        """Make the pools ready to be served.

        Raises Unavailable where one cannot be reached or is not the one that this node knows, FailedPrecondition for a newer format.
        A pool behind a server is another matter: whatever is wrong with it, the others are served, and it is tried again when it is
        asked for. A node alone leaves it be: it mounts volumes, not pools.
        """
        if self.services.expansion:
            return
        self.state.prepare()
        known = self.state.identities()
        found = {store.name: store.prepare(known.get(store.name)) for store in self.pools if not store.backend.remote}
        if self.services.volumes is not None:
            found |= _prepare_remote([store for store in self.pools if store.backend.remote], known)
        self.state.remember({**known, **found})

    def stop(self, timeout: float) -> None:
        """Stop jobs and the sweeper, waiting at most about `timeout` seconds, and let the pools go; what they leave, the next start completes."""
        until = time.monotonic() + timeout
        self.node_jobs.stop(0.0)  # told first, so that nobody waits for the others' end
        self.sweeper.stop(0.0)
        self.jobs.stop(timeout)
        self.node_jobs.stop(max(0.0, until - time.monotonic()))
        self.sweeper.stop(max(0.0, until - time.monotonic()))
        _at_once("let go of", list(self.pools), lambda store: store.backend.close(), _CLOSE_SECONDS)


def _prepare_remote(stores: Sequence[PoolStore], known: Mapping[str, str]) -> dict[str, str]:
    """Prepare pools all at once, and return the identities of those that were ready soon."""
    found: dict[str, str] = {}

    def prepare(store: PoolStore) -> None:
        try:
            found[store.name] = store.prepare(known.get(store.name))
        except (TatamiError, OSError) as error:
            _log.error("a pool cannot be served yet", extra={"pool": store.name, "error": str(error)})

    _at_once("prepare", stores, prepare, _PREPARE_SECONDS)
    return dict(found)


def _at_once(what: str, stores: Sequence[PoolStore], do: Callable[[PoolStore], None], seconds: float) -> None:
    """Do something with pools, each in a thread of its own, and wait at most so long: a server that is away may let one wait."""
    threads = [threading.Thread(target=do, args=(store,), name=f"{what} {store.name}", daemon=True) for store in stores]
    until = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def assemble(installation: Installation) -> Domain:
    """Put the domain together. Nothing is touched before `Domain.prepare`."""
    stores = {
        name: PoolStore(backend, installation.driver, installation.node_id) for name, backend in installation.backends.items()
    }
    pools = Pools(stores, installation.default_pool)
    locks, jobs, limits, turns = KeyedLocks(), Jobs(), Limits(), Turns()
    node_jobs = Jobs()  # their own: however many copies wait, what a pod waits for on this node is not refused
    promises, lapses = Promises(locks), Lapses(limits)
    contents, sources = Contents(Captures(turns)), Sources(pools, locks, limits)
    volume_places, snapshot_places = VolumePlaces(locks), SnapshotPlaces(locks)
    volume_removal, snapshot_removal = VolumeRemoval(locks, volume_places, limits), SnapshotRemoval(locks, snapshot_places)
    verifier = Verifier(locks, contents, sources, turns)
    creation = VolumeCreation(pools, locks, jobs, contents, volume_places, sources, volume_removal, verifier, promises, limits)
    expansion = Expansion(pools, locks, promises, contents, limits)
    provisioner = Provisioner(pools, locks, jobs, creation, volume_removal, expansion)
    snapshots = Snapshots(pools, locks, jobs, contents, snapshot_places, sources, snapshot_removal, verifier)
    groups = Groups(pools, locks, jobs, snapshots, sources, snapshot_removal)
    health = Health(pools, promises, lapses)
    state = NodeState(installation.state_directory, installation.driver)
    placements = Placements(pools, installation.node_id)
    image_devices = ImageDevices(state)
    images = ImageStaging(pools, state, image_devices, node_jobs, installation.node_id, boot_id())
    node_volumes = NodeVolumes(pools, locks, state, MountGroups(node_jobs), images, image_devices, installation.kubelet_dir)
    stager = Stager(pools, locks, node_volumes, placements)
    publisher = Publisher(pools, node_volumes, placements, InlineVolumes(pools, provisioner))
    info = NodeInfo(installation.node_id, installation.max_volumes_per_node, installation.topology)
    nodes = Nodes(
        installation.node_id,
        only_own=any(backend.node_local for backend in installation.backends.values()),
        with_address=any(backend.remote for backend in installation.backends.values()),
    )
    controller = installation.controller
    services = Services(
        health=health,
        volumes=provisioner if controller else None,
        attachments=Attachments(pools, locks, nodes, installation.max_volumes_per_node) if controller else None,
        snapshots=snapshots if controller else None,
        groups=groups if controller else None,
        capacity=PoolCapacity(pools, promises, limits) if controller else None,
        node=Node(info, pools, node_volumes, stager, publisher, UsageCounter(node_jobs), health, provisioner, limits)
        if installation.node
        else None,
        expansion=installation.expansion,
    )
    # A node alone does not sweep what lies behind a server: there the controller does.
    swept = {name: store for name, store in stores.items() if controller or not store.backend.remote}
    orphans = Orphans(node_volumes, installation.kubelet_dir, publisher.remove_inline_leftovers) if installation.node else None
    sweeper = Sweeper(Pools(swept, None), locks, volume_removal, snapshot_removal, groups, lapses, orphans)
    return Domain(services, pools, jobs, node_jobs, sweeper, state, verifier, promises)
