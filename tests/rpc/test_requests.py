import dataclasses
import string

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csi_driver.errors import InvalidArgument, NotFound, OperationPending, OutOfRange
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import requests
from csi_driver.rpc.fields import MAX_MAP_BYTES, parse_handle, parse_name, parse_node_id, parse_page, parse_path
from csi_driver.rpc.redaction import SERVICE_ACCOUNT_TOKENS
from csi_driver.volumes.model import AccessMode, AccessType, ContentSource, NodePublication, OnDelete, SourceKind
from csi_driver.volumes.requests import Capability, CapacityRange, Page
from tests.rpc.harness import message_class

Mode = csi.VolumeCapability.AccessMode
MOUNT = csi.VolumeCapability(
    mount=csi.VolumeCapability.MountVolume(fs_type="ext4", mount_flags=["nosuid"]), access_mode=Mode(mode="SINGLE_NODE_WRITER")
)
TOPOLOGY = csi.Topology(segments={"topology.hostpath.csi.tatami.dev/node": "node-1"})
CAPACITY = csi.CapacityRange(required_bytes=10, limit_bytes=20)


def the_page(request):
    return parse_page(request.max_entries, request.starting_token)


# One good request of each kind, with every field set, and what parses it.
GOOD = {
    requests.parse_create_volume: csi.CreateVolumeRequest(
        name="pvc-1",
        capacity_range=CAPACITY,
        volume_capabilities=[MOUNT],
        parameters={"pool": "fast", "csi.storage.k8s.io/pvc/name": "data"},
        mutable_parameters={"onDelete": "retain"},
        volume_content_source=csi.VolumeContentSource(snapshot=csi.VolumeContentSource.SnapshotSource(snapshot_id="s")),
        accessibility_requirements=csi.TopologyRequirement(requisite=[TOPOLOGY], preferred=[TOPOLOGY]),
    ),
    requests.parse_expand: csi.ControllerExpandVolumeRequest(volume_id="v", capacity_range=CAPACITY, volume_capability=MOUNT),
    requests.parse_modify: csi.ControllerModifyVolumeRequest(volume_id="v", mutable_parameters={"onDelete": "archive"}),
    requests.parse_validate: csi.ValidateVolumeCapabilitiesRequest(
        volume_id="v",
        volume_capabilities=[MOUNT],
        volume_context={"pool": "fast"},
        parameters={"directory": "${pvc.namespace}/${pvc.name}"},
        mutable_parameters={"onDelete": "delete"},
    ),
    requests.parse_controller_publish: csi.ControllerPublishVolumeRequest(
        volume_id="v", node_id="node-1", volume_capability=MOUNT, readonly=True, volume_context={"pool": "fast"}
    ),
    requests.parse_controller_unpublish: csi.ControllerUnpublishVolumeRequest(volume_id="v", node_id="node-1"),
    requests.parse_get_capacity: csi.GetCapacityRequest(
        parameters={"pool": "fast", "directory": "${pvc.namespace}-${pvc.name}", "csi.storage.k8s.io/fstype": "ext4"},
        volume_capabilities=[MOUNT],
        accessible_topology=TOPOLOGY,
    ),
    requests.parse_create_snapshot: csi.CreateSnapshotRequest(
        name="snap-1",
        source_volume_id="v",
        parameters={"csi.storage.k8s.io/volumesnapshot/name": "s"},
        accessibility_requirements=csi.TopologyRequirement(requisite=[TOPOLOGY]),
    ),
    requests.parse_list_snapshots: csi.ListSnapshotsRequest(
        max_entries=3, starting_token="t", source_volume_id="v", snapshot_id="s"
    ),
    requests.parse_create_group: csi.CreateVolumeGroupSnapshotRequest(name="g", source_volume_ids=["v1", "v2"]),
    requests.parse_group: csi.DeleteVolumeGroupSnapshotRequest(group_snapshot_id="g", snapshot_ids=["s1", "s2"]),
    requests.parse_stage: csi.NodeStageVolumeRequest(
        volume_id="v",
        staging_target_path="/staging",
        volume_capability=MOUNT,
        publish_context={"a": "b"},
        volume_context={"c": "d"},
    ),
    requests.parse_publish: csi.NodePublishVolumeRequest(
        volume_id="v",
        staging_target_path="/staging",
        target_path="/target",
        volume_capability=MOUNT,
        readonly=True,
        publish_context={"a": "b"},
        volume_context={"c": "d"},
    ),
    requests.parse_stats: csi.NodeGetVolumeStatsRequest(volume_id="v", volume_path="/target", staging_target_path="/staging"),
    requests.parse_node_health: csi.NodeGetVolumeHealthRequest(
        volume_id="v", volume_publish_path="/target", staging_target_path="/staging"
    ),
    requests.parse_node_expand: csi.NodeExpandVolumeRequest(
        volume_id="v", volume_path="/target", capacity_range=CAPACITY, staging_target_path="/staging", volume_capability=MOUNT
    ),
    the_page: csi.ListVolumesRequest(max_entries=3, starting_token="t"),
}
PARSERS = pytest.mark.parametrize("parse", GOOD, ids=lambda parse: parse.__name__)


def good(parse, **changes):
    """A good request with some fields changed; None leaves a field out."""
    message = type(GOOD[parse])()
    message.CopyFrom(GOOD[parse])
    for name, value in changes.items():
        message.ClearField(name)
        if value is not None:
            message.MergeFrom(type(message)(**{name: value}))
    return message


def refused(parse, error=InvalidArgument, **changes):
    with pytest.raises(error) as raised:
        parse(good(parse, **changes))
    assert type(raised.value) is error
    return str(raised.value)


# --- whatever comes ---------------------------------------------------------------------------------------------------------------

HOSTILE = [
    "", " ", ".", "..", "/", "//", "/..", "/a/../b", "../../etc/passwd", "/a\n/b", "a\0b", "\x7f", "-rf", "a,b", "'\"", "$(reboot)",
    "${pvc.name}", "%s%n", "x" * 128, "x" * 129, "é" * 64, "é" * 65, "/" + "x" * 255, "/" + "x" * 256, "/x" * 3000, "\u202eevil", "🦄",
    "some/path", "node-1", "rw", "ro", "bind", "user=x,password=y", "fast", "delete", "onDelete", "directory", "pool", "uid", "0777",
    "csi.storage.k8s.io/ephemeral", SERVICE_ACCOUNT_TOKENS,
]  # fmt: skip
TEXTS = st.sampled_from(HOSTILE) | st.text(max_size=200) | st.text(alphabet=string.printable, max_size=20)
NUMBERS = {
    FieldDescriptor.TYPE_INT32: st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31)]) | st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_ENUM: st.sampled_from([0, 1, 5, 7, 8, -1, 2**31 - 1]),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: TEXTS,
}


def is_map(field):
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def single(field):
    if field.message_type is None:
        return NUMBERS[field.type]
    return messages(field.message_type)


def values(field):
    if is_map(field):
        return st.dictionaries(TEXTS, TEXTS, max_size=4)
    return st.lists(single(field), max_size=3) if field.is_repeated else single(field)


def messages(descriptor):
    """Every message that the protocol can carry, with values that hurt."""
    optional = {field.name: values(field) for field in descriptor.fields}
    cls = descriptor._concrete_class
    return st.fixed_dictionaries({}, optional=optional).map(lambda fields: cls(**fields))


EXPECTED = (InvalidArgument, OutOfRange, NotFound, OperationPending)
MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def check_outcome(parse, message):
    """Parse, and check that what comes out is sound or the refusal says something."""
    refusal = ""
    try:
        sound(parse(message))
    except EXPECTED as error:
        refusal = str(error) or "nothing"
    assert refusal.isprintable()
    assert refusal != "nothing"


def sound(value):
    if dataclasses.is_dataclass(value):
        assert dataclasses.fields(value)
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if field.name in ("staging_path", "target_path") and item:
                sound_path(item)
            sound(item)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, None)
    elif isinstance(value, tuple | list):
        for item in value:
            sound(item)
    elif isinstance(value, dict):
        assert all(isinstance(part, str) for pair in value.items() for part in pair)
    else:
        assert value is None or isinstance(value, str | int | bool)
        assert not type(value).__module__.startswith("google")
    if isinstance(value, CapacityRange):
        assert value.required_bytes >= 0
        assert not value.limit_bytes or value.required_bytes <= value.limit_bytes
    if isinstance(value, Page):
        assert value.max_entries >= 0


def sound_path(path):
    assert path.startswith("/")
    assert path != "/"
    assert not path.endswith("/")
    components = path[1:].split("/")
    assert not {"", ".", ".."} & set(components)
    assert max(len(component.encode()) for component in components) <= 255
    assert not set(path) & {"\0", "\n"}


@PARSERS
@given(data=st.data())
@MANY
def test_whatever_comes_is_parsed_or_refused_with_a_reason(parse, data):
    check_outcome(parse, data.draw(messages(GOOD[parse].DESCRIPTOR)))


@PARSERS
@given(data=st.data())
@MANY
def test_one_bad_field_in_a_good_request_is_parsed_or_refused_with_a_reason(parse, data):
    field = data.draw(st.sampled_from(list(GOOD[parse].DESCRIPTOR.fields)))
    check_outcome(parse, good(parse, **{field.name: data.draw(values(field))}))


@PARSERS
def test_a_good_request_is_parsed(parse):
    sound(parse(GOOD[parse]))


@pytest.mark.parametrize(
    "parse",
    [parse for parse in GOOD if "secrets" in GOOD[parse].DESCRIPTOR.fields_by_name],
    ids=lambda parse: parse.__name__,
)
@pytest.mark.parametrize("secrets", [{"password": "x" * 100_000}, {"": "\0"}])
def test_secrets_change_nothing(parse, secrets):
    assert parse(good(parse, secrets=secrets)) == parse(GOOD[parse])


# --- required ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parse", "field"),
    [
        (requests.parse_create_volume, "name"),
        (requests.parse_create_volume, "volume_capabilities"),
        (requests.parse_expand, "volume_id"),
        (requests.parse_expand, "capacity_range"),
        (requests.parse_modify, "volume_id"),
        (requests.parse_modify, "mutable_parameters"),
        (requests.parse_validate, "volume_id"),
        (requests.parse_validate, "volume_capabilities"),
        (requests.parse_controller_publish, "volume_id"),
        (requests.parse_controller_publish, "node_id"),
        (requests.parse_controller_publish, "volume_capability"),
        (requests.parse_controller_unpublish, "volume_id"),
        (requests.parse_create_snapshot, "name"),
        (requests.parse_create_snapshot, "source_volume_id"),
        (requests.parse_create_group, "name"),
        (requests.parse_create_group, "source_volume_ids"),
        (requests.parse_group, "group_snapshot_id"),
        (requests.parse_stage, "volume_id"),
        (requests.parse_stage, "staging_target_path"),
        (requests.parse_stage, "volume_capability"),
        (requests.parse_publish, "volume_id"),
        (requests.parse_publish, "target_path"),
        (requests.parse_publish, "volume_capability"),
        (requests.parse_stats, "volume_id"),
        (requests.parse_stats, "volume_path"),
        (requests.parse_node_health, "volume_id"),
        (requests.parse_node_expand, "volume_id"),
        (requests.parse_node_expand, "volume_path"),
    ],
)
def test_a_required_field_that_is_missing_is_named(parse, field):
    assert refused(parse, **{field: None}).startswith(f"{field} is missing")


@PARSERS
def test_a_field_that_is_not_required_may_be_missing(parse):
    for field in GOOD[parse].DESCRIPTOR.fields:
        refusal = ""
        try:
            parse(good(parse, **{field.name: None}))
        except InvalidArgument as error:
            refusal = str(error)
        assert refusal == "" or refusal.startswith(f"{field.name} is missing")


# --- names, ids, tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["pvc-1", "x" * 128, "é" * 64, "..", "a/b", "-rf", "tab\tline\ncr\r", "🦄 übung", "\u202e", " "]
)
def test_every_name_that_the_spec_allows_is_taken_as_it_is(name):
    assert parse_name(name, "name") == name


@pytest.mark.parametrize("code", [*range(9), 0x0B, 0x0C, *range(0x0E, 0x20), *range(0x7F, 0xA0)])
def test_a_name_with_a_banned_character_is_refused(code):
    with pytest.raises(InvalidArgument, match=r"^name is .*control characters"):
        parse_name(f"a{chr(code)}b", "name")


@pytest.mark.parametrize("parse", [parse_name, parse_handle])
@pytest.mark.parametrize("text", ["x" * 129, "é" * 65, "🦄" * 33])
def test_a_string_has_at_most_128_bytes(parse, text):
    with pytest.raises(InvalidArgument, match=r"^volume has?|^volume is .* bytes, at most 128"):
        parse(text, "volume")
    assert parse(text[:-1], "volume")


def test_a_node_id_may_have_256_bytes():
    assert parse_node_id("n" * 256, "node_id")
    with pytest.raises(InvalidArgument, match="at most 256"):
        parse_node_id("n" * 257, "node_id")


def test_a_token_that_is_too_long_to_be_ours_is_aborted_and_a_negative_page_is_refused():
    assert parse_page(0, "t" * 128) == Page(0, "t" * 128)
    with pytest.raises(OperationPending, match="starting_token"):
        parse_page(0, "[" * 200_000)
    with pytest.raises(InvalidArgument, match=r"^max_entries is '-1'"):
        parse_page(-1, "")


def test_a_source_that_is_there_twice_is_refused():
    assert "source_volume_ids is 'v'" in refused(requests.parse_create_group, source_volume_ids=["v", "w", "v"])


def test_the_members_of_a_group_may_be_left_out():
    assert requests.parse_group(good(requests.parse_group, snapshot_ids=None)) == ("g", ())


# --- paths ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "parsed"),
    [
        ("/a", "/a"),
        ("//a///b/./c/", "/a/b/c"),
        (
            "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/pvc/mount",
            "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/pvc/mount",
        ),
        ("/with space/ünïcode/..x/x..", "/with space/ünïcode/..x/x.."),
        ("/" + "x" * 255, "/" + "x" * 255),
        ("/xxxxxxx" * 511, "/xxxxxxx" * 511),
    ],
)
def test_a_path_is_normalised(path, parsed):
    assert parse_path(path, "target_path") == parsed


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("a/b", "absolute"),
        ("./a", "absolute"),
        ("/", "root"),
        ("/./", "root"),
        ("/a/../b", "without `..`"),
        ("/..", "without `..`"),
        ("/a\0b", "control characters"),
        ("/a\nb", "control characters"),
        ("/a\x85b", "control characters"),
        ("/" + "x" * 256, "255 between two slashes"),
        ("/" + "é" * 128, "255 between two slashes"),
        ("/xxxxxxx" * 512, "4095 bytes"),
    ],
)
def test_a_path_that_no_kubelet_sends_is_refused(path, allowed):
    with pytest.raises(InvalidArgument, match=r"^target_path is ") as raised:
        parse_path(path, "target_path")
    assert allowed in str(raised.value)


@pytest.mark.parametrize("parse", [requests.parse_stats, requests.parse_node_expand])
def test_no_volume_is_found_at_a_relative_path(parse):
    assert "some/path" in refused(parse, NotFound, volume_path="some/path")


@pytest.mark.parametrize(
    ("parse", "field"),
    [
        (requests.parse_publish, "staging_target_path"),
        (requests.parse_publish, "target_path"),
        (requests.parse_stage, "staging_target_path"),
        (requests.parse_stats, "staging_target_path"),
        (requests.parse_node_health, "volume_publish_path"),
        (requests.parse_node_health, "staging_target_path"),
        (requests.parse_node_expand, "staging_target_path"),
    ],
)
def test_every_path_is_checked(parse, field):
    assert refused(parse, **{field: "/a/../b"}).startswith(f"{field} is '/a/../b'")


# --- capacity ---------------------------------------------------------------------------------------------------------------------

WITH_CAPACITY = pytest.mark.parametrize(
    "parse", [requests.parse_create_volume, requests.parse_expand, requests.parse_node_expand], ids=lambda parse: parse.__name__
)


@WITH_CAPACITY
def test_a_capacity_range_is_read_in_bytes(parse):
    parsed = parse(good(parse, capacity_range=csi.CapacityRange(required_bytes=1, limit_bytes=2**63 - 1)))
    assert CapacityRange(1, 2**63 - 1) in (parsed if isinstance(parsed, tuple) else (parsed.capacity,))


@WITH_CAPACITY
def test_a_negative_size_is_refused_by_its_name(parse):
    assert "capacity_range.limit_bytes is '-1'" in refused(parse, capacity_range=csi.CapacityRange(limit_bytes=-1))
    assert "capacity_range.required_bytes is '-5'" in refused(parse, capacity_range=csi.CapacityRange(required_bytes=-5))


@WITH_CAPACITY
def test_a_range_that_no_size_is_in_is_out_of_range(parse):
    assert "capacity_range" in refused(parse, OutOfRange, capacity_range=csi.CapacityRange(required_bytes=2, limit_bytes=1))


@WITH_CAPACITY
def test_an_empty_range_is_refused(parse):
    assert "capacity_range is empty" in refused(parse, capacity_range=csi.CapacityRange())


# --- capabilities -----------------------------------------------------------------------------------------------------------------


def capability(mode="SINGLE_NODE_WRITER", **mount):
    return csi.VolumeCapability(mount=csi.VolumeCapability.MountVolume(**mount), access_mode=Mode(mode=mode))


def parse_one(value):
    _, _, parsed, _ = requests.parse_controller_publish(good(requests.parse_controller_publish, volume_capability=value))
    return parsed


@pytest.mark.parametrize("mode", sorted(set(Mode.Mode.keys()) - {"UNKNOWN"}))
def test_every_access_mode_of_csi_is_known(mode):
    assert parse_one(capability(mode)) == Capability(AccessType.MOUNT, AccessMode[mode])
    block = csi.VolumeCapability(block=csi.VolumeCapability.BlockVolume(), access_mode=Mode(mode=mode))
    assert parse_one(block) == Capability(AccessType.BLOCK, AccessMode[mode])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (csi.VolumeCapability(mount=csi.VolumeCapability.MountVolume()), "volume_capability.access_mode is missing"),
        (capability(0), "volume_capability.access_mode is missing"),
        (capability(99), "volume_capability.access_mode.mode is '99': one of SINGLE_NODE_WRITER"),
        (capability(-1), "volume_capability.access_mode.mode is '-1'"),
        (csi.VolumeCapability(access_mode=Mode(mode=1)), "volume_capability.access_type is missing"),
        (capability(fs_type="ext4 -o x"), "volume_capability.mount.fs_type is 'ext4 -o x'"),
        (capability(fs_type="-t"), "volume_capability.mount.fs_type is '-t'"),
        (capability(fs_type="x" * 65), "volume_capability.mount.fs_type is"),
        (capability(mount_flags=["nosuid", "no suid"]), "volume_capability.mount.mount_flags[1] is 'no suid'"),
        (capability(mount_flags=["ro", "-rw"]), "volume_capability.mount.mount_flags[1] is '-rw'"),
        (capability(mount_flags=["ro,exec"]), "volume_capability.mount.mount_flags[0] is 'ro,exec'"),
        (capability(mount_flags=["ro"] * 3000), "volume_capability.mount.mount_flags holds 6000 bytes"),
        (capability(volume_mount_group="staff"), "volume_capability.mount.volume_mount_group is 'staff'"),
    ],
)
def test_a_capability_that_cannot_be_meant_is_refused_with_its_place(value, words):
    assert refused(requests.parse_controller_publish, volume_capability=value).startswith(words)


def test_what_kubernetes_sends_is_a_capability():
    parsed = parse_one(capability("MULTI_NODE_MULTI_WRITER", fs_type="ext4", mount_flags=["noatime", "nodev", "nodev"]))
    assert parsed == Capability(
        AccessType.MOUNT, AccessMode.MULTI_NODE_MULTI_WRITER, fs_type="ext4", mount_flags=("noatime", "nodev", "nodev")
    )


def test_the_value_of_a_mount_flag_is_not_repeated():
    message = refused(requests.parse_controller_publish, volume_capability=capability(mount_flags=["password=hunter2,x"]))
    assert "mount_flags[0] is 'password=…'" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "parse",
    [requests.parse_create_volume, requests.parse_validate, requests.parse_get_capacity],
    ids=lambda parse: parse.__name__,
)
def test_each_of_several_capabilities_is_checked(parse):
    assert "volume_capabilities[1].access_mode" in refused(parse, volume_capabilities=[MOUNT, capability(0)])


@pytest.mark.parametrize(
    "parse",
    [requests.parse_expand, requests.parse_stage, requests.parse_publish, requests.parse_node_expand],
    ids=lambda parse: parse.__name__,
)
def test_the_capability_is_checked_wherever_one_is_given(parse):
    assert "volume_capability.access_mode" in refused(parse, volume_capability=capability(0))


def test_readonly_and_the_node_reach_the_domain():
    handle, publication, _, context = requests.parse_controller_publish(GOOD[requests.parse_controller_publish])
    assert (handle, context) == ("v", {"pool": "fast"})
    assert publication == NodePublication("node-1", AccessMode.SINGLE_NODE_WRITER, readonly=True)
    assert requests.parse_publish(GOOD[requests.parse_publish]).readonly is True


# --- maps, parameters, sources, topology ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parse", "field"),
    [
        (requests.parse_create_volume, "parameters"),
        (requests.parse_create_volume, "mutable_parameters"),
        (requests.parse_modify, "mutable_parameters"),
        (requests.parse_validate, "volume_context"),
        (requests.parse_validate, "parameters"),
        (requests.parse_controller_publish, "volume_context"),
        (requests.parse_get_capacity, "parameters"),
        (requests.parse_create_snapshot, "parameters"),
        (requests.parse_create_group, "parameters"),
        (requests.parse_stage, "publish_context"),
        (requests.parse_stage, "volume_context"),
        (requests.parse_publish, "publish_context"),
        (requests.parse_publish, "volume_context"),
    ],
)
def test_a_map_has_at_most_4_kib(parse, field):
    message = refused(parse, **{field: {"csi.storage.k8s.io/x": "y" * MAX_MAP_BYTES}})
    assert message.startswith(f"{field} holds {MAX_MAP_BYTES + 20} bytes")


def test_a_snapshot_class_with_digests_asks_for_them():
    assert requests.parse_create_snapshot(good(requests.parse_create_snapshot, parameters={"digests": "true"})).digests
    assert not requests.parse_create_snapshot(good(requests.parse_create_snapshot)).digests
    assert requests.parse_create_volume(good(requests.parse_create_volume, parameters={"verify": "true"})).parameters.verify


def test_a_map_of_exactly_4_kib_is_taken_and_the_kubelets_tokens_do_not_count():
    context = {"k": "v" * (MAX_MAP_BYTES - 1), SERVICE_ACCOUNT_TOKENS: "t" * 8000}
    assert requests.parse_stage(good(requests.parse_stage, volume_context=context)).volume_context == context


@pytest.mark.parametrize(
    ("parse", "field", "unknown"),
    [
        (requests.parse_create_volume, "parameters", {"poool": "fast"}),
        (requests.parse_create_volume, "mutable_parameters", {"XXX_FakeKey": "x"}),
        (requests.parse_modify, "mutable_parameters", {"pool": "fast"}),
        (requests.parse_validate, "parameters", {"poool": "fast"}),
        (requests.parse_get_capacity, "parameters", {"poool": "fast"}),
        (requests.parse_create_snapshot, "parameters", {"pool": "fast"}),
        (requests.parse_create_group, "parameters", {"pool": "fast"}),
    ],
)
def test_an_unknown_parameter_is_refused_by_name(parse, field, unknown):
    message = refused(parse, **{field: unknown})
    assert message.startswith(field)
    assert next(iter(unknown)) in message


def test_the_class_and_the_attributes_class_reach_the_domain():
    parsed = requests.parse_create_volume(GOOD[requests.parse_create_volume])
    assert parsed.parameters.pool == "fast"
    assert parsed.parameters.on_delete is OnDelete.RETAIN
    assert requests.parse_modify(GOOD[requests.parse_modify]) == ("v", OnDelete.ARCHIVE)


def test_capacity_is_asked_of_a_class_whose_directory_needs_a_claim():
    parameters, _, topology = requests.parse_get_capacity(GOOD[requests.parse_get_capacity])
    assert (parameters.pool, parameters.directory) == ("fast", None)
    assert topology == {"topology.hostpath.csi.tatami.dev/node": "node-1"}
    assert "${pvc.nmae}" in refused(requests.parse_get_capacity, parameters={"directory": "${pvc.nmae}"})


def test_capacity_may_be_asked_without_anything_and_with_an_empty_topology():
    for request in (csi.GetCapacityRequest(), csi.GetCapacityRequest(accessible_topology=csi.Topology())):
        parameters, capabilities, topology = requests.parse_get_capacity(request)
        assert (parameters.pool, capabilities, topology) == (None, (), None)


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        (None, None),
        ({"snapshot": {"snapshot_id": "s"}}, ContentSource(SourceKind.SNAPSHOT, "s")),
        ({"volume": {"volume_id": "w"}}, ContentSource(SourceKind.VOLUME, "w")),
    ],
)
def test_the_content_source_reaches_the_domain(source, parsed):
    message = source and csi.VolumeContentSource(**source)
    request = good(requests.parse_create_volume, volume_content_source=message)
    assert requests.parse_create_volume(request).source == parsed


def test_a_source_that_names_nothing_is_refused():
    parse = requests.parse_create_volume
    request = good(parse)
    request.volume_content_source.Clear()
    request.volume_content_source.SetInParent()
    with pytest.raises(InvalidArgument, match=r"^volume_content_source is empty"):
        parse(request)
    request.volume_content_source.volume.SetInParent()
    with pytest.raises(InvalidArgument, match=r"^volume_content_source.volume.volume_id is missing"):
        parse(request)


@pytest.mark.parametrize("parse", [requests.parse_create_volume, requests.parse_create_snapshot])
@pytest.mark.parametrize(
    ("segments", "words"),
    [
        ({"": "a"}, ".segments is ''"),
        ({"a b": "a"}, ".segments is 'a b'"),
        ({"UPPER/zone": "a"}, ".segments is 'UPPER/zone'"),
        ({"zone": ""}, ".segments[\"zone\"] is ''"),
        ({"zone": "-a"}, ".segments[\"zone\"] is '-a'"),
        ({"zone": "x" * 64}, '.segments["zone"]'),
    ],
)
@pytest.mark.parametrize("where", ["requisite", "preferred"])
def test_a_malformed_topology_is_refused_with_its_place(parse, segments, words, where):
    requirement = csi.TopologyRequirement(**{where: [TOPOLOGY, csi.Topology(segments=segments)]})
    assert f"accessibility_requirements.{where}[1]{words}" in refused(parse, accessibility_requirements=requirement)


def test_only_what_is_requisite_binds():
    parse = requests.parse_create_volume
    assert parse(GOOD[parse]).requisite == ({"topology.hostpath.csi.tatami.dev/node": "node-1"},)
    preferred = good(parse, accessibility_requirements=csi.TopologyRequirement(preferred=[TOPOLOGY]))
    assert parse(preferred).requisite == ()
    request = good(parse)
    request.accessibility_requirements.Clear()
    request.accessibility_requirements.SetInParent()
    with pytest.raises(InvalidArgument, match=r"^accessibility_requirements is empty"):
        parse(request)


def test_every_message_of_a_served_method_that_carries_anything_is_in_the_table():
    from tests.rpc.harness import served_methods

    by_hand = {  # a handle and a path, or a page, parsed in the servicer's own line
        *("DeleteVolume", "ControllerGetVolume", "DeleteSnapshot", "GetSnapshot", "ControllerGetVolumeHealth"),
        *(
            "ControllerListVolumeHealth",
            "NodeUnstageVolume",
            "NodeUnpublishVolume",
            "NodeGetStorageHealth",
            "GetVolumeGroupSnapshot",
        ),
    }
    known = {type(message) for message in GOOD.values()}
    for method in served_methods():
        if method.input_type.fields and method.name not in by_hand:
            assert message_class(method.input_type) in known, method.name
