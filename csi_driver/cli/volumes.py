"""`tatami volumes`: what volumes there are, read from the pools."""

from pathlib import Path
from typing import Any

import click

from csi_driver.cli.inventory import Found, choose_pools, find_one, survey, volumes_of
from csi_driver.cli.options import about_pools, look_into
from csi_driver.cli.reports import fail_on_silence, refuse, show_capture
from csi_driver.cli.tables import NOTHING, show_facts, show_json, show_table, show_time
from csi_driver.errors import TatamiError
from csi_driver.volumes.handles import VOLUME
from csi_driver.volumes.jobs import show_bytes
from csi_driver.volumes.lookup import volume_as_shown
from csi_driver.volumes.model import VolumeRecord


@click.group("volumes", no_args_is_help=True)
def command() -> None:
    """Show the volumes of the pools, beside a driver that runs or without one."""


@command.command("list")
@about_pools
@click.pass_context
def list_volumes(context: click.Context, *, config: Path | None, node_id: str, pool: tuple[str, ...], output: str) -> None:
    """List all volumes, inline ones and those in the making included.

    Ends with 1 where a pool could not be read.
    """
    with look_into(context, config, node_id) as domain:
        found = survey(choose_pools(domain.pools, pool), volumes_of)
        described = [_describe(each) for each in found.found]
    if output == "json":
        show_json(described)
    elif described:
        heads = ("HANDLE", "NAME", "SIZE", "LIMITER", "MADE BY", "PUBLISHED TO", "ON DELETE", "PHASE")
        show_table(heads, [_row(each) for each in described])
    fail_on_silence(context, found.silent)


@command.command("show")
@about_pools
@click.argument("volume")
@click.pass_context
def show_volume(
    context: click.Context, *, config: Path | None, node_id: str, pool: tuple[str, ...], output: str, volume: str
) -> None:
    """Show all that is known of VOLUME: its handle, or the name that Kubernetes gave it."""
    with look_into(context, config, node_id) as domain:
        try:
            found = find_one(domain.pools, choose_pools(domain.pools, pool), volume, volumes_of, VOLUME)
            described = _describe(found)
        except (TatamiError, OSError) as error:
            refuse(error)
    if output == "json":
        show_json(described)
    else:
        show_facts(_facts(described))
    if found.record is None:
        context.exit(1)


def _describe(found: Found[VolumeRecord]) -> dict[str, Any]:
    record = found.record
    if record is None:
        return {"handle": found.handle, "pool": found.store.name, "phase": "damaged", "error": found.damage}
    context = volume_as_shown(found.store, record).context
    source = record.source
    return {
        "handle": record.handle,
        "name": record.name,
        "pool": record.pool,
        "directory": record.directory,
        "size_bytes": record.capacity_bytes,
        "limiter": context["limiter"],
        "limit": context["limit"],
        "layout": record.form.layout.value,
        "source": {"kind": source.kind.value, "handle": source.handle} if source else None,
        "capture": show_capture(record.capture),
        "published": [
            {"node": each.node_id, "access_mode": each.access_mode.value, "readonly": each.readonly}
            for each in record.published
        ],
        "on_delete": record.on_delete.value,
        "inline": record.ephemeral,
        "created_ns": record.created_at_ns,
        "phase": record.phase.value,
    }


def _row(described: dict[str, Any]) -> list[str]:
    if "error" in described:
        return [described["handle"], *[NOTHING] * 6, "damaged"]
    capture = described["capture"]
    return [
        described["handle"],
        described["name"],
        show_bytes(described["size_bytes"]),
        described["limiter"],
        capture["method"] if capture else NOTHING,
        ", ".join(each["node"] for each in described["published"]) or NOTHING,
        described["on_delete"],
        described["phase"],
    ]


def _facts(described: dict[str, Any]) -> dict[str, str]:
    if "error" in described:
        return {key: str(value) for key, value in described.items()}
    capture, source = described["capture"], described["source"]
    published = [f"{each['node']} ({each['access_mode']}{', read-only' * each['readonly']})" for each in described["published"]]
    return {
        "handle": described["handle"],
        "name": described["name"],
        "pool": described["pool"],
        "directory": described["directory"],
        "size": f"{show_bytes(described['size_bytes'])} ({described['size_bytes']} bytes)",
        "limiter": described["limiter"],
        "limit": described["limit"],
        "layout": described["layout"],
        "made from": f"{source['kind']} {source['handle']}" if source else "nothing",
        "made by": capture["summary"] if capture else NOTHING,
        "not carried": capture["lost"] if capture else NOTHING,
        "published to": ", ".join(published) or "nobody",
        "on delete": described["on_delete"],
        "inline": "yes" if described["inline"] else "no",
        "created": show_time(described["created_ns"]),
        "phase": described["phase"],
    }
