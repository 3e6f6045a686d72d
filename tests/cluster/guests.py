"""Nodes whose kernel has NFS: user-mode Linux, a kernel that runs as a process, joined to the cluster by a tap device in its bridge.

This machine's kernel mounts no NFS and serves none; a guest's does both. The guest's kernel runs in a machine of its own, so that
what it started is gone with it, and its tap is free again. Its root is this machine's, read-only (../uml/guest-init.sh); what it may
write to is its own directory: files for its services, their logs. Everything else lies on its disk, a copy of the one with the images
(guest_disk.py), and is there again when it was switched off.
"""

import json
import secrets
import shutil
import socket
import subprocess
from pathlib import Path

from cluster.layout import AGENT_PORT, BINARIES, BRIDGE, GATEWAY, HERE, NETWORK_BITS, NFS_NODES, NodeSpec
from cluster.machines import Machine, destroy_all
from cluster.nodes import PROGRAMS, SOCKET, Node, kubelet_configuration
from cluster.progress import PATIENCE, wait_until

UML = HERE.parent / "uml"
MEMORY = 1536  # MiB; of this machine's as it is touched
LABEL, VALUE = "kind", "nfs"
TAINT = {"key": LABEL, "operator": "Equal", "value": VALUE, "effect": "NoSchedule"}
"""What keeps pods that do not tolerate it from these nodes: stories about other volumes do not notice them."""


class Guest:
    """A guest as a node's machine: services are started, stopped and killed in it, by commands that it takes over the network."""

    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.name = spec.name
        self.directory = spec.directory
        self._holder = Machine(spec.name, network=False)
        self._token = spec.directory / "token"

    def boot(self) -> None:
        """Boot the guest with its disk, and wait until it takes commands. Raises TimeoutError with the end of its console."""
        self._holder.boot()
        self._token.write_text(secrets.token_hex(16))
        self._token.chmod(0o600)
        # The kernel executes it, and not every way of copying a checkout keeps the bit.
        Path(shutil.copy(UML / "guest-init.sh", self.directory)).chmod(0o755)
        with (self.directory / "share").open("ab") as share:
            share.truncate(self.spec.disk << 30)
        arguments = [
            str(UML / "kernel.sh"),
            str(self.directory),
            f"mem={MEMORY}M",
            "root=/dev/root",
            "rootfstype=hostfs",
            "rootflags=/",
            "ro",
            f"init={self.directory}/guest-init.sh",
            f"run_dir={self.directory}",
            f"uml_dir={self.directory}/",
            "umid=kernel",
            f"ubda={self.directory}/disk",
            f"ubdb={self.directory}/share",
            f"vec0:transport=tap,ifname={self.spec.link}",
            "con=null",
            "con0=fd:0,fd:1",
            "quiet",
        ]
        self._holder.start("console", *arguments)
        try:
            wait_until(f"the guest {self.name}", lambda: self.run("true").returncode == 0, 90)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.log('console').read_text(errors='replace')[-3000:]}") from None

    def run(self, *command: str, timeout: float = 60, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program in the guest and wait for it. Raises RuntimeError with what it printed when it fails."""
        timeout *= PATIENCE
        path = f"PATH={PROGRAMS}:/usr/sbin:/usr/bin:/sbin:/bin"
        asked = {
            "token": self._token.read_text(),
            "command": ["env", "-i", path, "HOME=/root", "LANG=C.UTF-8", *command],
            "timeout": timeout,
            "stdin": stdin,
        }
        with socket.create_connection((self.spec.address, AGENT_PORT), timeout=5) as connection:
            connection.settimeout(timeout + 10)
            connection.sendall(json.dumps(asked).encode() + b"\n")
            with connection.makefile("rb") as stream:
                line = stream.readline()
        if not line:
            raise RuntimeError(f"{self.name}: {' '.join(command)[:300]}: the guest said nothing")
        answer = json.loads(line)
        if check and answer["code"] != 0:
            raise RuntimeError(
                f"{self.name}: {' '.join(command)[:300]}: exit {answer['code']}: {answer['stderr'] or answer['stdout']}"
            )
        return subprocess.CompletedProcess(command, answer["code"], answer["stdout"], answer["stderr"])

    def start(self, service: str, *command: str) -> None:
        """Start a program in the guest; what it prints goes to its log."""
        script = 'log=$1; shift; setsid "$@" </dev/null >>"$log" 2>&1 &'
        self.run("sh", "-ec", script, "sh", f"/out/logs/{service}.log", *command)

    def log(self, service: str) -> Path:
        """Where a service's output is; the console's is there before the guest is."""
        return self._holder.log(service) if service == "console" else self.directory / "logs" / f"{service}.log"

    def stop(self, program: str, number: int = 15, seconds: float = 30) -> None:
        """End a service: a signal. Returns when it is gone; raises TimeoutError when it stays."""
        self.run("pkill", f"-{number}", "-x", program[:15], check=False)
        wait_until(
            f"the end of {program} on {self.name}",
            lambda: self.run("pgrep", "-x", program[:15], check=False).returncode,
            seconds,
        )

    def kill(self, *words: str) -> None:
        """Kill, with -9, each process of the guest, its containers included, whose arguments have these words, in this order."""
        # One program for all processes: a shell's loop over them takes a guest a minute.
        self.run("pkill", "-9", "-f", "(^|[ /])" + "( |.*[ /])".join(words) + "( |$)")


class GuestNode(Node):
    """A node in a guest. It has no directories that this machine could look into: `run` and `sh` look from inside."""

    kubelet_arguments = (f"--node-labels={LABEL}={VALUE}", f"--register-with-taints={LABEL}={VALUE}:NoSchedule")
    proxy_mode = "iptables"  # its kernel has no address translation for nf_tables

    def __init__(self, spec: NodeSpec) -> None:
        super().__init__(spec)
        self.machine: Guest = Guest(spec)

    def join(self, disk: Path) -> None:
        """Make what stays when it is switched off, its disk and its files, and boot it. Nothing runs in it yet."""
        files = self.spec.directory / "cluster"
        files.mkdir(parents=True)
        (self.spec.directory / "logs").mkdir()
        # A copy and not the ubd driver's copy-on-write, which loses what was written when the guest is killed.
        copy = ["cp", "--sparse=always", "--reflink=auto", str(disk), str(self.spec.directory / "disk")]
        subprocess.run(copy, check=True, capture_output=True)
        # Version 2 of cgroups, which are the guest's own: pods may live at their root.
        self.write_files(files, kubelet_configuration("") | {"cgroupRoot": "/"})
        (self.spec.directory / "programs").write_text(str(BINARIES))
        job = [f"/host{HERE}/guest-node.sh", self.name, f"{self.spec.address}/{NETWORK_BITS}", GATEWAY, str(AGENT_PORT)]
        words = " ".join(f"'{word}'" for word in (*job, *self.routes()))
        (self.spec.directory / "job.sh").write_text(f"VISIBLE=\njob() {{ sh {words}; }}\n")
        self.boot()

    def boot(self) -> None:
        """Make its tap, and boot the guest, the first time or after it was switched off."""
        link = self.spec.link
        for command in (
            ["ip", "tuntap", "add", "dev", link, "mode", "tap"],
            ["ip", "link", "set", link, "master", BRIDGE, "up"],
            ["ip", "route", "replace", self.spec.pods, "via", self.spec.address],
        ):
            subprocess.run(command, check=True, capture_output=True)
        self.machine.boot()

    def power_off(self) -> None:
        """End all that runs on it at once, as a power cut does; its disk stays."""
        destroy_all(self.name)
        subprocess.run(["ip", "link", "delete", self.spec.link], capture_output=True, check=False)

    def remove(self) -> None:
        """End it for good."""
        self.power_off()
        shutil.rmtree(self.spec.directory, ignore_errors=True)

    def import_image(self, archive: Path) -> None:
        """Give containerd an image."""
        self.machine.run(
            "ctr", "--address", SOCKET, "--namespace", "k8s.io", "images", "import", f"/host{archive}", timeout=300
        )

    def see(self, inside: str | Path) -> Path:
        """Raise: this machine has no way to a guest's directories but its commands."""
        raise NotImplementedError(f"{self.name} is a guest, whose {inside} cannot be opened from here: use sh")

    def sh(self, script: str, *arguments: str, check: bool = True) -> str:
        """Run a shell script on the node, outside of pods, and return what it printed."""
        return self.machine.run("sh", "-ec", script, "sh", *arguments, check=check).stdout

    def mounts(self) -> list[str]:
        """List the mount points of the node."""
        return [line.split()[4] for line in self.sh("cat /proc/self/mountinfo").splitlines()]


def nfs_nodes() -> list[GuestNode]:
    """Return the nodes with NFS, whether they run or not."""
    return [GuestNode(spec) for spec in NFS_NODES]
