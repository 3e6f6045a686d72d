"""Turns: how many copies, and readings of snapshots, run in one pool at the same time. The others wait in line.

A disk is not quicker for two copies than for one after the other, but everybody else who uses it is slower; two at a time, so that a
small one need not wait for a large one. What the pool does in one step (a btrfs snapshot) needs no turn.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from csi_driver.volumes.jobs import JobCancelled, JobControl

COPIES_AT_ONCE = 2
_LOOK_SECONDS = 0.5  # how soon a job that waits sees that it was cancelled


class Turns:
    """One line for each pool. One for the whole process."""

    def __init__(self, at_once: int = COPIES_AT_ONCE) -> None:
        self._at_once = at_once
        self._changed = threading.Condition()
        self._lines: dict[str, list[JobControl]] = defaultdict(list)

    @contextmanager
    def take(self, pool: str, job: JobControl) -> Iterator[None]:
        """Wait until it is this job's turn, and keep it until the context ends. Raises JobCancelled."""
        line = self._lines[pool]
        try:
            with self._changed:
                line.append(job)
                while (ahead := line.index(job) + 1 - self._at_once) > 0:
                    if job.should_stop():
                        raise JobCancelled(f"{job.key} was stopped before its turn came")
                    job.ahead = ahead
                    self._changed.wait(_LOOK_SECONDS)
            job.began()
            yield
        finally:
            with self._changed:
                line.remove(job)
                self._changed.notify_all()
