"""Nodes on this host: a machine each, on the bridge, with containerd, kubelet and kube-proxy.

A node has a /var and a /run of its own and otherwise sees this host's root, so its containerd, runc and CNI plugins are the host's.
Its pool lies on a disk of its own, an XFS in a file, so that free space differs from node to node as it does in life.
"""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cluster import certificates, control_plane
from cluster.kubectl import Kubectl, ready
from cluster.layout import BINARIES, BRIDGE, GATEWAY, NETWORK_BITS, NFS_NODES, NODES, NodeSpec
from cluster.machines import Machine, destroy_all
from cluster.progress import wait_until

POOL = Path("/var/lib/tatami")
SOCKET = "/run/containerd/containerd.sock"
PROGRAMS = "/var/lib/cluster-programs"
PAUSE = "localhost/tatami/pause:1"
CGROUPS = Path("/sys/fs/cgroup")


class Node:
    """A node as the tests see it: its services can be stopped and started, its directories looked into."""

    kubelet_arguments: Sequence[str] = ()
    proxy_mode = "nftables"

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.machine = Machine(spec.name, environment={"PATH": f"{PROGRAMS}:/usr/sbin:/usr/bin:/sbin:/bin"})

    @property
    def name(self) -> str:
        """What Kubernetes calls it."""
        return self.spec.name

    def boot(self) -> None:
        """Make the machine with its network and, the first time, its disk and its files. Nothing runs in it yet."""
        self.machine.boot()
        _make_cgroup(self.spec.cgroup)
        if not (self.spec.directory / "disk").exists():
            self._make_disk()
            self.write_files(self.spec.var / "lib" / "cluster", kubelet_configuration(self.spec.cgroup))
        self.machine.run("sh", "-ec", MOUNTS, "sh", str(BINARIES), str(self.spec.var), str(self.spec.directory / "disk"))
        link = self.spec.link
        host = [
            ["ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(self.machine.pid)],
            ["ip", "link", "set", link, "master", BRIDGE, "up"],
            ["ip", "route", "replace", self.spec.pods, "via", self.spec.address],
        ]
        for command in host:
            subprocess.run(command, check=True, capture_output=True)
        routes = self.routes()
        self.machine.run("sh", "-ec", NETWORK, "sh", f"{self.spec.address}/{NETWORK_BITS}", GATEWAY, *routes)

    def routes(self) -> list[str]:
        """Return the way to the pods of the other nodes, those included that may come later."""
        return [f"{other.pods} via {other.address}" for other in (*NODES, *NFS_NODES) if other != self.spec]

    def power_off(self) -> None:
        """End all that runs on it at once, as a power cut does; its disk and what it has in /var stay."""
        destroy_all(self.name)
        # The network namespace takes it along, perhaps only now.
        subprocess.run(["ip", "link", "delete", self.spec.link], capture_output=True, check=False)
        release(self.spec.directory)
        wait_until(f"the end of {self.name}'s disk", lambda: not loop_devices(self.spec.directory), 20)

    def start(self) -> None:
        """Start its services, as at boot."""
        self.start_runtime()
        self.start_kubelet()
        self.start_proxy()

    def start_runtime(self) -> None:
        """Start containerd and wait until it answers."""
        self.machine.start("containerd", "containerd", "--config=/var/lib/cluster/containerd.toml")
        wait_until(f"containerd on {self.name}", lambda: self._ctr("version"), 30)

    def start_kubelet(self) -> None:
        """Start the kubelet."""
        self.machine.start(
            "kubelet",
            "kubelet",
            "--config=/var/lib/cluster/kubelet.json",
            "--kubeconfig=/var/lib/cluster/kubelet.kubeconfig",
            f"--hostname-override={self.name}",
            f"--node-ip={self.spec.address}",
            "--cert-dir=/var/lib/kubelet/pki",
            "--v=2",
            *self.kubelet_arguments,
        )

    def start_proxy(self) -> None:
        """Start kube-proxy, without which service addresses lead nowhere."""
        self.machine.start(
            "kube-proxy",
            "kube-proxy",
            "--kubeconfig=/var/lib/cluster/proxy.kubeconfig",
            f"--hostname-override={self.name}",
            f"--proxy-mode={self.proxy_mode}",
            "--conntrack-max-per-core=0",  # the limit is the host's, and not ours to set
            "--healthz-bind-address=127.0.0.1:10256",
        )

    def restart_kubelet(self) -> None:
        """Kill the kubelet, as a crash does, and start it again."""
        self.machine.stop("kubelet", number=9)
        self.start_kubelet()

    def ready(self, client: Kubectl) -> bool:
        """Say whether Kubernetes can use it."""
        return client.exists("node", self.name) and ready(client.get("node", self.name))

    def import_image(self, archive: Path) -> None:
        """Give containerd an image."""
        with archive.open("rb") as stream:
            done = subprocess.run(
                self.machine.inside("ctr", "--address", SOCKET, "--namespace", "k8s.io", "images", "import", "-"),
                stdin=stream,
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
        if done.returncode != 0:
            raise RuntimeError(f"{self.name}: import of {archive.name}: {done.stderr}")

    def tag_image(self, image: str, name: str) -> None:
        """Give an image of the node one more name."""
        self._ctr("--namespace", "k8s.io", "images", "tag", "--force", image, name)

    def _ctr(self, *arguments: str) -> str:
        return self.machine.run("ctr", "--address", SOCKET, *arguments).stdout

    def see(self, inside: str | Path) -> Path:
        """Return a path of the node as this host's tests can open it."""
        return self.machine.path(inside)

    def mounts(self) -> list[str]:
        """List the mount points of the node."""
        lines = Path(f"/proc/{self.machine.pid}/mountinfo").read_text().splitlines()
        return [line.split()[4] for line in lines]

    def _make_disk(self) -> None:
        disk = self.spec.directory / "disk"
        with disk.open("wb") as stream:
            stream.truncate(self.spec.disk << 30)
        subprocess.run(["mkfs.xfs", "-q", str(disk)], check=True, capture_output=True)

    def write_files(self, files: Path, kubelet: Mapping[str, object]) -> None:
        """Write what its services read, which they find in /var/lib/cluster."""
        network = files / "cni"
        network.mkdir(parents=True)
        (network / "10-pods.conflist").write_text(json.dumps(_pod_network(self.spec)))
        (files / "containerd.toml").write_text(CONTAINERD)
        (files / "kubelet.json").write_text(json.dumps(kubelet))
        ca = files / "ca.crt"
        ca.write_bytes((certificates.DIRECTORY / "ca.crt").read_bytes())
        certificates.kubeconfig(f"system:node:{self.name}", files / "kubelet.kubeconfig")
        certificates.kubeconfig(control_plane.PROXY, files / "proxy.kubeconfig")


def all_nodes() -> list[Node]:
    """Return the nodes, whether they run or not."""
    return [Node(spec) for spec in NODES]


def cgroup_directories(prefix: str) -> Iterator[Path]:
    """Find the cgroups of nodes in every hierarchy of this host."""
    if (CGROUPS / "cgroup.controllers").exists():
        yield from CGROUPS.glob(f"{prefix}*")
    else:
        yield from CGROUPS.glob(f"*/{prefix}*")


def loop_devices(directory: Path) -> list[str]:
    """Find the loop devices of this host whose files are in a directory, or were."""
    found = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = file.read_text().strip()
        except OSError:
            continue  # it was let go meanwhile
        if Path(backing.removesuffix(" (deleted)")).is_relative_to(directory):
            found.append(file.parts[3])
    return found


def release(directory: Path) -> None:
    """Detach what machines that are gone attached from their disks in `directory`: a loop device outlives whoever attached it."""
    for disk in loop_devices(directory):
        for device in _stacked_on(disk):
            subprocess.run(["losetup", "--detach", f"/dev/{device}"], check=False, capture_output=True)


def _stacked_on(device: str) -> Iterator[str]:
    """Find the loop devices of files on a device, and those of the device itself (the kubelet's, for raw block); the topmost first."""
    node = Path(f"/dev/{device}").stat()
    number, itself = _number(node.st_rdev), (_number(node.st_dev), node.st_ino)
    asked = ["losetup", "--list", "--json", "--output", "NAME,BACK-MAJ:MIN,BACK-INO"]
    shown = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    for one in json.loads(shown or "{}").get("loopdevices", []):
        below = (str(one["back-maj:min"]).strip(), int(one["back-ino"]))
        if below == itself or below[0] == number:
            name = Path(one["name"]).name
            yield from _stacked_on(name)
            yield name


def _number(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def kubelet_configuration(cgroup: str) -> dict[str, object]:
    """Return the kubelet's configuration for a node whose pods live below `cgroup`."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": "/var/lib/cluster/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroup}",
        "failCgroupV1": False,
        "enforceNodeAllocatable": [],
        "failSwapOn": False,
        "resolvConf": "",
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",
        # The disk is this host's: how full it is says nothing about the cluster.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "50Mi"},
        "volumeStatsAggPeriod": "5s",
        "nodeStatusUpdateFrequency": "5s",
        "syncFrequency": "10s",
        "serializeImagePulls": False,
    }


def _pod_network(spec: NodeSpec) -> dict[str, object]:
    addresses = {
        "type": "host-local",
        "dataDir": "/var/lib/cni",
        "ranges": [[{"subnet": spec.pods}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "ipMasq": False, "hairpinMode": True, "ipam": addresses}
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge]}


def _make_cgroup(name: str) -> None:
    """Make the cgroup below which the kubelet puts its pods: version 2, or every controller's of version 1."""
    if (CGROUPS / "cgroup.controllers").exists():
        (CGROUPS / name).mkdir(exist_ok=True)
        return
    for controller in CGROUPS.iterdir():
        if not controller.is_dir() or not (controller / "cgroup.procs").exists():
            continue
        made = controller / name
        made.mkdir(exist_ok=True)
        for value in ("cpuset.cpus", "cpuset.mems"):
            if (made / value).exists():
                # A new cpuset is empty, and nothing can run in it.
                (made / value).write_text((controller / value).read_text())


MOUNTS = f"""
programs=$1 var=$2 disk=$3
mkdir -p $var/lib/kubelet $var/lib/tatami $var/lib/cni $var/log/pods $var/log/containers $var/tmp $var{PROGRAMS.removeprefix("/var")}
ln -sfn /run $var/run
mount --bind "$programs" $var{PROGRAMS.removeprefix("/var")}
mount -o loop "$disk" $var/lib/tatami
mount --rbind $var /var
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/lock /run/netns
mount --make-rshared /
"""

NETWORK = """
address=$1 gateway=$2
shift 2
ip link set lo up
ip address add $address dev eth0
ip link set eth0 up
ip route add default via $gateway
for route; do ip route add $route; done
echo 1 >/proc/sys/net/ipv4/ip_forward
"""

# restrict_oom_score_adj: where root may not lower oom_score_adj, every sandbox would die of EOF.
CONTAINERD = f"""
version = 2
root = "/var/lib/containerd"
state = "/run/containerd/state"
disabled_plugins = [
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt",
]
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "{PAUSE}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/var/lib/cluster/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = false
"""
