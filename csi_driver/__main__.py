"""The console script `tatami`, also `python -m csi_driver`: joins the command line to the composition root.

The composition root imports gRPC, which costs a fifth of a second; it is imported when something is served, so that `tatami --help`
and `tatami --version` answer at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from csi_driver.cli import commands
from csi_driver.config import DriverSettings, ServeOptions
from csi_driver.volumes.assembly import Domain


def serve(options: ServeOptions, settings: DriverSettings) -> int:
    """Serve until told to stop; returns the exit code."""
    from csi_driver import main as composition_root

    return composition_root.serve(options, settings)


@contextmanager
def inspect(settings: DriverSettings, node_id: str) -> Iterator[Domain]:
    """Open the pools beside whoever serves them."""
    from csi_driver import main as composition_root

    with composition_root.inspect(settings, node_id) as domain:
        yield domain


def main() -> None:
    """Run the command line and exit with its code: 0, 1 after a failure, 2 for a mistake in flags or configuration."""
    commands.build(serve=serve, inspect=inspect)(prog_name="tatami")


if __name__ == "__main__":
    main()
