"""hostPath pools: a directory of this machine, or one that every machine sees (`shared = true`)."""

import errno
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from csi_driver.backends.base import Shortcoming, Space, Used
from csi_driver.config.settings import Budget, HostPathPool
from csi_driver.errors import NotFound, Unavailable, quoted
from csi_driver.linux import mounts
from csi_driver.linux.beneath import open_beneath
from csi_driver.linux.group_change import give_to_group
from csi_driver.linux.mounts import parse_bind_flags
from csi_driver.linux.trees import measure_tree

_ST_RDONLY = 1  # statvfs(3)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class HostPathBackend:
    """A PoolBackend (base.py). `topology` is what a node-local pool's volumes are bound to."""

    def __init__(self, settings: HostPathPool, topology: Mapping[str, str]) -> None:
        self._settings = settings
        self._topology = topology

    @property
    def name(self) -> str:
        return self._settings.name

    @property
    def node_local(self) -> bool:
        return not self._settings.shared

    @property
    def remote(self) -> bool:
        return False

    @property
    def data_is_here(self) -> bool:
        return True

    @property
    def inline(self) -> bool:
        return self._settings.inline

    @property
    def budget(self) -> Budget:
        return self._settings.budget

    def topology(self) -> Mapping[str, str] | None:
        return self._topology if self.node_local else None

    # --- the pool itself ----------------------------------------------------------------------------------------------------------

    def root(self) -> Path:
        return self._settings.path

    @property
    def generation(self) -> int:
        return 0

    def renew(self) -> None:
        """Do nothing: the directory is where it is."""

    def problem(self) -> str | None:
        return None

    @property
    def dormant(self) -> bool:
        return False

    def owner(self, _directory: Path) -> int:
        return os.geteuid()

    @property
    def squashed_to(self) -> int | None:
        return None

    def shortcomings(self) -> Sequence[Shortcoming]:
        return ()

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def prepare(self) -> None:
        """Make the pool's directory where there is none, for root alone: pods come in by mounts. Raises Unavailable."""
        try:
            self.root().mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"pool {self.name}: {self.root()} cannot be made a directory: {error.strerror}") from error

    def space(self) -> Space:
        """Measure the filesystem that the pool lies on. Raises Unavailable."""
        try:
            found = os.statvfs(self.root())
        except OSError as error:
            raise Unavailable(f"pool {self.name}: {self.root()} cannot be measured: {error.strerror}") from error
        return Space(
            total_bytes=found.f_blocks * found.f_frsize,
            used_bytes=(found.f_blocks - found.f_bfree) * found.f_frsize,
            available_bytes=found.f_bavail * found.f_frsize,
            total_inodes=found.f_files,
            available_inodes=found.f_favail,
            read_only=bool(found.f_flag & _ST_RDONLY),
        )

    # --- on a node ----------------------------------------------------------------------------------------------------------------

    def check_flags(self, flags: Sequence[str], field: str) -> None:
        parse_bind_flags(flags, field)

    def source_of(self, _directory: str) -> str:
        return ""

    def stage(self, directory: str, target: Path, flags: Sequence[str], *, read_only: bool) -> None:
        """Bind a volume's directory onto `target`. Raises NotFound, and what mounts.bind raises."""
        self._bind(self._open(directory), target, flags, read_only=read_only)

    def publish(self, staging: Path, target: Path, flags: Sequence[str], *, read_only: bool) -> None:
        """Bind what is seen at `staging`. Raises OSError, and what mounts.bind raises."""
        source = os.open(staging, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._bind(source, target, flags, read_only=read_only)

    @staticmethod
    def _bind(source: int, target: Path, flags: Sequence[str], *, read_only: bool) -> None:
        try:
            attributes = parse_bind_flags(flags, "volume_capability.mount.mount_flags")
            mounts.bind(source, target, replace(attributes, read_only=attributes.read_only or read_only))
        finally:
            os.close(source)

    def is_staged(self, directory: str, target: Path, source: str = "") -> bool:  # noqa: ARG002
        """Tell whether what is seen at `target` is the volume's directory."""
        try:
            opened = self._open(directory)
        except NotFound:
            return False
        try:
            return mounts.same_file_mounted(opened, target)
        finally:
            os.close(opened)

    def mounts_of(self, directory: str) -> list[Path]:
        """List where on this node the directory is bound; empty where it is gone."""
        try:
            source = self._open(directory)
        except NotFound:
            return []
        try:
            return mounts.mounts_of(source)
        finally:
            os.close(source)

    def look(self, mounted: Path) -> None:
        mounted.stat()

    def flush(self, _mounted: Path, _seconds: float) -> None:
        """Do nothing: what is written is on this machine, and stays so."""

    def measure(self, mounted: Path, seconds: float) -> tuple[Used, Space]:
        top = os.open(mounted, _DIRECTORY)
        try:
            used = measure_tree(top, deadline=time.monotonic() + seconds)
        finally:
            os.close(top)
        return Used(used.bytes, used.inodes, used.complete), self.space()

    def change_group(self, mounted: Path, gid: int, should_stop: Callable[[int], bool]) -> int:
        top = os.open(mounted, _DIRECTORY)
        try:
            return give_to_group(top, gid, should_stop)
        finally:
            os.close(top)

    def _open(self, directory: str) -> int:
        root = os.open(self.root(), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Never across a mount: a volume is a directory of the pool's own filesystem, whatever has been mounted in its place.
            return open_beneath(root, directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV):
                raise NotFound(f"directory {quoted(directory)} is missing from pool {self.name} ({error.strerror})") from error
            raise
        finally:
            os.close(root)
