"""The priority of work in the background."""

import contextlib
import os
import threading

from csi_driver.linux.system_calls import set_io_priority

_BEST_EFFORT, _LOWEST = 2, 7
_NICE = 5


def stand_back() -> None:
    """Let everybody else's work, reads and writes go before those of this thread and of the threads that it starts, from now on.

    Not nicer than 5: a thread that holds the interpreter's lock and does not get a processor would hold up all the others. Not the
    idle class either: likewise for who holds a journal's lock and does not get the disk. A disk scheduler without priorities (none)
    ignores it.
    """
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        set_io_priority(_BEST_EFFORT, _LOWEST)
