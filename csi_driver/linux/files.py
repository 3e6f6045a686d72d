"""Files that must be whole after any crash, and directories claimed by exactly one.

Records live on local filesystems and on NFS, so only what both promise is used: rename replaces atomically, link and mkdir
are exclusive, fsync of a file and of its directory makes them last. NFS can carry an exclusive step out and lose the reply;
the caller's own token in the data then tells "mine" from "another's".
"""

import contextlib
import errno
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

from csi_driver.linux.system_calls import filesystem_type, sync_file_range_wait

__all__ = [
    "OPEN",
    "create_exclusively",
    "drafted",
    "move_into_place",
    "order_directory",
    "read_bounded",
    "remove_leftover_temporaries",
    "sync_directory",
    "write_atomically",
]

TEMPORARY_PREFIX = ".tmp."
OPEN: AbstractContextManager[object] = contextlib.nullcontext()
"""The gate that refuses nothing."""
_EXT_MAGIC = 0xEF53
_XFS_MAGIC = 0x58465342

Settle = Callable[[int], None]
"""What becomes of new names in a directory: `sync_directory`, or `order_directory` where the caller syncs something later."""


def write_atomically(
    directory_fd: int, name: str, data: bytes, gate: AbstractContextManager[object] = OPEN, settle: Settle | None = None
) -> None:
    """Replace the content of `name` (mode 0600): after any crash the old content or the new, never a mixture.

    It has reached the disk (or the server) when this returns, unless `settle` is `order_directory`. Only the step that shows it to
    others is made within `gate`, which may refuse it. Raises OSError, and what the gate raises; nothing is left over then.
    """
    with drafted(directory_fd, name, data) as show:
        show(gate, settle or sync_directory)


Show = Callable[[AbstractContextManager[object], Settle], None]


@contextlib.contextmanager
def drafted(directory_fd: int, name: str, data: bytes) -> Iterator[Show]:
    """Write what `name` will hold under another name, which goes when the context ends; what is yielded puts it in place, once.

    Until then the data has gone to the disk, but not what the filesystem knows of it: where one journal takes all changes, whoever
    syncs anything meanwhile takes that along, and showing it costs no commit of the journal for that. Raises OSError.
    """
    temporary, descriptor = _create_temporary(directory_fd, _single(name))
    with contextlib.ExitStack() as undo:
        undo.callback(_drop_draft, directory_fd, temporary)
        closing = undo.enter_context(contextlib.ExitStack())
        closing.callback(os.close, descriptor)
        _write(descriptor, data)
        sync_file_range_wait(descriptor, 0, 0)

        def show(gate: AbstractContextManager[object], settle: Settle) -> None:
            os.fsync(descriptor)
            closing.close()  # NFS may report a failed write only here
            with gate:
                os.rename(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
            undo.pop_all()
            settle(directory_fd)

        yield show


def create_exclusively(
    directory_fd: int,
    name: str,
    data: bytes,
    confirm: Callable[[bytes], bool],
    gate: AbstractContextManager[object] = OPEN,
    settle: Settle | None = None,
) -> None:
    """Create `name` with `data` (mode 0600), whole from its first moment, unless there is one.

    It has reached the disk (or the server) when this returns, unless `settle` is `order_directory`.

    Raises FileExistsError when `name` exists and is not ours: neither made by this very call (its reply was lost) nor
    recognised by `confirm`, which gets the existing content (at most 1 MiB; e.g. an earlier try's token). Only the step that shows
    it to others is made within `gate`, which may refuse it. Raises OSError, and what the gate raises.
    """
    temporary = _write_temporary(directory_fd, _single(name), data)
    try:
        try:
            with gate:
                os.link(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd, follow_symlinks=False)
        except FileExistsError:
            ours = os.stat(temporary, dir_fd=directory_fd, follow_symlinks=False)
            theirs = os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
            if not os.path.samestat(ours, theirs) and not confirm(read_bounded(directory_fd, name, 1024 * 1024)):
                raise
    finally:
        _unlink_if_there(directory_fd, temporary)
    (settle or sync_directory)(directory_fd)


def read_bounded(directory_fd: int, name: str, limit_bytes: int) -> bytes:
    """Read the whole regular file `name`.

    Raises OSError: EFBIG beyond `limit_bytes`, ELOOP for a symlink, EINVAL for anything else that is no regular file.
    """
    # O_NONBLOCK: a fifo in its place must not make us wait for a writer.
    descriptor = os.open(_single(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory_fd)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", name)
        pieces = []
        room = limit_bytes + 1
        while room and (piece := os.read(descriptor, min(room, 1024 * 1024))):
            pieces.append(piece)
            room -= len(piece)
        if not room:
            raise OSError(errno.EFBIG, f"larger than {limit_bytes} bytes", name)
        return b"".join(pieces)
    finally:
        os.close(descriptor)


def sync_directory(directory_fd: int) -> None:
    """Make the names in a directory last. EINVAL passes: some network filesystems cannot, and do it without being asked."""
    try:
        os.fsync(directory_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def order_directory(directory_fd: int) -> None:
    """See that a directory, its names and what it says of itself, reaches the disk before whatever is changed from now on.

    Both may be lost in a power cut. Nothing is to be done where one journal takes all changes in their order (ext4, XFS); there to
    sync a directory would commit the journal, whether or not it had changed. Elsewhere it is `sync_directory`.
    """
    if not _keeps_order(directory_fd):
        sync_directory(directory_fd)


def _keeps_order(descriptor: int) -> bool:
    try:
        kind = filesystem_type(descriptor)
        if kind != _EXT_MAGIC:
            return kind == _XFS_MAGIC
        device = os.fstat(descriptor).st_dev
        # The same magic number is ext2's, and an ext4's without a journal.
        name = os.path.basename(os.readlink(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))  # noqa: PTH115, PTH119
        with open(f"/sys/fs/ext4/{name}/journal_task", encoding="ascii") as task:  # noqa: PTH123 - every import counts in a node pod
            return task.read().strip().isdigit()  # "<none>" where there is no journal
    except OSError:
        return False


def remove_leftover_temporaries(directory_fd: int, older_than_seconds: float) -> int:
    """Remove what a killed writer left in the directory and return how many.

    Age is the file's mtime against this machine's clock, so `older_than_seconds` must exceed any server's drift.
    """
    removed = 0
    newest = time.time() - older_than_seconds
    with os.scandir(directory_fd) as entries:
        for entry in entries:
            if entry.name.startswith(TEMPORARY_PREFIX):
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(entry.name, dir_fd=directory_fd, follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode) and status.st_mtime < newest:
                        os.unlink(entry.name, dir_fd=directory_fd)
                        removed += 1
    return removed


def move_into_place(source_directory_fd: int, source_name: str, target_directory_fd: int, target_name: str) -> None:
    """Move a directory over an empty one that the caller made by exclusive mkdir; it lasts once both ends are synced.

    rename(2) replaces an empty directory and no other, so what a tenant or another controller put there is safe.
    Raises OSError: ENOTEMPTY or EEXIST when it is no longer empty, ENOTDIR when it is no directory, ENOENT when the source is gone.
    """
    os.rename(_single(source_name), _single(target_name), src_dir_fd=source_directory_fd, dst_dir_fd=target_directory_fd)


def _single(name: str) -> str:
    if not name or "/" in name or name in {".", ".."}:
        raise OSError(errno.EINVAL, "not the name of one entry", name)
    return name


def _create_temporary(directory_fd: int, name: str) -> tuple[str, int]:
    temporary = f"{TEMPORARY_PREFIX}{name[:64]}.{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    return temporary, os.open(temporary, flags, 0o600, dir_fd=directory_fd)


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _write_temporary(directory_fd: int, name: str, data: bytes) -> str:
    temporary, descriptor = _create_temporary(directory_fd, name)
    try:
        try:
            _write(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)  # NFS may report a failed write only here
    except OSError:
        _unlink_if_there(directory_fd, temporary)
        raise
    return temporary


def _drop_draft(directory_fd: int, name: str) -> None:
    with contextlib.suppress(OSError):  # it is swept later, and must not hide why the caller failed
        os.unlink(name, dir_fd=directory_fd)


def _unlink_if_there(directory_fd: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory_fd)
