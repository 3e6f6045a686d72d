"""Tables and lists of facts for people, in colours on a terminal only; and JSON for scripts."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

COLOURS = {"ready": "green", "creating": "yellow", "deleting": "yellow", "damaged": "red"}
"""What a cell that says just this looks like."""
NOTHING = "-"


def show_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below their heads, each column as wide as its widest cell; nothing is cut off."""
    clean = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(heads, *clean, strict=True)]
    click.secho(_line(heads, widths), bold=True)
    for row in clean:
        # Coloured after it was made as wide as it must be: what colours a cell has a length, too.
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells = [
            click.style(padded, fg=COLOURS[cell]) if cell in COLOURS else padded
            for padded, cell in zip(cells, row, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())


def show_facts(facts: Mapping[str, str]) -> None:
    """Print one fact a line."""
    width = max(len(name) for name in facts) + 1
    for name, value in facts.items():
        shown = printable(value)
        click.echo(
            f"{click.style((name + ':').ljust(width), bold=True)} {click.style(shown, fg=COLOURS[shown]) if shown in COLOURS else shown}"
        )


def show_json(value: Any) -> None:  # noqa: ANN401 - whatever JSON can say
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2))


def printable(text: str) -> str:
    """Return text that does nothing to a terminal: names come from requests, paths from tenants."""
    return text if text.isprintable() else ascii(text)


def show_time(nanoseconds: int) -> str:
    """Show a time since the epoch as UTC, to the second."""
    return time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(nanoseconds // 10**9))


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
