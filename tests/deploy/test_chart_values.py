"""Values that the chart refuses: before anything is installed, and by name."""

import re

import pytest

from tests.deploy.conftest import NFS, ROOT
from tests.deploy.rendered import containers

CHECKS = ROOT / "deploy" / "chart" / "tatami" / "templates" / "_checks.tpl"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--set=hostpath.pool.x=1", "pool"),
        ("--set=hostpath.pools.default.path=relative", "path"),
        ("--set=hostpath.pools.UPPER.path=/x", "UPPER"),
        ("--set=hostpath.pools.default.shared=true", "shared"),
        ("--set=hostpath.pools.default.inline=maybe", "inline"),
        ("--set=hostpath.driverName=Not_A_Name", "driverName"),
        ("--set=hostpath.storageClasses[0].reclaimPolicy=Recycle", "reclaimPolicy"),
        ("--set=hostpath.storageClasses[0].parameters.onDelete=shred", "onDelete"),
        ("--set=hostpath.storageClasses[0].parameters.quota=1Gi", "quota"),
        ("--set=hostpath.node.metricsPort=0", "metricsPort"),
        ("--set=hostpath.node.maxUnavailable=all", "maxUnavailable"),
        ("--set=snapshots=yes", "snapshots"),
        ("--set=logLevel=trace", "logLevel"),
        ("--set=kubeletDir=kubelet", "kubeletDir"),
        ("--set=image.digest=latest", "digest"),
        ("--set=nfs.pools.a.path=/srv", "server"),
        ("--set=nfs.pools.a.server=x,--set=nfs.pools.a.path=srv", "path"),
        ("--set=hostpath.defaultPool=other", "hostpath.defaultPool: other is none of hostpath.pools"),
        (
            "--set=hostpath.storageClasses[0].name=tatami,--set=hostpath.storageClasses[0].pool=other",
            "tatami: other is none of hostpath.pools",
        ),
        ("--set=hostpath.enabled=false", "nothing to install"),
        ("--set=hostpath.pools.default=null", "at least one pool"),
        ("--set=hostpath.pools.default.path=/var/lib/kubelet/pods", "hostpath.pools.default.path"),
        ("--set=hostpath.pools.default.path=/var/lib", "must be neither kubeletDir (/var/lib/kubelet)"),
        (
            "--set=nfs.pools.a.server=x,--set=nfs.pools.a.path=/srv,--set=nfs.pools.a.options={nolock}",
            "nfs.controller.replicas=1",
        ),
        ("--set=hostpath.pools.default.path=/mnt/../var/lib/kubelet", "must not contain '..'"),
        ("--set=hostpath.pools.default.path=//var/./lib/kubelet", "must be neither kubeletDir (/var/lib/kubelet)"),
        (
            "--set=hostpath.pools.a.path=/mnt/a,--set=hostpath.pools.b.path=/mnt/a/b",
            "hostpath.pools.b.path: /mnt/a/b must be neither hostpath.pools.a.path (/mnt/a)",
        ),
        ("--set=hostpath.pools.a.path=/opt", "hostpath.pools.a.path: /opt would hide /opt/tatami"),
        ("--set=hostpath.pools.a.path=/tmp", "would hide /tmp"),
        ("--set=nfs.pools.a.server=fe80::1,--set=nfs.pools.a.path=/srv", "server"),
        ("--set=nfs.pools.a.server=nas:/x,--set=nfs.pools.a.path=/srv", "server"),
        (
            "--set=nfs.pools.a.server=x,--set=nfs.pools.a.path=/s,--set=nfs.pools.b.server=x,--set=nfs.pools.b.path=/s/t",
            "nfs.pools.a.path (/s)",
        ),
        (
            "--set=nfs.pools.a.server=x,--set=nfs.pools.a.path=/s,--set=nfs.node.metricsPort=9808,--set=nfs.controller.metricsPort=9808",
            "nfs.controller.metricsPort: 9808 is nfs.node.metricsPort",
        ),
        ("--set=global.imageRegistry=https://registry.example.com", "imageRegistry"),
        ("--set=hostpath.storageClasses[0].name=x,--set-string=hostpath.storageClasses[0].parameters.mode=9999", "mode"),
        (
            f"--set=kubeletDir=/var/snap/microk8s/common/var/lib/kubelet,--set=hostpath.driverName={'a' * 47}",
            "hostpath.driverName",
        ),
        ("--set=hostpath.node.metricsPort=null", "missing property 'metricsPort'"),
    ],
)
def test_a_wrong_value_is_refused_by_name(chart, option, said):
    with pytest.raises(RuntimeError, match=re.escape(said)):
        chart.template(*option.split(","))


def test_what_only_looks_wrong_is_taken(chart):
    chart.template("--set=nfs.pools.efs.server=[fe80::1%eth0]", "--set=nfs.pools.efs.path=/")
    chart.template("--set=nfs.pools.a.server=x,nfs.pools.a.path=/s,nfs.pools.b.server=y,nfs.pools.b.path=/s")
    chart.template("--set=nfs.pools.a.server=x,nfs.pools.a.path=/s,nfs.node.metricsPort=9808,nfs.controller.metricsPort=9809")
    chart.template("--set=hostpath.pools.default.path=/mnt/a,hostpath.pools.b.path=/mnt/ab")
    chart.template("--set=global.imageRegistry=registry.example.com:5000/mirror/k8s")


def test_a_pool_beside_the_kubelets_directory_and_one_controller_on_nolock_are_taken(chart):
    chart.template("--set=hostpath.pools.default.path=/var/lib/kubelet-volumes")
    chart.template(*NFS, "--set=nfs.pools.fast.options={vers=3,nolock}", "--set=nfs.controller.replicas=1")


def test_two_default_classes_are_refused(chart):
    with pytest.raises(RuntimeError, match="several: tatami, tatami-nfs"):
        chart.template(*NFS, "--set=nfs.storageClasses[0].name=tatami-nfs", "--set=nfs.storageClasses[0].default=true")


def test_data_of_a_pool_without_a_place_for_the_controller_is_refused(chart):
    with pytest.raises(RuntimeError, match=r"nfs\.controller\.nodeSelector"):
        chart.template(*NFS, "--set=nfs.pools.fast.data=/srv/tatami")
    with pytest.raises(RuntimeError, match="data"):
        chart.template(*NFS, "--set=nfs.pools.fast.data=relative", "--set=nfs.controller.nodeSelector.a=b")


def test_data_that_would_hide_the_controllers_own_mounts_is_refused(chart):
    for place in ("/var/lib/tatami", "/var/lib", "/csi", "/usr"):
        with pytest.raises(RuntimeError, match=r"nfs\.pools\.fast\.data: .* would hide"):
            chart.template(*NFS, f"--set=nfs.pools.fast.data={place}", "--set=nfs.controller.nodeSelector.a=b")


def test_the_places_that_a_pool_must_not_hide_are_all_that_the_drivers_containers_have(objects, chart):
    checks = CHECKS.read_text()
    for name, _, container in containers(objects(*NFS)):
        if container["name"] == "driver" and name in {"tatami-hostpath-node", "tatami-nfs-controller"}:
            for mount in container["volumeMounts"]:
                assert mount["name"] in {"kubelet", "pool-default"} or f'"{mount["mountPath"]}"' in checks, (name, mount)
