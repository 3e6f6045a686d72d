"""`kill -9` at any moment: nothing that was acknowledged is lost, whatever was not is completed by asking again, and nothing is left."""

import os
import random
import threading
import time
from pathlib import Path

import pytest

from csi_driver.rpc import csi_pb2 as csi
from tests.driver_process import DriverProcess
from tests.storm.client import Client
from tests.storm.clients import PARENTS, run_clients
from tests.storm.disk import KINDS, Pool, mounts_below
from tests.storm.ledger import Ledger

pytestmark = [pytest.mark.minutes, pytest.mark.root]

SEED = os.environ.get("TATAMI_STORM_SEED") or str(random.SystemRandom().randrange(10**9))
KILLS = int(os.environ.get("TATAMI_STORM_KILLS") or 200)
CLIENTS = 6
SETTLE_EVERY, CLEAN_EVERY = 5, 20
KILLED_WHILE_STARTING = 0.15
SWEEP_SECONDS = 20
COPIES = ("clone", "restore", "snapshot", "group")


@pytest.fixture
def driver(tmp_path: Path):
    process = DriverProcess(tmp_path)
    yield process
    process.close()


def test_nothing_acknowledged_is_lost_and_nothing_is_left_over_after_200_kills(driver: DriverProcess):
    print(f"TATAMI_STORM_SEED={SEED} TATAMI_STORM_KILLS={KILLS}")
    rng = random.Random(SEED)
    pool = Pool(driver.home / "pools" / "default")
    ledger = Ledger(pool, driver.kubelet)
    torn = 0
    driver.start()
    for kill in range(1, KILLS + 1):
        storm(driver, ledger, f"{SEED}/{kill}", rng)
        torn += sum(record["phase"] != "ready" for kind in KINDS for record in pool.records(kind).values())
        judge(ledger, f"after kill {kill}", ledger.check_against_disk)
        if kill % SETTLE_EVERY == 0:
            driver.start()
            settle(driver, ledger, f"{SEED}/{kill}/settle")
            judge(ledger, f"settled after kill {kill}", ledger.check_against_disk, lambda: check_lists(driver, ledger))
        else:
            driver.spawn()  # the storm meets the driver while it starts; some kills, too
        if kill % CLEAN_EVERY == 0 or kill == KILLS:
            take_down(driver, ledger, f"{SEED}/{kill}/end")
    assert driver.stop() == 0
    print(f"{torn} records were cut off in the middle by {KILLS} kills;", dict(sorted(ledger.counts.items())))
    # A storm in which nothing was torn shows nothing.
    assert torn > KILLS / 2
    assert all(ledger.counts[kind] > KILLS / 10 and ledger.counts[f"unanswered {kind}"] > KILLS / 100 for kind in COPIES), (
        ledger.counts
    )
    assert ledger.counts["completed by a retry"] > KILLS


def storm(driver: DriverProcess, ledger: Ledger, seed: str, rng: random.Random) -> None:
    stop = threading.Event()

    def kill_in_the_middle(client: Client) -> None:
        if rng.random() < KILLED_WHILE_STARTING:
            time.sleep(rng.uniform(0, 0.7))
        else:
            client.wait_until_connected(stop)
            time.sleep(rng.uniform(0, 0.5))
        driver.kill()
        stop.set()

    run_clients(ledger, driver.endpoint, seed, CLIENTS, "run", stop, kill_in_the_middle)


def settle(driver: DriverProcess, ledger: Ledger, seed: str) -> None:
    """Ask for everything that is unanswered until it is answered."""
    stop = threading.Event()
    timer = threading.Timer(60, stop.set)
    timer.start()
    run_clients(ledger, driver.endpoint, seed, CLIENTS, "settle", stop, lambda _: None)
    timer.cancel()
    assert not ledger.waiting, [(intent.kind, intent.tries, intent.calls) for intent in ledger.waiting]


def take_down(driver: DriverProcess, ledger: Ledger, seed: str) -> None:
    """Delete everything and look for what is left."""
    pool = ledger.pool
    pool.wait_until_swept(SWEEP_SECONDS)
    judge(ledger, "before everything is deleted", lambda: ledger.check_nothing_left_over(PARENTS), ledger.check_kept)
    run_clients(ledger, driver.endpoint, seed, 1, "take_down", threading.Event(), lambda _: None)
    pool.wait_until_swept(SWEEP_SECONDS)
    judge(
        ledger,
        "everything is deleted",
        lambda: ledger.check_nothing_left_over(PARENTS),
        ledger.check_against_disk,
        ledger.check_kept,
    )
    assert not {**ledger.volumes, **ledger.snapshots, **ledger.groups, **ledger.inline}
    assert not any(pool.records(kind) for kind in KINDS)
    assert not list((driver.kubelet / "plugins" / "hostpath.csi.tatami.dev" / "volumes").glob("*.json"))
    assert not mounts_below(driver.home)


def check_lists(driver: DriverProcess, ledger: Ledger) -> None:
    """What the driver lists is what it acknowledged, each once."""
    with Client(driver.endpoint) as client:
        volumes = pages(client, "ListVolumes", csi.ListVolumesRequest)
        shown = sorted(entry.volume.volume_id for entry in volumes)
        if shown != sorted(volume.handle for volume in ledger.volumes.values()):
            ledger.problem(f"ListVolumes shows {shown}")
        snapshots = pages(client, "ListSnapshots", csi.ListSnapshotsRequest)
        found = sorted((entry.snapshot.snapshot_id, entry.snapshot.creation_time.ToNanoseconds()) for entry in snapshots)
        if found != sorted((snapshot.handle, snapshot.created_ns) for snapshot in ledger.snapshots.values()):
            ledger.problem(f"ListSnapshots shows {found}")
        for group in ledger.groups.values():
            request = csi.GetVolumeGroupSnapshotRequest(
                group_snapshot_id=group.handle, snapshot_ids=[each.handle for each in group.members]
            )
            if not client.call("GetVolumeGroupSnapshot", request).group_snapshot.ready_to_use:
                ledger.problem(f"group {group.name} is not ready_to_use")


def pages(client: Client, method: str, request_class) -> list:
    entries, token = [], ""
    while True:
        response = client.call(method, request_class(max_entries=5, starting_token=token))
        entries += response.entries
        token = response.next_token
        if not token:
            return entries


def judge(ledger: Ledger, when: str, *checks) -> None:
    for check in checks:
        check()
    assert not ledger.problems, f"{when} (seed {SEED}):\n" + "\n".join(ledger.problems[:20])
