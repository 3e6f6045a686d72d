"""The Node service: volumes brought to pods on this node."""

# The names and arguments are those of the generated servicers.
# ruff: noqa: N802, ARG002

import grpc

from csi_driver.rpc import calls, replies, requests
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc.csi_pb2_grpc import NodeServicer
from csi_driver.rpc.fields import parse_handle, parse_path
from csi_driver.volumes.services import HealthService, NodeService

_Context = grpc.ServicerContext
_RPC = csi.NodeServiceCapability.RPC
CAPABILITIES = (
    _RPC.STAGE_UNSTAGE_VOLUME,
    _RPC.GET_VOLUME_STATS,
    _RPC.EXPAND_VOLUME,
    _RPC.SINGLE_NODE_MULTI_WRITER,
    _RPC.GET_VOLUME_HEALTH,
    _RPC.GET_STORAGE_HEALTH,
    _RPC.VOLUME_MOUNT_GROUP,
)


class Node(NodeServicer):
    """Staged, published, measured, and taken away again."""

    def __init__(self, node: NodeService, health: HealthService) -> None:
        self._node = node
        self._health = health

    def NodeGetInfo(self, request: csi.NodeGetInfoRequest, context: _Context) -> csi.NodeGetInfoResponse:
        return replies.show_node(self._node.info())

    def NodeGetCapabilities(
        self, request: csi.NodeGetCapabilitiesRequest, context: _Context
    ) -> csi.NodeGetCapabilitiesResponse:
        capabilities = [csi.NodeServiceCapability(rpc=_RPC(type=kind)) for kind in CAPABILITIES]
        return csi.NodeGetCapabilitiesResponse(capabilities=capabilities)

    def NodeStageVolume(self, request: csi.NodeStageVolumeRequest, context: _Context) -> csi.NodeStageVolumeResponse:
        self._node.stage(requests.parse_stage(request))
        return csi.NodeStageVolumeResponse()

    def NodeUnstageVolume(self, request: csi.NodeUnstageVolumeRequest, context: _Context) -> csi.NodeUnstageVolumeResponse:
        handle = parse_handle(request.volume_id, "volume_id")
        self._node.unstage(handle, parse_path(request.staging_target_path, "staging_target_path"))
        return csi.NodeUnstageVolumeResponse()

    def NodePublishVolume(self, request: csi.NodePublishVolumeRequest, context: _Context) -> csi.NodePublishVolumeResponse:
        self._node.publish(requests.parse_publish(request))
        return csi.NodePublishVolumeResponse()

    def NodeUnpublishVolume(
        self, request: csi.NodeUnpublishVolumeRequest, context: _Context
    ) -> csi.NodeUnpublishVolumeResponse:
        handle = parse_handle(request.volume_id, "volume_id")
        self._node.unpublish(handle, parse_path(request.target_path, "target_path"))
        return csi.NodeUnpublishVolumeResponse()

    def NodeExpandVolume(self, request: csi.NodeExpandVolumeRequest, context: _Context) -> csi.NodeExpandVolumeResponse:
        size = self._node.expand(*requests.parse_node_expand(request))
        return csi.NodeExpandVolumeResponse(capacity_bytes=size)

    def NodeGetVolumeStats(self, request: csi.NodeGetVolumeStatsRequest, context: _Context) -> csi.NodeGetVolumeStatsResponse:
        return replies.show_stats(self._node.stats(*requests.parse_stats(request), calls.deadline()))

    def NodeGetVolumeHealth(
        self, request: csi.NodeGetVolumeHealthRequest, context: _Context
    ) -> csi.NodeGetVolumeHealthResponse:
        health = self._node.health(*requests.parse_node_health(request))
        return csi.NodeGetVolumeHealthResponse(volume_health=replies.show_health(health))

    def NodeGetStorageHealth(
        self, request: csi.NodeGetStorageHealthRequest, context: _Context
    ) -> csi.NodeGetStorageHealthResponse:
        return replies.show_storage_health(self._health.storage())
