"""The whole cluster from nothing: programs, images, bridge, control plane, nodes, and the driver from its chart."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cluster import binaries, control_plane, driver, images, teardown
from cluster.kubectl import Kubectl
from cluster.layout import KUBECONFIG, LOGS, NODES, STATE
from cluster.nodes import PAUSE, Node, all_nodes
from cluster.progress import say, step, wait_until


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
        client = control_plane.start(NODES)
    with step("nodes"), ThreadPoolExecutor() as pool:
        nodes = all_nodes()
        list(pool.map(lambda node: _start(node, client, archives), nodes))
    if with_driver:
        driver.install(nodes)
    return client


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
    node.start_kubelet()
    node.start_proxy()
    wait_until(f"{node.name} to be ready", lambda: node.ready(client), 90)
    say(f"{node.name} is ready")
