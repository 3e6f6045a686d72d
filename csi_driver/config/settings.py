"""What the driver is told at start, as frozen values. Nothing in here reads anything."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

from csi_driver.config.values import ConfigError, parse_directory, parse_endpoint, parse_metrics_address, parse_node_id, shown

Backend = Literal["hostpath", "nfs"]
Role = Literal["controller", "node", "all", "expansion"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True)
class Budget:
    """How much of a pool may be promised to volumes.

    `size_bytes` None is what its filesystem has, but for the reserve: `reserve_bytes`, or the share `reserve_share` of the filesystem.
    """

    size_bytes: int | None = None
    overcommit: Fraction = Fraction(1)
    reserve_bytes: int = 0
    reserve_share: Fraction = Fraction(0)

    def reserve_of(self, total_bytes: int) -> int:
        """Return the bytes of a filesystem with `total_bytes` that stay free."""
        return self.reserve_bytes + int(self.reserve_share * total_bytes)


@dataclass(frozen=True)
class HostPathPool:
    """A directory of the node (or, with `shared`, one filesystem that every node sees at the same path)."""

    name: str
    path: Path
    shared: bool = False
    inline: bool = False  # whether the pool takes inline volumes, which pod authors write and no quota of claims counts
    budget: Budget = Budget()


@dataclass(frozen=True)
class NfsPool:
    """A directory of an NFS server. `server` is a host name, an IPv4 address or an [IPv6] address; `path` is the server's.

    `data` is that directory as the controller's own machine has it, where it is the server's; None: it is not.
    """

    name: str
    server: str
    path: Path
    options: tuple[str, ...] = ()
    inline: bool = False
    budget: Budget = Budget()
    data: Path | None = None


Pool = HostPathPool | NfsPool


@dataclass(frozen=True)
class DriverSettings:
    """What `pools.toml` says. All pools are of the backend's kind; at least one; read-only."""

    backend: Backend
    name: str
    pools: Mapping[str, Pool]
    default_pool: str | None  # the pool of a class that names none; None: the class must name one
    max_volumes_per_node: int | None = None


@dataclass(frozen=True)
class ServeOptions:
    """What the command line and the environment say. Made through `checked`, which refuses what cannot be used."""

    config: Path | None
    role: Role
    endpoint: str
    node_id: str
    kubelet_dir: Path
    kubelet_registration_path: Path | None
    metrics_address: str | None
    log_format: LogFormat
    log_level: LogLevel

    def checked(self) -> "ServeOptions":
        """Return these options, the kubelet's directory normalised, or raise ConfigError with a line for each mistake."""
        checks: list[tuple[str, str, Callable[[str], object]]] = [
            ("endpoint", self.endpoint, parse_endpoint),
            ("node-id", self.node_id, parse_node_id),
            ("kubelet-dir", str(self.kubelet_dir), parse_directory),
        ]
        if self.kubelet_registration_path is not None:
            checks.append(("kubelet-registration-path", str(self.kubelet_registration_path), self._registration))
        if self.metrics_address is not None:
            checks.append(("metrics-address", self.metrics_address, parse_metrics_address))
        problems = []
        for flag, value, parse in checks:
            try:
                parse(value)
            except ConfigError as error:
                variable = "TATAMI_" + flag.upper().replace("-", "_")
                problems.append(f"--{flag} (or {variable}) = {shown(value)}: {error}")
        if problems:
            raise ConfigError(*problems)
        return replace(self, kubelet_dir=parse_directory(str(self.kubelet_dir)))

    def _registration(self, text: str) -> Path:
        if self.role not in ("node", "all"):
            raise ConfigError(
                f"the kubelet takes the node service, and --role {self.role} has none: leave it out, or use node or all"
            )
        return parse_endpoint(text)
