"""Bring a cluster up, or take it away: `make cluster`, `make cluster-down`."""

import argparse
import os
import subprocess
import sys
import time

from cluster import assembly, teardown
from cluster.layout import KUBECONFIG
from cluster.progress import say


def main() -> int:
    parser = argparse.ArgumentParser(prog="cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="bring it up")
    up.add_argument("--bare", action="store_true", help="without the driver")
    up.add_argument("--nfs", action="store_true", help="with nodes whose kernel has NFS, a server, and the driver for it")
    commands.add_parser("nfs", help="bring those nodes into the cluster that is up")
    commands.add_parser("down", help="leave nothing of it")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("namespaces, mounts and a bridge are made: run as root", file=sys.stderr)
        return 1
    if arguments.command == "down":
        began = time.monotonic()
        teardown.destroy()
        say(f"nothing of the cluster is left ({time.monotonic() - began:.1f} s)")
        return 0
    try:
        if arguments.command == "up":
            assembly.up(with_driver=not arguments.bare)
        if arguments.command == "nfs" or arguments.nfs:
            assembly.up_nfs()
    except (RuntimeError, TimeoutError, OSError, subprocess.SubprocessError) as error:
        print(f"\n{error}\nWhat is there stays for a look; make cluster-down removes it.", file=sys.stderr)
        return 1
    print(f"\nexport KUBECONFIG={KUBECONFIG}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
