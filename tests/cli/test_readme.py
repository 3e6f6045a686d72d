"""README is a contract: what it shows is run, and what it lists is compared with the code."""

import re
import tomllib
from pathlib import Path

import click
import pytest

from csi_driver.cli import commands, serve
from csi_driver.config import ConfigError, parse_settings
from csi_driver.errors import InvalidArgument
from csi_driver.linux.mounts import parse_bind_flags
from csi_driver.rpc.status import CODES, ERRNO_CODES
from csi_driver.telemetry.metrics import JobUsage, PoolUsage, PrometheusMetrics
from csi_driver.volumes import parameters
from csi_driver.volumes.model import OnDelete
from tests.cli.trials import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
METADATA = {
    "csi.storage.k8s.io/pvc/name": "photos",
    "csi.storage.k8s.io/pvc/namespace": "team",
    "csi.storage.k8s.io/pv/name": "pvc-1",
}


def section(title):
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"README has no section {title}"
    return found[1]


def table(text):
    """Return the first table's rows below its head, cells without back quotes."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip().replace("`", "") for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    return [row for row in cells[2:] if not set("".join(row)) <= {"-"}]


def blocks(text, language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for name, body in fenced if name == language]


def allowed_by(parse, values):
    """Return the keys that the parser says it allows when it is given one it does not know."""
    with pytest.raises(InvalidArgument) as refusal:
        parse(values)
    return re.findall(r"`(\w+)`", str(refusal.value).rpartition("allowed are")[2])


# --- output -----------------------------------------------------------------------------------------------------------------------


def normalised(text, directory):
    text = text.replace(f"{directory}/", "run/")
    text = re.sub(r"as an ordinary user, in a user and mount namespace", "as root, in a mount namespace of its own", text)
    text = re.sub(r" +\d+\.\d (ms|s)\b", " TIME", text)
    text = re.sub(r"\d+\.\d ms|\d+\.\d s", "TIME", text)
    text = re.sub(r"\b[a-z2-7]{26}\b", "ID", text)
    text = re.sub(r"pvc-[0-9a-f]{8}", "pvc-NAME", text)
    return re.sub(r"(tatami\.dev) \S+", r"\1 VERSION", text)


def test_the_output_of_make_run_is_what_it_prints(trials):
    (console,) = (block for block in blocks(section("See it"), "console") if "make run" in block)
    real = normalised(trials.run().stdout, trials.directory).splitlines()
    wanted = [line for line in normalised(console, "run").splitlines()[1:] if line and line != "..."]
    assert len(wanted) > 20
    place = 0
    for line in wanted:
        assert line in real[place:], f"`make run` does not print {line!r} here"
        place = real.index(line, place) + 1


def test_every_make_target_that_is_named_exists():
    makefile = (REPOSITORY / "Makefile").read_text()
    text = README + (REPOSITORY / "CONTRIBUTING.md").read_text()
    named = set(re.findall(r"(?:`|\$ |sudo )make ([a-z-]+)", text))
    assert named >= {"run", "test", "sanity", "help"}
    assert {target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


# --- command line -----------------------------------------------------------------------------------------------------------------


def test_the_flags_are_those_of_serve_with_their_variables_and_defaults():
    options = {option.opts[0]: option for option in serve.command.params if isinstance(option, click.Option)}
    rows = {row[0]: row for row in table(section("The command line"))}
    assert list(rows) == list(options)
    for flag, option in options.items():
        assert rows[flag][1] == option.envvar
        told = option.default if isinstance(option.default, (str, Path)) else {"--node-id": "the host's name"}.get(flag)
        told = "off" if flag in ("--metrics-address", "--kubelet-registration-path") else told
        assert rows[flag][2] == str(told or "")
        if isinstance(option.type, click.Choice):
            assert all(choice in rows[flag][3] or choice in rows[flag][2] for choice in option.type.choices)


def test_every_command_that_is_named_exists():
    group = commands.build(serve=lambda *_: 0, inspect=None)
    named = set(re.findall(r"`tatami ([a-z]+)", README))
    assert named == set(group.list_commands(click.Context(group)))


# --- pools.toml -------------------------------------------------------------------------------------------------------------------


def test_the_example_of_pools_toml_is_served_as_it_says():
    settings = parse_settings(blocks(section("pools.toml"), "toml")[0].encode(), "pools.toml")
    assert (settings.backend, settings.default_pool, settings.max_volumes_per_node) == ("hostpath", "fast", 100)
    assert {name: (str(pool.path), pool.inline) for name, pool in settings.pools.items()} == {
        "fast": ("/mnt/nvme/tatami", True),
        "large": ("/mnt/disks/tatami", False),
    }


def test_the_mistaken_example_is_refused_in_the_words_shown():
    text = section("pools.toml")
    mistaken = blocks(text, "toml")[1]
    assert tomllib.loads(mistaken)
    with pytest.raises(ConfigError) as refusal:
        parse_settings(mistaken.encode(), "pools.toml")
    assert str(refusal.value) == blocks(text, "")[0].rstrip("\n")


def test_the_keys_are_those_of_the_parser():
    with pytest.raises(ConfigError) as refusal:
        parse_settings(b"[driver]\nunknown = 1\n[pools.a]\npath = '/a'\nunknown = 1\n", "f")
    driver, pool = (line.rpartition("allowed: ")[2].split(", ") for line in refusal.value.problems)
    rows = table(section("pools.toml"))
    second = next(index for index, row in enumerate(rows) if row[0] == "[pools.NAME]")
    assert [row[1] for row in rows[:second]] == ["backend", "name", "default_pool", "max_volumes_per_node"]
    assert sorted(row[1] for row in rows[:second]) == sorted(driver)
    assert [row[1] for row in rows[second:]] == pool


# --- parameters -------------------------------------------------------------------------------------------------------------------


def test_the_parameters_are_those_of_the_parser():
    keys = [row[0] for row in table(section("StorageClass parameters"))]
    assert keys == allowed_by(parameters.parse_class_parameters, {"unknown": "x"})
    assert allowed_by(parameters.parse_mutable_parameters, {"unknown": "x"}) == ["onDelete"]
    (on_delete,) = (row for row in table(section("StorageClass parameters")) if row[0] == "onDelete")
    assert on_delete[2].split(", ") == list(OnDelete)


def values_below(yaml, key):
    """Return the mapping of plain scalars that is indented below `key:`."""
    found = re.search(rf"^( *){key}:\n((?:\1  +\S.*\n)+)", yaml, re.MULTILINE)
    assert found, f"no {key} in {yaml}"
    pairs = (line.strip().partition(": ") for line in found[2].splitlines())
    return {name: value.strip('"') for name, _, value in pairs}


def test_the_example_of_a_class_is_accepted():
    (yaml,) = blocks(section("StorageClass parameters"), "yaml")
    parsed = parameters.parse_class_parameters(values_below(yaml, "parameters") | METADATA)
    assert (parsed.pool, parsed.directory, parsed.on_delete) == ("fast", "team/photos", OnDelete.ARCHIVE)
    assert (parsed.ownership.uid, parsed.ownership.mode) == (1000, 0o2770)


def test_the_mount_options_that_are_named_are_honoured_and_no_other_is():
    listed = re.search(r"refused by name: (.*?)\.\n", section("StorageClass parameters"), re.DOTALL)[1]
    words = re.findall(r"`(\w+)`", listed)
    for word in words:
        parse_bind_flags((word,), "mount_flags")
    with pytest.raises(InvalidArgument) as refusal:
        parse_bind_flags(("unknown",), "mount_flags")
    allowed = re.search(r"one of (.*)", str(refusal.value))[1].split(", ")
    assert set(words) == set(allowed) - {"rw", "suid", "dev", "exec", "diratime", "symfollow", "atime"}


def test_the_examples_of_inline_and_static_volumes_are_accepted():
    inline, static = blocks(section("Inline and static volumes"), "yaml")
    assert parameters.parse_inline_parameters(values_below(inline, "volumeAttributes")).size_bytes == 1 << 30
    assert parameters.parse_static_parameters(values_below(static, "volumeAttributes")).directory == "photographs/1998"


# --- errors and metrics -------------------------------------------------------------------------------------------------------------


def test_each_code_that_the_driver_answers_is_explained():
    explained = {row[0] for row in table(section("Reading errors"))}
    assert explained == {code.name for code in (*CODES.values(), *ERRNO_CODES.values())}


def test_each_metric_is_listed_with_its_labels():
    metrics = PrometheusMetrics("driver", {"backend": "hostpath", "role": "all"})
    metrics.lane_opened("node", 1)
    metrics.watch_pool("fast", lambda: PoolUsage(1, 1, 1, 1, 1, 1, 1))
    metrics.watch_jobs(lambda: JobUsage(1, 1, 1))
    metrics.call_finished("/csi.v1.Node/NodeGetInfo", "OK", 0.1)
    metrics.sweep_finished("fast", 0.1, {"trash": 1}, 0)
    labels = {}
    for family in metrics._registry.collect():
        if not family.name.startswith(("process_", "python_gc_")):
            labels[family.name] = {label for sample in family.samples for label in sample.labels} - {"le"}
    listed = {row[0]: {label.strip() for label in row[1].split(",") if label.strip()} for row in table(section("Metrics"))}
    assert listed == labels
