"""Manifests: what a snapshot holds, file by file, so that years later somebody can tell whether it still does.

One line for each entry that is no directory, in `.csi/manifests/<id>`, beside the data and out of every tenant's sight:
`<kind> <size> <digest> <path>` (linux/tree_digests.py), the path percent-encoded. The order does not matter, for directories are not
always read in the same one: the digest of a manifest is the sum of its lines' digests. It stands in the snapshot's record, so that a
manifest that was changed is known, too. Lines are read and written one by one; memory does not grow with the snapshot.

It lies outside the tenant's volume, and a tenant decides how long it is: empty files with paths of 4,096 bytes give lines three times as
long. So it has a most, `MOST_BYTES`, some seven million ordinary files; there are no digests of a snapshot whose manifest would be longer.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import quote_from_bytes

from csi_driver.errors import FailedPrecondition, RecordDamaged
from csi_driver.linux import files
from csi_driver.linux.tree_digests import UNREADABLE, Entry, digest_tree
from csi_driver.volumes.jobs import JobControl
from csi_driver.volumes.model import ManifestSummary
from csi_driver.volumes.pool_layout import MANIFESTS, new_token
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.records import Gate

MOST_DIFFERENCES = 1000
"""More are counted, not listed."""
MOST_BYTES = 1024**3
_BYTES_AT_ONCE = 16 * 1024**2
_TOUCH_SECONDS = 60.0
"""The sweeper takes a temporary file that nobody has touched for an hour for left over, and one large file may take longer to read."""
_SAFE = bytes(range(33, 127)).replace(b"%", b"").decode()


@dataclass(frozen=True)
class Difference:
    """One path that is not what the manifest says: `missing`, `unexpected`, `changed`, or `unreadable`."""

    what: str
    path: str


@dataclass
class _Sum:
    """The digest of lines in any order, and how many there were."""

    entries: int = 0
    size: int = 0
    total: int = 0

    def add(self, line: bytes) -> None:
        self.entries += 1
        self.size += int(line.split(b" ", 2)[1])
        self.total = (self.total + int.from_bytes(hashlib.sha256(line).digest(), "big")) % 2**256

    def summary(self) -> ManifestSummary:
        return ManifestSummary(self.entries, self.size, f"{self.total:064x}")


class Manifest:
    """What is read of a snapshot now, in a file that goes when the context ends unless it is kept."""

    def __init__(self, folder: int, name: str, summary: ManifestSummary, unreadable: tuple[Difference, ...]) -> None:
        self._folder = folder
        self._name = name
        self.summary = summary
        self.unreadable = unreadable
        """What the disk did not give back, at most `MOST_DIFFERENCES` of it."""

    def keep(self, record_id: str, gate: Gate) -> None:
        """Make it the snapshot's manifest, durably, in one step within `gate`."""
        with gate:
            os.rename(self._name, record_id, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        files.sync_directory(self._folder)

    def differences(self, record_id: str, expected: ManifestSummary) -> Iterator[Difference]:
        """Compare with the snapshot's manifest, whose summary is `expected`. Raises RecordDamaged where that is not what was written."""
        if _summary_of(self._folder, record_id) != expected:
            raise RecordDamaged(
                f"the manifest of snapshot {record_id} is missing or damaged: what it held cannot be told any more"
            )
        if self.summary == expected:
            return
        parts = 1 + max(os.stat(name, dir_fd=self._folder).st_size for name in (record_id, self._name)) // _BYTES_AT_ONCE
        for part in range(parts):
            then, now = (_part_of(self._folder, name, part, parts) for name in (record_id, self._name))
            for path in sorted(then.keys() | now.keys()):
                if then.get(path) != now.get(path):
                    yield Difference(_what_happened(then.get(path), now.get(path)), path.decode())


@contextmanager
def read_manifest(store: PoolStore, top: int, job: JobControl, most_bytes: int = MOST_BYTES) -> Iterator[Manifest]:
    """Read the whole directory and write down what is in it. Raises FailedPrecondition where that is too long, OSError, WalkStopped."""
    name = f"{files.TEMPORARY_PREFIX}manifest.{new_token()}"
    with store.open(MANIFESTS) as folder:
        try:
            with _created(folder, name) as file:
                summary, unreadable = _write(file, top, job, most_bytes)
            yield Manifest(folder, name, summary, unreadable)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder)


def _write(file: BinaryIO, top: int, job: JobControl, most_bytes: int) -> tuple[ManifestSummary, tuple[Difference, ...]]:
    found = _Sum()
    written = 0
    unreadable: list[Difference] = []
    touched = time.monotonic()

    def tell(entry: Entry) -> None:
        nonlocal written
        path = quote_from_bytes(entry.path, _SAFE)
        line = f"{entry.kind} {entry.size} {entry.digest} {path}\n".encode()
        found.add(line)
        written += len(line)
        if written > most_bytes:
            raise FailedPrecondition(
                f"the digests of this snapshot would take more than {most_bytes} bytes, for it has so many files or so long paths: take it "
                'without `digests: "true"`'
            )
        file.write(line)
        if entry.digest == UNREADABLE and len(unreadable) < MOST_DIFFERENCES:
            unreadable.append(Difference(UNREADABLE, path))

    def should_stop() -> bool:
        nonlocal touched
        if time.monotonic() - touched > _TOUCH_SECONDS:
            touched = time.monotonic()
            os.utime(file.fileno())
        return job.should_stop()

    digest_tree(top, tell, job.progress, should_stop)
    file.flush()
    os.fsync(file.fileno())
    return found.summary(), tuple(unreadable)


def _what_happened(then: bytes | None, now: bytes | None) -> str:
    if then is None:
        return "unexpected"
    if now is None:
        return "missing"
    return UNREADABLE if now.endswith(UNREADABLE.encode()) else "changed"


def _summary_of(folder: int, name: str) -> ManifestSummary | None:
    found = _Sum()
    try:
        for line in _lines(folder, name):
            found.add(line)
    except (FileNotFoundError, ValueError, IndexError):
        return None
    return found.summary()


def _part_of(folder: int, name: str, part: int, parts: int) -> dict[bytes, bytes]:
    # By the keyed hash of this process (PEP 456): a tenant who chose names that meet in one part would choose how much memory it takes.
    lines = (line.rstrip(b"\n").split(b" ", 3) for line in _lines(folder, name))
    return {path: kind + size + digest for kind, size, digest, path in lines if hash(path) % parts == part}


def _lines(folder: int, name: str) -> Iterator[bytes]:
    with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
        yield from file


@contextmanager
def _created(folder: int, name: str) -> Iterator[BinaryIO]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(name, flags, 0o600, dir_fd=folder), "wb", 1024 * 1024) as file:
        yield file
