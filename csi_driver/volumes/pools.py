"""The pools and what is kept in them: `.csi`, its folders, and the one way in and out of the trash.

<pool root>/
  .csi/                 0700, root only, outside whatever tenants can mount
    format.json         which pool this is, and in which format
    lock                one byte for each key that somebody holds
    promises            the mark of whoever raised promises last (promises.py)
    volumes/ snapshots/ groups/         records
    retained/ archived/                 records that no longer answer to a name
    parents/                            marks of the parents of templated directories that the driver made (parents.py)
    snapshots-data/<id>/                the content of snapshots
    manifests/<id>                      what is in a snapshot, file by file
    staging/<id>.<token>/               content that is being made
    trash/<id>.<token>/                 the data of what was deleted or given up, until the reaper has removed it
    trash/<id>.<token>.<kind>.json      the record of what is being deleted, until its data is in the trash as well
  <directory of a volume>
"""

import errno
import json
import logging
import os
import secrets
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from csi_driver.backends.base import PoolBackend, Space
from csi_driver.backends.impatience import Impatience
from csi_driver.errors import FailedPrecondition, NotFound, RecordDamaged, ResourceExhausted, Unavailable, quoted
from csi_driver.linux import files
from csi_driver.linux.byte_range_locks import ByteRangeLocks, HeldLock
from csi_driver.linux.project_limits import lift_limit
from csi_driver.linux.renames import rename_directory
from csi_driver.volumes.handles import Handle, derive_id, node_tag, parse_handle
from csi_driver.volumes.model import GroupRecord, SnapshotRecord, Topology, VolumeRecord
from csi_driver.volumes.records import RecordFolder

CONTROL = ".csi"
FORMAT_VERSION = 1
VOLUMES, SNAPSHOTS, GROUPS = "volumes", "snapshots", "groups"
RETAINED, ARCHIVED = "retained", "archived"
SNAPSHOT_DATA, MANIFESTS, STAGING, TRASH = "snapshots-data", "manifests", "staging", "trash"
PARENTS = "parents"
_FOLDERS = (VOLUMES, SNAPSHOTS, GROUPS, RETAINED, ARCHIVED, PARENTS, SNAPSHOT_DATA, MANIFESTS, STAGING, TRASH)
ARCHIVE_DIRECTORY = "archived"
"""Where, beside the volumes, the data of `onDelete: archive` goes."""

_GLANCE_SECONDS = 2.0
_GLANCES_AT_ONCE = 32

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_log = logging.getLogger(__name__)

_Record = TypeVar("_Record", VolumeRecord, SnapshotRecord, GroupRecord)


def new_token() -> str:
    """Draw what tells one creation, staging or deletion from the next of the same id."""
    return secrets.token_hex(8)


class PoolStore:
    """One pool: its backend, its records and its control directory."""

    def __init__(self, backend: PoolBackend, driver: str, node_id: str, trash_filled: threading.Event) -> None:
        self.backend = backend
        self._trash_filled = trash_filled
        self.driver = driver
        self._glances = Impatience(_GLANCE_SECONDS, _GLANCES_AT_ONCE)
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
            self._identity = self._make_control(root, self._identity)
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

    def _make_control(self, root: Path, expected_identity: str | None) -> str:
        control = root / CONTROL
        identity = self._read_identity(control)
        if expected_identity is not None and identity != expected_identity:
            found = f"it has identity {identity}" if identity else f"there is no {CONTROL}/format.json"
            raise Unavailable(
                f"pool {self.name} at {root} is not the pool that this node knows (identity {expected_identity}; {found}): is its disk "
                "mounted? If the pool was meant to be made anew, remove the pool from this node's `pools.json` and restart the driver"
            )
        control.mkdir(mode=0o700, exist_ok=True)
        status = control.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (os.geteuid(), self.backend.owner(control)):
            raise FailedPrecondition(f"{control} must be a directory that belongs to the user the driver runs as")
        if stat.S_IMODE(status.st_mode) != 0o700:
            control.chmod(0o700)
        for folder in _FOLDERS:
            (control / folder).mkdir(mode=0o700, exist_ok=True)
        if identity is None:
            identity = self._write_identity(control)
        return identity

    def _read_identity(self, control: Path) -> str | None:
        try:
            with _opened(str(control)) as folder:
                body = json.loads(files.read_bounded(folder, "format.json", 65536))
            version, identity = body["schema_version"], body["pool_id"]
            owner = body["driver"], body["pool"]
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise FailedPrecondition(f"{control} must be a directory that belongs to the user the driver runs as") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RecordDamaged(f"{control}/format.json is damaged: {error!r}") from error
        if version != FORMAT_VERSION:
            raise FailedPrecondition(
                f"pool {self.name} at {control.parent} is in format {version}, this driver knows {FORMAT_VERSION}: use the newer driver"
            )
        if owner != (self.driver, self.name):
            raise FailedPrecondition(
                f"{control.parent} is pool {owner[1]} of driver {owner[0]}: it cannot be pool {self.name} of {self.driver} as well, "
                "for volume handles carry the pool's name"
            )
        return str(identity)

    def _write_identity(self, control: Path) -> str:
        body = {"schema_version": FORMAT_VERSION, "pool_id": secrets.token_hex(16), "driver": self.driver, "pool": self.name}
        # FileExistsError: another process of this node was quicker, and its word holds.
        with _opened(str(control)) as folder, suppress(FileExistsError):
            files.create_exclusively(folder, "format.json", json.dumps(body, indent=1).encode() + b"\n", lambda _: False)
        return self._read_identity(control) or ""

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
            descriptor = files.open_beneath(root, parent, _DIRECTORY)
            try:
                yield descriptor, name
            finally:
                os.close(descriptor)

    @contextmanager
    def open_volume(self, directory: str) -> Iterator[int]:
        """Open a volume's top directory. Raises NotFound."""
        with self.open_root() as root:
            try:
                descriptor = files.open_beneath(root, directory, _DIRECTORY)
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

    # --- trash --------------------------------------------------------------------------------------------------------------------

    def drop_empty_staging(self, record_id: str, token: str) -> None:
        """Remove the empty directory that the attempt `token` at `record_id` left in staging; none is fine."""
        name = f"{record_id}.{token}"
        with self.open(STAGING) as staging:
            if self.backend.data_is_here:
                lift_limit(staging, name)
            try:
                os.rmdir(name, dir_fd=staging)
            except FileNotFoundError:
                return
            except OSError:  # a subvolume, before Linux 4.18
                self._discard(staging, name, record_id)

    def trash_staging(self, record_id: str, token: str = "") -> None:
        """Move what attempts at `record_id` left in staging into the trash: the one with this token, or, without, all."""
        with self.open(STAGING) as staging:
            for name in os.listdir(staging):
                if name.startswith(f"{record_id}.{token}"):
                    if self.backend.data_is_here:
                        lift_limit(staging, name)
                    self._discard(staging, name, record_id)

    def discard_snapshot_data(self, record_id: str) -> None:
        """Move the content of a snapshot that never became ready into the trash."""
        self.drop_manifest(record_id)
        with self.open(SNAPSHOT_DATA) as data:
            self._discard(data, record_id, record_id)

    def drop_manifest(self, record_id: str) -> None:
        """Remove the manifest of a snapshot that is on its way out; none is fine."""
        with suppress(FileNotFoundError), self.open(MANIFESTS) as manifests:
            os.unlink(record_id, dir_fd=manifests)

    def _discard(self, parent: int, name: str, record_id: str) -> None:
        # By rename alone: a copy that has filled the disk must be removable, and there a mkdir finds no room.
        with self.open(TRASH) as trash:
            try:
                rename_directory(parent, name, trash, f"{record_id}.{new_token()}")
            except FileNotFoundError:
                return
            files.sync_directory(trash)
            files.sync_directory(parent)
        self._trash_filled.set()

    def wake_reaper(self) -> None:
        """Say that there is something in the trash."""
        self._trash_filled.set()

    # --- topology -----------------------------------------------------------------------------------------------------------------

    def reachable_from(self, requisite: tuple[Topology, ...]) -> bool:
        """Tell whether one of the requisite topologies (none: everywhere) reaches this pool."""
        own = self.backend.topology()
        if own is None or not requisite:
            return True
        return any(all(segments.get(key) == value for key, value in own.items()) for segments in requisite)


_SOURCE_ELSEWHERE = (
    "Restore or clone with a StorageClass that has volumeBindingMode: Immediate (the chart's tatami-copies), and the pod follows its "
    "volume; or put the pod on the source's node: the nodeAffinity of the source claim's PersistentVolume names it, and the label "
    "snapshot.storage.kubernetes.io/managed-by of a VolumeSnapshotContent"
)
"""What an admin reads in the events of a claim that waits for its first consumer (WaitForFirstConsumer) on the wrong node."""


class Pools:
    """All pools of an installation."""

    def __init__(self, stores: Mapping[str, PoolStore], default: str | None) -> None:
        self._stores = dict(sorted(stores.items()))
        self.default = default

    def __iter__(self) -> Iterator[PoolStore]:
        return iter(self._stores.values())

    def names(self) -> str:
        return ", ".join(self._stores)

    def find(self, name: str) -> PoolStore | None:
        return self._stores.get(name)

    def locate(self, text: str) -> tuple[PoolStore, str] | None:
        """Find the pool and id of a handle; None for a handle that this driver cannot have given.

        Raises FailedPrecondition for one of ours that cannot be served here: another node's, or of a pool that is not configured.
        Neither is "not found": the data is somewhere.
        """
        handle = parse_handle(text)
        if handle is None:
            return None
        store = self._stores.get(handle.pool)
        if store is None:
            raise FailedPrecondition(
                f"{quoted(text)} is in pool {handle.pool}, which is not configured here (pools: {self.names()}): "
                "its data may still exist; configure the pool again"
            )
        if handle.node_tag != store.node_tag:
            raise ForeignNode(
                f"{quoted(text)} lives on another node (tag {handle.node_tag}) than {store.node_id} (tag {store.node_tag})"
            )
        return store, handle.id

    def locate_source(self, text: str) -> tuple[PoolStore, str] | None:
        """Like `locate`, but another node's content is RESOURCE_EXHAUSTED: external-provisioner then tries that node."""
        try:
            return self.locate(text)
        except ForeignNode as error:
            raise ResourceExhausted(f"the content source {error}. {_SOURCE_ELSEWHERE}") from error


class ForeignNode(FailedPrecondition):
    """The handle belongs to the same driver on another node."""


@contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, _DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def archived_place(directory: str, token: str) -> str:
    """Say where the data of an archived volume lies, by its directory and its record's token."""
    return f"{ARCHIVE_DIRECTORY}/{directory.rpartition('/')[2]}.{token}"


def exists_at(parent: int, name: str) -> bool:
    """Tell whether the folder has an entry of this name, whatever it is."""
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
