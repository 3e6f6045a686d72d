"""The Controller service: every method parses, asks the domain, and shows what it said."""

# The names and arguments are those of the generated servicers.
# ruff: noqa: N802, ARG002

import grpc

from csi_driver.rpc import calls, replies, requests
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc.csi_pb2_grpc import ControllerServicer
from csi_driver.rpc.fields import parse_handle, parse_page
from csi_driver.volumes.model import Layout
from csi_driver.volumes.services import AttachmentService, CapacityService, HealthService, SnapshotService, VolumeService

_Context = grpc.ServicerContext
_RPC = csi.ControllerServiceCapability.RPC
CAPABILITIES = (
    _RPC.CREATE_DELETE_VOLUME,
    _RPC.PUBLISH_UNPUBLISH_VOLUME,
    _RPC.LIST_VOLUMES,
    _RPC.GET_CAPACITY,
    _RPC.CREATE_DELETE_SNAPSHOT,
    _RPC.LIST_SNAPSHOTS,
    _RPC.CLONE_VOLUME,
    _RPC.PUBLISH_READONLY,
    _RPC.EXPAND_VOLUME,
    _RPC.LIST_VOLUMES_PUBLISHED_NODES,
    _RPC.GET_VOLUME,
    _RPC.SINGLE_NODE_MULTI_WRITER,
    _RPC.MODIFY_VOLUME,
    _RPC.GET_SNAPSHOT,
    _RPC.GET_VOLUME_HEALTH,
    _RPC.LIST_VOLUME_HEALTH,
)


class Controller(ControllerServicer):
    """Volumes and snapshots, made and kept."""

    def __init__(
        self,
        volumes: VolumeService,
        attachments: AttachmentService,
        snapshots: SnapshotService,
        capacity: CapacityService,
        health: HealthService,
    ) -> None:
        self._volumes = volumes
        self._attachments = attachments
        self._snapshots = snapshots
        self._capacity = capacity
        self._health = health

    def ControllerGetCapabilities(
        self, request: csi.ControllerGetCapabilitiesRequest, context: _Context
    ) -> csi.ControllerGetCapabilitiesResponse:
        capabilities = [csi.ControllerServiceCapability(rpc=_RPC(type=kind)) for kind in CAPABILITIES]
        return csi.ControllerGetCapabilitiesResponse(capabilities=capabilities)

    # --- volumes ------------------------------------------------------------------------------------------------------------------

    def CreateVolume(self, request: csi.CreateVolumeRequest, context: _Context) -> csi.CreateVolumeResponse:
        volume = self._volumes.create(requests.parse_create_volume(request), calls.deadline())
        return csi.CreateVolumeResponse(volume=replies.show_volume(volume))

    def DeleteVolume(self, request: csi.DeleteVolumeRequest, context: _Context) -> csi.DeleteVolumeResponse:
        self._volumes.delete(parse_handle(request.volume_id, "volume_id"))
        return csi.DeleteVolumeResponse()

    def ControllerExpandVolume(
        self, request: csi.ControllerExpandVolumeRequest, context: _Context
    ) -> csi.ControllerExpandVolumeResponse:
        handle, capacity, capability = requests.parse_expand(request)
        size = self._volumes.expand(handle, capacity, capability)
        # A directory grows for all nodes at once; an image's device and filesystem grow where they are used.
        on_node = self._volumes.get(handle).record.form.layout is Layout.IMAGE
        return csi.ControllerExpandVolumeResponse(capacity_bytes=size, node_expansion_required=on_node)

    def ControllerModifyVolume(
        self, request: csi.ControllerModifyVolumeRequest, context: _Context
    ) -> csi.ControllerModifyVolumeResponse:
        self._volumes.modify(*requests.parse_modify(request))
        return csi.ControllerModifyVolumeResponse()

    def ControllerGetVolume(
        self, request: csi.ControllerGetVolumeRequest, context: _Context
    ) -> csi.ControllerGetVolumeResponse:
        return replies.show_volume_status(self._volumes.get(parse_handle(request.volume_id, "volume_id")))

    def ListVolumes(self, request: csi.ListVolumesRequest, context: _Context) -> csi.ListVolumesResponse:
        volumes, token = self._volumes.list(parse_page(request.max_entries, request.starting_token))
        return csi.ListVolumesResponse(entries=map(replies.show_volume_entry, volumes), next_token=token)

    def ValidateVolumeCapabilities(
        self, request: csi.ValidateVolumeCapabilitiesRequest, context: _Context
    ) -> csi.ValidateVolumeCapabilitiesResponse:
        problem = self._volumes.validate(*requests.parse_validate(request))
        return replies.show_validation(problem, request)

    def GetCapacity(self, request: csi.GetCapacityRequest, context: _Context) -> csi.GetCapacityResponse:
        return replies.show_capacity(self._capacity.available(*requests.parse_get_capacity(request)))

    # --- attachments --------------------------------------------------------------------------------------------------------------

    def ControllerPublishVolume(
        self, request: csi.ControllerPublishVolumeRequest, context: _Context
    ) -> csi.ControllerPublishVolumeResponse:
        publish_context = self._attachments.publish(*requests.parse_controller_publish(request))
        return csi.ControllerPublishVolumeResponse(publish_context=publish_context)

    def ControllerUnpublishVolume(
        self, request: csi.ControllerUnpublishVolumeRequest, context: _Context
    ) -> csi.ControllerUnpublishVolumeResponse:
        self._attachments.unpublish(*requests.parse_controller_unpublish(request))
        return csi.ControllerUnpublishVolumeResponse()

    # --- snapshots ----------------------------------------------------------------------------------------------------------------

    def CreateSnapshot(self, request: csi.CreateSnapshotRequest, context: _Context) -> csi.CreateSnapshotResponse:
        snapshot = self._snapshots.create(requests.parse_create_snapshot(request), calls.deadline())
        return csi.CreateSnapshotResponse(snapshot=replies.show_snapshot(snapshot))

    def DeleteSnapshot(self, request: csi.DeleteSnapshotRequest, context: _Context) -> csi.DeleteSnapshotResponse:
        self._snapshots.delete(parse_handle(request.snapshot_id, "snapshot_id"))
        return csi.DeleteSnapshotResponse()

    def GetSnapshot(self, request: csi.GetSnapshotRequest, context: _Context) -> csi.GetSnapshotResponse:
        snapshot = self._snapshots.get(parse_handle(request.snapshot_id, "snapshot_id"))
        return csi.GetSnapshotResponse(snapshot=replies.show_snapshot(snapshot))

    def ListSnapshots(self, request: csi.ListSnapshotsRequest, context: _Context) -> csi.ListSnapshotsResponse:
        snapshots, token = self._snapshots.list(*requests.parse_list_snapshots(request))
        entries = (csi.ListSnapshotsResponse.Entry(snapshot=replies.show_snapshot(snapshot)) for snapshot in snapshots)
        return csi.ListSnapshotsResponse(entries=entries, next_token=token)

    # --- health -------------------------------------------------------------------------------------------------------------------

    def ControllerGetVolumeHealth(
        self, request: csi.ControllerGetVolumeHealthRequest, context: _Context
    ) -> csi.ControllerGetVolumeHealthResponse:
        health = self._health.volume(parse_handle(request.volume_id, "volume_id"))
        return csi.ControllerGetVolumeHealthResponse(volume_health=replies.show_health(health))

    def ControllerListVolumeHealth(
        self, request: csi.ControllerListVolumeHealthRequest, context: _Context
    ) -> csi.ControllerListVolumeHealthResponse:
        unwell, token = self._health.list(parse_page(request.max_entries, request.starting_token))
        return csi.ControllerListVolumeHealthResponse(entries=map(replies.show_health, unwell), next_token=token)
