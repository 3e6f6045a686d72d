"""hostPath pools: a directory of this machine, or one that every machine sees (`shared = true`)."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path

from csi_driver.backends.base import Space
from csi_driver.config.settings import HostPathPool
from csi_driver.errors import NotFound, Unavailable, quoted
from csi_driver.linux import mounts
from csi_driver.linux.beneath import open_beneath
from csi_driver.linux.mounts import MountAttributes

_ST_RDONLY = 1  # statvfs(3)


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
    def inline(self) -> bool:
        return self._settings.inline

    def root(self) -> Path:
        return self._settings.path

    def prepare(self) -> None:
        """Make the pool's directory where there is none. Raises Unavailable."""
        try:
            self.root().mkdir(mode=0o755, parents=True, exist_ok=True)
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

    def stage(self, directory: str, target: Path, attributes: MountAttributes) -> None:
        """Bind a volume's directory onto `target`. Raises NotFound, and what mounts.bind raises."""
        source = self._open(directory)
        try:
            mounts.bind(source, target, attributes)
        finally:
            os.close(source)

    def is_staged(self, directory: str, target: Path) -> bool:
        """Tell whether what is seen at `target` is the volume's directory."""
        try:
            source = self._open(directory)
        except NotFound:
            return False
        try:
            return mounts.same_file_mounted(source, target)
        finally:
            os.close(source)

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

    def topology(self) -> Mapping[str, str] | None:
        return self._topology if self.node_local else None

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
