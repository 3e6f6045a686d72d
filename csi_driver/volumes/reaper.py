"""The reaper: removes for good what deletions put into the trash.

Data in the trash comes there in one step, and nobody will touch it again; so no lock is needed, which a later namesake would meet.
Nor is one taken against the reapers of other controllers, though on NFS they stumble over what this one has removed, and say so: whoever holds
a lock on a server that dies cannot end, not by SIGKILL either, before the server is back; and this work goes on for long.
The record of its deletion, if a crash left it there, goes first: it stands for data that is still in place.
"""

import logging
import os
from collections.abc import Callable

from csi_driver.errors import TatamiError
from csi_driver.linux.tree_removal import remove_tree
from csi_driver.linux.walk import WalkStopped
from csi_driver.volumes.pool_layout import TRASH
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.trash import data_name, drop_record, is_record_name

_log = logging.getLogger(__name__)


class Reaper:
    """Empties the trash of a pool. `should_stop` is asked between entries and inside large ones; so is whether the pool answers."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop

    def empty(self, store: PoolStore) -> tuple[int, int]:
        """Remove all data. Returns how many entries were removed, and how many could not be; those that were left for later are neither."""
        removed = failed = 0

        def should_stop() -> bool:
            return self._should_stop() or store.backend.problem() is not None

        with store.open(TRASH) as trash:
            names = sorted(name for name in os.listdir(trash) if not is_record_name(name))
            # Listed after the data, which comes later: no data is seen here whose record is not.
            records = {data_name(name): name for name in os.listdir(trash) if is_record_name(name)}
            for name in names:
                if should_stop():
                    break
                try:
                    if name in records:
                        drop_record(trash, records[name])
                    remove_tree(trash, name, should_stop=should_stop)
                    removed += 1
                except WalkStopped:
                    break
                except (TatamiError, OSError) as error:
                    failed += 1
                    _log.warning("the trash cannot be emptied", extra={"pool": store.name, "entry": name, "error": str(error)})
        return removed, failed
