"""The control plane: etcd, API server, controller-manager, scheduler and snapshot-controller, in a machine on the bridge."""

import json
import socket
import ssl
import urllib.request
from collections.abc import Sequence

from cluster import binaries, certificates
from cluster.kubectl import Kubectl, Object
from cluster.layout import (
    API_PORT,
    BRIDGE,
    CONTROL_PLANE,
    ETCD_PEER_PORT,
    ETCD_PORT,
    GATEWAY,
    KUBECONFIG,
    NETWORK_BITS,
    SERVICES,
    NodeSpec,
)  # fmt: skip
from cluster.machines import Machine
from cluster.progress import step, wait_until

ADMIN = "admin"
MANAGER, SCHEDULER, PROXY = "system:kube-controller-manager", "system:kube-scheduler", "system:kube-proxy"
SNAPSHOTS = "system:serviceaccount:kube-system:snapshot-controller"


def machine() -> Machine:
    """Return the control plane's machine: processes and mounts of its own, this host's network."""
    return Machine(CONTROL_PLANE, network=False)


def start(nodes: Sequence[NodeSpec]) -> Kubectl:
    """Start it all for nodes of these names, and return a client for it."""
    users = {ADMIN: "system:masters", MANAGER: "", SCHEDULER: "", PROXY: "", SNAPSHOTS: ""}
    certificates.make(users | {f"system:node:{node.name}": "system:nodes" for node in nodes})
    certificates.kubeconfig(ADMIN, KUBECONFIG)
    host = machine()
    host.boot()
    with step("etcd and the API server"):
        _start_etcd(host)
        _start_api_server(host)
        wait_until("the API server", _healthy, 60)
    _start_controllers(host)
    client = Kubectl()
    wait_until("the default namespace", lambda: client.exists("serviceaccount", "default"), 30)
    with step("snapshots"):
        _start_snapshots(host, client)
    return client


def _start_etcd(host: Machine) -> None:
    client, peer = f"http://127.0.0.1:{ETCD_PORT}", f"http://127.0.0.1:{ETCD_PEER_PORT}"
    if _listens("127.0.0.1", ETCD_PORT):
        raise RuntimeError(f"something on this machine listens on port {ETCD_PORT} already")
    host.start(
        "etcd",
        "etcd",
        "--name=tatami",
        f"--data-dir={host.directory}/etcd",
        "--unsafe-no-fsync",  # the cluster does not outlive this machine, and etcd's fsyncs would hold up everybody else's
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=tatami={peer}",
    )
    wait_until("etcd", lambda: _listens("127.0.0.1", ETCD_PORT), 30)


def _start_api_server(host: Machine) -> None:
    keys = certificates.DIRECTORY
    host.start(
        "kube-apiserver",
        "kube-apiserver",
        f"--etcd-servers=http://127.0.0.1:{ETCD_PORT}",
        f"--bind-address={GATEWAY}",
        f"--advertise-address={GATEWAY}",
        f"--secure-port={API_PORT}",
        f"--service-cluster-ip-range={SERVICES}",
        f"--tls-cert-file={keys}/apiserver.crt",
        f"--tls-private-key-file={keys}/apiserver.key",
        f"--client-ca-file={keys}/ca.crt",
        f"--kubelet-client-certificate={keys}/kubelet-client.crt",
        f"--kubelet-client-key={keys}/kubelet-client.key",
        "--kubelet-preferred-address-types=InternalIP",
        f"--token-auth-file={certificates.TOKENS}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={keys}/service-accounts.pub",
        f"--service-account-signing-key-file={keys}/service-accounts.key",
    )


def _start_controllers(host: Machine) -> None:
    keys = certificates.DIRECTORY
    # Ports of 0: nobody asks these two for anything, and this host may have others on the usual ones.
    host.start(
        "kube-controller-manager",
        "kube-controller-manager",
        f"--kubeconfig={certificates.kubeconfig(MANAGER, keys / 'controller-manager.kubeconfig')}",
        f"--service-account-private-key-file={keys}/service-accounts.key",
        f"--root-ca-file={keys}/ca.crt",
        "--use-service-account-credentials=true",
        "--leader-elect=false",
        "--secure-port=0",
    )
    host.start(
        "kube-scheduler",
        "kube-scheduler",
        f"--kubeconfig={certificates.kubeconfig(SCHEDULER, keys / 'scheduler.kubeconfig')}",
        "--leader-elect=false",
        "--secure-port=0",
    )


def _start_snapshots(host: Machine, client: Kubectl) -> None:
    """Install the snapshots' kinds and start their controller, as a cluster's distribution does; a driver brings neither."""
    kinds = sorted(str(path) for path in binaries.snapshot_crds().glob("*.storage.k8s.io_*.yaml"))
    client.run("apply", "--server-side", *(word for kind in kinds for word in ("-f", kind)))
    Kubectl("kube-system").run("apply", "-f", str(binaries.snapshot_controller_rbac()))
    client.apply(*_reads_nodes())
    client.run("wait", "--for=condition=Established", "--timeout=30s", *(word for kind in kinds for word in ("-f", kind)))
    host.start(
        "snapshot-controller",
        "snapshot-controller",
        f"--kubeconfig={certificates.kubeconfig(SNAPSHOTS, certificates.DIRECTORY / 'snapshots.kubeconfig')}",
        # Snapshots of node-local volumes are cut by the snapshotter on their node.
        "--enable-distributed-snapshotting=true",
        "--feature-gates=CSIVolumeGroupSnapshot=true",
    )


def _reads_nodes() -> list[Object]:
    """Let the snapshot-controller read nodes: distributed snapshotting needs it, and its own manifest has that rule commented out."""
    role = {"kind": "ClusterRole", "name": "snapshot-controller-nodes", "apiGroup": "rbac.authorization.k8s.io"}
    rule = {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]}
    subject = {"kind": "ServiceAccount", "name": "snapshot-controller", "namespace": "kube-system"}
    version, name = "rbac.authorization.k8s.io/v1", {"name": role["name"]}
    return [
        {"apiVersion": version, "kind": "ClusterRole", "metadata": name, "rules": [rule]},
        {"apiVersion": version, "kind": "ClusterRoleBinding", "metadata": name, "roleRef": role, "subjects": [subject]},
    ]


def bridge_commands() -> list[list[str]]:
    """Return the commands that make the bridge of this host."""
    return [
        ["ip", "link", "add", BRIDGE, "type", "bridge"],
        ["ip", "address", "add", f"{GATEWAY}/{NETWORK_BITS}", "dev", BRIDGE],
        ["ip", "link", "set", BRIDGE, "up"],
    ]


def _healthy() -> bool:
    context = ssl.create_default_context(cafile=str(certificates.DIRECTORY / "ca.crt"))
    token = json.loads(KUBECONFIG.read_text())["users"][0]["user"]["token"]
    request = urllib.request.Request(f"https://{GATEWAY}:{API_PORT}/readyz", headers={"Authorization": f"Bearer {token}"})
    # No proxy of the environment: the address is this host's.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with opener.open(request, timeout=5) as answer:
        return answer.status == 200


def _listens(address: str, port: int) -> bool:
    with socket.socket() as attempt:
        attempt.settimeout(1)
        return attempt.connect_ex((address, port)) == 0
