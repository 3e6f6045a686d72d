"""What a pool must be able to do, whatever it is made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from csi_driver.linux.mounts import MountAttributes


@dataclass(frozen=True)
class Space:
    """What statvfs(3) says of a pool's filesystem, in bytes and inodes; `available` is what an ordinary user may still take."""

    total_bytes: int
    used_bytes: int
    available_bytes: int
    total_inodes: int
    available_inodes: int
    read_only: bool


class PoolBackend(Protocol):
    """One pool: where it lies for this process, and how one of its directories gets onto a node."""

    @property
    def name(self) -> str:
        """The pool's name in `pools.toml`."""

    @property
    def node_local(self) -> bool:
        """Whether this pool exists on one node only, so that handles carry the node and volumes have a topology."""

    @property
    def inline(self) -> bool:
        """Whether pod authors may name this pool in an inline volume."""

    def root(self) -> Path:
        """Return where this process reaches the pool; raises Unavailable where it cannot."""

    def prepare(self) -> None:
        """Make the pool reachable once, at start; raises Unavailable with what to do about it."""

    def space(self) -> Space:
        """Measure the pool's filesystem; raises Unavailable."""

    def stage(self, directory: str, target: Path, attributes: MountAttributes) -> None:
        """Mount `directory` (relative to the root) at `target`, an empty directory that exists.

        Raises NotFound where the directory is gone, Unavailable where the pool cannot be reached.
        """

    def is_staged(self, directory: str, target: Path) -> bool:
        """Tell whether what is mounted on top at `target` is `directory`."""

    def mounts_of(self, directory: str) -> list[Path]:
        """List where on this node `directory`, or something in it, is mounted."""

    def topology(self) -> Mapping[str, str] | None:
        """Return the segments from which the pool can be reached; None for everywhere."""
