"""Kubernetes objects of stories on NFS: those of `objects`, with the class of the chart, and pods on the nodes whose kernel has NFS."""

from collections.abc import Mapping
from typing import Any

from cluster import objects
from cluster.driver import NFS
from cluster.guests import LABEL, TAINT, VALUE
from cluster.objects import Object

CLASS = "tatami-nfs"
PLACE = {"tolerations": [TAINT], "nodeSelector": {LABEL: VALUE}}


def claim(name: str, *, storage_class: str = CLASS, mode: str = "ReadWriteMany", **spec: Any) -> Object:
    """A claim of the chart's class for NFS."""
    return objects.claim(name, storage_class=storage_class, mode=mode, **spec)


def pod(name: str, volumes: Mapping[str, Object] | None = None, **spec: Any) -> Object:
    """A pod on a node with NFS; `node`: on this one."""
    return objects.pod(name, volumes, **PLACE, **spec)


def pod_template(volumes: Mapping[str, Object], **spec: Any) -> Object:
    """What a workload makes pods of, on nodes with NFS."""
    return objects.pod_template(volumes, **PLACE, **spec)


def on_different_nodes(app: str) -> Object:
    """A pod's affinity: no node has two of them."""
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": {"app": app}}}
    return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def storage_class(name: str, **more: Any) -> Object:
    """A class whose volumes are made at once, as any node can mount them."""
    return objects.storage_class(name, provisioner=NFS, volumeBindingMode="Immediate", **more)


def static_volume(name: str, directory: str, **spec: Any) -> Object:
    """A PersistentVolume of a directory of the share that is there already."""
    wanted: dict[str, Any] = {"accessModes": ["ReadWriteMany"], "nodeAffinity": None, **spec}
    return objects.static_volume(name, directory, node="", driver=NFS, **wanted)


def snapshot(name: str, claim_name: str) -> Object:
    """A VolumeSnapshot of a claim."""
    return objects.snapshot(name, claim_name, CLASS)


def group_snapshot(name: str, labels: Mapping[str, str]) -> Object:
    """A VolumeGroupSnapshot of all claims with these labels."""
    return {
        "apiVersion": "groupsnapshot.storage.k8s.io/v1",
        "kind": "VolumeGroupSnapshot",
        "metadata": {"name": name},
        "spec": {"volumeGroupSnapshotClassName": CLASS, "source": {"selector": {"matchLabels": dict(labels)}}},
    }


def directory_of(pv: Object) -> str:
    """Return where the data of a volume lies in the share."""
    name: str = pv["spec"]["csi"]["volumeHandle"].rpartition(".")[2]
    return name
