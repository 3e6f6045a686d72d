"""`tatami try`: the driver on a directory of its own, and a volume's whole life before your eyes. What `make run` runs.

It is for people who have not decided yet, so it must be safe to type: everything lies in one directory, mounts are made in a
namespace of their own, and neither Ctrl-C nor `kill -9` leaves anything mounted or running.
"""

# ruff: noqa: N999  # the file's name is the command's

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from csi_driver.cli import interrupts, sandbox
from csi_driver.cli.screens import JsonScreen, PlainScreen, Screen
from csi_driver.cli.trial import DriverChild, Site, TrialFailed

if TYPE_CHECKING:
    from csi_driver.cli.client import Client

_INTERRUPTED = 130  # as a shell reports a command that SIGINT ended


@click.command("try")
@click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("run"),
    show_default=True,
    help="Where everything goes; made if it is not there.",
)
@click.option("--once", is_flag=True, help="End after the steps instead of serving on.")
@click.option(
    "--output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: one object a line.",
)
@click.pass_context
def command(context: click.Context, *, directory: Path, once: bool, output: Literal["text", "json"]) -> None:
    """Run the driver on a directory of its own and show a volume's whole life.

    Needs no cluster, and no root where the kernel lets users make namespaces. Keeps serving until Ctrl-C.
    """
    site = Site(directory.resolve())
    screen = _screen(site, output)
    interrupts.listen()
    try:
        site.prepare()
        rootless = sandbox.enter_private_mounts()
        driver = DriverChild(site)
    except (TrialFailed, sandbox.NoNamespace) as error:
        screen.failed(str(error))
        context.exit(1)
    context.exit(_try(site, driver, screen, once=once, rootless=rootless))


def _try(site: Site, driver: DriverChild, screen: Screen, *, once: bool, rootless: bool) -> int:
    try:
        # gRPC is imported after the child has been forked: its threads and locks do not survive a fork.
        from csi_driver.cli.client import Client

        with Client(site.socket) as client:
            _introduce(driver, client, screen, rootless=rootless)
            _tour(site, client, screen)
        if not once:
            _serve_on(driver, screen, rootless=rootless)
    except TrialFailed as error:
        log = "" if str(site.shown(site.log)) in str(error) else f"\nThe driver's log: {site.shown(site.log)}"
        screen.failed(f"{error}{log}")
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    finally:
        interrupts.ignore()
        driver.stop()
        screen.stopped()
    return 0


def _tour(site: Site, client: "Client", screen: Screen) -> None:
    from csi_driver.cli.tour import Tour

    tour = Tour(site, client, screen)
    started = time.monotonic()
    try:
        tour.run()
    except BaseException:
        interrupts.ignore()
        tour.tidy()
        raise
    screen.completed(tour.steps.count, time.monotonic() - started)


def _introduce(driver: DriverChild, client: "Client", screen: Screen, *, rootless: bool) -> None:
    from csi_driver.cli.client import CallFailed
    from csi_driver.rpc import csi_pb2 as csi

    def ready() -> bool:
        try:
            return bool(client.ask(client.identity.Probe, csi.ProbeRequest(), 2.0).ready.value)
        except CallFailed:
            return False

    driver.wait_until(ready)
    plugin = client.ask(client.identity.GetPluginInfo, csi.GetPluginInfoRequest())
    where = "as an ordinary user, in a user and mount namespace" if rootless else "as root, in a mount namespace of its own"
    screen.started(plugin.name, plugin.vendor_version, where)


def _serve_on(driver: DriverChild, screen: Screen, *, rootless: bool) -> None:
    try:
        screen.serving(driver.pid, rootless)
        driver.wait()
    except KeyboardInterrupt:
        return


def _screen(site: Site, output: Literal["text", "json"]) -> Screen:
    if output == "json":
        return JsonScreen(site)
    if sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        from csi_driver.cli.rich_screen import RichScreen

        return RichScreen(site)
    return PlainScreen(site)
