"""What attempts build: each in a directory of its own in `.csi/staging`, named by its record's id and token.

So an attempt that another has taken over meanwhile finds its directory gone rather than another's in its place, and whatever is given up,
is given up by name: into the trash, by a rename.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from csi_driver.errors import LockLost
from csi_driver.linux.project_limits import lift_limit
from csi_driver.volumes.pool_layout import STAGING
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.trash import discard

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def staging_name(record_id: str, token: str) -> str:
    """Name what the attempt `token` at `record_id` builds."""
    return f"{record_id}.{token}"


@contextmanager
def open_staged(staging: int, name: str) -> Iterator[int]:
    """Open what this attempt has built. Raises LockLost where it has been thrown away."""
    try:
        descriptor = os.open(name, _DIRECTORY, dir_fd=staging)
    except FileNotFoundError as error:
        raise LockLost(
            f"what was being made as {name} was thrown away: another controller has taken it over; try again"
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def drop_empty_staging(store: PoolStore, record_id: str, token: str) -> None:
    """Remove the empty directory that the attempt `token` at `record_id` left in staging; none is fine."""
    name = staging_name(record_id, token)
    with store.open(STAGING) as staging:
        if store.backend.data_is_here:
            lift_limit(staging, name)
        try:
            os.rmdir(name, dir_fd=staging)
        except FileNotFoundError:
            return
        except OSError:  # a subvolume, before Linux 4.18
            discard(store, staging, name, record_id)


def trash_staging(store: PoolStore, record_id: str, token: str = "") -> None:
    """Move what attempts at `record_id` left in staging into the trash: the one with this token, or, without, all."""
    with store.open(STAGING) as staging:
        for name in os.listdir(staging):
            if name.startswith(staging_name(record_id, token)):
                if store.backend.data_is_here:
                    lift_limit(staging, name)
                discard(store, staging, name, record_id)
