"""Locks that several controllers share: byte ranges of one file in the pool.

Open-file-description locks (fcntl(2), F_OFD_SETLK), because a POSIX lock of the process would vanish as soon as any other
descriptor of the file is closed, and two threads would never exclude each other. Such a lock belongs to the description, so each
lock held has a descriptor of its own: then two calls in one process exclude each other exactly as two controllers do.

The file is never written, so nothing of it is ever written back late. The descriptors are close-on-exec, and a release
unlocks before it closes: a child that is just being started may still hold a copy of the descriptor.
Works on local filesystems, on NFSv4, and on NFSv3 with a lock manager (else ENOLCK).
"""

import errno
import fcntl
import os
import struct
import threading
from types import TracebackType
from typing import Self


class ByteRangeLocks:
    """The locks of one file, one byte each; the caller maps its keys to offsets (0 to 2**63 - 2)."""

    def __init__(self, directory_fd: int, name: str) -> None:
        """Keep the place; `directory_fd` stays the caller's and must stay open."""
        self._directory_fd = directory_fd
        self._name = name

    def try_hold(self, offset: int, *, shared: bool = False) -> "HeldLock | None":
        """Take the byte at once, or return None when anyone, this process included, holds it.

        With `shared`, other shared holders do not stand in the way, and only those do not.
        Raises OSError; ENOLCK where the server keeps no locks.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._name, flags, 0o600, dir_fd=self._directory_fd)
        try:
            kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
            if _set(descriptor, kind, offset):
                return HeldLock(descriptor, offset, kind)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None


class HeldLock:
    """One byte held, until `release` or the end of the `with` block."""

    def __init__(self, descriptor: int, offset: int, kind: int = fcntl.F_WRLCK) -> None:
        """Take over the descriptor that holds the lock."""
        self._descriptor = descriptor
        self._offset = offset
        # A watcher may ask while the owner lets go; the descriptor's number must not be another file's by then.
        self._guard = threading.Lock()
        self._kind = kind

    def still_held(self) -> bool:
        """Ask whether the lock is still ours; False once released, lost by the client, or after the file was removed.

        The lock is asked for again on the same description: no effect while it is held, refused once another has it. An NFSv4
        client whose lease ran out answers EIO to whoever uses the descriptor of a lost lock. A loss that nobody else used
        and that the client did not report cannot be seen from here.
        """
        with self._guard:
            if self._descriptor < 0:
                return False
            try:
                os.pread(self._descriptor, 1, 0)
                return os.fstat(self._descriptor).st_nlink > 0 and _set(self._descriptor, self._kind, self._offset)
            except OSError:
                return False

    def release(self) -> None:
        """Let go. Doing it twice is harmless; a server that cannot be reached lets the lease run out."""
        with self._guard:
            descriptor, self._descriptor = self._descriptor, -1
            if descriptor < 0:
                return
            try:
                _set(descriptor, fcntl.F_UNLCK, self._offset)
            except OSError:  # the lock is gone already, and closing lets go of the rest
                pass
            finally:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def _set(descriptor: int, kind: int, offset: int) -> bool:
    # struct flock: l_type, l_whence, l_start, l_len, l_pid; the pid must be 0 for OFD locks.
    request = struct.pack("@hhqqi4x", kind, os.SEEK_SET, offset, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
    except OSError as error:
        if error.errno in {errno.EAGAIN, errno.EACCES}:
            return False
        raise
    return True
