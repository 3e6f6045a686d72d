"""NFS pools: a directory of a server. The controller works in its own mount of it, nodes mount each volume's directory by itself.
Where the controller runs beside the server's data (`data`), it works there instead (nfs_data.py).

Whatever is mounted for pods is never touched by the driver's own process: linux/nfs_child.py says why.
"""

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from csi_driver.backends.base import Shortcoming, Space, Used
from csi_driver.backends.nfs_data import ServedData
from csi_driver.backends.nfs_share import Share
from csi_driver.config.settings import Budget, NfsPool
from csi_driver.errors import Unavailable
from csi_driver.linux import nfs_child, nfs_mounts
from csi_driver.linux.nfs_options import bind_attributes, join_options, parse_nfs_options, share_options, volume_options

STAGE_SECONDS = 45.0
PUBLISH_SECONDS = 30.0
LOOK_SECONDS = 5.0
_GROUP_SECONDS = 24 * 3600.0  # the longest walk; one that stands still is given up much earlier

_ST_RDONLY = 1  # statvfs(3)
_FLAGS = "volume_capability.mount.mount_flags"


class NfsBackend:
    """A PoolBackend (base.py). `share_directory` is where this process mounts the share; its parents are entered by root alone."""

    def __init__(self, settings: NfsPool, share_directory: Path) -> None:
        """Raise InvalidArgument for options that no mount can have. Nothing is mounted yet."""
        self._settings = settings
        self._options = parse_nfs_options(settings.options, f"[pools.{settings.name}] options", of_pool=True)
        self._share = self._way_to(share_directory)
        self._squashed_to: int | None = None

    @property
    def name(self) -> str:
        return self._settings.name

    @property
    def node_local(self) -> bool:
        return False

    @property
    def remote(self) -> bool:
        return True

    @property
    def data_is_here(self) -> bool:
        return self._settings.data is not None

    @property
    def inline(self) -> bool:
        return self._settings.inline

    @property
    def budget(self) -> Budget:
        return self._settings.budget

    def topology(self) -> Mapping[str, str] | None:
        return None

    # --- the pool itself ----------------------------------------------------------------------------------------------------------

    def root(self) -> Path:
        return self._share.root()

    @property
    def generation(self) -> int:
        return self._share.generation

    def prepare(self) -> None:
        self._share.root()

    def renew(self) -> None:
        self._share.renew()

    def problem(self) -> str | None:
        return self._share.problem()

    @property
    def dormant(self) -> bool:
        return self._share.dormant

    def owner(self, directory: Path) -> int:
        """Make a file and look whose it is: that is what root is to this server."""
        if self.data_is_here:
            return os.geteuid()
        probe = directory / f".tmp.owner.{secrets.token_hex(8)}"
        descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            uid = os.fstat(descriptor).st_uid
        finally:
            os.close(descriptor)
            probe.unlink()
        self._squashed_to = uid if uid != os.geteuid() else None
        return uid

    @property
    def squashed_to(self) -> int | None:
        return self._squashed_to

    def shortcomings(self) -> Sequence[Shortcoming]:
        found = []
        if self._squashed_to is not None:
            found.append(
                Shortcoming(
                    "RootSquashed",
                    # CSI cuts at 128 bytes: what helps comes first.
                    f"pool {self.name}: root is uid {self._squashed_to} there; export it to the controller with `no_root_squash`: owners "
                    f"cannot be set or kept in copies, and files of others may be neither read nor removed ({self._source()})",
                )
            )
        if self._share.local_locks:
            found.append(
                Shortcoming(
                    "LocksLocal",
                    f"pool {self.name}: NFSv3 locks stay here (`nolock`, or no rpc.statd runs): run one controller only, or use `vers=4.2`",
                )
            )
        return found

    def space(self) -> Space:
        """Measure the filesystem behind the share. Raises Unavailable."""
        root = self.root()
        try:
            found = os.statvfs(root)
        except OSError as error:
            raise Unavailable(f"pool {self.name}: {self._source()} cannot be measured: {error.strerror}") from error
        return Space(
            total_bytes=found.f_blocks * found.f_frsize,
            used_bytes=(found.f_blocks - found.f_bfree) * found.f_frsize,
            available_bytes=found.f_bavail * found.f_frsize,
            total_inodes=found.f_files,
            available_inodes=found.f_favail,
            read_only=bool(found.f_flag & _ST_RDONLY),
        )

    def close(self) -> None:
        self._share.close()

    # --- on a node ----------------------------------------------------------------------------------------------------------------

    def check_flags(self, flags: Sequence[str], field: str) -> None:
        parse_nfs_options(flags, field)

    def source_of(self, directory: str) -> str:
        return self._source(directory)

    def stage(self, directory: str, target: Path, flags: Sequence[str], *, read_only: bool) -> None:
        """Mount a volume's directory. Raises what nfs_mounts.mount_nfs raises."""
        only = parse_nfs_options(["ro"], _FLAGS) if read_only else ()
        options = volume_options(self._options, parse_nfs_options(flags, _FLAGS), only)
        nfs_mounts.mount_nfs(self._source(directory), target, options, seconds=STAGE_SECONDS)

    def publish(self, staging: Path, target: Path, flags: Sequence[str], *, read_only: bool) -> None:
        """Bind a staged volume, in a child. Raises Unavailable, OSError."""
        attributes = bind_attributes(flags, _FLAGS)
        attributes = replace(attributes, read_only=attributes.read_only or read_only)
        nfs_child.bind(staging, target, attributes, PUBLISH_SECONDS)

    def is_staged(self, directory: str, target: Path, source: str = "") -> bool:
        return nfs_mounts.shows(target, source or self._source(directory))

    def mounts_of(self, directory: str) -> list[Path]:
        return nfs_mounts.mounts_of(self._source(directory))

    def look(self, mounted: Path) -> None:
        nfs_child.look(mounted, LOOK_SECONDS)

    def flush(self, mounted: Path, seconds: float) -> None:
        nfs_child.flush(mounted, seconds)

    def measure(self, mounted: Path, seconds: float) -> tuple[Used, Space]:
        found = nfs_child.measure(mounted, seconds)
        space = Space(
            total_bytes=found.total_bytes,
            used_bytes=found.total_bytes - found.available_bytes,
            available_bytes=found.available_bytes,
            total_inodes=found.total_inodes,
            available_inodes=found.available_inodes,
            read_only=False,
        )
        return Used(found.used_bytes, found.used_inodes, found.complete), space

    def change_group(self, mounted: Path, gid: int, should_stop: Callable[[int], bool]) -> int:
        return nfs_child.change_group(mounted, gid, _GROUP_SECONDS, should_stop)

    def _way_to(self, share_directory: Path) -> Share | ServedData:
        name, source, options = self._settings.name, self._source(), share_options(self._options)
        if self._settings.data is None:
            return Share(name, source, share_directory, options)
        to_look = join_options(options, parse_nfs_options(["ro"], "share"))
        return ServedData(name, source, self._settings.data, lambda: Share(name, source, share_directory, to_look))

    def _source(self, directory: str = "") -> str:
        return f"{self._settings.server}:{self._settings.path / directory}"
