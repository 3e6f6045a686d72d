"""The data of a share on the machine that holds it: the controller works in the server's own directory, beside NFS.

There it can do what no client can: set quotas, share blocks, make subvolumes. Nodes mount the share as ever, so the directory must be
what the server shows them, and that is proven, not believed: the share is mounted for a moment, read-only, the directory's mode is set
to what it is, and the moment at which that happened (its ctime) must be seen through the share. A copy of the data has the same
records and the same identity, but not that moment. It needs no room, and leaves nothing wherever it is cut off.
"""

import errno
import logging
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_driver.backends.nfs_share import Share
from csi_driver.errors import TatamiError, Unavailable

_LOOKS = 3
"""How often is looked: somebody may change the directory between the two looks of one."""
_WAIT_SECONDS = 5.0  # for whoever looks already
_RETRY_SECONDS = 5.0  # what failed is not tried again before

_log = logging.getLogger(__name__)


class ServedData:
    """The directory `data` of this machine, once it is proven to be what `source` shows; stands where a Share would."""

    dormant = False
    local_locks = False

    def __init__(self, pool: str, source: str, data: Path, make_share: Callable[[], Share]) -> None:
        """`make_share` gives a share of `source` that is not mounted yet; it is closed after each look."""
        self._pool = pool
        self._source = source
        self._data = data
        self._make_share = make_share
        self._lock = threading.Lock()
        self._proven: tuple[int, int] | None = None
        self._failed_at = -_RETRY_SECONDS
        self._failure: str | None = None
        self.generation = 0

    def root(self) -> Path:
        """Return the directory. Raises Unavailable where it is not there, or not known to be what the server shows."""
        if self._found() != self._proven:  # another disk was mounted there, or none is any more
            self._prove()
        self._failure = None  # of another disk, which has gone again
        return self._data

    def problem(self) -> str | None:
        return self._failure

    def renew(self) -> None:
        """Do nothing: the directory is where it is."""

    def close(self) -> None:
        """Do nothing: nothing is held."""

    def _found(self) -> tuple[int, int]:
        try:
            status = self._data.stat()
        except OSError as error:
            raise Unavailable(f"pool {self._pool}: its `data`, {self._data}, cannot be seen here: {error.strerror}") from error
        return status.st_dev, status.st_ino

    def _prove(self) -> None:
        if time.monotonic() - self._failed_at < _RETRY_SECONDS:
            raise Unavailable(self._failure or f"pool {self._pool}: {self._data} was not looked at yet")
        with self._alone():
            found = self._found()
            if found == self._proven:
                return
            try:
                self._compare()
            except (TatamiError, OSError) as error:
                said = str(error) if isinstance(error, Unavailable) else f"pool {self._pool}: {self._source}: {error}"
                self._failed_at, self._failure = time.monotonic(), said
                raise Unavailable(said) from error
            self._proven, self._failure = found, None
            self.generation += 1
            _log.info(
                "data is what the server shows", extra={"pool": self._pool, "source": self._source, "at": str(self._data)}
            )

    def _compare(self) -> None:
        share = self._make_share()
        try:
            shown = share.root()
            if not any(self._same(shown) for _ in range(_LOOKS)):
                raise Unavailable(
                    f"pool {self._pool}: its `data`, {self._data}, is not the directory that {self._source} shows: what changes in the one "
                    "is not seen in the other; name the directory that the server exports, or leave `data` out"
                )
        finally:
            share.close()

    def _same(self, shown: Path) -> bool:
        with _read_only_passes():
            self._data.chmod(stat.S_IMODE(self._data.stat().st_mode))
        here, there = self._data.stat(), shown.stat()
        return (here.st_ino, here.st_ctime_ns) == (there.st_ino, there.st_ctime_ns)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=_WAIT_SECONDS):
            raise Unavailable(f"pool {self._pool}: {self._data} is being compared with {self._source}; try again")
        try:
            yield
        finally:
            self._lock.release()


@contextmanager
def _read_only_passes() -> Iterator[None]:
    """Let a filesystem be read-only: then nothing happens in it, and all that can be seen is the last change."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
