"""`tatami serve`: run the driver. What the pod's manifest calls; the flags and variables are a contract with it.

Each flag has an environment variable; the flag wins. An empty variable counts as not set, because manifests render absent values so.
"""

import socket
from pathlib import Path

import click

from csi_driver.cli.commands import Program
from csi_driver.config import LogFormat, LogLevel, Role, ServeOptions, load_settings


@click.command("serve")
@click.option(
    "--config",
    envvar="TATAMI_CONFIG",
    type=click.Path(path_type=Path),
    help="pools.toml. Without it: backend hostpath with one pool `default` at /var/lib/tatami/default.",
)
@click.option(
    "--role",
    envvar="TATAMI_ROLE",
    type=click.Choice(["controller", "node", "all", "expansion"]),
    default="all",
    help="The CSI services of this process; expansion: one for all nodes beside external-resizer, for pools of nodes.",
)
@click.option("--endpoint", envvar="TATAMI_ENDPOINT", default="unix:///csi/csi.sock", help="The Unix socket to serve on.")
@click.option(
    "--node-id",
    envvar="TATAMI_NODE_ID",
    default=socket.gethostname,
    show_default="the host's name",
    help="The name of this node in Kubernetes (spec.nodeName).",
)
@click.option(
    "--kubelet-dir",
    envvar="TATAMI_KUBELET_DIR",
    type=click.Path(path_type=Path),
    default=Path("/var/lib/kubelet"),
    help="The kubelet's root directory.",
)
@click.option(
    "--kubelet-registration-path",
    envvar="TATAMI_KUBELET_REGISTRATION_PATH",
    type=click.Path(path_type=Path),
    show_default="off",
    help="The driver's socket as the kubelet finds it on the host: register with the kubelet, without a sidecar.",
)
@click.option(
    "--metrics-address",
    envvar="TATAMI_METRICS_ADDRESS",
    show_default="off",
    help="HOST:PORT of /metrics, /healthz and /readyz; [::1]:PORT for IPv6, :PORT for every address.",
)
@click.option(
    "--log-format", envvar="TATAMI_LOG_FORMAT", type=click.Choice(["text", "json"]), default="text", help="Lines on stderr."
)
@click.option(
    "--log-level",
    envvar="TATAMI_LOG_LEVEL",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="The least severe line to write.",
)
@click.pass_context
def command(
    context: click.Context,
    *,
    config: Path | None,
    role: Role,
    endpoint: str,
    node_id: str,
    kubelet_dir: Path,
    kubelet_registration_path: Path | None,
    metrics_address: str | None,
    log_format: LogFormat,
    log_level: LogLevel,
) -> None:
    """Serve CSI on a Unix socket until SIGTERM or SIGINT."""
    options = ServeOptions(
        config, role, endpoint, node_id, kubelet_dir, kubelet_registration_path, metrics_address, log_format, log_level
    ).checked()
    settings = load_settings(options.config)
    program = context.ensure_object(Program)
    context.exit(program.serve(options, settings))


# Not one by one: a new option could forget it.
for _parameter in command.params:
    if isinstance(_parameter, click.Option):
        _parameter.show_envvar = True
        _parameter.show_default = _parameter.show_default or True
