"""Two controller processes, one pool with room for forty: whoever asks, in whatever order, and whoever is killed, forty it is."""

import os
import random
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
import pytest

from csi_driver.rpc import csi_pb2 as csi
from tests.driver_process import DriverProcess
from tests.storm.client import RETRY, Client, create_volume
from tests.storm.disk import Pool
from tests.storm.test_concurrency import call_at_once, retry_until_answered

MIB = 1024**2
ASKED, ROOM = 100, 40
ROUNDS = int(os.environ.get("TATAMI_PROMISE_ROUNDS") or 5)
KILLS = int(os.environ.get("TATAMI_PROMISE_KILLS") or 6)
SEED = os.environ.get("TATAMI_STORM_SEED") or str(random.SystemRandom().randrange(10**9))
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
def controllers(tmp_path: Path):
    """Two controllers of one pool that may promise forty MiB."""
    config = tmp_path / "pools.toml"
    config.write_text(
        f'[driver]\nbackend = "hostpath"\n[pools.default]\npath = "{tmp_path}/pools/default"\nsize = "{ROOM}Mi"\n'
    )
    processes = [DriverProcess(tmp_path, role="controller", name=name) for name in ("one", "two")]
    try:
        for process in processes:
            process.spawn()
        for process in processes:
            process.wait_until_ready()
        yield processes
    finally:
        for process in processes:
            process.close()


def codes_of(answers: list) -> Counter:
    return Counter(answer.code().name if isinstance(answer, grpc.RpcError) else "OK" for answer in answers)


def promised(processes: list[DriverProcess]) -> int:
    records = Pool(processes[0].home / "pools" / "default").records("volumes")
    return sum(record["capacity_bytes"] for record in records.values())


def available(client: Client) -> int:
    return client.call("GetCapacity", csi.GetCapacityRequest()).available_capacity


def delete_all(clients: list[Client], processes: list[DriverProcess]) -> None:
    for record in Pool(processes[0].home / "pools" / "default").records("volumes").values():
        retry_until_answered(clients[0], "DeleteVolume", csi.DeleteVolumeRequest(volume_id=record["handle"]))
    assert {available(client) for client in clients} == {ROOM * MIB}


def test_of_a_hundred_creations_at_two_controllers_exactly_forty_succeed(controllers: list[DriverProcess]):
    clients = [Client(process.endpoint) for process in controllers]
    for number in range(ROUNDS):
        requests = [create_volume(f"v{number}-{which}", MIB) for which in range(ASKED)]
        began = time.monotonic()
        answers = call_at_once(clients, "CreateVolume", requests)
        seconds = time.monotonic() - began
        codes = codes_of(answers)
        print(f"round {number}: {dict(codes)} in {seconds:.2f} s")
        assert codes == {"OK": ROOM, "RESOURCE_EXHAUSTED": ASKED - ROOM}
        assert promised(controllers) == ROOM * MIB
        assert {available(client) for client in clients} == {0}
        for client in clients:  # who has one is not refused it when he asks again
            for request, answer in zip(requests, answers, strict=True):
                if not isinstance(answer, grpc.RpcError):
                    assert client.call("CreateVolume", request) == answer
        delete_all(clients, controllers)


def test_of_twenty_volumes_that_want_three_times_their_size_exactly_ten_get_it(controllers: list[DriverProcess]):
    clients = [Client(process.endpoint) for process in controllers]
    for number in range(ROUNDS):
        made = [clients[0].call("CreateVolume", create_volume(f"g{number}-{which}", MIB)).volume for which in range(20)]
        requests = [
            csi.ControllerExpandVolumeRequest(
                volume_id=volume.volume_id, capacity_range=csi.CapacityRange(required_bytes=3 * MIB)
            )
            for volume in made
        ]
        codes = codes_of(call_at_once(clients, "ControllerExpandVolume", requests))
        assert codes == {"OK": 10, "OUT_OF_RANGE": 10}
        assert promised(controllers) == ROOM * MIB
        assert {available(client) for client in clients} == {0}
        delete_all(clients, controllers)


@pytest.mark.minutes
def test_a_controller_that_is_killed_leaves_no_phantom_promise_and_frees_no_one_elses(controllers: list[DriverProcess]):
    print(f"TATAMI_STORM_SEED={SEED}")
    rng = random.Random(SEED)
    torn = 0
    for number in range(KILLS):
        victim = controllers[number % 2]
        clients = [Client(process.endpoint) for process in controllers]
        requests = [create_volume(f"k{number}-{which}", MIB) for which in range(ASKED)]
        killer = threading.Timer(rng.uniform(0.0, 0.6), victim.kill)
        killer.start()
        codes = codes_of(call_at_once(clients, "CreateVolume", requests))
        killer.join()
        assert promised(controllers) <= ROOM * MIB, codes
        torn += codes["UNAVAILABLE"]
        for client in clients:
            client.channel.close()
        victim.start()
        clients = [Client(process.endpoint) for process in controllers]
        assert {available(client) for client in clients} == {ROOM * MIB - promised(controllers)}
        again = codes_of([ask(clients[which % 2], request) for which, request in enumerate(requests)])
        assert again == {"OK": ROOM, "RESOURCE_EXHAUSTED": ASKED - ROOM}
        assert promised(controllers) == ROOM * MIB
        delete_all(clients, controllers)
        for client in clients:
            client.channel.close()
    print(f"{torn} calls were cut off by {KILLS} kills")
    assert torn


def ask(client: Client, request):
    """Ask until there is a final answer, as external-provisioner does."""
    for _ in range(1000):
        try:
            return client.call("CreateVolume", request)
        except grpc.RpcError as error:
            if error.code() not in RETRY:
                return error
        time.sleep(0.02)
    raise AssertionError("CreateVolume did not converge")
