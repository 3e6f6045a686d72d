"""A tenant who swaps his files for ways out of his volume, while it is captured and deleted: nothing outside is opened or changed."""

import contextlib
import ctypes
import os
import struct
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from csi_driver.rpc import csi_pb2 as csi
from tests.cli.trials import REPOSITORY
from tests.storm.client import RETRY, Client, create_volume
from tests.storm.content import manifest
from tests.storm.disk import Pool
from tests.storm.pools import driver_on_filesystems

pytestmark = [pytest.mark.minutes, pytest.mark.root]

SECONDS = float(os.environ.get("TATAMI_SWAP_SECONDS") or 60)
CANARY = b"CANARY-5f8a1c: nobody but root may read this"
NOBODY = "65534"
_libc = ctypes.CDLL(None, use_errno=True)
_IN_ACCESS, _IN_MODIFY, _IN_ATTRIB, _IN_OPEN, _IN_CHANGES = (
    0x1,
    0x2,
    0x4,
    0x20,
    0x3C0,
)  # inotify(7); moves, creations, deletions
_EVENT = struct.Struct("iIII")


class Watch:
    """Tells of every open, read and change of what lies outside the volumes, whoever did it."""

    def __init__(self, top: Path):
        self.descriptor = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self.paths = {}
        for path in (top, *top.rglob("*")):
            mask = _IN_ACCESS | _IN_MODIFY | _IN_ATTRIB | _IN_OPEN | _IN_CHANGES
            self.paths[_libc.inotify_add_watch(self.descriptor, os.fsencode(path), mask)] = path
        assert min(self.paths) > 0

    def seen(self) -> list[str]:
        found, data = [], b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.descriptor, 1 << 20)
        while data:
            watch, mask, _, length = _EVENT.unpack_from(data)
            found.append(f"{self.paths[watch]} {data[16 : 16 + length].rstrip(bytes(1)).decode()} {mask:#x}")
            data = data[16 + length :]
        return found


@pytest.fixture
def running(tmp_path: Path):
    with driver_on_filesystems(tmp_path) as found:
        yield found


def make_outside(pool: Pool) -> Path:
    """Make, on the pool's own filesystem, what a volume must never lead to."""
    outside = pool.root.parent / "outside"
    for folder in (outside, outside / "inner"):
        folder.mkdir(mode=0o700)
        for name in ("secret", "own", "last", "canary"):
            (folder / name).write_bytes(CANARY)
            (folder / name).chmod(0o600)
    return outside


def swapper(directory: Path, outside: Path, seconds: float) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "tests.storm.swapper", str(directory), str(outside), str(seconds)]
    started = subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def swaps_of(started: subprocess.Popen[str]) -> int:
    said = started.communicate(timeout=90)[0]
    assert started.returncode == 0
    return int(said)


def test_the_watch_and_the_search_find_what_they_are_for(tmp_path):
    outside = make_outside(Pool(tmp_path / "pool"))
    watch = Watch(outside)
    assert watch.seen() == []
    (outside / "inner" / "secret").read_bytes()
    assert watch.seen()
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "innocent").write_bytes(b"x" * 5000 + CANARY)
    (tmp_path / "copy" / "link").symlink_to(outside / "secret")
    assert leaked(tmp_path / "copy") == [f"{tmp_path}/copy/innocent"]


def test_a_tenant_who_swaps_for_a_minute_leads_no_capture_and_no_removal_out_of_his_volume(running):
    driver, pools = running
    outsides = {kind: make_outside(pool) for kind, pool in pools.items()}
    before = {kind: manifest(outside) for kind, outside in outsides.items()}
    watches = [Watch(outside) for outside in outsides.values()]
    driver.start()
    until = time.monotonic() + SECONDS
    with ThreadPoolExecutor(len(pools)) as threads:
        working = [threads.submit(torment, driver.endpoint, kind, pools[kind], outsides[kind], until) for kind in pools]
        counts = {kind: each.result() for kind, each in zip(pools, working, strict=True)}
    for pool in pools.values():
        pool.wait_until_swept(30)
        assert (pool.unnamed(), pool.missing()) == ([], [])
    assert driver.stop() == 0
    events = [event for watch in watches for event in watch.seen()]
    print(counts)
    assert events == []
    assert {kind: manifest(outside) for kind, outside in outsides.items()} == before
    for kind, counted in counts.items():
        assert counted["swaps"] > 100 * SECONDS, kind
        # How many there are in a minute is for how busy the machine is to say.
        assert min(counted[each] for each in ("snapshot", "restore", "clone")) > 0, kind


def torment(endpoint: str, kind: str, pool: Pool, outside: Path, until: float) -> Counter:
    """Capture a volume whose tenant swaps, and delete what was captured while another tenant swaps in there."""
    counts: Counter = Counter()
    with Client(endpoint) as client:
        source = client.call("CreateVolume", create_volume(f"source-{kind}", pool=kind, uid=NOBODY)).volume.volume_id
        tenants = [swapper(pool.directory_of(source), outside, until - time.monotonic()) for _ in range(2)]
        number = 0
        while time.monotonic() < until:
            number += 1
            name = f"{kind}-{number}"
            parameters = {"digests": "true"} if number % 2 else {}
            request = csi.CreateSnapshotRequest(name=name, source_volume_id=source, parameters=parameters)
            answer = ask(client, "CreateSnapshot", request, counts)
            snapshot = answer.snapshot.snapshot_id
            counts["snapshot"] += 1
            assert leaked(pool.snapshot_data(snapshot)) == []
            restored = make(client, create_volume(f"restore-{name}", snapshot=snapshot, pool=kind, uid=NOBODY), counts)
            clone = make(client, create_volume(f"clone-{name}", volume=source, pool=kind, uid=NOBODY), counts)
            counts["restore"] += 1
            counts["clone"] += 1
            for volume in (restored, clone):
                assert leaked(pool.directory_of(volume)) == []
            last = swapper(pool.directory_of(clone), outside, 0.5)
            ask(client, "DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=snapshot), counts)
            for volume in (clone, restored):
                ask(client, "DeleteVolume", csi.DeleteVolumeRequest(volume_id=volume), counts)
            counts["swaps while it is removed"] += swaps_of(last)
        counts["swaps"] = sum(swaps_of(tenant) for tenant in tenants)
        ask(client, "DeleteVolume", csi.DeleteVolumeRequest(volume_id=source), counts)
    return counts


def make(client: Client, request: csi.CreateVolumeRequest, counts: Counter) -> str:
    return ask(client, "CreateVolume", request, counts).volume.volume_id


def ask(client: Client, method: str, request, counts: Counter):
    until = time.monotonic() + 60
    while True:
        try:
            return client.call(method, request, 20)
        except grpc.RpcError as error:
            code, said = error.code(), str(error.details())
        assert code in RETRY, (method, code, said)
        assert time.monotonic() < until, (method, said)
        counts["torn away" if "moved" in said else "asked again"] += 1
        time.sleep(0.05)


def leaked(top: Path) -> list[str]:
    """List what holds the canary, or has its name; symlinks are what they are, and not followed."""
    found = []
    for folder, folders, names in os.walk(top):
        for name in (*folders, *names):
            path = Path(folder, name)
            if name == "canary" or (path.is_file() and not path.is_symlink() and CANARY in path.read_bytes()):
                found.append(str(path))
    return found
