"""A real kernel NFS server in a node of its own, on real filesystems with project quotas.

Several can run at once, each with its own exports, threads and client records: nfsd belongs to its network namespace.
Grace and lease are 10 s, the least that the kernel accepts; the first start has no grace period, because nfsdcld remembers that
there was no client.
"""

import contextlib
import os
import pathlib
import time

from nodes import Network, run

IMAGES = pathlib.Path("/scratch/images")
EXPORT_OPTIONS = "rw,sync,no_subtree_check,no_root_squash"
MKFS = {
    "xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"],
    "ext4": ["mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota,lazy_itable_init=1,nodiscard"],
    "btrfs": ["mkfs.btrfs", "-q", "-K"],
}
MOUNT_OPTIONS = {"xfs": "prjquota,noatime", "ext4": "prjquota,noatime", "btrfs": "noatime"}


class KernelNfsServer:
    """nfsd, rpc.mountd and nfsdcld in a node; with `v3` also rpcbind and rpc.statd."""

    def __init__(self, network: Network, name: str = "server", *, v3: bool = False, threads: int = 4) -> None:
        self.node = network.node(name)
        self.name = self.node.name
        self.address = self.node.address
        self._v3 = v3
        self._threads = threads
        self._loops: list[tuple[str, str, pathlib.Path]] = []
        self._exports: dict[tuple[str, str], str] = {}
        self._numbers: dict[str, int] = {}
        self.node.run(["/bin/mkdir", "-p", "/srv", "/var/lib/nfs/nfsdcld", "/run/rpc_pipefs"])
        # exportfs wants them, and rpc.mountd makes them only some time after its start.
        self.node.run(["/usr/bin/touch", "/var/lib/nfs/etab", "/var/lib/nfs/rmtab"])
        # Not only for looks: a tmpfs of this server's own, because every server's pseudo-root leads through /srv.
        self.node.run(["/bin/mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/srv"])
        self.node.run(["/bin/mount", "-t", "rpc_pipefs", "rpc_pipefs", "/run/rpc_pipefs"])
        self.node.run(["/bin/mount", "-t", "nfsd", "nfsd", "/proc/fs/nfsd"])
        # Kept by a daemon: the kernel's own way to remember clients works in the first network namespace only.
        self.node.popen(["/usr/sbin/nfsdcld", "--foreground", "--pipefsdir=/run/rpc_pipefs"])
        if v3:
            self.node.start_statd()
        self.node.run(["/usr/sbin/rpc.mountd", *([] if v3 else ["-N", "3"])])
        self.start()

    def filesystem(self, kind: str, *, size: int = 2 << 30, name: str = "") -> pathlib.Path:
        """Make a filesystem (xfs, ext4: with project quota; btrfs) of `size` bytes, sparse, and return where the server has it."""
        target = f"/srv/{name or kind}"
        IMAGES.mkdir(parents=True, exist_ok=True)
        image = IMAGES / f"{self.name}-{name or kind}"
        with image.open("xb") as file:
            file.truncate(size)
        run([*MKFS[kind], image])
        loop = run(["losetup", "--find", "--show", "--direct-io=on", image]).stdout.strip()
        self.node.run(["/bin/mkdir", "-p", target])
        self.node.run(["/bin/mount", "-t", kind, "-o", MOUNT_OPTIONS[kind], loop, target])
        self._loops.append((target, loop, image))
        return pathlib.Path(target)

    def tree(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Return the path by which a test reaches the server's own `path`, beside NFS."""
        return self.node.path(path)

    def export(self, path: str | os.PathLike[str], options: str = EXPORT_OPTIONS, *, client: str = "*") -> None:
        """Export `path`; again with other options: changes them. The fsid stays a path's own, so that handles survive."""
        place = os.fspath(path)
        number = self._numbers.setdefault(place, len(self._numbers) + 1)
        self._exports[place, client] = f"{options},fsid={number}"
        self._exportfs(place, client)

    def _exportfs(self, place: str, client: str) -> None:
        self.node.run(["/usr/sbin/exportfs", "-o", self._exports[place, client], f"{client}:{place}"])

    def unexport(self, path: str | os.PathLike[str], *, client: str = "*") -> None:
        """Take an export back: ESTALE on everything that a client still has of it."""
        self.node.run(["/usr/sbin/exportfs", "-u", f"{client}:{os.fspath(path)}"])
        del self._exports[os.fspath(path), client]

    def set_quota(self, directory: str | os.PathLike[str], project: int, *, limit: int, inodes: int = 0) -> None:
        """Hold `directory` (on XFS or ext4) to `limit` bytes and `inodes` files (0: any) by project quota; works again to change it."""
        place = os.fspath(directory)
        mount = max((target for target, _, _ in self._loops if place.startswith(target)), key=len)
        self.node.run(["/usr/bin/chattr", "-p", str(project), "+P", place])
        self.node.run(["/usr/sbin/setquota", "-P", str(project), "0", str(limit >> 10), "0", str(inodes), mount])

    def start(self) -> None:
        """Start the server; after `stop`, the clients have 10 s to reclaim what they held."""
        versions = ["-V", "3"] if self._v3 else ["-N", "3"]
        self.node.run(["/usr/sbin/rpc.nfsd", *versions, "-V", "4.1", "-V", "4.2", "-G", "10", "-L", "10", str(self._threads)])

    def stop(self) -> None:
        """Stop the server in an orderly way: its machine is there and refuses connections."""
        self.node.run(["/usr/sbin/rpc.nfsd", "0"])

    def freeze(self) -> None:
        """Let the server vanish from the network, as when its switch dies; `thaw` brings it back with all its state."""
        self.node.freeze()

    def thaw(self) -> None:
        """End a `freeze`."""
        self.node.thaw()

    def delay(self, milliseconds: float) -> None:
        """Add this much to every round trip with this server; 0 takes it away."""
        self.node.delay(milliseconds)

    def kill(self) -> None:
        """Let the server die for good and in silence: nothing answers, nothing is refused."""
        self.freeze()
        self.stop()

    def forget_clients(self) -> None:
        """Drop all NFSv4 state, so that an unexported filesystem can be unmounted although clients had files open."""
        for control in self.tree("/proc/fs/nfsd/clients").glob("*/ctl"):
            with contextlib.suppress(OSError):
                control.write_text("expire\n")

    def close(self) -> None:
        """Stop the server, unmount and remove its filesystems, close its node."""
        self.node.run(["/usr/sbin/exportfs", "-ua"], check=False)
        self.node.run(["/usr/sbin/rpc.nfsd", "0"], check=False)
        for target, loop, image in reversed(self._loops):
            self._unmount(target)
            run(["losetup", "--detach", loop], check=False)
            image.unlink()
        self._loops.clear()
        self.node.close()

    def _unmount(self, target: str) -> None:
        """Unmount, giving the kernel's last references (export cache, lock manager) a moment to go."""
        deadline = time.monotonic() + 10
        while self.node.run(["/bin/umount", target], check=False).returncode and time.monotonic() < deadline:
            time.sleep(0.2)
        self.node.run(["/bin/umount", "--lazy", target], check=False)
