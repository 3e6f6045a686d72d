"""Verifying one snapshot on the command line: in a thread, so that there is progress to look at and Ctrl-C is heard."""

import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import click

from csi_driver.cli import interrupts
from csi_driver.cli.inventory import Found
from csi_driver.cli.tables import printable
from csi_driver.errors import RecordDamaged, TatamiError
from csi_driver.volumes.assembly import Domain
from csi_driver.volumes.jobs import JobControl, show_bytes
from csi_driver.volumes.model import SnapshotRecord
from csi_driver.volumes.verification import Verification

DAMAGED, CANNOT_TELL, _INTERRUPTED = 1, 2, 130
_LOOK_SECONDS = 0.2
_STOP_SECONDS = 5.0
_SHOWN = 20
_NAME_LETTERS = 16  # the rest of a line of 80 is what is done


@dataclass(frozen=True)
class Outcome:
    """How a verification ended: with what was found, or with why nothing could be."""

    handle: str
    seconds: float
    found: Verification | None = None
    error: Exception | None = None

    @property
    def word(self) -> str:
        if self.found is None:
            return "damaged" if isinstance(self.error, RecordDamaged) else "not verified"
        if not self.found.whole:
            return "damaged"
        return "digests made" if self.found.first else "whole"

    @property
    def exit_code(self) -> int:
        return {"damaged": DAMAGED, "not verified": CANNOT_TELL}.get(self.word, 0)

    def as_json(self) -> dict[str, Any]:
        """Return it for scripts."""
        told: dict[str, Any] = {"handle": self.handle, "outcome": self.word, "seconds": round(self.seconds, 3)}
        if self.error is not None:
            return told | {"error": str(self.error)}
        assert self.found is not None
        return told | {
            "files": self.found.summary.entries,
            "bytes": self.found.summary.bytes,
            "differences": [{"what": each.what, "path": each.path} for each in self.found.differences],
        }


def verify(domain: Domain, found: Found[SnapshotRecord]) -> Outcome:
    """Read a snapshot and compare it, showing progress where standard error is a terminal. Ctrl-C stops it and ends the program."""
    job, started = JobControl(found.id), time.monotonic()
    outcome: list[Verification | Exception] = []
    # Not Thread.join: interrupted by an exception, it takes the thread for ended (bpo-45274's remedy, Python 3.11).
    ended = threading.Event()

    def work() -> None:
        try:
            outcome.append(domain.verifier.verify(found.handle, job))
        except Exception as error:  # noqa: BLE001 - told by the thread that waits
            outcome.append(error)
        finally:
            ended.set()

    interrupts.listen()
    threading.Thread(target=work, name="verify", daemon=True).start()
    try:
        _wait(ended, found.record.name if found.record else found.id, job)
    except KeyboardInterrupt:
        job.cancelled.set()
        ended.wait(_STOP_SECONDS)
        click.echo(f"\n{found.handle}: stopped, nothing was compared", err=True)
        raise SystemExit(_INTERRUPTED) from None
    (said,) = outcome
    seconds = time.monotonic() - started
    if isinstance(said, Verification):
        return Outcome(found.handle, seconds, said)
    if not isinstance(said, TatamiError | OSError):
        raise said
    return Outcome(found.handle, seconds, error=said)


def show_outcome(outcome: Outcome) -> None:
    """Say it for people."""
    colour = {0: "green", DAMAGED: "red"}.get(outcome.exit_code, "yellow")
    head = f"{outcome.handle}: {click.style(outcome.word, fg=colour)}"
    if outcome.found is None:
        click.echo(f"{head}: {outcome.error}", err=True)
        return
    summary, differences = outcome.found.summary, outcome.found.differences
    read = f"{summary.entries} files, {show_bytes(summary.bytes)}, in {outcome.seconds:.1f} s"
    click.echo(f"{head}: {read}" + (f", {len(differences)} not as they were" if differences else ""))
    for each in differences[:_SHOWN]:
        click.echo(f"  {each.what:<10}  {printable(each.path)}")
    if len(differences) > _SHOWN:
        click.echo(f"  and {len(differences) - _SHOWN} more (--output json lists up to 1000)")


def _wait(ended: threading.Event, name: str, job: JobControl) -> None:
    if not sys.stderr.isatty():
        while not ended.wait(_LOOK_SECONDS):
            pass
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}", markup=False),  # a name is somebody's word
        BarColumn(bar_width=16),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("{task.fields[files]} files"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(printable(name)[:_NAME_LETTERS], total=None, files=0)
        while not ended.wait(_LOOK_SECONDS):
            # Holes are not read: what was expected may be more than what comes, never the bar less than what came.
            total = max(job.total_bytes, job.progress.bytes) if job.total_bytes else None
            bar.update(task, completed=job.progress.bytes, total=total, files=job.progress.files)
