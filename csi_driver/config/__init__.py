"""What the driver is told at start: flags, environment and `pools.toml`, read once into frozen values."""

from csi_driver.config.pools_file import DEFAULT_NAMES, DEFAULT_POOL_PATH, load_settings, parse_settings
from csi_driver.config.settings import (
    Backend,
    Budget,
    DriverSettings,
    HostPathPool,
    LogFormat,
    LogLevel,
    NfsPool,
    Pool,
    Role,
    ServeOptions,
)
from csi_driver.config.values import ConfigError, parse_endpoint, parse_metrics_address

__all__ = [
    "DEFAULT_NAMES",
    "DEFAULT_POOL_PATH",
    "Backend",
    "Budget",
    "ConfigError",
    "DriverSettings",
    "HostPathPool",
    "LogFormat",
    "LogLevel",
    "NfsPool",
    "Pool",
    "Role",
    "ServeOptions",
    "load_settings",
    "parse_endpoint",
    "parse_metrics_address",
    "parse_settings",
]
