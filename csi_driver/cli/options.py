"""The options that commands about pools have in common, with the variables that the driver's own container sets for `serve`."""

import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from csi_driver.cli.commands import Program
from csi_driver.config import load_settings
from csi_driver.volumes.assembly import Domain

_OPTIONS = (
    click.option(
        "--config",
        envvar="TATAMI_CONFIG",
        type=click.Path(path_type=Path),
        show_envvar=True,
        help="pools.toml, the driver's own.",
    ),
    click.option(
        "--node-id",
        envvar="TATAMI_NODE_ID",
        default=socket.gethostname,
        show_default="the host's name",
        show_envvar=True,
        help="The node whose volumes these are, where pools live on a node.",
    ),
    click.option("--pool", "pool", multiple=True, help="Look into this pool only; may be given several times."),
    click.option(
        "--output",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="json: one document, for scripts.",
    ),
)


def about_pools(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--config`, `--node-id`, `--pool` and `--output`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def look_into(context: click.Context, config: Path | None, node_id: str) -> AbstractContextManager[Domain]:
    """Open the pools that the configuration names. Raises ConfigError."""
    return context.ensure_object(Program).inspect(load_settings(config), node_id)
