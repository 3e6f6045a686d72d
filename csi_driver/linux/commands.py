"""The one place where processes are started: no shell, a deadline, bounded output.

`subprocess.run(timeout=)` kills at its deadline and then waits without limit, and a child stuck in the kernel (mount, stat or umount
against a dead NFS server) does not die from SIGKILL until the server answers. So here nobody waits after the kill: the caller gets
DeadlineExceeded at once, and one background thread reaps the child whenever the kernel lets go of it.

A command is over when its own process has ended, not when its pipes are closed: helpers that stay behind (a FUSE daemon, rpc.statd)
may hold them for ever. They live on; only at the deadline is the whole process group killed. What made itself a session of its own
escapes that, as a daemon means to.

Secrets go through `stdin`: the argument vector is seen by every process of the node and is named in errors.
"""

import contextlib
import functools
import os
import selectors
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, cast

from csi_driver.errors import DeadlineExceeded

OUTPUT_LIMIT = 1 << 20  # bytes kept of each stream
_CHUNK = 1 << 16  # bytes: a pipe's capacity, see pipe(7)
_EXIT_POLL = 0.05  # seconds: how late the end of a command is noticed whose pipes somebody else holds open
_REAP_POLL = 0.2  # seconds


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that ran to its end. `returncode` is negative for a signal, as in subprocess."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str  # undecodable bytes as surrogates, so that file names survive
    stderr: str  # undecodable bytes as \\xNN, so that it can be printed; the last OUTPUT_LIMIT bytes


class CommandFailed(Exception):
    """A command ended with another exit code than 0, or printed more than anyone can have meant."""

    def __init__(self, argv: Sequence[str], returncode: int, stdout: str, stderr: str) -> None:
        super().__init__(argv, returncode, stdout, stderr)
        self.argv, self.returncode, self.stdout, self.stderr = tuple(argv), returncode, stdout, stderr

    def __str__(self) -> str:
        last_lines = " | ".join(line.strip() for line in self.stderr.splitlines()[-3:] if line.strip())
        how = f"was killed by signal {-self.returncode}" if self.returncode < 0 else f"exited with {self.returncode}"
        return f"`{_shown(self.argv)}` {how}: {last_lines[-400:] or 'it said nothing'}"


class CommandMissing(Exception):
    """The command is not installed, or not executable, where the driver runs."""

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(f"cannot start the command {command!r} ({reason}): it is missing from the driver's image or PATH")
        self.command = command


def run(
    argv: Sequence[str],
    *,
    timeout: float,
    stdin: bytes | None = None,
    check: bool = True,
    should_stop: Callable[[bytes], bool] | None = None,
) -> Completed:
    """Run `argv` to its end, at most `timeout` seconds, in a session of its own with LC_ALL=C and "/" as directory.

    `should_stop` is asked some twenty times a second, with what was printed so far; True is as if the deadline had come. Raises CommandFailed on a non-zero exit (with `check`) and on more than OUTPUT_LIMIT bytes of standard output (always: half an
    answer is none), CommandMissing when there is no such command, DeadlineExceeded at the deadline: then the process group has been
    sent SIGKILL, and whether the command took effect is not known.
    """
    deadline = time.monotonic() + timeout
    process = _start(argv, stdin)
    try:
        stdout, stderr = _talk(process, stdin, deadline, should_stop)
        if len(stdout) > OUTPUT_LIMIT:
            raise CommandFailed(argv, -signal.SIGKILL, "", f"printed more than {OUTPUT_LIMIT} bytes and was stopped")
        returncode = process.wait(timeout=max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        lasted = timeout + time.monotonic() - deadline
        raise DeadlineExceeded(
            f"`{_shown(argv)}` was killed after {round(lasted, 1):g} s; whether it took effect is not known"
        ) from None
    finally:
        for stream in (process.stdin, process.stdout, process.stderr):
            _close(stream)
        if process.returncode is None:
            _kill_group(process)
            _reaper.take(process)
    completed = Completed(
        tuple(argv), returncode, stdout.decode(errors="surrogateescape"), stderr.decode(errors="backslashreplace")
    )
    if check and returncode != 0:
        raise CommandFailed(completed.argv, returncode, completed.stdout, completed.stderr)
    return completed


def stuck_children() -> int:
    """Count the killed commands that the kernel has not let go of yet."""
    return _reaper.count()


def _start(argv: Sequence[str], stdin: bytes | None) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            # Python's descriptors are all close-on-exec (PEP 446). To close them before exec as well would be done while this whole
            # process waits for its new child (vfork), and closing one with unwritten data of a dead NFS server does not return.
            close_fds=False,
            start_new_session=True,
            cwd="/",  # a command must not keep busy whatever directory the driver happens to stand in
            env={**os.environ, "LC_ALL": "C", "LANGUAGE": "C"},
        )
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        raise CommandMissing(argv[0], error.strerror or "cannot be executed") from error


def _talk(
    process: subprocess.Popen[bytes], stdin: bytes | None, deadline: float, should_stop: Callable[[bytes], bool] | None
) -> tuple[bytes, bytes]:
    """Feed and drain the pipes until they close, the process ends, or stdout is too long. Raises TimeoutExpired."""
    stdout, stderr = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        _watch(selector, process.stdout, selectors.EVENT_READ, functools.partial(_drain, kept=stdout))
        _watch(selector, process.stderr, selectors.EVENT_READ, functools.partial(_drain, kept=stderr))
        _watch(selector, process.stdin, selectors.EVENT_WRITE, functools.partial(_feed, pending=bytearray(stdin or b"")))
        while selector.get_map() and len(stdout) <= OUTPUT_LIMIT:
            # Asked before the pipes are: what an ended process wrote is then certain to be in them.
            ended = process.poll() is not None
            remaining = deadline - time.monotonic()
            if not ended and (remaining <= 0 or (should_stop is not None and should_stop(bytes(stdout)))):
                raise subprocess.TimeoutExpired(process.args, 0)
            ready = selector.select(0 if ended else min(remaining, _EXIT_POLL))
            if ended and (remaining <= 0 or not any(events & selectors.EVENT_READ for _, events in ready)):
                break
            for key, _ in ready:
                if not key.data(key.fd):
                    selector.unregister(key.fileobj)
                    _close(cast("IO[bytes]", key.fileobj))
            # The end of standard error is where a command says why it failed.
            del stderr[:-OUTPUT_LIMIT]
    return bytes(stdout), bytes(stderr)


def _watch(selector: selectors.BaseSelector, stream: IO[bytes] | None, event: int, move: Callable[[int], bool]) -> None:
    """Have `move` called with the stream's descriptor whenever it is ready, until it answers False."""
    if stream is not None:
        os.set_blocking(stream.fileno(), False)
        selector.register(stream, event, move)


def _feed(fd: int, pending: bytearray) -> bool:
    """Write what the pipe takes. False when all is written, or nobody reads any more."""
    try:
        del pending[: os.write(fd, pending[:_CHUNK])]
    except BlockingIOError:
        return True
    except BrokenPipeError:
        return False  # the exit code says whether that was all right
    return bool(pending)


def _drain(fd: int, kept: bytearray) -> bool:
    """Read what is there. False at the end of the stream."""
    chunk = os.read(fd, _CHUNK)
    kept += chunk
    return bool(chunk)


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        with contextlib.suppress(BrokenPipeError):
            stream.close()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # The process is not reaped yet, so its id, which is also the group's, cannot be another's by now.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _shown(argv: Sequence[str], limit: int = 300) -> str:
    text = shlex.join(argv)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= limit else text[:limit] + "…"


class _Reaper:
    """Waits for killed children in one thread, so that they neither stay zombies nor hold up a caller."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def take(self, child: subprocess.Popen[bytes]) -> None:
        with self._changed:
            self._children.append(child)
            if self._thread is None:
                self._thread = threading.Thread(target=self._reap, name="command-reaper", daemon=True)
                self._thread.start()
            self._changed.notify()

    def count(self) -> int:
        with self._changed:
            return len(self._children)

    def _reap(self) -> None:
        while True:
            with self._changed:
                while not self._children:
                    self._changed.wait()
                self._children = [child for child in self._children if child.poll() is None]
            time.sleep(_REAP_POLL)


_reaper = _Reaper()
