"""Turns: how many copies, and readings of snapshots, run in one pool at the same time. The others wait in line.

A disk is not quicker for two copies than for one after the other, but everybody else who uses it is slower; two at a time, so that a
small one need not wait for a large one. What the pool does in one step (a btrfs snapshot) needs no turn.

Whoever asks for many copies of one volume waits for himself: the line goes in rounds, and each volume has one turn in a round. A job
joins the next round, or the first one after its volume's last. So none waits for more than one job of each other volume; and a round
that has begun takes in nobody, so that none is passed without end.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from csi_driver.volumes.jobs import JobCancelled, JobControl

COPIES_AT_ONCE = 2
_LOOK_SECONDS = 0.5  # how soon a job that waits sees that it was cancelled


@dataclass(frozen=True, eq=False)
class _Place:
    round: int
    origin: str


@dataclass
class _Line:
    """A pool's line; `round` is the latest of which a job has begun."""

    running: list[_Place] = field(default_factory=list)
    waiting: list[_Place] = field(default_factory=list)
    round: int = 0

    def join(self, origin: str) -> _Place:
        own = [place.round for place in (*self.running, *self.waiting) if place.origin == origin] or [0]
        place = _Place(max(self.round, *own) + 1, origin)
        self.waiting.append(place)
        return place

    def ahead_of(self, place: _Place) -> int:
        """Count who comes before: earlier rounds; in the same, volumes of which no other copy runs; and who was here first."""

        def rank(each: _Place) -> tuple[int, int]:
            return each.round, sum(other.origin == each.origin for other in self.running)

        return sorted(self.waiting, key=rank).index(place)

    def start(self, place: _Place) -> None:
        self.waiting.remove(place)
        self.running.append(place)
        self.round = max(self.round, place.round)

    def leave(self, place: _Place) -> None:
        (self.running if place in self.running else self.waiting).remove(place)


class Turns:
    """One line for each pool, or whatever else `take` is told to be one; one object for all who shall wait for each other."""

    def __init__(self, at_once: int = COPIES_AT_ONCE) -> None:
        self._at_once = at_once
        self._changed = threading.Condition()
        self._lines: dict[str, _Line] = defaultdict(_Line)

    @contextmanager
    def take(self, pool: str, origin: str, job: JobControl) -> Iterator[None]:
        """Wait until it is this job's turn, and keep it until the context ends; `origin` is whatever has one turn in a round: of copies,
        the volume that the content comes from.

        Raises JobCancelled.
        """
        with self._changed:
            line = self._lines[pool]
            place = line.join(origin)
        try:
            with self._changed:
                while (ahead := line.ahead_of(place) + 1 - (self._at_once - len(line.running))) > 0:
                    if job.should_stop():
                        raise JobCancelled(f"{job.key} was stopped before its turn came")
                    job.ahead = ahead
                    self._changed.wait(_LOOK_SECONDS)
                line.start(place)
            job.began()
            yield
        finally:
            with self._changed:
                line.leave(place)
                self._changed.notify_all()
