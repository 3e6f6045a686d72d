"""What the domain tells: volumes and snapshots as CSI shows them, capacity, health, usage, this node.

Frozen values in the words of `model.py`, of which `rpc/replies.py` makes CSI's messages. Sizes are bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from csi_driver.volumes.model import GroupRecord, SnapshotRecord, Topology, VolumeRecord


@dataclass(frozen=True)
class Volume:
    """A volume as CSI shows it: its record, what a PV carries of it, and from where it can be reached (None: everywhere)."""

    record: VolumeRecord
    context: Mapping[str, str]
    topology: Topology | None


@dataclass(frozen=True)
class Snapshot:
    record: SnapshotRecord
    topology: Topology | None


@dataclass(frozen=True)
class GroupSnapshot:
    record: GroupRecord
    members: tuple[Snapshot, ...]


@dataclass(frozen=True)
class Capacity:
    """What GetCapacity answers, in bytes; None where there is no such bound."""

    available_bytes: int
    maximum_volume_bytes: int | None = None
    minimum_volume_bytes: int | None = None


class HealthLevel(StrEnum):
    """How bad: CSI 1.13's VolumeHealthErrorType by its names; of storage, INACCESSIBLE is STORAGE_UNREACHABLE."""

    DEGRADED = "DEGRADED"
    INACCESSIBLE = "INACCESSIBLE"
    DATA_LOSS = "DATA_LOSS"


@dataclass(frozen=True)
class HealthEntry:
    level: HealthLevel
    reason: str
    message: str


@dataclass(frozen=True)
class VolumeHealth:
    volume_handle: str
    entries: tuple[HealthEntry, ...]


@dataclass(frozen=True)
class Usage:
    """One unit of NodeGetVolumeStats; None where the driver does not know."""

    used: int | None
    total: int | None
    available: int | None


class UsageSource(StrEnum):
    """Where the numbers of a volume's usage come from."""

    WALK = "walk"
    FILESYSTEM = "filesystem"  # of an image, by statvfs(3)
    DEVICE = "device"  # raw block: its size is all that is known
    PROJECT_QUOTA = "project quota"
    QGROUP = "btrfs qgroup"


@dataclass(frozen=True)
class VolumeStats:
    """A volume's own usage; `inodes` counts files, directories and everything else once. It is as it was `age_seconds` ago."""

    bytes: Usage
    inodes: Usage | None
    source: UsageSource = UsageSource.WALK
    age_seconds: float = 0.0


@dataclass(frozen=True)
class NodeInfo:
    """What NodeGetInfo answers; 0 volumes means no limit."""

    node_id: str
    max_volumes: int
    topology: Topology | None
