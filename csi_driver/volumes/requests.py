"""What is asked of the domain.

Frozen values in the words of `model.py`, parsed already: of CSI's messages by `rpc/requests.py`, of a StorageClass by `parameters.py`. What
takes a pool or a record to know is left to whoever serves the request. Sizes are bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from csi_driver.volumes.model import (
    AS_MADE,
    AccessMode,
    AccessType,
    ContentSource,
    Layout,
    LimitPolicy,
    OnDelete,
    Ownership,
    Topology,
)

GIB = 1024**3
DEFAULT_CAPACITY_BYTES = GIB
"""The size of a volume for which nobody asked a size (CSI spec: capacity_range is OPTIONAL)."""


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
class ClassParameters:
    """What a StorageClass says, parsed (`parameters.py`)."""

    pool: str | None = None
    directory: str | None = None
    on_delete: OnDelete = OnDelete.DELETE
    ownership: Ownership = AS_MADE
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
