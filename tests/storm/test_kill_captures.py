"""`kill -9` in the midst of snapshots, restores and clones, on every rung of the capture ladder: the retry is right, and nothing is left."""

import contextlib
import errno
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from csi_driver.rpc import csi_pb2 as csi
from tests.driver_process import DriverProcess
from tests.storm.client import RETRY, Client, create_volume
from tests.storm.content import HEAVY, Manifest, change, difference, fill, manifest
from tests.storm.disk import Pool
from tests.storm.pools import METHODS, driver_on_filesystems

pytestmark = [pytest.mark.minutes, pytest.mark.root, pytest.mark.timeout(1800)]

SEED = os.environ.get("TATAMI_STORM_SEED") or str(random.SystemRandom().randrange(10**9))
KILLS = int(os.environ.get("TATAMI_STORM_KILLS") or 200)
SPANS = {"ext4": (0.02, 0.1, 0.4), "xfs": (0.02, 0.05, 0.2), "btrfs": (0.005, 0.02, 0.05)}
"""Seconds within which a kill comes, so that it meets a capture at all of its steps: one takes much longer than another."""
CLEAN_EVERY, SWEEP_SECONDS, RETRY_SECONDS = 20, 20, 60


@dataclass
class Site:
    """What lives in one pool: a source that goes on changing, the snapshot of it that must not, a restore that somebody uses."""

    kind: str
    pool: Pool
    source: str
    rng: random.Random
    counts: Counter = field(default_factory=Counter)
    snapshot: csi.Snapshot = None
    held: Manifest = None
    restore_name: str = ""
    restored: str = ""
    used: Manifest = None
    restored_from: str = ""
    outlived: list = field(default_factory=list)


@pytest.fixture
def running(tmp_path: Path):
    with driver_on_filesystems(tmp_path) as found:
        yield found


def test_captures_that_are_killed_200_times_are_right_after_the_retry(running):
    driver, pools = running
    print(f"TATAMI_STORM_SEED={SEED} TATAMI_STORM_KILLS={KILLS}")
    rng = random.Random(SEED)
    driver.start()
    with Client(driver.endpoint) as client:
        sites = [begin(client, kind, pool) for kind, pool in pools.items()]
    for kill in range(1, KILLS + 1):
        # The one at whom the kill is aimed sets the moment; the others are met wherever they are.
        aim = sites[kill % len(sites)].kind
        storm(driver, sites, kill, rng.uniform(0, rng.choice(SPANS[aim])))
        if kill % CLEAN_EVERY == 0 or kill == KILLS:
            for site in sites:
                site.pool.wait_until_swept(SWEEP_SECONDS)
                assert (site.pool.unnamed(), site.pool.missing()) == ([], []), (kill, site.kind)
                check_what_was_acknowledged(site, kill)
    assert driver.stop() == 0
    for site in sites:
        print(site.kind, dict(sorted(site.counts.items())))
        assert site.counts["torn"] > KILLS / 40, "hardly a kill came in the midst of a capture"
        assert min(site.counts[each] for each in OPERATIONS) > KILLS / 20


def begin(client: Client, kind: str, pool: Pool) -> Site:
    source = client.call("CreateVolume", create_volume(f"source-{kind}", pool=kind)).volume.volume_id
    site = Site(kind, pool, source, random.Random(f"{SEED}/{kind}"))
    fill(pool.directory_of(source), site.rng, HEAVY)
    take_snapshot(client, site, f"first-{kind}", None)
    make_restore(client, site, f"first-{kind}", None)
    return site


def storm(driver: DriverProcess, sites: list[Site], number: int, moment: float) -> None:
    """Ask for something in each pool, kill the driver in the midst of it, and ask again until it is answered."""
    chosen = [site.rng.choice(list(OPERATIONS)) for site in sites]
    dead = threading.Event()
    with Client(driver.endpoint) as client, ThreadPoolExecutor(len(sites)) as pool:
        client.wait_until_connected(threading.Event())
        jobs = [
            pool.submit(OPERATIONS[what], client, site, f"{what}-{site.kind}-{number}", dead)
            for what, site in zip(chosen, sites, strict=True)
        ]
        time.sleep(moment)
        driver.kill()
        dead.set()
        answered = [job.result() for job in jobs]
    for site in sites:
        site.counts["torn"] += is_torn(site.pool)
    driver.spawn()
    for site in sites:
        check_what_was_acknowledged(site, number)  # while it starts, and takes up what it left
    driver.wait_until_ready()
    with Client(driver.endpoint) as client:
        for what, site, done in zip(chosen, sites, answered, strict=True):
            site.counts[what] += 1
            site.counts["answered before the kill"] += done
            if not done:
                assert OPERATIONS[what](client, site, f"{what}-{site.kind}-{number}", None)
            while site.outlived:
                ask(client, *site.outlived.pop(), None)
            if number % 2:
                change(site.pool.directory_of(site.source), site.rng)


def is_torn(pool: Pool) -> bool:
    records = [*pool.records("volumes").values(), *pool.records("snapshots").values()]
    return bool(os.listdir(pool.control / "staging")) or any(record["phase"] != "ready" for record in records)


# --- what is asked for: with `dead` once, for as long as the driver lives; without until it is answered ---------------------------------


def take_snapshot(client: Client, site: Site, name: str, dead: threading.Event | None) -> bool:
    """Cut a snapshot of the source; it takes the place of the last one, which is deleted."""
    request = csi.CreateSnapshotRequest(name=name, source_volume_id=site.source)
    answer = ask(client, "CreateSnapshot", request, dead)
    if answer is None:
        return False
    old, site.snapshot = site.snapshot, answer.snapshot
    site.held = manifest(site.pool.directory_of(site.source))  # nobody writes to it while a call runs
    assert answer.snapshot.ready_to_use
    assert site.pool.record("snapshots", answer.snapshot.snapshot_id)["capture"]["method"] == METHODS[site.kind]
    if old is not None:
        site.outlived.append(("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=old.snapshot_id)))
    return True


def make_restore(client: Client, site: Site, name: str, dead: threading.Event | None) -> bool:
    """Restore the snapshot into a volume that somebody writes to from then on; the last one is deleted."""
    answer = ask(client, "CreateVolume", restore(site, name), dead)
    if answer is None:
        return False
    old, site.restored, site.restore_name = site.restored, answer.volume.volume_id, name
    top = site.pool.directory_of(site.restored)
    found = manifest(top)
    assert found == site.held, f"restore on {site.kind}: {difference(found, site.held)}"
    change(top, site.rng)
    (top / "written by a pod").write_bytes(site.rng.randbytes(1000))
    site.used = manifest(top)
    site.restored_from = site.snapshot.snapshot_id
    if old:
        site.outlived.append(("DeleteVolume", csi.DeleteVolumeRequest(volume_id=old)))
    return True


def repeat_restore(client: Client, site: Site, _name: str, dead: threading.Event | None) -> bool:
    """Ask once more for the restore that is there and in use."""
    answer = ask(client, "CreateVolume", restore(site, site.restore_name, site.restored_from), dead)
    assert answer is None or answer.volume.volume_id == site.restored
    return answer is not None


def make_clone(client: Client, site: Site, name: str, dead: threading.Event | None) -> bool:
    answer = ask(client, "CreateVolume", create_volume(name, volume=site.source, pool=site.kind), dead)
    if answer is None:
        return False
    expected, found = (manifest(site.pool.directory_of(each)) for each in (site.source, answer.volume.volume_id))
    assert found == expected, f"clone on {site.kind}: {difference(found, expected)}"
    if dead is not None:
        site.counts["clones left for the end"] += 1
        return False  # asked for again, answered the same, and deleted then
    ask(client, "DeleteVolume", csi.DeleteVolumeRequest(volume_id=answer.volume.volume_id), None)
    return True


OPERATIONS = {"snapshot": take_snapshot, "restore": make_restore, "repeat": repeat_restore, "clone": make_clone}


def restore(site: Site, name: str, snapshot: str = "") -> csi.CreateVolumeRequest:
    return create_volume(name, snapshot=snapshot or site.snapshot.snapshot_id, pool=site.kind)


def ask(client: Client, method: str, request, dead: threading.Event | None):
    until = time.monotonic() + RETRY_SECONDS
    while True:
        try:
            return client.call(method, request, 20)
        except grpc.RpcError as error:
            code, said = error.code(), error.details()
        assert code in RETRY, (method, code, said)
        if dead is not None and (dead.is_set() or code is grpc.StatusCode.UNAVAILABLE):
            return None
        assert time.monotonic() < until, (method, said)
        time.sleep(0.02)


# --- what must be so at any time --------------------------------------------------------------------------------------------------------


def check_what_was_acknowledged(site: Site, number: int) -> None:
    """A snapshot that was ready has the content and the time that it had; a restore has what was written to it since."""
    when = f"kill {number} on {site.kind} (seed {SEED})"
    place = site.pool.snapshot_data(site.snapshot.snapshot_id)
    found = manifest(place)
    assert found == site.held, f"{when}: the snapshot changed: {difference(found, site.held)}"
    record = site.pool.record("snapshots", site.snapshot.snapshot_id)
    assert record["phase"] == "ready", when
    assert record["created_at_ns"] == site.snapshot.creation_time.ToNanoseconds(), when
    found = manifest(site.pool.directory_of(site.restored))
    assert found == site.used, f"{when}: what a pod wrote to its restore was lost: {difference(found, site.used)}"
    if site.kind == "btrfs":
        with pytest.raises(OSError) as refused, contextlib.suppress(FileExistsError):
            (place / "never").touch()
        assert refused.value.errno == errno.EROFS, when
