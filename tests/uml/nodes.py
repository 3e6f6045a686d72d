"""Nodes of a cluster, inside one guest: namespaces for network, mounts and host name, joined by a bridge.

Two nodes share the kernel and the root directory, and nothing that matters to a CSI driver: each has its own mounts, addresses,
/run, /var/lib/kubelet and NFS client (own superblocks, own NFSv4 client id, own lock manager). A server is a node, too.

Every command that runs in a node has a deadline: on NFS, a command may wait for a dead server without end.
"""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

NSENTER = "/usr/bin/nsenter"
BRIDGE = "tatami0"
# /tmp is shared on purpose: what a test writes there, a node reads at the same path.
PRIVATE = ("/run", "/mnt", "/var/lib/nfs", "/var/lib/kubelet", "/var/lib/tatami")
# umount2(path, MNT_DETACH | UMOUNT_NOFOLLOW) for each argument: it never asks the server, and umount(8) may (umount2(2)).
DETACH = """
import ctypes, sys
libc = ctypes.CDLL(None)
for path in sys.argv[1:]:
    libc.umount2(path.encode(), 2 | 8)
"""
NFS_IDENTIFIER = "/sys/fs/nfs/net/nfs_client/identifier"


class CommandFailed(Exception):
    """A command ended with another code than 0. The message holds all that it printed."""

    def __init__(self, argv: Sequence[str], returncode: int, stdout: str, stderr: str) -> None:
        super().__init__(f"{' '.join(argv)} ended with {returncode}\n{stdout}{stderr}")
        self.returncode = returncode
        self.stdout = stdout
        self.stderr = stderr


class CommandHung(Exception):
    """A command did not end by its deadline and was killed; where even that took no effect, it is left behind."""


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    timeout: float = 60.0,
    check: bool = True,
    stdin: str = "",
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a command for at most `timeout` seconds.

    Its output goes through files, not pipes: a daemon that it leaves behind would hold a pipe open, and the reader with it.
    Raises CommandFailed (with check) and CommandHung.
    """
    words = [os.fspath(word) for word in argv]
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        given.write(stdin)
        given.seek(0)
        process = subprocess.Popen(
            words, stdin=given, stdout=out, stderr=err, start_new_session=True, env={**os.environ, **(environment or {})}
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            raise CommandHung(f"{' '.join(words)} did not end within {timeout} s\n{_read(out)}{_read(err)}") from None
        except BaseException:
            # pytest's own timeout, say: the command must not outlive its test.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        stdout, stderr = _read(out), _read(err)
    if check and code != 0:
        raise CommandFailed(words, code, stdout, stderr)
    return subprocess.CompletedProcess(words, code, stdout, stderr)


def _read(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


class Network:
    """A bridge, 10.99.0.0/24, and the nodes on it. One per guest; nothing leads out of it."""

    def __init__(self) -> None:
        run(["ip", "link", "add", BRIDGE, "type", "bridge", "forward_delay", "0"])
        run(["ip", "address", "add", "10.99.0.254/24", "dev", BRIDGE])
        run(["ip", "link", "set", BRIDGE, "up"])
        self._made = 0
        self.nodes: list[Node] = []

    def node(self, name: str) -> "Node":
        """Make a node; its host name is `name` and a number, so that it is no other node's, also none that is gone."""
        self._made += 1
        node = Node(self, f"{name}-{self._made}", self._made)
        self.nodes.append(node)
        return node

    def close(self) -> None:
        """Close all nodes, the newest first, and remove the bridge."""
        for node in reversed(self.nodes[:]):
            node.close()
        run(["ip", "link", "delete", BRIDGE], check=False)


class Node:
    """One node: `run` and `popen` start programs in it, `path` reaches its files from outside."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self._network = network
        self.name = name
        self.address = f"10.99.0.{number}"
        self.link = f"node{number}"  # the bridge's end of its cable
        self._processes: list[subprocess.Popen[Any]] = []
        private = "; ".join(f"mkdir -p {place} && mount -t tmpfs -o mode=755 tmpfs {place}" for place in PRIVATE)
        # Private first: what a node mounts must not appear in the others. Then shared within, as on every node where kubelet runs.
        setup = (
            f"set -e; mount --make-rshared /; mount -t sysfs sysfs /sys; {private}; mkdir -p /run/lock /run/rpcbind /run/dbus; "
            f"hostname {name}; ip link set lo up; echo ready; exec sleep infinity"
        )
        self._holder = subprocess.Popen(
            ["/usr/bin/unshare", "--net", "--mount", "--uts", "--propagation", "private", "/bin/sh", "-c", setup],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        if self._holder.stdout.readline() != b"ready\n":
            raise RuntimeError(f"node {name} could not be made: its holder ended with {self._holder.wait(10)}")
        self.pid = self._holder.pid
        run(["ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", str(self.pid)])
        run(["ip", "link", "set", self.link, "master", BRIDGE, "up"])
        # The same host name means the same NFSv4 client id, and two clients with one id take each other's state away.
        self.run(
            [
                "/bin/sh",
                "-c",
                f"ip address add {self.address}/24 dev eth0 && ip link set eth0 up && ! [ -e {NFS_IDENTIFIER} ] || echo {name} >{NFS_IDENTIFIER}",
            ]
        )

    def _enter(self, argv: Sequence[str | os.PathLike[str]], directory: str) -> list[str]:
        inside = [f"--{kind}=/proc/{self.pid}/ns/{proc}" for kind, proc in (("mount", "mnt"), ("net", "net"), ("uts", "uts"))]
        return [NSENTER, *inside, f"--wdns={directory}", "--", *map(os.fspath, argv)]

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        timeout: float = 30.0,
        check: bool = True,
        stdin: str = "",
        environment: Mapping[str, str] | None = None,
        directory: str = "/",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the node, for at most `timeout` seconds. Raises CommandFailed (with check) and CommandHung."""
        return run(self._enter(argv, directory), timeout=timeout, check=check, stdin=stdin, environment=environment)

    def python(self, code: str, *arguments: str, timeout: float = 30.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run Python code in the node, in a process of its own, with the tests' interpreter; `arguments` are its sys.argv[1:]."""
        return self.run([sys.executable, "-c", code, *arguments], timeout=timeout, check=check)

    def popen(self, argv: Sequence[str | os.PathLike[str]], *, directory: str = "/", **options: Any) -> subprocess.Popen[Any]:
        """Start a program in the node; its pid is the program's own. It is killed, with its group, when the node closes."""
        options.setdefault("start_new_session", True)
        process = subprocess.Popen(self._enter(argv, directory), **options)
        self._processes.append(process)
        return process

    def path(self, inside: str | os.PathLike[str]) -> pathlib.Path:
        """Return the path that reaches the node's `inside` from anywhere in the guest.

        For files that cannot hang: on a mount whose server may be away, use `run`.
        """
        return pathlib.Path(f"/proc/{self.pid}/root") / os.fspath(inside).lstrip("/")

    def mount(
        self,
        server: "Node",
        exported: str | os.PathLike[str],
        target: str = "",
        *,
        options: str = "vers=4.2",
        timeout: float = 60.0,
    ) -> pathlib.Path:
        """Mount `exported` of a server at `target` (made if missing; below /mnt if not given) and return it."""
        place = target or f"/mnt/{server.name}{os.fspath(exported).replace('/', '-')}"
        self.run(["/bin/mkdir", "-p", place])
        self.run(["/bin/mount", "-t", "nfs", "-o", options, f"{server.address}:{os.fspath(exported)}", place], timeout=timeout)
        return pathlib.Path(place)

    def detach(self, *targets: str | os.PathLike[str]) -> None:
        """Unmount lazily, in the order given, also when the server is dead.

        The mounts are gone at once, but the caller that drops a server's last mount then waits in the kernel for the server's
        answer to DESTROY_SESSION, without end. So that is a child, which is killed when mountinfo says that it has done its work.
        """
        places = {os.fspath(target) for target in targets}
        if not places:
            return
        child = self.popen([sys.executable, "-c", DETACH, *map(os.fspath, targets)])
        deadline = time.monotonic() + 90
        while child.poll() is None and places & {target for target, _ in self.mounts()} and time.monotonic() < deadline:
            time.sleep(0.02)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.5)
        child.kill()
        child.wait(10)
        left = places & {target for target, _ in self.mounts()}
        if left:
            raise CommandHung(f"{self.name} still has {', '.join(sorted(left))}")

    def mounts(self) -> list[tuple[str, str]]:
        """Return (target, filesystem type) of every mount in the node, the oldest first; never asks a server."""
        lines = pathlib.Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()
        return [(line.split()[4], line.split(" - ")[1].split()[0]) for line in lines]

    def start_statd(self) -> None:
        """Start what NFSv3's locks need on a client, too: rpcbind and rpc.statd."""
        self.run(["/bin/mkdir", "-p", "/var/lib/nfs/sm", "/var/lib/nfs/sm.bak"])
        self.run(["/sbin/rpcbind", "-w"])
        self.run(["/sbin/rpc.statd", "--no-notify"])

    def freeze(self) -> None:
        """Cut the cable: packets are dropped without an answer, both ways, until `thaw`."""
        run(["ip", "link", "set", self.link, "nomaster"])

    def thaw(self) -> None:
        """Mend the cable."""
        run(["ip", "link", "set", self.link, "master", BRIDGE])

    def delay(self, milliseconds: float) -> None:
        """Add this much to the round trip of every packet exchange with the node (netem); 0 takes it away."""
        if milliseconds:
            run(["tc", "qdisc", "replace", "dev", self.link, "root", "netem", "delay", f"{milliseconds}ms", "limit", "100000"])
        else:
            run(["tc", "qdisc", "delete", "dev", self.link, "root"], check=False)

    def processes(self) -> list[int]:
        """Return the pids of all processes in the node's mount namespace, the holder's among them."""
        mine = os.readlink(f"/proc/{self.pid}/ns/mnt")
        found = []
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    if os.readlink(entry / "ns/mnt") == mine:
                        found.append(int(entry.name))
        return found

    def close(self) -> None:
        """Detach the NFS mounts, kill every process, and let the kernel take the namespaces down."""
        if self not in self._network.nodes:
            return
        self._network.nodes.remove(self)
        self.detach(*[target for target, kind in reversed(self.mounts()) if kind in ("nfs", "nfs4")])
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in [*self._processes, self._holder]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
        if self._holder.stdout is not None:
            self._holder.stdout.close()
        run(["ip", "link", "delete", self.link], check=False)
