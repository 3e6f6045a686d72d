"""Assembly: the domain's objects, put together for one process.

Whoever serves them (main.py) and whoever tries them out builds them here, so that what is tested is what runs.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from csi_driver.backends.base import PoolBackend
from csi_driver.volumes.attachments import Attachments
from csi_driver.volumes.capacity import PoolCapacity
from csi_driver.volumes.contents import Contents
from csi_driver.volumes.groups import Groups
from csi_driver.volumes.health import Health
from csi_driver.volumes.inline import InlineVolumes
from csi_driver.volumes.jobs import Jobs
from csi_driver.volumes.locks import KeyedLocks
from csi_driver.volumes.model import NodeInfo, Topology
from csi_driver.volumes.node import Node
from csi_driver.volumes.node_state import NodeState
from csi_driver.volumes.nodes import Nodes
from csi_driver.volumes.placement import Placements
from csi_driver.volumes.pools import Pools, PoolStore
from csi_driver.volumes.provisioner import Provisioner
from csi_driver.volumes.publisher import Publisher
from csi_driver.volumes.removal import SnapshotRemoval, VolumeRemoval
from csi_driver.volumes.services import Services
from csi_driver.volumes.snapshots import Snapshots
from csi_driver.volumes.sources import Sources
from csi_driver.volumes.sweeper import Sweeper
from csi_driver.volumes.usage import UsageCounter


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


@dataclass(frozen=True)
class Domain:
    """The objects of one process, and what has to be started and stopped."""

    services: Services
    pools: Pools
    jobs: Jobs
    sweeper: Sweeper
    state: NodeState

    def prepare(self) -> None:
        """Make the pools ready to be served.

        Raises Unavailable where one cannot be reached or is not the one that this node knows, FailedPrecondition for a newer format.
        """
        self.state.prepare()
        known = self.state.identities()
        self.state.remember({**known, **{store.name: store.prepare(known.get(store.name)) for store in self.pools}})

    def stop(self, timeout: float) -> None:
        """Stop jobs and the sweeper, waiting at most about `timeout` seconds; what they leave, the next start completes."""
        self.jobs.stop(timeout)
        self.sweeper.stop(timeout)


def assemble(installation: Installation) -> Domain:
    """Put the domain together. Nothing is touched before `Domain.prepare`."""
    trash_filled = threading.Event()
    stores = {
        name: PoolStore(backend, installation.driver, installation.node_id, trash_filled)
        for name, backend in installation.backends.items()
    }
    pools = Pools(stores, installation.default_pool)
    locks, jobs = KeyedLocks(), Jobs()
    contents, sources = Contents(locks), Sources(pools, locks)
    volume_removal, snapshot_removal = VolumeRemoval(locks, contents), SnapshotRemoval(locks)
    provisioner = Provisioner(pools, locks, jobs, contents, sources, volume_removal)
    snapshots = Snapshots(pools, locks, jobs, contents, sources, snapshot_removal)
    groups = Groups(pools, locks, jobs, snapshots, sources, snapshot_removal)
    health = Health(pools)
    state = NodeState(installation.state_directory, installation.driver)
    placements = Placements(pools, installation.node_id)
    publisher = Publisher(pools, locks, state, placements, InlineVolumes(pools, provisioner), installation.kubelet_dir)
    info = NodeInfo(installation.node_id, installation.max_volumes_per_node, installation.topology)
    nodes = Nodes(installation.node_id, only_own=any(backend.node_local for backend in installation.backends.values()))
    controller = installation.controller
    services = Services(
        health=health,
        volumes=provisioner if controller else None,
        attachments=Attachments(pools, locks, nodes, installation.max_volumes_per_node) if controller else None,
        snapshots=snapshots if controller else None,
        groups=groups if controller else None,
        capacity=PoolCapacity(pools) if controller else None,
        node=Node(info, pools, state, publisher, UsageCounter(jobs), health) if installation.node else None,
    )
    sweeper = Sweeper(pools, locks, volume_removal, snapshot_removal, groups, trash_filled)
    return Domain(services, pools, jobs, sweeper, state)
