"""Finality: a call that may have left something says so, by an error after which the caller asks again.

external-provisioner (`checkError`) and external-snapshotter (`isCSIFinalError`) take ABORTED, UNAVAILABLE, DEADLINE_EXCEEDED and CANCELLED
for "it may have happened", and every other code for "it has not": what was made is forgotten then, and leaks. So such a code is right
only where nothing was made yet, or all of it was taken back for certain.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from csi_driver.errors import DeadlineExceeded, OperationPending, Unavailable

ASK_AGAIN = (OperationPending, Unavailable, DeadlineExceeded)
"""The errors of the driver after which the caller asks again (rpc/status.py)."""


@contextmanager
def may_be_left(what: str) -> Iterator[None]:
    """Turn whatever goes wrong in the context into an error after which the caller asks again: `what` may be there."""
    try:
        yield
    except ASK_AGAIN:
        raise
    except Exception as error:
        raise Unavailable(f"{what} may have been made, or be there in part ({error}); try again") from error


def take_back(error: BaseException, undo: Callable[[], bool], what: str) -> NoReturn:
    """Raise the `error` that cut off the making of `what`, after `undo`, which tells whether nothing of it is left now.

    If something is, or nobody knows because `undo` failed as well, the error is one after which the caller asks again.
    """
    with may_be_left(what):
        if not undo():
            raise error
    raise error
