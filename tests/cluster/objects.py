"""Kubernetes objects as the stories write them: dicts, with what they are about as arguments."""

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.driver import HOSTPATH
from cluster.images import BUSYBOX

Object = dict[str, Any]
CLASS = "tatami"
FOREVER = ("sleep", "1000000")


def claim(
    name: str, *, size: str = "1Gi", storage_class: str | None = None, mode: str = "ReadWriteOnce", **spec: Any
) -> Object:
    """A PersistentVolumeClaim; without `storage_class` it names none and gets the cluster's default. None in `spec` leaves out."""
    wanted = {"accessModes": [mode], "resources": {"requests": {"storage": size}}, **spec}
    if storage_class is not None:
        wanted["storageClassName"] = storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": wanted}


def of_claim(name: str, *, read_only: bool = False) -> Object:
    """The volume of a pod that a claim is for."""
    return {"persistentVolumeClaim": {"claimName": name, **({"readOnly": True} if read_only else {})}}


def pod(
    name: str,
    volumes: Mapping[str, Object] | None = None,
    *,
    command: Sequence[str] = FOREVER,
    node: str = "",
    mount: Mapping[str, Any] | None = None,
    devices: Mapping[str, Object] | None = None,
    labels: Mapping[str, str] | None = None,
    **spec: Any,
) -> Object:
    """A pod with one container; `volumes`: path in it -> volume; `mount`: more of each volumeMount; `node`: where it has to run.

    `devices`: path in it -> volume of raw blocks.
    """
    template = pod_template(volumes or {}, command=command, mount=mount, devices=devices, labels=labels, **spec)
    if node:
        template["spec"]["nodeSelector"] = {"kubernetes.io/hostname": node}
    template["metadata"]["name"] = name
    return {"apiVersion": "v1", "kind": "Pod", **template}


def pod_template(
    volumes: Mapping[str, Object],
    *,
    command: Sequence[str] = FOREVER,
    mount: Mapping[str, Any] | None = None,
    devices: Mapping[str, Object] | None = None,
    labels: Mapping[str, str] | None = None,
    **spec: Any,
) -> Object:
    """What a Deployment or StatefulSet makes pods of."""
    sources = {**volumes, **(devices or {})}
    names = {path: f"volume-{number}" for number, path in enumerate(sources)}
    container = {
        "name": "main",
        "image": BUSYBOX,
        "imagePullPolicy": "Never",
        "command": list(command),
        "volumeMounts": [{"name": names[path], "mountPath": path, **(mount or {})} for path in volumes],
        "volumeDevices": [{"name": names[path], "devicePath": path} for path in devices or {}],
    }
    return {
        "metadata": {"labels": dict(labels or {})},
        "spec": {
            "containers": [container],
            "volumes": [{"name": names[path], **source} for path, source in sources.items()],
            "terminationGracePeriodSeconds": 1,
            "automountServiceAccountToken": False,
            "tolerations": [],
            **spec,
        },
    }


def workload(kind: str, name: str, replicas: int, template: Object, **spec: Any) -> Object:
    """A Deployment or a StatefulSet."""
    labels = {"app": name}
    template["metadata"]["labels"] = labels
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template, **spec},
    }


def storage_class(name: str, *, provisioner: str = HOSTPATH, **more: Any) -> Object:
    """A StorageClass that waits for its first consumer, as one of node-local volumes should."""
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name},
        "provisioner": provisioner,
        "volumeBindingMode": "WaitForFirstConsumer",
        "allowVolumeExpansion": True,
        **more,
    }


def image_class(name: str = "images", **more: Any) -> Object:
    """A StorageClass of volumes that are XFS in a file, which holds them to their size. (An ext4 grows only where root may all.)"""
    return storage_class(name, parameters={"layout": "image", "csi.storage.k8s.io/fstype": "xfs"}, **more)


def static_volume(
    name: str, directory: str, *, node: str, storage_class: str = "", driver: str = HOSTPATH, **spec: Any
) -> Object:
    """A PersistentVolume of a directory that is there already, on a node."""
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": storage_class,
            "csi": {"driver": driver, "volumeHandle": name, "volumeAttributes": {"pool": "default", "directory": directory}},
            "nodeAffinity": on_node(node),
            **spec,
        },
    }


def on_node(name: str) -> Object:
    """A PersistentVolume's nodeAffinity."""
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [name]}]}
    return {"required": {"nodeSelectorTerms": [term]}}


def snapshot(name: str, claim_name: str, snapshot_class: str = "tatami") -> Object:
    """A VolumeSnapshot of a claim."""
    return {
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshot",
        "metadata": {"name": name},
        "spec": {"volumeSnapshotClassName": snapshot_class, "source": {"persistentVolumeClaimName": claim_name}},
    }


def snapshot_class(name: str, policy: str, driver: str = HOSTPATH) -> Object:
    """A VolumeSnapshotClass."""
    return {
        "apiVersion": "snapshot.storage.k8s.io/v1",
        "kind": "VolumeSnapshotClass",
        "metadata": {"name": name},
        "driver": driver,
        "deletionPolicy": policy,
    }


def from_snapshot(name: str) -> Object:
    """A claim's dataSource."""
    return {"kind": "VolumeSnapshot", "apiGroup": "snapshot.storage.k8s.io", "name": name}


def from_claim(name: str) -> Object:
    """A claim's dataSource, for a clone."""
    return {"kind": "PersistentVolumeClaim", "name": name}
