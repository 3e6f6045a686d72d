"""Requests: from CSI's messages to the domain's frozen values. Parse, don't validate: what comes out of here needs no second look.

Required fields are asked for in the order in which csi-sanity leaves them out. Secrets are not read at all: nothing here needs one.
"""

from dataclasses import replace

from csi_driver.errors import InvalidArgument
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc.fields import (
    parse_capabilities,
    parse_capability,
    parse_capacity,
    parse_handle,
    parse_handles,
    parse_map,
    parse_name,
    parse_node_id,
    parse_optional_path,
    parse_page,
    parse_path,
    parse_requisite,
    parse_topology,
    parse_volume_path,
)
from csi_driver.volumes.model import ContentSource, NodePublication, OnDelete, SourceKind, Topology
from csi_driver.volumes.parameters import (
    PV_NAME,
    PVC_NAME,
    PVC_NAMESPACE,
    parse_class_parameters,
    parse_group_parameters,
    parse_mutable_parameters,
    parse_snapshot_parameters,
)
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

# A class is asked about without a claim (GetCapacity, ValidateVolumeCapabilities); its `directory` template is checked with these.
_NO_CLAIM = {PVC_NAME: "name", PVC_NAMESPACE: "namespace", PV_NAME: "volume"}


def parse_create_volume(request: csi.CreateVolumeRequest) -> CreateVolume:
    """Parse CreateVolume. Raises InvalidArgument, OutOfRange (capacity_range)."""
    return CreateVolume(
        name=parse_name(request.name, "name"),
        capabilities=parse_capabilities(request.volume_capabilities, "volume_capabilities"),
        capacity=_optional_capacity(request),
        parameters=parse_class_parameters(
            parse_map(request.parameters, "parameters"), parse_map(request.mutable_parameters, "mutable_parameters")
        ),
        source=_content_source(request),
        requisite=_requisite(request),
    )


def parse_expand(request: csi.ControllerExpandVolumeRequest) -> tuple[str, CapacityRange, Capability | None]:
    """Parse ControllerExpandVolume: handle, capacity, and the capability if one is given."""
    handle = parse_handle(request.volume_id, "volume_id")
    if not request.HasField("capacity_range"):
        raise InvalidArgument("capacity_range is missing: it is required")
    return handle, parse_capacity(request.capacity_range, "capacity_range"), _optional_capability(request)


def parse_modify(request: csi.ControllerModifyVolumeRequest) -> tuple[str, OnDelete | None]:
    """Parse ControllerModifyVolume: handle, and what is to become of the data on deletion."""
    handle = parse_handle(request.volume_id, "volume_id")
    if not request.mutable_parameters:
        raise InvalidArgument("mutable_parameters is missing: at least one is needed; allowed is `onDelete`")
    return handle, parse_mutable_parameters(parse_map(request.mutable_parameters, "mutable_parameters"))


def parse_validate(request: csi.ValidateVolumeCapabilitiesRequest) -> tuple[str, tuple[Capability, ...], dict[str, str]]:
    """Parse ValidateVolumeCapabilities: handle, capabilities, volume_context. Parameters are checked for what a class may say."""
    handle = parse_handle(request.volume_id, "volume_id")
    capabilities = parse_capabilities(request.volume_capabilities, "volume_capabilities")
    parse_class_parameters(
        _NO_CLAIM | parse_map(request.parameters, "parameters"), parse_map(request.mutable_parameters, "mutable_parameters")
    )
    return handle, capabilities, parse_map(request.volume_context, "volume_context")


def parse_controller_publish(
    request: csi.ControllerPublishVolumeRequest,
) -> tuple[str, NodePublication, Capability, dict[str, str]]:
    """Parse ControllerPublishVolume: handle, who gets it and how, capability, volume_context."""
    handle = parse_handle(request.volume_id, "volume_id")
    node_id = parse_node_id(request.node_id, "node_id")
    capability = _required_capability(request)
    publication = NodePublication(node_id, capability.access_mode, request.readonly)
    return handle, publication, capability, parse_map(request.volume_context, "volume_context")


def parse_controller_unpublish(request: csi.ControllerUnpublishVolumeRequest) -> tuple[str, str]:
    """Parse ControllerUnpublishVolume: handle, and the node ("": all nodes)."""
    return parse_handle(request.volume_id, "volume_id"), parse_node_id(request.node_id, "node_id", required=False)


def parse_get_capacity(request: csi.GetCapacityRequest) -> tuple[ClassParameters, tuple[Capability, ...], Topology | None]:
    """Parse GetCapacity: what the class says but for `directory`, which no claim fills in here, capabilities, topology."""
    parameters = parse_class_parameters(_NO_CLAIM | parse_map(request.parameters, "parameters"))
    asked = request.volume_capabilities
    capabilities = parse_capabilities(asked, "volume_capabilities") if asked else ()
    topology = parse_topology(request.accessible_topology, "accessible_topology")
    return replace(parameters, directory=None), capabilities, topology or None


def parse_create_snapshot(request: csi.CreateSnapshotRequest) -> CreateSnapshot:
    """Parse CreateSnapshot."""
    return CreateSnapshot(
        name=parse_name(request.name, "name"),
        source_handle=parse_handle(request.source_volume_id, "source_volume_id"),
        requisite=_requisite(request),
        digests=parse_snapshot_parameters(parse_map(request.parameters, "parameters")),
    )


def parse_list_snapshots(request: csi.ListSnapshotsRequest) -> tuple[Page, str, str]:
    """Parse ListSnapshots: the page, and the snapshot and the source to which it is limited ("": not)."""
    return (
        parse_page(request.max_entries, request.starting_token),
        parse_handle(request.snapshot_id, "snapshot_id") if request.snapshot_id else "",
        parse_handle(request.source_volume_id, "source_volume_id") if request.source_volume_id else "",
    )


def parse_create_group(request: csi.CreateVolumeGroupSnapshotRequest) -> tuple[str, tuple[str, ...]]:
    """Parse CreateVolumeGroupSnapshot: name and source volumes, at least one, each once."""
    name = parse_name(request.name, "name")
    sources = parse_handles(request.source_volume_ids, "source_volume_ids")
    if not sources:
        raise InvalidArgument("source_volume_ids is missing: at least one volume is needed")
    parse_group_parameters(parse_map(request.parameters, "parameters"))
    return name, sources


def parse_group(
    request: csi.GetVolumeGroupSnapshotRequest | csi.DeleteVolumeGroupSnapshotRequest,
) -> tuple[str, tuple[str, ...]]:
    """Parse Get- and DeleteVolumeGroupSnapshot: the group, and what the caller takes for its members.

    The members are REQUIRED by the spec, but csi-sanity leaves them out and expects NOT_FOUND and OK; so none means unchecked.
    """
    return parse_handle(request.group_snapshot_id, "group_snapshot_id"), parse_handles(request.snapshot_ids, "snapshot_ids")


def parse_stage(request: csi.NodeStageVolumeRequest) -> StageVolume:
    """Parse NodeStageVolume."""
    return StageVolume(
        volume_handle=parse_handle(request.volume_id, "volume_id"),
        staging_path=parse_path(request.staging_target_path, "staging_target_path"),
        capability=_required_capability(request),
        publish_context=parse_map(request.publish_context, "publish_context"),
        volume_context=parse_map(request.volume_context, "volume_context"),
    )


def parse_publish(request: csi.NodePublishVolumeRequest) -> PublishVolume:
    """Parse NodePublishVolume. The staging path may be missing: an inline volume has none, and of others the domain asks for it."""
    return PublishVolume(
        volume_handle=parse_handle(request.volume_id, "volume_id"),
        target_path=parse_path(request.target_path, "target_path"),
        capability=_required_capability(request),
        readonly=request.readonly,
        staging_path=parse_optional_path(request.staging_target_path, "staging_target_path"),
        publish_context=parse_map(request.publish_context, "publish_context"),
        volume_context=parse_map(request.volume_context, "volume_context"),
    )


def parse_stats(request: csi.NodeGetVolumeStatsRequest) -> tuple[str, str]:
    """Parse NodeGetVolumeStats: handle and volume_path. Raises NotFound for a path where nothing can be."""
    handle = parse_handle(request.volume_id, "volume_id")
    parse_optional_path(request.staging_target_path, "staging_target_path")
    return handle, parse_volume_path(request.volume_path, "volume_path")


def parse_node_health(request: csi.NodeGetVolumeHealthRequest) -> tuple[str, str, str]:
    """Parse NodeGetVolumeHealth: handle, and the paths where it was, or was to be, published and staged ("": not said)."""
    return (
        parse_handle(request.volume_id, "volume_id"),
        parse_optional_path(request.volume_publish_path, "volume_publish_path"),
        parse_optional_path(request.staging_target_path, "staging_target_path"),
    )


def parse_node_expand(request: csi.NodeExpandVolumeRequest) -> tuple[str, str, CapacityRange]:
    """Parse NodeExpandVolume: handle, volume_path, capacity. Raises NotFound for a path where nothing can be."""
    handle = parse_handle(request.volume_id, "volume_id")
    path = parse_volume_path(request.volume_path, "volume_path")
    parse_optional_path(request.staging_target_path, "staging_target_path")
    _optional_capability(request)
    return handle, path, _optional_capacity(request)


def _optional_capacity(request: csi.CreateVolumeRequest | csi.NodeExpandVolumeRequest) -> CapacityRange:
    return parse_capacity(request.capacity_range, "capacity_range") if request.HasField("capacity_range") else CapacityRange()


def _required_capability(
    request: csi.ControllerPublishVolumeRequest | csi.NodeStageVolumeRequest | csi.NodePublishVolumeRequest,
) -> Capability:
    if not request.HasField("volume_capability"):
        raise InvalidArgument("volume_capability is missing: it is required")
    return parse_capability(request.volume_capability, "volume_capability")


def _optional_capability(request: csi.ControllerExpandVolumeRequest | csi.NodeExpandVolumeRequest) -> Capability | None:
    return parse_capability(request.volume_capability, "volume_capability") if request.HasField("volume_capability") else None


def _requisite(request: csi.CreateVolumeRequest | csi.CreateSnapshotRequest) -> tuple[Topology, ...]:
    if not request.HasField("accessibility_requirements"):
        return ()
    return parse_requisite(request.accessibility_requirements, "accessibility_requirements")


def _content_source(request: csi.CreateVolumeRequest) -> ContentSource | None:
    if not request.HasField("volume_content_source"):
        return None
    field, source = "volume_content_source", request.volume_content_source
    match source.WhichOneof("type"):
        case "snapshot":
            return ContentSource(
                SourceKind.SNAPSHOT, parse_handle(source.snapshot.snapshot_id, f"{field}.snapshot.snapshot_id")
            )
        case "volume":
            return ContentSource(SourceKind.VOLUME, parse_handle(source.volume.volume_id, f"{field}.volume.volume_id"))
        case _:
            raise InvalidArgument(f"{field} is empty: `snapshot` or `volume` must be given")
