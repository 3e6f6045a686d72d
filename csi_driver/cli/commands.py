"""The command `tatami`: a group of commands, each imported when it is asked for.

A command is one file, `cli/NAME.py`, that holds a click command called `command`, and its name in COMMANDS. What a command needs
from above (the command line may not import the composition root) it gets as `Program`, through click's context.
All of them are imported to be listed in `--help`, so heavy imports belong into the commands' functions.
"""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import IO, Any

import click

from csi_driver import __version__, cli
from csi_driver.config import ConfigError, DriverSettings, ServeOptions
from csi_driver.volumes.assembly import Domain

COMMANDS = ("call", "serve", "snapshots", "try", "volumes")

ServeFunction = Callable[[ServeOptions, DriverSettings], int]
InspectFunction = Callable[[DriverSettings, str], AbstractContextManager[Domain]]


@dataclass(frozen=True)
class Program:
    """What the composition root lends to the commands. `serve` runs until it is told to stop and returns the exit code.

    `inspect` opens the pools beside whoever serves them, as node `node_id`.
    """

    serve: ServeFunction
    inspect: InspectFunction


class Refused(click.ClickException):
    """A mistake in the configuration: its lines on stderr as they are, exit code 2."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(self.message, file=file, err=True)


class CommandGroup(click.Group):
    """Finds each command in the file of its name."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  # click's signature
        return _command(cmd_name)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise Refused(str(error)) from error


def build(serve: ServeFunction, inspect: InspectFunction) -> click.Group:
    """Build the command line around the functions that serve and that look into pools."""
    group = CommandGroup(
        name="tatami",
        help="Tatami turns directories, of an NFS server or of this node, into Kubernetes volumes.",
        context_settings={
            "obj": Program(serve=serve, inspect=inspect),
            "help_option_names": ["-h", "--help"],
            "max_content_width": 120,
        },
        no_args_is_help=True,
    )
    return click.version_option(__version__, prog_name="tatami", message="%(prog)s %(version)s")(group)


def _command(name: str) -> click.Command | None:
    if name not in COMMANDS:
        return None
    found = importlib.import_module(f"{cli.__name__}.{name}").command
    assert isinstance(found, click.Command)
    return found
