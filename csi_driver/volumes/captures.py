"""Captures: filling a new directory with what a volume or a snapshot holds, by the best way that the pool has.

The ladder, from the top: *subvolume* (a btrfs snapshot: one point in time, in milliseconds, whatever the size), *reflink*,
*copy_file_range*, *copy* (linux/contents.py: file by file). What a pool can do is found out once by trying, and again at each start.
Where subvolumes can be had each volume is one, so that it can be captured at once; a directory that is none (made before, offered by
an admin) and one in which a tenant has made subvolumes of his own, which a snapshot would leave out, go one rung lower.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from csi_driver.errors import FailedPrecondition, quoted
from csi_driver.linux import abilities, btrfs, system_calls
from csi_driver.linux.abilities import Abilities, Capture
from csi_driver.linux.copies import CopyReport, copy_tree
from csi_driver.linux.inode_flags import clear_holding_flags
from csi_driver.linux.priorities import stand_back
from csi_driver.linux.walk import WalkStopped
from csi_driver.volumes.jobs import JobCancelled, JobControl
from csi_driver.volumes.model import CaptureReport, Form, Layout
from csi_driver.volumes.pool_layout import STAGING
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.turns import Turns

POINT_IN_TIME = "point in time"
FILE_BY_FILE = "file by file"
SUBVOLUME: Capture = "subvolume"
AT_ONCE: frozenset[Capture] = frozenset({SUBVOLUME, "reflink"})
"""What captures an image at one moment, whoever writes to it."""

LOCAL_WORKERS = 1
"""On a local disk a second thread only takes the interpreter from the first: 10,000 files took 0.24 s with one, 0.72 s with two."""
REMOTE_WORKERS = 16
"""Where each step is a round trip, many can wait at once; with a round trip of 1 ms 16 threads copy 3 times as fast as cp -a."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_log = logging.getLogger(__name__)


class Hold(Protocol):
    """Holds what is being made to its size. `top` is a descriptor of its top directory."""

    def begin(self, top: int) -> None:
        """Set the limit: before there is content, or, where a snapshot brings all of it at once, right after."""

    def finish(self, top: int) -> None:
        """See that the content, which is all there and on disk, fits."""

    def is_outgrown(self, copied_bytes: int) -> bool:
        """Tell whether so much cannot have been in the source at any moment: somebody rewrites it while it is copied file by file."""


class HoldNothing:
    """For snapshots of what is not held itself: nobody writes to them, and nobody knows how much may be in them."""

    def begin(self, top: int) -> None:
        """Do nothing."""

    def finish(self, top: int) -> None:
        """Do nothing."""

    def is_outgrown(self, copied_bytes: int) -> bool:  # noqa: ARG002
        return False


class HoldToSource(HoldNothing):
    """For snapshots of a volume that is held to its size: they cannot be larger than it is, or ever was."""

    def __init__(self, ask_most: Callable[[], int | None]) -> None:
        """`ask_most` says how many bytes the volume can have just now; it may grow. None: nobody knows."""
        self._ask_most = ask_most
        self._most: int | None = 0

    def is_outgrown(self, copied_bytes: int) -> bool:
        if self._most is not None and copied_bytes > self._most:
            self._most = self._ask_most()
        return self._most is not None and copied_bytes > self._most


def consistency_of(report: CaptureReport, form: Form) -> str:
    """Say honestly what a capture shows: one moment, or each file as it was when it was read.

    An image is one file, captured at once or while nobody writes to it (images.py): a crash-consistent filesystem.
    """
    return POINT_IN_TIME if report.method == SUBVOLUME or form.layout is Layout.IMAGE else FILE_BY_FILE


class Captures:
    """Makes directories in staging and fills them."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._guard = threading.Lock()
        self._known: dict[tuple[str, int], Abilities] = {}

    def abilities_of(self, store: PoolStore) -> Abilities:
        """Return what the pool can do. Raises OSError where it cannot be found out now (ENOSPC, EROFS)."""
        with store.open(STAGING) as staging:
            # A share that was mounted again may have come with another version, or from another server.
            place = (store.name, store.backend.generation)
            with self._guard:
                known = self._known.get(place)
            if known is None:
                known = abilities.probe(staging)
                _log.info("how a pool captures", extra={"pool": store.name, "capture": known.best})
                with self._guard:
                    self._known[place] = known
        return known

    def make_empty(self, store: PoolStore, staging: int, name: str, hold: Hold) -> None:
        """Make an empty directory (0700) that can be captured as well as the pool allows, and hold it."""
        if self.abilities_of(store).subvolumes:
            btrfs.create(staging, name)
            os.chmod(name, 0o700, dir_fd=staging)
        else:
            os.mkdir(name, 0o700, dir_fd=staging)
        with _opened(staging, name) as top:
            hold.begin(top)

    def capture(
        self, store: PoolStore, source: int, staging: int, name: str, origin: str, job: JobControl, hold: Hold
    ) -> CaptureReport:
        """Make `name` in staging hold what the directory `source` holds, on disk when this returns; `origin` is the volume of it (turns.py).

        Raises JobCancelled, FailedPrecondition where a file may not be read, OSError (ENOSPC, EDQUOT: `hold` lets it have less), and
        what `hold` raises.
        """
        if self.abilities_of(store).subvolumes and (report := _snapshot(source, staging, name)) is not None:
            with _opened(staging, name) as top:
                hold.begin(top)
                hold.finish(top)
            return report
        with self._turns.take(store.name, origin, job):
            stand_back()
            # What was written before is in the copy, also where writing it out fails only now.
            system_calls.sync_filesystem(source)
            self.make_empty(store, staging, name, hold)
            target = os.open(name, _DIRECTORY, dir_fd=staging)
            try:
                copied = _copy(store, source, target, job, hold)
                if job.should_stop():
                    raise JobCancelled(f"{job.key} was stopped")
                system_calls.sync_filesystem(target)
                hold.finish(target)
            finally:
                os.close(target)
        return CaptureReport(copied.method, copied.files, copied.bytes, dict(copied.not_carried))


def _copy(store: PoolStore, source: int, target: int, job: JobControl, hold: Hold) -> CopyReport:
    """Copy the tree. Raises FailedPrecondition for what may not be read, or is rewritten meanwhile, WalkStopped, OSError."""
    try:
        return copy_tree(
            source,
            target,
            progress=job.progress,
            should_stop=lambda: job.should_stop() or hold.is_outgrown(job.progress.bytes),
            workers=LOCAL_WORKERS if store.backend.data_is_here else REMOTE_WORKERS,
        )
    except WalkStopped as stopped:
        if job.should_stop() or not hold.is_outgrown(job.progress.bytes):
            raise
        raise FailedPrecondition(
            f"pool {store.name}: the volume is rewritten while it is copied file by file: {job.progress.bytes} bytes were copied so far, more than "
            "it can hold at once; stop what writes to it, and try again"
        ) from stopped
    except PermissionError as error:
        raise FailedPrecondition(
            f"pool {store.name}: {quoted(error.filename or 'the top', 400)} cannot be copied whole ({error.strerror}): what runs here may not "
            "read it; export an NFS pool to the controller with `no_root_squash`, or let its owner make it readable for all"
        ) from error
    except BlockingIOError as error:
        if job.should_stop():
            raise JobCancelled(f"{job.key} was stopped") from error
        raise FailedPrecondition(
            f"pool {store.name}: {quoted(error.filename or 'a file', 400)} cannot be copied: a program holds a write lease on it, or on several "
            "files (fcntl(2), F_SETLEASE; /proc/locks shows them), and does not give it back; stop that program, and try again"
        ) from error


@contextmanager
def _opened(staging: int, name: str) -> Iterator[int]:
    top = os.open(name, _DIRECTORY, dir_fd=staging)
    try:
        yield top
    finally:
        os.close(top)


def _snapshot(source: int, staging: int, name: str) -> CaptureReport | None:
    """Take a snapshot that holds all that `source` holds; None where that cannot be had."""
    if not btrfs.is_subvolume(source) or btrfs.holds_subvolumes(source):
        return None
    try:
        btrfs.snapshot(source, staging, name)
    except OSError as error:
        if error.errno in btrfs.NOT_HERE:
            return None
        raise
    if btrfs.holds_subvolumes(source):  # made since we looked: it may have been there at the moment of the snapshot
        btrfs.destroy(staging, name)
        return None
    top = os.open(name, _DIRECTORY, dir_fd=staging)
    try:
        held = clear_holding_flags(top)  # it must still be moved into place
        return CaptureReport(SUBVOLUME, None, None, {"inode flags": 1} if held else {})
    finally:
        os.close(top)
