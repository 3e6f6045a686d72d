"""Run Kubernetes' external-storage suite for a backend: `make test-external`."""

import argparse
import os
import sys

from cluster import assembly, teardown
from cluster.external import report
from cluster.external.leftovers import clear
from cluster.external.parts import backends, left_out, parts
from cluster.external.places import nodes_for, open_to_all
from cluster.external.run import QUICK, prepare, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="cluster.external", description=__doc__)
    parser.add_argument("backend", nargs="?", default="hostpath", choices=backends())
    parser.add_argument("--labels", default=QUICK, help="ginkgo's label filter (%(default)s)")
    parser.add_argument("--focus", default="", help="a regular expression that the specs' names contain")
    parser.add_argument("--part", default="", help="one of the backend's parts (all)")
    parser.add_argument("--processes", type=int, default=3, help="specs at once (%(default)s)")
    arguments = parser.parse_args()
    wanted = [part for part in parts(arguments.backend) if arguments.part in ("", part.name)]
    if not wanted:
        parser.error(f"--part {arguments.part}: the parts are {', '.join(part.name for part in parts(arguments.backend))}")
    if os.geteuid() != 0:
        print("namespaces, mounts and a bridge are made: run as root", file=sys.stderr)
        return 1
    mine = not assembly.is_up()
    if mine:
        teardown.destroy()
        assembly.up()
    nodes = nodes_for(arguments.backend)
    clear()
    prepare(nodes)
    with open_to_all(nodes):
        runs = {part.title: run(part, arguments.labels, arguments.focus, arguments.processes) for part in wanted}
    print("\n" + report.table(runs, [(left.specs, left.because) for left in left_out(arguments.backend)]))
    if mine:
        teardown.destroy()
    return 0 if all(result.is_good for result in runs.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
