"""The whole cluster from nothing: programs, images, bridge, control plane, nodes, and the driver from its chart."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster import binaries, control_plane, driver, images, teardown
from cluster.driver_image import driver_image
from cluster.guest_disk import guest_disk
from cluster.guests import GuestNode, nfs_nodes
from cluster.kubectl import Kubectl
from cluster.layout import KUBECONFIG, LOGS, NFS_NODES, NODES, STATE
from cluster.nodes import PAUSE, Node, all_nodes
from cluster.progress import say, step, wait_until
from cluster.share import EXPORTED, Share, share


def up(*, with_driver: bool = True) -> Kubectl:
    """Bring it up and return a client. Raises RuntimeError where there is one already, whole or in part."""
    if left := teardown.leftovers():
        raise RuntimeError(f"there is a cluster, or what is left of one ({left[0]}): make cluster-down first")
    binaries.build()
    archives = [images.pause(PAUSE), images.busybox()]
    STATE.mkdir(parents=True)
    LOGS.mkdir()
    for command in control_plane.bridge_commands():
        subprocess.run(command, check=True)
    with step("control plane"):
        client = control_plane.start((*NODES, *NFS_NODES))
    with step("nodes"), ThreadPoolExecutor() as pool:
        nodes = all_nodes()
        list(pool.map(lambda node: _start(node, client, archives), nodes))
    if with_driver:
        driver.install(nodes)
    return client


def up_nfs() -> Share:
    """Bring the nodes with NFS, a server and the driver for it into the cluster that is up, and return the server's share.

    Their taint, and the driver's absence on them, keep everything else away from these nodes: see `guests`.
    """
    client, served = Kubectl(), share()
    name, archive = driver_image()
    wanted = driver.nfs_values(name.rpartition(":")[2], served.address, EXPORTED)
    disk = guest_disk([images.pause(PAUSE), images.busybox(), archive, *driver.sidecars(wanted)])
    with step("nodes with NFS"), ThreadPoolExecutor() as pool:
        list(pool.map(lambda node: _start_guest(node, disk, client), nfs_nodes()))
    with step("NFS server"):
        served.start()
    driver.upgrade(wanted, namespace=driver.NFS_NAMESPACE)
    return served


def down_nfs() -> None:
    """Take away what `up_nfs` brought. Volumes have to be gone before, as their driver goes."""
    driver.uninstall(namespace=driver.NFS_NAMESPACE)
    Kubectl().delete("node", *(node.name for node in nfs_nodes()))
    for node in nfs_nodes():
        node.remove()


def nfs_is_up() -> bool:
    """Say whether the nodes with NFS can be used."""
    try:
        client = Kubectl()
        return all(node.ready(client) for node in nfs_nodes()) and client.exists("csidriver", driver.NFS)
    except (RuntimeError, subprocess.SubprocessError):
        return False


def is_up() -> bool:
    """Say whether there is a cluster whose nodes can be used."""
    if not KUBECONFIG.exists():
        return False
    try:
        client = Kubectl()
        return all(node.ready(client) for node in all_nodes())
    except (RuntimeError, subprocess.SubprocessError):
        return False


def _start(node: Node, client: Kubectl, archives: list[Path]) -> None:
    node.boot()
    node.start_runtime()
    for archive in archives:
        node.import_image(archive)
    _join(node, client)


def _start_guest(node: GuestNode, disk: Path, client: Kubectl) -> None:
    node.join(disk)
    node.start_runtime()
    _join(node, client)


def _join(node: Node, client: Kubectl) -> None:
    node.start_kubelet()
    node.start_proxy()
    wait_until(f"{node.name} to be ready", lambda: node.ready(client), 90)
    say(f"{node.name} is ready")
