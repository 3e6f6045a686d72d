"""How long things take beside other ways to do them, on the same mount and in the same guest: ratios, never seconds alone.

Whether something is faster is asserted here; by how much is for the benchmark (tests/bench/nfs.py) to say, for which each test prints
a line `FIGURE {…}`, seconds by what was done. TATAMI_SPEED_FILES and TATAMI_SPEED_MIB say how large the trees are.
"""

import itertools
import json
import os
import pathlib
import statistics
import sys
import time

import pytest
from driver_in_guest import Cluster, pool_of, shell

from csi_driver.rpc import csi_pb2 as csi

FILES = int(os.environ.get("TATAMI_SPEED_FILES", "2000"))
LARGE_BYTES = int(os.environ.get("TATAMI_SPEED_MIB", "1024")) << 20
NAMES = itertools.count()
# What csi-driver-nfs does for each call: mount the share, make or remove the directory, unmount.
PEER = """
import os, shutil, subprocess, sys, tempfile, time
source, rounds = sys.argv[1], int(sys.argv[2])
def mounted(act):
    place = tempfile.mkdtemp()
    subprocess.run(["/sbin/mount.nfs", source, place, "-o", "vers=4.2"], check=True)
    try:
        act(place)
    finally:
        subprocess.run(["/bin/umount", place], check=True)
        os.rmdir(place)
for number in range(rounds):
    began = time.monotonic()
    mounted(lambda place: os.mkdir(f"{place}/peer-{number}"))
    mounted(lambda place: shutil.rmtree(f"{place}/peer-{number}"))
    print(time.monotonic() - began)
"""


@pytest.fixture(scope="module")
def cluster(network, server):
    """A controller and a node, a pool on an XFS with room for some gigabytes."""
    path = server.filesystem("xfs", size=8 << 30, name="speed")
    server.export(path)
    with Cluster(network, [pool_of(server, path)], nodes=1) as cluster:
        yield cluster


def timed(act) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


def show(**seconds: float) -> None:
    print(f"FIGURE {json.dumps({name: round(value, 4) for name, value in seconds.items()})}")


def directory_of(cluster, volume) -> str:
    """Say where a volume lies in its pool."""
    use = cluster.use(volume)
    directory = cluster.attach(use)["directory"]
    cluster.detach(use)
    return directory


def captures(cluster, volume) -> dict[str, list[float]]:
    """Snapshot, restore and clone a volume three times; return the seconds of each."""
    taken: dict[str, list[float]] = {"snapshot": [], "restore": [], "clone": []}
    for _ in range(3):
        name = f"speed-{next(NAMES)}"
        made = []
        taken["snapshot"].append(timed(lambda name=name, made=made: made.append(cluster.snapshot(name, volume))))
        taken["restore"].append(timed(lambda name=name, made=made: made.append(cluster.create(f"{name}-r", snapshot=made[0]))))
        taken["clone"].append(
            timed(lambda name=name, made=made: made.append(cluster.create(f"{name}-c", volume=volume.handle)))
        )
        for each in made[1:]:
            cluster.delete(each)
        cluster.controller.insist("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=made[0]))
    return taken


def test_a_gibibyte_is_captured_and_restored_in_the_time_of_a_few_bytes(cluster, server):
    little, large = cluster.create("little"), cluster.create("large")
    shell(server.node, f"echo content >/srv/speed/{directory_of(cluster, little)}/file")
    file = f"/srv/speed/{directory_of(cluster, large)}/file"
    shell(
        server.node,
        f"dd if=/dev/urandom of=/tmp/block bs=1M count=32 status=none; for i in $(seq {LARGE_BYTES >> 25}); do cat /tmp/block; done >{file}; sync {file}",
        timeout=200,
    )
    assert pathlib.Path(server.tree(file)).stat().st_size == LARGE_BYTES
    small, big = captures(cluster, little), captures(cluster, large)
    for what, taken in (("8 bytes", small), ("large", big)):
        show(**{f"{what}: {kind}": statistics.median(values) for kind, values in taken.items()})
    for kind in big:
        few, many = statistics.median(small[kind]), statistics.median(big[kind])
        print(
            f"{kind}: {LARGE_BYTES >> 20} MiB in {many * 1000:.0f} ms, 8 bytes in {few * 1000:.0f} ms: {(many - few) * 1000:+.0f} ms"
        )
        # Reading and writing a GiB takes a hundred times as long; sharing its extents is what is left.
        assert many <= 3 * few + 0.2
    # For comparison: the same file by what a copy without sharing costs, in the server itself.
    copied = timed(
        lambda: shell(
            server.node, f"cp --reflink=never {file} /srv/speed/copy && sync /srv/speed/copy && rm /srv/speed/copy", timeout=200
        )
    )
    print(f"copying it on the server itself takes {copied * 1000:.0f} ms")
    assert statistics.median(big["snapshot"]) < copied / 3
    for each in (little, large):
        cluster.delete(each)


def test_many_small_files_are_captured_faster_than_by_cp_on_the_same_mount(cluster, server):
    volume = cluster.create("many")
    directory = directory_of(cluster, volume)
    script = "import os, sys\nfor n in range(int(sys.argv[2])):\n    d = f'{sys.argv[1]}/d{n // 100}'\n    n % 100 or os.mkdir(d)\n    open(f'{d}/f{n}', 'wb').write(os.urandom(1 + n % 4000))"
    server.node.python(script, f"/srv/speed/{directory}", str(FILES), timeout=120)
    controller = cluster.controller.node
    place = controller.mount(server.node, "/srv/speed", "/mnt/speed")
    server.delay(1)
    try:
        ours, theirs = [], []
        for _ in range(2 if FILES <= 2000 else 1):
            name = f"many-{next(NAMES)}"
            cp = f"cp -a --reflink=auto {place}/{directory} {place}/{name} && sync -f {place}/{name}"
            theirs.append(timed(lambda cp=cp: shell(controller, cp, timeout=500)))
            ours.append(timed(lambda name=name: cluster.create(name, volume=volume.handle)))
    finally:
        server.delay(0)
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(
        f"{FILES} files, 1 ms away: {statistics.median(ours):.2f} s, cp -a {statistics.median(theirs):.2f} s: {ratio:.1f} times as fast"
    )
    show(**{"small files: clone": statistics.median(ours), "small files: cp -a": statistics.median(theirs)})
    controller.detach(place)
    assert ratio > 1


def test_volumes_are_made_and_deleted_faster_than_with_a_mount_for_each_call(cluster, server, network):
    peer = network.node("peer")
    ours: list[float] = []
    theirs: list[float] = []
    share = f"{server.address}:/srv/speed"
    shell(server.node, "mkdir -p /srv/speed/peer")

    def both() -> None:
        name = f"rate-{next(NAMES)}"
        cluster.delete(cluster.create(name))

    both()
    for _ in range(4):
        ours += [timed(both) for _ in range(10)]
        theirs += map(float, peer.run([sys.executable, "-c", PEER, f"{share}/peer", "5"], timeout=120).stdout.split())
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(
        f"create and delete: {statistics.median(ours) * 1000:.1f} ms, with mounts {statistics.median(theirs) * 1000:.1f} ms: {ratio:.1f} times the rate"
    )
    show(**{"create and delete": statistics.median(ours), "create and delete, a mount for each": statistics.median(theirs)})
    peer.close()
    assert ratio > 1
