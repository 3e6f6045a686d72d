"""The system calls that Python does not offer, by ctypes: openat2, getdents64, statx, name_to_handle_at, syncfs, fstatfs,
sync_file_range and ioprio_set.

Python's `os` follows whatever the tree holds below a descriptor (symlinks in the middle of a path, mounts), reads a directory
only from its start, and hides the mount id. Walking a tree that its owner changes meanwhile needs all three. Every call here
releases the interpreter lock, sets O_CLOEXEC, and raises OSError with the kernel's errno.
"""

import ctypes
import errno
import os
import struct
from typing import NamedTuple

OPENAT2 = 437  # the same number on every architecture (Linux 5.6)
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08

_AT_EMPTY_PATH = 0x1000
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_NO_AUTOMOUNT = 0x800
_AT_STATX_FORCE_SYNC = 0x2000
_STATX_BASIC = 0x7FF  # NFS asks its server for none of the immutable ones alone
_STATX_BASIC_BTIME_MNT_ID = 0x7FF | 0x800 | 0x1000
STATX_MNT_ID = 0x1000

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
_syscall.restype = ctypes.c_long
_ioprio_set = _libc["syscall"]  # by item: a function object of its own, with other arguments
_ioprio_set.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int]
_ioprio_set.restype = ctypes.c_long
_getdents64 = _libc.getdents64
_getdents64.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
_getdents64.restype = ctypes.c_ssize_t
_statx = _libc.statx
_statx.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
_statx.restype = ctypes.c_int
_name_to_handle_at = _libc.name_to_handle_at
_name_to_handle_at.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
_name_to_handle_at.restype = ctypes.c_int
_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_sync_file_range.restype = ctypes.c_int


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _failure(path: bytes | None = None) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code), path)


class OpenAt2:
    """openat2(2) with fixed flags, mode and resolve bits: the kernel's argument is built once, a walk makes millions of calls."""

    def __init__(self, flags: int, mode: int, resolve: int) -> None:
        self._how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
        self._address = ctypes.addressof(self._how)
        self._size = ctypes.sizeof(self._how)

    def __call__(self, directory_fd: int, path: bytes) -> int:
        """Open `path` below the directory and return the descriptor; raises OSError (ENOSYS before Linux 5.6)."""
        descriptor = _syscall(OPENAT2, directory_fd, path, self._address, self._size)
        if descriptor < 0:
            raise _failure(path)
        return int(descriptor)


DirectoryEntry = tuple[bytes, int, int]
"""One entry of getdents64(2): its name, d_type (DT_…, 0 when the filesystem does not say), and the position after it."""


class DirectoryReader:
    """A buffer to read directories with, in pieces of 32 KiB: a directory of a million names needs no more memory than one of ten.

    Not for use by two threads at once.
    """

    _SIZE = 32 * 1024
    _HEADER = struct.Struct("=QqHB")

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(self._SIZE)

    def read(self, directory_fd: int) -> list[DirectoryEntry]:
        """Read the next entries, `.` and `..` left out, last one first (so that `pop` takes them in order); empty at the end."""
        entries: list[DirectoryEntry] = []
        while not entries:
            length = _getdents64(directory_fd, self._buffer, self._SIZE)
            if length < 0:
                raise _failure()
            if length == 0:
                break
            data = ctypes.string_at(self._buffer, length)
            start = 0
            while start < length:
                _, position, size, kind = self._HEADER.unpack_from(data, start)
                begin = start + self._HEADER.size
                name = data[begin : data.index(0, begin)]
                if name != b"." and name != b"..":  # noqa: PLR1714 - twice as quick, a million times
                    entries.append((name, kind, position))
                start += size
        entries.reverse()
        return entries


class InodeStatus(NamedTuple):
    """What statx(2) says of one inode; `mount` is 0 where the kernel does not say (before Linux 5.8)."""

    links: int
    mode: int
    inode: int
    blocks: int
    birth: tuple[int, int]
    device: tuple[int, int]
    mount: int


class InodeReader:
    """A buffer to ask statx(2) with. Never follows a symlink, never triggers an automount. Not for two threads at once."""

    _LAYOUT = struct.Struct("=I12xI8xH2xQ8xQ24xqI44xIIQ")

    def __init__(self) -> None:
        self._buffer = ctypes.create_string_buffer(256)

    def read(self, directory_fd: int, name: bytes = b"") -> InodeStatus:
        """Ask about `name` in the directory, or about the descriptor itself."""
        flags = _AT_SYMLINK_NOFOLLOW | _AT_NO_AUTOMOUNT | (0 if name else _AT_EMPTY_PATH)
        if _statx(directory_fd, name, flags, _STATX_BASIC_BTIME_MNT_ID, self._buffer) < 0:
            raise _failure(name)
        mask, links, mode, inode, blocks, born, born_ns, major, minor, mount = self._LAYOUT.unpack_from(self._buffer)
        return InodeStatus(links, mode, inode, blocks, (born, born_ns), (major, minor), mount if mask & STATX_MNT_ID else 0)


def require_current(descriptor: int) -> None:
    """Have the server itself say that a directory is still there, whatever is remembered of it (statx(2), AT_STATX_FORCE_SYNC).

    Raises OSError, ESTALE where it is not, or has no name any more: then it will be stale soon.
    """
    buffer = ctypes.create_string_buffer(256)
    if _statx(descriptor, b"", _AT_EMPTY_PATH | _AT_NO_AUTOMOUNT | _AT_STATX_FORCE_SYNC, _STATX_BASIC, buffer) < 0:
        raise _failure()
    if not struct.unpack_from("=I", buffer, 16)[0]:  # stx_nlink
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


_HANDLE = struct.Struct("=Ii")  # struct file_handle
_HANDLE_BYTES = 128  # MAX_HANDLE_SZ


def file_handle(descriptor: int) -> bytes | None:
    """Return what the filesystem names the inode by, which no other one gets, also where a number is used again (open_by_handle_at(2)).

    None where it has no such names.
    """
    buffer = ctypes.create_string_buffer(_HANDLE.size + _HANDLE_BYTES)
    _HANDLE.pack_into(buffer, 0, _HANDLE_BYTES, 0)
    mount = ctypes.c_int()
    if _name_to_handle_at(descriptor, b"", buffer, ctypes.byref(mount), _AT_EMPTY_PATH) < 0:
        return None
    length, kind = _HANDLE.unpack_from(buffer)
    return struct.pack("=i", kind) + buffer.raw[_HANDLE.size : _HANDLE.size + length]


def sync_filesystem(descriptor: int) -> None:
    """Write out everything that the descriptor's filesystem holds back, data and metadata (syncfs(2)).

    Raises OSError, EIO and ENOSPC included: since Linux 5.8 also for write-back that failed earlier on a descriptor this old.
    """
    if _libc.syncfs(descriptor) < 0:
        raise _failure()


def filesystem_type(descriptor: int) -> int:
    """Return the magic number of the descriptor's filesystem (f_type of fstatfs(2)). Raises OSError."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(descriptor, buffer) < 0:
        raise _failure()
    return int(struct.unpack_from("l", buffer)[0])


def sync_file_range_write(descriptor: int, offset: int, length: int) -> None:
    """Send a part of a file (bytes) on its way to the disk without waiting (sync_file_range(2)); no promise that it gets there."""
    _sync_file_range(descriptor, offset, length, 2)  # SYNC_FILE_RANGE_WRITE


def sync_file_range_wait(descriptor: int, offset: int, length: int) -> None:
    """Wait until a part of a file has been written out. A failure is not told here: fsync and syncfs tell it."""
    _sync_file_range(descriptor, offset, length, 1 | 2 | 4)  # WAIT_BEFORE, WRITE, WAIT_AFTER


def set_io_priority(io_class: int, level: int) -> None:
    """Set the I/O priority of this thread and of those that it starts (ioprio_set(2)): class 2 is best effort, level 7 its lowest.

    Raises OSError.
    """
    if _ioprio_set(_ioprio_set_number(), 1, 0, io_class << 13 | level) < 0:  # 1: IOPRIO_WHO_PROCESS, 0: the calling thread
        raise _failure()


def _ioprio_set_number() -> int:
    return 251 if os.uname().machine == "x86_64" else 30  # the latter on all architectures since


def mount_id(descriptor: int) -> int:
    """Return the id of the mount that the descriptor was opened through (fdinfo of proc(5); any kernel, slow)."""
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as lines:  # noqa: PTH123 - every import counts in a node pod
        for line in lines:
            if line.startswith("mnt_id:"):
                return int(line.split()[1])
    raise OSError(f"the kernel names no mount id for descriptor {descriptor}")


def magic_link(descriptor: int) -> bytes:
    """Name the very inode that a descriptor holds, for calls that refuse an O_PATH descriptor (proc(5), symlinks(7))."""
    return b"/proc/self/fd/%d" % descriptor
