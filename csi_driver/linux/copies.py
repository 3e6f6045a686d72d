"""Copying a tree completely: content, metadata, hard links, holes and special files, while its owner goes on changing it.

The source may be a tenant's: each entry is pinned before anything is asked of it, so what is copied is what was looked at, and
nothing outside is ever touched. The target is ours alone (a staging directory). Directories get their own metadata after their
content, so that until then nothing in the copy is open to others, inherits an ACL, or is immutable too early.

One thread walks. It carries the entries itself (`carriers.py`), or gives them to a crew (`crews.py`) where round trips cost more than
work: one thread is quickest on a local disk, sixteen are over a network.
"""

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from csi_driver.linux import beneath
from csi_driver.linux.carriers import Carrier, Shared
from csi_driver.linux.contents import METHODS, Method
from csi_driver.linux.crews import Crew
from csi_driver.linux.folders import Folder
from csi_driver.linux.hard_links import HardLinks, Place
from csi_driver.linux.private_views import private_view
from csi_driver.linux.walk import Walk, WalkStopped

_MAY_BE_DIRECTORY = frozenset({0, 4})  # DT_UNKNOWN, DT_DIR


@dataclass(slots=True)
class Progress:
    """What a running copy has done so far; any thread may read it. Files are all that is no directory."""

    files: int = 0
    directories: int = 0
    bytes: int = 0
    _guard: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def add_bytes(self, count: int) -> None:
        """Count data carried; holes are none."""
        with self._guard:
            self.bytes += count

    def add_file(self) -> None:
        """Count a file."""
        with self._guard:
            self.files += 1

    def add_directory(self) -> None:
        """Count a directory that is complete."""
        with self._guard:
            self.directories += 1


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What was copied, how, and what could not be.

    `bytes` counts data, not holes. `method` is "none" when there was no content. `not_carried` counts by kind: owner, mode, acl,
    "xattr user" (trusted, security, …), times, "inode flags", "hard link" (copied as a file of its own), device, socket, fifo,
    symlink, "mount point" (an entry left out), "vanished" (an entry that went away while it was looked at; of a directory what was
    copied until then stays).
    """

    files: int
    directories: int
    bytes: int
    method: Literal["reflink", "copy_file_range", "copy", "mixed", "none"]
    not_carried: dict[str, int]


def copy_tree(
    source_fd: int,
    target_fd: int,
    *,
    progress: Progress | None = None,
    methods: tuple[Method, ...] = METHODS,
    should_stop: Callable[[], bool] | None = None,
    workers: int = 1,
    patience: beneath.Patience | None = None,
) -> CopyReport:
    """Copy what is in the directory `source_fd`, and its own metadata, into the empty directory `target_fd`.

    `should_stop` is asked before each entry and each 8 MiB; it may sleep, to slow the copy down. `workers` is how many threads carry;
    all of them ask `should_stop`. `patience` is how long the copy waits in all for write leases (fcntl(2)) that are not given back, by
    default a minute. Nothing is synced: `system_calls.sync_filesystem(target_fd)` does it at once for all.
    Raises WalkStopped; OSError for what is no matter of the target's abilities (EIO, ENOSPC, EDQUOT, EACCES; EAGAIN where leases
    outlast the patience; ENOTEMPTY for a target that is not empty; ESTALE when a directory more than 64 levels deep was moved away
    meanwhile, or a server does not know what it still has); FailedPrecondition and Unavailable (carriers.py). The target is then a torso.
    """
    copy = _Copy(progress or Progress(), methods, should_stop or (lambda: False), workers, patience or beneath.Patience())
    with private_view(source_fd) as (source, openable), beneath.opened_again(target_fd) as target:
        return copy.run(source, target, openable=openable)


class _Copy:
    def __init__(
        self,
        progress: Progress,
        methods: tuple[Method, ...],
        should_stop: Callable[[], bool],
        workers: int,
        patience: beneath.Patience,
    ) -> None:
        self._progress = progress
        self._methods = methods
        self._should_stop = should_stop
        self._workers = workers
        self._patience = patience
        self._carriers: list[Carrier] = []

    def run(self, source_fd: int, target_fd: int, *, openable: bool) -> CopyReport:
        links = HardLinks(target_fd)
        shared = Shared(
            self._progress,
            links,
            threading.Lock(),
            self._methods,
            self._should_stop,
            self._patience,
            source_fd,
            openable=openable,
        )
        carrier = self._carrier(shared)
        with Walk(source_fd) as source, Walk(target_fd) as target:
            if next(target.entries(), None) is not None:
                raise OSError(errno.ENOTEMPTY, "the target of a copy must be empty")
            carrier.prepare_top(target_fd)
            top = Folder(source_fd, target_fd, os.fstat(source_fd), Place(b"", None))
            if self._workers == 1:
                self._walk(source, target, top, carrier, None)
            else:
                with Crew(self._workers, lambda: self._carrier(replace(shared, over_network=True))) as crew:
                    self._walk(source, target, top, carrier, crew)
            for pinned, flags in links.held():
                carrier.set_late_flags(pinned, flags)
        return self._report()

    def _carrier(self, shared: Shared) -> Carrier:
        carrier = Carrier(shared)
        self._carriers.append(carrier)
        return carrier

    def _walk(self, source: Walk, target: Walk, top: Folder, carrier: Carrier, crew: Crew | None) -> None:
        entered = [top]
        while entered:
            folder = entered[-1]
            # A directory more than 64 levels up was closed meanwhile and has another descriptor now.
            folder.source, folder.target = source.descriptor, target.descriptor
            for name, kind, _ in source.entries():
                if self._should_stop():
                    raise WalkStopped("the copy was stopped")
                if crew is not None and kind not in _MAY_BE_DIRECTORY:
                    crew.carry(folder, name, kind)
                    continue
                inside = carrier.carry(folder, name, kind, enter=True)
                if inside is not None:
                    source.enter(name, inside.source)
                    inside.handle = source.handle
                    target.enter(name, inside.target)
                    entered.append(inside)
                    break
            else:
                entered.pop()
                if crew is None:
                    carrier.finish(folder)
                else:
                    crew.finish(folder, carrier)
                if entered:
                    source.leave()
                    target.leave()

    def _report(self) -> CopyReport:
        used = sorted({method for carrier in self._carriers for method in carrier.used})
        not_carried: Counter[str] = Counter()
        for carrier in self._carriers:
            not_carried.update(carrier.not_carried)
        return CopyReport(
            files=self._progress.files,
            directories=self._progress.directories,
            bytes=self._progress.bytes,
            method=used[0] if len(used) == 1 else "mixed" if used else "none",
            not_carried=dict(not_carried),
        )
