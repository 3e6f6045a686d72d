"""Image volumes and raw block on an NFS 4.2 server, for two nodes of one controller."""

import itertools
import os

import pytest
from driver_in_guest import CHECKOUT, KUBELET, RWO, RWX, Cluster, Driver, pool_of, refused, shell, sources

from tests.sanity.test_sanity import counts_of, sanity_command

MIB = 1024**2
LEAST = {"ext4": 16 * MIB, "xfs": 300 * MIB}
NAMES = itertools.count()


@pytest.fixture(scope="module")
def cluster(network, server, xfs):
    server.tree(xfs / "images").mkdir()
    with Cluster(network, [pool_of(server, xfs / "images")], driver_options="max_volumes_per_node = 8") as cluster:
        yield cluster


@pytest.fixture
def make(cluster):
    """Makes an image of a kind, and how a node uses it; whatever is left is taken away."""
    used = []

    def make_use(kind="ext4", node=0, volume=None, **how):
        what = {"block": True} if kind == "block" else {"fs_type": kind}
        size = how.pop("size", LEAST.get(kind, 16 * MIB))
        made = volume or cluster.create(f"image-{next(NAMES)}", access=RWO, size=size, layout="image", **what, **how)
        use = cluster.use(made, node, mode=RWO, **what)
        used.append(use)
        return use

    yield make_use
    for use in used:
        cluster.unmount(use)
    for use in {use.volume.handle: use for use in used}.values():
        cluster.delete(use.volume)
    assert attached() == ""


def attached() -> str:
    return os.popen("losetup -l -n -O BACK-FILE | grep '/image$'").read()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_what_one_node_writes_the_next_reads(cluster, make, kind):
    use = make(kind)
    cluster.mount(use)
    assert mounted_direct_io() == "1"
    shell(use, f"echo content >{use.target}/file; chmod 777 {use.target}")
    other = make(kind, 1, use.volume)
    with refused("FAILED_PRECONDITION", "one node at a time"):
        cluster.attach(other)
    cluster.unmount(use)
    assert attached() == ""
    cluster.mount(other)
    assert shell(other, f"cat {other.target}/file") == "content\n"


def mounted_direct_io() -> str:
    return os.popen("losetup -l -n -O DIO,BACK-FILE | grep '/image$'").read().split()[0]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_writes_stop_at_the_size_and_go_on_when_it_has_grown(cluster, make, kind, user):
    use = make(kind)
    cluster.mount(use)
    shell(use, f"chmod 777 {use.target}")
    fill = (
        f"setpriv --reuid {user} --clear-groups dd if=/dev/zero of={use.target}/filler bs=64k conv=fsync,notrunc oflag=append"
    )
    said = shell(use, fill, 200, check=False).stderr
    assert "No space left on device" in said
    first = int(shell(use, f"stat -c %s {use.target}/filler"))
    assert first <= LEAST[kind]
    assert cluster.expand(use, 2 * LEAST[kind]) == 2 * LEAST[kind]  # mounted, ext4 too: here is CAP_SYS_RESOURCE
    assert int(shell(use, f"df -B1 --output=size {use.target} | tail -1")) > 1.7 * LEAST[kind]
    shell(use, fill, 200, check=False)
    assert int(shell(use, f"stat -c %s {use.target}/filler")) > first + 0.8 * LEAST[kind]


def test_a_snapshot_under_a_writer_is_a_sound_filesystem(cluster, make):
    use = make("ext4", size=64 * MIB)
    cluster.mount(use)
    shell(use, f"echo content >{use.target}/before; sync")
    script = f"while :; do for i in $(seq 50); do head -c 20000 /dev/urandom >{use.target}/f$i; done; done"
    writer = use.driver.node.popen(["/bin/bash", "-c", script])
    try:
        snapshot = cluster.snapshot(f"snapshot-{next(NAMES)}", use.volume)
    finally:
        writer.kill()
        writer.wait()
    made = cluster.create(
        f"restored-{next(NAMES)}", access=RWO, size=64 * MIB, snapshot=snapshot, fs_type="ext4", layout="image"
    )
    restored = make("ext4", 1, made)
    cluster.mount(restored)
    assert shell(restored, f"cat {restored.target}/before") == "content\n"


def test_raw_block_is_grown_under_its_user_and_read_only_where_it_shall_be(cluster, make):
    use = make("block")
    cluster.mount(use)
    shell(use, f"echo mine | dd of={use.target} conv=notrunc,fsync 2>/dev/null")
    assert shell(use, f"blockdev --getsize64 {use.target}") == f"{16 * MIB}\n"
    assert cluster.expand(use, 40 * MIB) == 40 * MIB
    assert shell(use, f"blockdev --getsize64 {use.target}") == f"{40 * MIB}\n"
    reader = cluster.use(use.volume, 0, mode=RWO, block=True, readonly=True, pod="reader")
    cluster.publish(reader)
    assert shell(reader, f"head -c 4 {reader.target}") == "mine"
    # As a pod without capabilities: who has CAP_SYS_ADMIN makes any device writable.
    shell(reader, f"setpriv --bounding-set=-all blockdev --setrw {reader.target}", check=False)
    done = shell(reader, f"dd if=/dev/zero of={reader.target} bs=4k count=1 conv=notrunc,fsync", check=False)
    assert done.returncode != 0
    assert shell(reader, f"head -c 4 {reader.target}") == "mine"
    cluster.unpublish(reader)


@pytest.mark.parametrize("kind", ["block", "ext4"])
def test_an_image_grows_again_and_again_where_its_controller_runs_on_its_node(cluster, make, kind):
    use = make(kind)
    cluster.mount(use)
    elsewhere = cluster.controller
    # One NFS client for the server: what it delegates to the node it does not take back when the controller makes the file larger.
    cluster.controller = Driver(use.driver.node, cluster.config, "controller")
    try:
        cluster.controller.start()
        for size in (40 * MIB, 64 * MIB, 96 * MIB):
            assert cluster.expand(use, size) == size
        cluster.controller.stop()  # and so unmount what it has mounted on somebody else's node
    finally:
        cluster.controller.close()
        cluster.controller = elsewhere


def test_a_node_that_is_not_the_controller_s_choice_is_refused_at_stage(cluster, make):
    use = make("ext4")
    told = cluster.attach(use)
    cluster.stage(use)
    other = make("ext4", 1, use.volume)
    with refused("FAILED_PRECONDITION", "held by node"):
        cluster.stage(other, told)
    cluster.publish(use)
    shell(use, f"echo intact >{use.target}/file; sync")


def test_a_killed_node_process_finds_its_image_again(cluster, make):
    use = make("ext4")
    cluster.mount(use)
    shell(use, f"echo content >{use.target}/file")
    use.driver.kill()
    use.driver.start()
    cluster.stage(use)
    cluster.publish(use)
    assert shell(use, f"cat {use.target}/file") == "content\n"
    assert len(attached().splitlines()) == 1


def test_several_nodes_at_once_are_refused_when_the_volume_is_made(cluster):
    with refused("INVALID_ARGUMENT", "one node at a time"):
        cluster.create("shared", access=RWX, layout="image")


@pytest.mark.parametrize("form", ["image", "block"])
def test_csi_sanity(cluster, tmp_path, form):
    built = sorted((CHECKOUT / ".cache/bin").glob("csi-sanity-*"))
    binary = os.environ.get("CSI_SANITY") or (str(built[-1]) if built else "")
    assert binary, "no csi-sanity: run `make sanity`, or name it in CSI_SANITY"
    node = cluster.nodes[0]
    command = sanity_command(binary, tmp_path, node.endpoint, cluster.controller.endpoint, KUBELET, form)
    done = node.node.run(command, timeout=500, check=False)
    counts = counts_of(done.stdout + done.stderr)
    print("csi-sanity:", counts)
    assert counts == {"passed": 102, "failed": 0, "pending": 1, "skipped": 0}, f"{done.stdout[-20000:]}\n{node.tail()}"
    assert not sources(node.node)
    assert attached() == ""
