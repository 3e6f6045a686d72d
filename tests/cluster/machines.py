"""Machines: namespaces of this host with a process 1 that hold services, found and ended without any list of their processes.

A machine has its own mounts, processes, host name and (a node) network. When its process 1 is killed, all that runs in it dies and
all its mounts are gone, loop devices included. So a cluster whose making was cut off anywhere is removed as completely as any other.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.init import READY
from cluster.layout import BINARIES, HERE, LOGS, STATE
from cluster.progress import wait_until

MARK = f"tatami-cluster:{STATE}"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Machine:
    """Namespaces under a name. Services are programs in it that outlive the process that started them."""

    name: str
    network: bool = True  # a network of its own, or this host's
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def directory(self) -> Path:
        """What belongs to it on this host."""
        return STATE / self.name

    @property
    def pid(self) -> int:
        """Process 1, by its number on this host; 0 where the machine does not run."""
        for pid, arguments in _processes():
            if MARK in arguments and self.name in arguments and _is_first(pid):
                return pid
        return 0

    def boot(self) -> None:
        """Make the namespaces. Raises TimeoutError when process 1 does not come up."""
        self.directory.mkdir(parents=True, exist_ok=True)
        LOGS.mkdir(exist_ok=True)
        ready = self.directory / READY
        ready.unlink(missing_ok=True)
        namespaces = [
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "--uts",
            "--ipc",
        ]
        if self.network:
            namespaces.append("--net")
        # The interpreter itself, not a shim in front of it that would be one more process; -S -E: nothing of a venv is needed.
        command = ["unshare", *namespaces, os.path.realpath(sys.executable), "-S", "-E", str(HERE / "init.py"), self.name]
        with (LOGS / f"{self.name}.log").open("ab") as log:
            subprocess.Popen(
                [*command, str(self.directory), MARK],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
                env={"PATH": PATH, "LANG": "C.UTF-8"},
            )
        wait_until(f"process 1 of {self.name}", lambda: ready.exists() and self.pid, 20)
        self.run("hostname", self.name)

    def run(self, *command: str, timeout: float = 60, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program in the machine and wait for it. Raises RuntimeError with what it printed when it fails."""
        done = subprocess.run(
            self.inside(*command), input=stdin, capture_output=True, text=True, timeout=timeout, check=False, cwd="/"
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{self.name}: {' '.join(command)[:300]}: exit {done.returncode}: {done.stderr or done.stdout}")
        return done

    def start(self, service: str, *command: str) -> None:
        """Start a program in the machine; what it prints goes to its log."""
        with self.log(service).open("ab") as log:
            subprocess.Popen(
                self.inside(*command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
            )

    def log(self, service: str) -> Path:
        """Where a service's output is."""
        return LOGS / f"{self.name}-{service}.log"

    def inside(self, *command: str) -> list[str]:
        """Return the command that runs `command` in the machine, with an environment of its own."""
        pid = self.pid
        if not pid:
            raise RuntimeError(f"machine {self.name} does not run")
        namespaces = ["--mount", "--pid", "--uts", "--ipc", *(["--net"] if self.network else [])]
        variables = {"PATH": f"{BINARIES}:{PATH}", "HOME": "/root", "LANG": "C.UTF-8", **self.environment}
        assigned = [f"{name}={value}" for name, value in variables.items()]
        return ["nsenter", "--target", str(pid), *namespaces, "env", "-i", "-C", "/", *assigned, *command]

    def pids(self, program: str) -> list[int]:
        """Find the processes of a program in the machine, by the name it was started with."""
        first = self.pid
        if not first:
            return []
        home = os.readlink(f"/proc/{first}/ns/pid")
        return [
            pid
            for pid, arguments in _processes()
            if arguments and Path(arguments[0]).name == program and _namespace(pid) == home
        ]

    def stop(self, program: str, number: int = signal.SIGTERM, seconds: float = 30) -> None:
        """End a service: a signal, and after `seconds` SIGKILL. Returns when it is gone."""
        for pid in self.pids(program):
            _signal(pid, number)
        try:
            wait_until(f"the end of {program} on {self.name}", lambda: not self.pids(program), seconds)
        except TimeoutError:
            for pid in self.pids(program):
                _signal(pid, signal.SIGKILL)
            wait_until(f"the end of {program} on {self.name}", lambda: not self.pids(program), 10)

    def kill(self, *words: str) -> None:
        """Kill, with -9, each process of the machine, its containers included, whose arguments contain all `words`."""
        killed = 0
        for pid, arguments in _processes():
            if all(any(word == Path(argument).name for argument in arguments) for word in words) and self._holds(pid):
                _signal(pid, signal.SIGKILL)
                killed += 1
        if not killed:
            raise RuntimeError(f"{self.name} runs no {' '.join(words)}")

    def _holds(self, pid: int) -> bool:
        """Say whether a process is in the machine or in one of its containers: all descend from process 1."""
        first = self.pid
        while pid > 1:
            if pid == first:
                return True
            try:
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                return False
        return False

    def path(self, inside: str | Path) -> Path:
        """Return how this host sees a path of the machine, its mounts included."""
        return Path(f"/proc/{self.pid}/root") / str(inside).lstrip("/")

    def destroy(self) -> None:
        """Kill everything in it, wait until it is gone, and remove its directory."""
        destroy_all(self.name)
        shutil.rmtree(self.directory, ignore_errors=True)


def running() -> list[int]:
    """List the processes that hold machines (each has two: unshare and process 1), of this and of earlier runs."""
    return [pid for pid, arguments in _processes() if MARK in arguments]


def destroy_all(name: str = "") -> None:
    """Kill the machines (or only one), and return when their processes are gone. Raises TimeoutError when they stay."""

    def holders() -> list[int]:
        return [pid for pid, arguments in _processes() if MARK in arguments and (not name or name in arguments)]

    # What holds the namespaces first: the kernel then kills all the others, and process 1 ends when they are gone.
    namespaces = {_namespace(pid) for pid in holders() if _is_first(pid)}
    for pid in holders():
        if _is_first(pid) or not namespaces:
            _signal(pid, signal.SIGKILL)

    def left() -> list[int]:
        # nsenter's own process is outside and ends with its child; it holds the log open, nothing else.
        return holders() + [pid for pid, _ in _processes() if _namespace(pid) in namespaces]

    wait_until("the end of the cluster's processes", lambda: not left(), 60)


def _processes() -> Iterator[tuple[int, Sequence[str]]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                content = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue  # it ended meanwhile
            if content:
                yield int(entry), content.decode(errors="replace").rstrip("\0").split("\0")


def _is_first(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    numbers = next((line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")), [])
    return len(numbers) > 1 and numbers[-1] == "1"


def _namespace(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        return ""


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
