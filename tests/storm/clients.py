"""The storm: clients that create, fill, change, clone, snapshot, restore, group, publish, resize and delete, all at once."""

import contextlib
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from csi_driver.rpc import csi_pb2 as csi
from tests.storm.client import RETRY, Client, capability, create_volume
from tests.storm.content import HEAVY, LIGHT, change, difference, fill, manifest, newest_ns
from tests.storm.disk import id_of
from tests.storm.ledger import NODE, GroupEntry, Intent, Ledger, SnapshotEntry, Source, VolumeEntry, record_id

MIB = 1024**2
MAX_VOLUMES, MAX_SNAPSHOTS, MAX_GROUPS, MAX_INLINE = 14, 12, 3, 3
NAMES = 24
"""Few names, so that they are used again soon after a deletion."""
TEAMS = ("red", "blue")
TEMPLATE = "teams/${pvc.namespace}/${pvc.name}"
PARENTS = frozenset({"teams", *(f"teams/{team}" for team in TEAMS)})


class StormClient:
    """One client thread."""

    def __init__(self, ledger: Ledger, client: Client, rng: random.Random, stop: threading.Event):
        self.ledger = ledger
        self.client = client
        self.rng = rng
        self.stop = stop

    def run(self) -> None:
        """Work until `stop` is set; what the driver leaves unanswered is asked again, by this or another client."""
        try:
            self.client.wait_until_connected(self.stop)
            while not self.stop.is_set():
                self._step()
        except Exception as error:
            self.ledger.problem(f"a client broke: {error!r}")
            raise

    def settle(self) -> None:
        """Ask again for everything unanswered, and begin nothing new."""
        while not self.stop.is_set():
            with self.ledger.lock:
                intent = self._next_waiting()
                if intent is None and not self.ledger.waiting and not self.ledger.running:
                    return
            if intent is None:
                time.sleep(0.005)
            else:
                self._make_calls(intent)

    def _step(self) -> None:
        with self.ledger.lock:
            intent = self._next_waiting() if self.rng.random() < 0.5 else None
            intent = intent or self._new_intent()
        if intent is None:
            time.sleep(0.002)
        else:
            self._make_calls(intent)

    def _next_waiting(self) -> Intent | None:
        for intent in self.rng.sample(self.ledger.waiting, len(self.ledger.waiting)):
            if not any(source.exclusive for source in intent.sources):
                self.ledger.waiting.remove(intent)
                return self.ledger.begin(intent)
        return None

    def _make_calls(self, intent: Intent) -> None:
        for method, request in intent.calls[len(intent.responses) :]:
            try:
                intent.responses.append(self.client.call(method, request, 60))
            except grpc.RpcError as error:
                if error.code() in RETRY:
                    self.ledger.put_back(intent)
                    time.sleep(self.rng.uniform(0.001, 0.02))
                else:
                    self.ledger.problem(
                        f"{intent.kind}, try {intent.tries}: {method} answers {error.code().name}: {error.details()}"
                    )
                    self.ledger.done(intent)
                return
        try:
            intent.finish(intent, intent.responses)
        except OSError as error:
            self.ledger.problem(f"{intent.kind}, try {intent.tries}, was acknowledged, but: {error}")
        self.ledger.done(intent)

    # --- what to do next; the caller holds the ledger's lock -------------------------------------------------------------------------

    def _new_intent(self) -> Intent | None:
        choices: list[tuple[int, Callable[[], Intent | None]]] = [
            (14, self._create),
            (14, self._clone),
            (14, self._snapshot),
            (14, self._restore),
            (14, self._delete_volume),
            (12, self._delete_snapshot),
            (4, self._group),
            (3, self._delete_group),
            (5, self._publish),
            (5, self._unpublish),
            (4, self._publish_inline),
            (4, self._unpublish_inline),
            (3, self._expand),
            (3, self._modify),
            (8, self._change),
        ]
        weights = [weight for weight, _ in choices]
        for _ in range(4):
            make = self.rng.choices([choice for _, choice in choices], weights)[0]
            intent = make()
            if intent is not None:
                return self.ledger.begin(intent)
        return None

    def _free_name(self, kind: str) -> str | None:
        free = [name for number in range(NAMES) if (name := f"{kind}-{number}") not in self.ledger.names]
        if not free:
            return None
        name = self.rng.choice(free)
        self.ledger.names.add(name)
        return name

    def _some_volume(self, allow: Callable[[VolumeEntry], bool] = lambda _: True) -> VolumeEntry | None:
        return self._some(self.ledger.volumes.values(), allow)

    def _some(self, entries, allow: Callable[[Any], bool] = lambda _: True) -> Any:
        found = [entry for entry in entries if not entry.exclusive and allow(entry)]
        return self.rng.choice(found) if found else None

    # --- volumes ------------------------------------------------------------------------------------------------------------------

    def _create(self, snapshot: SnapshotEntry | None = None, volume: VolumeEntry | None = None) -> Intent | None:
        if len(self.ledger.volumes) >= MAX_VOLUMES or (name := self._free_name("volume")) is None:
            return None
        source: Source | None = snapshot or volume
        # What is kept is not deleted by anybody: only light volumes are, or the disk fills.
        on_delete = self.rng.choice(("delete", "delete", "retain", "archive")) if source is None else "delete"
        parameters = {"onDelete": on_delete}
        if self.rng.random() < 0.25:
            claim = f"claim-{self.rng.randrange(10**9)}"  # new each time: a directory that was retained is never taken again
            parameters |= {"directory": TEMPLATE, "csi.storage.k8s.io/pvc/name": claim}
            parameters["csi.storage.k8s.io/pvc/namespace"] = self.rng.choice(TEAMS)
        if self.rng.random() < 0.3:
            parameters |= {"uid": "1000", "mode": "2770"}
        request = create_volume(
            name,
            source.capacity if source else 32 * MIB,
            snapshot.handle if snapshot else "",
            volume.handle if volume else "",
            **parameters,
        )

        def finish(intent: Intent, responses: list[Any]) -> None:
            made = responses[0].volume
            entry = VolumeEntry(name, made.volume_id, {}, capacity=made.capacity_bytes, on_delete=on_delete)
            entry.directory = self.ledger.pool.directory_of(entry.handle)
            entry.manifest = manifest(entry.directory)
            if source is None:
                if entry.manifest:
                    self.ledger.problem(f"{entry.name} is new and not empty: {sorted(entry.manifest)[:3]}")
                fill(entry.directory, self.rng, HEAVY if on_delete == "delete" and self.rng.random() < 0.7 else LIGHT)
                entry.manifest = manifest(entry.directory)
            else:
                self._require_copy(intent, 0, entry, f"{intent.kind} {name}")
            with self.ledger.lock:
                self.ledger.volumes[name] = entry

        kind = "restore" if snapshot else "clone" if volume else "create"
        return Intent(
            kind, [("CreateVolume", request)], finish, [source] if source else [], (("volumes", record_id("volume", name)),)
        )

    def _clone(self) -> Intent | None:
        volume = self._some_volume()
        return self._create(volume=volume) if volume else None

    def _restore(self) -> Intent | None:
        snapshot = self._some(self.ledger.snapshots.values())
        return self._create(snapshot=snapshot) if snapshot else None

    def _require_copy(self, intent: Intent, position: int, copy: Source, what: str) -> None:
        if not any(copy.manifest == allowed for allowed in intent.allowed[position]):
            differences = [difference(copy.manifest, allowed) for allowed in intent.allowed[position]]
            self.ledger.problem(f"{what} (try {intent.tries}) is no copy of what its source held: {differences}")

    def _delete_volume(self) -> Intent | None:
        volume = self._some_volume(_deletable)
        if volume is None:
            return None
        del self.ledger.volumes[volume.name]

        def finish(_: Intent, __: list[Any]) -> None:
            if volume.on_delete == "delete" and volume.directory.exists():
                self.ledger.problem(f"{volume.name} was deleted; {volume.directory} is still there")
            with self.ledger.lock:
                if volume.on_delete != "delete":
                    self.ledger.kept.append((id_of(volume.handle), volume.manifest))
                self.ledger.names.discard(volume.name)

        request = csi.DeleteVolumeRequest(volume_id=volume.handle)
        return Intent("delete volume", [("DeleteVolume", request)], finish, ids=(("volumes", id_of(volume.handle)),))

    def _change(self) -> Intent | None:
        """Not a call: a pod writes. Copies whose calls are unanswered may have been cut before or after."""
        volume = self._some_volume(lambda each: each.readers == 0)
        if volume is None:
            return None
        volume.exclusive = True
        rng = self.rng

        def finish(_: Intent, __: list[Any]) -> None:
            change(volume.target or volume.directory, rng)
            changed = manifest(volume.directory)
            with self.ledger.lock:
                volume.manifest, volume.exclusive = changed, False

        return Intent("change", [], finish)

    def _expand(self) -> Intent | None:
        volume = self._some_volume(lambda each: each.readers == 0 and not each.unanswered)
        if volume is None:
            return None
        volume.exclusive = True
        size = volume.capacity + MIB

        def finish(_: Intent, __: list[Any]) -> None:
            volume.capacity, volume.exclusive = size, False

        request = csi.ControllerExpandVolumeRequest(
            volume_id=volume.handle, capacity_range=csi.CapacityRange(required_bytes=size)
        )
        return Intent("expand", [("ControllerExpandVolume", request)], finish, ids=(("volumes", id_of(volume.handle)),))

    def _modify(self) -> Intent | None:
        volume = self._some_volume(lambda each: each.on_delete != "delete" and each.readers == 0)
        if volume is None:
            return None
        volume.exclusive = True
        wanted = "archive" if volume.on_delete == "retain" else "retain"

        def finish(_: Intent, __: list[Any]) -> None:
            volume.on_delete, volume.exclusive = wanted, False

        request = csi.ControllerModifyVolumeRequest(volume_id=volume.handle, mutable_parameters={"onDelete": wanted})
        return Intent("modify", [("ControllerModifyVolume", request)], finish, ids=(("volumes", id_of(volume.handle)),))

    # --- snapshots ----------------------------------------------------------------------------------------------------------------

    def _snapshot(self) -> Intent | None:
        volume = self._some_volume()
        if volume is None or len(self.ledger.snapshots) >= MAX_SNAPSHOTS or (name := self._free_name("snapshot")) is None:
            return None

        def finish(intent: Intent, responses: list[Any]) -> None:
            entry = self._cut(intent, 0, responses[0].snapshot, name)
            with self.ledger.lock:
                self.ledger.snapshots[name] = entry

        request = csi.CreateSnapshotRequest(name=name, source_volume_id=volume.handle)
        return Intent(
            "snapshot", [("CreateSnapshot", request)], finish, [volume], (("snapshots", record_id("snapshot", name)),)
        )

    def _cut(self, intent: Intent, position: int, shown: csi.Snapshot, name: str, group: str = "") -> SnapshotEntry:
        created = shown.creation_time.ToNanoseconds()
        entry = SnapshotEntry(
            name, shown.snapshot_id, manifest(self.ledger.pool.snapshot_data(shown.snapshot_id)), created_ns=created
        )
        entry.group, entry.capacity = group, shown.size_bytes
        if not shown.ready_to_use:
            self.ledger.problem(f"snapshot {name} is acknowledged and not ready_to_use")
        self._require_copy(intent, position, entry, f"snapshot {name}")
        if newest_ns(entry.manifest) > created:
            self.ledger.problem(
                f"snapshot {name} (try {intent.tries}) says it was cut at {created}, but holds a file of {newest_ns(entry.manifest)}"
            )
        return entry

    def _delete_snapshot(self) -> Intent | None:
        snapshot = self._some(
            self.ledger.snapshots.values(), lambda each: not each.group and not each.readers and not each.unanswered
        )
        if snapshot is None:
            return None
        del self.ledger.snapshots[snapshot.name]

        def finish(_: Intent, __: list[Any]) -> None:
            with self.ledger.lock:
                self.ledger.names.discard(snapshot.name)

        request = csi.DeleteSnapshotRequest(snapshot_id=snapshot.handle)
        return Intent("delete snapshot", [("DeleteSnapshot", request)], finish, ids=(("snapshots", id_of(snapshot.handle)),))

    def _group(self) -> Intent | None:
        volumes = [volume for volume in self.ledger.volumes.values() if not volume.exclusive]
        if len(volumes) < 3 or len(self.ledger.groups) >= MAX_GROUPS or (name := self._free_name("group")) is None:
            return None
        sources = self.rng.sample(volumes, self.rng.choice((2, 3)))

        def finish(intent: Intent, responses: list[Any]) -> None:
            shown = responses[0].group_snapshot
            members = []
            by_source = {member.source_volume_id: member for member in shown.snapshots}
            for position, source in enumerate(sources):
                members.append(
                    self._cut(intent, position, by_source[source.handle], f"{name}/{position}", shown.group_snapshot_id)
                )
            with self.ledger.lock:
                self.ledger.groups[name] = GroupEntry(name, shown.group_snapshot_id, members)
                self.ledger.snapshots |= {member.name: member for member in members}

        request = csi.CreateVolumeGroupSnapshotRequest(name=name, source_volume_ids=[volume.handle for volume in sources])
        group_id = record_id("group", name)
        ids = [("snapshots", record_id("snapshot", f"group\0{group_id}\0{volume.handle}")) for volume in sources]
        return Intent("group", [("CreateVolumeGroupSnapshot", request)], finish, list(sources), (("groups", group_id), *ids))

    def _delete_group(self) -> Intent | None:
        idle = [
            group
            for group in self.ledger.groups.values()
            if not any(member.readers or member.unanswered for member in group.members)
        ]
        if not idle:
            return None
        group = self.rng.choice(idle)
        del self.ledger.groups[group.name]
        for member in group.members:
            del self.ledger.snapshots[member.name]

        def finish(_: Intent, __: list[Any]) -> None:
            with self.ledger.lock:
                self.ledger.names.discard(group.name)

        members = [member.handle for member in group.members]
        request = csi.DeleteVolumeGroupSnapshotRequest(group_snapshot_id=group.handle, snapshot_ids=members)
        ids = (("groups", id_of(group.handle)), *(("snapshots", id_of(member)) for member in members))
        return Intent("delete group", [("DeleteVolumeGroupSnapshot", request)], finish, ids=ids)

    # --- pods ---------------------------------------------------------------------------------------------------------------------

    def _publish(self) -> Intent | None:
        volume = self._some_volume(lambda each: each.target is None and each.readers == 0)
        if volume is None:
            return None
        volume.exclusive = True
        staging, target = self._staging(volume), self._target(volume.name)
        calls = [
            (
                "ControllerPublishVolume",
                csi.ControllerPublishVolumeRequest(volume_id=volume.handle, node_id=NODE, volume_capability=capability()),
            ),
            (
                "NodeStageVolume",
                csi.NodeStageVolumeRequest(
                    volume_id=volume.handle, staging_target_path=str(staging), volume_capability=capability()
                ),
            ),
            (
                "NodePublishVolume",
                csi.NodePublishVolumeRequest(
                    volume_id=volume.handle,
                    staging_target_path=str(staging),
                    target_path=str(target),
                    volume_capability=capability(),
                ),
            ),
        ]

        def finish(_: Intent, __: list[Any]) -> None:
            if manifest(target) != volume.manifest:
                self.ledger.problem(f"{target} does not show {volume.name}")
            volume.target, volume.exclusive = target, False

        return Intent("publish", calls, finish, ids=(("volumes", id_of(volume.handle)),))

    def _unpublish(self) -> Intent | None:
        volume = self._some_volume(lambda each: each.target is not None and each.readers == 0)
        if volume is None:
            return None
        volume.exclusive = True
        staging, target = self._staging(volume), volume.target
        calls = [
            ("NodeUnpublishVolume", csi.NodeUnpublishVolumeRequest(volume_id=volume.handle, target_path=str(target))),
            ("NodeUnstageVolume", csi.NodeUnstageVolumeRequest(volume_id=volume.handle, staging_target_path=str(staging))),
            ("ControllerUnpublishVolume", csi.ControllerUnpublishVolumeRequest(volume_id=volume.handle, node_id=NODE)),
        ]

        def finish(_: Intent, __: list[Any]) -> None:
            if target.exists():
                self.ledger.problem(f"{target} is still there after NodeUnpublishVolume")
            volume.target, volume.exclusive = None, False

        return Intent("unpublish", calls, finish, ids=(("volumes", id_of(volume.handle)),))

    def _publish_inline(self) -> Intent | None:
        if len(self.ledger.inline) >= MAX_INLINE:
            return None
        handle = f"csi-{self.rng.getrandbits(64):016x}"
        target = self._target(handle)
        request = csi.NodePublishVolumeRequest(volume_id=handle, target_path=str(target), volume_capability=capability())
        request.volume_context.update({"csi.storage.k8s.io/ephemeral": "true", "size": "1Mi"})

        def finish(_: Intent, __: list[Any]) -> None:
            (target / "scratch").write_bytes(b"x" * 1000)
            with self.ledger.lock:
                self.ledger.inline[handle] = target

        return Intent(
            "publish inline",
            [("NodePublishVolume", request)],
            finish,
            ids=(("volumes", record_id("volume", f"inline\0{handle}")),),
        )

    def _unpublish_inline(self) -> Intent | None:
        if not self.ledger.inline:
            return None
        handle = self.rng.choice(sorted(self.ledger.inline))
        target = self.ledger.inline.pop(handle)

        def finish(_: Intent, __: list[Any]) -> None:
            if target.exists():
                self.ledger.problem(f"{target} is still there after NodeUnpublishVolume")

        request = csi.NodeUnpublishVolumeRequest(volume_id=handle, target_path=str(target))
        ids = (("volumes", record_id("volume", f"inline\0{handle}")),)
        return Intent("unpublish inline", [("NodeUnpublishVolume", request)], finish, ids=ids)

    def _staging(self, volume: VolumeEntry) -> Path:
        return self._made_parent(self.ledger.kubelet / "plugins" / "staging" / volume.handle / "globalmount")

    def _target(self, pod: str) -> Path:
        return self._made_parent(self.ledger.kubelet / "pods" / pod / "mount")

    def _made_parent(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    # --- the end ------------------------------------------------------------------------------------------------------------------

    def take_down(self) -> None:
        """Delete everything, in the order that dependences ask for. Nothing may be unanswered."""
        for make in (self._unpublish_inline, self._unpublish, self._delete_group, self._delete_snapshot, self._delete_volume):
            while True:
                with self.ledger.lock:
                    intent = make()
                    if intent is None:
                        break
                    self.ledger.begin(intent)
                self._make_calls(intent)
                self.settle()


def _deletable(volume: VolumeEntry) -> bool:
    return volume.target is None and volume.readers == 0 and not volume.unanswered


def run_clients(
    ledger: Ledger, endpoint: str, seed: str, count: int, work: str, stop: threading.Event, meanwhile: Callable[[Client], None]
) -> None:
    """Let `count` clients do `work` (a method of StormClient) while `meanwhile` runs in this thread; return when all have ended."""
    with Client(endpoint) as client:
        clients = [StormClient(ledger, client, random.Random(f"{seed}/{number}"), stop) for number in range(count)]
        threads = [threading.Thread(target=getattr(each, work), name=f"client {number}") for number, each in enumerate(clients)]
        with contextlib.ExitStack() as ending:
            for thread in threads:
                thread.start()
                ending.callback(thread.join)
            meanwhile(client)
