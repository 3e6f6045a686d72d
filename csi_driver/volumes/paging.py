"""Pages that neither repeat nor miss an entry while entries come and go.

Entries are handed out in the order of (pool, id). A token names the last entry that was handed out, and the next page begins behind
it whether or not that entry still exists: nothing has to be remembered between two calls, and no call can be confused by another.
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from csi_driver.errors import OperationPending, quoted
from csi_driver.volumes.handles import ID_PATTERN
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.requests import Page

E = TypeVar("E")


def take_page(
    pools: Pools,
    page: Page,
    ids: Callable[[PoolStore], list[str]],
    read: Callable[[PoolStore, list[str]], Iterable[E]],
    name: Callable[[E], str],
) -> tuple[list[E], str]:
    """Return the entries of one page and the token of the next ("" where there is none).

    `ids` lists a pool's ids, sorted; `read` reads some of them (and may leave some out); `name` says an entry's id.
    Raises OperationPending (ABORTED, CSI spec "ListVolumes Errors") for a token that is not ours.
    """
    entries: list[E] = []
    places: list[tuple[str, str]] = []
    for store, entry in _from(pools, _decode(page.token), ids, read):
        if page.max_entries and len(entries) == page.max_entries:
            return entries, _encode(*places[-1])
        entries.append(entry)
        places.append((store.name, name(entry)))
    return entries, ""


def _from(
    pools: Pools,
    after: tuple[str, str],
    ids: Callable[[PoolStore], list[str]],
    read: Callable[[PoolStore, list[str]], Iterable[E]],
) -> Iterator[tuple[PoolStore, E]]:
    for store in pools:
        if store.name < after[0]:
            continue
        wanted = iter(i for i in ids(store) if (store.name, i) > after)
        while chunk := list(islice(wanted, 128)):  # not all 10,000 records are read for a page of a hundred
            for entry in read(store, chunk):
                yield store, entry


def _encode(pool: str, record_id: str) -> str:
    return base64.urlsafe_b64encode(json.dumps([1, pool, record_id]).encode()).decode()


def _decode(token: str) -> tuple[str, str]:
    if not token:
        return "", ""
    try:
        version, pool, record_id = json.loads(base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True))
        if version == 1 and isinstance(pool, str) and isinstance(record_id, str) and ID_PATTERN.fullmatch(record_id):
            return pool, record_id
    except (ValueError, TypeError, binascii.Error, UnicodeError):
        pass
    raise OperationPending(f"starting_token is {quoted(token)}: not a token that this driver gave; start again without one")
