"""Rounds: a thread that comes by again and again, and at once where it is called.

Each thing that may have to be waited for has a thread of its own: a server that is away keeps its own thread, and nobody else's. The
thread may hang in the kernel for as long as the server is away; it is left behind then, at the end of the process too.
"""

import logging
import threading
import time
from collections.abc import Callable

from csi_driver.backends.base import in_background

_log = logging.getLogger(__name__)

INTERVAL_SECONDS = 30.0
FIRST_INTERVAL_SECONDS = 5.0
"""What a crash left is seen in the first round and gone after the second: who waits for room need not wait for long."""


class Rounds:
    """Runs `work` in a thread: now, then every INTERVAL_SECONDS, and in between whenever `wake` is set.

    `work` is told whether the interval is over (True), or it was only woken, and looks at `stop` itself where it takes long.
    """

    def __init__(self, name: str, work: Callable[[bool], None], wake: threading.Event, stop: threading.Event) -> None:
        self._work = work
        self._wake = wake
        self._stop = stop
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Tell the thread that `stop` is set."""
        self._wake.set()

    def join(self, seconds: float) -> None:
        """Wait at most so long for the end of the thread."""
        self._thread.join(seconds)

    def _run(self) -> None:
        in_background.set(True)
        due, interval = time.monotonic(), FIRST_INTERVAL_SECONDS
        while not self._stop.is_set():
            self._wake.clear()  # before the round: what comes from here on is seen now or in the next one
            started = time.monotonic()
            is_due = started >= due
            if is_due:
                due, interval = started + interval, INTERVAL_SECONDS
            try:
                self._work(is_due)
            except Exception:  # noqa: BLE001 - no memory, no more threads, a defect: nobody would start this thread again
                _log.exception("a round was cut off, the next one comes in its time", extra={"rounds": self._thread.name})
            if not self._stop.is_set():
                self._wake.wait(max(0.0, due - time.monotonic()))
