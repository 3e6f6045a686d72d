"""Limits: volumes held to their size, as well as their pool can, and said honestly.

What a pool can is found out by trying (limiters.py), when it is first asked for and again when quotas are switched on or off.
"""

import logging
import threading

from csi_driver.errors import FailedPrecondition, NotFound, OutOfRange, ResourceExhausted
from csi_driver.linux.filesystem_ids import filesystem_id
from csi_driver.volumes.answers import Usage, UsageSource, VolumeStats
from csi_driver.volumes.limiters import HARD, LIMITERS, NONE, SWITCHED_OFF, Limiter, Means, find_means, switched_on
from csi_driver.volumes.model import Form, Layout, Limit, LimiterKind, LimitPolicy, VolumeRecord
from csi_driver.volumes.pool_layout import STAGING
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.requests import ClassParameters

NO_SUBVOLUME = "what lies there is no btrfs subvolume"
FILES_UNLIMITED = "; the number of files is not limited"
_IMAGE_INODES = "an image limits bytes, not the number of files, and the class says `inodes` and `limit: required`"
_log = logging.getLogger(__name__)


class ImageHolding:
    """An image is held by its own size: nothing has to be set."""

    def __init__(self, record: VolumeRecord) -> None:
        self.limit = Limit(LimiterKind.IMAGE, HARD + (FILES_UNLIMITED if record.inodes else ""))

    def begin(self, top: int) -> None:
        """Do nothing."""

    def finish(self, top: int) -> None:
        """Do nothing."""

    def is_outgrown(self, copied_bytes: int) -> bool:  # noqa: ARG002
        return False


class Holding:
    """Holds one volume that is being made (captures.py, `Hold`); once that has begun, `limit` says how."""

    def __init__(self, means: Means, record: VolumeRecord) -> None:
        self._means = means
        self._record = record
        self.limit = Limit(LimiterKind.NONE, means.level)

    def begin(self, top: int) -> None:
        """Set the limit. Raises ResourceExhausted where the volume must be held and cannot be, OSError."""
        limiter, level, record = self._means.limiter, self._means.level, self._record
        if limiter is None:
            return
        mark = limiter.hold(top, record.capacity_bytes, record.inodes or 0)
        if mark is None:
            nothing = Means(None, f"{NONE}: {NO_SUBVOLUME}")
            _insist(record.pool, nothing, record.limit_policy, record.inodes)
            self.limit = Limit(LimiterKind.NONE, nothing.level)
            return
        if record.inodes and not limiter.counts_inodes:
            level += FILES_UNLIMITED
        self.limit = Limit(limiter.kind, level, mark, filesystem_id(top))

    def finish(self, top: int) -> None:
        """Raise OutOfRange where the volume has more than it may: a snapshot asks for no room, and ext4 lets the driver pass."""
        if self._means.limiter is None or self.limit.mark is None:
            return
        used = self._means.limiter.usage(top, self.limit.mark)
        if used is not None and used[0] > self._record.capacity_bytes:
            raise OutOfRange(
                f"the content source holds {used[0]} bytes, but the volume is to have {self._record.capacity_bytes}"
            )

    def is_outgrown(self, copied_bytes: int) -> bool:  # noqa: ARG002 - the filesystem counts better
        return False


class Limits:
    """What all pools have to hold volumes with, and the limits that are set."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._known: dict[str, Means] = {}

    # --- before there is a volume -------------------------------------------------------------------------------------------------

    def means_of(self, store: PoolStore) -> Means:
        """Say what new volumes of a pool can be held with. Raises OSError where that cannot be found out now (ENOSPC), Unavailable."""
        if not store.backend.data_is_here:
            return Means(
                None, f"{NONE}: over NFS nobody can set a quota (the pool's `data` says where it lies beside the controller)"
            )
        with self._guard:
            known = self._known.get(store.name)
        with store.open(STAGING) as staging:
            if known is not None and known.limiter is switched_on(staging):
                return known
            found = find_means(staging, over_nfs=store.backend.remote)
        with self._guard:
            self._known[store.name] = found
        _log.info("what holds volumes to their size", extra={"pool": store.name, "limit": found.level})
        return found

    def refusal(self, store: PoolStore, parameters: ClassParameters, form: Form) -> str | None:
        """Say why the pool can have no volumes of this class in this form; None where it can. Raises as `means_of`."""
        if parameters.limit is not LimitPolicy.REQUIRED:
            return None
        if form.layout is Layout.IMAGE:
            return _IMAGE_INODES if parameters.inodes else None
        return _lack(store.name, self.means_of(store), parameters.inodes)

    # --- one volume ---------------------------------------------------------------------------------------------------------------

    def holding(self, store: PoolStore, record: VolumeRecord) -> Holding | ImageHolding:
        """Prepare to hold a volume that is being made. Raises ResourceExhausted where it must be held and cannot."""
        if record.form.layout is Layout.IMAGE:
            if record.inodes and record.limit_policy is LimitPolicy.REQUIRED:
                raise ResourceExhausted(_IMAGE_INODES)
            return ImageHolding(record)
        means = self.means_of(store)
        _insist(store.name, means, record.limit_policy, record.inodes)
        return Holding(means, record)

    def change(self, store: PoolStore, record: VolumeRecord, size_bytes: int) -> None:
        """Let a volume have `size_bytes`, if it is held. Raises FailedPrecondition where its quota was switched off, NotFound."""
        held = held_by(record)
        if held is None:
            return
        limiter, mark = held
        with store.open_volume(record.directory) as top:
            if store.backend.data_is_here and not is_here(record, top):
                return  # it is held anew, to what the record says then (`renew`)
            try:
                limiter.change(top, mark, size_bytes, record.inodes or 0)
            except OSError as error:
                if error.errno not in SWITCHED_OFF:
                    raise
                raise FailedPrecondition(
                    f"volume {record.handle} is held to its size by {limiter.kind}, which is switched off in pool {store.name} "
                    f"({error.strerror}): switch it on again"
                ) from error

    def most_bytes(self, store: PoolStore, record: VolumeRecord) -> int | None:
        """Say how many bytes of data a volume can have just now; None where nothing is promised, or it is not counted file by file.

        Privileged processes pass ext4's limit, so it may have more than it should. Raises NotFound, Unavailable, OSError.
        """
        if record.limit is None or record.limit.limiter is not LimiterKind.PROJECT_QUOTA:
            return None  # btrfs counts what is shared, or compressed, as what it takes
        stats = self.stats(store, record)
        return None if stats is None or stats.bytes.used is None else max(record.capacity_bytes, stats.bytes.used)

    def release(self, store: PoolStore, record: VolumeRecord) -> None:
        """Let go of what holds a volume, before its data is removed. A limit that cannot be lifted keeps nobody from deleting."""
        held = held_by(record)
        if held is None:
            return
        limiter, mark = held
        try:
            try:
                with store.open_volume(record.directory) as top:
                    if is_here(record, top):
                        limiter.release(top, mark)
            except NotFound:  # somebody removed it by hand; its mark is known to be ours on its own filesystem only
                with store.open_root() as root:
                    if record.limit is not None and record.limit.filesystem == filesystem_id(root):
                        limiter.release(root, mark)
        except OSError as error:
            _log.warning("a limit cannot be lifted", extra={"pool": store.name, "volume": record.handle, "error": str(error)})

    def stats(self, store: PoolStore, record: VolumeRecord) -> VolumeStats | None:
        """Return a volume's usage as its quota counts it; None where none does, or not rightly. Raises NotFound, Unavailable."""
        held = held_by(record)
        if held is None or not store.backend.data_is_here:
            return None
        limiter, mark = held
        with store.open_volume(record.directory) as top:
            try:
                used = limiter.usage(top, mark) if is_here(record, top) else None
            except OSError as error:
                if error.errno not in SWITCHED_OFF:
                    raise
                used = None
        if used is None:
            return None
        space = store.space()
        return VolumeStats(
            bytes=_bounded(used[0], record.capacity_bytes, space.available_bytes),
            inodes=None if used[1] is None else _bounded(used[1], record.inodes, space.available_inodes),
            source=UsageSource(limiter.kind.value),
        )


def _bounded(used: int, limit: int | None, available: int) -> Usage:
    if limit is None:
        return Usage(used, used + available, available)
    return Usage(used, limit, min(available, max(0, limit - used)))


def held_by(record: VolumeRecord) -> tuple[Limiter, int] | None:
    """Return what a volume was held by when it was made, or was held anew, and its mark; None where nothing held it."""
    if record.limit is None or record.limit.mark is None:
        return None
    return LIMITERS[record.limit.limiter], record.limit.mark


def is_here(record: VolumeRecord, top: int) -> bool:
    """Tell whether what holds a volume is on the filesystem that it lies on: else the mark is another's, whom we must not touch."""
    held = held_by(record)
    assert held is not None
    assert record.limit is not None
    return held[0].has(top, held[1], record.limit.filesystem, record.content_inode)


def _lack(pool: str, means: Means, inodes: int | None) -> str | None:
    if means.limiter is None:
        return f"pool {pool} can hold no volume to its size ({means.level}), and the class says `limit: required`"
    if inodes and not means.limiter.counts_inodes:
        return f"pool {pool} holds volumes by {means.limiter.kind}, which counts no files, and the class says `inodes` and `limit: required`"
    return None


def _insist(pool: str, means: Means, policy: LimitPolicy, inodes: int | None) -> None:
    if policy is LimitPolicy.REQUIRED and (lack := _lack(pool, means, inodes)):
        raise ResourceExhausted(lack)
