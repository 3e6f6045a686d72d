"""The process starts, serves and ends in its time, however many servers do not answer and however much there is in its pools."""

import json
import os
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest

from csi_driver.rpc import csi_pb2 as csi
from tests.driver_process import DriverProcess
from tests.storm.client import Client, create_volume

POOLS = 9
MOUNT_SECONDS = 40  # longer than the driver waits


@pytest.fixture
def far(tmp_path: Path):
    """Makes drivers of pools whose servers never answer: mount.nfs waits as it does where packets are dropped."""
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "mount.nfs").write_text(f"#!/bin/sh\n: > {commands}/asked.$$\nexec sleep {MOUNT_SECONDS}\n")
    (commands / "mount.nfs").chmod(0o755)
    pools = "".join(f'[pools.p{number}]\nserver = "192.0.2.{number + 1}"\npath = "/srv"\n' for number in range(POOLS))
    config = tmp_path / "pools.toml"
    config.write_text(f'[driver]\nbackend = "nfs"\n{pools}')
    made: list[DriverProcess] = []

    def make(role: str) -> DriverProcess:
        path = f"{commands}:{os.environ['PATH']}"
        made.append(DriverProcess(tmp_path, role=role, config=config, node_id="node-1@127.0.0.1", PATH=path))
        return made[-1]

    yield make
    for process in made:
        process.close()


def asked(home: Path) -> list[Path]:
    """What mount.nfs left, once for each time that it was called."""
    return list((home / "commands").glob("asked.*"))


def seconds_to(action) -> float:
    began = time.monotonic()
    action()
    return time.monotonic() - began


@pytest.mark.minutes
@pytest.mark.root
def test_a_controller_serves_and_stops_in_its_time_however_many_servers_do_not_answer(far, tmp_path):
    driver = far("controller")
    driver.start()
    waited = time.time() - min(mark.stat().st_mtime for mark in asked(tmp_path))
    assert waited < 20, driver.tail()  # 10 of them are for the pools, whatever their number
    with Client(driver.endpoint) as client:
        assert client.call("Probe", csi.ProbeRequest()).ready.value
    assert seconds_to(driver.stop) < 28, "Kubernetes kills after 30 s"
    assert driver.process.returncode == 0, driver.tail()


@pytest.mark.root
def test_a_node_asks_no_server_when_it_starts_nor_when_it_stops(far, tmp_path):
    driver = far("node").start()
    assert driver.stop() == 0, driver.tail()
    assert asked(tmp_path) == []


@pytest.mark.minutes
def test_a_pool_is_served_before_all_its_records_were_looked_at(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        metrics = f"127.0.0.1:{free.getsockname()[1]}"
    driver = DriverProcess(tmp_path, TATAMI_METRICS_ADDRESS=metrics)
    try:
        driver.start()
        with Client(driver.endpoint) as client:
            handle = client.call("CreateVolume", create_volume("v")).volume.volume_id
        driver.kill()
        multiply(tmp_path / "pools/default/.csi/volumes", handle.rpartition(".")[2], 8_000)
        driver.start()
        assert rounds(metrics) == 0
        assert driver.stop() == 0
    finally:
        driver.close()


def multiply(folder: Path, record_id: str, count: int) -> None:
    record = json.loads((folder / f"{record_id}.json").read_text())
    for number in range(count):
        digits = "".join(chr(ord("a") + int(digit)) for digit in f"{number:026}")
        (folder / f"{digits}.json").write_text(
            json.dumps({**record, "id": digits, "handle": record["handle"].replace(record_id, digits)})
        )


def rounds(metrics: str) -> float:
    """How many rounds the sweeper has been through in the default pool."""
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as answer:
        (value,) = re.findall(r'^tatami_sweeper_runs_total{pool="default"} (\S+)$', answer.read().decode(), re.MULTILINE)
    return float(value)
