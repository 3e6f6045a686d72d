"""The control directory of a pool, `.csi`: made once, and known again by its identity.

Its `format.json` says whose pool this is, in which format, and which: the identity is drawn when the directory is made, and never changes.
A node remembers it, for a pool directory that has lost it is a disk that is not mounted. What does not fit is refused before anything is
made in there.
"""

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from csi_driver.backends.base import PoolBackend
from csi_driver.errors import FailedPrecondition, RecordDamaged, Unavailable
from csi_driver.linux import files
from csi_driver.volumes.pool_layout import CONTROL, FOLDERS, FORMAT_VERSION

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class ControlDirectory:
    """Makes and checks the `.csi` of one pool."""

    def __init__(self, backend: PoolBackend, driver: str) -> None:
        self._backend = backend
        self._driver = driver

    def make(self, root: Path, expected_identity: str | None) -> str:
        """Make what is missing of `.csi` below `root`, check the format, and return the pool's identity.

        Raises Unavailable where it is not the expected one, FailedPrecondition for a newer format, another driver's or pool's place,
        RecordDamaged, OSError.
        """
        control = root / CONTROL
        identity = self._read(control)
        if expected_identity is not None and identity != expected_identity:
            found = f"it has identity {identity}" if identity else f"there is no {CONTROL}/format.json"
            raise Unavailable(
                f"pool {self._backend.name} at {root} is not the pool that this node knows (identity {expected_identity}; {found}): is its disk "
                "mounted? If the pool was meant to be made anew, remove the pool from this node's `pools.json` and restart the driver"
            )
        control.mkdir(mode=0o700, exist_ok=True)
        status = control.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid not in (os.geteuid(), self._backend.owner(control)):
            raise FailedPrecondition(f"{control} must be a directory that belongs to the user the driver runs as")
        if stat.S_IMODE(status.st_mode) != 0o700:
            control.chmod(0o700)
        for folder in FOLDERS:
            (control / folder).mkdir(mode=0o700, exist_ok=True)
        if identity is None:
            identity = self._write(control)
        return identity

    def _read(self, control: Path) -> str | None:
        try:
            with _opened(str(control)) as folder:
                body = json.loads(files.read_bounded(folder, "format.json", 65536))
            version, identity = body["schema_version"], body["pool_id"]
            owner = body["driver"], body["pool"]
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise FailedPrecondition(f"{control} must be a directory that belongs to the user the driver runs as") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RecordDamaged(f"{control}/format.json is damaged: {error!r}") from error
        if version != FORMAT_VERSION:
            raise FailedPrecondition(
                f"pool {self._backend.name} at {control.parent} is in format {version}, this driver knows {FORMAT_VERSION}: use the newer driver"
            )
        if owner != (self._driver, self._backend.name):
            raise FailedPrecondition(
                f"{control.parent} is pool {owner[1]} of driver {owner[0]}: it cannot be pool {self._backend.name} of {self._driver} as well, "
                "for volume handles carry the pool's name"
            )
        return str(identity)

    def _write(self, control: Path) -> str:
        body = {
            "schema_version": FORMAT_VERSION,
            "pool_id": secrets.token_hex(16),
            "driver": self._driver,
            "pool": self._backend.name,
        }
        # FileExistsError: another process of this node was quicker, and its word holds.
        with _opened(str(control)) as folder, suppress(FileExistsError):
            files.create_exclusively(folder, "format.json", json.dumps(body, indent=1).encode() + b"\n", lambda _: False)
        return self._read(control) or ""


@contextmanager
def _opened(path: str) -> Iterator[int]:
    descriptor = os.open(path, _DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
