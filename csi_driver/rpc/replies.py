"""Replies: from the domain's values to CSI's messages.

The spec limits what a plugin sends as well: strings of 128 bytes, and no two health entries of one status and reason.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.wrappers_pb2 import Int64Value

from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc.fields import MAX_STRING_BYTES
from csi_driver.volumes.answers import (
    Capacity,
    GroupSnapshot,
    HealthEntry,
    HealthLevel,
    NodeInfo,
    Snapshot,
    Usage,
    Volume,
    VolumeHealth,
    VolumeStats,
)
from csi_driver.volumes.model import ContentSource, Phase, SourceKind, Topology

_Code = TypeVar("_Code")

_VOLUME_HEALTH = {
    HealthLevel.DEGRADED: csi.DEGRADED,
    HealthLevel.INACCESSIBLE: csi.INACCESSIBLE,
    HealthLevel.DATA_LOSS: csi.DATA_LOSS,
}
_STORAGE_HEALTH = {  # CSI knows two words for storage; losing data is the worse of what is still reachable
    HealthLevel.DEGRADED: csi.STORAGE_DEGRADED,
    HealthLevel.INACCESSIBLE: csi.STORAGE_UNREACHABLE,
    HealthLevel.DATA_LOSS: csi.STORAGE_DEGRADED,
}


def show_volume(volume: Volume) -> csi.Volume:
    """Show a volume as its PV will carry it."""
    return csi.Volume(
        volume_id=volume.record.handle,
        capacity_bytes=volume.record.capacity_bytes,
        volume_context=volume.context,
        content_source=_content_source(volume.record.source),
        accessible_topology=_topologies(volume.topology),
    )


def show_volume_entry(volume: Volume) -> csi.ListVolumesResponse.Entry:
    """Show a volume in a list, with the nodes that it is published to."""
    status = csi.ListVolumesResponse.VolumeStatus(published_node_ids=_published(volume))
    return csi.ListVolumesResponse.Entry(volume=show_volume(volume), status=status)


def show_volume_status(volume: Volume) -> csi.ControllerGetVolumeResponse:
    """Show one volume, with the nodes that it is published to."""
    status = csi.ControllerGetVolumeResponse.VolumeStatus(published_node_ids=_published(volume))
    return csi.ControllerGetVolumeResponse(volume=show_volume(volume), status=status)


def show_validation(
    problem: str | None, request: csi.ValidateVolumeCapabilitiesRequest
) -> csi.ValidateVolumeCapabilitiesResponse:
    """Confirm what was asked about, or say the problem. Parameters are not confirmed: a volume is not compared with its class."""
    if problem is not None:
        return csi.ValidateVolumeCapabilitiesResponse(message=_short(problem))
    confirmed = csi.ValidateVolumeCapabilitiesResponse.Confirmed(
        volume_context=request.volume_context, volume_capabilities=request.volume_capabilities
    )
    return csi.ValidateVolumeCapabilitiesResponse(confirmed=confirmed)


def show_capacity(capacity: Capacity) -> csi.GetCapacityResponse:
    """Show how much room there is, in bytes."""
    return csi.GetCapacityResponse(
        available_capacity=capacity.available_bytes,
        maximum_volume_size=_optional(capacity.maximum_volume_bytes),
        minimum_volume_size=_optional(capacity.minimum_volume_bytes),
    )


def show_snapshot(snapshot: Snapshot) -> csi.Snapshot:
    """Show a snapshot; the time is that of its cut."""
    record = snapshot.record
    return csi.Snapshot(
        snapshot_id=record.handle,
        source_volume_id=record.source_handle,
        size_bytes=record.size_bytes,
        creation_time=_time(record.created_at_ns),
        ready_to_use=record.phase is Phase.READY,
        group_snapshot_id=record.group_handle or "",
        accessible_topology=_topologies(snapshot.topology),
    )


def show_group(group: GroupSnapshot) -> csi.VolumeGroupSnapshot:
    """Show a group snapshot with its members; it is ready when all of them are."""
    members = [show_snapshot(member) for member in group.members]
    return csi.VolumeGroupSnapshot(
        group_snapshot_id=group.record.handle,
        snapshots=members,
        creation_time=_time(group.record.created_at_ns),
        ready_to_use=all(member.ready_to_use for member in members),
    )


def show_health(health: VolumeHealth) -> csi.VolumeHealth:
    """Show what is wrong with a volume; nothing where nothing is."""
    entries = [
        csi.VolumeHealth.VolumeHealthEntry(status=status, reason=reason, message=message)
        for (status, reason), message in _merged(health.entries, _VOLUME_HEALTH).items()
    ]
    return csi.VolumeHealth(volume_id=health.volume_handle, health_statuses=entries)


def show_storage_health(entries: Sequence[HealthEntry]) -> csi.NodeGetStorageHealthResponse:
    """Show what is wrong with this node's pools."""
    shown = [
        csi.NodeGetStorageHealthResponse.StorageBackendHealth(status=status, reason=reason, message=message)
        for (status, reason), message in _merged(entries, _STORAGE_HEALTH).items()
    ]
    return csi.NodeGetStorageHealthResponse(backend_health=shown)


def show_stats(stats: VolumeStats) -> csi.NodeGetVolumeStatsResponse:
    """Show a volume's own usage, in bytes and in inodes."""
    return csi.NodeGetVolumeStatsResponse(
        usage=[
            _usage(csi.VolumeUsage.BYTES, stats.bytes),
            *([_usage(csi.VolumeUsage.INODES, stats.inodes)] if stats.inodes is not None else []),
        ]
    )


def show_node(info: NodeInfo) -> csi.NodeGetInfoResponse:
    """Show how this node is called, how many volumes it takes, and where it is."""
    topology = csi.Topology(segments=info.topology) if info.topology else None
    return csi.NodeGetInfoResponse(node_id=info.node_id, max_volumes_per_node=info.max_volumes, accessible_topology=topology)


def _merged(entries: Iterable[HealthEntry], codes: Mapping[HealthLevel, _Code]) -> dict[tuple[_Code, str], str]:
    messages: dict[tuple[_Code, str], list[str]] = {}
    for entry in entries:
        messages.setdefault((codes[entry.level], entry.reason), []).append(entry.message)
    return {key: _short("; ".join(filter(None, parts))) for key, parts in messages.items()}


def _content_source(source: ContentSource | None) -> csi.VolumeContentSource | None:
    if source is None:
        return None
    if source.kind is SourceKind.SNAPSHOT:
        return csi.VolumeContentSource(snapshot=csi.VolumeContentSource.SnapshotSource(snapshot_id=source.handle))
    return csi.VolumeContentSource(volume=csi.VolumeContentSource.VolumeSource(volume_id=source.handle))


def _published(volume: Volume) -> list[str]:
    return [publication.node_id for publication in volume.record.published]


def _topologies(topology: Topology | None) -> list[csi.Topology]:
    return [csi.Topology(segments=topology)] if topology else []


def _optional(value: int | None) -> Int64Value | None:
    return None if value is None else Int64Value(value=value)


def _time(nanoseconds: int) -> Timestamp:
    return Timestamp(seconds=nanoseconds // 10**9, nanos=nanoseconds % 10**9)


def _usage(unit: csi.VolumeUsage.Unit.ValueType, usage: Usage) -> csi.VolumeUsage:
    return csi.VolumeUsage(unit=unit, used=usage.used or 0, total=usage.total or 0, available=usage.available or 0)


def _short(text: str) -> str:
    data = text.encode("utf-8", "backslashreplace")
    if len(data) <= MAX_STRING_BYTES:
        return data.decode()
    ellipsis = "…"
    return data[: MAX_STRING_BYTES - len(ellipsis.encode())].decode("utf-8", "ignore") + ellipsis
