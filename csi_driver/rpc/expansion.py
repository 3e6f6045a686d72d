"""What external-resizer asks of a process that stands beside it for pools of nodes: who expands their volumes.

external-resizer knows no mode in which each node has its own, so one serves all nodes. It asks for the driver's capabilities: where
the nodes can expand volumes and no controller does, it writes down the size that is wanted and leaves the work to the kubelet,
which calls NodeExpandVolume. A size that the node refuses can then be taken back: external-resizer 2.3 goes on with a claim's lower
request only where no controller has expanded the volume (expand_and_recover.go, NodeResizeInfeasible).
"""

# The names and arguments are those of the generated servicers.
# ruff: noqa: N802, ARG002

import grpc

from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc.csi_pb2_grpc import ControllerServicer, NodeServicer

_Context = grpc.ServicerContext
_EXPANDS = csi.NodeServiceCapability.RPC.EXPAND_VOLUME


class ExpansionController(ControllerServicer):
    """A controller that can do nothing. Every other call is UNIMPLEMENTED."""

    def ControllerGetCapabilities(
        self, request: csi.ControllerGetCapabilitiesRequest, context: _Context
    ) -> csi.ControllerGetCapabilitiesResponse:
        return csi.ControllerGetCapabilitiesResponse()


class ExpansionNode(NodeServicer):
    """What the nodes can do, said in their place. Every other call is UNIMPLEMENTED."""

    def NodeGetCapabilities(
        self, request: csi.NodeGetCapabilitiesRequest, context: _Context
    ) -> csi.NodeGetCapabilitiesResponse:
        expands = csi.NodeServiceCapability(rpc=csi.NodeServiceCapability.RPC(type=_EXPANDS))
        return csi.NodeGetCapabilitiesResponse(capabilities=[expands])
