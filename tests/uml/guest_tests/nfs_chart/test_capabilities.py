"""The controller of NFS pools with the capabilities that its manifest gives it, and none besides."""

import json
import pathlib
import sys
import time

import psutil
import pytest
import yaml
from driver_in_guest import CHECKOUT, Cluster, pool_of, shell
from servers import KernelNfsServer

from csi_driver.rpc import csi_pb2 as csi

NUMBERS = {"SYS_ADMIN": 21, "MKNOD": 27, "FOWNER": 3}  # capability.h
FILES = """
set -e
cd {target}
mkdir -m 2770 shared && chown 1000:2000 shared
echo secret >shared/letter && chown 3000:4000 shared/letter && chmod 0400 shared/letter
touch -d 2001-02-03T04:05:06Z shared/letter
mknod null c 1 3 && mkfifo -m 0600 pipe && ln shared/letter twin && ln -s shared/letter link
setfattr -n user.colour -v blue shared/letter 2>/dev/null || true
"""
AS_TENANT = ["/usr/bin/setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--", "/bin/sh", "-c"]
STICKY = "cd {target} && mkdir -m 1777 tmp && touch tmp/file zzz && mkdir tmp/folder && touch tmp/folder/file"
# What check_sticky(), may_linkat(), xattr_permission() and set_posix_acl() of the kernel refuse whoever does not own it.
OF_OTHERS = """
set -e
cd {target}
mkdir sticky
setfattr -n user.colour -v red sticky 2>/dev/null || true
ln -s nowhere link && cp /bin/true setuid && mkfifo pipe && echo secret >read
setfacl -m u:2000:r read 2>/dev/null || true
chown -h 1000:1000 sticky link setuid pipe read
chmod 1777 sticky && chmod 4755 setuid
ln link link-too && ln setuid setuid-too && ln pipe pipe-too
"""
LOOK = "cd {target} && find . -not -path ./.x -printf '%p %y %m %U:%G %n %s %T@ %l\\n' | sort "
ATTRIBUTES = "cd {target} && getfattr -d -m user -- sticky; getfacl -n read"


def capabilities():
    """Read what the manifest gives the controller's driver."""
    objects = yaml.safe_load_all((CHECKOUT / "deploy/manifests/nfs.yaml").read_text())
    (deployment,) = (found for found in objects if found["kind"] == "Deployment")
    (driver,) = (c for c in deployment["spec"]["template"]["spec"]["containers"] if c["name"] == "driver")
    context = driver["securityContext"]
    assert (context["capabilities"]["drop"], context["allowPrivilegeEscalation"]) == (["ALL"], False)
    return context["capabilities"]["add"]


def confined_to(*names):
    """Return the command that runs another with these capabilities and no others."""
    kept = "".join(",+" + name.lower() for name in names)
    return "/usr/bin/setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set=-all{kept}"


def not_carried(control):
    """Read what the captures in a pool could not carry."""
    records = [json.loads(path.read_text()) for kind in ("snapshots", "volumes") for path in (control / kind).glob("*.json")]
    return [found["capture"].get("not_carried", {}) for found in records if found.get("capture")]


@pytest.fixture(scope="module", params=["4.2", "3"])
def cluster(network, request):
    server = KernelNfsServer(network, "exporter", v3=True)
    share, squashed = server.filesystem("xfs"), server.filesystem("xfs", name="squashed")
    server.export(share)
    server.tree(squashed).chmod(0o777)
    server.export(squashed, "rw,sync,no_subtree_check,root_squash")
    version = f"vers={request.param}"
    pools = [pool_of(server, share, "default", version), pool_of(server, squashed, "squashed", version)]
    cluster = Cluster(network, pools, nodes=1, v3=True)
    cluster.controller.confinement = confined_to(*capabilities())
    cluster.controls = {name: server.tree(path) / ".csi" for name, path in (("default", share), ("squashed", squashed))}
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
    seen = [shell(one, (LOOK + " && cat shared/letter").format(target=one.target)).splitlines()[1:] for one in (use, again)]
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


@pytest.mark.parametrize("pool", ["default", "squashed"])
def test_sticky_directories_of_a_tenant_leave_the_trash_with_all_else(cluster, pool):
    volume = cluster.create(f"sticky-{pool}", pool=pool, mode="0777")
    use = cluster.use(volume)
    # Of what others own a squashed root removes nothing, whatever it may on the client: that server's pods are root, too.
    tenant = AS_TENANT if pool == "default" else AS_TENANT[-2:]
    use.driver.node.run([*tenant, STICKY.format(target=cluster.mount(use))])
    snapshot = cluster.snapshot(f"sticky-{pool}", volume)
    cluster.unmount(use)
    cluster.delete(volume)
    cluster.controller.insist("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=snapshot))
    until = time.monotonic() + 40
    trash = cluster.controls[pool] / "trash"
    while list(trash.iterdir()) and time.monotonic() < until:
        time.sleep(0.2)
    assert not list(trash.iterdir()), cluster.controller.tail()
    assert "the trash cannot be emptied" not in cluster.controller.log.read_text()


def test_a_removal_takes_the_sticky_bit_off_where_only_the_client_forbids_it(cluster):
    volume = cluster.create("unsticky", mode="0777")
    use = cluster.use(volume)
    target = cluster.mount(use)
    use.driver.node.run([*AS_TENANT, STICKY.format(target=target)])
    remove = (
        "import os, sys; from csi_driver.linux.tree_removal import remove_tree; "
        "remove_tree(os.open(sys.argv[1], os.O_RDONLY), 'tmp')"
    )
    use.driver.node.run([*confined_to("SYS_ADMIN"), sys.executable, "-c", remove, target], directory=str(CHECKOUT))
    assert shell(use, f"ls {target}") == "zzz\n"
    cluster.unmount(use)
    cluster.delete(volume)


def test_copies_of_other_peoples_files_lack_nothing(cluster):
    hardlinks = pathlib.Path("/proc/sys/fs/protected_hardlinks")  # as systemd sets it
    hardlinks.write_text("1")
    volume = cluster.create("of-others", mode="0777")
    use = cluster.use(volume)
    cluster.mount(use)
    shell(use, OF_OTHERS.format(target=use.target))
    snapshot = cluster.snapshot("of-others", volume)
    again = cluster.use(cluster.create("of-others-too", snapshot=snapshot, mode="0777"), pod="other")
    cluster.mount(again)
    seen = [shell(one, (LOOK + "; " + ATTRIBUTES).format(target=one.target)).splitlines()[1:] for one in (use, again)]
    lacking = not_carried(cluster.controls["default"])
    for one in (use, again):
        cluster.unmount(one)
        cluster.delete(one.volume)
    cluster.controller.insist("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=snapshot))
    assert seen[0] == seen[1]
    assert "user.colour" in str(seen) or "user:2000" in str(seen), seen
    assert lacking == [{}, {}]
