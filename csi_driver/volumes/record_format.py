"""The one format of records on disk: JSON objects with a schema version and a kind, read strictly.

A record is trusted with data, so nothing is guessed: a missing field, an unknown one, a wrong type or a newer schema is
RecordDamaged with the place named. What an older driver wrote is lifted by `MIGRATIONS`, one small function per version.
"""

import json
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from csi_driver.errors import RecordDamaged

SCHEMA_VERSION = 1
MAX_RECORD_BYTES = 1024 * 1024
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From version N to N+1, applied in turn."""

R = TypeVar("R")


def encode(record: object) -> bytes:
    """Encode a record dataclass; optional fields that hold their default are left out."""
    body = {"schema_version": SCHEMA_VERSION, "kind": _kind(type(record)), **_plain(record)}
    return (json.dumps(body, indent=1, sort_keys=False, ensure_ascii=True) + "\n").encode()


def decode(kind: type[R], data: bytes, place: str) -> R:
    """Decode what `encode` wrote; raises RecordDamaged naming `place` and what is wrong."""
    try:
        return cast("R", _parse(kind, _migrated(kind, json.loads(data)), ""))
    except (ValueError, RecursionError, _Wrong) as error:
        raise RecordDamaged(f"{place} is damaged: {error}") from error


class _Wrong(Exception):
    pass


def _migrated(kind: type, body: object) -> dict[str, Any]:
    """Strip the envelope and lift the body to the present schema."""
    if not isinstance(body, dict):
        raise _Wrong("it is not an object")
    version = body.pop("schema_version", None)
    if type(version) is not int or version < 1:
        raise _Wrong("schema_version is missing")
    if version > SCHEMA_VERSION:
        raise _Wrong(f"schema_version is {version}, this driver knows {SCHEMA_VERSION}: a newer driver wrote it")
    for step in range(version, SCHEMA_VERSION):
        try:
            body = MIGRATIONS[step](body)
        except (LookupError, TypeError, AttributeError) as error:
            raise _Wrong(f"it cannot be lifted from schema_version {step}: {error!r}") from error
    if body.pop("kind", None) != _kind(kind):
        raise _Wrong(f"it is not a {_kind(kind)} record")
    return body


def _kind(record: type) -> str:
    return record.__name__.removesuffix("Record").lower()


def _plain(value: Any) -> Any:  # noqa: ANN401 - JSON is what it is
    if is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: _plain(getattr(value, f.name))
            for f in fields(value)
            if f.default is MISSING or getattr(value, f.name) != f.default
        }
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _parse(kind: Any, value: Any, place: str) -> Any:  # noqa: ANN401, PLR0911 - one line for each shape that JSON can carry
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in get_args(kind):
            return None
        return _parse(next(arm for arm in get_args(kind) if arm is not type(None)), value, place)
    if origin is tuple:
        if not isinstance(value, list):
            raise _Wrong(f"{place} is not a list")
        return tuple(_parse(get_args(kind)[0], item, f"{place}[{index}]") for index, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise _Wrong(f"{place} is not an object")
        return {key: _parse(get_args(kind)[1], item, f"{place}.{key}") for key, item in value.items()}
    if is_dataclass(kind):
        return _parse_object(cast("type", kind), value, place)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _parse_enum(kind, value, place)
    if type(value) is not kind:  # exact: a bool is an int to isinstance
        raise _Wrong(f"{place} is {value!r}, not {kind.__name__}")
    return value


def _parse_enum(kind: type[Enum], value: Any, place: str) -> Enum:  # noqa: ANN401
    try:
        return kind(value)
    except ValueError:
        raise _Wrong(f"{place} is {value!r}, not one of {', '.join(str(known.value) for known in kind)}") from None


def _parse_object(kind: type, value: Any, place: str) -> Any:  # noqa: ANN401
    if not isinstance(value, dict):
        raise _Wrong(f"{place or 'it'} is not an object")
    hints = _hints(kind)
    if unknown := set(value) - set(hints):
        raise _Wrong(f"{place} has the unknown field {min(unknown)!r}")
    for f in fields(kind):
        if f.name not in value and f.default is MISSING and f.default_factory is MISSING:
            raise _Wrong(f"{place} lacks {f.name!r}")
    return kind(**{name: _parse(hints[name], item, f"{place}.{name}".lstrip(".")) for name, item in value.items()})
