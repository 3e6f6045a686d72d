"""What a node does to an NFS mount, done in a child that can be killed.

On a hard mount of a dead server every look may wait without end: stat, statfs, opening the mount's root in order to bind it, sync.
So each of these is one run of this module as a program (children.py), and the driver itself never touches what it mounts for pods.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from csi_driver.linux import children, mounts
from csi_driver.linux.bind_flags import MountAttributes
from csi_driver.linux.group_change import give_to_group
from csi_driver.linux.system_calls import sync_filesystem
from csi_driver.linux.trees import measure_tree

_PROGRESS_SECONDS = 0.5
_SILENCE_SECONDS = 60.0
"""How long a child that counts on says nothing before its server is taken for dead."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a mount holds (as du(1) counts; `complete` False: a floor), and what statvfs(3) says of the filesystem it is of."""

    used_bytes: int
    used_inodes: int
    complete: bool
    total_bytes: int
    available_bytes: int
    total_inodes: int
    available_inodes: int


def look(mounted: Path, seconds: float) -> None:
    """Ask the server about the root of a mount. Raises Unavailable where it does not answer, OSError (ESTALE: it is another's now)."""
    _ask("look", mounted, seconds=seconds)


def bind(mounted: Path, target: Path, attributes: MountAttributes, seconds: float) -> None:
    """Bind a mount onto `target`. Raises Unavailable where its server does not answer, OSError."""
    _ask("bind", mounted, os.fspath(target), json.dumps(asdict(attributes)), seconds=seconds)


def flush(mounted: Path, seconds: float) -> None:
    """Bring all that was written to the server. Raises Unavailable where it is not done in time, OSError for what is lost for good."""
    _ask("flush", mounted, seconds=seconds)


def measure(mounted: Path, seconds: float) -> Measured:
    """Count what the mounted volume holds. Raises Unavailable where its server does not answer or falls silent, OSError."""
    watch = _Watch(lambda _counted: False)
    return Measured(**_ask("measure", mounted, str(max(0.0, seconds - 2.0)), seconds=seconds, watch=watch))


def change_group(mounted: Path, gid: int, seconds: float, should_stop: Callable[[int], bool]) -> int:
    """Give the mounted volume to a group (group_change.py) and return how many entries it has; 0 where it was done before.

    `should_stop` is told how many were done so far, again and again. Raises Unavailable where the server falls silent, OSError.
    """
    return int(_ask("change_group", mounted, str(gid), seconds=seconds, watch=_Watch(should_stop))["entries"])


class _Watch:
    """Follows how far a child is, and says True for it to be killed: when it falls silent, or `should_stop` says so."""

    def __init__(self, should_stop: Callable[[int], bool]) -> None:
        self._should_stop = should_stop
        self._last = b""
        self._since = time.monotonic()

    def __call__(self, printed: bytes) -> bool:
        if printed != self._last:
            self._last, self._since = printed, time.monotonic()
        counted = printed[: printed.rfind(b"\n") + 1].split()
        done = int(counted[-1]) if counted and counted[-1].isdigit() else 0
        return self._should_stop(done) or time.monotonic() - self._since > _SILENCE_SECONDS


def _ask(
    operation: str, mounted: Path, *arguments: str, seconds: float, watch: Callable[[bytes], bool] | None = None
) -> Mapping[str, Any]:
    return children.ask(__name__, operation, mounted, *arguments, seconds=seconds, watch=watch)


# --- in the child -----------------------------------------------------------------------------------------------------------------


def main(operation: str, mounted: str, *arguments: str) -> None:
    """Do one operation and print its answer."""
    children.answer(_OPERATIONS, operation, mounted, *arguments)


class _Told:
    """Prints how far it is, now and then, for `_Watch`."""

    def __init__(self) -> None:
        self._done = 0
        self._said = time.monotonic()

    def one_more(self) -> None:
        self.at(self._done + 1)

    def at(self, done: int) -> bool:
        self._done = done
        if time.monotonic() - self._said > _PROGRESS_SECONDS:
            self._said = time.monotonic()
            print(done, flush=True)  # noqa: T201  # a program's answer
        return False


def _look(mounted: str) -> dict[str, Any]:
    os.stat(mounted)  # noqa: PTH116  # nothing of pathlib in a child that shall start quickly
    os.statvfs(mounted)  # never answered from a cache
    return {}


def _bind(mounted: str, target: str, attributes: str) -> dict[str, Any]:
    source = os.open(mounted, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    mounts.bind(source, Path(target), MountAttributes(**json.loads(attributes)))
    return {}


def _flush(mounted: str) -> dict[str, Any]:
    sync_filesystem(_opened(mounted))
    return {}


def _measure(mounted: str, seconds: str) -> dict[str, Any]:
    top = _opened(mounted)
    room = os.fstatvfs(top)
    used = measure_tree(top, deadline=time.monotonic() + float(seconds), on_entry=_Told().one_more)
    return asdict(
        Measured(
            used_bytes=used.bytes,
            used_inodes=used.inodes,
            complete=used.complete,
            total_bytes=room.f_blocks * room.f_frsize,
            available_bytes=room.f_bavail * room.f_frsize,
            total_inodes=room.f_files,
            available_inodes=room.f_favail,
        )
    )


def _change_group(mounted: str, gid: str) -> dict[str, Any]:
    return {"entries": give_to_group(_opened(mounted), int(gid), _Told().at)}


def _opened(mounted: str) -> int:
    return os.open(mounted, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


_OPERATIONS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "look": _look,
    "bind": _bind,
    "flush": _flush,
    "measure": _measure,
    "change_group": _change_group,
}
