"""Jobs: work that may outlast the call that asked for it.

A copy of a terabyte cannot end within a sidecar's fifteen seconds. It runs in a thread of its own; the call waits as long as it
may and then answers ABORTED, and the retry joins the same job instead of starting it again. How a job ended is told to whoever
asks next, so a failure that came between two retries is not lost.
"""

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from csi_driver.errors import OperationPending, TatamiError, Unavailable
from csi_driver.linux.copies import Progress

T = TypeVar("T")

REPLY_MARGIN_SECONDS = 1.0
"""How long before its deadline a call stops waiting, so that the answer still reaches the caller."""
KEEP_FAILURE_SECONDS = 600.0
MOST_JOBS = 500
"""Each job is a thread, running or in line; who comes later is told to come back."""

_log = logging.getLogger(__name__)


class JobCancelled(OperationPending):
    """The job was told to stop: what it made is being deleted, or the driver shuts down."""


@dataclass(eq=False)
class JobControl:
    """What work sees of its job: where it shows its progress, and whether it was told to stop."""

    key: str
    parts: list[Progress] = field(default_factory=lambda: [Progress()])  # one after the other, the present one last
    started: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)
    shutdown: bool = False  # whether it was cancelled because the driver stops: the next one is asked for the same
    ahead: int = 0  # how many others have to end before it is this one's turn
    total_bytes: int | None = None  # what will have been done at the end of this part, where that is known
    doing: str = ""  # what this part is: "copying"

    @property
    def progress(self) -> Progress:
        """How far the present part is."""
        return self.parts[-1]

    @property
    def bytes(self) -> int:
        """How many bytes the job has read or copied in all."""
        return sum(part.bytes for part in self.parts)

    def should_stop(self) -> bool:
        return self.cancelled.is_set()

    def begin(self, doing: str, total_bytes: int | None) -> None:
        """Count from zero for another part of the work: what one part has done says nothing of the next."""
        self.parts.append(Progress())
        self.doing, self.total_bytes = doing, total_bytes
        self.began()

    def began(self) -> None:
        """Count time from now on: its turn has come."""
        self.ahead = 0
        self.started = time.monotonic()

    def describe(self) -> str:
        """Say how far it is: files, bytes, rate, and how long the rest will take where that can be told."""
        if self.ahead:
            return f"waits for its turn, {self.ahead} before it"
        files, done, seconds = self.progress.files, self.progress.bytes, time.monotonic() - self.started
        rate = done / seconds if seconds > 0 else 0.0
        of_all = f" of {show_bytes(self.total_bytes)}" if self.total_bytes else ""
        said = f"{files} files, {show_bytes(done)}{of_all} in {seconds:.0f} s, {show_bytes(rate)}/s"
        if self.doing:
            said = f"{self.doing}: {said}"
        if self.total_bytes and rate and self.total_bytes > done:
            said += f", about {(self.total_bytes - done) / rate:.0f} s to go"
        return said


@dataclass(eq=False)
class Job(JobControl, Generic[T]):
    """One piece of work that runs or has ended."""

    finished: threading.Event = field(default_factory=threading.Event)
    result: T | None = None
    error: BaseException | None = None
    ended: float = 0.0
    counted: bool = False  # whether its bytes are among those of the jobs that have ended


class Jobs:
    """All jobs of this process, by key."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._jobs: dict[str, Job[Any]] = {}
        self._stopping = False
        self._bytes = 0  # of jobs that have ended

    def run(self, key: str, work: Callable[[JobControl], T], deadline: float) -> T:
        """Start `work` as job `key`, or join the one that runs, and return its result.

        `deadline` is a time.monotonic() value in seconds. Raises OperationPending when the job outlasts it, and what the job raised.
        """
        job = self._join_or_start(key, work)
        if not job.finished.wait(max(0.0, deadline - REPLY_MARGIN_SECONDS - time.monotonic())):
            raise OperationPending(f"{key} is being made ({job.describe()}); the work goes on, try again")
        self._forget(job)
        if job.error is not None:
            raise job.error
        return job.result  # type: ignore[return-value]  # finished without an error: the result is there

    def running(self) -> list[Job[Any]]:
        """List the jobs that have not ended."""
        with self._guard:
            return [job for job in self._jobs.values() if not job.finished.is_set()]

    def bytes(self) -> int:
        """Count what all jobs have read or copied since the start, those that run included."""
        with self._guard:
            return self._bytes + sum(job.bytes for job in self._jobs.values() if not job.counted)

    def find(self, key: str) -> Job[Any] | None:
        """Return the job `key` while it runs."""
        with self._guard:
            job = self._jobs.get(key)
        return job if job is not None and not job.finished.is_set() else None

    def cancel(self, key: str) -> None:
        """Tell the job `key` to stop, if there is one; it ends soon after, not at once. A failure that nobody fetched is dropped."""
        with self._guard:
            job = self._jobs.get(key)
            if job is None:
                return
            if job.finished.is_set():
                del self._jobs[key]
            job.cancelled.set()

    def stop(self, timeout: float) -> None:
        """Cancel all jobs and wait at most `timeout` seconds for them; no new one starts."""
        with self._guard:
            self._stopping = True
        running = self.running()
        for job in running:
            job.shutdown = True
            job.cancelled.set()
        until = time.monotonic() + timeout
        for job in running:
            job.finished.wait(max(0.0, until - time.monotonic()))

    def _join_or_start(self, key: str, work: Callable[[JobControl], T]) -> Job[T]:
        with self._guard:
            self._forget_old_failures()
            found = self._jobs.get(key)
            if found is not None:
                return found  # one key stands for one kind of work
            if self._stopping:
                raise Unavailable("the driver is shutting down; try again")
            if sum(not job.finished.is_set() for job in self._jobs.values()) >= MOST_JOBS:
                raise OperationPending(f"{MOST_JOBS} jobs run or wait already; try again")
            job: Job[T] = Job(key)
            self._jobs[key] = job
        context = contextvars.copy_context()  # the request id stays in the job's log lines
        thread = threading.Thread(target=context.run, args=(self._work, job, work), name=f"job {key}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the process may have no more threads (pids limit): or all would wait for it without end
            self._forget(job)
            job.error = Unavailable(f"{key} cannot be started: {error}; try again")
            job.finished.set()
        return job

    def _work(self, job: Job[T], work: Callable[[JobControl], T]) -> None:
        try:
            job.result = work(job)
            self._count(job)
            # Only failures are kept for whoever asks next: a success is in the records, and must not answer for a later namesake.
            self._forget(job)
        except (TatamiError, OSError) as error:
            job.error = error
            _log.info("job failed", extra={"job": job.key, "error": str(error)})
        except BaseException as error:  # noqa: BLE001 - whoever joins raises it, and that call's log has the traceback
            job.error = error
        finally:
            self._count(job)
            job.ended = time.monotonic()
            job.finished.set()

    def _count(self, job: Job[T]) -> None:
        with self._guard:
            if not job.counted:
                job.counted = True
                self._bytes += job.bytes

    def _forget(self, job: Job[T]) -> None:
        with self._guard:
            if self._jobs.get(job.key) is job:
                del self._jobs[job.key]

    def _forget_old_failures(self) -> None:
        now = time.monotonic()
        for key, job in list(self._jobs.items()):
            if job.finished.is_set() and now - job.ended > KEEP_FAILURE_SECONDS:
                del self._jobs[key]


def show_bytes(number: float) -> str:
    """Show bytes in the largest binary unit that leaves a digit before the point."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
