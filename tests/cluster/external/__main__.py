"""Run Kubernetes' external-storage suite for a backend: `make test-external`."""

import argparse
import os
import sys

from cluster import assembly, teardown
from cluster.external import report
from cluster.external.run import QUICK, Selection, backends, prepare, run
from cluster.nodes import all_nodes


def main() -> int:
    parser = argparse.ArgumentParser(prog="cluster.external", description=__doc__)
    parser.add_argument("backend", nargs="?", default="hostpath", choices=backends())
    parser.add_argument("--labels", default=QUICK, help="ginkgo's label filter (%(default)s)")
    parser.add_argument("--focus", default="", help="a regular expression that the specs' names contain")
    parser.add_argument("--processes", type=int, default=3, help="specs at once (%(default)s)")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("namespaces, mounts and a bridge are made: run as root", file=sys.stderr)
        return 1
    mine = not assembly.is_up()
    if mine:
        teardown.destroy()
        assembly.up()
    prepare(all_nodes())
    result = run(Selection(arguments.backend, arguments.labels, arguments.focus), arguments.processes)
    print(f"\n{report.table(arguments.backend, result)}")
    if mine:
        teardown.destroy()
    return 0 if result.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
