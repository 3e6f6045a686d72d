"""What the domain offers to the protocol: the ports that `rpc` calls, as the protocol sees them.

The classes that implement them live in the modules named beside each port. `deadline` is a time.monotonic() value in seconds by
which the caller wants an answer; work that outlasts it goes on and the retry joins it (OperationPending).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from csi_driver.volumes.answers import (
    Capacity,
    GroupSnapshot,
    HealthEntry,
    NodeInfo,
    Snapshot,
    Volume,
    VolumeHealth,
    VolumeStats,
)
from csi_driver.volumes.model import NodePublication, OnDelete, Topology
from csi_driver.volumes.requests import (
    Capability,
    CapacityRange,
    ClassParameters,
    CreateSnapshot,
    CreateVolume,
    Page,
    PublishVolume,
    StageVolume,
)


class VolumeService(Protocol):
    """Implemented in `provisioner.py`."""

    def create(self, request: CreateVolume, deadline: float) -> Volume: ...
    def delete(self, handle: str) -> None: ...
    def get(self, handle: str) -> Volume: ...
    def list(self, page: Page) -> tuple[Sequence[Volume], str]: ...
    def validate(self, handle: str, capabilities: Sequence[Capability], context: Mapping[str, str]) -> str | None:
        """Return None where the volume has all capabilities, else why it has not."""

    def expand(self, handle: str, capacity: CapacityRange, capability: Capability | None) -> int:
        """Return the new size in bytes."""

    def modify(self, handle: str, on_delete: OnDelete | None) -> None: ...


class AttachmentService(Protocol):
    """Implemented in `attachments.py`."""

    def publish(
        self, handle: str, publication: NodePublication, capability: Capability, context: Mapping[str, str]
    ) -> Mapping[str, str]:
        """Return the publish_context."""

    def unpublish(self, handle: str, node_id: str) -> None:
        """Take the volume from `node_id`, or from all nodes where it is empty."""


class SnapshotService(Protocol):
    """Implemented in `snapshots.py`."""

    def create(self, request: CreateSnapshot, deadline: float) -> Snapshot: ...
    def delete(self, handle: str) -> None: ...
    def get(self, handle: str) -> Snapshot: ...
    def list(self, page: Page, snapshot_handle: str, source_handle: str) -> tuple[Sequence[Snapshot], str]:
        """List snapshots; the two filters are empty where they are not given."""


class GroupService(Protocol):
    """Implemented in `groups.py`."""

    def create(self, name: str, source_handles: Sequence[str], deadline: float) -> GroupSnapshot: ...
    def delete(self, handle: str, snapshot_handles: Sequence[str]) -> None: ...
    def get(self, handle: str, snapshot_handles: Sequence[str]) -> GroupSnapshot: ...


class CapacityService(Protocol):
    """Implemented in `capacity.py`."""

    def available(
        self, parameters: ClassParameters, capabilities: Sequence[Capability], topology: Topology | None
    ) -> Capacity: ...


class HealthService(Protocol):
    """Implemented in `health.py`."""

    def volume(self, handle: str) -> VolumeHealth: ...
    def list(self, page: Page) -> tuple[Sequence[VolumeHealth], str]:
        """List the volumes that are not well."""

    def storage(self) -> Sequence[HealthEntry]: ...
    def ready(self) -> str | None:
        """Return None where every pool can be served, else why not."""


class NodeService(Protocol):
    """Implemented in `publisher.py`."""

    def info(self) -> NodeInfo: ...
    def stage(self, request: StageVolume) -> None: ...
    def unstage(self, handle: str, staging_path: str) -> None: ...
    def publish(self, request: PublishVolume) -> None: ...
    def unpublish(self, handle: str, target_path: str) -> None: ...
    def stats(self, handle: str, volume_path: str, deadline: float) -> VolumeStats: ...
    def health(self, handle: str, publish_path: str, staging_path: str) -> VolumeHealth: ...
    def expand(self, handle: str, volume_path: str, capacity: CapacityRange) -> int: ...


@dataclass(frozen=True)
class Services:
    """Everything that one process serves; None where its role leaves a service out."""

    health: HealthService
    volumes: VolumeService | None = None
    attachments: AttachmentService | None = None
    snapshots: SnapshotService | None = None
    groups: GroupService | None = None
    capacity: CapacityService | None = None
    node: NodeService | None = None
    expansion: bool = False
    """Whether the process stands beside external-resizer for pools of nodes, and says that the nodes expand."""
