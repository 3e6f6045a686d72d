import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.errors import RecordDamaged
from csi_driver.volumes import record_format
from csi_driver.volumes.model import (
    AccessMode,
    AccessType,
    CaptureReport,
    ContentSource,
    Form,
    GroupRecord,
    Layout,
    Limit,
    LimiterKind,
    LimitPolicy,
    NodePublication,
    OnDelete,
    Ownership,
    Phase,
    SnapshotRecord,
    SourceKind,
    VolumeRecord,
)
from csi_driver.volumes.node_state import NodeVolumeRecord, Target
from csi_driver.volumes.record_format import decode, encode

KINDS = [VolumeRecord, SnapshotRecord, GroupRecord, NodeVolumeRecord]
VOLUME = VolumeRecord("i", "p.i", "name", "driver", "p", "token", Phase.READY, 1, "dir", 2**40)
FULL = replace(
    VOLUME,
    form=Form(Layout.IMAGE, AccessType.MOUNT, "xfs"),
    on_delete=OnDelete.RETAIN,
    ownership=Ownership(0, 1, 0o2770),
    directory_template="a/b",
    source=ContentSource(SourceKind.SNAPSHOT, "p.s"),
    capture=CaptureReport("copy", 3, 4, {"acl": 1}),
    claimed=True,
    content_inode=7,
    published=(NodePublication("node", AccessMode.SINGLE_NODE_WRITER, readonly=True),),
    epoch=3,
    ephemeral=True,
    verify=True,
    limit_policy=LimitPolicy.REQUIRED,
    inodes=9,
    limit=Limit(LimiterKind.PROJECT_QUOTA, "hard", 7),
)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_every_record_is_read_back_as_it_was_written(kind, data):
    record = data.draw(st.from_type(kind))
    assert decode(kind, encode(record), "place") == record


def test_the_example_has_a_value_in_every_field():
    assert {field for field in VolumeRecord.__dataclass_fields__ if field not in json.loads(encode(FULL))} == set()


def test_an_optional_field_at_its_default_is_left_out():
    assert "ephemeral" not in json.loads(encode(VOLUME))
    assert Target("/x", readonly=False) == decode(NodeVolumeRecord, encode(_node(Target("/x", readonly=False))), "p").targets[0]


def read(data):
    """The record and no damage, or the other way round."""
    try:
        return decode(VolumeRecord, bytes(data), "place"), None
    except RecordDamaged as damage:
        return None, str(damage)


def _node(*targets):
    return NodeVolumeRecord("i", "t", "h", "p", "d", AccessMode.SINGLE_NODE_WRITER, targets=targets)


@given(st.data())
def test_a_record_that_was_cut_short_or_overwritten_is_damaged_or_means_the_same(data):
    whole = encode(FULL)
    cut = data.draw(st.integers(0, len(whole) - 3))
    noise = data.draw(st.binary(max_size=8))
    with pytest.raises(RecordDamaged, match=r"^pool:\.csi/volumes/i\.json is damaged: "):
        decode(VolumeRecord, whole[:cut] + noise.replace(b"}", b""), "pool:.csi/volumes/i.json")


@given(st.data())
def test_a_flipped_byte_never_raises_anything_but_damage(data):
    whole = bytearray(encode(FULL))
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    _, damage = read(whole)
    assert damage is None or damage.startswith("place is damaged: ")


def paths(body, prefix=()):
    yield prefix
    items = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in items:
        yield from paths(value, (*prefix, key))


EVERY_PLACE = [path for path in paths(json.loads(encode(FULL))) if path and path != ("schema_version",)]


@pytest.mark.parametrize("path", EVERY_PLACE, ids=str)
@pytest.mark.parametrize("value", [1.5, True, "1", -0.0, None, [], {}, [[]], {"x": 1}])
def test_a_value_of_another_type_is_damage_that_names_its_place(path, value):
    body = json.loads(encode(FULL))
    holder = body
    for key in path[:-1]:
        holder = holder[key]
    before = holder[path[-1]]
    holder[path[-1]] = value
    record, damage = read(json.dumps(body).encode())
    if damage is not None:
        named = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).lstrip(".")
        assert named in damage or path == ("kind",)
    else:
        # The only values that are taken: of the same type, or none where none is allowed.
        assert type(value) in (type(before), type(None)) or (value == [] and isinstance(before, list))
        assert record != FULL or value == before


@pytest.mark.parametrize("name", [f for f in json.loads(encode(VOLUME)) if f not in ("schema_version", "kind")])
def test_a_missing_field_is_damage_that_names_it(name):
    body = json.loads(encode(VOLUME))
    del body[name]
    with pytest.raises(RecordDamaged, match=f"lacks '{name}'"):
        decode(VolumeRecord, json.dumps(body).encode(), "place")


@pytest.mark.parametrize("path", [(), ("ownership",), ("source",), ("capture",), ("published", 0)], ids=str)
def test_an_unknown_field_is_damage_that_names_it(path):
    body = json.loads(encode(FULL))
    holder = body
    for key in path:
        holder = holder[key]
    holder["surprise"] = 1
    with pytest.raises(RecordDamaged, match="unknown field 'surprise'"):
        decode(VolumeRecord, json.dumps(body).encode(), "place")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        b"1" * 10_000,
        b'{"schema_version": "1"}',
        b'{"schema_version": 0}',
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_record_at_all_is_damage(data):
    with pytest.raises(RecordDamaged):
        decode(VolumeRecord, data, "place")


def test_a_record_of_another_kind_is_damage():
    group = GroupRecord("i", "h", "n", "d", "p", "t", Phase.READY, 1, (), ())
    with pytest.raises(RecordDamaged, match="not a volume record"):
        decode(VolumeRecord, encode(group), "place")


def test_a_newer_drivers_record_is_refused_not_guessed():
    body = json.loads(encode(VOLUME)) | {"schema_version": record_format.SCHEMA_VERSION + 1}
    with pytest.raises(RecordDamaged, match="a newer driver wrote it"):
        decode(VolumeRecord, json.dumps(body).encode(), "place")


def test_an_older_drivers_record_is_lifted_step_by_step(monkeypatch):
    old = json.loads(encode(VOLUME))
    old["path"] = old.pop("directory")
    monkeypatch.setattr(record_format, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(
        record_format,
        "MIGRATIONS",
        {
            1: lambda body: {**{k: v for k, v in body.items() if k != "path"}, "place": body["path"]},
            2: lambda body: {**{k: v for k, v in body.items() if k != "place"}, "directory": body["place"] + "/v3"},
        },
    )
    assert decode(VolumeRecord, json.dumps(old).encode(), "place") == replace(VOLUME, directory="dir/v3")
    assert json.loads(encode(VOLUME))["schema_version"] == 3
    del old["path"]
    with pytest.raises(RecordDamaged, match="cannot be lifted from schema_version 1"):
        decode(VolumeRecord, json.dumps(old).encode(), "place")
