"""The record store: one JSON file for each volume, snapshot and group, beside the data that it describes.

A record appears exclusively and changes atomically, so whatever is killed at whatever moment, a reader finds the record of before
or of after. Nothing is kept in memory: the directory is the database, for this process and for any other that serves the pool.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Generic, Protocol, TypeVar

from csi_driver.errors import RecordDamaged
from csi_driver.linux import files
from csi_driver.linux.listings import list_steadily
from csi_driver.volumes import record_format
from csi_driver.volumes.handles import ID_PATTERN

_SUFFIX = ".json"
_NO_RECORD = frozenset({errno.EFBIG, errno.EINVAL, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EUCLEAN})
"""What reading says of a file that is too large, no regular file, or that the disk cannot give back."""


class Record(Protocol):
    """What the store needs to know of a record."""

    @property
    def id(self) -> str: ...

    @property
    def token(self) -> str: ...


R = TypeVar("R", bound=Record)

Gate = AbstractContextManager[object]
"""What the one step that others see is made within; it may refuse it, by raising. That of a lock asks whether it still is ours."""

OpenFolder = Callable[[], AbstractContextManager[int]]
"""Opens the folder that holds the records; raises Unavailable where the pool is not there, which is not "no such record"."""


class RecordFolder(Generic[R]):
    """The records of one kind in one pool."""

    def __init__(self, kind: type[R], place: str, open_folder: OpenFolder) -> None:
        self._kind = kind
        self._place = place
        self._open = open_folder

    def get(self, record_id: str) -> R | None:
        """Read one record; None where there is none. Raises RecordDamaged, Unavailable."""
        with self._open() as folder:
            return self._read(folder, record_id)

    def add(self, record: R, gate: Gate = files.OPEN, settle: files.Settle = files.sync_directory) -> bool:
        """Write a record that must not exist yet; False where another has its id. It appears within `gate`, which may refuse it.

        It lasts when this returns, or, with `files.order_directory`, as soon as something that is changed later does.

        A server may do what it was asked and lose the reply, and the second try then meets our own file: the token tells.
        """

        def ours(found: bytes) -> bool:
            return record_format.decode(self._kind, found, self._path(record.id)).token == record.token

        with self._open() as folder:
            try:
                files.create_exclusively(folder, record.id + _SUFFIX, record_format.encode(record), ours, gate, settle)
            except FileExistsError:
                return False
        return True

    def replace(self, record: R, gate: Gate, settle: files.Settle = files.sync_directory) -> R:
        """Put a record in place of the one with its id, in one step within `gate`; `settle` as in `add`. Returns it.

        Whoever replaces has read before, and may be late: there is no default, lest a gate be forgotten. It raises what the gate raises.
        """
        with self._open() as folder:
            files.write_atomically(folder, record.id + _SUFFIX, record_format.encode(record), gate, settle)
        return record

    @contextmanager
    def drafted(self, record: R) -> Iterator[Callable[[Gate], None]]:
        """Write down a record that will be due at the end of the context; what is yielded shows it, once, within a gate, durably."""
        with self._open() as folder, files.drafted(folder, record.id + _SUFFIX, record_format.encode(record)) as show:
            yield lambda gate: show(gate, files.sync_directory)

    def settle(self) -> None:
        """See to it that the records that can be seen are on the disk: who wrote one may have been killed before it was. Raises OSError."""
        with self._open() as folder:
            files.sync_directory(folder)

    def remove(self, record_id: str) -> None:
        """Remove a record; one that is gone already is fine."""
        with self._open() as folder:
            try:
                os.unlink(record_id + _SUFFIX, dir_fd=folder)
            except FileNotFoundError:
                return
            files.sync_directory(folder)

    def move(self, record_id: str, target_folder: int, name: str, gate: Gate) -> None:
        """Move the record's file to `name` in another folder of the pool, within `gate`; one that is gone already is fine."""
        with self._open() as folder:
            try:
                with gate:
                    os.rename(record_id + _SUFFIX, name, src_dir_fd=folder, dst_dir_fd=target_folder)
            except FileNotFoundError:
                return
            files.sync_directory(target_folder)
            files.sync_directory(folder)

    def ids(self) -> list[str]:
        """List the ids of all records, sorted: the order in which pages are handed out."""
        with self._open() as folder:
            names = list_steadily(folder)
        ids = (name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))
        return sorted(record_id for record_id in ids if ID_PATTERN.fullmatch(record_id))

    def each(self, ids: list[str] | None = None) -> Iterator[R | RecordDamaged]:
        """Read the records `ids` (default: all), in their order; damaged ones as the error, vanished ones not at all."""
        wanted = self.ids() if ids is None else ids
        with self._open() as folder:
            for record_id in wanted:
                try:
                    record = self._read(folder, record_id)
                except RecordDamaged as damage:
                    yield damage
                else:
                    if record is not None:
                        yield record

    def readable(self) -> Iterator[R]:
        """Read all records that can be read."""
        return (record for record in self.each() if not isinstance(record, RecordDamaged))

    def read_in(self, folder: int, name: str, record_id: str) -> R | None:
        """Read a record of this kind that was moved to another folder; None where it is not there. Raises RecordDamaged."""
        return self._read_file(folder, name, record_id, name)

    def _read(self, folder: int, record_id: str) -> R | None:
        return self._read_file(folder, record_id + _SUFFIX, record_id, self._path(record_id))

    def _read_file(self, folder: int, name: str, record_id: str, path: str) -> R | None:
        try:
            data = files.read_bounded(folder, name, record_format.MAX_RECORD_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in _NO_RECORD:
                raise
            raise RecordDamaged(f"{path} is damaged: {error.strerror}") from error
        record = record_format.decode(self._kind, data, path)
        if record.id != record_id:
            raise RecordDamaged(f"{path} is damaged: it says that its id is {record.id}")
        return record

    def _path(self, record_id: str) -> str:
        return f"{self._place}/{record_id}{_SUFFIX}"
