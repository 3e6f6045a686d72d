"""The store of one pool: its records, the ways into its directories, and its identity.

Whatever is opened in a pool is opened through here: behind a server the way there may be made anew at any moment, and what is found at
its end is looked at again before it is trusted. What lies where is in `pool_layout.py`.
"""

import errno
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from csi_driver.backends.base import PoolBackend, Space
from csi_driver.backends.impatience import Impatience
from csi_driver.errors import NotFound, Unavailable, quoted
from csi_driver.linux import beneath
from csi_driver.linux.byte_range_locks import ByteRangeLocks, HeldLock
from csi_driver.volumes.control_directory import ControlDirectory
from csi_driver.volumes.handles import Handle, derive_id, node_tag
from csi_driver.volumes.model import GroupRecord, SnapshotRecord, Topology, VolumeRecord
from csi_driver.volumes.pool_layout import (
    CONTROL,
    GROUPS,
    SNAPSHOTS,
    VOLUMES,
)
from csi_driver.volumes.records import RecordFolder

_GLANCE_SECONDS = 2.0
_GLANCES_AT_ONCE = 32

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_log = logging.getLogger(__name__)

_Record = TypeVar("_Record", VolumeRecord, SnapshotRecord, GroupRecord)


class PoolStore:
    """One pool: its backend, its records and its control directory."""

    def __init__(self, backend: PoolBackend, driver: str, node_id: str) -> None:
        self.backend = backend
        self.trash_filled = threading.Event()
        self.driver = driver
        self._glances = Impatience(_GLANCE_SECONDS, _GLANCES_AT_ONCE)
        self._control = ControlDirectory(backend, driver)
        self._preparing = threading.Lock()
        self._prepared_generation: int | None = None
        self._identity: str | None = None
        self.node_id = node_id
        self.node_tag = node_tag(node_id) if backend.node_local else None
        self.volumes = RecordFolder(VolumeRecord, f"{self.name}:{CONTROL}/{VOLUMES}", lambda: self.open(VOLUMES))
        self.snapshots = RecordFolder(SnapshotRecord, f"{self.name}:{CONTROL}/{SNAPSHOTS}", lambda: self.open(SNAPSHOTS))
        self.groups = RecordFolder(GroupRecord, f"{self.name}:{CONTROL}/{GROUPS}", lambda: self.open(GROUPS))

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def remote_maker(self) -> int | None:
        """Who owns what is made through the pool's server (a uid), whose replies may be lost; None where the data is here."""
        if self.backend.data_is_here:
            return None
        squashed = self.backend.squashed_to
        return os.geteuid() if squashed is None else squashed

    def try_hold(self, offset: int, *, shared: bool) -> HeldLock | None:
        """Take one byte of the pool's lock file, against every other process that serves the pool; None where it is taken."""
        with self.open("") as control:
            try:
                return ByteRangeLocks(control, "lock").try_hold(offset, shared=shared)
            except OSError as error:
                if error.errno != errno.ENOLCK:
                    raise
                raise Unavailable(
                    f"pool {self.name}: its server keeps no locks (ENOLCK), and without them two controllers could work on one volume: "
                    "run a lock manager beside NFSv3, use `vers=4.2`, or, with one controller only, give the pool `nolock`"
                ) from error

    def wake_reaper(self) -> None:
        """Say that there is something in the trash."""
        self.trash_filled.set()

    def require_answer(self) -> None:
        """Raise Unavailable where the pool is known not to answer. Nothing is asked: for loops, each step of which would wait for itself."""
        if (problem := self.backend.problem()) is not None:
            raise Unavailable(problem)

    def prepare(self, expected_identity: str | None = None) -> str:
        """Make `.csi` where there is none, check the format, and return the pool's identity.

        `expected_identity` is what this node saw in the pool before: a pool directory that has lost it is a disk that is not
        mounted, and volumes must not be made below its mount point. Raises Unavailable then, and FailedPrecondition for a
        format that a newer driver wrote, or another driver's or pool's place.
        """
        with self._preparing:
            self._identity = expected_identity or self._identity
            return self._prepare()

    def _root(self) -> Path:
        """Return where the pool lies, looked at again where the way to it was made anew: it might lead elsewhere."""
        root = self.backend.root()
        if self.backend.remote and self.backend.generation != self._prepared_generation:
            with self._preparing:
                if self.backend.generation != self._prepared_generation:
                    self._prepare()
        return root

    def _prepare(self) -> str:
        self.backend.prepare()
        root, generation = self.backend.root(), self.backend.generation
        try:
            self._identity = self._control.make(root, self._identity)
        except OSError as error:
            refused = self.backend.remote and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            hint = (
                "; export it to the controller with `rw,no_root_squash`, or let the squashed user write there"
                if refused
                else ""
            )
            raise Unavailable(f"pool {self.name} at {root} cannot be prepared: {error}{hint}") from error
        self._prepared_generation = generation
        return self._identity

    # --- ids and handles ----------------------------------------------------------------------------------------------------------

    def id_of(self, kind: str, name: str) -> str:
        return derive_id(kind, self.driver, self.node_tag, name)

    def handle_of(self, record_id: str) -> str:
        return str(Handle(self.name, record_id, self.node_tag))

    # --- places -------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def open(self, folder: str) -> Iterator[int]:
        """Open a folder of `.csi`; Unavailable where it is not there: then the pool is not what it was, or not mounted."""
        try:
            descriptor = self._open(f"{CONTROL}/{folder}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise Unavailable(f"pool {self.name} has no {self._root()}/{CONTROL}/{folder}: is its disk mounted?") from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def open_root(self) -> Iterator[int]:
        """Open the pool's root."""
        descriptor = self._open("")
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, place: str) -> int:
        """Open a directory of the pool; what is stale is tried once more, on a way that was made anew."""
        try:
            return os.open(f"{self._root()}/{place}", _DIRECTORY)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        self.backend.renew()
        return os.open(f"{self._root()}/{place}", _DIRECTORY)

    @contextmanager
    def open_parent(self, directory: str) -> Iterator[tuple[int, str]]:
        """Open the folder that holds `directory` (relative to the root) and give it with the last component."""
        parent, _, name = directory.rpartition("/")
        with self.open_root() as root:
            if not parent:
                yield root, name
                return
            descriptor = beneath.open_beneath(root, parent, _DIRECTORY)
            try:
                yield descriptor, name
            finally:
                os.close(descriptor)

    @contextmanager
    def open_volume(self, directory: str) -> Iterator[int]:
        """Open a volume's top directory. Raises NotFound."""
        with self.open_root() as root:
            try:
                descriptor = beneath.open_beneath(root, directory, _DIRECTORY)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise NotFound(f"directory {quoted(directory)} is missing from pool {self.name}") from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def path_of(self, directory: str) -> Path:
        """Say where this process finds a volume's directory. Raises Unavailable."""
        return self._root() / directory

    def space(self) -> Space:
        return self.backend.space()

    def glance(self, records: RecordFolder[_Record], record_id: str) -> _Record | None:
        """Read a record for a call that is about another pool: None also where this one does not answer soon, or is not there.

        A server or a disk that is away must not keep others from being served. Raises RecordDamaged.
        """
        try:
            if not self.backend.remote:
                return records.get(record_id)
            return self._glances.ask(lambda: records.get(record_id))
        except (Unavailable, OSError) as away:
            _log.warning("a pool was not looked into", extra={"pool": self.name, "error": str(away)})
            return None

    # --- topology -----------------------------------------------------------------------------------------------------------------

    def reachable_from(self, requisite: tuple[Topology, ...]) -> bool:
        """Tell whether one of the requisite topologies (none: everywhere) reaches this pool."""
        own = self.backend.topology()
        if own is None or not requisite:
            return True
        return any(all(segments.get(key) == value for key, value in own.items()) for segments in requisite)
