"""How a trial is shown: lines of text, or one JSON object a line. `rich_screen` does the same for a terminal."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click

from csi_driver.cli.trial import Site


@dataclass(frozen=True)
class Step:
    """One step, done. `asked` and `answered` are for people; `request` and `response` are the CSI messages, if it was a call.

    `code` is gRPC's name, or the errno's; `expected` tells whether the outcome is what the step was meant to show.
    """

    number: int
    call: str
    title: str
    asked: str
    answered: str
    code: str
    expected: bool
    seconds: float
    path: Path | None = None
    request: Mapping[str, Any] | None = None
    response: Mapping[str, Any] | None = None


class Screen(Protocol):
    """What a trial tells, in this order; `begin` before each step's `show`."""

    def started(self, driver: str, version: str, where: str) -> None: ...
    def begin(self, call: str, title: str) -> None: ...
    def show(self, step: Step) -> None: ...
    def completed(self, steps: int, seconds: float) -> None: ...
    def serving(self, pid: int, rootless: bool) -> None: ...
    def stopped(self) -> None: ...
    def failed(self, message: str) -> None: ...


class PlainScreen:
    """Lines without colour: for pipes, logs and tests."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def started(self, driver: str, version: str, where: str) -> None:
        click.echo(f"{driver} {version} serves {self._site.shown(self._site.pool)}, {where}")

    def begin(self, call: str, title: str) -> None:
        pass

    def show(self, step: Step) -> None:
        click.echo(f"\n{step.number:2}. {f'{step.call}: {step.title}':<76} {duration(step.seconds):>9}")
        for label, text in details(self._site, step):
            click.echo(f"      {label:<9} {text}")

    def completed(self, steps: int, seconds: float) -> None:
        click.echo(f"\nAll {steps} steps went as they should, in {duration(seconds)}.")

    def serving(self, pid: int, rootless: bool) -> None:
        click.echo("\nThe driver serves until Ctrl-C.")
        for label, text in instructions(self._site, pid, rootless=rootless):
            click.echo(f"  {label:<14} {text}")

    def stopped(self) -> None:
        click.echo("Stopped. Nothing is mounted; the files are in " + self._site.shown(self._site.directory))

    def failed(self, message: str) -> None:
        click.echo(f"\n{message}", err=True)


class JsonScreen:
    """One JSON object a line, for programs; each has an `event`."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def started(self, driver: str, version: str, where: str) -> None:
        _put("started", driver=driver, version=version, mounts=where, pool=str(self._site.pool), log=str(self._site.log))

    def begin(self, call: str, title: str) -> None:
        pass

    def show(self, step: Step) -> None:
        _put("step", **{key: str(value) if isinstance(value, Path) else value for key, value in vars(step).items()})

    def completed(self, steps: int, seconds: float) -> None:
        _put("completed", steps=steps, seconds=seconds)

    def serving(self, pid: int, rootless: bool) -> None:
        _put("serving", endpoint=self._site.endpoint, pid=pid, user_namespace=rootless)

    def stopped(self) -> None:
        _put("stopped")

    def failed(self, message: str) -> None:
        _put("failed", error=message)


def details(site: Site, step: Step) -> list[tuple[str, str]]:
    """Return the lines below a step: what was asked, what came back, where it is."""
    verdict = "answered" if step.code == "OK" else "refused"
    answer = step.answered if step.code == "OK" else f"{step.code}: {step.answered}"
    lines = [("asked", step.asked), (verdict, answer)]
    if step.path is not None:
        lines.append(("on disk", site.shown(step.path)))
    return lines if step.expected else [*lines, ("WRONG", "this is not what this step should have shown")]


def instructions(site: Site, pid: int, *, rootless: bool) -> list[tuple[str, str]]:
    """Return what somebody needs who wants to talk to the driver."""
    python = site.shown(Path(sys.executable))
    enter = "nsenter --user --preserve-credentials --mount" if rootless else "nsenter --mount"
    return [
        ("endpoint", site.endpoint),
        ("talk to it", f"{python} -m csi_driver call --endpoint {site.endpoint} ListVolumes"),
        ("see its mounts", f"{enter} --target {pid} findmnt"),
        ("pool", site.shown(site.pool)),
        ("log", site.shown(site.log)),
    ]


def duration(seconds: float) -> str:
    """Show a time as people compare it: milliseconds below a second."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def size(number: int) -> str:
    """Show bytes in the largest binary unit that leaves a digit before the point."""
    amount = float(number)
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if amount == int(amount) else f"{amount:.1f} {unit}"


def _put(event: str, **fields: object) -> None:
    click.echo(json.dumps({"event": event, **fields}, ensure_ascii=False))
