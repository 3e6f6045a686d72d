"""What is in the pools, read from the records, beside whatever driver serves them: the ground of `tatami volumes` and `snapshots`.

Nothing is asked of the driver and nothing is changed. What cannot be read is shown as what it is: a damaged record is a row that says
so, and a pool that does not answer is named while the others are shown.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import click

from csi_driver.backends.impatience import Impatience
from csi_driver.errors import RecordDamaged, TatamiError, quoted
from csi_driver.volumes.handles import ID_PATTERN, SNAPSHOT, VOLUME, parse_handle
from csi_driver.volumes.model import SnapshotRecord, VolumeRecord
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.records import RecordFolder

_POOL_SECONDS = 60.0
"""How long a pool may take: mounting a share of a server that is away takes half a minute to fail."""

R = TypeVar("R", VolumeRecord, SnapshotRecord)


@dataclass(frozen=True)
class Found(Generic[R]):
    """One record with its pool; `damage` says why it cannot be read, and then there is only its id."""

    store: PoolStore
    id: str
    record: R | None = None
    damage: str = ""

    @property
    def handle(self) -> str:
        return self.store.handle_of(self.id)


@dataclass
class Survey(Generic[R]):
    """The records of all pools that answered, and why the others did not."""

    found: list[Found[R]] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)


def volumes_of(store: PoolStore) -> RecordFolder[VolumeRecord]:
    return store.volumes


def snapshots_of(store: PoolStore) -> RecordFolder[SnapshotRecord]:
    return store.snapshots


def choose_pools(pools: Pools, names: Sequence[str]) -> list[PoolStore]:
    """Return the pools of these names, all where there are none. Raises click.UsageError."""
    for name in names:
        if pools.find(name) is None:
            raise click.UsageError(f"--pool is {quoted(name)}: there are the pools {pools.names()}")
    return [store for store in pools if not names or store.name in names]


def survey(stores: Sequence[PoolStore], folder: Callable[[PoolStore], RecordFolder[R]]) -> Survey[R]:
    """Read all records, all pools at once. Never waits longer than a minute."""
    answer: Survey[R] = Survey()
    patience = Impatience(_POOL_SECONDS, max(1, len(stores)))

    def read(store: PoolStore) -> list[Found[R]] | str:
        try:
            return patience.ask(lambda: list(_read(store, folder(store))))
        except (TatamiError, OSError) as error:
            return str(error)

    with ThreadPoolExecutor(max(1, len(stores))) as threads:
        for store, outcome in zip(stores, threads.map(read, stores), strict=True):
            if isinstance(outcome, str):
                answer.silent[store.name] = outcome
            else:
                answer.found += outcome
    return answer


def find_one(
    pools: Pools, stores: Sequence[PoolStore], text: str, folder: Callable[[PoolStore], RecordFolder[R]], kind: str
) -> Found[R]:
    """Find what a person means by `text`: a handle, the name that Kubernetes gave it, or an id.

    Raises click.UsageError where there is none or more than one, Unavailable, FailedPrecondition for another node's, OSError.
    """
    found = Impatience(_POOL_SECONDS, 1).ask(lambda: list(_matches(pools, stores, text, folder, kind)))
    if not found:
        raise click.UsageError(f"there is no {kind} {quoted(text)} in {', '.join(store.name for store in stores)}")
    if len(found) > 1:
        raise click.UsageError(
            f"{quoted(text)} is several: {', '.join(each.handle for each in found)}; say which by its handle"
        )
    return found[0]


def _matches(
    pools: Pools, stores: Sequence[PoolStore], text: str, folder: Callable[[PoolStore], RecordFolder[R]], kind: str
) -> Iterator[Found[R]]:
    if parse_handle(text) is not None and (located := pools.locate(text)) is not None:
        yield from _read(located[0], folder(located[0]), [located[1]])
        return
    for store in stores:
        named = store.id_of(SNAPSHOT if kind == SNAPSHOT else VOLUME, text)
        wanted = {named, text} if ID_PATTERN.fullmatch(text) else {named}
        yield from _read(store, folder(store), sorted(wanted))


def _read(store: PoolStore, folder: RecordFolder[R], ids: Sequence[str] | None = None) -> Iterator[Found[R]]:
    for record_id in folder.ids() if ids is None else ids:
        try:
            record = folder.get(record_id)
        except RecordDamaged as damage:
            yield Found(store, record_id, damage=str(damage))
        else:
            if record is not None:
                yield Found(store, record_id, record)
