"""Carrying one entry of a directory into a copy: the unit of work of `copies.py`.

A carrier knows two open directories and a name, and nothing of the walk. It belongs to one thread; what the threads of one copy have
in common is `Shared`.

Where each step may be a round trip to a server (`Shared.over_network`), two are saved per small file: it is opened by its name,
not pinned first, where opening can start no device; and its copy is made without O_EXCL (folders.py). Nothing is given up for it: a
descriptor tells what was opened.
"""

import errno
import os
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from csi_driver.errors import FailedPrecondition, quoted
from csi_driver.linux import beneath
from csi_driver.linux.contents import ContentLadder, HolesUntold, Method
from csi_driver.linux.fidelity import InodeFidelity
from csi_driver.linux.folders import Folder, is_folder_gone, is_gone, new_file, take_back
from csi_driver.linux.hard_links import HardLinks, Place
from csi_driver.linux.inode_flags import HOLDING
from csi_driver.linux.system_calls import magic_link

_REGULAR = 8  # DT_REG
_LINK_REFUSED = frozenset({errno.EMLINK, errno.EPERM, errno.EOPNOTSUPP, errno.EXDEV, errno.ENOSYS})
_TRIES_WHEN_STALE = 5
_NODE_REFUSED = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})


class Counts(Protocol):
    """Where carriers count; see copies.Progress."""

    def add_bytes(self, count: int) -> None: ...
    def add_file(self) -> None: ...
    def add_directory(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Shared:
    """What all carriers of one copy share. `links` is used under `links_guard`.

    `over_network`: spare round trips. No two carriers may be given the same name of one directory at the same time then.
    `openable`: a source may be opened by its name, for devices are never started there (a mount with nodev, mount(8)).
    `source_top`: the top directory of the source, open as long as anybody carries.
    """

    progress: Counts
    links: HardLinks
    links_guard: threading.Lock
    methods: tuple[Method, ...]
    should_stop: Callable[[], bool]
    patience: beneath.Patience
    source_top: int
    over_network: bool = False
    openable: bool = False


class Carrier:
    """Carries entries; `used` and `not_carried` say by which methods, and what could not be carried."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.not_carried: Counter[str] = Counter()
        self._fidelity = InodeFidelity(self.not_carried)
        self._ladder = ContentLadder(shared.methods, shared.should_stop)
        self._bytes_of_file = 0

    @property
    def used(self) -> Iterable[Method]:
        return self._ladder.used

    def prepare_top(self, target: int) -> None:
        """Make the top of the copy bequeath nothing to what is made in it."""
        self._fidelity.prepare_top(target)

    def set_late_flags(self, pinned: int, flags: int) -> None:
        """Set flags that were held back until all links were made."""
        opened = beneath.open_pinned(pinned, os.O_RDONLY)
        try:
            self._fidelity.set_flags(opened, flags, before_content=False)
        finally:
            os.close(opened)

    def carry(self, folder: Folder, name: bytes, kind: int, *, enter: bool, tries: int = _TRIES_WHEN_STALE) -> Folder | None:
        """Copy one entry (`kind`: its DT_…); of a directory, where it may be entered, only open both ends and return them.

        What is removed by another client of a server meanwhile counts as vanished, and nothing of it is left; what is there still, or
        again, is carried anew.
        Raises OSError (EAGAIN: write leases outlast the patience that all carriers share; ESTALE: the server knows something no more
        that it still has, or that is replaced as fast as it is read), FailedPrecondition (too many hard links; a file that is mostly
        holes, and nobody tells where), Unavailable, WalkStopped.
        """
        try:
            if kind == _REGULAR and self._shared.openable and self._by_name(folder, name):
                return None
            return self._pinned(folder, name, enter=enter)
        except FileExistsError as error:
            # A directory that changes while it is read may yield one name twice: what it was the first time is copied.
            if tries == _TRIES_WHEN_STALE:
                return None
            path = folder.place.path_of(name)  # but it may also be what a try before this one has left
            raise OSError(errno.ESTALE, "the copy was begun, and it is not known how far it came", path) from error
        except OSError as error:
            if error.errno == errno.ESTALE and tries > 1:
                if not is_gone(folder, name, self._shared.source_top):
                    return self.carry(folder, name, kind, enter=enter, tries=tries - 1)
                self.not_carried["vanished"] += 1
                return None
            error.filename = folder.place.path_of(name)
            raise

    def finish(self, folder: Folder) -> None:
        """Give a directory, whose content is complete, what belongs to itself. Raises OSError, as `carry` does.

        Of one that is gone meanwhile (NFS) what was copied stays, for all of it is whole.
        """
        for left in reversed(range(_TRIES_WHEN_STALE)):
            try:
                self._finish(folder)
                break
            except OSError as error:
                error.filename = folder.place.path_of(b"")
                if error.errno != errno.ESTALE:
                    raise
                if is_folder_gone(folder, self._shared.source_top):
                    self._fidelity.carry_remembered(folder.target, folder.status)
                    self.not_carried["vanished"] += 1
                    break
                if not left:
                    raise
        self._shared.progress.add_directory()

    def _finish(self, folder: Folder) -> None:
        flags = self._fidelity.read_flags(folder.source)
        self._fidelity.set_flags(folder.target, flags, before_content=True)
        self._fidelity.carry(folder.source, folder.target, folder.status)
        if folder.place.parent is None and flags & HOLDING:
            flags &= ~HOLDING
            self.not_carried["inode flags"] += 1
        self._fidelity.set_flags(folder.target, flags, before_content=False)

    def _directory(self, pinned: int, folder: Folder, name: bytes, status: os.stat_result) -> Folder:
        source = beneath.open_pinned(pinned, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.mkdir(name, 0o700, dir_fd=folder.target)
            target = self._made_directory(folder, name)
        except BaseException:
            os.close(source)
            raise
        return Folder(source, target, status, Place(name, folder.place))

    def _made_directory(self, folder: Folder, name: bytes) -> int:
        try:
            return beneath.open_directory(folder.target, name)
        except OSError as error:
            take_back(folder, name, error, os.rmdir)
            raise

    def _by_name(self, folder: Folder, name: bytes) -> bool:
        """Copy a regular file with one name; False, and nothing done, where it is something else or will not be opened."""
        try:
            source = beneath.open_file(folder.source, name)
        except OSError:  # pinning it will tell what it is
            return False
        try:
            status = os.fstat(source)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                return False
            self._file(source, folder, name, status)
        finally:
            os.close(source)
        self._shared.progress.add_file()
        return True

    def _pinned(self, folder: Folder, name: bytes, *, enter: bool) -> Folder | None:
        """Copy an entry of which nothing is known: what is held with O_PATH is looked at, and then opened if it may be."""
        try:
            pinned = beneath.pin(folder.source, name)
        except OSError as error:
            if error.errno in beneath.GONE and error.errno != errno.ESTALE:
                self.not_carried["vanished"] += 1
            elif error.errno == errno.EXDEV:
                self.not_carried["mount point"] += 1
            else:
                raise
            return None
        try:
            status = os.fstat(pinned)
            if stat.S_ISDIR(status.st_mode):
                if enter:
                    return self._directory(pinned, folder, name, status)
                self.not_carried["vanished"] += 1  # it was a file when the directory was read
            elif status.st_nlink == 1:
                self._single(pinned, folder, name, status)
            else:
                self._linked(pinned, folder, name, status)
        finally:
            os.close(pinned)
        return None

    def _single(self, pinned: int, folder: Folder, name: bytes, status: os.stat_result) -> None:
        if stat.S_ISREG(status.st_mode):
            source = beneath.open_pinned(pinned, os.O_RDONLY, self._shared.should_stop, self._shared.patience)
            try:
                self._file(source, folder, name, status)
            finally:
                os.close(source)
        else:
            self._node(pinned, folder, name, status)
        self._shared.progress.add_file()

    def _linked(self, pinned: int, folder: Folder, name: bytes, status: os.stat_result) -> None:
        """Link the name to the copy of the same inode, or make this the first one."""
        # Held until the first copy is there: another name of the inode must not look for it before.
        with self._shared.links_guard:
            try:
                done = self._shared.links.link(pinned, folder.target, folder.place, name, status.st_nlink)
            except OSError as error:
                if error.errno not in _LINK_REFUSED:
                    raise
                self.not_carried["hard link"] += 1
                done = False
            if not done:
                self._single(pinned, folder, name, status)
                return
        self._shared.progress.add_file()

    def _file(self, source: int, folder: Folder, name: bytes, status: os.stat_result) -> None:
        target, made = new_file(folder, name, status.st_mode & 0o777, over_network=self._shared.over_network)
        self._bytes_of_file = 0
        try:
            flags = self._fidelity.read_flags(source)
            self._fidelity.set_flags(target, flags, before_content=True)
            self._ladder.carry(source, target, status.st_size, status.st_blocks * 512, self._add_bytes)
            self._fidelity.carry_to_new_file(source, target, status, made, folder.births)
            if status.st_nlink > 1 and flags & HOLDING:
                self._shared.links.hold(folder.place, name, flags & HOLDING)  # no link can be made to it once they are set
                flags &= ~HOLDING
            self._fidelity.set_flags(target, flags, before_content=False)
        except HolesUntold as error:
            path = quoted(folder.place.path_of(name), 400)
            raise FailedPrecondition(
                f"{path} cannot be copied: {error}; mount the pool with NFS 4.2 if its server has it, or make the file shorter "
                "(truncate(1)) or remove it, and try again"
            ) from error
        except OSError as error:
            # At once: another name of the inode must not be linked to a part of it.
            if take_back(folder, name, error, os.unlink):
                self._shared.progress.add_bytes(-self._bytes_of_file)
            raise
        finally:
            os.close(target)

    def _add_bytes(self, count: int) -> None:
        self._bytes_of_file += count
        self._shared.progress.add_bytes(count)

    def _node(self, pinned: int, folder: Folder, name: bytes, status: os.stat_result) -> None:
        """Copy a symlink, fifo, socket or device: never opened, on either side."""
        mode = status.st_mode
        try:
            if stat.S_ISLNK(mode):
                os.symlink(os.readlink(b"", dir_fd=pinned), name, dir_fd=folder.target)
            else:
                os.mknod(name, stat.S_IFMT(mode) | 0o600, status.st_rdev, dir_fd=folder.target)
        except OSError as error:
            if error.errno not in _NODE_REFUSED:
                raise
            self.not_carried[_kind(mode)] += 1
            return
        try:
            made = beneath.pin(folder.target, name)
            try:
                self._fidelity.carry(magic_link(pinned), magic_link(made), status)
            finally:
                os.close(made)
        except OSError as error:
            take_back(folder, name, error, os.unlink)
            raise


def _kind(mode: int) -> str:
    for test, kind in ((stat.S_ISLNK, "symlink"), (stat.S_ISFIFO, "fifo"), (stat.S_ISSOCK, "socket")):
        if test(mode):
            return kind
    return "device"
