"""Requests as an attacker, a broken sidecar or a typo would send them, built from the protocol's own descriptors.

Every field of every message is covered because nothing here names the messages: a field's name and type choose what is put into it.
"""

import base64
import json
from dataclasses import dataclass

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

from csi_driver.rpc import csi_pb2 as csi
from csi_driver.volumes.handles import derive_id, node_tag
from tests.storm.client import METHODS, capability, create_volume

MIB = 1024**2
SECRET = "hunter2-never-in-a-log"
FORGED = "2026-01-01T00:00:00.000Z INFO    forged: a line that nobody logged"

HOSTILE = (
    "", " ", ".", "..", "/", "-", "--help", "-rf", "../../../../etc/passwd", "..%2f..%2fetc", "a/../../b", "/etc", ".csi", ".csi/volumes",
    "a\0b", "\0", "a\nb", f"x\n{FORGED}", "\r\n\r\n", "\x1b[31mred", "\x7f", "\u2028", "\u202egnp.exe", "é" * 64, "💥", "\ufeff", "\ufffe",
    "$(touch /tmp/owned)", "`id`", "${pv.name}", "${", "${}", "${pvc.name}/../..", "%s%n", "{}", "*", "a,b", "a b", '"', "'", "\\", ";",
    "ro,suid", "x" * 128, "x" * 129, "x" * 255, "x" * 256, "x" * 4096, "/" + "a/" * 3000, "y" * (1 * MIB), "z" * (10 * MIB),
    "null", "true", "0", "-1", "1e9", "0x10", "٣", "1Gi", "9999999999999999999", "NaN",
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 100, 1023, MIB, 2**31 - 1, -(2**31), 2**32, 2**53, 2**63 - 1, -(2**63), 10**15)
KEYS = (
    "pool", "directory", "onDelete", "uid", "gid", "mode", "size", "layout", "epoch", "limiter", "ondelete", "Pool",
    "csi.storage.k8s.io/pvc/name", "csi.storage.k8s.io/pvc/namespace", "csi.storage.k8s.io/pv/name", "csi.storage.k8s.io/ephemeral",
    "csi.storage.k8s.io/serviceAccount.tokens", "csi.storage.k8s.io/fstype", "topology.hostpath.csi.tatami.dev/node",
)  # fmt: skip
VALUES = (
    "default", "other", "nopool", "delete", "retain", "archive", "0", "1000", "4294967295", "4294967294", "0755", "7777", "1777", "755", "1Mi", "0Gi",
    "static", "static/inner", "tenants/${pvc.name}", "${pvc.namespace}-${pvc.name}", "archived/x", "lost+found", "link", "directory", "true", "node-1",
)  # fmt: skip
MOUNT_FLAGS = (
    "ro",
    "rw",
    "nosuid",
    "nodev",
    "noexec",
    "noatime",
    "suid",
    "bind",
    "remount",
    "move",
    "loop",
    "x=y",
    f"password={SECRET}",
    "uid=0",
)


@dataclass(frozen=True, repr=False)
class World:
    """What exists while the requests come: handles and paths that are right for something, if not for this."""

    handles: tuple[str, ...]
    paths: tuple[str, ...]
    names: tuple[str, ...]
    staging: str
    target: str


@dataclass(frozen=True)
class Request:
    method: str
    message: Message | bytes

    def __repr__(self) -> str:
        shown = repr(self.message)
        return f"{self.method}: {shown if len(shown) < 3000 else f'{shown[:1500]} … {shown[-500:]} ({len(shown)} characters)'}"


def requests(method: str, world: World) -> st.SearchStrategy[Request]:
    """Requests for a method: right ones with some fields spoiled, and others in which everything is arbitrary."""
    message_class = METHODS[method][1]
    spoiled = _spoiled(st.sampled_from(right_requests(method, world)), world)
    return st.one_of(*[spoiled] * 4, _messages(message_class, world, 2)).map(lambda message: Request(method, message))


def raw_requests(method: str, world: World) -> st.SearchStrategy[Request]:
    """Bytes that are no message, or a message whose bytes were damaged."""
    return st.one_of(st.binary(max_size=400), _damaged(right_requests(method, world))).map(lambda data: Request(method, data))


@st.composite
def _damaged(draw, messages: list[Message]) -> bytes:
    data = bytearray(draw(st.sampled_from(messages)).SerializeToString())
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 2)):
            case 0:
                data[position : position + 1] = bytes([draw(st.integers(0, 255))])
            case 1:
                del data[position:]
            case _:
                data[position:position] = draw(
                    st.sampled_from((b"\xff\xfe", b"\xff" * 11, b"\x00", b"\x0b\x0c", b"\xed\xa0\x80"))
                )
    return bytes(data)


@st.composite
def _spoiled(draw, originals: st.SearchStrategy[Message], world: World) -> Message:
    original = draw(originals)
    message = type(original)()
    message.CopyFrom(original)
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return message
    how_many = draw(st.sampled_from((0, 1, 1, 1, 1, 2, 2, 3)))
    for field in draw(st.lists(st.sampled_from(fields), min_size=0, max_size=how_many, unique_by=lambda each: each.name)):
        if field.message_type and not field.is_repeated and message.HasField(field.name) and draw(st.integers(0, 3)):
            getattr(message, field.name).CopyFrom(draw(_spoiled(st.just(getattr(message, field.name)), world)))
            continue
        message.ClearField(field.name)
        if draw(st.integers(0, 4)):
            _put(draw, message, field, world, 2)
    return message


@st.composite
def _messages(draw, message_class: type[Message], world: World, depth: int) -> Message:
    message = message_class()
    for field in message.DESCRIPTOR.fields:
        # A message may be empty, and the deeper the likelier.
        if draw(st.integers(0, 3)) > 2 - depth:
            _put(draw, message, field, world, depth)
    return message


def _put(draw, message: Message, field: FieldDescriptor, world: World, depth: int) -> None:
    if field.message_type and field.message_type.GetOptions().map_entry:
        items = st.dictionaries(
            st.one_of(st.sampled_from(KEYS), _texts()), st.one_of(st.sampled_from(VALUES), _texts()), max_size=5
        )
        getattr(message, field.name).update(draw(items))
        if "secret" in field.name:
            getattr(message, field.name)["password"] = SECRET
    elif field.message_type:
        inner = _messages(GetMessageClass(field.message_type), world, depth - 1)
        if field.is_repeated:
            getattr(message, field.name).extend(draw(st.lists(inner, max_size=3)))
        else:
            getattr(message, field.name).CopyFrom(draw(inner))
    elif field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(_scalars(field, world), max_size=4)))
    else:
        setattr(message, field.name, draw(_scalars(field, world)))


def _scalars(field: FieldDescriptor, world: World) -> st.SearchStrategy:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return st.booleans()
        case FieldDescriptor.CPPTYPE_ENUM:
            return st.one_of(
                st.sampled_from([value.number for value in field.enum_type.values]), st.integers(-(2**31), 2**31 - 1)
            )
        case FieldDescriptor.CPPTYPE_INT32:
            return st.one_of(
                st.sampled_from([number for number in NUMBERS if -(2**31) <= number < 2**31]), st.integers(-(2**31), 2**31 - 1)
            )
        case FieldDescriptor.CPPTYPE_INT64:
            return st.one_of(st.sampled_from(NUMBERS), st.integers(-(2**63), 2**63 - 1))
        case FieldDescriptor.CPPTYPE_STRING:
            return _strings(field.name, world)
    raise AssertionError(f"no values for {field.full_name}: add its type")


def _strings(name: str, world: World) -> st.SearchStrategy[str]:
    if name == "node_id":
        fitting: tuple[str, ...] = ("node-1", "node-2", "node-1@192.0.2.1", "NODE-1")
    elif name.endswith("token"):
        fitting = TOKENS
    elif name.endswith("path"):
        fitting = world.paths
    elif name.endswith(("_id", "_ids")):
        fitting = world.handles
    elif name == "mount_flags":
        fitting = MOUNT_FLAGS
    elif name == "fs_type":
        fitting = ("ext4", "xfs", "nfs", "none")
    else:
        fitting = world.names
    return st.one_of(*[st.sampled_from(fitting)] * 4, _texts())


def _texts() -> st.SearchStrategy[str]:
    return st.one_of(st.sampled_from(HOSTILE), st.text(max_size=40))


def _token(body: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(body).encode()).decode()


_ID = derive_id("volume", "hostpath.csi.tatami.dev", node_tag("node-1"), "nobody")
TOKENS = (
    _token([1, "default", _ID]), _token([2, "default", _ID]), _token([1, "default", "../x"]), _token([1, 2, 3]), _token({}), _token(None), _token([]),
    _token([1, "default", _ID, 4]), _token([[1], "default", _ID]), _token("x"), "1", "AAAA", "====", "[1]", _token([1, "z" * 60, _ID]),
)  # fmt: skip


def foreign_handles(own: str) -> tuple[str, ...]:
    """Handles that look like ours and are another node's, another pool's, or nobody's."""
    pool, tag, record_id = own.split(".")
    return (
        f"{pool}.{node_tag('node-2')}.{record_id}",
        f"nopool.{tag}.{record_id}",
        f"{pool}.{record_id}",
        f"{pool}.{tag}.{_ID}",
        f"{pool}.{tag}.{record_id.upper()}",
        f"{pool}.{tag}.{record_id}\n",
        f"{pool}.{tag}.../{record_id}",
        f"{pool}/{tag}/{record_id}",
        "../default",
        "static-handle",
    )


def right_requests(method: str, world: World) -> list[Message]:
    """Requests that are fully right, or nearly: the soil in which a single spoiled field is not hidden by another mistake."""
    message_class = METHODS[method][1]
    volume, other, snapshot, group = world.handles[:4]
    cap = capability()
    size = csi.CapacityRange(required_bytes=MIB)
    inline = {"csi.storage.k8s.io/ephemeral": "true", "size": "1Mi"}
    static = {"pool": "default", "directory": "static"}
    node = {"volume_id": volume, "staging_target_path": world.staging, "volume_capability": cap}
    found: dict[str, list[dict]] = {
        "CreateVolume": [],
        "DeleteVolume": [{"volume_id": other}],
        "ControllerExpandVolume": [{"volume_id": volume, "capacity_range": size}],
        "ControllerModifyVolume": [{"volume_id": volume, "mutable_parameters": {"onDelete": "delete"}}],
        "ControllerPublishVolume": [{"volume_id": volume, "node_id": "node-1", "volume_capability": cap}],
        "ControllerUnpublishVolume": [{"volume_id": volume, "node_id": "node-1"}],
        "ControllerGetVolume": [{"volume_id": volume}],
        "ControllerGetVolumeHealth": [{"volume_id": volume}],
        "ValidateVolumeCapabilities": [{"volume_id": volume, "volume_capabilities": [cap]}],
        "CreateSnapshot": [{"name": "hostile", "source_volume_id": volume}],
        "DeleteSnapshot": [{"snapshot_id": snapshot}],
        "GetSnapshot": [{"snapshot_id": snapshot}],
        "CreateVolumeGroupSnapshot": [{"name": "hostile", "source_volume_ids": [volume, other]}],
        "GetVolumeGroupSnapshot": [{"group_snapshot_id": group}],
        "DeleteVolumeGroupSnapshot": [{"group_snapshot_id": group}],
        "NodeStageVolume": [node, {**node, "volume_id": "static-handle", "volume_context": static}],
        "NodeUnstageVolume": [{"volume_id": volume, "staging_target_path": world.staging}],
        "NodePublishVolume": [
            {**node, "target_path": world.target},
            {"volume_id": "csi-inline", "target_path": world.target, "volume_capability": cap, "volume_context": inline},
        ],
        "NodeUnpublishVolume": [{"volume_id": volume, "target_path": world.target}],
        "NodeGetVolumeStats": [{"volume_id": volume, "volume_path": world.staging}],
        "NodeGetVolumeHealth": [{"volume_id": volume, "staging_target_path": world.staging}],
        "NodeExpandVolume": [{"volume_id": volume, "volume_path": world.staging, "capacity_range": size}],
    }
    made = [message_class(**fields) for fields in found.get(method, [{}])]
    if method == "CreateVolume":
        made = [create_volume("hostile"), create_volume("hostile", snapshot=snapshot), create_volume("hostile", volume=volume)]
        made.append(
            create_volume("hostile", pool="other", onDelete="delete", uid="1", gid="2", mode="0770", directory="tenants/x")
        )
    return made
