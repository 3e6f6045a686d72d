"""The driver in the cluster: images onto the nodes, the chart by helm, and its pods when something went wrong."""

import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster import images
from cluster.driver_image import driver_image
from cluster.guests import LABEL, TAINT, VALUE
from cluster.kubectl import Kubectl
from cluster.layout import CHECKOUT, KUBECONFIG
from cluster.nodes import Node
from cluster.progress import PATIENCE, step

CHART = CHECKOUT / "deploy" / "chart" / "tatami"
RELEASE = "tatami"
NAMESPACE = "tatami-system"
NFS_NAMESPACE = "tatami-nfs"
"""Two releases of the chart, one for each kind of volumes: a story that upgrades one does not touch the other."""
REGISTRY = "localhost"
HOSTPATH = "hostpath.csi.tatami.dev"
NFS = "nfs.csi.tatami.dev"
POOL = Path("/var/lib/tatami/default")
"""Where the nodes' pool lies on each of them."""
CAPACITY_SECONDS = 10
"""How often the provisioners look at the pools' room. external-provisioner's default is a minute, for which stories would wait."""
MAX_VOLUMES = 30
"""Per node: more than the stories need, and few enough for a test that makes them all."""


def values(tag: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the chart's values for the cluster: its images, and a pool that inline volumes may use."""
    pools = {"default": {"path": str(POOL), "inline": True}}
    elsewhere = {"matchExpressions": [{"key": LABEL, "operator": "NotIn", "values": [VALUE]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [elsewhere]}}}
    return (
        _common(tag)
        | {"hostpath": {"pools": pools, "maxVolumesPerNode": MAX_VOLUMES, "node": {"affinity": affinity}}}
        | dict(changes or {})
    )


def nfs_values(tag: str, server: str, path: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the chart's values for NFS, all of it on the nodes whose kernel has it; `changes` are those of `nfs`."""
    place = {"nodeSelector": {LABEL: VALUE}, "tolerations": [TAINT]}
    mine = {
        "pools": {"default": {"server": server, "path": path, "options": ["vers=4.2", "hard"], "inline": True}},
        "maxVolumesPerNode": MAX_VOLUMES,
        # With a port the probes are HTTP: a process for each is dear in a guest.
        "node": {**place, "metricsPort": 9810},
        "controller": {**place, "metricsPort": 9811},
    }
    return _common(tag) | {"hostpath": {"enabled": False}, "nfs": mine | dict(changes or {})}


def _common(tag: str) -> dict[str, Any]:
    return {
        "global": {"imageRegistry": REGISTRY},
        "image": {"repository": "tatami", "tag": tag},
        "logLevel": "debug",
        "logFormat": "text",
        "sidecars": {"provisioner": {"extraArgs": [f"--capacity-poll-interval={CAPACITY_SECONDS}s"]}},
    }


def install(nodes: Iterable[Node], changes: Mapping[str, Any] | None = None) -> None:
    """Install or upgrade the driver and wait until all its pods are ready. Raises RuntimeError with helm's words."""
    name, archive = driver_image()
    wanted = values(name.rpartition(":")[2], changes)
    with step("images onto the nodes"):
        archives = [archive, *sidecars(wanted)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: [node.import_image(one) for one in archives], nodes))
    upgrade(wanted)


def upgrade(wanted: Mapping[str, Any], release: str = RELEASE, namespace: str = NAMESPACE) -> None:
    """Bring a release to these values and wait until its pods are ready."""
    with step(f"helm upgrade --install {release} in {namespace}"):
        try:
            _helm(
                "upgrade", "--install", release, str(CHART), "--namespace", namespace, "--create-namespace",
                "--wait", "--timeout", f"{150 * PATIENCE:.0f}s", "--values", "-", stdin=json.dumps(wanted),
            )  # fmt: skip
            # helm is content with a DaemonSet that lacks as many pods as an upgrade may take away.
            Kubectl(namespace).run("rollout", "status", "daemonset", f"--timeout={120 * PATIENCE:.0f}s", timeout=130)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{explain(namespace)}") from None


def uninstall(release: str = RELEASE, namespace: str = NAMESPACE) -> None:
    """Remove a release."""
    _helm("uninstall", release, "--namespace", namespace, "--wait", "--timeout", f"{90 * PATIENCE:.0f}s")


def explain(namespace: str = NAMESPACE, lines: int = 60) -> str:
    """Return what the driver's pods look like and say, for a story that failed."""
    client = Kubectl(namespace)
    parts = [client.run("get", "pods", "-o", "wide")]
    parts += [f"--- {line}" for line in client.events()[-15:]]
    for pod in client.find("pods"):
        name = pod["metadata"]["name"]
        for container in pod["spec"]["containers"]:
            parts.append(f"=== {name} {container['name']}")
            try:
                parts.append(client.run("logs", name, "-c", container["name"], f"--tail={lines}"))
            except RuntimeError as error:
                parts.append(str(error))
    return "\n".join(parts)


def sidecars(wanted: Mapping[str, Any]) -> list[Path]:
    """Return the archives of the sidecars' images, found in the rendered chart; the program has the name of the image's last part."""
    # --validate: rendered for this cluster, with its version and its snapshots' kinds.
    rendered = _helm(
        "template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--validate", "--values", "-", stdin=json.dumps(wanted)
    )
    named = set(re.findall(r"^\s*-?\s*image: \"?([^\"\s]+)\"?\s*$", rendered, re.MULTILINE))
    programs = {image: image.partition("@")[0].rpartition(":")[0].rpartition("/")[2] for image in named}
    return [images.sidecar(image, program) for image, program in sorted(programs.items()) if program != "tatami"]


def _helm(*arguments: str, stdin: str = "") -> str:
    helm = os.environ.get("HELM") or next(iter(sorted(map(str, (CHECKOUT / ".cache" / "bin").glob("helm-*")))), "helm")
    done = subprocess.run(
        [helm, "--kubeconfig", str(KUBECONFIG), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=200 * PATIENCE,
    )
    if done.returncode != 0:
        raise RuntimeError(f"helm {arguments[0]}: {done.stderr.strip()}")
    return done.stdout
