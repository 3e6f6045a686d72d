"""What `kill -9` leaves: an operation in a child process that ends, without a word, at its n-th change of a filesystem.

The interpreter itself reports each change before it is made (audit events of `os` and `open`), so nothing of the driver is replaced.
The start of a command counts too, and a look at the mount table: it follows every mount, which is made by a call that is not reported.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator

_CHANGES = frozenset(
    f"os.{call}"
    for call in ("rename", "link", "mkdir", "remove", "rmdir", "symlink", "chmod", "chown", "setxattr", "utime", "truncate")
)
_KILLED = 9
_FAILED = 70


def runs_to_its_end(
    operation: Callable[[], object], last_change: int, more: Callable[[str, tuple], bool] | None = None
) -> bool:
    """Run `operation` in a child that dies just before its change number `last_change` (from 1). False if it died there.

    `more` tells which further audit events (name and arguments) are changes.
    """
    complaint, complain = os.pipe()
    child = os.fork()
    if child == 0:
        _in_child(operation, last_change, complain, more)
    os.close(complain)
    with os.fdopen(complaint, "rb") as pipe:
        said = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, _KILLED), f"change {last_change}: the operation failed in the child:\n{said}"
    return code == 0


def every_crash(operation_of: Callable[[int], Callable[[], object]], most: int = 2000) -> Iterator[int]:
    """Yield after each crash of a new operation (`operation_of(n)` sets it up), one change later each time, until one completes."""
    for change in range(1, most):
        operation = operation_of(change)
        done = runs_to_its_end(operation, change)
        yield change
        if done:
            assert change > 1, "the operation changed nothing: the test shows nothing"
            return
    raise AssertionError(f"not complete after {most} changes")


def _in_child(
    operation: Callable[[], object], last_change: int, complain: int, more: Callable[[str, tuple], bool] | None
) -> None:
    code = _FAILED
    try:
        left = last_change

        def count(event: str, args: tuple) -> None:
            nonlocal left
            if (
                event in _CHANGES
                or event == "subprocess.Popen"
                or (event == "open" and _matters(args))
                or (more and more(event, args))
            ):
                left -= 1
                if left == 0:
                    os._exit(_KILLED)

        sys.addaudithook(count)
        operation()
        code = 0
    except BaseException:
        os.write(complain, traceback.format_exc().encode()[-60000:])
    finally:
        os._exit(code)


def _matters(args: tuple) -> bool:
    path, _, flags = args
    if path == "/proc/self/mountinfo":
        return True
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
