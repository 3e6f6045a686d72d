"""Every mistake in `pools.toml` is a line that names file, key, value and what is allowed; nothing else ever comes out."""

import contextlib
import os
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from csi_driver.config import (
    DEFAULT_POOL_PATH,
    Budget,
    ConfigError,
    DriverSettings,
    HostPathPool,
    NfsPool,
    ServeOptions,
    load_settings,
    parse_endpoint,
    parse_metrics_address,
    parse_settings,
)

ONE_POOL = '[pools.fast]\npath = "/srv/fast"\n'
NFS = '[driver]\nbackend = "nfs"\n'


def settings(text):
    return parse_settings(text.encode(), "pools.toml")


QUANTITY = "a whole Kubernetes quantity such as `100Mi` or `1Gi`"
SIZE = 'must be a whole Kubernetes quantity such as "500Gi", or bytes'
FACTOR = "must be a number from 1 to 1000"
RESERVE = 'must be a whole Kubernetes quantity such as "5Gi", bytes, or a share of the filesystem from "0%" to less than "100%"'


def problems(text):
    with pytest.raises(ConfigError) as caught:
        settings(text)
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert all(len(line.splitlines()) == 1 for line in caught.value.problems)
    return list(caught.value.problems)


# --- what is read -----------------------------------------------------------------------------------------------------------------


def test_without_a_file_one_hostpath_pool_named_default_is_served():
    found = load_settings(None)
    assert found.backend == "hostpath"
    assert found.name == "hostpath.csi.tatami.dev"
    assert dict(found.pools) == {"default": HostPathPool("default", DEFAULT_POOL_PATH)}
    assert found.default_pool == "default"
    assert found.max_volumes_per_node is None


def test_every_hostpath_key_reaches_the_settings(tmp_path):
    file = tmp_path / "pools.toml"
    file.write_text(
        '[driver]\nbackend = "hostpath"\nname = "a.example.org"\ndefault_pool = "slow"\nmax_volumes_per_node = 8\n'
        '[pools.fast]\npath = "/srv//fast/./"\nshared = true\ninline = true\n[pools.slow]\npath = "/srv/fast2"\n'
    )
    assert load_settings(file) == DriverSettings(
        "hostpath",
        "a.example.org",
        {
            "fast": HostPathPool("fast", Path("/srv/fast"), shared=True, inline=True),
            "slow": HostPathPool("slow", Path("/srv/fast2")),
        },
        "slow",
        8,
    )


def test_every_nfs_key_reaches_the_settings():
    found = settings(
        NFS + '[pools.a]\nserver = "nas.example.org"\npath = "/"\noptions = ["vers=4.2", "hard"]\ninline = true\n'
        '[pools.b]\nserver = "[fd00::1]"\npath = "/export/b"\ndata = "/srv/b/"\n'
    )
    assert found.name == "nfs.csi.tatami.dev"
    assert dict(found.pools) == {
        "a": NfsPool("a", "nas.example.org", Path("/"), ("vers=4.2", "hard"), inline=True),
        "b": NfsPool("b", "[fd00::1]", Path("/export/b"), data=Path("/srv/b")),
    }


@pytest.mark.parametrize("other", ["/srv/a", "/srv/a/below", "/srv"])
def test_no_two_pools_have_one_directory_as_their_data(other):
    both = '[pools.a]\nserver = "one"\npath = "/x"\ndata = "/srv/a"\n[pools.b]\nserver = "two"\npath = "/y"\ndata = "{}"\n'
    with pytest.raises(ConfigError, match=r"\[pools.b\] data = .*as it is of \[pools.a\]"):
        settings(NFS + both.format(other))
    assert settings(NFS + both.format("/srv/ab")).pools["b"].data == Path("/srv/ab")


GIB = 1024**3


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("", Budget()),
        ("size = '500Gi'", Budget(500 * GIB)),
        ("size = '500G'", Budget(500 * 10**9)),
        ("size = '1048576'", Budget(1048576)),
        ("size = 1048576", Budget(1048576)),
        ("size = '7Ei'", Budget(7 * 1024**6)),
        ("overcommit = 1.5", Budget(overcommit=Fraction(3, 2))),
        ("overcommit = 1.1", Budget(overcommit=Fraction(11, 10))),
        ("overcommit = 2", Budget(overcommit=Fraction(2))),
        ("reserve = '5Gi'", Budget(reserve_bytes=5 * GIB)),
        ("reserve = 4096", Budget(reserve_bytes=4096)),
        ("reserve = '5%'", Budget(reserve_share=Fraction(5, 100))),
        ("reserve = '2.5%'", Budget(reserve_share=Fraction(25, 1000))),
        ("reserve = '0%'", Budget()),
        ("reserve = 0", Budget()),
        ("size = '1Ti'\novercommit = 3\nreserve = '10%'", Budget(1024 * GIB, Fraction(3), 0, Fraction(1, 10))),
    ],
)
def test_what_a_pool_may_promise_is_read_exactly(text, budget):
    assert settings(ONE_POOL + text).pools["fast"].budget == budget
    nfs = settings(NFS + "[pools.fast]\nserver = 'a'\npath = '/x'\n" + text)
    assert nfs.pools["fast"].budget == budget


def test_the_reserve_is_a_share_of_the_filesystem_or_so_many_bytes():
    assert Budget(reserve_share=Fraction(25, 1000)).reserve_of(1000) == 25
    assert Budget(reserve_bytes=4096).reserve_of(1000) == 4096
    assert Budget().reserve_of(1000) == 0


def test_the_pools_and_the_settings_cannot_be_changed():
    found = settings(ONE_POOL)
    with pytest.raises(TypeError):
        found.pools["x"] = found.pools["fast"]
    with pytest.raises(AttributeError):
        found.name = "x"


@pytest.mark.parametrize(
    ("text", "default"),
    [
        (ONE_POOL, "fast"),
        (ONE_POOL + '[pools.slow]\npath = "/srv/slow"\n', None),
        (ONE_POOL + '[pools.default]\npath = "/srv/slow"\n', "default"),
        ('[driver]\ndefault_pool = "fast"\n' + ONE_POOL + '[pools.default]\npath = "/srv/slow"\n', "fast"),
    ],
)
def test_the_default_pool_is_the_one_said_the_only_one_or_the_one_named_default(text, default):
    assert settings(text).default_pool == default


@pytest.mark.parametrize("server", ["nas", "NAS-1.example.org", "10.0.0.1", "[fd00::1]", "[fe80::1%eth0]", "1a.example"])
def test_servers_are_host_names_and_addresses(server):
    found = settings(NFS + f'[pools.a]\nserver = "{server}"\npath = "/x"\n')
    assert found.pools["a"].server == server


def test_one_path_on_two_servers_is_two_places():
    found = settings(NFS + '[pools.a]\nserver = "nas1"\npath = "/x"\n[pools.b]\nserver = "nas2"\npath = "/x"\n')
    assert set(found.pools) == {"a", "b"}


# --- what is refused: the exact lines ---------------------------------------------------------------------------------------------

PATH = "pools.toml: [pools.fast] path"
SERVER_ALLOWED = "must be a host name, an IPv4 address or an [IPv6] address"
OPTION_ALLOWED = "each option is printable ASCII without ',', white space, quotes or backslash, and does not begin with '-'"
NAME_ALLOWED = "must be a lower-case domain name (RFC 1123 subdomain) of at most 63 characters, such as hostpath.csi.tatami.dev"
POOL_NAME_ALLOWED = "a pool's name is 1 to 32 of a-z, 0-9 and '-', beginning and ending with a letter or digit"
COUNT_ALLOWED = "must be a whole number from 1 to 9223372036854775807"
OVERLAP_ALLOWED = "must be neither the path of another pool nor above or below it: [pools.fast] has /srv/fast"
DRIVER_KEYS = "backend, name, default_pool, max_volumes_per_node"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "pools.toml: pools is missing: must have at least one pool, [pools.NAME]"),
        ("[pools]", "pools.toml: pools = {}: must have at least one pool, [pools.NAME]"),
        ("pools = 3", "pools.toml: pools = 3: must be a table, [pools]"),
        ("driver = true\n" + ONE_POOL, "pools.toml: driver = true: must be a table, [driver]"),
        ("[pools]\nfast = []", "pools.toml: [pools] fast = []: must be a table, [pools.fast]"),
        ("[[pools.fast]]\npath='/x'", 'pools.toml: [pools] fast = [{"path": "/x"}]: must be a table, [pools.fast]'),
        (
            ONE_POOL + "[pool.slow]\npath = 1",
            'pools.toml: pool = {"slow": {"path": 1}}: unknown table (did you mean pools?); allowed: driver, pools',
        ),
        ("name = 'x'\n" + ONE_POOL, 'pools.toml: name = "x": unknown table; allowed: driver, pools'),
        (
            ONE_POOL + "shard = true",
            "pools.toml: [pools.fast] shard = true: unknown key (did you mean shared?); allowed: path, shared, inline, size, overcommit, reserve",
        ),
        (
            ONE_POOL + "quota = '1Gi'",
            'pools.toml: [pools.fast] quota = "1Gi": unknown key; allowed: path, shared, inline, size, overcommit, reserve',
        ),
        (ONE_POOL + "size = '500GB'", f'pools.toml: [pools.fast] size = "500GB": {QUANTITY}'),
        (ONE_POOL + "size = ''", f'pools.toml: [pools.fast] size = "": {QUANTITY}'),
        (ONE_POOL + "size = '9Ei'", f'pools.toml: [pools.fast] size = "9Ei": {QUANTITY}'),
        (ONE_POOL + "size = 0", f"pools.toml: [pools.fast] size = 0: {SIZE}"),
        (ONE_POOL + "size = 9223372036854775808", f"pools.toml: [pools.fast] size = 9223372036854775808: {SIZE}"),
        (ONE_POOL + "size = 1.5", f"pools.toml: [pools.fast] size = 1.5: {SIZE}"),
        (ONE_POOL + "size = true", f"pools.toml: [pools.fast] size = true: {SIZE}"),
        (ONE_POOL + "size = ['1Gi']", f'pools.toml: [pools.fast] size = ["1Gi"]: {SIZE}'),
        (ONE_POOL + "overcommit = 0.9", f"pools.toml: [pools.fast] overcommit = 0.9: {FACTOR}"),
        (ONE_POOL + "overcommit = 1001", f"pools.toml: [pools.fast] overcommit = 1001: {FACTOR}"),
        (ONE_POOL + "overcommit = nan", f"pools.toml: [pools.fast] overcommit = NaN: {FACTOR}"),
        (ONE_POOL + "overcommit = inf", f"pools.toml: [pools.fast] overcommit = Infinity: {FACTOR}"),
        (ONE_POOL + "overcommit = '1.5'", f'pools.toml: [pools.fast] overcommit = "1.5": {FACTOR}'),
        (ONE_POOL + "overcommit = true", f"pools.toml: [pools.fast] overcommit = true: {FACTOR}"),
        (ONE_POOL + "reserve = '100%'", f'pools.toml: [pools.fast] reserve = "100%": {RESERVE}'),
        (ONE_POOL + "reserve = '-5%'", f'pools.toml: [pools.fast] reserve = "-5%": {RESERVE}'),
        (ONE_POOL + "reserve = '5 %'", f'pools.toml: [pools.fast] reserve = "5 %": {RESERVE}'),
        (ONE_POOL + "reserve = 'much'", f'pools.toml: [pools.fast] reserve = "much": {RESERVE}'),
        (ONE_POOL + "reserve = -1", f"pools.toml: [pools.fast] reserve = -1: {RESERVE}"),
        (ONE_POOL + "reserve = 0.05", f"pools.toml: [pools.fast] reserve = 0.05: {RESERVE}"),
        (
            "[driver]\nmax_volume_per_node = 3\n" + ONE_POOL,
            f"pools.toml: [driver] max_volume_per_node = 3: unknown key (did you mean max_volumes_per_node?); allowed: {DRIVER_KEYS}",
        ),
        ("[pools.fast]", f"{PATH} is missing: an absolute path of a directory on the node"),
        ("[pools.fast]\npath = 7", f"{PATH} = 7: must be a string: an absolute path of a directory on the node"),
        ("[pools.fast]\npath = 'srv'", f'{PATH} = "srv": must be an absolute path'),
        ("[pools.fast]\npath = ''", f'{PATH} = "": must be an absolute path'),
        ("[pools.fast]\npath = '//'", f'{PATH} = "//": must be a directory of its own, not /'),
        ("[pools.fast]\npath = '/srv/../etc'", f"{PATH} = \"/srv/../etc\": must not contain '..'"),
        (
            '[pools.fast]\npath = "/srv\\u0000\\u001b[2J"',
            f'{PATH} = "/srv\\u0000\\u001b[2J": must not contain control characters or others that cannot be seen',
        ),
        (
            f"[pools.fast]\npath = '/{'a' * 256}'",
            f'{PATH} = "/{"a" * 78}…: must have at most 1024 bytes, and 255 between two slashes',
        ),
        (ONE_POOL + "shared = 'yes'", 'pools.toml: [pools.fast] shared = "yes": must be true or false'),
        (ONE_POOL + "inline = 1", "pools.toml: [pools.fast] inline = 1: must be true or false"),
        ("[pools.Fast]\npath = '/x'", f'pools.toml: [pools] Fast = {{"path": "/x"}}: {POOL_NAME_ALLOWED}'),
        ("[pools.'a.b']\npath = '/x'", f'pools.toml: [pools] "a.b" = {{"path": "/x"}}: {POOL_NAME_ALLOWED}'),
        (f"[pools.{'a' * 33}]\npath = '/x'", f'pools.toml: [pools] {"a" * 33} = {{"path": "/x"}}: {POOL_NAME_ALLOWED}'),
        (
            ONE_POOL + "[pools.slow]\npath = '/srv/fast/'",
            'pools.toml: [pools.slow] path = "/srv/fast/": ' + OVERLAP_ALLOWED,
        ),
        (
            ONE_POOL + "[pools.slow]\npath = '/srv'",
            'pools.toml: [pools.slow] path = "/srv": ' + OVERLAP_ALLOWED,
        ),
        ("[driver]\nbackend = 'smb'\n" + ONE_POOL, 'pools.toml: [driver] backend = "smb": must be "hostpath" or "nfs"'),
        (
            "[driver]\nbackend = 4\n" + ONE_POOL,
            'pools.toml: [driver] backend = 4: must be a string: must be "hostpath" or "nfs"',
        ),
        ("[driver]\nname = 'A.b'\n" + ONE_POOL, f'pools.toml: [driver] name = "A.b": {NAME_ALLOWED}'),
        ("[driver]\nname = 'a..b'\n" + ONE_POOL, f'pools.toml: [driver] name = "a..b": {NAME_ALLOWED}'),
        (f"[driver]\nname = '{'a.' * 31}aa'\n" + ONE_POOL, f'pools.toml: [driver] name = "{"a." * 31}aa": {NAME_ALLOWED}'),
        (
            "[driver]\ndefault_pool = 'slow'\n" + ONE_POOL,
            'pools.toml: [driver] default_pool = "slow": must be the name of a pool: fast',
        ),
        ("[driver]\nmax_volumes_per_node = 0\n" + ONE_POOL, f"pools.toml: [driver] max_volumes_per_node = 0: {COUNT_ALLOWED}"),
        (
            "[driver]\nmax_volumes_per_node = true\n" + ONE_POOL,
            f"pools.toml: [driver] max_volumes_per_node = true: {COUNT_ALLOWED}",
        ),
        (
            "[driver]\nmax_volumes_per_node = 1.5\n" + ONE_POOL,
            f"pools.toml: [driver] max_volumes_per_node = 1.5: {COUNT_ALLOWED}",
        ),
        (
            NFS + "[pools.fast]\npath = '/x'",
            "pools.toml: [pools.fast] server is missing: a host name, an IPv4 address or an [IPv6] address",
        ),
        (
            NFS + "[pools.fast]\nserver = 'a'\npath = '/x'\nshared = true",
            "pools.toml: [pools.fast] shared = true: unknown key; allowed: server, path, options, inline, data, size, overcommit, reserve",
        ),
        (
            NFS + "[pools.a]\nserver = 'NAS'\npath = '/x'\n[pools.b]\nserver = 'nas'\npath = '/x/y'",
            'pools.toml: [pools.b] path = "/x/y": must be neither the path of another pool nor above or below it: [pools.a] has /x',
        ),
        (
            NFS + "[pools.fast]\nserver = 'a'\npath = '/x'\noptions = 'hard'",
            'pools.toml: [pools.fast] options = "hard": must be a list of strings, such as ["vers=4.2", "hard"]',
        ),
        (
            NFS + "[pools.fast]\nserver = 'a'\npath = '/x'\noptions = ['hard', 4]",
            'pools.toml: [pools.fast] options = ["hard", 4]: must be a list of strings, such as ["vers=4.2", "hard"]',
        ),
    ],
)
def test_each_mistake_is_one_line_with_file_key_value_and_what_is_allowed(text, line):
    assert problems(text) == [line]


@pytest.mark.parametrize(
    "server",
    ["", "-a", "a b", "a,b", "a:/x", "fd00::1", "[fd00::1", "[nas]", "256.1.1.1", "1.2.3", "a..b", "[fe80::1%]", "a" * 64],
)
def test_a_server_that_is_no_host_is_refused(server):
    assert problems(NFS + f'[pools.fast]\nserver = "{server}"\npath = "/x"\n') == [
        f'pools.toml: [pools.fast] server = "{server}": {SERVER_ALLOWED}'
    ]


@pytest.mark.parametrize("option", ["", "-o", "a,b", "a b", "a\\tb", "a'b", 'a\\"b', "a`b", "a\\\\b", "a\\u0000", "ä"])
def test_an_option_that_could_end_an_option_list_is_refused(option):
    (line,) = problems(NFS + f'[pools.fast]\nserver = "a"\npath = "/x"\noptions = ["hard", "{option}"]\n')
    assert line.startswith('pools.toml: [pools.fast] options = ["hard", ')
    assert line.endswith(f": {OPTION_ALLOWED}")


def test_all_mistakes_of_a_file_are_told_at_once():
    text = "[driver]\nname = 'A'\nbakend = 'nfs'\n[pools.fast]\npath = 'srv'\nshared = 2\n[pools._]\npath = '/y'\n"
    assert [line.split(" = ")[0] for line in problems(text)] == [
        "pools.toml: [driver] bakend",
        "pools.toml: [driver] name",
        "pools.toml: [pools.fast] path",
        "pools.toml: [pools.fast] shared",
        "pools.toml: [pools] _",
    ]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"[pools.fast]\npath = '/x'\npath = '/y'\n", "pools.toml: is not valid TOML: Cannot overwrite a value (at line 3"),
        (b"[pools.fast]\n[pools.fast]\n", "pools.toml: is not valid TOML: "),
        (b"x = [", "pools.toml: is not valid TOML: "),
        (b"x = " + b"[" * 5000, "pools.toml: is not valid TOML: "),
        (b"x = " + b"1" * 5000, "pools.toml: is not valid TOML: "),
        (b"x = '\xff'", "pools.toml: is not UTF-8: byte 5 is 0xff"),
        (b"#" * (1024 * 1024 + 1), "pools.toml: is larger than 1048576 bytes"),
    ],
)
def test_a_file_that_is_no_toml_is_one_line(content, line):
    with pytest.raises(ConfigError) as caught:
        parse_settings(content, "pools.toml")
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(line)


def test_a_file_that_cannot_be_read_is_named_with_the_reason(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_settings(tmp_path / "absent.toml")
    assert str(caught.value) == f"{tmp_path}/absent.toml: cannot be read: No such file or directory"
    with pytest.raises(ConfigError) as caught:
        load_settings(tmp_path)
    assert str(caught.value) == f"{tmp_path}: cannot be read: Is a directory"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(Path("a\0b"))


# --- nothing but ConfigError, ever ------------------------------------------------------------------------------------------------


def toml(value):
    """Write a value as TOML; strings with every character escaped, so that any text survives."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(c):08x}" for c in value) + '"'
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"
    return str(value)


texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(["hostpath", "nfs", "/", "/srv/a", "/srv/a/b", "/../", "nas", "[::1]", "vers=4.2", "fast", "a.b"]),
)
scalars = st.one_of(
    texts,
    st.booleans(),
    st.integers(),
    st.floats(),
    st.datetimes().map(lambda moment: moment.replace(year=max(moment.year, 1000)).isoformat()).map(str),
    st.dates(),
    st.times(),
)
values = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)))
pools = st.dictionaries(
    st.one_of(st.sampled_from(["fast", "slow", "default"]), texts),
    st.one_of(
        values, st.dictionaries(st.one_of(st.sampled_from(["path", "server", "options", "shared", "inline"]), texts), values)
    ),
    max_size=4,
)
drivers = st.dictionaries(
    st.one_of(st.sampled_from(["backend", "name", "default_pool", "max_volumes_per_node"]), texts), values, max_size=5
)
documents = st.fixed_dictionaries(
    {}, optional={"driver": st.one_of(drivers, values), "pools": st.one_of(pools, values), "x": values}
)


@given(documents)
@example({"driver": {"backend": "nfs"}, "pools": {"a": {"server": "nas", "path": "/", "options": []}}})
def test_any_values_give_settings_or_clean_lines(document):
    text = "".join(f"{key} = {toml(value)}\n" for key, value in document.items())
    found, lines = None, ()
    try:
        found = settings(text)
    except ConfigError as error:
        lines = error.problems
    assert (found is None) == bool(lines)
    assert all(line.startswith("pools.toml: ") and line.isprintable() for line in lines)
    if found:
        assert found.pools
        assert all(pool.path.is_absolute() and ".." not in pool.path.parts for pool in found.pools.values())
        assert found.default_pool is None or found.default_pool in found.pools


@given(st.binary(max_size=200))
def test_any_bytes_give_settings_or_clean_lines(content):
    with pytest.raises(ConfigError) as caught:
        parse_settings(content, "pools.toml")
    assert all(line.startswith("pools.toml: ") for line in caught.value.problems)


# --- the command line's values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("unix:///csi/csi.sock", "/csi/csi.sock"),
        ("unix:/csi/csi.sock", "/csi/csi.sock"),
        ("/csi//csi.sock", "/csi/csi.sock"),
        ("/" + "a" * 106, "/" + "a" * 106),
    ],
)
def test_an_endpoint_is_the_path_of_a_unix_socket(text, path):
    assert parse_endpoint(text) == Path(path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("tcp://0.0.0.0:10000", "CSI has no authentication"),
        ("unix://csi/csi.sock", "three slashes"),
        ("csi.sock", "three slashes"),
        ("", "three slashes"),
        ("unix-abstract:x", "three slashes"),
        ("/csi/", "must name a socket"),
        ("/csi/../x", "must not contain '..'"),
        ("/csi/x\n", "control characters"),
        ("/" + "a" * 107, "at most 107 bytes"),
        ("/" + "ä" * 54, "at most 107 bytes"),
    ],
)
def test_any_other_endpoint_is_refused_with_the_reason(text, reason):
    with pytest.raises(ConfigError) as caught:
        parse_endpoint(text)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (":9808", ("", 9808)),
        ("localhost:0", ("localhost", 0)),
        ("10.0.0.1:65535", ("10.0.0.1", 65535)),
        ("[::1]:9808", ("::1", 9808)),
    ],
)
def test_a_metrics_address_is_a_host_and_a_port(text, address):
    assert parse_metrics_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "9808", "a:", "::1:9808", "a:65536", "a:-1", "a:٣", "a b:1", "http://a:1", "[::1]", ":1\n"]
)
def test_any_other_metrics_address_is_refused(text):
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        parse_metrics_address(text)


@given(st.text(max_size=130))
def test_any_text_as_endpoint_or_address_gives_a_value_or_a_config_error(text):
    for parse in (parse_endpoint, parse_metrics_address):
        for variant in (text, f"unix:///{text}", f"{text}:1"):
            with contextlib.suppress(ConfigError):  # anything else fails the test
                parse(variant)


def options(**changed):
    usual = {
        "config": None,
        "role": "all",
        "endpoint": "unix:///csi/csi.sock",
        "node_id": "node-1.example.org",
        "kubelet_dir": Path("/var/lib/kubelet"),
        "kubelet_registration_path": None,
        "metrics_address": None,
        "log_format": "text",
        "log_level": "info",
    }
    return ServeOptions(**(usual | changed))


def test_checked_options_have_a_normal_kubelet_directory():
    assert options(kubelet_dir=Path("//var/lib/kubelet")).checked() == options()
    assert os.fspath(options(kubelet_dir=Path("//var/lib/kubelet")).checked().kubelet_dir) == "/var/lib/kubelet"


def test_every_bad_option_is_named_with_its_flag_and_variable():
    with pytest.raises(ConfigError) as caught:
        options(endpoint="x", node_id="a b", kubelet_dir=Path("rel"), metrics_address="9808").checked()
    assert [line.split(": ")[0] for line in caught.value.problems] == [
        '--endpoint (or TATAMI_ENDPOINT) = "x"',
        '--node-id (or TATAMI_NODE_ID) = "a b"',
        '--kubelet-dir (or TATAMI_KUBELET_DIR) = "rel"',
        '--metrics-address (or TATAMI_METRICS_ADDRESS) = "9808"',
    ]
