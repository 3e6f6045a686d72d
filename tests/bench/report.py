"""What a benchmark says: tables for people (colours on a terminal only), one JSON object for programs, a progress line on a terminal."""

import json
import platform
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table

Figures = dict[str, float]
Verdicts = list[tuple[str, float, float]]


@dataclass
class Report:
    """Gathers figures and verdicts; `verdicts` are (sentence, measured, target), and measured must not exceed the target."""

    as_json: bool
    figures: dict[str, Figures] = field(default_factory=dict)
    verdicts: Verdicts = field(default_factory=list)

    def __post_init__(self) -> None:
        self._out = Console(highlight=False)
        if not self._out.is_terminal:
            self._out.width = 120  # a pipe has no width, and names must not be cut
        self._err = Console(stderr=True)

    @contextmanager
    def doing(self, what: str):
        """Say what goes on, while it goes on, if somebody watches."""
        if self._err.is_terminal:
            with self._err.status(f"{what} …"):
                yield
        else:
            yield

    def add(self, part: str, figures: Figures, verdicts: Verdicts) -> None:
        self.figures[part] = figures
        self.verdicts += verdicts

    def side_by_side(self, title: str, columns: dict[str, Figures]) -> None:
        """Show one row for each way, one column for each tree: seconds."""
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("seconds")
        for name in columns:
            table.add_column(name, justify="right")
        rows = dict.fromkeys(way for figures in columns.values() for way in figures)
        for way in rows:
            table.add_row(way, *(f"{figures[way]:.3f}" if way in figures else "" for figures in columns.values()))
        self._show(table)

    def list(self, title: str, figures: Figures) -> None:
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
        table.add_column()
        table.add_column(justify="right")
        for name, value in figures.items():
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
        self._show(table)

    def conclude(self, **about: object) -> int:
        """Show the verdicts, or all as JSON; return the exit code: 1 where a target was missed."""
        judged = [_Verdict(what, measured, target, measured <= target) for what, measured, target in self.verdicts]
        if self.as_json:
            about |= {"machine": platform.machine(), "kernel": platform.release(), "python": platform.python_version()}
            print(json.dumps({**about, "figures": self.figures, "targets": [asdict(each) for each in judged]}, indent=1))
        else:
            table = Table(title="targets", title_justify="left", box=box.SIMPLE_HEAD)
            for name in ("", "what", "measured", "at most"):
                table.add_column(name, justify="right" if name in ("measured", "at most") else "left")
            for each in judged:
                met = "[green]met[/]" if each.met else "[bold red]MISSED[/]"
                table.add_row(met, each.what, f"{each.measured:.3f}", f"{each.target:g}")
            self._show(table)
        return int(not all(each.met for each in judged))

    def _show(self, table: Table) -> None:
        if not self.as_json:
            self._out.print(table)


@dataclass(frozen=True)
class _Verdict:
    what: str
    measured: float
    target: float
    met: bool
