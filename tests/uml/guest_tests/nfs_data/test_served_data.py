"""A controller beside the server's data: NFS volumes that are held to their size, and a directory that must be the right one."""

import os
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from driver_in_guest import RWX, Cluster, Use, Volume, pool_of, refused, shell, sources
from servers import KernelNfsServer

from csi_driver.rpc import csi_pb2 as csi
from csi_driver.volumes.limiters import NFS_ROOT

MIB = 1 << 20
SIZE = 32 * MIB
WRITER = """
import errno, os, sys
target = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
block, written = os.urandom(65536), 0
try:
    while written < int(sys.argv[2]):
        written += os.write(target, block)
        if written % (1 << 20) == 0:
            os.fsync(target)
    os.fsync(target)
    print(written, "-")
except OSError as error:
    print(written, errno.errorcode[error.errno])
"""
KINDS = ("xfs", "ext4", "btrfs")
ANSWER = {"xfs": "ENOSPC", "ext4": "EDQUOT", "btrfs": "EDQUOT"}


@pytest.fixture(scope="module")
def data_server(network):
    server = KernelNfsServer(network, "server")
    for kind in KINDS:
        root = server.filesystem(kind, size=1 << 30)
        if kind == "btrfs":
            server.node.run(["btrfs", "quota", "enable", str(root)])
        for name in ("pool", "bare", "other"):
            (server.tree(root) / name).mkdir()
        server.export(root)
    yield server
    server.close()


@pytest.fixture(scope="module")
def cluster(network, data_server):
    pools = []
    for kind in KINDS:
        pool = pool_of(data_server, f"/srv/{kind}/pool", kind)
        pools += [replace(pool, data=pool.path), pool_of(data_server, f"/srv/{kind}/bare", f"{kind}-bare")]
    with Cluster(network, pools, nodes=1, controller_at=data_server.node) as cluster:
        yield cluster


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def create(cluster, kind, name, size=SIZE, **more):
    return cluster.create(f"{kind}-{name}", size=size, pool=kind, mode="0777", **more)


def write(server, use, uid=0, most=3 * SIZE, name="file"):
    """Write on the node as a user until it is refused; returns the bytes that the server then has, and the error or "-"."""
    argv = ["/usr/bin/setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups"] if uid else []
    done = use.driver.node.run([*argv, "/usr/bin/python3", "-I", "-c", WRITER, str(use.target / name), str(most)], timeout=200)
    place = sources(use.driver.node)[str(use.target)].partition(":")[2] + f"/{name}"
    taken = shell(server, f"sync -f {place}; du -B1 {place}").split()[0]
    return int(taken), done.stdout.split()[1]


def go_on(server, use, uid):
    """Write on; the client's kernel tells the next writer of a file what the last did not live to hear, once (errseq_sample)."""
    outcome = write(server, use, uid)
    return outcome if outcome[0] > SIZE + MIB else write(server, use, uid)


def stops_at(outcome, size, kind):
    written, said = outcome
    assert said == ANSWER[kind]
    assert size - 2 * MIB <= written <= size


def seen_by_df(use):
    """What `df` says on the node: all of it and what is used, in bytes."""
    return [int(word) for word in shell(use, f"df -B1 --output=size,used {use.target}").split()[-2:]]


def mounted(cluster, volume, pod="pod"):
    use = cluster.use(volume, pod=pod)
    cluster.mount(use)
    return use


# --- held -------------------------------------------------------------------------------------------------------------------------


def test_the_volume_says_how_well_it_is_held_and_without_data_that_it_is_not(cluster, kind):
    volume = create(cluster, kind, "levels", limit="required")
    assert volume.context["limiter"] == ("btrfs qgroup" if kind == "btrfs" else "project quota")
    assert volume.context["limit"] == ("hard" if kind != "ext4" else f"hard but for {NFS_ROOT}")
    bare = cluster.create(f"{kind}-bare", size=SIZE, pool=f"{kind}-bare")
    assert bare.context["limiter"] == "none"
    assert "`data`" in bare.context["limit"]
    with refused("RESOURCE_EXHAUSTED", "limit: required"):
        cluster.create(f"{kind}-refused", size=SIZE, pool=f"{kind}-bare", limit="required")


@pytest.mark.parametrize("uid", [0, 1000])
def test_a_client_writes_until_the_size_and_goes_on_after_an_expansion_without_a_remount(cluster, data_server, kind, uid):
    volume = create(cluster, kind, f"full-{uid}")
    use = mounted(cluster, volume)
    if kind == "ext4" and uid == 0:
        assert write(data_server, use, 0, 2 * SIZE) == (pytest.approx(2 * SIZE, rel=0.01), "-")  # whom the level names
        assert NFS_ROOT in volume.context["limit"]
    else:
        stops_at(write(data_server, use, uid), SIZE, kind)
        assert cluster.expand(use, 2 * SIZE) == 2 * SIZE
        stops_at(go_on(data_server, use, uid), 2 * SIZE, kind)
    cluster.unmount(use)
    cluster.delete(volume)


def test_df_on_the_client_shows_the_volume_and_its_growth(cluster, data_server, kind):
    if kind == "btrfs":
        pytest.skip("btrfs shows the whole filesystem (statfs takes no notice of quota groups)")
    volume = create(cluster, kind, "df")
    use = mounted(cluster, volume)
    assert write(data_server, use, 1000, SIZE // 2) == (pytest.approx(SIZE // 2, rel=0.01), "-")
    size, used = seen_by_df(use)
    assert size == SIZE
    assert used == pytest.approx(int(shell(use, f"du -sB1 {use.target}").split()[0]), rel=0.01)
    cluster.expand(use, 2 * SIZE)
    assert seen_by_df(use)[0] == 2 * SIZE
    cluster.unmount(use)
    cluster.delete(volume)


def test_restores_and_clones_hold_the_content_and_are_held_to_their_own_size(cluster, data_server, kind):
    source = create(cluster, kind, "source")
    use = mounted(cluster, source)
    assert write(data_server, use, 1000, SIZE // 2, "old") == (pytest.approx(SIZE // 2, rel=0.01), "-")
    digest = shell(use, f"sync {use.target}/old; sha256sum < {use.target}/old")
    snapshot = cluster.snapshot(f"{kind}-snapshot", source)
    for number, origin in enumerate(({"snapshot": snapshot}, {"volume": source.handle})):
        copy = create(cluster, kind, f"copy-{number}", 2 * SIZE, **origin)
        assert copy.context["limiter"] != "none"
        other = mounted(cluster, copy, f"copy-{number}")
        assert shell(other, f"sha256sum < {other.target}/old") == digest
        stops_at(write(data_server, other, 1000, name="new"), 2 * SIZE - SIZE // 2, kind)
        cluster.unmount(other)
        cluster.delete(copy)
    cluster.unmount(use)
    cluster.controller.insist("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=snapshot))
    cluster.delete(source)


def test_volumes_that_one_node_mounts_are_never_taken_for_each_other(cluster, kind):
    """Each btrfs subvolume has the same inode numbers as the next."""
    uses = [mounted(cluster, create(cluster, kind, f"twin-{number}", MIB), f"twin-{number}") for number in range(3)]
    for number, use in enumerate(uses):
        shell(use, f"mkdir {use.target}/d; echo {number} > {use.target}/d/f")
    for number, use in enumerate(uses):
        assert shell(use, f"cat {use.target}/d/f; find {use.target} -mindepth 1 | wc -l").split() == [str(number), "2"]
        cluster.unmount(use)
        cluster.delete(use.volume)


# --- the right directory ----------------------------------------------------------------------------------------------------------


def start_with(network, server, pool):
    """A controller of its own at the server, with this pool alone."""
    return Cluster(network, [pool], nodes=0, controller_at=server.node)


def creation(driver, pool):
    use = Use(Volume(""), driver, RWX)
    return csi.CreateVolumeRequest(
        name="v",
        capacity_range=csi.CapacityRange(required_bytes=MIB),
        volume_capabilities=[use.capability],
        parameters={"pool": pool},
    )


def test_a_directory_that_is_not_what_the_server_shows_is_refused_and_nothing_is_made_in_it(network, data_server):
    shown, other = (data_server.tree("/srv/xfs") / name for name in ("other", "copy"))
    data_server.node.run(["/bin/cp", "-a", "/srv/xfs/pool", "/srv/xfs/copy"])  # the same records, the same identity
    (other / "mark").touch()
    before = sorted(os.listdir(other)), sorted(os.listdir(shown))
    pool = replace(pool_of(data_server, "/srv/xfs/other", "xfs"), data="/srv/xfs/copy")
    with start_with(network, data_server, pool) as cluster:
        with pytest.raises(grpc.RpcError) as caught:
            cluster.controller.call("CreateVolume", creation(cluster.controller, "xfs"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "is not the directory that" in caught.value.details()
        assert "/srv/xfs/copy" in caught.value.details()
    assert (sorted(os.listdir(other)), sorted(os.listdir(shown))) == before
    assert not [line for line in mounts_of_type(data_server.node, "nfs4") if line.split()[4].endswith("/pools/xfs")]


def mounts_of_type(node, kind):
    return [line for line in Path(f"/proc/{node.pid}/mountinfo").read_text().splitlines() if f" - {kind} " in line]


def test_a_server_that_is_away_at_the_start_is_asked_again_and_the_share_is_let_go(network, data_server):
    pool = replace(pool_of(data_server, "/srv/ext4/other", "late"), data="/srv/ext4/other")
    data_server.stop()
    try:
        with start_with(network, data_server, pool) as cluster:
            with refused("UNAVAILABLE", "late"):
                cluster.controller.call("CreateVolume", creation(cluster.controller, "late"))
            data_server.start()
            made = cluster.controller.insist("CreateVolume", creation(cluster.controller, "late"))
            assert made.volume.volume_context["limiter"] == "project quota"
            assert not [line for line in mounts_of_type(data_server.node, "nfs4") if "/pools/late" in line]
            data_server.stop()  # from now on only nodes need it
            cluster.controller.insist("DeleteVolume", csi.DeleteVolumeRequest(volume_id=made.volume.volume_id))
    finally:
        data_server.start()


def test_a_disk_that_went_away_under_a_running_controller_is_noticed(network, data_server):
    data_server.node.run(["/bin/mkdir", "-p", "/srv/bound"])
    data_server.node.run(["/bin/mount", "--bind", "/srv/xfs/other", "/srv/bound"])
    pool = replace(pool_of(data_server, "/srv/xfs/other", "gone"), data="/srv/bound")
    try:
        with start_with(network, data_server, pool) as cluster:
            cluster.controller.insist("CreateVolume", creation(cluster.controller, "gone"))
            data_server.node.run(["/bin/umount", "/srv/bound"])
            with refused("UNAVAILABLE", "is not the directory that"):
                cluster.controller.call("CreateVolume", creation(cluster.controller, "gone"))
            assert os.listdir(data_server.tree("/srv/bound")) == []
    finally:
        data_server.node.run(["/bin/umount", "/srv/bound"], check=False)
