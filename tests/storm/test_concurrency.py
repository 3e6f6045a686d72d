"""Many callers at once, in one process and in two: one name is one volume, one target one mount, and a list is complete."""

import itertools
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from csi_driver.rpc import csi_pb2 as csi
from tests.driver_process import DriverProcess
from tests.storm.client import RETRY, Client, capability, create_volume
from tests.storm.content import fill, manifest
from tests.storm.disk import Pool, mounts_below

CALLERS = 16
MANY = 10_000
PAGE = 100
OK = grpc.StatusCode.OK
ABORTED = grpc.StatusCode.ABORTED


@pytest.fixture
def driver(tmp_path: Path):
    process = DriverProcess(tmp_path).start()
    yield process
    process.close()


@pytest.fixture
def two_controllers(tmp_path: Path):
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


def pool_of(driver: DriverProcess) -> Pool:
    return Pool(driver.home / "pools" / "default")


def call_at_once(clients: list[Client], method: str, requests: list) -> list:
    """Make all calls at the same moment, spread over the clients; returns responses and errors in the order of the requests."""
    barrier = threading.Barrier(len(requests))

    def make(client: Client, request):
        barrier.wait()
        try:
            return client.call(method, request)
        except grpc.RpcError as error:
            return error

    with ThreadPoolExecutor(len(requests)) as threads:
        return list(threads.map(make, itertools.cycle(clients), requests))


def retry_until_answered(client: Client, method: str, request):
    for _ in range(200):
        try:
            return client.call(method, request)
        except grpc.RpcError as error:
            if error.code() not in RETRY:
                raise
            time.sleep(0.02)
    raise AssertionError(f"{method} did not converge")


def require_one_answer(clients: list[Client], method: str, request, handle_of) -> str:
    """Ask from everywhere at once, let those who were told to come back do so; everybody must have got the same."""
    answers = call_at_once(clients, method, [request] * CALLERS)
    codes = Counter(answer.code().name for answer in answers if isinstance(answer, grpc.RpcError))
    assert set(codes) <= {"ABORTED"}, codes
    handles = {handle_of(answer) for answer in answers if not isinstance(answer, grpc.RpcError)}
    handles |= {handle_of(retry_until_answered(client, method, request)) for client in clients}
    assert len(handles) == 1
    return handles.pop()


def check_one_volume_and_one_snapshot(processes: list[DriverProcess], names: int) -> None:
    pool = pool_of(processes[0])
    clients = [Client(process.endpoint) for process in processes]
    rng = random.Random(1)
    for number in range(names):
        handle = require_one_answer(
            clients, "CreateVolume", create_volume(f"v-{number}"), lambda answer: answer.volume.volume_id
        )
        fill(pool.directory_of(handle), rng, "light")
        held = manifest(pool.directory_of(handle))
        request = csi.CreateSnapshotRequest(name=f"s-{number}", source_volume_id=handle)
        snapshot = require_one_answer(clients, "CreateSnapshot", request, lambda answer: answer.snapshot.snapshot_id)
        assert manifest(pool.snapshot_data(snapshot)) == held
        clone = require_one_answer(
            clients, "CreateVolume", create_volume(f"c-{number}", volume=handle), lambda answer: answer.volume.volume_id
        )
        assert manifest(pool.directory_of(clone)) == held
    assert len(pool.records("volumes")) == 2 * names
    assert len(pool.records("snapshots")) == names
    pool.wait_until_swept(15)
    assert not pool.unnamed()
    for client in clients:
        client.channel.close()


def test_sixteen_callers_of_one_process_get_one_volume_one_snapshot_and_one_clone(driver: DriverProcess):
    check_one_volume_and_one_snapshot([driver], 6)


def test_two_controller_processes_make_one_volume_one_snapshot_and_one_clone(two_controllers: list[DriverProcess]):
    check_one_volume_and_one_snapshot(two_controllers, 6)


def test_of_two_requests_for_one_name_exactly_one_gets_it(two_controllers: list[DriverProcess]):
    pool = pool_of(two_controllers[0])
    clients = [Client(process.endpoint) for process in two_controllers]
    for number in range(15):
        sizes = [(1 + caller % 2) * 1024**2 for caller in range(CALLERS)]
        # What is larger is no answer to limit_bytes, what is smaller none to required_bytes.
        requests = [create_volume(f"contested-{number}", size) for size in sizes]
        for request, size in zip(requests, sizes, strict=True):
            request.capacity_range.limit_bytes = size
        answers = call_at_once(clients, "CreateVolume", requests)
        made = {answer.volume.capacity_bytes for answer in answers if not isinstance(answer, grpc.RpcError)}
        codes = {answer.code() for answer in answers if isinstance(answer, grpc.RpcError)}
        assert len(made) == 1, made
        assert codes <= {ABORTED, grpc.StatusCode.ALREADY_EXISTS}
        winner = sizes.index(made.pop())
        for client in clients:
            assert client.call("CreateVolume", requests[winner]).volume.capacity_bytes == sizes[winner]
            assert client.code("CreateVolume", requests[1 - winner]) is grpc.StatusCode.ALREADY_EXISTS
    assert len(pool.records("volumes")) == 15
    assert not pool.unnamed()


def test_of_two_volumes_that_want_one_directory_exactly_one_gets_it(two_controllers: list[DriverProcess]):
    pool = pool_of(two_controllers[0])
    clients = [Client(process.endpoint) for process in two_controllers]
    for number in range(10):
        requests = [create_volume(f"{caller}-{number}", directory=f"shared/place-{number}") for caller in range(CALLERS)]
        answers = call_at_once(clients, "CreateVolume", requests)
        codes = {answer.code() for answer in answers if isinstance(answer, grpc.RpcError)}
        assert sum(not isinstance(answer, grpc.RpcError) for answer in answers) == 1
        assert codes <= {ABORTED, grpc.StatusCode.INVALID_ARGUMENT}, codes
    directories = [record["directory"] for record in pool.records("volumes").values()]
    assert sorted(directories) == sorted(f"shared/place-{number}" for number in range(10))
    pool.wait_until_swept(15)
    assert not pool.unnamed(frozenset({"shared"}))


def test_creating_and_deleting_one_name_from_two_controllers_converges(two_controllers: list[DriverProcess]):
    pool = pool_of(two_controllers[0])
    clients = [Client(process.endpoint) for process in two_controllers]
    request = create_volume("to-and-fro")
    handle = retry_until_answered(clients[0], "CreateVolume", request).volume.volume_id
    until = time.monotonic() + 5
    codes: Counter[str] = Counter()

    def work(client: Client, method: str, message) -> None:
        while time.monotonic() < until:
            codes[f"{method} {client.code(method, message).name}"] += 1

    calls = [("CreateVolume", request), ("DeleteVolume", csi.DeleteVolumeRequest(volume_id=handle))]
    with ThreadPoolExecutor() as threads:
        for client, (method, message) in itertools.product(clients, calls * 2):
            threads.submit(work, client, method, message)
    assert {key.partition(" ")[2] for key in codes} <= {"OK", "ABORTED"}, codes
    assert codes["CreateVolume OK"] > 10
    assert codes["DeleteVolume OK"] > 10
    for client in clients:
        assert retry_until_answered(client, "CreateVolume", request).volume.volume_id == handle
    assert pool.directory_of(handle).is_dir()
    retry_until_answered(clients[0], "DeleteVolume", csi.DeleteVolumeRequest(volume_id=handle))
    pool.wait_until_swept(20)
    assert not pool.unnamed()
    assert not pool.records("volumes")


@pytest.mark.root
def test_sixteen_stages_and_publishes_at_once_are_one_mount_each(driver: DriverProcess):
    client = Client(driver.endpoint)
    handle = client.call("CreateVolume", create_volume("mounted")).volume.volume_id
    staging, target = str(driver.kubelet / "staging"), str(driver.kubelet / "target")
    steps = {
        "NodeStageVolume": csi.NodeStageVolumeRequest(
            volume_id=handle, staging_target_path=staging, volume_capability=capability()
        ),
        "NodePublishVolume": csi.NodePublishVolumeRequest(
            volume_id=handle, staging_target_path=staging, target_path=target, volume_capability=capability()
        ),
        "NodeUnpublishVolume": csi.NodeUnpublishVolumeRequest(volume_id=handle, target_path=target),
        "NodeUnstageVolume": csi.NodeUnstageVolumeRequest(volume_id=handle, staging_target_path=staging),
    }
    expected = {
        "NodeStageVolume": [staging],
        "NodePublishVolume": [staging, target],
        "NodeUnpublishVolume": [staging],
        "NodeUnstageVolume": [],
    }
    for _ in range(5):
        for method, request in steps.items():
            answers = call_at_once([client], method, [request] * CALLERS)
            assert {answer.code() for answer in answers if isinstance(answer, grpc.RpcError)} <= {ABORTED}
            retry_until_answered(client, method, request)
            assert sorted(mounts_below(driver.home)) == sorted(expected[method])


@pytest.mark.minutes
def test_ten_thousand_volumes_are_listed_each_exactly_once_while_others_come_and_go(driver: DriverProcess):
    began = time.monotonic()
    with Client(driver.endpoint) as client:

        def make(number: int) -> str:
            return client.call("CreateVolume", create_volume(f"lasting-{number}")).volume.volume_id

        with ThreadPoolExecutor(CALLERS) as threads:
            lasting = set(threads.map(make, range(MANY)))
        created = time.monotonic()
        stop = threading.Event()
        passed: set[str] = set()

        def come_and_go(name: str) -> int:
            for number in itertools.count():
                if stop.is_set():
                    return number
                handle = client.call("CreateVolume", create_volume(f"{name}-{number}")).volume.volume_id
                passed.add(handle)
                retry_until_answered(client, "DeleteVolume", csi.DeleteVolumeRequest(volume_id=handle))
            return 0

        with ThreadPoolExecutor(4) as threads:
            visitors = [threads.submit(come_and_go, f"visitor-{number}") for number in range(4)]
            try:
                listed, sizes, seconds = list_all(client)
            finally:
                stop.set()
            visits = sum(visitor.result() for visitor in visitors)
        listing = time.monotonic()
    counts = Counter(listed)
    assert lasting <= counts.keys(), f"{len(lasting - counts.keys())} of {MANY} volumes are not listed"
    assert max(counts.values()) == 1, counts.most_common(3)
    assert counts.keys() - lasting <= passed
    assert set(sizes[:-1]) == {PAGE}, "only the last page may be short"
    assert visits > 20, "nothing came and went meanwhile"
    print(
        f"{MANY} volumes created in {created - began:.1f} s, listed in {listing - created:.1f} s ({len(sizes)} pages of {PAGE}, "
        f"slowest {max(seconds):.3f} s) while {visits} came and went"
    )


def list_all(client: Client) -> tuple[list[str], list[int], list[float]]:
    """Return all handles, how many each page had, and how long it took (seconds)."""
    handles: list[str] = []
    sizes: list[int] = []
    seconds: list[float] = []
    token = ""
    while True:
        began = time.monotonic()
        response = client.call("ListVolumes", csi.ListVolumesRequest(max_entries=PAGE, starting_token=token))
        seconds.append(time.monotonic() - began)
        handles += [entry.volume.volume_id for entry in response.entries]
        sizes.append(len(response.entries))
        token = response.next_token
        if not token:
            return handles, sizes, seconds
