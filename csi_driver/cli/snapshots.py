"""`tatami snapshots`: what snapshots there are, how they were made, and whether they still hold what they held."""

from pathlib import Path
from typing import Any

import click

from csi_driver.cli.inventory import Found, choose_pools, find_one, snapshots_of, survey
from csi_driver.cli.options import about_pools, look_into
from csi_driver.cli.reports import fail_on_silence, refuse, show_capture
from csi_driver.cli.tables import NOTHING, show_facts, show_json, show_table, show_time
from csi_driver.cli.verifying import CANNOT_TELL, DAMAGED, Outcome, show_outcome, verify
from csi_driver.errors import TatamiError
from csi_driver.volumes.assembly import Domain
from csi_driver.volumes.handles import SNAPSHOT
from csi_driver.volumes.jobs import show_bytes
from csi_driver.volumes.model import SnapshotRecord


@click.group("snapshots", no_args_is_help=True)
def command() -> None:
    """Show and verify the snapshots of the pools, beside a driver that runs or without one."""


@command.command("list")
@about_pools
@click.option("--volume", help="Only those of this volume (its handle).")
@click.pass_context
def list_snapshots(
    context: click.Context, *, config: Path | None, node_id: str, pool: tuple[str, ...], output: str, volume: str | None
) -> None:
    """List all snapshots, those in the making included.

    Ends with 1 where a pool could not be read.
    """
    with look_into(context, config, node_id) as domain:
        found = survey(choose_pools(domain.pools, pool), snapshots_of)
    described = [
        _describe(each) for each in found.found if volume is None or (each.record and each.record.source_handle == volume)
    ]
    if output == "json":
        show_json(described)
    elif described:
        heads = ("HANDLE", "NAME", "SIZE", "CUT", "CONSISTENCY", "MADE BY", "NOT CARRIED", "DIGESTS", "PHASE", "VOLUME")
        show_table(heads, [_row(each) for each in described])
    fail_on_silence(context, found.silent)


@command.command("show")
@about_pools
@click.argument("snapshot")
@click.pass_context
def show_snapshot(
    context: click.Context, *, config: Path | None, node_id: str, pool: tuple[str, ...], output: str, snapshot: str
) -> None:
    """Show all that is known of SNAPSHOT: its handle, or the name that Kubernetes gave it."""
    with look_into(context, config, node_id) as domain:
        found = _find(domain, pool, snapshot)
    described = _describe(found)
    if output == "json":
        show_json(described)
    else:
        show_facts(_facts(described))
    if found.record is None:
        context.exit(1)


@command.command("verify")
@about_pools
@click.argument("snapshot", nargs=-1, required=True)
@click.pass_context
def verify_snapshots(
    context: click.Context, *, config: Path | None, node_id: str, pool: tuple[str, ...], output: str, snapshot: tuple[str, ...]
) -> None:
    """Read each SNAPSHOT (handle or name) and compare it with its digests; where it has none, make them.

    Ends with 0 where all are whole, with 1 where one is damaged, with 2 where one could not be looked at. Nobody can delete a
    snapshot meanwhile; it can be restored.
    """
    outcomes: list[Outcome] = []
    with look_into(context, config, node_id) as domain:
        wanted = [_find(domain, pool, text) for text in snapshot]  # a mistake is told before an hour of reading
        for found in wanted:
            outcomes.append(verify(domain, found))
            if output == "text":
                show_outcome(outcomes[-1])
    if output == "json":
        show_json([outcome.as_json() for outcome in outcomes])
    codes = {outcome.exit_code for outcome in outcomes}
    context.exit(DAMAGED if DAMAGED in codes else CANNOT_TELL if CANNOT_TELL in codes else 0)


def _find(domain: Domain, pools: tuple[str, ...], text: str) -> Found[SnapshotRecord]:
    try:
        return find_one(domain.pools, choose_pools(domain.pools, pools), text, snapshots_of, SNAPSHOT)
    except (TatamiError, OSError) as error:
        refuse(error)


def _describe(found: Found[SnapshotRecord]) -> dict[str, Any]:
    record = found.record
    if record is None:
        return {"handle": found.handle, "pool": found.store.name, "phase": "damaged", "error": found.damage}
    manifest = record.manifest
    return {
        "handle": record.handle,
        "name": record.name,
        "pool": record.pool,
        "volume": record.source_handle,
        "group": record.group_handle,
        "size_bytes": record.size_bytes,
        "created_ns": record.created_at_ns,
        "consistency": record.consistency,
        "capture": show_capture(record.capture),
        "digests": {"files": manifest.entries, "bytes": manifest.bytes, "digest": manifest.digest} if manifest else None,
        "phase": record.phase.value,
    }


def _row(described: dict[str, Any]) -> list[str]:
    if "error" in described:
        return [described["handle"], *[NOTHING] * 7, "damaged", NOTHING]
    capture = described["capture"]
    return [
        described["handle"],
        described["name"],
        show_bytes(described["size_bytes"]),
        show_time(described["created_ns"]),
        described["consistency"] or NOTHING,
        capture["method"] if capture else NOTHING,
        str(sum(capture["not_carried"].values()) or NOTHING) if capture else NOTHING,
        "yes" if described["digests"] else "no",
        described["phase"],
        described["volume"],
    ]


def _facts(described: dict[str, Any]) -> dict[str, str]:
    if "error" in described:
        return {key: str(value) for key, value in described.items()}
    capture, digests = described["capture"], described["digests"]
    none = f"none: `tatami snapshots verify {described['handle']}` makes them"
    return {
        "handle": described["handle"],
        "name": described["name"],
        "pool": described["pool"],
        "volume": described["volume"],
        "group": described["group"] or NOTHING,
        "size": f"{show_bytes(described['size_bytes'])} ({described['size_bytes']} bytes), the least that a restore needs",
        "cut": show_time(described["created_ns"]),
        "consistency": described["consistency"] or NOTHING,
        "made by": capture["summary"] if capture else NOTHING,
        "not carried": capture["lost"] if capture else NOTHING,
        "digests": f"of {digests['files']} files, {show_bytes(digests['bytes'])}" if digests else none,
        "phase": described["phase"],
    }
