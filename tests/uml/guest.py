"""Boot a guest (user-mode Linux: a real kernel that runs as a process) and run pytest inside it.

The kernels that CI runs on serve no NFS, mount none and have no project quotas; the guest's has all of them. No image is needed:
its root is this machine's root directory, read-only (guest-init.sh). What the guest may write to is one temporary directory:
the console, the junit report and the exit code come back through it, and it is removed with the guest.

`Guest` is the library, `python tests/uml/guest.py` the command: see README.md beside this file.
"""

import argparse
import contextlib
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import psutil

HERE = pathlib.Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
KERNEL = HERE / "kernel.sh"
PREFIX = "tatami-guest-"
HANDED_ON = ("CSI_SANITY", "TATAMI_OUTAGE_SECONDS", "TATAMI_SPEED_FILES", "TATAMI_SPEED_MIB")
"""Variables that tests in a guest obey as those on the machine do; the first names a file."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run in a guest, and how much of the machine it gets."""

    command: Sequence[str]  # run in the checkout; its exit code is the guest's
    memory: int = 1 << 30  # bytes; lives in /dev/shm or TMPDIR of this machine, taken as it is touched
    disk: int = 20 << 30  # bytes; a sparse file, the guest's /scratch (XFS)
    timeout: float = 900.0  # seconds, boot included; then everything is killed
    visible: Sequence[pathlib.Path] = ()  # more paths of this machine, seen at the same place, read-only
    environment: Mapping[str, str] = field(default_factory=dict)


class GuestDied(Exception):
    """The guest ended without an exit code: it was killed at its deadline, ran out of memory, or its kernel panicked."""


def pytest_job(
    arguments: Sequence[str],
    *,
    memory: int = Job.memory,
    timeout: float = Job.timeout,
    visible: Sequence[pathlib.Path] = (),
    environment: Mapping[str, str] | None = None,
) -> Job:
    """Describe a pytest run with `arguments` (paths relative to the checkout) under this process' interpreter."""
    handed_on = {name: os.environ[name] for name in HANDED_ON if os.environ.get(name)}
    suite = [pathlib.Path(handed_on["CSI_SANITY"])] if "CSI_SANITY" in handed_on else []
    return Job(
        # A cache directory could not be written, and colours would have to be taken out of the console again.
        command=[
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "--color=no",
            "--junitxml=/out/junit.xml",
            *arguments,
        ],
        memory=memory,
        timeout=timeout,
        visible=[*visible, *suite],
        environment={**handed_on, **(environment or {})},
    )


class Guest:
    """One boot of user-mode Linux. Ends with its job, at its deadline, by `close`, or with the process that started it."""

    def __init__(self, job: Job, *, interactive: bool = False) -> None:
        self._job = job
        self._interactive = interactive
        self._directory = pathlib.Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self._console = self._directory / "console"
        self._console.touch()
        self._process: subprocess.Popen[bytes] | None = None
        self._started = threading.Event()
        self._ended = threading.Event()
        self._stop = threading.Event()
        self._why = ""
        self.seconds = 0.0
        # A thread of its own starts, watches and kills: the deadline then holds also where nobody reads the console, and the
        # kernel's parent-death signal, which follows the thread that forked and not the process (prctl(2)), comes at the right time.
        self._keeper = threading.Thread(target=self._keep, name="guest", daemon=True)

    def start(self) -> Self:
        """Boot. Returns at once."""
        self._keeper.start()
        return self

    def follow(self) -> Iterator[str]:
        """Yield the console's lines, without their ends, as they come, until the guest has ended."""
        with self._console.open("rb") as console:
            rest = b""
            while True:
                last = self._ended.is_set()
                *lines, rest = (rest + console.read()).split(b"\n")
                for line in lines:
                    yield line.decode(errors="replace").rstrip("\r")
                if last:
                    break
                self._ended.wait(0.1)
            if rest:
                yield rest.decode(errors="replace")

    @property
    def ended(self) -> bool:
        """Whether it was booted and has ended, by itself or not."""
        return self._ended.is_set()

    def exit_code(self) -> int:
        """Wait for the end and return the job's exit code.

        Raises GuestDied, with the reason and the end of the console, if there is none.
        """
        self._ended.wait()
        try:
            return int((self._directory / "exit-code").read_text())
        except (OSError, ValueError) as missing:
            tail = self._console.read_text(errors="replace").replace("\r", "")[-4000:]
            raise GuestDied(
                f"{self._why or 'the guest ended by itself'} after {self.seconds:.1f} s; its console ends:\n{tail}"
            ) from missing

    @property
    def junit(self) -> pathlib.Path:
        """Where the report of a pytest job lies until `close`."""
        return self._directory / "junit.xml"

    @property
    def kernel_log(self) -> str:
        """What the guest's kernel logged, or nothing where the guest did not reach its end."""
        with contextlib.suppress(OSError):
            return (self._directory / "dmesg.txt").read_text(errors="replace")
        return ""

    def close(self) -> None:
        """Kill what still runs, wait for its end, remove the temporary directory."""
        self._stop.set()
        if self._keeper.is_alive():
            self._keeper.join()
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Self:
        """Boot."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close."""
        self.close()

    def _keep(self) -> None:
        began = time.monotonic()
        try:
            self._prepare()
            self._boot()
            while self._process is not None and self._process.poll() is None:
                if self._stop.is_set():
                    self._why = "the guest was closed"
                    break
                if time.monotonic() - began > self._job.timeout:
                    self._why = f"the guest was killed at its deadline of {self._job.timeout:.0f} s"
                    break
                self._stop.wait(0.05)
        except (OSError, subprocess.CalledProcessError) as error:
            self._why = f"the guest could not be started: {error}"
        finally:
            self._kill()
            self.seconds = time.monotonic() - began
            self._ended.set()

    def _prepare(self) -> None:
        init = pathlib.Path(shutil.copy(HERE / "guest-init.sh", self._directory))
        init.chmod(0o755)  # the kernel executes it, and not every way of copying a checkout keeps the bit
        (self._directory / "job.sh").write_text(_job_script(self._job))
        with (self._directory / "disk").open("wb") as disk:
            disk.truncate(self._job.disk)

    def _boot(self) -> None:
        kernel = [
            str(KERNEL),
            str(self._directory),
            f"mem={self._job.memory >> 20}M",
            "root=/dev/root",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            f"init={self._directory}/guest-init.sh",
            f"run_dir={self._directory}",
            f"ubda={self._directory}/disk",
            f"uml_dir={self._directory}/",
            "umid=kernel",
            "con=null",
            "con0=fd:0,fd:1",
            "quiet",
        ]
        # The kernel starts processes that outlive it when it is killed. In a process namespace of their own, they cannot: the
        # shell is its first process, and stays it, because the kernel's way to die (abort) has no effect on a first process.
        command = [
            "unshare",
            "--pid",
            "--fork",
            "--kill-child=KILL",
            "--mount-proc",
            "sh",
            "-c",
            '"$@"; exit $?',
            "sh",
            *kernel,
        ]
        if self._interactive:
            self._process = subprocess.Popen(command)
            return
        with self._console.open("wb") as console:
            self._process = subprocess.Popen(
                # A test run that is killed with -9 takes its guests with it.
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _kill(self) -> None:
        """Kill the namespace's first process, and so all in it; `unshare` ends when the last of them has."""
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess, subprocess.TimeoutExpired):
            for first in psutil.Process(self._process.pid).children():
                first.kill()
            self._process.wait(10)
        self._process.kill()
        self._process.wait()


def _job_script(job: Job) -> str:
    """Return the shell text that guest-init.sh reads: VISIBLE, a path a line, and the function `job`."""
    environment = {
        "TATAMI_GUEST": "1",
        "PYTHONUNBUFFERED": "1",
        # The checkout is read-only in there.
        "PYTHONDONTWRITEBYTECODE": "1",
        "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
        **job.environment,
    }
    assignments = " ".join(shlex.quote(f"{name}={value}") for name, value in environment.items())
    return (
        f"VISIBLE={shlex.quote(chr(10).join(map(str, _visible(job.visible))))}\n"
        f"job() {{ cd {shlex.quote(str(CHECKOUT))} && env {assignments} {shlex.join(job.command)}; }}\n"
    )


def _visible(more: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Return the paths of this machine that the job needs, outermost only, without what the guest has anyway.

    A virtualenv is not enough: its standard library belongs to the interpreter that it was made from, wherever that lies.
    """
    wanted = [CHECKOUT, pathlib.Path(sys.prefix), pathlib.Path(sys.base_prefix), pathlib.Path(sys.base_exec_prefix)]
    wanted += [pathlib.Path(entry) for entry in sys.path if entry]
    # `python` in a virtualenv is a chain of links; each of them has to resolve.
    link = pathlib.Path(sys.executable)
    while link.is_symlink():
        link = link.parent / link.readlink()
        wanted.append(link.parent)
    wanted += more
    paths: list[pathlib.Path] = []
    for path in sorted({pathlib.Path(os.path.normpath(entry)) for entry in wanted}, key=lambda entry: len(entry.parts)):
        inside = [pathlib.Path("/usr"), pathlib.Path("/opt"), *paths]
        if path.exists() and path != pathlib.Path("/") and not any(path.is_relative_to(outer) for outer in inside):
            paths.append(path)
    return paths


def remove_leftovers() -> None:
    """Remove the directories of guests whose starter was killed before it could."""
    for directory in pathlib.Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(ValueError):
            if not psutil.pid_exists(int(directory.name.removeprefix(PREFIX).split("-")[0])):
                shutil.rmtree(directory, ignore_errors=True)


def install() -> None:
    """Install what a guest needs; quick where nothing is missing.

    Raises subprocess.CalledProcessError where that fails; the reason is on standard error then.
    """
    subprocess.run([HERE / "install.sh"], check=True)


def main() -> int:
    """Run the command line's job in a guest, its console on standard output, and return its exit code."""
    parser = argparse.ArgumentParser(description="Run pytest, a shell or a command inside user-mode Linux.")
    parser.add_argument("--memory", type=int, default=Job.memory >> 20, metavar="MiB")
    parser.add_argument("--timeout", type=float, default=Job.timeout, metavar="SECONDS")
    parser.add_argument("--junit", type=pathlib.Path, metavar="FILE", help="keep pytest's report there")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shell", action="store_true", help="a shell on this terminal instead of pytest; `exit` ends the guest")
    what.add_argument("--command", action="store_true", help="the arguments are a command, not pytest's")
    parser.add_argument("arguments", nargs="*", help="pytest's arguments (after --), relative to the checkout")
    options = parser.parse_args()
    install()
    remove_leftovers()
    # SIGTERM as an exception, so that the guest goes with us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.shell:
        job = Job(command=["setsid", "--ctty", "--wait", "/bin/bash"], memory=options.memory << 20, timeout=86400.0)
    elif options.command:
        job = Job(command=options.arguments, memory=options.memory << 20, timeout=options.timeout)
    else:
        job = pytest_job(options.arguments, memory=options.memory << 20, timeout=options.timeout)
    with Guest(job, interactive=options.shell) as guest:
        for line in guest.follow():
            print(line, flush=True)
        try:
            return guest.exit_code()
        except GuestDied as died:
            print(died, file=sys.stderr)
            return 70
        finally:
            if options.junit and guest.junit.exists():
                shutil.copy(guest.junit, options.junit)


if __name__ == "__main__":
    sys.exit(main())
