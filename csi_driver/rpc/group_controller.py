"""The GroupController service: snapshots of several volumes at one point in time."""

# The names and arguments are those of the generated servicers.
# ruff: noqa: N802, ARG002

import grpc

from csi_driver.rpc import calls, replies, requests
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc.csi_pb2_grpc import GroupControllerServicer
from csi_driver.volumes.services import GroupService

_Context = grpc.ServicerContext
_RPC = csi.GroupControllerServiceCapability.RPC


class GroupController(GroupControllerServicer):
    """Group snapshots, made, shown and deleted."""

    def __init__(self, groups: GroupService) -> None:
        self._groups = groups

    def GroupControllerGetCapabilities(
        self, request: csi.GroupControllerGetCapabilitiesRequest, context: _Context
    ) -> csi.GroupControllerGetCapabilitiesResponse:
        rpc = _RPC(type=_RPC.CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT)
        return csi.GroupControllerGetCapabilitiesResponse(capabilities=[csi.GroupControllerServiceCapability(rpc=rpc)])

    def CreateVolumeGroupSnapshot(
        self, request: csi.CreateVolumeGroupSnapshotRequest, context: _Context
    ) -> csi.CreateVolumeGroupSnapshotResponse:
        group = self._groups.create(*requests.parse_create_group(request), calls.deadline())
        return csi.CreateVolumeGroupSnapshotResponse(group_snapshot=replies.show_group(group))

    def GetVolumeGroupSnapshot(
        self, request: csi.GetVolumeGroupSnapshotRequest, context: _Context
    ) -> csi.GetVolumeGroupSnapshotResponse:
        group = self._groups.get(*requests.parse_group(request))
        return csi.GetVolumeGroupSnapshotResponse(group_snapshot=replies.show_group(group))

    def DeleteVolumeGroupSnapshot(
        self, request: csi.DeleteVolumeGroupSnapshotRequest, context: _Context
    ) -> csi.DeleteVolumeGroupSnapshotResponse:
        self._groups.delete(*requests.parse_group(request))
        return csi.DeleteVolumeGroupSnapshotResponse()
