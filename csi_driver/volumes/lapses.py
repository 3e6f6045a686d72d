"""Lapses: limits that do not hold any more. Quotas were switched off, and btrfs forgets its limits then; or the pool was moved, file by
file, to another filesystem, where the mark of a volume is somebody else's. They are told, and as far as possible made good.
"""

import errno
from collections.abc import Iterator
from dataclasses import replace

from csi_driver.errors import NotFound
from csi_driver.linux import btrfs
from csi_driver.linux.filesystem_ids import filesystem_id
from csi_driver.volumes.limiters import NONE, SWITCHED_OFF, Stop, switched_on
from csi_driver.volumes.limits import FILES_UNLIMITED, NO_SUBVOLUME, Limits, held_by, is_here
from csi_driver.volumes.model import Limit, LimiterKind, LimitPolicy, Phase, VolumeRecord
from csi_driver.volumes.pool_layout import STAGING
from csi_driver.volumes.pool_store import PoolStore


class Lapses:
    """Finds and mends them, in all pools."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._renewed: dict[str, LimiterKind | None] = {}
        self._unsettled: set[str] = set()

    def lapse(self, store: PoolStore, record: VolumeRecord) -> str | None:
        """Say why a volume is not held to its size, although it was made so; None where it is, or nobody may ask.

        Raises NotFound, Unavailable, OSError.
        """
        held = held_by(record)
        if held is None or not store.backend.data_is_here:
            return None if held is not None else _broken_promise(record)
        limiter, mark = held
        with store.open_volume(record.directory) as top:
            if not is_here(record, top):
                return (
                    f"volume {record.handle} was held to its size by {limiter.kind} on another filesystem than the one that it lies on now; the "
                    "controller holds it again by itself, if quotas are on here"
                )
            try:
                is_held = limiter.limited_to(top, mark) is not None
                lost = not is_held and switched_on(top) is limiter
            except OSError as error:
                if error.errno != errno.EPERM and error.errno not in SWITCHED_OFF:
                    raise
                is_held, lost = error.errno == errno.EPERM, False  # EPERM: nobody may ask
        if is_held:
            return None
        if lost:
            return (
                f"volume {record.handle} lost its limit when quotas were switched off; the controller sets it again by itself"
            )
        return (
            f"quotas are off in pool {store.name}: {limiter.kind} holds volume {record.handle} no longer; switch them on again"
        )

    def kind_now(self, store: PoolStore) -> LimiterKind | None:
        """Ask the kernel by what a pool's volumes can be held now; None: by nothing. Raises Unavailable, OSError."""
        if not store.backend.data_is_here:
            return None
        with store.open(STAGING) as staging:
            limiter = switched_on(staging)
        return None if limiter is None else limiter.kind

    def lost(self, store: PoolStore) -> list[str]:
        """List, by id, the volumes whose limits were lost when quotas were switched off and on again: btrfs forgets them.

        All go at once, so while quotas are on as before one volume is asked for all; once limits were lost, all volumes are asked until none
        is without: one may have been in use when it was its turn. Raises Unavailable, OSError.
        """
        now, before = self.kind_now(store), self._renewed.get(store.name)
        self._renewed[store.name] = now
        if now is None:
            return []
        if now is before and store.name not in self._unsettled:
            sample = next((lost for _, lost in self._answers(store) if lost is not None), False)
            if not sample:
                return []
        found = [record_id for record_id, lost in self._answers(store) if lost]
        if found:
            self._unsettled.add(store.name)
        else:
            self._unsettled.discard(store.name)
        return found

    def _answers(self, store: PoolStore) -> Iterator[tuple[str, bool | None]]:
        """Say of each volume that was made with a limit whether it has lost it; None where that cannot be told."""
        for record in store.volumes.readable():
            if record.phase is Phase.READY and held_by(record) is not None:
                try:
                    yield record.id, self.lapse(store, record) is not None
                except (NotFound, OSError):  # a missing directory is health's to tell
                    yield record.id, None

    def renew(self, store: PoolStore, record: VolumeRecord, should_stop: Stop) -> VolumeRecord:
        """Hold a volume again that lost its limit, or came from another filesystem; return its record as it then has to be.

        The caller holds the volume. Raises FailedPrecondition (switched off), NotFound, WalkStopped, OSError.
        """
        with store.open_volume(record.directory) as top, store.open(STAGING) as staging:
            if is_here(record, top):
                self._limits.change(store, record, record.capacity_bytes)
                return record
            means, inodes, mark = self._limits.means_of(store), record.inodes or 0, None
            if means.limiter is not None:
                mark = means.limiter.hold_again(staging, top, record.capacity_bytes, inodes, should_stop)
                level = means.level if means.limiter.counts_inodes or not inodes else means.level + FILES_UNLIMITED
            if means.limiter is None or mark is None:
                reason = means.level.removeprefix(f"{NONE}: ") if means.limiter is None else NO_SUBVOLUME
                return replace(
                    record, limit=Limit(LimiterKind.NONE, f"{NONE}: the volume came from another filesystem; {reason}")
                )
            limit = Limit(means.limiter.kind, level, mark, filesystem_id(top))
            return replace(record, limit=limit, content_inode=btrfs.identity_of(top))


def _broken_promise(record: VolumeRecord) -> str | None:
    limit = record.limit
    if record.limit_policy is not LimitPolicy.REQUIRED or limit is None or limit.limiter is not LimiterKind.NONE:
        return None  # none was promised, or an image holds itself
    return f"volume {record.handle} is not held to its size ({limit.level}), and its class says `limit: required`"
