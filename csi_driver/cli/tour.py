"""A volume's whole life in some twenty steps, asked through the driver's own socket as Kubernetes would ask.

Each step checks what came back: a tour that shows something else than what it says ends there. What a step makes, it also writes
down how to take away; the end of the tour is that list, backwards, and so is what happens when somebody interrupts it.
"""

import contextlib
import errno
import secrets
from pathlib import Path

from csi_driver.cli.client import Client
from csi_driver.cli.screens import Screen, size
from csi_driver.cli.steps import Steps
from csi_driver.cli.trial import NODE, POOL, Site, TrialFailed
from csi_driver.linux import mountinfo
from csi_driver.rpc import csi_pb2 as csi

MIB = 1024**2
_CAPABILITY = csi.VolumeCapability(
    mount=csi.VolumeCapability.MountVolume(),
    access_mode=csi.VolumeCapability.AccessMode(mode=csi.VolumeCapability.AccessMode.SINGLE_NODE_WRITER),
)
_Context = dict[str, str]
_FILE = "letter.txt"
_FIRST, _SECOND = "first version\n", "second version\n"


class Tour:
    """Goes through the steps and tells the screen of each; `steps.count` is how many it took."""

    def __init__(self, site: Site, client: Client, screen: Screen) -> None:
        self.steps = Steps(client, screen)
        self._site = site
        self._client = client
        self._name = f"pvc-{secrets.token_hex(4)}"

    def run(self) -> None:
        """Go through all steps. Raises TrialFailed at the first that does not show what it should."""
        volume = self._create("a new volume", self._name, "from nothing")
        context = self._attach(volume)
        self._stage(volume, context)
        self._publish(volume, "shown to a pod", "writer", context, readonly=False)
        self._write(volume, "a file, as the pod would", _FIRST)
        self._publish(volume, "shown to a pod that may only read", "reader", context, readonly=True)
        self._fail_to_write()
        snapshot = self._snapshot(volume)
        self._write(volume, "the file again, after the snapshot", _SECOND)
        from_snapshot = csi.VolumeContentSource.SnapshotSource(snapshot_id=snapshot)
        self._copy("restored", csi.VolumeContentSource(snapshot=from_snapshot), "from the snapshot", _FIRST)
        from_volume = csi.VolumeContentSource.VolumeSource(volume_id=volume)
        self._copy("clone", csi.VolumeContentSource(volume=from_volume), "from the first volume", _SECOND)
        self._expand(volume)
        self._look(volume)
        self._see_refusals(volume)
        self.steps.undo_all()
        self._see_nothing_left()

    def tidy(self) -> None:
        """Take away, without a word, what an interrupted tour has made; what the driver refuses stays."""
        self.steps.tidy()
        self._remove_staging()

    # --- the life -----------------------------------------------------------------------------------------------------------------

    def _create(self, title: str, name: str, origin: str, source: csi.VolumeContentSource | None = None) -> str:
        def made(reply: csi.CreateVolumeResponse) -> None:
            delete = csi.DeleteVolumeRequest(volume_id=reply.volume.volume_id)
            place = self._directory(reply.volume.volume_id)
            self.steps.later("goodbye", self._client.controller.DeleteVolume, delete, name, gone=place)

        reply = self.steps.ask(
            title,
            self._client.controller.CreateVolume,
            csi.CreateVolumeRequest(
                name=name,
                capacity_range=csi.CapacityRange(required_bytes=64 * MIB),
                volume_capabilities=[_CAPABILITY],
                parameters={"pool": POOL, "mode": "0770"},
                volume_content_source=source,
            ),
            asked=f"{name}, 64 MiB, ReadWriteOnce, in pool {POOL}, {origin}",
            answered=lambda reply: f"{reply.volume.volume_id}, {size(reply.volume.capacity_bytes)}",
            path=lambda reply: self._directory(reply.volume.volume_id),
            made=made,
        )
        return reply.volume.volume_id

    def _attach(self, volume: str) -> _Context:
        request = csi.ControllerPublishVolumeRequest(volume_id=volume, node_id=NODE, volume_capability=_CAPABILITY)
        detach = csi.ControllerUnpublishVolumeRequest(volume_id=volume, node_id=NODE)
        unpublish = self._client.controller.ControllerUnpublishVolume
        reply = self.steps.ask(
            "given to this node",
            self._client.controller.ControllerPublishVolume,
            request,
            asked=f"for node {NODE}",
            answered=lambda reply: ", ".join(f"{key} {value}" for key, value in sorted(reply.publish_context.items())),
            made=lambda _: self.steps.later("taken from this node", unpublish, detach, f"from node {NODE}"),
        )
        return dict(reply.publish_context)

    def _stage(self, volume: str, context: _Context) -> None:
        self._staging.parent.mkdir(parents=True, exist_ok=True)  # as the kubelet does
        request = csi.NodeStageVolumeRequest(
            volume_id=volume, staging_target_path=str(self._staging), volume_capability=_CAPABILITY, publish_context=context
        )
        back = csi.NodeUnstageVolumeRequest(volume_id=volume, staging_target_path=str(self._staging))
        unstage = self._client.node.NodeUnstageVolume
        self.steps.ask(
            "mounted once for the node",
            self._client.node.NodeStageVolume,
            request,
            asked="at the staging path",
            answered=lambda _: "mounted",
            path=lambda _: self._staging,
            made=lambda _: self.steps.later("unmounted", unstage, back, "at the staging path"),
        )

    def _publish(self, volume: str, title: str, pod: str, context: _Context, *, readonly: bool) -> None:
        target = self._target(pod)
        target.parent.mkdir(parents=True, exist_ok=True)
        request = csi.NodePublishVolumeRequest(
            volume_id=volume,
            target_path=str(target),
            staging_target_path=str(self._staging),
            volume_capability=_CAPABILITY,
            publish_context=context,
            readonly=readonly,
        )
        back = csi.NodeUnpublishVolumeRequest(volume_id=volume, target_path=str(target))
        unpublish = self._client.node.NodeUnpublishVolume
        self.steps.ask(
            title,
            self._client.node.NodePublishVolume,
            request,
            asked=f"for pod {pod}, {'read-only' if readonly else 'writable'}",
            answered=lambda _: "mounted",
            path=lambda _: target,
            made=lambda _: self.steps.later(f"pod {pod} is gone", unpublish, back, f"from pod {pod}", gone=target),
        )

    def _write(self, volume: str, title: str, text: str) -> None:
        file, kept = self._target("writer") / _FILE, self._directory(volume) / _FILE

        def work() -> str:
            file.write_text(text)
            if kept.read_text() != text:
                raise TrialFailed(f"{kept} does not hold what was written to {file}")
            return "it is in the pool"

        self.steps.do("write", title, f"{text.strip()!r} into {_FILE}, through the mount of pod writer", work, kept)

    def _fail_to_write(self) -> None:
        file = self._target("reader") / _FILE

        def work() -> str:
            with file.open("a"):
                return "it was opened for writing"

        asked = f"into {_FILE}, through the mount of pod reader"
        self.steps.do("write", "refused by the kernel", asked, work, file, refused=errno.EROFS)

    def _snapshot(self, volume: str) -> str:
        name = f"{self._name}-snapshot"

        def made(reply: csi.CreateSnapshotResponse) -> None:
            delete = csi.DeleteSnapshotRequest(snapshot_id=reply.snapshot.snapshot_id)
            place = self._snapshot_data(reply.snapshot.snapshot_id)
            self.steps.later("goodbye", self._client.controller.DeleteSnapshot, delete, name, gone=place)

        reply = self.steps.ask(
            "of the volume as it is now",
            self._client.controller.CreateSnapshot,
            csi.CreateSnapshotRequest(name=name, source_volume_id=volume),
            asked=name,
            answered=lambda reply: (
                f"{reply.snapshot.snapshot_id}, {'' if reply.snapshot.ready_to_use else 'not yet '}ready to use"
            ),
            path=lambda reply: self._snapshot_data(reply.snapshot.snapshot_id),
            made=made,
        )
        return reply.snapshot.snapshot_id

    def _copy(self, kind: str, source: csi.VolumeContentSource, origin: str, content: str) -> None:
        handle = self._create(f"a volume {origin}", f"{self._name}-{kind}", origin, source)
        file = self._directory(handle) / _FILE

        def work() -> str:
            found = file.read_text()
            if found != content:
                raise TrialFailed(f"{file} holds {found!r}, not {content!r}")
            return repr(found.strip())

        self.steps.do("read", f"what came with the volume {origin}", _FILE, work, file)

    def _expand(self, volume: str) -> None:
        self.steps.ask(
            "while it is in use",
            self._client.controller.ControllerExpandVolume,
            csi.ControllerExpandVolumeRequest(volume_id=volume, capacity_range=csi.CapacityRange(required_bytes=128 * MIB)),
            asked="128 MiB instead of 64 MiB",
            answered=lambda reply: size(reply.capacity_bytes),
        )

    def _look(self, volume: str) -> None:
        target = self._target("writer")
        self.steps.ask(
            "what the volume itself takes",
            self._client.node.NodeGetVolumeStats,
            csi.NodeGetVolumeStatsRequest(volume_id=volume, volume_path=str(target)),
            asked="bytes and inodes",
            answered=lambda reply: ", ".join(_usage(usage) for usage in reply.usage),
            path=lambda _: target,
        )
        self.steps.ask(
            "what the pool can still take",
            self._client.controller.GetCapacity,
            csi.GetCapacityRequest(parameters={"pool": POOL}),
            asked=f"of pool {POOL}",
            answered=lambda reply: f"{size(reply.available_capacity)} free",
            path=lambda _: self._site.pool,
        )
        self.steps.ask(
            "whether anything is wrong",
            self._client.node.NodeGetVolumeHealth,
            csi.NodeGetVolumeHealthRequest(
                volume_id=volume, volume_publish_path=str(target), staging_target_path=str(self._staging)
            ),
            asked="with the volume, its mounts and its pool",
            answered=lambda reply: ", ".join(entry.reason for entry in reply.volume_health.health_statuses) or "nothing is",
        )
        self.steps.ask(
            "which volumes there are",
            self._client.controller.ListVolumes,
            csi.ListVolumesRequest(),
            asked="all",
            answered=lambda reply: (
                f"{len(reply.entries)} volumes, {sum(bool(entry.status.published_node_ids) for entry in reply.entries)} in use"
            ),
        )

    def _see_refusals(self, volume: str) -> None:
        self.steps.ask(
            "a volume in use is not deleted",
            self._client.controller.DeleteVolume,
            csi.DeleteVolumeRequest(volume_id=volume),
            asked=self._name,
            answered=lambda _: "deleted",
            refused="FAILED_PRECONDITION",
        )
        self.steps.ask(
            "a mistake in a StorageClass is named",
            self._client.controller.CreateVolume,
            csi.CreateVolumeRequest(
                name=f"{self._name}-typo", volume_capabilities=[_CAPABILITY], parameters={"pool": POOL, "onDelet": "retain"}
            ),
            asked="parameters onDelet: retain",
            answered=lambda reply: reply.volume.volume_id,
            refused="INVALID_ARGUMENT",
        )

    def _see_nothing_left(self) -> None:
        def work() -> str:
            if left := mountinfo.mounts_below(self._site.kubelet):
                raise TrialFailed(f"still mounted: {', '.join(mount.mount_point for mount in left)}")
            return "nothing is mounted"

        self.steps.do("mountinfo", "what is left", "mounts below the kubelet's directory", work, self._site.kubelet)
        self._remove_staging()

    def _remove_staging(self) -> None:
        with contextlib.suppress(OSError):
            self._staging.rmdir()  # as the kubelet does, once it is unstaged

    # --- places -------------------------------------------------------------------------------------------------------------------

    @property
    def _staging(self) -> Path:
        return self._site.kubelet / "staging" / self._name

    def _target(self, pod: str) -> Path:
        return self._site.kubelet / "pods" / pod / "mount"

    def _directory(self, volume: str) -> Path:
        return self._site.pool / _id_of(volume)

    def _snapshot_data(self, snapshot: str) -> Path:
        return self._site.pool / ".csi" / "snapshots-data" / _id_of(snapshot)


def _id_of(handle: str) -> str:
    return handle.rpartition(".")[2]


def _usage(usage: csi.VolumeUsage) -> str:
    if usage.unit == csi.VolumeUsage.BYTES:
        return f"{size(usage.used)} of {size(usage.total)}"
    return f"{usage.used} inodes"
