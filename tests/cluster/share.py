"""The NFS server of the cluster: the kernel's, on one of the guests, with an XFS on a disk of its own, version 4.2.

Its clients are the kernels of both guests. Snapshots and clones are the server's own work there: the file system has reflinks.
"""

from cluster.guests import GuestNode, nfs_nodes

EXPORTED = "/srv/share"


class Share:
    """The exported directory, on the node that serves it: `sh` sees it as the server does, beside NFS."""

    def __init__(self, node: GuestNode) -> None:
        self.node = node
        self.nodes = nfs_nodes()
        self.address = node.spec.address

    def start(self) -> None:
        """Make the file system, the first time, and serve it."""
        self.node.sh(SERVE, EXPORTED)

    def sh(self, script: str, *arguments: str) -> str:
        """Run a shell script in the exported directory and return what it printed."""
        return self.node.sh(f'cd "$1"; shift; {script}', EXPORTED, *arguments)

    def exists(self, path: str) -> bool:
        """Say whether the server has a path, relative to the exported directory."""
        return self.sh('[ -e "$1" ] && echo there || echo gone', path) == "there\n"


def share() -> Share:
    """Return the cluster's share, whether it is served or not."""
    return Share(nfs_nodes()[0])


# No grace period at the first start: nfsdcld remembers that there was no client. manage-gids: else a pod's fsGroup would mean nothing
# for users that the server does not know, and it knows none.
SERVE = """
share=$1
mkdir -p "$share" /var/lib/nfs/nfsdcld /run/rpc_pipefs
mount -t xfs -o prjquota,noatime /dev/ubdb "$share" 2>/dev/null || {
  mkfs.xfs -q -K -m reflink=1 /dev/ubdb
  mount -t xfs -o prjquota,noatime /dev/ubdb "$share"
}
printf '[mountd]\\nmanage-gids=n\\n' >/etc/nfs.conf
rm -rf /etc/nfs.conf.d
mount -t rpc_pipefs rpc_pipefs /run/rpc_pipefs
mount -t nfsd nfsd /proc/fs/nfsd
setsid nfsdcld --foreground --pipefsdir=/run/rpc_pipefs </dev/null >>/out/logs/nfsdcld.log 2>&1 &
touch /var/lib/nfs/etab /var/lib/nfs/rmtab
exportfs -o rw,sync,no_subtree_check,no_root_squash,fsid=1 "*:$share"
rpc.mountd -N 3
rpc.nfsd -N 3 -V 4.1 -V 4.2 -G 10 -L 10 4
"""
