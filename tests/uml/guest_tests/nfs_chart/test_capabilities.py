"""The controller of NFS pools with the capabilities that its manifest gives it, and none besides."""

import pathlib

import psutil
import pytest
import yaml
from driver_in_guest import CHECKOUT, Cluster, pool_of, shell
from servers import KernelNfsServer

from csi_driver.rpc import csi_pb2 as csi

NUMBERS = {"SYS_ADMIN": 21, "MKNOD": 27}  # capability.h
FILES = """
set -e
cd {target}
mkdir -m 2770 shared && chown 1000:2000 shared
echo secret >shared/letter && chown 3000:4000 shared/letter && chmod 0400 shared/letter
touch -d 2001-02-03T04:05:06Z shared/letter
mknod null c 1 3 && mkfifo -m 0600 pipe && ln shared/letter twin && ln -s shared/letter link
setfattr -n user.colour -v blue shared/letter 2>/dev/null || true
"""
LOOK = "cd {target} && find . -not -path ./.x -printf '%p %y %m %U:%G %n %s %T@ %l\\n' | sort && cat shared/letter"


def capabilities():
    """Read what the manifest gives the controller's driver."""
    objects = yaml.safe_load_all((CHECKOUT / "deploy/manifests/nfs.yaml").read_text())
    (deployment,) = (found for found in objects if found["kind"] == "Deployment")
    (driver,) = (c for c in deployment["spec"]["template"]["spec"]["containers"] if c["name"] == "driver")
    context = driver["securityContext"]
    assert (context["capabilities"]["drop"], context["allowPrivilegeEscalation"]) == (["ALL"], False)
    return context["capabilities"]["add"]


@pytest.fixture(scope="module", params=["4.2", "3"])
def cluster(network, request):
    server = KernelNfsServer(network, "exporter", v3=True)
    share = server.filesystem("xfs")
    server.export(share)
    cluster = Cluster(network, [pool_of(server, share, "default", f"vers={request.param}")], nodes=1, v3=True)
    kept = ",".join("+" + name.lower() for name in capabilities())
    cluster.controller.confinement = ("setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set=-all,{kept}")
    try:
        yield cluster.start()
    finally:
        cluster.close()
        server.close()


def test_it_has_no_more_than_the_manifest_says(cluster):
    status = pathlib.Path(f"/proc/{cluster.controller.process.pid}/status").read_text()
    values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    wanted = sum(1 << NUMBERS[name] for name in capabilities())
    assert int(values["CapEff"], 16) == wanted
    assert int(values["CapBnd"], 16) == wanted
    assert values["NoNewPrivs"] == "1"
    assert psutil.Process(cluster.controller.process.pid).uids().real == 0


def test_volumes_snapshots_and_restores_have_what_they_should(cluster):
    volume = cluster.create("first", uid="1234", gid="2345", mode="2770")
    use = cluster.use(volume)
    cluster.mount(use)
    assert shell(use, f"stat -c '%u:%g %a' {use.target}") == "1234:2345 2770\n"
    shell(use, FILES.format(target=use.target))
    cluster.unmount(use)
    snapshot = cluster.snapshot("copy", volume)
    restored = cluster.create("second", snapshot=snapshot)
    cluster.mount(use)
    again = cluster.use(restored, pod="other")
    cluster.mount(again)
    # The restored volume's own top has its class' owner and mode; what is in it is as it was.
    seen = [shell(one, LOOK.format(target=one.target)).splitlines()[1:] for one in (use, again)]
    assert seen[0] == seen[1]
    assert len(seen[0]) == 7
    shell(use, f"mkdir -m 0500 {use.target}/locked && touch {use.target}/locked/in && chown -R 77:77 {use.target}/locked")
    for one in (use, again):
        cluster.unmount(one)
    request = csi.ControllerExpandVolumeRequest(
        volume_id=restored.handle, capacity_range=csi.CapacityRange(required_bytes=2 << 20)
    )
    assert cluster.controller.call("ControllerExpandVolume", request).capacity_bytes == 2 << 20
    cluster.delete(restored)
    cluster.delete(volume)
    cluster.controller.insist("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=snapshot))
    assert cluster.controller.call("ListVolumes", csi.ListVolumesRequest()).entries == []
