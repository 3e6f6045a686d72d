"""The command `tatami`: a group that finds its commands by looking into this package.

A command is one file: `cli/NAME.py` that holds a click command called `command`. Nothing else has to be edited to add one. What a
command needs from above (the command line may not import the composition root) it gets as `Program`, through click's context.
Every file is imported to list the commands in `--help`, so heavy imports belong into the commands' functions.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import click

from csi_driver import __version__, cli
from csi_driver.config import ConfigError, DriverSettings, ServeOptions

ServeFunction = Callable[[ServeOptions, DriverSettings], int]


@dataclass(frozen=True)
class Program:
    """What the composition root lends to the commands. `serve` runs until it is told to stop and returns the exit code."""

    serve: ServeFunction


class Refused(click.ClickException):
    """A mistake in the configuration: its lines on stderr as they are, exit code 2."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(self.message, file=file, err=True)


class CommandGroup(click.Group):
    """Finds each command in the file of its name, imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        names = sorted(module.name for module in pkgutil.iter_modules(cli.__path__))
        return [name for name in names if _command(name) is not None]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  # click's signature
        return _command(cmd_name)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise Refused(str(error)) from error


def build(serve: ServeFunction) -> click.Group:
    """Build the command line around the function that serves."""
    group = CommandGroup(
        name="tatami",
        help="Tatami turns directories, of an NFS server or of this node, into Kubernetes volumes.",
        context_settings={"obj": Program(serve=serve), "help_option_names": ["-h", "--help"], "max_content_width": 120},
        no_args_is_help=True,
    )
    return click.version_option(__version__, prog_name="tatami", message="%(prog)s %(version)s")(group)


def _command(name: str) -> click.Command | None:
    if name not in {module.name for module in pkgutil.iter_modules(cli.__path__)}:
        return None
    found = getattr(importlib.import_module(f"{cli.__name__}.{name}"), "command", None)
    return found if isinstance(found, click.Command) else None
