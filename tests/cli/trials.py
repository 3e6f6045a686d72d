"""`tatami try` as a process: run by whoever runs the tests, or, where that is root, by a user without any rights."""

import fcntl
import json
import os
import shlex
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NOBODY = 65534
SECONDS = 60


class Trials:
    """Starts trials below `home`, and ends those that a test left."""

    def __init__(self, *, rootless: bool = False):
        # Short, because of the socket; below /tmp, because nobody may enter pytest's own directories.
        self.home = Path(tempfile.mkdtemp(prefix="try-", dir="/tmp")).resolve()
        self.directory = self.home / "run"
        self.rootless = rootless
        self._started: list[subprocess.Popen[str]] = []
        if rootless:
            os.chmod(self.home, 0o755)
            for name in ("python", "packages", "repository", "work"):
                (self.home / name).mkdir()
            os.chown(self.home / "work", NOBODY, NOBODY)
            self.directory = self.home / "work" / "run"

    def argv(self, *arguments: str) -> list[str]:
        """Return what runs `python -m csi_driver ARGUMENTS`; as another user with copies of everything that he may not reach."""
        if not self.rootless:
            return [sys.executable, "-m", "csi_driver", *arguments]
        # The interpreter may lie in root's home. A bind mount in a namespace of this process alone makes it reachable.
        interpreter = self.home / "python" / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
        script = [
            ["mount", "--bind", sys.base_prefix, self.home / "python"],
            ["mount", "--bind", site.getsitepackages()[0], self.home / "packages"],
            ["mount", "--bind", REPOSITORY, self.home / "repository"],
            ["cd", self.home / "repository"],
            ["export", f"PYTHONPATH={self.home}/repository:{self.home}/packages", f"HOME={self.home}/work"],
            [
                "exec",
                "setpriv",
                f"--reuid={NOBODY}",
                f"--regid={NOBODY}",
                "--clear-groups",
                interpreter,
                "-m",
                "csi_driver",
                *arguments,
            ],
        ]
        return ["unshare", "--mount", "sh", "-ec", "\n".join(shlex.join(map(str, line)) for line in script)]

    def run(self, *options: str, directory: Path | None = None, prefix: tuple[str, ...] = (), **environment: str):
        """Run a trial with --once to its end."""
        argv = self.argv("try", "--directory", str(directory or self.directory), "--once", *options)
        return subprocess.run(
            [*prefix, *argv],
            cwd=REPOSITORY,
            env=_environment(environment),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def start(self, *options: str, directory: Path | None = None, pipe_bytes: int | None = None) -> "subprocess.Popen[str]":
        """Start a trial that tells what it does in JSON."""
        argv = self.argv("try", "--directory", str(directory or self.directory), "--output", "json", *options)
        read, write = os.pipe()
        if pipe_bytes:
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, pipe_bytes)
        process = subprocess.Popen(argv, cwd=REPOSITORY, env=_environment({}), stdout=write, stderr=subprocess.PIPE, text=True)
        os.close(write)
        process.stdout = os.fdopen(read, encoding="utf-8")
        self._started.append(process)
        return process

    def serving(self) -> "tuple[subprocess.Popen[str], dict]":
        """Start a trial and wait until it serves; returns it with what it then said."""
        process = self.start()
        return process, event(process, "serving")

    def call(self, method: str, request: dict | None = None) -> dict:
        """Ask the driver of a trial that serves."""
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "csi_driver",
                "call",
                "--endpoint",
                f"unix://{self.directory}/csi.sock",
                method,
                json.dumps(request or {}),
            ],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def mount_a_volume(self) -> Path:
        """Bring a volume to a pod that nobody takes away again, and return where."""
        capability = {"mount": {}, "access_mode": {"mode": "SINGLE_NODE_WRITER"}}
        volume = self.call("CreateVolume", {"name": "left", "volume_capabilities": [capability]})["volume"]["volume_id"]
        attached = self.call(
            "ControllerPublishVolume", {"volume_id": volume, "node_id": "this-node", "volume_capability": capability}
        )
        staging, target = self.directory / "kubelet/staging/left", self.directory / "kubelet/pods/writer/left"
        about = {"volume_id": volume, "volume_capability": capability, "staging_target_path": str(staging), **attached}
        self.call("NodeStageVolume", about)
        self.call("NodePublishVolume", {**about, "target_path": str(target)})
        return target

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait(SECONDS)
            for stream in (process.stdout, process.stderr):
                stream.close()
        for pid in processes_of(self.home):  # of a test that failed
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not processes_of(self.home))
        for point in reversed(mounts_of(self.home)):
            subprocess.run(["umount", point], check=True)
        shutil.rmtree(self.home)


def event(process: "subprocess.Popen[str]", name: str) -> dict:
    """Read lines up to the event `name` and return it."""
    for line in process.stdout:
        told = json.loads(line)
        if told["event"] == name:
            return told
    raise AssertionError(f"the trial ended without {name!r}: {process.stderr.read()}")


def processes_of(directory: Path) -> list[int]:
    """List the processes whose command line names the directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if os.fsencode(directory) in line:
            found.append(int(entry.name))
    return found


def mounts_of(directory: Path, pid: int | str = "self") -> list[str]:
    """List the mounts below the directory, as the process sees them."""
    lines = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(f"{directory}/")]


def wait_until(true) -> None:
    until = time.monotonic() + 20
    while not true():
        assert time.monotonic() < until, "it did not happen within 20 s"
        time.sleep(0.02)


def _environment(extra: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **extra}
