"""Where the cluster lies and what its machines are called: names, addresses and paths, in one place.

All that a cluster makes outside of its own processes has one of these names, so that `teardown` finds it without a list that a kill
could have cut short. `TATAMI_CLUSTER_NUMBER` (0 to 9) gives all of them another number: clusters side by side on one machine.
"""

import os
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent.parent
CACHE = CHECKOUT / ".cache" / "cluster"
BINARIES = CACHE / "bin"
NUMBER = int(os.environ.get("TATAMI_CLUSTER_NUMBER", "0"))
if not 0 <= NUMBER <= 9:
    raise ValueError(f"TATAMI_CLUSTER_NUMBER: {NUMBER} is not from 0 to 9")
STATE = Path(os.environ.get("TATAMI_CLUSTER_DIRECTORY", f"/var/lib/tatami-cluster{NUMBER or ''}"))
LOGS = STATE / "logs"
KUBECONFIG = STATE / "kubeconfig"

PREFIX = f"tatami{NUMBER or ''}-"  # of network devices (15 bytes at most) and cgroups
BRIDGE = f"{PREFIX}bridge"
NETWORK = f"10.77.{NUMBER}"
GATEWAY = f"{NETWORK}.1"  # of the bridge; the API server listens there
NETWORK_BITS = 24
SERVICES = "10.96.0.0/24"
API_SERVICE = "10.96.0.1"
API_PORT = 6443
ETCD_PORT = 23790 + NUMBER
ETCD_PEER_PORT = 23800 + NUMBER


@dataclass(frozen=True)
class NodeSpec:
    """One node: what Kubernetes calls it, where it is, and how large the disk is that holds its pool (GiB, sparse)."""

    name: str
    number: int
    disk: int

    @property
    def address(self) -> str:
        return f"{NETWORK}.{10 + self.number}"

    @property
    def pods(self) -> str:
        return f"10.88.{10 * NUMBER + self.number}.0/24"

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
# Nodes whose kernel has NFS. They come up when somebody asks for them; their names and addresses are the cluster's from the start.
NFS_NODES = (NodeSpec("nfs1", 3, 20), NodeSpec("nfs2", 4, 20))
AGENT_PORT = 10240
CONTROL_PLANE = "control-plane"
