"""The Controller service of a process that serves expansions of node-local pools, and nothing else.

external-resizer knows no mode in which each node has its own, so one serves all nodes; the driver beside it says that there is
something to do on the node, and the kubelet there calls NodeExpandVolume, which knows the volume.
"""

# The names and arguments are those of the generated servicers.
# ruff: noqa: N802, ARG002

import grpc

from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import requests
from csi_driver.rpc.csi_pb2_grpc import ControllerServicer
from csi_driver.volumes.services import ExpansionService

_RPC = csi.ControllerServiceCapability.RPC


class ExpansionController(ControllerServicer):
    """Expansions, left to the node. Every other call is UNIMPLEMENTED."""

    def __init__(self, expansion: ExpansionService) -> None:
        self._expansion = expansion

    def ControllerGetCapabilities(
        self, request: csi.ControllerGetCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.ControllerGetCapabilitiesResponse:
        kinds = (_RPC.EXPAND_VOLUME, _RPC.SINGLE_NODE_MULTI_WRITER)
        return csi.ControllerGetCapabilitiesResponse(
            capabilities=[csi.ControllerServiceCapability(rpc=_RPC(type=kind)) for kind in kinds]
        )

    def ControllerExpandVolume(
        self, request: csi.ControllerExpandVolumeRequest, context: grpc.ServicerContext
    ) -> csi.ControllerExpandVolumeResponse:
        handle, capacity, _ = requests.parse_expand(request)
        size = self._expansion.expand(handle, capacity)
        return csi.ControllerExpandVolumeResponse(capacity_bytes=size, node_expansion_required=True)
