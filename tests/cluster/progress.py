"""Say what is being done and since when: bringing up a cluster takes long enough to wonder."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

PATIENCE = float(os.environ.get("TATAMI_CLUSTER_PATIENCE", "3"))
"""What every deadline is multiplied with: waiting ends when there is something to see, so only a failure takes longer."""

_started = time.monotonic()


def say(text: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"[{time.monotonic() - _started:6.1f} s] {text}", flush=True)


@contextmanager
def step(text: str) -> Iterator[None]:
    """Print what begins, and how long it took."""
    say(f"{text} ...")
    began = time.monotonic()
    yield
    say(f"{text}: {time.monotonic() - began:.1f} s")


def wait_until(what: str, check, seconds: float, every: float = 0.2):
    """Return what `check` returns as soon as it is true. Raises TimeoutError, with what it said last, after `seconds`."""
    seconds *= PATIENCE
    until = time.monotonic() + seconds
    last: object = None
    while True:
        try:
            if answer := check():
                return answer
        except (OSError, RuntimeError, AssertionError) as error:
            last = error
        if time.monotonic() > until:
            raise TimeoutError(f"{what}: not after {seconds:.0f} s" + (f": {last}" if last else ""))
        time.sleep(every)
