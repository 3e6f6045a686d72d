"""Ids and handles: how a name becomes an id, and what a handle of ours looks like.

An id is computed from the name, so the second CreateVolume of one name meets the record of the first: idempotency is one
`open()`. A handle says in which pool, and on which node, an id lives; nothing else is ever read out of it, and what does not match
the expression letter by letter is not ours.
"""

import base64
import hashlib
import re
from dataclasses import dataclass

_ID = r"[a-z2-7]{26}"
_TAG = r"[a-z2-7]{10}"
_POOL = r"[a-z0-9](?:[-a-z0-9]{0,30}[a-z0-9])?"
_HANDLE = re.compile(rf"(?P<pool>{_POOL})\.(?:(?P<tag>{_TAG})\.)?(?P<id>{_ID})")
ID_PATTERN = re.compile(_ID)

VOLUME = "volume"
SNAPSHOT = "snapshot"
GROUP = "group"


@dataclass(frozen=True)
class Handle:
    """`<pool>.<id>`, or `<pool>.<node tag>.<id>` where the pool lives on one node."""

    pool: str
    id: str
    node_tag: str | None = None

    def __str__(self) -> str:
        return ".".join(part for part in (self.pool, self.node_tag, self.id) if part)


def parse_handle(text: str) -> Handle | None:
    """Parse a volume, snapshot or group handle; None for one that this driver cannot have given."""
    match = _HANDLE.fullmatch(text)
    return Handle(match["pool"], match["id"], match["tag"]) if match else None


def derive_id(kind: str, driver: str, node_tag: str | None, name: str) -> str:
    """Compute the id of the volume, snapshot or group `name`: 130 bits of SHA-256 in base32, lower case.

    `kind` keeps a snapshot from answering to a volume's name, `node_tag` keeps nodes apart that create the same name at once.
    """
    parts = "\0".join((kind, driver, node_tag or "", name)).encode("utf-8", "surrogatepass")
    return _base32(parts, 26)


def node_tag(node_id: str) -> str:
    """Compute the ten letters that stand for a node in a handle: node names may hold dots and 253 letters, handles may not."""
    return _base32(b"node\0" + node_id.encode(), 10)


def _base32(data: bytes, length: int) -> str:
    return base64.b32encode(hashlib.sha256(data).digest()).decode().lower()[:length]
