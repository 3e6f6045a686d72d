"""What this node remembers of its volumes: Unstage, Unpublish, Stats and Expand get no context and must not need the pool.

One record for each volume in the kubelet's plugin directory, in the record format of the pools. It is written before the mount that
it describes: after a crash it may name a mount that is not there, never the other way round. What is mounted, mountinfo says.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from csi_driver.errors import FailedPrecondition
from csi_driver.linux import files
from csi_driver.linux.byte_range_locks import ByteRangeLocks, HeldLock
from csi_driver.volumes.handles import derive_id
from csi_driver.volumes.model import A_DIRECTORY, AccessMode, Form
from csi_driver.volumes.records import RecordFolder

_IDENTITIES = "pools.json"
_TEMPORARY_SECONDS = 3600.0


@dataclass(frozen=True)
class Target:
    """One publication on this node."""

    path: str
    readonly: bool
    mount_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeVolumeRecord:
    """A volume as this node has it. `staging_path` is empty for inline volumes, which are not staged."""

    id: str
    token: str
    handle: str
    pool: str
    directory: str
    access_mode: AccessMode
    staging_path: str = ""
    mount_flags: tuple[str, ...] = ()
    static: bool = False
    ephemeral: bool = False  # made for a pod, gone with it
    targets: tuple[Target, ...] = ()
    source: str = ""  # what mountinfo calls a remote pool's directory: the pool may have moved to another server since
    capacity_bytes: int | None = None  # of a remote pool: its records are not seen from here
    mount_group: str = ""
    form: Form = A_DIRECTORY
    epoch: int = 0  # of the publication that an image is held by
    device: str = ""  # an image's loop device; whether it still is, sysfs says
    read_only_device: str = ""
    fault: str = ""  # why an image's filesystem could not be mounted

    @property
    def holds_unsaved_writes(self) -> bool:
        """Whether what is written late through the mount of a dead server could meet another node's writes."""
        return self.access_mode.single_node and not self.access_mode.reader_only

    def target(self, path: str) -> Target | None:
        return next((target for target in self.targets if target.path == path), None)

    def paths(self) -> tuple[str, ...]:
        """List every path at which this node was asked to show the volume."""
        staged = (self.staging_path,) if self.staging_path else ()
        return (*staged, *(target.path for target in self.targets))


class NodeState:
    """The node's records, and its lock file: two driver processes on one node (an upgrade) exclude each other."""

    name = "this node"

    def __init__(self, directory: Path, driver: str) -> None:
        self._directory = directory
        self._driver = driver
        self.volumes = RecordFolder(NodeVolumeRecord, str(directory / "volumes"), lambda: _opened(directory / "volumes"))

    def prepare(self) -> None:
        """Make the directories, and remove what a killed driver was writing in them."""
        (self._directory / "volumes").mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in (self._directory, self._directory / "volumes"):
            with _opened(place) as directory:
                files.remove_leftover_temporaries(directory, _TEMPORARY_SECONDS)

    @property
    def directory(self) -> Path:
        return self._directory

    def id_of(self, handle: str) -> str:
        return derive_id("node", self._driver, None, handle)

    def get(self, handle: str) -> NodeVolumeRecord | None:
        return self.volumes.get(self.id_of(handle))

    def keep(self, record: NodeVolumeRecord) -> NodeVolumeRecord:
        """Write down what is now known of a volume, in place of what was. The caller holds its lock. Returns the record."""
        # No gate: the lock is this kernel's own, and nobody takes it away from a process that lives.
        return self.volumes.replace(record, files.OPEN)

    def try_hold(self, offset: int, *, shared: bool) -> HeldLock | None:
        with _opened(self._directory) as directory:
            return ByteRangeLocks(directory, "lock").try_hold(offset, shared=shared)

    # --- which pools this node has seen -------------------------------------------------------------------------------------------

    def identities(self) -> Mapping[str, str]:
        """Return the identity of each pool that was seen on this node, by pool name."""
        try:
            with _opened(self._directory) as directory:
                body = json.loads(files.read_bounded(directory, _IDENTITIES, 1024 * 1024))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise FailedPrecondition(
                f"{self._directory / _IDENTITIES} is damaged: {error}; remove it to trust the pools as they are"
            ) from error
        return {str(name): str(identity) for name, identity in body.items()} if isinstance(body, dict) else {}

    def remember(self, identities: Mapping[str, str]) -> None:
        """Write down the identities of the pools, so that a disk that is not mounted is noticed at the next start."""
        if identities != self.identities():
            with _opened(self._directory) as directory:
                files.write_atomically(directory, _IDENTITIES, json.dumps(dict(identities), indent=1).encode() + b"\n")


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
