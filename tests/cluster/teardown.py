"""Leave nothing: end the machines, take away the bridge, the cgroups and the directory, and prove that they are gone.

All of it goes by name, so it works on what a killed `up` left as well as on a whole cluster.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from cluster.layout import PREFIX, STATE
from cluster.machines import destroy_all, running
from cluster.nodes import cgroup_directories, loop_devices, release
from cluster.progress import wait_until


def destroy() -> None:
    """Remove the cluster, whole or in part; nothing to do where there is none. Raises RuntimeError, naming what would not go."""
    destroy_all()
    for link in _links():
        # The end of a network namespace takes its veth along, perhaps at this very moment.
        subprocess.run(["ip", "link", "delete", link], capture_output=True, check=False)
    release(STATE)
    wait_until("the end of the cluster's mounts", lambda: not mounts_below(STATE), 20)
    for directory in list(cgroup_directories(PREFIX)):
        _remove_cgroup(directory)
    shutil.rmtree(STATE, ignore_errors=True)
    if left := leftovers():
        raise RuntimeError("the cluster is not gone: " + "; ".join(left))


def leftovers() -> list[str]:
    """List what of a cluster is on this host: processes, mounts, loop devices, network devices, cgroups, the directory."""
    found = [f"process {pid}" for pid in running()]
    found += [f"mount {point}" for point in mounts_below(STATE)]
    found += [f"loop device {device}" for device in loop_devices(STATE)]
    found += [f"network device {link}" for link in _links()]
    found += [f"cgroup {directory}" for directory in cgroup_directories(PREFIX)]
    if STATE.exists():
        found.append(f"directory {STATE}")
    return found


def mounts_below(directory: Path) -> list[str]:
    """List this host's own mount points in a directory. /proc/self/mountinfo asks no file system, so it never hangs."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if Path(point).is_relative_to(directory)]


def _links() -> list[str]:
    shown = subprocess.run(["ip", "-json", "link", "show"], capture_output=True, text=True, check=True).stdout
    return [link["ifname"] for link in json.loads(shown) if link["ifname"].startswith(PREFIX)]


def _remove_cgroup(directory: Path) -> None:
    for path, _, _ in os.walk(directory, topdown=False):
        # A cgroup is busy for a moment after its last process.
        for _ in range(50):
            try:
                os.rmdir(path)
                break
            except FileNotFoundError:
                break
            except OSError:
                time.sleep(0.1)
