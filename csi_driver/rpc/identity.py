"""The Identity service: what this driver is, and whether it can serve."""

# The names and arguments are those of the generated servicers.
# ruff: noqa: N802, ARG002

import logging

import grpc
from google.protobuf.wrappers_pb2 import BoolValue

from csi_driver import __version__
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc.csi_pb2_grpc import IdentityServicer
from csi_driver.telemetry.bounded import BoundedRead
from csi_driver.volumes.services import HealthService

READY_SECONDS = 0.8
"""How long Probe waits for the pools: livenessprobe and the kubelet give up after one second by default."""

_log = logging.getLogger(__name__)


class Identity(IdentityServicer):
    """Capabilities describe the installation and are the same from each of its instances; `topology`: volumes live on one node."""

    def __init__(self, driver_name: str, health: HealthService, *, topology: bool) -> None:
        self._driver_name = driver_name
        self._topology = topology
        self._ready = BoundedRead("probe", health.ready, READY_SECONDS)

    def GetPluginInfo(self, request: csi.GetPluginInfoRequest, context: grpc.ServicerContext) -> csi.GetPluginInfoResponse:
        return csi.GetPluginInfoResponse(name=self._driver_name, vendor_version=__version__)

    def GetPluginCapabilities(
        self, request: csi.GetPluginCapabilitiesRequest, context: grpc.ServicerContext
    ) -> csi.GetPluginCapabilitiesResponse:
        service = csi.PluginCapability.Service
        types = [service.CONTROLLER_SERVICE, service.GROUP_CONTROLLER_SERVICE]
        if self._topology:
            types += [service.VOLUME_ACCESSIBILITY_CONSTRAINTS, service.SNAPSHOT_ACCESSIBILITY_CONSTRAINTS]
        online = csi.PluginCapability.VolumeExpansion(type=csi.PluginCapability.VolumeExpansion.ONLINE)
        return csi.GetPluginCapabilitiesResponse(
            capabilities=[
                *(csi.PluginCapability(service=service(type=kind)) for kind in types),
                csi.PluginCapability(volume_expansion=online),
            ]
        )

    def Probe(self, request: csi.ProbeRequest, context: grpc.ServicerContext) -> csi.ProbeResponse:
        try:
            problem = self._ready.begin().result()
        except TimeoutError:
            problem = f"the pools have not answered within {READY_SECONDS} seconds"
        if problem is not None:
            _log.warning("not ready", extra={"reason": problem})
        return csi.ProbeResponse(ready=BoolValue(value=problem is None))
