"""A trial: the driver as a child process, with everything it needs in one directory and nothing anywhere else."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from csi_driver.cli import sandbox
from csi_driver.config import ConfigError, parse_endpoint

POOL = "demo"
NODE = "this-node"
_MARK = "# Written by `tatami try`; a new trial writes it anew."
_START_SECONDS = 30.0
_STOP_SECONDS = 30.0  # the driver itself takes at most 25, see main.STOP_SECONDS
_POLL_SECONDS = 0.02


class TrialFailed(Exception):
    """The trial cannot go on; the text is for whoever typed the command."""


@dataclass(frozen=True)
class Site:
    """Where the files of a trial lie; `directory` is absolute and without symbolic links."""

    directory: Path

    @property
    def config(self) -> Path:
        return self.directory / "pools.toml"

    @property
    def pool(self) -> Path:
        return self.directory / "pool"

    @property
    def kubelet(self) -> Path:
        return self.directory / "kubelet"

    @property
    def socket(self) -> Path:
        return self.directory / "csi.sock"

    @property
    def log(self) -> Path:
        return self.directory / "driver.log"

    @property
    def endpoint(self) -> str:
        return f"unix://{self.socket}"

    def prepare(self) -> None:
        """Make the directory and `pools.toml`. Raises TrialFailed for a directory that is not a trial's, or cannot be one."""
        try:
            parse_endpoint(self.endpoint)
        except ConfigError as error:
            length = len(os.fsencode(self.socket))
            raise TrialFailed(f"--directory {self.directory}: its socket {self.socket} has {length} bytes: {error}") from None
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if any(self.directory.iterdir()) and not self._is_ours():
                raise TrialFailed(
                    f"--directory {self.directory} holds files that are not a trial's: choose an empty directory or a new one"
                )
            self.kubelet.mkdir(exist_ok=True)
            path = json.dumps(str(self.pool))  # TOML's basic strings are JSON's
            self.config.write_text(f'{_MARK}\n[driver]\nbackend = "hostpath"\n\n[pools.{POOL}]\npath = {path}\n')
        except OSError as error:
            raise TrialFailed(f"--directory {self.directory}: {error.filename or ''}: {error.strerror}") from error

    def is_served(self) -> bool:
        """Tell whether somebody listens on the socket; one that a killed driver left does not count."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(os.fspath(self.socket)) == 0

    def shown(self, path: Path) -> str:
        """Return a path of the trial as people would type it: from where they are, if it lies below that."""
        here = Path.cwd()
        return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)

    def _is_ours(self) -> bool:
        try:
            return self.config.read_text().startswith(_MARK)
        except (FileNotFoundError, UnicodeDecodeError):
            return False


class DriverChild:
    """`tatami serve` with the trial's files; it dies with this process, whatever ends that."""

    def __init__(self, site: Site) -> None:
        """Start the driver. Raises TrialFailed where another trial's serves already."""
        if site.is_served():
            raise TrialFailed(f"another trial serves {site.endpoint}: end it, or choose another --directory")
        self._site = site
        self._log_start = site.log.stat().st_size if site.log.exists() else 0
        argv = [sys.executable, "-m", "csi_driver", "serve", "--config", str(site.config), "--endpoint", site.endpoint]
        argv += ["--node-id", NODE, "--kubelet-dir", str(site.kubelet), "--log-level", "info"]
        with site.log.open("ab") as log:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Settings meant for a real driver must not reach this one.
                env={name: value for name, value in os.environ.items() if not name.startswith("TATAMI_")},
                process_group=0,  # Ctrl-C is for the command: it stops the driver when it has put things away
                preexec_fn=sandbox.die_with_parent,  # noqa: PLW1509  # this process has one thread
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait for `ready`. Raises TrialFailed, with what the driver said, if it ends or is not ready in time."""
        until = time.monotonic() + _START_SECONDS
        while not (self._site.socket.exists() and ready()):
            if self._process.poll() is not None:
                raise TrialFailed(f"the driver did not start:\n{self.last_words()}")
            if time.monotonic() > until:
                raise TrialFailed(f"the driver was not ready after {_START_SECONDS:g} s:\n{self.last_words()}")
            time.sleep(_POLL_SECONDS)

    def wait(self) -> None:
        """Wait until the driver ends by itself, which it should not. Raises TrialFailed then."""
        code = self._process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise TrialFailed(f"the driver ended ({how}):\n{self.last_words()}")

    def stop(self) -> None:
        """End the driver, gently if it lets us."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def last_words(self, lines: int = 5) -> str:
        """Return the end of what this driver logged, and where the rest is."""
        with self._site.log.open("rb") as log:
            log.seek(self._log_start)
            text = log.read().decode(errors="replace")
        last = [f"  {line}" for line in text.splitlines()[-lines:]] or ["  (it said nothing)"]
        return "\n".join([*last, f"The whole log: {self._site.shown(self._site.log)}"])
