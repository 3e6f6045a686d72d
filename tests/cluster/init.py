"""Process 1 of a machine: adopt and bury what dies in there, and nothing else.

The machine is its namespaces, and they are gone with this process: the kernel kills whatever runs in them. Its arguments are the
mark by which `machines` finds it, after a kill of everything else, too.
"""

import os
import signal
import sys
import time

READY = "ready"

if __name__ == "__main__":
    # Process 1 gets no signal that it has no handler for, and the terminal's are not meant for the cluster.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with open(os.path.join(sys.argv[2], READY), "w"):
        pass
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            time.sleep(0.2)
