"""A story: a namespace, what is done in it, what the nodes' disks then hold, and an explanation when it went wrong."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.driver import POOL
from cluster.kubectl import Kubectl, Object, ready
from cluster.nodes import Node
from cluster.progress import wait_until

KINDS = "pods,persistentvolumeclaims,volumesnapshots"


class Story:
    """What a test has in hand. `k` is kubectl in the story's namespace; what is cluster-wide and made by a story, it removes itself."""

    def __init__(self, nodes: Mapping[str, Node], name: str) -> None:
        self.nodes = nodes
        digest = hashlib.sha256(f"{name}{time.time_ns()}".encode()).hexdigest()
        self.namespace = f"story-{digest[:8]}"
        self.k = Kubectl(self.namespace)
        self.releases: list[str] = []
        """Namespaces of drivers that the story has installed itself: their logs are wanted, too, when it fails."""
        self._cluster_wide: list[tuple[str, str]] = []

    def begin(self) -> None:
        """Make the namespace."""
        self.k.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})
        wait_until("the service account", lambda: self.k.exists("serviceaccount", "default"), 30)

    def end(self) -> None:
        """Remove everything and wait until it is gone, the volumes included."""
        self._remove()
        for kind, name in reversed(self._cluster_wide):
            self.k.delete(kind, name)
        wait_until("the end of the story's volumes", lambda: not self.volumes(), 60)

    def make(self, *objects: Object) -> None:
        """Apply objects; those that are cluster-wide are deleted at the end."""
        for item in objects:
            if item["kind"] in ("StorageClass", "VolumeSnapshotClass", "VolumeAttributesClass", "PersistentVolume"):
                self._cluster_wide.append((item["kind"], item["metadata"]["name"]))
        self.k.apply(*objects)

    def run(self, pod: Object, seconds: float = 60) -> str:
        """Make a pod and wait until it is ready; returns its name."""
        self.make(pod)
        name: str = pod["metadata"]["name"]
        self.k.wait("pod", name, ready, seconds)
        return name

    def bound(self, claim: str, seconds: float = 60) -> Object:
        """Wait until a claim is bound and return its PersistentVolume."""
        found = self.k.wait("pvc", claim, lambda pvc: pvc.get("status", {}).get("phase") == "Bound", seconds)
        return self.k.get("pv", found["spec"]["volumeName"])

    def resize(self, claim: str, size: str) -> None:
        """Ask for another size, and wait for nothing."""
        self.k.patch("pvc", claim, {"spec": {"resources": {"requests": {"storage": size}}}})

    def resized(self, claim: str, size: str, seconds: float = 90) -> None:
        """Wait until a claim has this size, and its volume too."""
        self.k.wait("pvc", claim, lambda pvc: pvc["status"].get("capacity", {}).get("storage") == size, seconds)
        wait_until(f"{size} in the PV", lambda: self.bound(claim)["spec"]["capacity"]["storage"] == size, 10)

    def pods(self, app: str) -> list[Object]:
        """List the pods of a workload that are not going away."""
        return [pod for pod in self.k.find("pods", f"app={app}") if "deletionTimestamp" not in pod["metadata"]]

    def pods_ready(self, app: str, count: int, seconds: float = 90) -> list[Object]:
        """Wait until a workload has this many ready pods and return them, by name."""

        def check() -> list[Object]:
            found = [pod for pod in self.pods(app) if ready(pod)]
            return sorted(found, key=lambda pod: pod["metadata"]["name"]) if len(found) == count else []

        found: list[Object] = wait_until(f"{count} pods of {app}", check, seconds)
        return found

    def volumes(self) -> list[Object]:
        """List the PersistentVolumes of this story's claims."""
        found = Kubectl().find("pv")
        return [pv for pv in found if (pv["spec"].get("claimRef") or {}).get("namespace") == self.namespace]

    def node_of(self, pod: str) -> Node:
        """Return the node that a pod runs on."""
        return self.nodes[self.k.get("pod", pod)["spec"]["nodeName"]]

    def refused(self, kind: str, name: str, *words: str, seconds: float = 60) -> str:
        """Wait for an event about an object that has all these words in it, and return it."""

        def check() -> str:
            return next((event for event in self.k.events(name) if all(word in event for word in words)), "")

        try:
            found: str = wait_until(f"an event about {kind}/{name} with {words}", check, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; there are {self.k.events(name)}") from None
        return found

    def explain(self) -> str:
        """Return what there is and what happened."""
        parts = [self.k.run("get", f"{KINDS}", "-o", "wide", "--ignore-not-found")]
        parts += self.k.events()[-40:]
        parts.append(self.k.run("describe", "pods,persistentvolumeclaims"))
        parts += [json.dumps(pv["spec"] | pv["status"], indent=1) for pv in self.volumes()]
        return "\n".join(parts)

    def _remove(self) -> None:
        if not self.k.exists("namespace", self.namespace):
            return
        # In this order, or a workload makes its pods anew, and a snapshot is asked for when its source has gone.
        self.k.run("delete", "deployments,statefulsets", "--all", "--cascade=foreground")
        self.k.run("delete", "pods", "--all", "--grace-period=1", timeout=120)
        self.k.run("delete", "volumegroupsnapshots", "--all", timeout=120)
        # A snapshot that a pending claim is to be restored from goes only when that claim has gone.
        self.k.run("delete", "volumesnapshots", "--all", "--wait=false")
        for kind in ("pvc", "volumesnapshots"):
            self.k.run("delete", kind, "--all", timeout=120)
        # The namespace itself takes the controller ten seconds; nobody needs its name again soon.
        self.k.delete("namespace", self.namespace, wait=False)


def directory_of(pv: Object) -> Path:
    """Return where the data of a volume of the default pool lies on its node."""
    return POOL / pv["spec"]["csi"]["volumeHandle"].rpartition(".")[2]


def node_of_volume(pv: Object) -> list[Any]:
    """Return the values of the first term of a volume's node affinity: the nodes that can mount it."""
    terms = pv["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
    values: list[Any] = terms[0]["matchExpressions"][0]["values"]
    return values
