"""`tatami call`: one CSI call, JSON in and JSON out. For looking around by hand; Kubernetes has its sidecars."""

import json
import sys
from typing import Any

import click

from csi_driver.config import ConfigError, parse_endpoint

DEFAULT_SECONDS = 60.0


@click.command("call")
@click.option(
    "--endpoint",
    envvar="TATAMI_ENDPOINT",
    default="unix:///csi/csi.sock",
    show_default=True,
    show_envvar=True,
    help="The socket that the driver serves.",
)
@click.option("--timeout", type=click.FloatRange(min=0.1), default=DEFAULT_SECONDS, show_default=True, help="Seconds to wait.")
@click.argument("method")
@click.argument("request", default="{}")
def command(endpoint: str, timeout: float, method: str, request: str) -> None:
    """Send REQUEST (JSON, `-` reads it from standard input, default {}) to METHOD and print the answer.

    METHOD is a call of CSI, such as ListVolumes or Controller/ListVolumes. Exits with 1 when the driver refuses.
    """
    try:
        socket = parse_endpoint(endpoint)
    except ConfigError as error:
        raise click.BadParameter(f"{endpoint}: {error}", param_hint="--endpoint") from None
    body = _body(sys.stdin.read() if request == "-" else request)
    from csi_driver.cli.client import CallFailed, Client, as_json

    if not socket.exists():
        raise click.ClickException(f"there is no socket {socket}: is the driver running?")
    with Client(socket) as client:
        try:
            answer = client.ask_by_name(method, body, timeout)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        except CallFailed as error:
            raise click.ClickException(f"{error.code}: {error.message}") from None
    click.echo(json.dumps(as_json(answer), indent=2, ensure_ascii=False))


def _body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise click.BadParameter(f"is not JSON: {error}", param_hint="REQUEST") from None
    if not isinstance(body, dict):
        raise click.BadParameter("must be a JSON object, such as '{\"max_entries\": 5}'", param_hint="REQUEST")
    return body
