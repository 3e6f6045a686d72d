"""What the commands about volumes and those about snapshots say alike."""

from collections.abc import Mapping
from typing import Any, NoReturn

import click

from csi_driver.cli.tables import NOTHING
from csi_driver.volumes.jobs import show_bytes
from csi_driver.volumes.model import CaptureReport


def show_capture(report: CaptureReport | None) -> dict[str, Any] | None:
    """Say how content was made: for scripts, with `summary` and `lost` in words."""
    if report is None:
        return None
    how = report.method
    if report.files is not None and report.bytes is not None:
        how += f": {report.files} files, {show_bytes(report.bytes)}"
    lost = ", ".join(f"{count} {kind}" for kind, count in sorted(report.not_carried.items())) or NOTHING
    return {
        "method": report.method,
        "files": report.files,
        "bytes": report.bytes,
        "not_carried": dict(report.not_carried),
        "summary": how,
        "lost": lost,
    }


def fail_on_silence(context: click.Context, silent: Mapping[str, str]) -> None:
    """Name the pools that could not be read, and end with 1 where there are any."""
    for name, reason in silent.items():
        click.echo(reason if name in reason else f"pool {name}: {reason}", err=True)
    if silent:
        context.exit(1)


def refuse(error: Exception) -> NoReturn:
    """End with 1 and the reason."""
    raise click.ClickException(str(error)) from error
