"""Who holds an image: one node at a time, written beside the image itself, where every node that could take it sees it.

Two nodes that mount one filesystem of this kind destroy it within seconds, so it is not left to the container orchestrator alone. The
file is created exclusively. It names the node, its boot (/proc/sys/kernel/random/boot_id) and the controller's epoch, which grows with
each publication: what a node held before it was started anew, it does not hold any more; and where the controller has given the volume
to another node since, the older holder is outdated. Everything else is refused by the name of the holder.
"""

import json
import os
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from csi_driver.errors import FailedPrecondition, OperationPending, quoted
from csi_driver.linux import files

HOLDER = "holder.json"
_LIMIT = 65536
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Holder:
    """A node in one of its boots; `epoch` 0 where no controller publishes volumes."""

    node_id: str
    boot_id: str
    epoch: int

    def replaces(self, other: "Holder") -> bool:
        """Tell whether this holder may take over from `other`."""
        if self.node_id == other.node_id:
            return self.epoch >= other.epoch
        return self.epoch > other.epoch

    def encoded(self) -> bytes:
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=1).encode() + b"\n"


def boot_id() -> str:
    """Return what the kernel calls this boot (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def hold(directory_fd: int, wanted: Holder) -> None:
    """Make `wanted` the holder of the image in this directory. Raises FailedPrecondition naming who holds it, OperationPending, OSError."""
    for _ in range(_ATTEMPTS):
        with suppress(FileExistsError, FileNotFoundError):  # gone again before it could be looked at
            files.create_exclusively(directory_fd, HOLDER, wanted.encoded(), lambda _: False)
            return
        try:
            found = files.read_bounded(directory_fd, HOLDER, _LIMIT)
        except FileNotFoundError:
            continue
        holder = _decoded(found)
        if holder == wanted:
            return
        if not wanted.replaces(holder):
            raise FailedPrecondition(
                f"the image is held by node {quoted(holder.node_id)} (boot {holder.boot_id}, epoch {holder.epoch}; this is node "
                f"{quoted(wanted.node_id)}, epoch {wanted.epoch}): it can be on one node at a time; unstage it there. If that node is gone for "
                f"good, remove {HOLDER} from the volume's directory"
            )
        _remove(directory_fd, found)
    raise OperationPending("other nodes take the image at the same moment; try again")


def release(directory_fd: int, holder: Holder) -> None:
    """Give the image back where this node has it; nobody else's hold is touched. Raises OSError."""
    try:
        found = files.read_bounded(directory_fd, HOLDER, _LIMIT)
    except FileNotFoundError:
        return
    if _decoded(found).node_id == holder.node_id:
        _remove(directory_fd, found)


def is_held_by(directory_fd: int, node_id: str) -> bool:
    """Tell whether the image is this node's. Raises FailedPrecondition for a damaged hold, OSError."""
    try:
        return _decoded(files.read_bounded(directory_fd, HOLDER, _LIMIT)).node_id == node_id
    except FileNotFoundError:
        return False


def _remove(directory_fd: int, found: bytes) -> None:
    """Take this very hold away: moved aside by one rename first, so that of two nodes only one goes on, and looked at again."""
    aside = f"{files.TEMPORARY_PREFIX}{HOLDER}.{secrets.token_hex(8)}"
    try:
        os.rename(HOLDER, aside, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    except FileNotFoundError:
        return
    if files.read_bounded(directory_fd, aside, _LIMIT) != found:
        with suppress(FileExistsError):  # another's, who was quicker: back it goes
            os.link(aside, HOLDER, src_dir_fd=directory_fd, dst_dir_fd=directory_fd, follow_symlinks=False)
    os.unlink(aside, dir_fd=directory_fd)
    files.sync_directory(directory_fd)


def _decoded(data: bytes) -> Holder:
    try:
        body = json.loads(data)
        return Holder(str(body["node_id"]), str(body["boot_id"]), int(body["epoch"]))
    except (ValueError, KeyError, TypeError) as error:
        raise FailedPrecondition(
            f"{HOLDER} beside the image is damaged ({error!r}); remove it once no node has the image"
        ) from error
