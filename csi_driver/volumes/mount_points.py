"""Where mounts may be made on a node, and the empty directories and files that they are made on."""

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from csi_driver.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from csi_driver.linux.mountinfo import Mount

_TARGET_MODE = 0o750
_FILE_MODE = 0o640
_PATH_MAX, _NAME_MAX = 4096, 255  # limits.h


class MountPoints:
    """Judges the paths that requests name. `kubelet_dir` is the only place where mounts are made, `ours` are never among them."""

    def __init__(self, kubelet_dir: Path, ours: Callable[[], Iterable[Path]]) -> None:
        self._kubelet_dir = kubelet_dir
        self._ours = ours

    def check(self, field: str, path: str) -> Path:
        """Return the path, normal, or raise InvalidArgument naming `field`."""
        normal = Path(os.path.normpath(path))
        ours = tuple(self._ours())
        if not normal.is_relative_to(self._kubelet_dir) or normal == self._kubelet_dir or any(map(normal.is_relative_to, ours)):
            raise InvalidArgument.field(
                field,
                path,
                f"a path below the kubelet's directory {self._kubelet_dir} (--kubelet-dir), outside the driver's own directories",
            )
        encoded = os.fsencode(normal)
        if b"\0" in encoded or len(encoded) >= _PATH_MAX or any(len(part) > _NAME_MAX for part in encoded.split(b"/")):
            raise InvalidArgument.field(
                field, path, f"a path without NUL, of less than {_PATH_MAX} bytes, {_NAME_MAX} in each component"
            )
        # The last component is not followed: a mount may hang there, and a link in its place is refused as no directory.
        real = Path(os.path.realpath(normal.parent)) / normal.name
        if not real.is_relative_to(os.path.realpath(self._kubelet_dir)) or any(map(real.is_relative_to, ours)):
            raise InvalidArgument.field(field, path, f"a path that no symbolic link leads elsewhere, as this one to {real}")
        return normal


def foreign(field: str, path: Path, mounted: Mount) -> AlreadyExists:
    """Say that something else is mounted there."""
    return AlreadyExists(
        f"{field} {path} has another mount on it: {mounted.root} of {mounted.source} ({mounted.fs_type}); it is left as it is"
    )


def make_empty_directory(field: str, path: Path) -> None:
    """Make `path` (its parent exists) or find it there, empty. Raises FailedPrecondition for anything else."""
    try:
        path.mkdir(mode=_TARGET_MODE)
    except FileExistsError:
        pass
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FailedPrecondition(
            f"{field} {path}: its parent directory does not exist; the container orchestrator makes it"
        ) from error
    else:
        return
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise FailedPrecondition(f"{field} {path} exists and is no directory; it is left as it is")
    with os.scandir(path) as entries:
        if next(entries, None) is not None:
            raise FailedPrecondition(
                f"{field} {path} is not empty: a mount would hide the files in it; they are left as they are"
            )


def make_empty_file(field: str, path: Path) -> None:
    """Make `path` (its parent exists) or find it there, empty: what a device's node is bound onto. Raises FailedPrecondition."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE))
    except FileExistsError:
        pass
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FailedPrecondition(
            f"{field} {path}: its parent directory does not exist; the container orchestrator makes it"
        ) from error
    else:
        return
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size:
        raise FailedPrecondition(f"{field} {path} exists and is no empty file; it is left as it is")


def remove_empty(path: Path) -> None:
    """Remove `path` if it is an empty directory or file; else leave it: never a recursive removal, and the kubelet names what it finds."""
    try:
        if stat.S_ISREG((status := path.lstat()).st_mode):
            if not status.st_size:
                path.unlink()
        else:
            path.rmdir()
    except OSError:
        return
