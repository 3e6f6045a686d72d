"""A room's functions, run in a child that can be killed.

What may wait for a server without end waits in a process of its own: SIGKILL ends such a wait (TASK_KILLABLE), but only of a whole
process. So a module that is a program offers operations by name, and a child runs one of them and answers with one line of JSON: a
result, or the errno of what failed. -I and -S: nothing of the environment, no site-packages; such a start takes some 50 ms.
"""

import errno
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from csi_driver.errors import DeadlineExceeded, TatamiError, Unavailable
from csi_driver.linux import commands

_ROOT = Path(__file__).resolve().parents[2]
_START = (
    "import sys, importlib; sys.path.insert(0, sys.argv.pop(1)); importlib.import_module(sys.argv.pop(1)).main(*sys.argv[1:])"
)


def ask(
    module: str,
    operation: str,
    place: Path,
    *arguments: str,
    seconds: float,
    watch: Callable[[bytes], bool] | None = None,
) -> Mapping[str, Any]:
    """Have `module` (its full name) do `operation` on `place`, and return its answer.

    `watch` is commands.run's `should_stop`. Raises Unavailable where it is not done within `seconds`, OSError.
    """
    argv = [sys.executable, "-I", "-S", "-c", _START, os.fspath(_ROOT), module, operation, os.fspath(place), *arguments]
    try:
        said = commands.run(argv, timeout=seconds, should_stop=watch).stdout
    except DeadlineExceeded as error:
        raise Unavailable(f"{place}: its server did not answer in time ({operation}, {seconds:g} s)") from error
    answer = json.loads(said.splitlines()[-1])
    if "errno" in answer:
        raise OSError(answer["errno"], answer["error"], os.fspath(place))
    return dict(answer)


def answer(operations: Mapping[str, Callable[..., dict[str, Any]]], operation: str, *arguments: str) -> None:
    """Do one operation, in the child, and print its answer."""
    try:
        said = operations[operation](*arguments)
    except OSError as error:
        said = {"errno": error.errno or errno.EIO, "error": error.strerror or str(error)}
    except TatamiError as error:
        said = {"errno": errno.EBUSY, "error": str(error)}
    print(json.dumps(said))  # noqa: T201  # a program's answer
