import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.errors import InvalidArgument
from csi_driver.volumes.model import LimitPolicy, OnDelete, Ownership
from csi_driver.volumes.parameters import (
    EPHEMERAL,
    PV_NAME,
    PVC_NAME,
    PVC_NAMESPACE,
    InlineParameters,
    StaticParameters,
    check_directory,
    parse_class_parameters,
    parse_group_parameters,
    parse_inline_parameters,
    parse_mutable_parameters,
    parse_snapshot_parameters,
    parse_static_parameters,
)
from csi_driver.volumes.requests import ClassParameters

HOSTILE = st.text() | st.sampled_from(
    [
        "..",
        "../..",
        "/",
        "a/../b",
        ".csi",
        ".csi/volumes",
        "a//b",
        "a/",
        "/a",
        "-rf",
        "a\0b",
        "a\n",
        "${pvc.name}",
        "${",
        "$",
        "~",
        "a,b",
        "a b",
    ]
)
METADATA = st.fixed_dictionaries({}, optional={PVC_NAME: HOSTILE, PVC_NAMESPACE: HOSTILE, PV_NAME: HOSTILE})
SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


def refuses(parse, *args):
    """The message of the refusal, or None where `parse` gave a value."""
    try:
        parse(*args)
    except InvalidArgument as error:
        return str(error)
    return None


@pytest.mark.parametrize("key", ["pool", "directory", "onDelete", "uid", "gid", "mode", "verify"])
@given(value=HOSTILE)
def test_any_value_of_a_class_parameter_is_taken_or_refused_by_its_key(key, value):
    message = refuses(parse_class_parameters, {key: value})
    assert message is None or f'parameters["{key}"]' in message


@given(key=st.text(), value=st.text())
def test_any_unknown_key_is_refused_by_name(key, value):
    if key in {"pool", "directory", "onDelete", "uid", "gid", "mode", "verify", "digests", "freeze"} or key.startswith(
        "csi.storage.k8s.io/"
    ):
        return
    for parse in (parse_class_parameters, parse_mutable_parameters, parse_snapshot_parameters, parse_inline_parameters):
        message = refuses(parse, {key: value})
        assert message is not None
        assert "unknown key" in message


@pytest.mark.parametrize(("parse", "key"), [(parse_class_parameters, "verify"), (parse_snapshot_parameters, "digests")])
def test_what_is_yes_or_no_is_said_as_true_or_false(parse, key):
    def said(parsed):
        return parsed.verify if isinstance(parsed, ClassParameters) else parsed

    assert said(parse({key: "true"})) is True
    assert said(parse({key: "false"})) is said(parse({})) is False
    for value in ("True", "yes", "1", ""):
        with pytest.raises(InvalidArgument, match=rf'parameters\["{key}"\] is .*allowed are "true" and "false"'):
            parse({key: value})


def test_freeze_is_refused_with_the_reason_and_a_group_makes_no_digests():
    for parse in (parse_snapshot_parameters, parse_group_parameters):
        with pytest.raises(InvalidArgument, match="one filesystem, which is never frozen"):
            parse({"freeze": "true"})
    with pytest.raises(InvalidArgument, match="digests"):
        parse_group_parameters({"digests": "true"})


def test_a_typo_is_answered_with_what_was_meant():
    with pytest.raises(InvalidArgument, match="did you mean `onDelete`"):
        parse_class_parameters({"ondelete": "retain"})


@given(
    template=st.lists(HOSTILE | st.sampled_from(["${pvc.name}", "${pv.name}", "${pvc.namespace}", "/"])).map("".join),
    metadata=METADATA,
)
def test_a_template_never_leaves_the_pool_whatever_the_names_are(template, metadata):
    try:
        directory = parse_class_parameters({"directory": template, **metadata}).directory
    except InvalidArgument:
        return
    assert SAFE.fullmatch(directory)
    assert ".." not in directory.split("/")
    assert directory.split("/")[0] not in {".csi", "archived", "lost+found"}


def test_a_template_is_filled_with_the_names_of_the_claim():
    metadata = {PVC_NAME: "data", PVC_NAMESPACE: "team-a", PV_NAME: "pvc-1"}
    parsed = parse_class_parameters({"directory": "apps/${pvc.namespace}/${pvc.name}-${pv.name}", **metadata})
    assert parsed.directory == "apps/team-a/data-pvc-1"


@pytest.mark.parametrize(
    ("template", "metadata", "problem"),
    [
        ("${pvc.name}", {}, "extra-create-metadata"),
        ("${pvc.uid}", {PVC_NAME: "x"}, "allowed variables"),
        ("${pvc.name}", {PVC_NAME: "../../etc"}, PVC_NAME),
        ("${pvc.name}/${pvc.name}", {PVC_NAME: "a/b"}, PVC_NAME),
        ("archived/x", {}, "reserved"),
        ("lost+found", {}, "components"),
        ("archived", {}, "reserved"),
        ("a/b/c/d/e/f/g/h/i", {}, "8 components"),
        ("x" * 129, {}, "128 letters"),
        ("", {}, "components"),
    ],
)
def test_a_template_that_cannot_be_filled_says_why(template, metadata, problem):
    with pytest.raises(InvalidArgument, match=re.escape(problem)):
        parse_class_parameters({"directory": template, **metadata})


def test_a_whole_class_is_read():
    parsed = parse_class_parameters(
        {"pool": "fast", "onDelete": "archive", "uid": "0", "gid": "4294967294", "mode": "2770", PVC_NAME: "ignored"}
    )
    assert parsed == ClassParameters("fast", None, OnDelete.ARCHIVE, Ownership(0, 4294967294, 0o2770))
    assert parse_class_parameters({}) == ClassParameters()


def test_the_mutable_parameters_win_over_the_class():
    assert parse_class_parameters({"onDelete": "delete"}, {"onDelete": "retain"}).on_delete is OnDelete.RETAIN
    assert parse_mutable_parameters({}) is None


@pytest.mark.parametrize("value", ["4294967295", "-1", "1.5", "0x10", "", " 1", "1\n", "\u0661", "99999999999"])
def test_an_owner_that_is_no_number_below_the_kernels_leave_it_is_refused(value):
    assert 'parameters["uid"]' in refuses(parse_class_parameters, {"uid": value})


@pytest.mark.parametrize(("value", "mode"), [("000", 0), ("755", 0o755), ("0755", 0o755), ("1777", 0o1777), ("3777", 0o3777)])
def test_modes_are_octal(value, mode):
    assert parse_class_parameters({"mode": value}).ownership.mode == mode


@pytest.mark.parametrize("value", ["4755", "888", "75", "00755", "rwxr-xr-x", "0o755", "\u0667\u0665\u0665"])
def test_a_mode_that_is_none_or_sets_the_user_id_is_refused(value):
    assert 'parameters["mode"]' in refuses(parse_class_parameters, {"mode": value})


@given(size=HOSTILE, pool=HOSTILE)
def test_any_inline_volume_is_understood_or_refused_by_its_key(size, pool):
    message = refuses(parse_inline_parameters, {"size": size, "pool": pool, EPHEMERAL: "true"})
    assert message is None or "volume_context[" in message


@pytest.mark.parametrize("key", ["directory", "uid", "gid", "mode", "onDelete", "path", "server", "Size"])
def test_a_pod_author_may_say_nothing_but_size_and_pool(key):
    assert "unknown key" in refuses(parse_inline_parameters, {key: "1", EPHEMERAL: "true"})


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("100Mi", 100 * 2**20), ("1G", 10**9), ("7Ei", 7 * 2**60), ("9223372036854775807", 2**63 - 1)]
)
def test_kubernetes_quantities_are_bytes(text, size):
    assert parse_inline_parameters({"size": text}) == InlineParameters(size)


@pytest.mark.parametrize("text", ["0", "-1", "1.5Gi", "1e3", "8Ei", "9223372036854775808", "1 Gi", "1gi", "01", "1" * 5000])
def test_a_quantity_that_is_no_size_is_refused(text):
    assert 'volume_context["size"]' in refuses(parse_inline_parameters, {"size": text})


@given(pool=HOSTILE, directory=HOSTILE)
def test_any_static_volume_lies_in_the_pool_or_is_refused_by_its_key(pool, directory):
    context = {"pool": pool, "directory": directory}
    message = refuses(parse_static_parameters, context)
    assert "volume_context[" in message if message else SAFE.fullmatch(parse_static_parameters(context).directory)


def test_a_static_volume_needs_both_its_parameters():
    assert parse_static_parameters({"pool": "a", "directory": "b/c"}) == StaticParameters("a", "b/c")
    assert 'volume_context["pool"] is missing' in refuses(parse_static_parameters, {"directory": "b"})
    assert 'volume_context["directory"] is missing' in refuses(parse_static_parameters, {"pool": "a"})


@given(HOSTILE)
def test_a_directory_that_is_accepted_is_given_back_as_it_is(path):
    message = refuses(check_directory, path, "field")
    if message is None:
        assert SAFE.fullmatch(path)
        assert check_directory(path, "field") == path
    else:
        assert message.startswith("field is ")


def test_a_class_says_whether_a_limit_is_required_and_how_many_inodes():
    assert parse_class_parameters({}).limit is LimitPolicy.PREFERRED
    parsed = parse_class_parameters({"limit": "required", "inodes": "100000"})
    assert (parsed.limit, parsed.inodes) == (LimitPolicy.REQUIRED, 100000)


@pytest.mark.parametrize(
    ("key", "value"), [("limit", "hard"), ("limit", ""), ("inodes", "0"), ("inodes", "-1"), ("inodes", "1k"), ("inodes", "٣")]
)
def test_a_limit_or_number_of_inodes_that_cannot_be_is_named(key, value):
    with pytest.raises(InvalidArgument, match=rf'parameters\["{key}"\]'):
        parse_class_parameters({key: value})
