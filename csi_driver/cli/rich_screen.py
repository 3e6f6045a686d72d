"""How a trial is shown on a terminal: colours, a line that says what is being done, text that wraps where the terminal ends."""

from rich.console import Console
from rich.padding import Padding
from rich.status import Status
from rich.table import Table
from rich.text import Text

from csi_driver.cli.screens import Step, details, duration, instructions
from csi_driver.cli.trial import Site

_MOST_COLUMNS = 120
_COLOURS = {"answered": "green", "refused": "yellow", "on disk": "cyan", "WRONG": "bold red"}


class RichScreen:
    """A Screen (screens.py) for people."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._console = Console(highlight=False, soft_wrap=False)
        self._console.width = min(self._console.width, _MOST_COLUMNS)
        self._status: Status | None = None

    def started(self, driver: str, version: str, where: str) -> None:
        self._console.print(
            Text.assemble((f"{driver} {version}", "bold"), f" serves {self._site.shown(self._site.pool)}, {where}")
        )

    def begin(self, call: str, title: str) -> None:
        self._status = self._console.status(Text.assemble((call, "bold"), f" {title}"), spinner="dots")
        self._status.start()

    def show(self, step: Step) -> None:
        self._end_status()
        mark, colour = ("✔", "green") if step.expected else ("✘", "bold red")
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(width=2)
        head.add_column(width=3, justify="right", style="dim")
        head.add_column(ratio=1, overflow="fold")
        head.add_column(justify="right", style="magenta", no_wrap=True)
        title = Text.assemble((step.call, "bold"), f"  {step.title}")
        head.add_row(Text(mark, style=colour), f"{step.number}.", title, duration(step.seconds))
        self._console.print()
        self._console.print(head)
        self._console.print(Padding(_pairs(details(self._site, step), 9), (0, 0, 0, 7)))

    def completed(self, steps: int, seconds: float) -> None:
        self._console.print(Text(f"\nAll {steps} steps went as they should, in {duration(seconds)}.", style="bold green"))

    def serving(self, pid: int, rootless: bool) -> None:
        self._console.print(Text("\nThe driver serves until Ctrl-C.", style="bold"))
        # What is to be copied is one line, however wide: a terminal that wraps it copies it whole, a table would not.
        for label, text in instructions(self._site, pid, rootless=rootless):
            self._console.print(Text.assemble("  ", (f"{label:<14} ", "dim"), text), soft_wrap=True)

    def stopped(self) -> None:
        self._end_status()
        self._console.print(
            f"\nStopped. Nothing is mounted; the files are in {self._site.shown(self._site.directory)}", markup=False
        )

    def failed(self, message: str) -> None:
        self._end_status()
        Console(stderr=True, highlight=False).print(Text(f"\n{message}", style="red"), soft_wrap=True)

    def _end_status(self) -> None:
        if self._status is not None:
            self._status.stop()
            self._status = None


def _pairs(pairs: list[tuple[str, str]], width: int) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(width=width, style="dim")
    table.add_column(overflow="fold")
    for label, text in pairs:
        table.add_row(label, Text(text, style=_COLOURS.get(label, "")))
    return table
