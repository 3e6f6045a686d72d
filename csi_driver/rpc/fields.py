"""Single fields of requests: text in, a checked value out, or an error that says which field, what it held and what is allowed.

The limits are those of the CSI spec 1.13 ("Field Requirements"): strings of 128 bytes and maps of 4 KiB where a field says nothing
else. Whether a handle names anything is not asked here: an unknown one is the domain's NotFound, and Delete's OK.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from csi_driver.errors import InvalidArgument, NotFound, OperationPending, OutOfRange
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc.redaction import SERVICE_ACCOUNT_TOKENS
from csi_driver.volumes.model import AccessMode, AccessType, Topology
from csi_driver.volumes.requests import Capability, CapacityRange, Page

MAX_STRING_BYTES = 128
MAX_NODE_ID_BYTES = 256  # NodeGetInfoResponse.node_id says so
MAX_MAP_BYTES = 4096
MAX_PATH_BYTES = 4095  # PATH_MAX of limits.h, without its NUL
MAX_COMPONENT_BYTES = 255  # NAME_MAX of limits.h

_BANNED_IN_NAMES = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"
)  # CreateVolumeRequest.name; "commonly used whitespace" is not
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_MOUNT_FLAG = re.compile(r"""(?!-)((?![,"'`\\])[!-~])+""")
_MAX_GROUP = 2**32 - 2
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Message Topology: a name of 63 characters, before it, if at all, a DNS prefix of 63 (253 where Kubernetes' own labels are sent).
_TOPOLOGY_KEY = re.compile(r"(?:[a-z0-9](?:[-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_TOPOLOGY_VALUE = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def parse_name(value: str, field: str) -> str:
    """Return the name that a CO suggests: any Unicode up to 128 bytes without the control characters that the spec bans."""
    _require(value, field)
    if _BANNED_IN_NAMES.search(value):
        raise InvalidArgument.field(
            field, value, "any Unicode but control characters (tab, line feed and carriage return may be)"
        )
    return _bounded(value, field)


def parse_handle(value: str, field: str) -> str:
    """Return the id of a volume, snapshot or group: anything up to 128 bytes, because a static volume's is an admin's word."""
    _require(value, field)
    return _bounded(value, field)


def parse_handles(values: Sequence[str], field: str) -> tuple[str, ...]:
    """Return ids of which each is there once."""
    handles = tuple(parse_handle(value, f"{field}[{index}]") for index, value in enumerate(values))
    if len(set(handles)) != len(handles):
        repeated = next(handle for index, handle in enumerate(handles) if handle in handles[:index])
        raise InvalidArgument.field(field, repeated, "is there twice; each may be there once")
    return handles


def parse_node_id(value: str, field: str, *, required: bool = True) -> str:
    """Return a node's id, at most 256 bytes; "" only if it is not required."""
    if required:
        _require(value, field)
    return _bounded(value, field, MAX_NODE_ID_BYTES)


def parse_path(value: str, field: str) -> str:
    """Return an absolute path without `..`, `.`, doubled or trailing slashes; never `/` itself."""
    _require(value, field)
    if not value.startswith("/"):
        raise InvalidArgument.field(field, value, "an absolute path")
    if _CONTROL.search(value):
        raise InvalidArgument.field(field, value, "a path without control characters")
    components = [component for component in value.split("/") if component not in ("", ".")]
    if not components:
        raise InvalidArgument.field(field, value, "a directory of its own, not the root")
    if ".." in components:
        raise InvalidArgument.field(field, value, "a path without `..`")
    if len(value.encode()) > MAX_PATH_BYTES or any(len(component.encode()) > MAX_COMPONENT_BYTES for component in components):
        raise InvalidArgument.field(
            field, value, f"at most {MAX_PATH_BYTES} bytes, and {MAX_COMPONENT_BYTES} between two slashes (PATH_MAX, NAME_MAX)"
        )
    return "/" + "/".join(components)


def parse_optional_path(value: str, field: str) -> str:
    """Return a path as `parse_path` does, or "" where none is given."""
    return parse_path(value, field) if value else ""


def parse_volume_path(value: str, field: str) -> str:
    """Return the path at which a volume is said to be.

    Raises NotFound for a relative one: nothing was ever published there (csi-sanity asks for NOT_FOUND at `some/path`).
    """
    if value and not value.startswith("/"):
        raise NotFound(f"no volume is at {field} {value!r}: volumes are published at absolute paths")
    return parse_path(value, field)


def parse_map(value: Mapping[str, str], field: str) -> dict[str, str]:
    """Return a map's items, 4 KiB in all. The kubelet's tokens (tokenRequests of the CSIDriver) do not count: they are not the CO's."""
    size = sum(len(key.encode()) + len(item.encode()) for key, item in value.items() if key != SERVICE_ACCOUNT_TOKENS)
    if size > MAX_MAP_BYTES:
        raise InvalidArgument(f"{field} holds {size} bytes of keys and values: at most {MAX_MAP_BYTES} are allowed")
    return dict(value)


def parse_page(max_entries: int, starting_token: str) -> Page:
    """Return which page of a list is asked for. A token is the domain's to judge, but none of ours is longer than a string may be."""
    if max_entries < 0:
        raise InvalidArgument.field("max_entries", max_entries, "0 (all) or more")
    if len(starting_token.encode()) > MAX_STRING_BYTES:
        raise OperationPending("starting_token is not a token that this driver gave: too long; start again without one")
    return Page(max_entries, starting_token)


def parse_capacity(value: csi.CapacityRange, field: str) -> CapacityRange:
    """Return a capacity_range. Raises InvalidArgument for negative or no sizes, OutOfRange for a limit below what is required."""
    for part, size in (("required_bytes", value.required_bytes), ("limit_bytes", value.limit_bytes)):
        if size < 0:
            raise InvalidArgument.field(f"{field}.{part}", size, "0 (not given) or more")
    if not value.required_bytes and not value.limit_bytes:
        raise InvalidArgument(f"{field} is empty: required_bytes, limit_bytes or both must be given")
    if value.limit_bytes and value.limit_bytes < value.required_bytes:
        raise OutOfRange(
            f"{field} asks for at least {value.required_bytes} and at most {value.limit_bytes} bytes: no size is both"
        )
    return CapacityRange(value.required_bytes, value.limit_bytes)


def parse_requisite(value: csi.TopologyRequirement, field: str) -> tuple[Topology, ...]:
    """Return the topologies of which one must do; empty where any does. What is only preferred binds nobody (CSI spec)."""
    if not value.requisite and not value.preferred:
        raise InvalidArgument(f"{field} is empty: requisite, preferred or both must be given")
    for index, topology in enumerate(value.preferred):
        parse_topology(topology, f"{field}.preferred[{index}]")
    parsed = (parse_topology(topology, f"{field}.requisite[{index}]") for index, topology in enumerate(value.requisite))
    return tuple(topology for topology in parsed if topology)


def parse_topology(value: csi.Topology, field: str) -> Topology:
    """Return the segments of a topology, which may be none: everywhere."""
    for key, segment in value.segments.items():
        if not _TOPOLOGY_KEY.fullmatch(key):
            raise InvalidArgument.field(
                f"{field}.segments", key, "a key is a name of at most 63 characters, with or without a DNS prefix"
            )
        if not _TOPOLOGY_VALUE.fullmatch(segment):
            raise InvalidArgument.field(
                f'{field}.segments["{key}"]', segment, "1 to 63 letters, digits, `-`, `_`, `.`, a letter or digit at both ends"
            )
    return parse_map(value.segments, f"{field}.segments")


def parse_capabilities(values: Sequence[csi.VolumeCapability], field: str) -> tuple[Capability, ...]:
    """Return the capabilities, at least one."""
    if not values:
        raise InvalidArgument(f"{field} is missing: at least one capability is needed")
    return tuple(parse_capability(value, f"{field}[{index}]") for index, value in enumerate(values))


def parse_capability(value: csi.VolumeCapability, field: str) -> Capability:
    """Return one capability, its mount flags checked but as they are."""
    mode = _access_mode(value, field)
    match value.WhichOneof("access_type"):
        case "block":
            return Capability(AccessType.BLOCK, mode)
        case "mount":
            return Capability(
                AccessType.MOUNT,
                mode,
                fs_type=_fs_type(value.mount.fs_type, f"{field}.mount.fs_type"),
                mount_flags=_mount_flags(value.mount.mount_flags, f"{field}.mount.mount_flags"),
                mount_group=_mount_group(value.mount.volume_mount_group, f"{field}.mount.volume_mount_group"),
            )
        case _:
            raise InvalidArgument(f"{field}.access_type is missing: `mount` or `block` must be given")


def _access_mode(value: csi.VolumeCapability, field: str) -> AccessMode:
    number = value.access_mode.mode
    allowed = "one of " + ", ".join(AccessMode)
    if number == csi.VolumeCapability.AccessMode.UNKNOWN:
        raise InvalidArgument(f"{field}.access_mode is missing: {allowed}")
    if number not in csi.VolumeCapability.AccessMode.Mode.values():
        raise InvalidArgument.field(f"{field}.access_mode.mode", number, allowed)
    return AccessMode(csi.VolumeCapability.AccessMode.Mode.Name(number))


def _fs_type(value: str, field: str) -> str:
    # A directory has its pool's filesystem, but Kubernetes sends one all the same (external-provisioner --default-fstype).
    if value and not _WORD.fullmatch(value):
        raise InvalidArgument.field(field, value, "a filesystem's name: letters, digits, `.`, `_` and `-`")
    return value


def _mount_flags(flags: Iterable[str], field: str) -> tuple[str, ...]:
    words = tuple(flags)
    size = sum(len(word.encode()) for word in words)
    if size > MAX_MAP_BYTES:
        raise InvalidArgument(f"{field} holds {size} bytes: at most {MAX_MAP_BYTES} are allowed")
    for index, word in enumerate(words):
        # Which flags there are depends on the pool. But whatever it is, nothing may end an option and begin another.
        if not _MOUNT_FLAG.fullmatch(word):
            # The spec forbids to show flags to those who may not see them, and this message ends up in a pod's events.
            shown = word.partition("=")[0] + "=…" if "=" in word else word
            raise InvalidArgument.field(
                f"{field}[{index}]",
                shown,
                "one mount option: printable ASCII without `,`, white space, quotes and backslash, not beginning with `-`",
            )
    return words


def _mount_group(value: str, field: str) -> str:
    # Kubernetes sends fsGroup as a number. The last two of 32 bits are no groups: -1 means "leave it" (chown(2)).
    if value and not (re.fullmatch(r"0|[1-9][0-9]{0,9}", value) and int(value) <= _MAX_GROUP):
        raise InvalidArgument.field(field, value, f"a group's number from 0 to {_MAX_GROUP}")
    return value


def _require(value: str, field: str) -> None:
    if not value:
        raise InvalidArgument(f"{field} is missing: it is required")


def _bounded(value: str, field: str, limit: int = MAX_STRING_BYTES) -> str:
    size = len(value.encode())
    if size > limit:
        raise InvalidArgument.field(field, value, f"it has {size} bytes, at most {limit} are allowed")
    return value
