"""The nouns of the domain: what a volume, a snapshot and a request for one are.

Everything here is a frozen value. Requests arrive already parsed (`rpc/requests.py`); records go to disk as they are
(`records.py`). Sizes are bytes, times are nanoseconds since the epoch, node ids are CSI's `node_id`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

GIB = 1024**3
DEFAULT_CAPACITY_BYTES = GIB
"""The size of a volume for which nobody asked a size (CSI spec: capacity_range is OPTIONAL)."""


class AccessMode(StrEnum):
    """CSI's access modes, by CSI's names."""

    SINGLE_NODE_WRITER = "SINGLE_NODE_WRITER"
    SINGLE_NODE_READER_ONLY = "SINGLE_NODE_READER_ONLY"
    MULTI_NODE_READER_ONLY = "MULTI_NODE_READER_ONLY"
    MULTI_NODE_SINGLE_WRITER = "MULTI_NODE_SINGLE_WRITER"
    MULTI_NODE_MULTI_WRITER = "MULTI_NODE_MULTI_WRITER"
    SINGLE_NODE_SINGLE_WRITER = "SINGLE_NODE_SINGLE_WRITER"
    SINGLE_NODE_MULTI_WRITER = "SINGLE_NODE_MULTI_WRITER"

    @property
    def single_node(self) -> bool:
        return self.value.startswith("SINGLE_NODE")

    @property
    def reader_only(self) -> bool:
        return self.value.endswith("READER_ONLY")


class AccessType(StrEnum):
    MOUNT = "mount"
    BLOCK = "block"


class Layout(StrEnum):
    """How a volume is stored in its pool."""

    DIRECTORY = "directory"
    IMAGE = "image"


@dataclass(frozen=True)
class Form:
    """How a volume is stored and what pods see of it; `fs_type` is an image's filesystem, "" in a directory and in raw block."""

    layout: Layout = Layout.DIRECTORY
    access_type: AccessType = AccessType.MOUNT
    fs_type: str = ""


A_DIRECTORY = Form()


class OnDelete(StrEnum):
    """What becomes of the data when its volume is deleted."""

    DELETE = "delete"
    RETAIN = "retain"
    ARCHIVE = "archive"


class LimitPolicy(StrEnum):
    """What a class wants where nothing can hold a volume to its size: no volume, or one that is not held."""

    REQUIRED = "required"
    PREFERRED = "preferred"


class LimiterKind(StrEnum):
    """What holds a volume to its size."""

    NONE = "none"
    PROJECT_QUOTA = "project quota"
    QGROUP = "btrfs qgroup"
    IMAGE = "image"


class Phase(StrEnum):
    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"


class SourceKind(StrEnum):
    SNAPSHOT = "snapshot"
    VOLUME = "volume"


# --- requests ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CapacityRange:
    """CSI's capacity_range in bytes; 0 means not given."""

    required_bytes: int = 0
    limit_bytes: int = 0

    def admits(self, size_bytes: int) -> bool:
        """Tell whether a volume of `size_bytes` is what this range asks for."""
        return size_bytes >= self.required_bytes and (not self.limit_bytes or size_bytes <= self.limit_bytes)


@dataclass(frozen=True)
class Capability:
    """One CSI VolumeCapability."""

    access_type: AccessType
    access_mode: AccessMode
    fs_type: str = ""
    mount_flags: tuple[str, ...] = ()
    mount_group: str = ""


@dataclass(frozen=True)
class ContentSource:
    """Where the content of a new volume comes from; `handle` is the snapshot's or the volume's."""

    kind: SourceKind
    handle: str


Topology = Mapping[str, str]


@dataclass(frozen=True)
class Ownership:
    """Owner, group and mode of a volume's top directory; None leaves it as it is made or copied."""

    uid: int | None = None
    gid: int | None = None
    mode: int | None = None


@dataclass(frozen=True)
class ClassParameters:
    """What a StorageClass says, parsed (`parameters.py`)."""

    pool: str | None = None
    directory: str | None = None
    on_delete: OnDelete = OnDelete.DELETE
    ownership: Ownership = Ownership()
    verify: bool = False  # restore only snapshots that are what they were
    layout: Layout | None = None
    limit: LimitPolicy = LimitPolicy.PREFERRED
    inodes: int | None = None  # the most files, directories and others; None: any number


@dataclass(frozen=True)
class CreateVolume:
    name: str
    capacity: CapacityRange
    capabilities: tuple[Capability, ...]
    parameters: ClassParameters
    source: ContentSource | None = None
    requisite: tuple[Topology, ...] = ()
    ephemeral: bool = False  # made for one pod and gone with it; never set by a CreateVolume call


@dataclass(frozen=True)
class CreateSnapshot:
    name: str
    source_handle: str
    requisite: tuple[Topology, ...] = ()
    digests: bool = False  # read the snapshot once it is cut, so that it can be verified from then on


@dataclass(frozen=True)
class Page:
    """A CSI page request: at most `max_entries` (0: all) after the entry that `token` names."""

    max_entries: int = 0
    token: str = ""


@dataclass(frozen=True)
class NodePublication:
    """What ControllerPublishVolume asks for one node."""

    node_id: str
    access_mode: AccessMode
    readonly: bool = False


@dataclass(frozen=True)
class StageVolume:
    volume_handle: str
    staging_path: str
    capability: Capability
    publish_context: Mapping[str, str] = field(default_factory=dict)
    volume_context: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PublishVolume:
    volume_handle: str
    target_path: str
    capability: Capability
    readonly: bool
    staging_path: str = ""
    publish_context: Mapping[str, str] = field(default_factory=dict)
    volume_context: Mapping[str, str] = field(default_factory=dict)


# --- records ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptureReport:
    """How content was made: by which method, how much, and what the filesystems could not carry (kind -> count).

    A method that makes a whole tree in one step does not count files and bytes: None.
    """

    method: str
    files: int | None = None
    bytes: int | None = None
    not_carried: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ManifestSummary:
    """What the manifest of a snapshot says in all (manifests.py): entries that are no directories, bytes, and its own digest."""

    entries: int
    bytes: int
    digest: str


@dataclass(frozen=True)
class Limit:
    """What holds a volume: by what, how well (`hard`, `hard but for …`, `none: …`), and the project id or subvolume that is limited.

    A project id means something on its `filesystem` alone (linux/filesystem_ids.py; None: unknown).
    """

    limiter: LimiterKind
    level: str
    mark: int | None = None
    filesystem: str | None = None


@dataclass(frozen=True)
class VolumeRecord:
    """What a volume is. `directory` is relative to the pool's root; `token` is drawn anew for every creation."""

    id: str
    handle: str
    name: str
    driver: str
    pool: str
    token: str
    phase: Phase
    created_at_ns: int
    directory: str
    capacity_bytes: int
    form: Form = A_DIRECTORY
    on_delete: OnDelete = OnDelete.DELETE
    ownership: Ownership = Ownership()
    directory_template: str | None = None
    source: ContentSource | None = None
    capture: CaptureReport | None = None
    claimed: bool = False
    content_inode: int | None = None
    published: tuple[NodePublication, ...] = ()
    epoch: int = 0
    ephemeral: bool = False
    verify: bool = False
    limit_policy: LimitPolicy = LimitPolicy.PREFERRED
    inodes: int | None = None
    limit: Limit | None = None  # None: made by a driver that set none


@dataclass(frozen=True)
class SnapshotRecord:
    """What a snapshot is. `created_at_ns` is when it was cut; `size_bytes` the least that a restore needs."""

    id: str
    handle: str
    name: str
    driver: str
    pool: str
    token: str
    phase: Phase
    created_at_ns: int
    source_handle: str
    size_bytes: int
    group_handle: str | None = None
    consistency: str | None = None
    capture: CaptureReport | None = None
    manifest: ManifestSummary | None = None
    form: Form = A_DIRECTORY


@dataclass(frozen=True)
class GroupRecord:
    """What a group snapshot is: `sources` and `members` are handles, in the same order."""

    id: str
    handle: str
    name: str
    driver: str
    pool: str
    token: str
    phase: Phase
    created_at_ns: int
    sources: tuple[str, ...]
    members: tuple[str, ...]
    consistency: str | None = None


# --- answers ----------------------------------------------------------------------------------------------------------------------


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
