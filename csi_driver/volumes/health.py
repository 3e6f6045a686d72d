"""Health: what is wrong with volumes and pools, as far as it can be seen from here, and nothing that is guessed."""

from collections.abc import Iterable, Sequence

from csi_driver.errors import NotFound, RecordDamaged, TatamiError, Unavailable, quoted
from csi_driver.volumes.answers import HealthEntry, HealthLevel, VolumeHealth
from csi_driver.volumes.images import look_at_image
from csi_driver.volumes.lapses import Lapses
from csi_driver.volumes.model import Layout, Phase, VolumeRecord
from csi_driver.volumes.paging import take_page
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.promises import Promises
from csi_driver.volumes.requests import Page

_FULL_PERCENT = 98


class Health:
    """The HealthService (services.py)."""

    def __init__(self, pools: Pools, promises: Promises, lapses: Lapses) -> None:
        self._pools = pools
        self._promises = promises
        self._lapses = lapses

    # --- volumes ------------------------------------------------------------------------------------------------------------------

    def volume(self, handle: str) -> VolumeHealth:
        """Say what is wrong with a volume; no entries where nothing is known to be. Raises NotFound."""
        located = self._pools.locate(handle)
        if located is None:
            raise NotFound(f"volume {quoted(handle)} does not exist")
        store, record_id = located
        unreachable = pool_problems(store)
        if any(entry.level is HealthLevel.INACCESSIBLE for entry in unreachable):
            return VolumeHealth(handle, tuple(unreachable))
        try:
            record = store.volumes.get(record_id)
        except RecordDamaged as damage:
            return VolumeHealth(handle, (_damaged(damage), *unreachable))
        if record is None or record.phase is not Phase.READY:
            raise NotFound(f"volume {quoted(handle)} does not exist")
        return VolumeHealth(handle, (*volume_problems(store, record, self._lapses), *unreachable))

    def list(self, page: Page) -> tuple[Sequence[VolumeHealth], str]:
        """Return one page of the volumes that are not well, and the token of the next."""

        def read(store: PoolStore, ids: Sequence[str]) -> Iterable[tuple[str, VolumeHealth]]:
            common = tuple(pool_problems(store))
            for record_id in ids:
                handle = store.handle_of(record_id)
                try:
                    record = store.volumes.get(record_id)
                except RecordDamaged as damage:
                    yield record_id, VolumeHealth(handle, (_damaged(damage), *common))
                    continue
                if record is None or record.phase is not Phase.READY or record.ephemeral:
                    continue
                if entries := (*volume_problems(store, record, self._lapses), *common):
                    yield record_id, VolumeHealth(handle, entries)

        entries, token = take_page(self._pools, page, lambda store: store.volumes.ids(), read, lambda entry: entry[0])
        return [health for _, health in entries], token

    # --- pools --------------------------------------------------------------------------------------------------------------------

    def storage(self) -> Sequence[HealthEntry]:
        """Say what is wrong with the pools as this process reaches them."""
        return [
            entry
            for store in self._pools
            for entry in (*pool_problems(store), *promise_problems(self._promises, self._lapses, store))
        ]

    def ready(self) -> str | None:
        """Return None where every pool can be served, else the first reason why not.

        Touches no volume and asks no server: the kubelet kills who is not ready, and that brings no server back.
        """
        for store in self._pools:
            if store.backend.remote:
                continue
            for entry in pool_problems(store):
                if entry.level is HealthLevel.INACCESSIBLE:
                    return entry.message
        return None


def volume_problems(store: PoolStore, record: VolumeRecord, lapses: Lapses) -> list[HealthEntry]:
    """Look at the volume's directory."""
    try:
        with store.open_volume(record.directory) as top:
            if record.form.layout is Layout.IMAGE:
                look_at_image(top)
        lapse = lapses.lapse(store, record)
        return [HealthEntry(HealthLevel.DEGRADED, "LimitOff", lapse)] if lapse else []
    except FileNotFoundError:
        message = f"the image of volume {record.handle} is missing from {record.directory} of pool {store.name}"
        return [HealthEntry(HealthLevel.DATA_LOSS, "ImageMissing", message)]
    except NotFound:
        return [
            HealthEntry(
                HealthLevel.DATA_LOSS, "DirectoryMissing", f"directory {record.directory} is missing from pool {store.name}"
            ),
        ]
    except OSError as error:
        return [
            HealthEntry(
                HealthLevel.INACCESSIBLE, "DirectoryUnreadable", f"{record.directory} of pool {store.name}: {error.strerror}"
            )
        ]


def pool_problems(store: PoolStore) -> list[HealthEntry]:
    """Look at the pool: can it be reached, written to, and is there room. One whose way was let go, or never made, is left so."""
    backend = store.backend
    short = [HealthEntry(HealthLevel.DEGRADED, found.reason, found.message) for found in backend.shortcomings()]
    if (silent := backend.problem()) is not None:
        return [HealthEntry(HealthLevel.INACCESSIBLE, "PoolUnreachable", silent), *short]
    if backend.dormant or (backend.remote and backend.generation == 0):
        return short
    try:
        space = store.space()
        with store.open("volumes"):
            pass
    except (Unavailable, OSError) as error:
        message = str(error) if isinstance(error, TatamiError) else f"pool {store.name}: {error}"
        return [HealthEntry(HealthLevel.INACCESSIBLE, "PoolUnreachable", message)]
    problems = short
    if space.read_only:
        problems.append(
            HealthEntry(HealthLevel.DEGRADED, "PoolReadOnly", f"pool {store.name} is mounted read-only: nothing can be written")
        )
    if space.available_bytes * 100 < space.total_bytes * (100 - _FULL_PERCENT):
        message = f"pool {store.name} has {space.available_bytes} of {space.total_bytes} bytes left"
        problems.append(HealthEntry(HealthLevel.DEGRADED, "PoolFull", message))
    if space.total_inodes and space.available_inodes * 100 < space.total_inodes * (100 - _FULL_PERCENT):
        message = f"pool {store.name} has {space.available_inodes} of {space.total_inodes} inodes left"
        problems.append(HealthEntry(HealthLevel.DEGRADED, "PoolOutOfInodes", message))
    return problems


def promise_problems(promises: Promises, lapses: Lapses, store: PoolStore) -> list[HealthEntry]:
    """Look at what a pool of this machine has promised, and by what it keeps that."""
    if not store.backend.data_is_here:
        return []  # every node asks: all of them would list a server's records again and again
    try:
        room = promises.room(store)
        off = room.limiters - {lapses.kind_now(store)} if room.limiters else frozenset()
    except (TatamiError, OSError):
        return []  # that it cannot be reached is said already
    problems = []
    if room.promised_bytes > room.most_bytes:
        message = f"pool {store.name} has promised {room.promised_bytes} of {room.most_bytes} bytes: it makes no more volumes"
        problems.append(HealthEntry(HealthLevel.DEGRADED, "PoolOverpromised", message))
    if off:
        message = f"pool {store.name}: quotas are off ({', '.join(sorted(off))}): volumes can outgrow their size until they are on again"
        problems.append(HealthEntry(HealthLevel.DEGRADED, "LimitsOff", message))
    if room.unknown_records:
        message = (
            f"pool {store.name}: {room.unknown_records} volume record(s) cannot be read; what they promised is not counted"
        )
        problems.append(HealthEntry(HealthLevel.DEGRADED, "PromisesUnknown", message))
    return problems


def _damaged(damage: RecordDamaged) -> HealthEntry:
    return HealthEntry(HealthLevel.INACCESSIBLE, "RecordDamaged", f"{damage}; the data is left alone")
