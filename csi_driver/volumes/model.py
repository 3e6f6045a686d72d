"""The nouns of the domain: what a volume, a snapshot and a group of them are.

Everything here is a frozen value; records go to disk as they are (`records.py`). Sizes are bytes, times are nanoseconds since the epoch,
node ids are CSI's `node_id`. What is asked of the domain is in `requests.py`, what it tells in `answers.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


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


Topology = Mapping[str, str]
"""CSI's segments: what a node must have for a volume to be reached from it."""


@dataclass(frozen=True)
class ContentSource:
    """Where the content of a new volume comes from; `handle` is the snapshot's or the volume's."""

    kind: SourceKind
    handle: str


@dataclass(frozen=True)
class Ownership:
    """Owner, group and mode of a volume's top directory; None leaves it as it is made or copied."""

    uid: int | None = None
    gid: int | None = None
    mode: int | None = None


AS_MADE = Ownership()


@dataclass(frozen=True)
class NodePublication:
    """What ControllerPublishVolume asks for one node."""

    node_id: str
    access_mode: AccessMode
    readonly: bool = False


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
    ownership: Ownership = AS_MADE
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
    """What a group snapshot is: `sources` and `members` are handles, in the same order.

    `created_at_ns` is when the first member was cut; until the group is ready, when it was begun.
    """

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
