"""Placement: which directory a volume handle stands for on a node, and whether it may be mounted.

Three kinds of handles reach a node: ours, whose record says everything; static ones, for which an admin names an existing directory;
and inline ones (`inline.py`). No path ever comes from anywhere else.

Of a pool behind a server a node sees no records and no directories but those that it is to mount. There the controller has looked,
and what it found comes with the call (publish_context), to be parsed once more as if it came from a stranger.
"""

import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

from csi_driver.errors import FailedPrecondition, InvalidArgument, NotFound, quoted
from csi_driver.linux import image_filesystems
from csi_driver.volumes import access
from csi_driver.volumes.model import A_DIRECTORY, AccessType, Form, Layout, Phase, VolumeRecord
from csi_driver.volumes.parameters import check_directory, parse_static_parameters
from csi_driver.volumes.pool_store import PoolStore
from csi_driver.volumes.pools import Pools
from csi_driver.volumes.requests import Capability
from csi_driver.volumes.trash import volumes_being_deleted

_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)
_ELSEWHERE = frozenset({errno.ELOOP, errno.EXDEV, errno.ENOTDIR})
"""What open_beneath says where a symlink leads elsewhere, or a mount is another filesystem."""


@dataclass(frozen=True)
class Placement:
    """Where a volume lies. `capacity_bytes` None: nobody ever said how large it is."""

    store: PoolStore
    directory: str
    static: bool
    capacity_bytes: int | None
    form: Form = A_DIRECTORY
    epoch: int = 0


class Placements:
    """Finds the directories that node calls are about."""

    def __init__(self, pools: Pools, node_id: str) -> None:
        self._pools = pools
        self._node_id = node_id

    def find(
        self, handle: str, capability: Capability, publish_context: Mapping[str, str], volume_context: Mapping[str, str]
    ) -> Placement:
        """Find a volume's directory and check that it may be used here, and so.

        Raises NotFound, InvalidArgument, FailedPrecondition.
        """
        located = self._pools.locate(handle)
        store = static_store(self._pools, handle, volume_context) if located is None else located[0]
        if store.backend.remote:
            placement = _told(store, handle, publish_context, static=located is None)
        elif located is None:
            placement = Placement(store, find_static(store, volume_context), static=True, capacity_bytes=None)
        else:
            placement = self._recorded(handle, *located, publish_context)
        if problem := access.unsupported(capability, placement.store.backend, placement.form):
            raise InvalidArgument(problem)
        return placement

    def _recorded(self, handle: str, store: PoolStore, record_id: str, publish_context: Mapping[str, str]) -> Placement:
        record = store.volumes.get(record_id)
        if record is None or record.phase is not Phase.READY:
            raise NotFound(f"volume {quoted(handle)} does not exist")
        if publish_context:
            _check_publish_context(record, publish_context)
            if not any(publication.node_id == self._node_id for publication in record.published):
                raise FailedPrecondition(f"volume {quoted(handle)} is not published to this node ({self._node_id})")
        epoch = int(publish_context["epoch"]) if publish_context else 0
        return Placement(store, record.directory, False, record.capacity_bytes, record.form, epoch)


def static_store(pools: Pools, handle: str, volume_context: Mapping[str, str]) -> PoolStore:
    """Find the pool that a static volume's context names. Raises NotFound where there is no context, InvalidArgument."""
    if not volume_context:
        raise NotFound(
            f"volume {quoted(handle)} does not exist: it is no handle of this driver, and no volume_context says where it lies"
        )
    static = parse_static_parameters(volume_context)
    store = pools.find(static.pool)
    if store is None:
        raise InvalidArgument.field('volume_context["pool"]', static.pool, f"no such pool; allowed are {pools.names()}")
    return store


def find_static(store: PoolStore, volume_context: Mapping[str, str]) -> str:
    """Find the directory of a static volume in its pool, which must be nobody else's.

    Raises NotFound, InvalidArgument for one that overlaps a volume of ours or is reached through a symlink or a mount.
    """
    directory = parse_static_parameters(volume_context).directory
    for record in chain(store.volumes.readable(), volumes_being_deleted(store)):
        if _overlap(record.directory, directory):
            raise InvalidArgument.field(
                'volume_context["directory"]', directory, f"it overlaps volume {record.handle} ({record.directory})"
            )
    try:
        with store.open_volume(directory):
            return directory
    except OSError as error:
        if error.errno not in _ELSEWHERE:
            raise
        raise InvalidArgument.field(
            'volume_context["directory"]',
            directory,
            f"a directory of pool {store.name} itself, reached without symlinks and mounts ({error.strerror})",
        ) from error


def publish_context(store: PoolStore, directory: str, record: VolumeRecord | None) -> dict[str, str]:
    """Say to a node where a volume lies (None: a static one); `_told` reads it."""
    form = Form() if record is None else record.form
    context = {"directory": directory, "layout": form.layout.value, "epoch": str(0 if record is None else record.epoch)}
    if form.layout is Layout.IMAGE:
        context |= {"accessType": form.access_type.value, "fsType": form.fs_type}
    if store.backend.remote:
        context["pool"] = store.name
        if record is not None:
            context["capacity"] = str(record.capacity_bytes)
    return context


def _told(store: PoolStore, handle: str, context: Mapping[str, str], *, static: bool) -> Placement:
    """Take a volume's place from what ControllerPublishVolume returned, and from nothing else."""
    if not context:
        raise FailedPrecondition(
            f"volume {quoted(handle)} is not published to this node: publish_context is missing; the CSIDriver object of an NFS pool needs "
            "`attachRequired: true`, and the controller an external-attacher"
        )
    directory = _parse_publish_context(context)
    if context.get("pool") != store.name:
        raise InvalidArgument.field('publish_context["pool"]', context.get("pool", ""), f"the volume's pool is {store.name}")
    form = _parse_form(context)
    if static and form.layout is Layout.IMAGE:
        raise InvalidArgument.field('publish_context["layout"]', context["layout"], "static volumes are directories")
    capacity = context.get("capacity")
    if capacity is not None and not _NUMBER.fullmatch(capacity):
        raise InvalidArgument.field('publish_context["capacity"]', capacity, "a number of bytes")
    return Placement(store, directory, static, int(capacity) if capacity else None, form, int(context["epoch"]))


def _check_publish_context(record: VolumeRecord, context: Mapping[str, str]) -> None:
    directory = _parse_publish_context(context)
    form = _parse_form(context)
    if directory != record.directory or form != record.form:
        raise FailedPrecondition(
            f"publish_context names {directory} ({access.described(form)}), the record {record.directory} ({access.described(record.form)})"
        )
    if int(context["epoch"]) > record.epoch:
        raise InvalidArgument.field('publish_context["epoch"]', context["epoch"], f"a number up to {record.epoch}")


def _parse_publish_context(context: Mapping[str, str]) -> str:
    """Return the directory that the context names, once all of it is what it must be."""
    for key in ("directory", "layout", "epoch"):
        if key not in context:
            raise InvalidArgument(f'publish_context["{key}"] is missing: it must be what ControllerPublishVolume returned')
    if not _NUMBER.fullmatch(context["epoch"]):
        raise InvalidArgument.field('publish_context["epoch"]', context["epoch"], "a number")
    return check_directory(context["directory"], 'publish_context["directory"]')


def _parse_form(context: Mapping[str, str]) -> Form:
    if context["layout"] == Layout.DIRECTORY:
        return Form()
    if context["layout"] != Layout.IMAGE:
        raise InvalidArgument.field('publish_context["layout"]', context["layout"], f"this driver knows {', '.join(Layout)}")
    access_type, fs_type = context.get("accessType", ""), context.get("fsType", "")
    if access_type == AccessType.BLOCK and not fs_type:
        return Form(Layout.IMAGE, AccessType.BLOCK)
    if access_type == AccessType.MOUNT and fs_type in image_filesystems.KINDS:
        return Form(Layout.IMAGE, AccessType.MOUNT, fs_type)
    raise InvalidArgument(
        f'publish_context["layout"] is image, ["accessType"] {quoted(access_type)} and ["fsType"] {quoted(fs_type)}: an image is `block` without a '
        f"filesystem, or `mount` with {' or '.join(image_filesystems.KINDS)}"
    )


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(other + "/") or other.startswith(one + "/")
