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
from cluster.kubectl import Kubectl
from cluster.layout import CHECKOUT, KUBECONFIG
from cluster.nodes import Node
from cluster.progress import step

CHART = CHECKOUT / "deploy" / "chart" / "tatami"
NAMESPACE = "tatami-system"
RELEASE = "tatami"
REGISTRY = "localhost"
HOSTPATH = "hostpath.csi.tatami.dev"
POOL = Path("/var/lib/tatami/default")
"""Where the nodes' pool lies on each of them."""
MAX_VOLUMES = 30
"""Per node: more than the stories need, and few enough for a test that makes them all."""


def values(tag: str, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the chart's values for the cluster: its images, and a pool that inline volumes may use."""
    pools = {"default": {"path": str(POOL), "inline": True}}
    mine = {
        "global": {"imageRegistry": REGISTRY},
        "image": {"repository": "tatami", "tag": tag},
        "logLevel": "debug",
        "logFormat": "text",
        "hostpath": {"pools": pools, "maxVolumesPerNode": MAX_VOLUMES},
    }
    return mine | dict(changes or {})


def install(nodes: Iterable[Node], changes: Mapping[str, Any] | None = None) -> None:
    """Install or upgrade the driver and wait until all its pods are ready. Raises RuntimeError with helm's words."""
    name, archive = driver_image()
    wanted = values(name.rpartition(":")[2], changes)
    with step("images onto the nodes"):
        archives = [archive, *(images.sidecar(image, program) for image, program in _sidecars(wanted).items())]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda node: [node.import_image(one) for one in archives], nodes))
    upgrade(wanted)


def upgrade(wanted: Mapping[str, Any], release: str = RELEASE) -> None:
    """Bring a release to these values and wait until its pods are ready."""
    with step(f"helm upgrade --install {release}"):
        try:
            _helm(
                "upgrade", "--install", release, str(CHART), "--namespace", NAMESPACE, "--create-namespace",
                "--wait", "--timeout", "120s", "--values", "-", stdin=json.dumps(wanted),
            )  # fmt: skip
            # helm is content with a DaemonSet that lacks as many pods as an upgrade may take away.
            Kubectl(NAMESPACE).run("rollout", "status", "daemonset", "--timeout=120s", timeout=130)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{explain()}") from None


def uninstall(release: str = RELEASE) -> None:
    """Remove a release."""
    _helm("uninstall", release, "--namespace", NAMESPACE, "--wait", "--timeout", "90s")


def explain(lines: int = 60) -> str:
    """Return what the driver's pods look like and say, for a story that failed."""
    client = Kubectl(NAMESPACE)
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


def _sidecars(wanted: Mapping[str, Any]) -> dict[str, str]:
    """Find the sidecars' images in the rendered chart: image -> program, which has the name of the image's last part."""
    # --validate: rendered for this cluster, with its version and its snapshots' kinds.
    rendered = _helm(
        "template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--validate", "--values", "-", stdin=json.dumps(wanted)
    )
    named = set(re.findall(r"^\s*-?\s*image: \"?([^\"\s]+)\"?\s*$", rendered, re.MULTILINE))
    programs = {image: image.partition("@")[0].rpartition(":")[0].rpartition("/")[2] for image in named}
    return {image: program for image, program in programs.items() if program != "tatami"}


def _helm(*arguments: str, stdin: str = "") -> str:
    helm = os.environ.get("HELM") or next(iter(sorted(map(str, (CHECKOUT / ".cache" / "bin").glob("helm-*")))), "helm")
    done = subprocess.run(
        [helm, "--kubeconfig", str(KUBECONFIG), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    if done.returncode != 0:
        raise RuntimeError(f"helm {arguments[0]}: {done.stderr.strip()}")
    return done.stdout
