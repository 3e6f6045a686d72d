"""From what an admin has written, options and pools file, to what this process is made of: backends, this node's name, its topology."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from csi_driver.backends.base import PoolBackend
from csi_driver.backends.hostpath import HostPathBackend
from csi_driver.backends.nfs import NfsBackend
from csi_driver.config import ConfigError, DriverSettings, HostPathPool, NfsPool, ServeOptions
from csi_driver.config.values import shown
from csi_driver.errors import InvalidArgument
from csi_driver.volumes.assembly import Installation
from csi_driver.volumes.handles import node_tag
from csi_driver.volumes.model import Topology
from csi_driver.volumes.nodes import address_towards, topology_value


def installation(options: ServeOptions, settings: DriverSettings) -> Installation:
    """Return what this process is to put together. Raises ConfigError where options and settings do not go together."""
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
