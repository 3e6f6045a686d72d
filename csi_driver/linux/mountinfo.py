"""What is mounted where, as the kernel tells it in /proc/self/mountinfo: nothing here ever touches a mount.

stat, statfs and os.path.ismount on a mount of a dead server hang, and os.path.ismount does not see a bind of the same filesystem.
mountinfo answers both from the kernel's own table (proc_pid_mountinfo(5)).

The order of the lines means nothing (from Linux 6.8 on they are sorted by id, and a moved mount keeps its id), and a mount that is
hidden below another is listed all the same. So the path is walked the way the kernel walks it: from the root mount through the
mounts that lie on each other, by `parent_id`.

Whether the table can tear: seq_file hands out about a page per read(2) and lets go of the kernel's lock in between, so a table of
some dozens of mounts is read in pieces. A change meanwhile marks the open file for poll(2) (POLLERR | POLLPRI, proc(5), Linux
2.6.15), and then it is read again. In a storm of mounts that may never end; the last reading is taken then, which from Linux 5.8
on misses no mount that stood still ("proc/mounts: add cursor"). Whoever asks about a target holds its lock, so that one stands still.
"""

import os
import re
import select
from collections.abc import Iterable
from dataclasses import dataclass

_READINGS = 10
_ESCAPE = re.compile(rb"\\([0-7]{3})")
_DELETED = "//deleted"  # no name holds a slash, so no file can fake it


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. Names are unescaped; bytes that are not UTF-8 are surrogates (os.fsdecode)."""

    mount_id: int
    parent_id: int
    device: str  # "major:minor" of the filesystem: st_dev, except on btrfs
    root: str  # which directory or file of the filesystem is mounted here
    mount_point: str
    options: frozenset[str]  # of this mount: "ro", "nosuid", "relatime" ...
    propagation: frozenset[str]  # "shared:7", "master:3", "unbindable" ...; empty is private
    fs_type: str  # "nfs4", "fuse.sshfs" ...
    source: str
    super_options: frozenset[str]  # of the filesystem, common to all its mounts

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written through this mount."""
        return "ro" in self.options or "ro" in self.super_options

    @property
    def root_deleted(self) -> bool:
        """Whether the directory that is mounted here has been removed meanwhile."""
        return self.root.endswith(_DELETED)


def read_mounts() -> tuple[Mount, ...]:
    """Read the mount table of this process' mount namespace, in the kernel's order."""
    table = b""
    for _ in range(_READINGS):
        table, consistent = _read_table()
        if consistent:
            break
    return tuple(parse_line(line) for line in table.split(b"\n") if line)


def topmost_mount_at(path: str | os.PathLike[str]) -> Mount | None:
    """Find what is mounted on `path` and seen there: the last of `mounts_at`, or None."""
    mounts = mounts_at(path)
    return mounts[-1] if mounts else None


def mounts_at(path: str | os.PathLike[str]) -> tuple[Mount, ...]:
    """List the mounts stacked on `path`, bottom to top; empty when it is no mount point.

    The parent directory is resolved; the last name is not looked at, so that neither a symbolic link there is followed nor a dead
    server asked. Raises ValueError when the path is relative or ends in "..".
    """
    return visible_stack(read_mounts(), resolved(path))


def mounts_below(path: str | os.PathLike[str]) -> tuple[Mount, ...]:
    """List the mounts whose mount points lie below `path` (not on it), deepest last; also those that others hide."""
    above = resolved(path).rstrip("/") + "/"
    below = [mount for mount in read_mounts() if mount.mount_point.startswith(above) and mount.mount_point != above]
    return tuple(sorted(below, key=lambda mount: mount.mount_point.count("/")))


def visible_stack(mounts: Iterable[Mount], mount_point: str) -> tuple[Mount, ...]:
    """Walk from the root to `mount_point` and list what is stacked on it, bottom to top.

    At each step the kernel enters the first mount it meets on the way, which is the child of the present mount with the shortest
    mount point; one that lies on the present mount's own root comes first.
    """
    ids, children = set(), dict[int, list[Mount]]()
    table = [mount for mount in mounts if _is_prefix(mount.mount_point, mount_point)]
    for mount in table:
        ids.add(mount.mount_id)
        children.setdefault(mount.parent_id, []).append(mount)
    # The root mount's parent is itself or, after pivot_root or chroot, a mount that is not shown.
    step = [mount for mount in table if mount.parent_id == mount.mount_id or mount.parent_id not in ids]
    stack, walked = list[Mount](), set[int]()
    while step:
        present = min(step, key=lambda mount: len(mount.mount_point))
        if present.mount_point == mount_point:
            stack.append(present)
        walked.add(present.mount_id)
        step = [child for child in children.get(present.mount_id, ()) if child.mount_id not in walked]
    return tuple(stack)


def resolved(path: str | os.PathLike[str]) -> str:
    """Resolve the parent directory of an absolute path, and leave the last name as it is. Raises ValueError."""
    text = os.fspath(path)
    parent, name = os.path.split(text.rstrip("/"))
    if not text.startswith("/") or name in {".", ".."}:
        raise ValueError(f"not an absolute path to a name: {text!r}")
    return os.path.realpath(parent or "/").rstrip("/") + "/" + name


def parse_line(line: bytes) -> Mount:
    """Parse one line, without its newline. Raises ValueError when it has another shape than proc_pid_mountinfo(5) says."""
    # Split at single spaces: a source may be an empty string, and then two spaces meet.
    fields = line.split(b" ")
    try:
        dash = fields.index(b"-", 6)
        mount_id, parent_id, device, root, mount_point, options = fields[:6]
        fs_type, source, super_options = fields[dash + 1 :]
        return Mount(
            int(mount_id),
            int(parent_id),
            device.decode(),
            unescape(root),
            unescape(mount_point),
            _words(options),
            frozenset(tag.decode() for tag in fields[6:dash]),
            unescape(fs_type),
            unescape(source),
            _words(super_options),
        )
    except ValueError as error:
        raise ValueError(f"a line of /proc/self/mountinfo is not understood: {line!r}") from error


def unescape(field: bytes) -> str:
    r"""Turn the kernel's \ooo (space, tab, newline, backslash, in some fields `#`) back into the byte it stands for."""
    return os.fsdecode(_ESCAPE.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), field))


def _words(options: bytes) -> frozenset[str]:
    return frozenset(unescape(word) for word in options.split(b",") if word)


def _is_prefix(mount_point: str, path: str) -> bool:
    return mount_point in {"/", path} or path.startswith(mount_point + "/")


def _read_table() -> tuple[bytes, bool]:
    """Read the whole table once, and say whether it stood still meanwhile."""
    fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces = list[bytes]()
        while piece := os.read(fd, 1 << 16):
            pieces.append(piece)
        changes = select.poll()
        changes.register(fd, select.POLLPRI)
        return b"".join(pieces), not any(event & (select.POLLERR | select.POLLPRI) for _, event in changes.poll(0))
    finally:
        os.close(fd)
