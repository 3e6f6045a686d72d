"""`pools.toml`: the one parser of the file that says which pools there are.

An admin edits it as a ConfigMap and sees the outcome in the log of a crashing pod, so every mistake of the file is reported at once,
one line each, and each line names the file, the key, the value and what is allowed. Nothing is guessed: an unknown key is a
mistake, because a misspelt `shared` would change where data lives.

Only the words are judged here. Whether a directory exists or a server answers is known to the backend, at the time of the call.
"""

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from csi_driver.config.settings import Backend, Budget, DriverSettings, HostPathPool, NfsPool, Pool
from csi_driver.config.values import (
    MAX_BYTES,
    ConfigError,
    parse_directory,
    parse_driver_name,
    parse_mount_option,
    parse_percent,
    parse_pool_name,
    parse_quantity,
    parse_server,
    parse_server_path,
    shown,
)

DEFAULT_POOL_PATH = Path("/var/lib/tatami/default")
"""Where the one pool `default` lives when no `pools.toml` is given."""

DEFAULT_NAMES: Mapping[Backend, str] = MappingProxyType({"hostpath": "hostpath.csi.tatami.dev", "nfs": "nfs.csi.tatami.dev"})

MAX_FILE_BYTES = 1024 * 1024  # what a ConfigMap can hold (Kubernetes: 1 MiB)
MAX_VOLUMES_PER_NODE = 2**63 - 1  # int64 in NodeGetInfoResponse

MAX_OVERCOMMIT = 1000
_BUDGET = ("size", "overcommit", "reserve")

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
_T = TypeVar("_T")


def load_settings(file: Path | None) -> DriverSettings:
    """Read `pools.toml`; without one, serve hostPath from one pool `default` at DEFAULT_POOL_PATH.

    Raises ConfigError with a line for every mistake.
    """
    if file is None:
        pool = HostPathPool(name="default", path=DEFAULT_POOL_PATH)
        return DriverSettings("hostpath", DEFAULT_NAMES["hostpath"], MappingProxyType({"default": pool}), "default")
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"{file}: cannot be read: {reason}") from error
    return parse_settings(content, str(file))


def parse_settings(content: bytes, source: str) -> DriverSettings:
    """Parse the content of `pools.toml`; `source` is the file's name in messages. Raises ConfigError with a line for every mistake."""
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{source}: is larger than {MAX_FILE_BYTES} bytes")
    try:
        document = tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: is not UTF-8: byte {error.start} is {content[error.start]:#04x}") from error
    except RecursionError as error:
        raise ConfigError(f"{source}: is not valid TOML: nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, and int()'s limit of 4300 digits
        raise ConfigError(f"{source}: is not valid TOML: {error}") from error
    problems: list[str] = []
    settings = _settings(_Table(source, "", document, problems))
    if problems or settings is None:
        raise ConfigError(*problems)
    return settings


class _Table:
    """One table of the file: hands out checked values and adds a line to `problems` for each that is wrong."""

    def __init__(self, source: str, name: str, values: Mapping[str, Any], problems: list[str]) -> None:
        self.values = values
        self._source = source
        self._name = name
        self._problems = problems

    def refuse(self, key: str, allowed: str) -> None:
        place = f"[{self._name}] " if self._name else ""
        what = f"{_key(key)} = {shown(self.values[key])}" if key in self.values else f"{_key(key)} is missing"
        self._problems.append(f"{self._source}: {place}{what}: {allowed}")

    def only(self, *known: str, kind: str = "key") -> None:
        """Refuse every key that is not known, and name the known one that was probably meant."""
        for key in self.values:
            if key not in known:
                near = difflib.get_close_matches(key[:64], known, n=1)
                meant = f" (did you mean {near[0]}?)" if near else ""
                self.refuse(key, f"unknown {kind}{meant}; allowed: {', '.join(known)}")

    def table(self, key: str) -> "_Table | None":
        value = self.values.get(key, {})
        if isinstance(value, dict):
            return _Table(self._source, f"{self._name}.{_key(key)}" if self._name else key, value, self._problems)
        self.refuse(key, f"must be a table, [{self._name}.{_key(key)}]" if self._name else f"must be a table, [{key}]")
        return None

    def text(self, key: str, parse: Callable[[str], _T], describe: str, *, required: bool = False) -> _T | None:
        if key not in self.values:
            if required:
                self.refuse(key, describe)
            return None
        value = self.values[key]
        if not isinstance(value, str):
            self.refuse(key, f"must be a string: {describe}")
            return None
        try:
            return parse(value)
        except ConfigError as error:
            self.refuse(key, str(error))
            return None

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if isinstance(value, bool):
            return value
        self.refuse(key, "must be true or false")
        return False

    def count(self, key: str, most: int) -> int | None:
        if key not in self.values:
            return None
        value = self.values[key]
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most:
            return value
        self.refuse(key, f"must be a whole number from 1 to {most}")
        return None

    def amount(self, key: str, parse: Callable[[str], _T], least: int, describe: str) -> int | _T | None:
        """Return a number of bytes, or what `parse` makes of a string."""
        value = self.values.get(key, "")
        if isinstance(value, str):
            return self.text(key, parse, describe)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_BYTES:
            return value
        self.refuse(key, describe)
        return None

    def factor(self, key: str, least: int, most: int) -> Fraction | None:
        """Return a number, exactly as it is written."""
        value = self.values.get(key, least)
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
            return Fraction(str(value))
        self.refuse(key, f"must be a number from {least} to {most}")
        return None

    def texts(self, key: str, parse: Callable[[str], str]) -> tuple[str, ...]:
        value = self.values.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(key, 'must be a list of strings, such as ["vers=4.2", "hard"]')
            return ()
        try:
            return tuple(parse(item) for item in value)
        except ConfigError as error:
            self.refuse(key, str(error))
            return ()


def _settings(document: _Table) -> DriverSettings | None:
    document.only("driver", "pools", kind="table")
    driver, pools = document.table("driver"), document.table("pools")
    if driver is None or pools is None:
        return None
    driver.only("backend", "name", "default_pool", "max_volumes_per_node")
    backend: Backend | None = "hostpath"
    if "backend" in driver.values:
        backend = driver.text("backend", _backend, 'must be "hostpath" or "nfs"')
    given_name = driver.text("name", parse_driver_name, "a lower-case domain name")
    most = driver.count("max_volumes_per_node", MAX_VOLUMES_PER_NODE)
    default = driver.text("default_pool", str, "the name of a pool")
    if default is not None and default not in pools.values:
        driver.refuse("default_pool", f"must be the name of a pool: {', '.join(map(_key, pools.values)) or 'there is none'}")
    if not pools.values:
        document.refuse("pools", "must have at least one pool, [pools.NAME]")
    read = [_pool(pools, name, backend) for name in pools.values]
    parsed = {pool.name: pool for pool in read if pool is not None}
    _refuse_overlaps(pools, list(parsed.values()))
    if backend is None:
        return None
    if default is None:
        default = next(iter(parsed)) if len(parsed) == 1 else "default" if "default" in parsed else None
    return DriverSettings(backend, given_name or DEFAULT_NAMES[backend], MappingProxyType(parsed), default, most)


def _backend(text: str) -> Backend:
    if text == "hostpath":
        return "hostpath"
    if text == "nfs":
        return "nfs"
    raise ConfigError('must be "hostpath" or "nfs"')


def _pool(pools: _Table, name: str, backend: Backend | None) -> Pool | None:
    try:
        parse_pool_name(name)
    except ConfigError as error:
        pools.refuse(name, str(error))
        return None
    table = pools.table(name)
    if table is None or backend is None:
        return None
    if backend == "hostpath":
        table.only("path", "shared", "inline", *_BUDGET)
        directory = table.text("path", parse_directory, "an absolute path of a directory on the node", required=True)
        shared, inline = table.flag("shared"), table.flag("inline")
        budget = _budget(table)
        return HostPathPool(name, directory, shared, inline, budget) if directory else None
    table.only("server", "path", "options", "inline", "data", *_BUDGET)
    server = table.text("server", parse_server, "a host name, an IPv4 address or an [IPv6] address", required=True)
    path = table.text("path", parse_server_path, "an absolute path on the server", required=True)
    options, inline = table.texts("options", parse_mount_option), table.flag("inline")
    data = table.text("data", parse_directory, "an absolute path of the directory on the controller's machine")
    budget = _budget(table)
    return NfsPool(name, server, path, options, inline, budget, data) if server and path else None


def _budget(table: _Table) -> Budget:
    size = table.amount("size", parse_quantity, 1, 'must be a whole Kubernetes quantity such as "500Gi", or bytes')
    overcommit = table.factor("overcommit", 1, MAX_OVERCOMMIT)
    reserve = table.amount("reserve", _reserve, 0, _RESERVE)
    share, kept = (reserve, 0) if isinstance(reserve, Fraction) else (Fraction(0), reserve or 0)
    return Budget(size, overcommit or Fraction(1), kept, share)


_RESERVE = (
    'must be a whole Kubernetes quantity such as "5Gi", bytes, or a share of the filesystem from "0%" to less than "100%"'
)


def _reserve(text: str) -> int | Fraction:
    share = parse_percent(text)
    if share is not None:
        return share
    try:
        return parse_quantity(text)
    except ConfigError:
        raise ConfigError(_RESERVE) from None


def _refuse_overlaps(pools: _Table, parsed: list[Pool]) -> None:
    """Refuse two pools of one place: each would see the other's volumes as foreign directories, or both would own one record."""
    for index, pool in enumerate(parsed):
        for other in parsed[:index]:
            nested = pool.path.is_relative_to(other.path) or other.path.is_relative_to(pool.path)
            table = pools.table(pool.name)
            if nested and _machine(pool) == _machine(other) and table is not None:
                table.refuse(
                    "path",
                    f"must be neither the path of another pool nor above or below it: [pools.{other.name}] has {other.path}",
                )
            if table is not None and _share_data(pool, other):
                table.refuse(
                    "data", f"must be neither the data of another pool nor above or below it, as it is of [pools.{other.name}]"
                )


def _share_data(pool: Pool, other: Pool) -> bool:
    if not isinstance(pool, NfsPool) or not isinstance(other, NfsPool) or pool.data is None or other.data is None:
        return False
    return pool.data.is_relative_to(other.data) or other.data.is_relative_to(pool.data)


def _machine(pool: Pool) -> str:
    return pool.server.lower() if isinstance(pool, NfsPool) else "this one"


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else shown(key)
