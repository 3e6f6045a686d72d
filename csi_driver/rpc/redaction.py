"""What of a request may be seen in a log: all but its secrets.

Which fields are secret the protocol itself says, by its option `csi_secret`, so a field of a later CSI version is covered the day
the messages are generated. Two more hold secrets without being marked: mount flags (CSI spec, MountVolume: "MAY contain sensitive
information"), of which what follows a `=` is left out, and the tokens that the kubelet puts into volume_context (tokenRequests).
"""

import functools
from collections.abc import Mapping

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from csi_driver.rpc import csi_pb2

STRIPPED = "***stripped***"
SERVICE_ACCOUNT_TOKENS = "csi.storage.k8s.io/serviceAccount.tokens"


def loggable(message: Message) -> dict[str, object]:
    """Return what is set in `message` as plain values, with the secrets stripped. Keys are the protocol's field names."""
    return {field.name: _value(field, value) for field, value in message.ListFields()}


def _value(field: FieldDescriptor, value: object) -> object:
    if _is_secret(field):
        return STRIPPED
    if isinstance(value, Mapping):
        return {key: _map_value(key, item) for key, item in value.items()}
    if field.is_repeated:
        return [_single(field, item) for item in value]  # type: ignore[attr-defined]  # a repeated container
    return _single(field, value)


def _map_value(key: object, value: object) -> object:
    if isinstance(value, Message):
        return loggable(value)
    return STRIPPED if isinstance(key, str) and key.lower() == SERVICE_ACCOUNT_TOKENS.lower() else value


def _single(field: FieldDescriptor, value: object) -> object:
    if isinstance(value, Message):
        return loggable(value)
    if field.name == "mount_flags" and isinstance(value, str) and "=" in value:
        return f"{value.partition('=')[0]}={STRIPPED}"
    if field.enum_type is not None and isinstance(value, int) and value in field.enum_type.values_by_number:
        return field.enum_type.values_by_number[value].name
    return value


@functools.cache
def _is_secret(field: FieldDescriptor) -> bool:
    return bool(field.GetOptions().Extensions[csi_pb2.csi_secret])
