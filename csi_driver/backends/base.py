"""What a pool must be able to do, whatever it is made of: be reached, and show its directories on a node."""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from csi_driver.config.settings import Budget

in_background: ContextVar[bool] = ContextVar("in_background", default=False)
"""Set in threads that come by again and again: what they do with a pool does not keep its share mounted."""


@dataclass(frozen=True)
class Space:
    """What statvfs(3) says of a pool's filesystem, in bytes and inodes; `available` is what an ordinary user may still take."""

    total_bytes: int
    used_bytes: int
    available_bytes: int
    total_inodes: int
    available_inodes: int
    read_only: bool


@dataclass(frozen=True)
class Used:
    """What a volume itself takes, in bytes and inodes; `complete` False makes it a floor."""

    bytes: int
    inodes: int
    complete: bool


@dataclass(frozen=True)
class Shortcoming:
    """What a pool cannot do as it is set up, and what would help: a word for machines, a sentence for people."""

    reason: str
    message: str


class PoolBackend(Protocol):
    """One pool: where it lies for this process, and how one of its directories gets onto a node."""

    @property
    def name(self) -> str:
        """The pool's name in `pools.toml`."""

    @property
    def node_local(self) -> bool:
        """Whether this pool exists on one node only, so that handles carry the node and volumes have a topology."""

    @property
    def remote(self) -> bool:
        """Whether a server stands behind it, which may be away.

        Such a pool is not asked by a probe, nodes learn where a volume lies from ControllerPublish alone, and what is mounted is
        only looked at in a child that can be killed.
        """

    @property
    def data_is_here(self) -> bool:
        """Whether `root` lies on a filesystem of this machine, so that quotas can be set there and nothing is a round trip away.

        Of a remote pool too, where this process runs beside the server's data; nodes still know it by its server alone.
        """

    @property
    def inline(self) -> bool:
        """Whether the pool takes inline volumes, which pod authors write and no ResourceQuota counts."""

    @property
    def budget(self) -> Budget:
        """How much of it may be promised, as `pools.toml` says."""

    def topology(self) -> Mapping[str, str] | None:
        """Return the segments from which the pool can be reached; None for everywhere."""

    # --- the pool itself ----------------------------------------------------------------------------------------------------------

    def root(self) -> Path:
        """Return where this process reaches the pool; raises Unavailable, at once where it is known not to answer."""

    @property
    def generation(self) -> int:
        """A number that changes whenever the way to the pool was made anew: it may be another pool then."""

    def prepare(self) -> None:
        """Make the pool reachable, where that is still to be done; raises Unavailable with what to do about it."""

    def renew(self) -> None:
        """Make the way to the pool anew where it has gone stale (ESTALE); raises Unavailable."""

    def problem(self) -> str | None:
        """Say why the pool cannot be reached, as far as it is known without asking; None where nothing is known against it."""

    @property
    def dormant(self) -> bool:
        """Whether nobody has used the pool for a while and its way was let go. Background work leaves it so."""

    def owner(self, directory: Path) -> int:
        """Find out which uid has what this process makes in `directory` of the pool; raises OSError."""

    @property
    def squashed_to(self) -> int | None:
        """The uid to which the server squashes root, where it does and `owner` has found out."""

    def shortcomings(self) -> Sequence[Shortcoming]:
        """List what the pool cannot do as it is set up."""

    def space(self) -> Space:
        """Measure the pool's filesystem; raises Unavailable."""

    def close(self) -> None:
        """Let go of everything; for the end of the process."""

    # --- on a node ----------------------------------------------------------------------------------------------------------------

    def check_flags(self, flags: Sequence[str], field: str) -> None:
        """Raise InvalidArgument, naming `field`, for mount flags that volumes of this pool cannot have."""

    def source_of(self, directory: str) -> str:
        """Say what mountinfo calls the source of `directory`, for the node to remember; "" where the pool itself can be asked."""

    def stage(self, directory: str, target: Path, flags: Sequence[str], *, read_only: bool) -> None:
        """Mount `directory` (relative to the root) at `target`, an empty directory that exists.

        Raises NotFound where the directory is gone, Unavailable where the pool cannot be reached.
        """

    def publish(self, staging: Path, target: Path, flags: Sequence[str], *, read_only: bool) -> None:
        """Bind what is mounted, or lies, at `staging` onto `target`, an empty directory that exists. Raises Unavailable."""

    def is_staged(self, directory: str, target: Path, source: str = "") -> bool:
        """Tell whether what is mounted on top at `target` is `directory`; `source` is what `source_of` said when it was mounted."""

    def mounts_of(self, directory: str) -> list[Path]:
        """List where on this node `directory`, or something in it, is mounted."""

    def look(self, mounted: Path) -> None:
        """Ask the server about a mount. Raises Unavailable where it does not answer, OSError (ESTALE: what it showed is gone)."""

    def flush(self, mounted: Path, seconds: float) -> None:
        """Bring what was written through a mount to the server. Raises Unavailable where that takes more than `seconds`."""

    def measure(self, mounted: Path, seconds: float) -> tuple[Used, Space]:
        """Count what a mounted volume holds, and measure its filesystem. Raises Unavailable after `seconds`."""

    def change_group(self, mounted: Path, gid: int, should_stop: Callable[[int], bool]) -> int:
        """Give a mounted volume to a group (linux/group_change.py) and return how many entries it has; 0: it had it.

        `should_stop` is told how many are done. Raises Unavailable, WalkStopped, OSError (EPERM where the server squashes root).
        """
