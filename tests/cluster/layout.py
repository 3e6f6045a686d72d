"""Where the cluster lies and what its machines are called: names, addresses and paths, in one place.

One cluster per machine. All that it makes outside of its own processes has one of these names, so that `teardown` finds it
without a list that a kill could have cut short.
"""

import os
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
CACHE = CHECKOUT / ".cache" / "cluster"
BINARIES = CACHE / "bin"
STATE = Path(os.environ.get("TATAMI_CLUSTER_DIRECTORY", "/var/lib/tatami-cluster"))
LOGS = STATE / "logs"
KUBECONFIG = STATE / "kubeconfig"

PREFIX = "tatami-"  # of network devices (15 bytes at most) and cgroups
BRIDGE = f"{PREFIX}bridge"
GATEWAY = "10.77.0.1"  # of the bridge; the API server listens there
NETWORK_BITS = 24
SERVICES = "10.96.0.0/24"
API_SERVICE = "10.96.0.1"
PODS = "10.88.0.0/16"
API_PORT = 6443
ETCD_PORT = 23790
ETCD_PEER_PORT = 23800


@dataclass(frozen=True)
class NodeSpec:
    """One node: what Kubernetes calls it, where it is, and how large the disk is that holds its pool (GiB, sparse)."""

    name: str
    number: int
    disk: int

    @property
    def address(self) -> str:
        return f"10.77.0.{10 + self.number}"

    @property
    def pods(self) -> str:
        return f"10.88.{self.number}.0/24"

    @property
    def link(self) -> str:
        return f"{PREFIX}{self.name}"

    @property
    def cgroup(self) -> str:
        return f"{PREFIX}{self.name}"

    @property
    def directory(self) -> Path:
        """What belongs to it on this machine."""
        return STATE / self.name

    @property
    def var(self) -> Path:
        """Its /var, seen from this machine (without what is mounted in it)."""
        return self.directory / "var"


# Not the same size: a pod that is too large for one node has to land on the other.
NODES = (NodeSpec("node1", 1, 10), NodeSpec("node2", 2, 20))
CONTROL_PLANE = "control-plane"
