"""The console script `tatami`, also `python -m csi_driver`: joins the command line to the composition root.

The composition root imports gRPC, which costs a fifth of a second; it is imported when something is served, so that `tatami --help`
and `tatami --version` answer at once.
"""

from csi_driver.cli import commands
from csi_driver.config import DriverSettings, ServeOptions


def serve(options: ServeOptions, settings: DriverSettings) -> int:
    """Serve until told to stop; returns the exit code."""
    from csi_driver import main as composition_root

    return composition_root.serve(options, settings)


def main() -> None:
    """Run the command line and exit with its code: 0, 1 after a failure, 2 for a mistake in flags or configuration."""
    commands.build(serve=serve)(prog_name="tatami")


if __name__ == "__main__":
    main()
