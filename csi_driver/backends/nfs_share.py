"""A pool's share, mounted once for the controller: when it is needed, for as long as it is used, and watched meanwhile.

Its server may die at any time. Most calls get ETIMEDOUT after half a minute then (share_options), but one that opens a file after the
lease has run out waits until the server is back (nfs4_client_recover_expired_lease), and only SIGKILL would end it. So a thread of
each mounted share asks the server every two seconds, and once an answer is four seconds late, nobody else goes near it: `root`
raises at once until the server has answered again. A dead server costs the few threads that were on their way, and no more.
"""

import contextvars
import errno
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from csi_driver.backends.base import in_background
from csi_driver.errors import DeadlineExceeded, TatamiError, Unavailable
from csi_driver.linux import mounts
from csi_driver.linux.mount_table import MountTable
from csi_driver.linux.mountinfo import Mount
from csi_driver.linux.nfs_mounts import LockManagerMissing, mount_nfs
from csi_driver.linux.nfs_options import NfsOption, parse_nfs_options

ASK_SECONDS = 2.0
LATE_SECONDS = 4.0
IDLE_SECONDS = 600.0
"""How long nobody must have used a share for it to be let go."""
MOUNT_SECONDS = 15.0
_WAIT_SECONDS = 5.0  # for whoever mounts or unmounts it already
_RETRY_SECONDS = 5.0  # a mount that failed is not tried again before

_LOCAL_LOCKS = frozenset({"nolock", "local_lock=all", "local_lock=posix", "local_lock=flock"})

_log = logging.getLogger(__name__)


class Share:
    """One mount of `source` at `directory`, for all threads of this process."""

    def __init__(self, pool: str, source: str, directory: Path, options: Sequence[NfsOption]) -> None:
        self._pool = pool
        self._source = source
        self._directory = directory
        self._options = options
        self._table = MountTable(directory)
        self._lock = threading.Lock()  # held by whoever mounts or unmounts
        self._stop = threading.Event()
        self._mounted: Mount | None = None
        self._used = 0.0
        self._failed_at = -_RETRY_SECONDS
        self._failure: str | None = None
        self._asked_at: float | None = None  # monotonic seconds, while an answer is outstanding
        self._silent_since: float | None = None
        self.generation = 0
        self.local_locks = False
        """Whether NFSv3's locks are kept on this machine alone: it runs no rpc.statd, or an option says so."""

    def root(self) -> Path:
        """Return where the share is mounted. Raises Unavailable: at once where its server is known not to answer."""
        self._refuse_silent()
        if not self._is_mounted():
            self._mount()
        if not in_background.get():
            self._used = time.monotonic()
        return self._directory

    def problem(self) -> str | None:
        """Say what is known against the server, without asking it."""
        try:
            self._refuse_silent()
        except Unavailable as silent:
            return str(silent)
        return self._failure

    @property
    def dormant(self) -> bool:
        return self.generation > 0 and self._mounted is None

    def renew(self) -> None:
        """Mount the share again where its root is stale. Raises Unavailable."""
        seen = self.generation
        if not self._is_stale():
            return
        with self._alone():
            if self.generation == seen:
                _log.warning("a share is stale and is mounted again", extra={"pool": self._pool, "source": self._source})
                self._detach()
                self._mount_locked()

    def close(self) -> None:
        """Unmount the share, lazily if it has to be, and stop watching it."""
        self._stop.set()
        with suppress(Unavailable, OSError, DeadlineExceeded), self._alone():
            if self._is_mounted():
                mounts.unmount_all(self._directory, _WAIT_SECONDS)
            self._mounted = None
            self._table.close()

    # --- mounting -----------------------------------------------------------------------------------------------------------------

    def _is_mounted(self) -> bool:
        top, own = self._table.top(), self._mounted
        # The kernel gives a free id again to the next mount, so the id alone does not tell.
        return top is not None and own is not None and _identity(top) == _identity(own)

    def _mount(self) -> None:
        if time.monotonic() - self._failed_at < _RETRY_SECONDS:
            raise Unavailable(f"pool {self._pool}: {self._failure}")
        with self._alone():
            if not self._is_mounted():
                self._mount_locked()

    def _mount_locked(self) -> None:
        if self._stop.is_set():
            raise Unavailable(f"pool {self._pool}: the driver is shutting down")
        try:
            self._mounted = self._mount_anew()
            self.local_locks = not _LOCAL_LOCKS.isdisjoint(self._mounted.super_options)
        except (TatamiError, OSError) as error:
            # Whatever it is, it is the pool's trouble: a missing share must not be taken for a missing volume.
            self._failed_at, self._failure = time.monotonic(), str(error)
            raise Unavailable(f"pool {self._pool}: {error}") from error
        self._failure = self._silent_since = self._asked_at = None
        self._used = time.monotonic()
        self.generation += 1
        _log.info("share mounted", extra={"pool": self._pool, "source": self._source, "at": str(self._directory)})
        # A context of its own: the thread outlives the call that needed the share.
        watch = contextvars.Context().run
        threading.Thread(target=watch, args=(self._watch, self.generation), name=f"share {self._pool}", daemon=True).start()

    def _mount_anew(self) -> Mount:
        self._directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory.mkdir(mode=0o700, exist_ok=True)
        # What an earlier process left may be the same share with other options, or another pool's.
        mounts.unmount_all(self._directory, _WAIT_SECONDS * 2)
        try:
            return mount_nfs(self._source, self._directory, self._options, seconds=MOUNT_SECONDS)
        except LockManagerMissing:
            nolock = (*self._options, *parse_nfs_options(["nolock"], "share"))
            return mount_nfs(self._source, self._directory, nolock, seconds=MOUNT_SECONDS)

    def _detach(self) -> None:
        self._mounted = None
        with suppress(OSError):  # EINVAL: it is gone
            mounts.unmount(self._directory, lazy=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(timeout=_WAIT_SECONDS):
            raise Unavailable(f"pool {self._pool}: {self._source} is being mounted, and its server takes its time; try again")
        try:
            yield
        finally:
            self._lock.release()

    # --- watching -----------------------------------------------------------------------------------------------------------------

    def _refuse_silent(self) -> None:
        since, now = self._silent_since, time.monotonic()
        asked = self._asked_at
        if since is None and asked is not None and now - asked > LATE_SECONDS:
            since = asked
        if since is not None:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time.time() - (now - since)))
            raise Unavailable(
                f"pool {self._pool}: the server of {self._source} does not answer since {when} UTC ({now - since:.0f} s); try again later"
            )

    def _watch(self, generation: int) -> None:
        while not self._stop.is_set() and self.generation == generation and self._mounted is not None:
            self._ask()
            if time.monotonic() - self._used > IDLE_SECONDS:
                self._release(generation)
            self._stop.wait(ASK_SECONDS)

    def _ask(self) -> None:
        asked = self._asked_at = time.monotonic()
        try:
            # Not stat(2): a soft mount answers that from its cache when the server does not (softreval, nfs(5)), and 6.1 cannot leave it.
            os.statvfs(self._directory)
        except OSError as error:
            if error.errno == errno.ESTALE:
                self._asked_at = None
                with suppress(Unavailable):
                    self.renew()
                return
            if self._silent_since is None:
                self._silent_since = asked
                _log.warning("a server does not answer", extra={"source": self._source, "error": error.strerror})
        else:
            if self._silent_since is not None or time.monotonic() - asked > LATE_SECONDS:
                _log.warning("a server answers again", extra={"source": self._source})
            self._silent_since = None
        self._asked_at = None

    def _is_stale(self) -> bool:
        try:
            os.statvfs(self._directory)
        except OSError as error:
            return error.errno == errno.ESTALE
        return False

    def _release(self, generation: int) -> None:
        """Let the idle share go, plainly: what is still in use stays."""
        with suppress(Unavailable), self._alone():
            if self.generation != generation or time.monotonic() - self._used <= IDLE_SECONDS:
                return
            try:
                mounts.unmount(self._directory, timeout=_WAIT_SECONDS)
            except (OSError, DeadlineExceeded):
                self._used = time.monotonic()
            else:
                self._mounted = None
                _log.info("idle share let go", extra={"pool": self._pool, "source": self._source})


def _identity(mount: Mount) -> tuple[int, str, str]:
    return mount.mount_id, mount.device, mount.source
