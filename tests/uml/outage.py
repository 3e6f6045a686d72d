"""What the outage tests measure with: probes, calls, pods that write, and what a process has left behind."""

import contextlib
import pathlib
import statistics
import subprocess
import sys
import threading
import time
from typing import Self

import grpc
from driver_in_guest import Driver, Use

from csi_driver.rpc import csi_pb2 as csi
from tests.storm.client import Client

# A thread for each file: append a line, fsync it, say so; all of it again and again.
WRITERS = """
import os, sys, threading, time
def write(number, path):
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    while True:
        os.write(file, b"line\\n")
        os.fsync(file)
        os.write(1, b"%d %f\\n" % (number, time.monotonic()))
        time.sleep(0.5)
for number, path in enumerate(sys.argv[1:]):
    threading.Thread(target=write, args=(number, path), daemon=True).start()
time.sleep(3600)
"""


class Pods:
    """A process in a node that writes to a file in each of several mounted volumes, and notes when each write was safe."""

    def __init__(self, uses: list[Use]) -> None:
        self._times: list[list[float]] = [[] for _ in uses]
        node = uses[0].driver.node
        paths = [f"{use.target}/log" for use in uses]
        self.process = node.popen([sys.executable, "-c", WRITERS, *paths], stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            number, moment = line.split()
            self._times[int(number)].append(float(moment))

    def wait_until_all_write(self, since: float, seconds: float) -> None:
        """Wait until each has written after the moment `since`."""
        until = time.monotonic() + seconds
        while not all(times and times[-1] > since for times in self._times):
            still = [number for number, times in enumerate(self._times) if not times or times[-1] <= since]
            assert time.monotonic() < until, f"volumes {still} are not written to"
            time.sleep(0.1)

    def written_between(self, begin: float, end: float) -> int:
        """Count the writes that were safe between two moments."""
        return sum(begin < moment < end for times in self._times for moment in list(times))

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait(30)
        self._reader.join(10)
        self.process.stdout.close()


class Probes:
    """Probes a driver all the time, as livenessprobe does, over a connection of its own; `windows` are of SIZE answers each."""

    SIZE = 60

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.seconds: list[float] = []
        self.unready = 0

    def _run(self) -> None:
        with Client(self._driver.endpoint) as client:
            while not self._stop.is_set():
                began = time.monotonic()
                answer = client.call("Probe", csi.ProbeRequest(), 20)
                self.seconds.append(time.monotonic() - began)
                self.unready += not answer.ready.value
                self._stop.wait(0.05)

    def __enter__(self) -> Self:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._stop.set()
        self._thread.join(30)

    def p99(self) -> float:
        """Return the median, over windows, of each window's 99th percentile: one hiccup of a shared machine decides nothing."""
        windows = [self.seconds[begin : begin + self.SIZE] for begin in range(0, len(self.seconds) - self.SIZE + 1, self.SIZE)]
        assert windows, f"only {len(self.seconds)} probes were answered"
        return statistics.median(sorted(window)[int(len(window) * 0.99) - 1] for window in windows)


class Callers:
    """Threads that make calls again and again until `stop`; `codes` counts the answers of each method, `seconds` the good ones' times."""

    def __init__(self, driver: Driver, asks: list[tuple[str, object]], pause: float = 0.5) -> None:
        self.codes: dict[tuple[str, str], int] = {}
        self.seconds: list[float] = []
        self._stop = threading.Event()
        self._guard = threading.Lock()
        self._client = Client(driver.endpoint)
        self._pause = pause
        self._threads = [threading.Thread(target=self._run, args=ask, daemon=True) for ask in asks]
        for thread in self._threads:
            thread.start()

    def _run(self, method: str, request: object) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                self._client.call(method, request, 30)
                code = "OK"
            except grpc.RpcError as error:
                code = error.code().name
            with self._guard:
                self.codes[method, code] = self.codes.get((method, code), 0) + 1
                if code == "OK":
                    self.seconds.append(time.monotonic() - began)
            self._stop.wait(self._pause)

    def stop(self) -> None:
        """Let what is on its way end, and stop."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        self._client.channel.close()


def waiting_for_servers(driver: Driver) -> list[str]:
    """List the threads of a driver and of its children that wait in the kernel for an NFS server's answer."""
    found = []
    for pid in [driver.process.pid, *(child.pid for child in driver.children())]:
        for task in pathlib.Path(f"/proc/{pid}/task").glob("*"):
            with contextlib.suppress(OSError):
                stack = (task / "stack").read_text()
                if "rpc_" in stack or "nfs" in stack:
                    calls = [line.split()[1].partition("+")[0] for line in stack.splitlines()]
                    found.append(f"{pid}/{task.name}: {' < '.join(call for call in calls if 'rpc' in call or 'nfs' in call)}")
    return found
