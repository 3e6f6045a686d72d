"""What people may write into classes and inline volumes, and the one place that reads it.

StorageClass parameters are written by the cluster admin, mutable ones (VolumeAttributesClass) too, inline volumes by anybody who
may create a pod. Every unknown key is refused by name: a typo that is ignored is a volume that is not what was asked for.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

from csi_driver.config.values import ConfigError, parse_quantity
from csi_driver.errors import InvalidArgument, quoted
from csi_driver.volumes.model import Layout, LimitPolicy, OnDelete, Ownership
from csi_driver.volumes.requests import ClassParameters

PVC_NAME = "csi.storage.k8s.io/pvc/name"
PVC_NAMESPACE = "csi.storage.k8s.io/pvc/namespace"
PV_NAME = "csi.storage.k8s.io/pv/name"
EPHEMERAL = "csi.storage.k8s.io/ephemeral"
_KUBERNETES = "csi.storage.k8s.io/"

_MAX_ID = 2**32 - 2  # (uid_t)-1 means "leave it", chown(2)
_MAX_DEPTH = 8
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_POOL = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,30}[a-z0-9])?")
RESERVED_DIRECTORIES = frozenset({"archived", "lost+found"})
"""First components that a directory template may not take: the archive of deleted volumes, and the filesystem's own."""

T = TypeVar("T")


@dataclass(frozen=True)
class InlineParameters:
    """What a pod author may say of an inline volume."""

    size_bytes: int | None = None
    pool: str | None = None


@dataclass(frozen=True)
class StaticParameters:
    """Where an existing directory lies that an admin offers as a volume."""

    pool: str
    directory: str


def parse_class_parameters(parameters: Mapping[str, str], mutable: Mapping[str, str] | None = None) -> ClassParameters:
    """Parse a StorageClass' parameters, with the VolumeAttributesClass' on top.

    Raises InvalidArgument naming the key, its value and what is allowed.
    """
    own = _without_kubernetes(parameters)
    known = ("pool", "directory", "layout", "onDelete", "uid", "gid", "mode", "verify", "limit", "inodes")
    _refuse_unknown("parameters", own, known)
    on_delete = parse_mutable_parameters(mutable or {}) or _take("parameters", own, "onDelete", _on_delete)
    return ClassParameters(
        pool=_take("parameters", own, "pool", _pool),
        directory=_render_directory(own["directory"], parameters) if "directory" in own else None,
        on_delete=on_delete or OnDelete.DELETE,
        ownership=Ownership(
            uid=_take("parameters", own, "uid", _owner),
            gid=_take("parameters", own, "gid", _owner),
            mode=_take("parameters", own, "mode", _mode),
        ),
        layout=_take("parameters", own, "layout", _layout),
        limit=_take("parameters", own, "limit", _limit) or LimitPolicy.PREFERRED,
        inodes=_take("parameters", own, "inodes", _inodes),
        verify=_take("parameters", own, "verify", _yes_or_no) or False,
    )


def parse_mutable_parameters(mutable: Mapping[str, str]) -> OnDelete | None:
    """Parse what ControllerModifyVolume may change: `onDelete`. None where nothing is to change."""
    _refuse_unknown("mutable_parameters", mutable, ("onDelete",))
    return _take("mutable_parameters", mutable, "onDelete", _on_delete)


def parse_snapshot_parameters(parameters: Mapping[str, str]) -> bool:
    """Parse a VolumeSnapshotClass' parameters: whether snapshots are read once they are cut, to be verified from then on."""
    own = _without_kubernetes(parameters)
    _refuse_freeze(own)
    _refuse_unknown("parameters", own, ("digests",))
    return _take("parameters", own, "digests", _yes_or_no) or False


def parse_group_parameters(parameters: Mapping[str, str]) -> None:
    """Refuse every VolumeGroupSnapshotClass parameter but those that the snapshotter adds itself."""
    own = _without_kubernetes(parameters)
    _refuse_freeze(own)
    _refuse_unknown("parameters", own, ())


def _refuse_freeze(own: Mapping[str, str]) -> None:
    if "freeze" in own:
        raise InvalidArgument.field(
            'parameters["freeze"]',
            own["freeze"],
            "volumes that are directories share one filesystem, which is never frozen for one of them; leave it out",
        )


def parse_inline_parameters(context: Mapping[str, str]) -> InlineParameters:
    """Parse the volumeAttributes of an inline volume: hostile input, `size` and `pool` and nothing else."""
    own = _without_kubernetes(context)
    _refuse_unknown("volume_context", own, ("size", "pool"))
    return InlineParameters(
        size_bytes=_take("volume_context", own, "size", _quantity), pool=_take("volume_context", own, "pool", _pool)
    )


def parse_static_parameters(context: Mapping[str, str]) -> StaticParameters:
    """Parse the volumeAttributes of a static volume: `pool` and `directory`, both needed."""
    own = _without_kubernetes(context)
    _refuse_unknown("volume_context", own, ("pool", "directory"))
    pool = _take("volume_context", own, "pool", _pool)
    directory = _take("volume_context", own, "directory", _relative_directory)
    if pool is None or directory is None:
        missing = "pool" if pool is None else "directory"
        raise InvalidArgument(
            f'volume_context["{missing}"] is missing: a volume whose handle is not one of this driver\'s is static and needs '
            "`pool` and `directory`, the place of an existing directory in that pool"
        )
    return StaticParameters(pool, directory)


def check_directory(path: str, field: str) -> str:
    """Return `path` if it is a safe directory relative to a pool's root, else raise InvalidArgument naming `field`."""
    components = path.split("/")
    if len(components) > _MAX_DEPTH or not all(_COMPONENT.fullmatch(component) for component in components):
        raise InvalidArgument.field(
            field,
            path,
            f"at most {_MAX_DEPTH} components of letters, digits, `_`, `-` and `.`, none starting with `.` or `-`, 128 letters each",
        )
    if components[0] in RESERVED_DIRECTORIES:
        raise InvalidArgument.field(field, path, f"`{components[0]}` is reserved")
    return path


# --- one value --------------------------------------------------------------------------------------------------------------------


def _without_kubernetes(values: Mapping[str, str]) -> dict[str, str]:
    # Sidecars and kubelet add their own keys (`--extra-create-metadata`, podInfoOnMount, tokens); these are not people's words.
    return {key: value for key, value in values.items() if not key.startswith(_KUBERNETES)}


def _refuse_unknown(field: str, values: Mapping[str, str], known: tuple[str, ...]) -> None:
    for key in sorted(values):
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f" (did you mean `{near[0]}`?)" if near else ""
            allowed = ", ".join(f"`{name}`" for name in known) or "none"
            raise InvalidArgument(f"{field} has the unknown key {quoted(key)}{hint}: allowed are {allowed}")


def _take(field: str, values: Mapping[str, str], key: str, parse: Callable[[str, str], T]) -> T | None:
    return parse(f'{field}["{key}"]', values[key]) if key in values else None


def _pool(field: str, value: str) -> str:
    if not _POOL.fullmatch(value):
        raise InvalidArgument.field(field, value, "a pool's name: lower-case letters, digits and `-`, at most 32")
    return value


def _on_delete(field: str, value: str) -> OnDelete:
    try:
        return OnDelete(value)
    except ValueError:
        raise InvalidArgument.field(field, value, "allowed are `delete`, `retain` and `archive`") from None


def _yes_or_no(field: str, value: str) -> bool:
    if value not in {"true", "false"}:
        raise InvalidArgument.field(field, value, 'allowed are "true" and "false"')
    return value == "true"


def _layout(field: str, value: str) -> Layout:
    try:
        return Layout(value)
    except ValueError:
        raise InvalidArgument.field(field, value, "allowed are `directory` and `image`") from None


def _limit(field: str, value: str) -> LimitPolicy:
    try:
        return LimitPolicy(value)
    except ValueError:
        raise InvalidArgument.field(field, value, "allowed are `preferred` and `required`") from None


def _inodes(field: str, value: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,17}", value, re.ASCII):
        raise InvalidArgument.field(
            field, value, "the most files and directories that a volume may have: a whole number from 1"
        )
    return int(value)


def _owner(field: str, value: str) -> int:
    if not re.fullmatch(r"[0-9]{1,10}", value, re.ASCII) or int(value) > _MAX_ID:
        raise InvalidArgument.field(field, value, f"a number from 0 to {_MAX_ID}")
    return int(value)


def _mode(field: str, value: str) -> int:
    # Set-user-id on a directory means nothing on Linux; set-group-id and sticky do.
    if not re.fullmatch(r"[0-3]?[0-7]{3}", value, re.ASCII):
        raise InvalidArgument.field(
            field, value, "an octal mode of three digits, or four from `0000` to `3777` (as `0770` or `2775`)"
        )
    return int(value, 8)


def _quantity(field: str, value: str) -> int:
    try:
        return parse_quantity(value)
    except ConfigError as error:
        raise InvalidArgument.field(field, value, str(error)) from None


def _relative_directory(field: str, value: str) -> str:
    return check_directory(value, field)


def _render_directory(template: str, metadata: Mapping[str, str]) -> str:
    field = 'parameters["directory"]'
    keys = {"pvc.name": PVC_NAME, "pvc.namespace": PVC_NAMESPACE, "pv.name": PV_NAME}

    def value(match: re.Match[str]) -> str:
        key = keys.get(match[1])
        if key is None:
            raise InvalidArgument.field(field, template, "allowed variables are ${pvc.name}, ${pvc.namespace} and ${pv.name}")
        if key not in metadata:
            raise InvalidArgument.field(
                field, template, f"the request says no `{key}`; external-provisioner sends it with --extra-create-metadata"
            )
        if not _COMPONENT.fullmatch(metadata[key]):
            raise InvalidArgument.field(f'parameters["{key}"]', metadata[key], "a Kubernetes name")
        return metadata[key]

    return check_directory(_VARIABLE.sub(value, template), field)
