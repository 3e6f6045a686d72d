"""Snapshots, restores and clones on a server: complete, by the best way that the protocol has, also across a crash."""

import contextlib
import hashlib
import json
import os
import pathlib
import stat
import subprocess
import sys
import threading
import time

import grpc
import pytest
from driver_in_guest import refused, shell

from csi_driver.linux.digests import digest_file
from csi_driver.rpc import csi_pb2 as csi


def fill(top: pathlib.Path, *, xattrs: bool) -> None:
    """Put one of everything into a volume; as root of a node, over NFS."""
    (top / "dir/deep").mkdir(parents=True)
    for number in range(20):
        (top / f"dir/file-{number}").write_bytes(os.urandom(1 + number * 700))
    (top / "large").write_bytes(os.urandom(3 << 20))
    with (top / "sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(8 << 20)
        file.write(b"end")
    os.link(top / "large", top / "dir/deep/same")
    os.symlink("../nowhere", top / "dir/link")
    os.mkfifo(top / "dir/fifo")
    os.chown(top / "dir/file-1", 1234, 5678)
    os.chown(top / "dir/link", 4321, 8765, follow_symlinks=False)
    os.chown(top / "dir/deep", 99, 99)
    (top / "dir/file-2").chmod(0o640)
    (top / "dir/file-3").chmod(0o4755)
    (top / "dir").chmod(0o2775)
    if xattrs:
        os.setxattr(top / "large", "user.colour", b"blue")
        os.setxattr(top / "dir/deep", "user.depth", b"\x00\xff")
    for path in sorted(top.rglob("*"), reverse=True):
        os.utime(path, ns=(10**18 + 17, 10**18 + 123456789), follow_symlinks=False)


def described(top: pathlib.Path, *, xattrs: bool) -> dict:
    """Say of each entry all that must survive."""
    found = {}
    inodes: dict[int, str] = {}
    for path in sorted(top.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(top))
        entry = [oct(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns, inodes.setdefault(status.st_ino, name)]
        if stat.S_ISREG(status.st_mode):
            entry += [status.st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
        if stat.S_ISLNK(status.st_mode):
            entry.append(os.readlink(path))
        elif xattrs and (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            entry.append({key: os.getxattr(path, key) for key in os.listxattr(path) if key.startswith("user.")})
        found[name] = entry
    return found


def mounted(cluster, volume, node: int = 0) -> pathlib.Path:
    """Mount a volume on a node; return its path as the test process reaches it."""
    use = cluster.use(volume, node)
    return use.driver.node.path(cluster.mount(use))


@pytest.mark.parametrize("pool", ["default", "v41", "v3"])
def test_a_snapshot_a_restore_and_a_clone_are_complete(cluster, story_server, pool):
    xattrs = pool == "default"  # RFC 8276: from 4.2 on
    origin = cluster.create(f"origin-{pool}", pool=pool)
    top = mounted(cluster, origin)
    fill(top, xattrs=xattrs)
    expected = described(top, xattrs=xattrs)
    snapshot = cluster.snapshot(f"snapshot-{pool}", origin)
    # After the cut, the origin goes its own way.
    (top / "large").write_bytes(b"changed")
    (top / "dir/file-0").unlink()
    restored = cluster.create(f"restored-{pool}", pool=pool, snapshot=snapshot)
    assert described(mounted(cluster, restored, 1), xattrs=xattrs) == expected
    clone = cluster.create(f"clone-{pool}", pool=pool, volume=restored.handle)
    found = mounted(cluster, clone, 1)
    assert described(found, xattrs=xattrs) == expected
    # Holes stay holes, as far as the protocol can tell where they are (SEEK_HOLE: 4.2), and zeros do not come instead.
    if pool == "default":
        assert (found / "sparse").stat().st_blocks * 512 < 1 << 20
    for volume, node in ((origin, 0), (restored, 1), (clone, 1)):
        cluster.unmount(cluster.use(volume, node))
        cluster.delete(volume)
    cluster.controller.insist("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=snapshot))


def test_over_42_on_xfs_a_snapshot_shares_every_extent_with_its_volume(cluster, story_server):
    origin = cluster.create("sharing", pool="default")
    top = mounted(cluster, origin)
    (top / "large").write_bytes(os.urandom(16 << 20))
    shell(cluster.nodes[0], f"sync -f {cluster.use(origin).target}")
    snapshot = cluster.snapshot("sharing", origin)
    clone = cluster.create("sharing-clone", pool="default", snapshot=snapshot)
    place = next(story_server.tree("/srv/xfs/default/.csi/snapshots-data").glob(f"{snapshot.rpartition('.')[2]}/large"))
    assert extents(story_server, f"/srv/xfs/default/.csi/snapshots-data/{place.parent.name}/large") == {"shared"}
    assert extents(story_server, f"/srv/xfs/default/{cluster.attach(cluster.use(clone))['directory']}/large") == {"shared"}
    cluster.detach(cluster.use(clone))
    cluster.unmount(cluster.use(origin))


# Below 4.2 the server copies nothing, but the client's kernel does, without the data passing through the driver.
@pytest.mark.parametrize(("pool", "method"), [("default", "reflink"), ("v41", "copy_file_range"), ("v3", "copy_file_range")])
def test_what_a_share_can_do_is_tried_out_and_nothing_of_the_trial_stays(cluster, story_server, pool, method):
    origin = cluster.create(f"tried-{pool}", pool=pool)
    top = mounted(cluster, origin)
    (top / "file").write_bytes(os.urandom(1 << 20))
    shell(cluster.nodes[0], f"sync -f {cluster.use(origin).target}")
    snapshot = cluster.snapshot(f"tried-{pool}", origin)
    control = story_server.tree(f"/srv/xfs/{pool}/.csi")
    record = json.loads((control / "snapshots" / f"{snapshot.rpartition('.')[2]}.json").read_text())
    assert record["capture"]["method"] == method
    assert record["consistency"] == "file by file"
    assert not list((control / "staging").iterdir())
    cluster.controller.insist("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=snapshot))
    cluster.unmount(cluster.use(origin))
    cluster.delete(origin)


def extents(server, path: str) -> set[str]:
    """Return the kinds of a file's extents on the server's own filesystem, from filefrag's flags (FIEMAP)."""
    lines = server.node.run(["/usr/sbin/filefrag", "-v", path]).stdout.splitlines()
    rows = [line for line in lines if line.strip()[:1].isdigit()]
    assert rows, lines
    return {"shared" if "shared" in line else "own" for line in rows}


def test_a_controller_that_is_killed_during_captures_leaves_nothing_half_and_the_retry_is_whole(cluster, story_server):
    # Over 4.1 each file is read and written, which takes long enough to be killed in the midst of.
    origin = cluster.create("killed", pool="v41")
    top = mounted(cluster, origin)
    for number in range(150):
        (top / f"file-{number}").write_bytes(os.urandom(2000))
    for number in range(6):
        (top / f"large-{number}").write_bytes(os.urandom(4 << 20))
    expected = described(top, xattrs=False)
    control = story_server.tree("/srv/xfs/v41/.csi")
    request = csi.CreateSnapshotRequest(name="killed", source_volume_id=origin.handle)
    caught = 0
    for delay in (0.1, 0.3, 0.6, 1.0):
        threading.Thread(target=ask, args=(cluster.controller, request), daemon=True).start()
        until = time.monotonic() + 20
        while not any((control / "staging").iterdir()) and time.monotonic() < until:
            time.sleep(0.005)
        time.sleep(delay)
        caught += any((control / "staging").iterdir())
        cluster.controller.kill()
        # What is there is the whole snapshot or none.
        for place in (control / "snapshots-data").iterdir():
            assert described(place, xattrs=False) == expected
        cluster.controller.start()
    assert caught, "no kill came while a copy was under way"
    snapshot = cluster.snapshot("killed", origin)
    restored = cluster.create("killed-restored", pool="v41", snapshot=snapshot)
    assert described(mounted(cluster, restored, 1), xattrs=False) == expected
    assert not list((control / "staging").iterdir())
    cluster.unmount(cluster.use(origin))
    cluster.unmount(cluster.use(restored, 1))


def ask(driver, request) -> None:
    """Ask once; the answer does not come."""
    with contextlib.suppress(grpc.RpcError, ValueError):  # ValueError: the channel was closed meanwhile
        driver.call("CreateSnapshot", request, 30)


# Makes and removes directories and files for as long as it lives. What is complete has the digest of its content for a name.
CHURN = """
import hashlib, os, shutil, sys
top = sys.argv[1]
print("begun", flush=True)
while True:
    for number in range(8):
        below = f"{top}/churn-{number}/below"
        os.makedirs(below)
        for file in range(6):
            content = os.urandom(100_000)
            with open(f"{below}/new", "wb") as new:
                new.write(content)
            os.rename(f"{below}/new", f"{below}/{hashlib.sha256(content).hexdigest()}")
    for number in range(8):
        shutil.rmtree(f"{top}/churn-{number}")
"""


@pytest.mark.parametrize("pool", ["default", "v41", "v3"])
def test_a_pod_that_makes_and_removes_directories_meanwhile_fails_no_capture_and_halves_no_file(cluster, story_server, pool):
    origin = cluster.create(f"churned-{pool}", pool=pool)
    top = mounted(cluster, origin)
    fill(top, xattrs=False)
    expected = described(top, xattrs=False)
    busy = cluster.use(origin, 1)
    target = cluster.mount(busy)
    pod = busy.driver.node.popen([sys.executable, "-c", CHURN, str(target)], stdout=subprocess.PIPE, text=True)
    assert pod.stdout.readline() == "begun\n"
    control = story_server.tree(f"/srv/xfs/{pool}/.csi")
    vanished = captures = 0
    until = time.monotonic() + 60
    while captures < 5 or (not vanished and time.monotonic() < until):
        captures += 1
        snapshot = cut_at_one_go(cluster, f"churned-{pool}-{captures}", origin)
        short = snapshot.rpartition(".")[2]
        record = json.loads((control / "snapshots" / f"{short}.json").read_text())
        assert set(record["capture"]["not_carried"]) <= {"vanished"}
        vanished += record["capture"]["not_carried"].get("vanished", 0)
        place = control / "snapshots-data" / short
        found = described(place, xattrs=False)
        assert {name: entry for name, entry in found.items() if not name.startswith("churn-")} == expected
        for name in found:
            if len(pathlib.Path(name).name) == 64:
                assert hashlib.sha256((place / name).read_bytes()).hexdigest() == pathlib.Path(name).name
        cluster.controller.insist("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=snapshot))
    assert pod.poll() is None
    pod.kill()
    pod.wait(10)
    pod.stdout.close()
    assert vanished, f"nothing was removed in the midst of {captures} captures"
    cluster.unmount(busy)
    cluster.unmount(cluster.use(origin))
    cluster.delete(origin)


def cut_at_one_go(cluster, name: str, origin) -> str:
    """Make a snapshot, and stand no failure that may pass: only "still at it"."""
    request = csi.CreateSnapshotRequest(name=name, source_volume_id=origin.handle)
    until = time.monotonic() + 120
    while True:
        try:
            return cluster.controller.call("CreateSnapshot", request).snapshot.snapshot_id
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.ABORTED or time.monotonic() > until:
                raise
        time.sleep(0.2)


# Below 4.2 the protocol does not say where holes are.
@pytest.mark.parametrize("pool", ["default", "v41", "v3"])
def test_a_large_file_with_little_in_it_stays_sparse_and_is_equal(cluster, story_server, pool):
    origin = cluster.create(f"sparse-{pool}", pool=pool)
    top = mounted(cluster, origin)
    with (top / "sparse").open("wb") as file:
        file.write(os.urandom(10_000))
        file.seek(512 << 20)
        file.write(os.urandom(3))
        file.truncate(1 << 30)
        file.seek((1 << 30) - 5000)
        file.write(os.urandom(5000))
    shell(cluster.nodes[0], f"sync -f {cluster.use(origin).target}")
    snapshot = cluster.snapshot(f"sparse-{pool}", origin)
    data = story_server.tree(f"/srv/xfs/{pool}")
    copy = data / ".csi/snapshots-data" / snapshot.rpartition(".")[2] / "sparse"
    assert copy.stat().st_blocks * 512 < 1 << 20
    digests = []
    for path in (data / cluster.attach(cluster.use(origin))["directory"] / "sparse", copy):
        with path.open("rb") as file:
            digests.append(digest_file(file.fileno(), lambda: False, lambda _: None))
    assert digests[0] == digests[1]
    cluster.controller.insist("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=snapshot))
    if pool != "default":
        shell(cluster.nodes[0], f"truncate -s 100T {cluster.use(origin).target}/absurd")
        with refused("FAILED_PRECONDITION", "absurd"):
            request = csi.CreateSnapshotRequest(name=f"absurd-{pool}", source_volume_id=origin.handle)
            cluster.controller.insist("CreateSnapshot", request)
        assert not list((data / ".csi/staging").iterdir())
    cluster.unmount(cluster.use(origin))
    cluster.delete(origin)
