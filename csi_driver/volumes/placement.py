"""Placement: which directory a volume handle stands for on a node, and whether it may be mounted.

Three kinds of handles reach a node: ours, whose record says everything; static ones, for which an admin names an existing directory;
and inline ones (`inline.py`). No path ever comes from anywhere else.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from csi_driver.errors import FailedPrecondition, InvalidArgument, NotFound, quoted
from csi_driver.volumes import access
from csi_driver.volumes.model import Capability, Phase, VolumeRecord
from csi_driver.volumes.parameters import check_directory, parse_static_parameters
from csi_driver.volumes.pools import Pools, PoolStore


@dataclass(frozen=True)
class Placement:
    store: PoolStore
    directory: str
    record: VolumeRecord | None  # None: static


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
        placement = (
            self._static(handle, volume_context) if located is None else self._recorded(handle, *located, publish_context)
        )
        if problem := access.unsupported(capability, placement.store.backend):
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
        return Placement(store, record.directory, record)

    def _static(self, handle: str, volume_context: Mapping[str, str]) -> Placement:
        if not volume_context:
            raise NotFound(
                f"volume {quoted(handle)} does not exist: it is no handle of this driver, and no volume_context says where it lies"
            )
        static = parse_static_parameters(volume_context)
        store = self._pools.find(static.pool)
        if store is None:
            raise InvalidArgument.field(
                'volume_context["pool"]', static.pool, f"no such pool; allowed are {self._pools.names()}"
            )
        for record in store.volumes.readable():
            if _overlap(record.directory, static.directory):
                raise InvalidArgument.field(
                    'volume_context["directory"]', static.directory, f"it overlaps volume {record.handle} ({record.directory})"
                )
        try:
            with store.open_volume(static.directory):
                return Placement(store, static.directory, None)
        except OSError as error:  # a symlink leads elsewhere, a mount is another filesystem (open_beneath)
            raise InvalidArgument.field(
                'volume_context["directory"]',
                static.directory,
                f"a directory of pool {store.name} itself, reached without symlinks and mounts ({error.strerror})",
            ) from error


def _check_publish_context(record: VolumeRecord, context: Mapping[str, str]) -> None:
    for key in ("directory", "layout", "epoch"):
        if key not in context:
            raise InvalidArgument(f'publish_context["{key}"] is missing: it must be what ControllerPublishVolume returned')
    directory = check_directory(context["directory"], 'publish_context["directory"]')
    if directory != record.directory or context["layout"] != record.layout:
        raise FailedPrecondition(
            f"publish_context names {directory} ({context['layout']}), the record {record.directory} ({record.layout})"
        )
    if not re.fullmatch(r"[0-9]{1,18}", context["epoch"], re.ASCII) or int(context["epoch"]) > record.epoch:
        raise InvalidArgument.field('publish_context["epoch"]', context["epoch"], f"a number up to {record.epoch}")


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(other + "/") or other.startswith(one + "/")
