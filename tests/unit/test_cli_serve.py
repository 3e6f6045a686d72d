"""`tatami serve`: flags, environment, precedence and exit codes are a contract with the manifests."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from csi_driver import __version__
from csi_driver.cli import commands
from csi_driver.config import ConfigError, ServeOptions, load_settings


class Served:
    """Stands where the composition root is: keeps what it was called with."""

    def __init__(self, outcome=0):
        self.calls = []
        self.outcome = outcome

    def __call__(self, options, settings):
        self.calls.append((options, settings))
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def run(monkeypatch):
    for name in [name for name in os.environ if name.startswith("TATAMI_")]:
        monkeypatch.delenv(name)

    def run(*arguments, env=None, outcome=0):
        served = Served(outcome)
        result = CliRunner().invoke(commands.build(serve=served, inspect=None), arguments, env=env, prog_name="tatami")
        return result, served.calls

    return run


DEFAULTS = {
    "config": None,
    "role": "all",
    "endpoint": "unix:///csi/csi.sock",
    "node_id": socket.gethostname(),
    "kubelet_dir": Path("/var/lib/kubelet"),
    "kubelet_registration_path": None,
    "metrics_address": None,
    "log_format": "text",
    "log_level": "info",
}

# field -> flag, variable, a value that is not the default, what it becomes
CONTRACT = {
    "role": ("--role", "TATAMI_ROLE", "node", "node"),
    "endpoint": ("--endpoint", "TATAMI_ENDPOINT", "unix:///run/x.sock", "unix:///run/x.sock"),
    "node_id": ("--node-id", "TATAMI_NODE_ID", "worker-7", "worker-7"),
    "kubelet_dir": ("--kubelet-dir", "TATAMI_KUBELET_DIR", "/data/kubelet", Path("/data/kubelet")),
    "kubelet_registration_path": (
        "--kubelet-registration-path",
        "TATAMI_KUBELET_REGISTRATION_PATH",
        "/var/lib/kubelet/plugins/x/csi.sock",
        Path("/var/lib/kubelet/plugins/x/csi.sock"),
    ),
    "metrics_address": ("--metrics-address", "TATAMI_METRICS_ADDRESS", "[::1]:9808", "[::1]:9808"),
    "log_format": ("--log-format", "TATAMI_LOG_FORMAT", "json", "json"),
    "log_level": ("--log-level", "TATAMI_LOG_LEVEL", "debug", "debug"),
}


def test_without_flags_the_documented_defaults_are_served(run):
    result, calls = run("serve")
    assert result.exit_code == 0, result.output
    assert calls == [(ServeOptions(**DEFAULTS), load_settings(None))]


@pytest.mark.parametrize("field", CONTRACT)
def test_a_flag_sets_its_option_and_no_other(run, field):
    flag, _, text, value = CONTRACT[field]
    _, [(options, _)] = run("serve", flag, text)
    assert options == ServeOptions(**(DEFAULTS | {field: value}))


@pytest.mark.parametrize("field", CONTRACT)
def test_a_variable_sets_its_option_and_no_other(run, field):
    _, variable, text, value = CONTRACT[field]
    _, [(options, _)] = run("serve", env={variable: text})
    assert options == ServeOptions(**(DEFAULTS | {field: value}))


@pytest.mark.parametrize("field", CONTRACT)
def test_a_flag_wins_over_its_variable(run, field):
    flag, variable, text, value = CONTRACT[field]
    _, [(options, _)] = run("serve", flag, text, env={variable: "not even allowed / here"})
    assert getattr(options, field) == value


@pytest.mark.parametrize("field", CONTRACT)
def test_an_empty_variable_counts_as_not_set(run, field):
    _, [(options, _)] = run("serve", env={CONTRACT[field][1]: ""})
    assert options == ServeOptions(**DEFAULTS)


def test_the_config_file_is_read_from_flag_or_variable(run, tmp_path):
    first, second = tmp_path / "1.toml", tmp_path / "2.toml"
    first.write_text("[pools.one]\npath = '/srv/one'\n")
    second.write_text("[pools.two]\npath = '/srv/two'\n")
    assert list(run("serve", "--config", str(first))[1][0][1].pools) == ["one"]
    assert list(run("serve", env={"TATAMI_CONFIG": str(second)})[1][0][1].pools) == ["two"]
    options, settings = run("serve", "--config", str(first), env={"TATAMI_CONFIG": str(second)})[1][0]
    assert options.config == first
    assert list(settings.pools) == ["one"]


def test_the_exit_code_is_that_of_the_server(run):
    assert run("serve", outcome=3)[0].exit_code == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "--role", "master"],
        ["serve", "--log-level", "loud"],
        ["serve", "--log-format", "xml"],
        ["serve", "--nope"],
        ["serve", "extra"],
        ["serve", "--endpoint", "tcp://0.0.0.0:1"],
        ["serve", "--kubelet-registration-path", "csi.sock"],
        ["serve", "--role", "controller", "--kubelet-registration-path", "/csi/csi.sock"],
        ["serve", "--node-id", "a b"],
        ["serve", "--config", "/does/not/exist.toml"],
        ["nope"],
    ],
)
def test_a_mistake_exits_2_and_serves_nothing(run, arguments):
    result, calls = run(*arguments)
    assert result.exit_code == 2
    assert calls == []
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert arguments[-1] in result.stderr


def test_a_mistake_in_the_file_is_its_lines_on_stderr_and_nothing_else(run, tmp_path):
    file = tmp_path / "pools.toml"
    file.write_text("[pools.fast]\npath = 'srv'\nshard = 1\n")
    result, _ = run("serve", "--config", str(file))
    assert result.exit_code == 2
    assert result.stderr == (
        f"{file}: [pools.fast] shard = 1: unknown key (did you mean shared?); allowed: path, shared, inline, size, overcommit, reserve\n"
        f'{file}: [pools.fast] path = "srv": must be an absolute path\n'
    )


def test_a_config_error_from_the_server_itself_is_told_the_same_way(run):
    result, _ = run("serve", outcome=ConfigError("this build does not serve nfs"))
    assert (result.exit_code, result.stderr) == (2, "this build does not serve nfs\n")


def test_every_option_shows_its_variable_in_the_help(run):
    shown = run("serve", "--help")[0].stdout
    for flag, variable, *_ in [*CONTRACT.values(), ("--config", "TATAMI_CONFIG")]:
        assert flag in shown
        assert variable in shown


def test_a_module_that_is_no_command_is_not_offered_as_one(run):
    assert run("client")[0].exit_code == 2
    assert "client" not in run("--help")[0].stdout


def test_commands_are_click_commands_with_help():
    group = commands.build(serve=Served(), inspect=None)
    context = click.Context(group)
    names = group.list_commands(context)
    assert "serve" in names
    assert all(group.get_command(context, name).get_short_help_str() for name in names)


# --- the real process -------------------------------------------------------------------------------------------------------------


def tatami(*arguments, env=None):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TATAMI_")} | (env or {})
    return subprocess.run(
        [sys.executable, "-m", "csi_driver", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )


def test_the_process_tells_its_version():
    result = tatami("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"tatami {__version__}\n", "")


def test_the_process_exits_2_with_one_line_for_a_bad_file(tmp_path):
    file = tmp_path / "pools.toml"
    file.write_text("[driver]\nbackend = 'smb'\n[pools.a]\npath = '/a'\n")
    result = tatami("serve", env={"TATAMI_CONFIG": str(file)})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f'{file}: [driver] backend = "smb": must be "hostpath" or "nfs"\n'


@pytest.mark.parametrize("place", ["kubelet", "kubelet/pods", "."])
def test_a_pool_at_above_or_below_the_kubelets_directory_is_refused(tmp_path, place):
    file, path = tmp_path / "pools.toml", (tmp_path / place).resolve()
    file.write_text(f"[driver]\nbackend = 'hostpath'\n[pools.a]\npath = '{path}'\n")
    kubelet = tmp_path / "kubelet"
    result = tatami("serve", f"--kubelet-dir={kubelet}", f"--endpoint=unix://{tmp_path}/s", env={"TATAMI_CONFIG": str(file)})
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f'[pools.a] path = "{path}": must be neither the kubelet\'s directory {kubelet} (--kubelet-dir) nor above or below it: volumes would '
        "lie among what the kubelet makes and clears away\n"
    )
    assert list(tmp_path.iterdir()) == [file]


def test_help_and_version_import_neither_grpc_nor_prometheus():
    script = (
        "import sys\nfrom csi_driver.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('grpc', 'google.protobuf', 'prometheus_client', 'psutil') if name in sys.modules])"
    )
    for argument in ("--help", "--version"):
        result = subprocess.run(
            [sys.executable, "-c", script, argument], capture_output=True, text=True, timeout=60, check=True
        )
        assert result.stdout.splitlines()[-1] == "[]"
