"""What the driver has acknowledged, and what it was asked and has not: the two lists that every crash is judged by."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csi_driver.volumes.handles import derive_id, node_tag
from tests.driver_process import DRIVER
from tests.storm.content import Manifest, difference, manifest
from tests.storm.disk import KINDS, Pool, id_of, mounts_below

NODE = "node-1"


def record_id(kind: str, name: str) -> str:
    return derive_id(kind, DRIVER, node_tag(NODE), name)


@dataclass(eq=False)
class Source:
    """Content that copies are made of. While `readers` are at it nobody changes it; while anybody may ask again nobody deletes it."""

    name: str
    handle: str
    manifest: Manifest
    capacity: int = 0
    readers: int = 0
    unanswered: "set[Intent]" = field(default_factory=set)
    exclusive: bool = False


@dataclass(eq=False)
class VolumeEntry(Source):
    directory: Path = Path()
    on_delete: str = "delete"
    target: Path | None = None


@dataclass(eq=False)
class SnapshotEntry(Source):
    created_ns: int = 0
    group: str = ""


@dataclass(eq=False)
class GroupEntry:
    name: str
    handle: str
    members: list[SnapshotEntry]


@dataclass(eq=False)
class Intent:
    """Calls that somebody wants to be done, in this order, and asks for until they are: always with the same arguments."""

    kind: str
    calls: list[tuple[str, Any]]
    finish: "Callable[[Intent, list[Any]], None]"
    sources: list[Source] = field(default_factory=list)
    ids: tuple[tuple[str, str], ...] = ()
    "The records (kind, id) that may or may not be there until this is answered."
    allowed: list[list[Manifest]] = field(default_factory=list)
    "For each source, every content that it had since the first call: the copy must be exactly one of them."
    responses: list[Any] = field(default_factory=list)
    tries: int = 0


class Ledger:
    """Shared by the client threads; `lock` guards everything in it."""

    def __init__(self, pool: Pool, kubelet: Path):
        self.pool = pool
        self.kubelet = kubelet
        self.lock = threading.RLock()
        self.volumes: dict[str, VolumeEntry] = {}
        self.snapshots: dict[str, SnapshotEntry] = {}
        self.groups: dict[str, GroupEntry] = {}
        self.inline: dict[str, Path] = {}
        self.kept: list[tuple[str, Manifest]] = []
        self.names: set[str] = set()
        self.waiting: list[Intent] = []
        self.running = 0
        self.problems: list[str] = []
        self.counts: dict[str, int] = {}

    # --- intents ------------------------------------------------------------------------------------------------------------------

    def begin(self, intent: Intent) -> Intent:
        with self.lock:
            self.running += 1
            intent.tries += 1
            for position, source in enumerate(intent.sources):
                source.readers += 1
                source.unanswered.add(intent)
                if intent.tries == 1:
                    intent.allowed.append([source.manifest])
                elif source.manifest not in intent.allowed[position]:
                    intent.allowed[position].append(source.manifest)
        return intent

    def put_back(self, intent: Intent) -> None:
        """No answer, or a code that says "ask again"."""
        with self.lock:
            self._leave(intent)
            self.waiting.append(intent)
            self.count(f"unanswered {intent.kind}")

    def done(self, intent: Intent) -> None:
        with self.lock:
            self._leave(intent)
            for source in intent.sources:
                source.unanswered.discard(intent)
            self.count(intent.kind)
            if intent.tries > 1:
                self.count("completed by a retry")

    def _leave(self, intent: Intent) -> None:
        self.running -= 1
        for source in intent.sources:
            source.readers -= 1

    def count(self, what: str) -> None:
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1

    def problem(self, text: str) -> None:
        with self.lock:
            self.problems.append(text)

    # --- judging ------------------------------------------------------------------------------------------------------------------

    def check_against_disk(self) -> None:
        """Compare everything acknowledged with what lies in the pool. No client may be at work."""
        records = {kind: self.pool.records(kind) for kind in KINDS}
        for volume in self.volumes.values():
            if not volume.exclusive:
                self._check_volume(volume, records["volumes"].get(id_of(volume.handle)))
        for snapshot in self.snapshots.values():
            if not snapshot.exclusive:
                self._check_snapshot(snapshot, records["snapshots"].get(id_of(snapshot.handle)))
        for group in self.groups.values():
            self._expect(
                records["groups"].get(id_of(group.handle), {}).get("phase") == "ready", f"group {group.name} is not ready"
            )
        self._check_no_others(records)

    def _check_volume(self, volume: VolumeEntry, record: dict | None) -> None:
        what = f"volume {volume.name} ({volume.handle})"
        self._expect(record is not None and record["phase"] == "ready", f"{what} was acknowledged; its record: {record}")
        if record is None:
            return
        self._expect(self.pool.root / record["directory"] == volume.directory, f"{what} moved to {record['directory']}")
        self._expect(
            record["capacity_bytes"] == volume.capacity, f"{what} has {record['capacity_bytes']}, not {volume.capacity}"
        )
        self._expect_content(volume.directory, volume.manifest, what)
        if volume.target is not None:
            self._expect(
                volume.target.exists() and volume.target.samefile(volume.directory), f"{what} is not at {volume.target}"
            )

    def _check_snapshot(self, snapshot: SnapshotEntry, record: dict | None) -> None:
        what = f"snapshot {snapshot.name} ({snapshot.handle})"
        self._expect(record is not None and record["phase"] == "ready", f"{what} was acknowledged; its record: {record}")
        if record is not None:
            self._expect(record["created_at_ns"] == snapshot.created_ns, f"{what}: creation_time changed")
        self._expect_content(self.pool.snapshot_data(snapshot.handle), snapshot.manifest, what)

    def _check_no_others(self, records: dict[str, dict]) -> None:
        """What was acknowledged as deleted stays deleted: there is no record but of what lives or has an unanswered call."""
        maybe = {each for intent in self.waiting for each in intent.ids}
        living = {
            "volumes": self.volumes.values(),
            "snapshots": self.snapshots.values(),
            "groups": self.groups.values(),
        }
        inline = {record_id("volume", f"inline\0{handle}") for handle in self.inline}
        for kind, entries in living.items():
            named = {id_of(entry.handle) for entry in entries} | (inline if kind == "volumes" else set())
            for each in records[kind].keys() - named:
                self._expect(
                    (kind, each) in maybe,
                    f"a record in {kind} that nobody asked for or that was deleted: {records[kind][each]}",
                )

    def check_kept(self) -> None:
        """Compare what was retained and archived with what it held when it was deleted. No call may be unanswered."""
        expected = list(self.kept)
        for kept in self.pool.kept():
            found = manifest(kept.data)
            match = next((each for each in expected if each == (kept.id, found)), None)
            self._expect(match is not None, f"{kept.record.name}: {kept.data} does not hold what the volume held")
            if match is not None:
                expected.remove(match)
        self._expect(not expected, f"kept, and not found: {[each[0] for each in expected]}")

    def check_nothing_left_over(self, parents: frozenset[str]) -> None:
        for name in self.pool.unnamed(parents):
            self.problem(f"on disk, and no record names it: {name}")
        for place in self.pool.missing():
            self.problem(f"a record names it, and it is not on disk: {place}")
        expected = sum(2 for volume in self.volumes.values() if volume.target) + len(self.inline)
        found = mounts_below(self.kubelet)
        self._expect(len(found) == expected, f"{len(found)} mounts, not {expected}: {found}")

    def _expect_content(self, place: Path, expected: Manifest, what: str) -> None:
        try:
            found = manifest(place)
        except OSError as error:
            self.problem(f"{what}: {error}")
            return
        self._expect(found == expected, f"{what} is not what was acknowledged: {difference(found, expected)}")

    def _expect(self, good: bool, text: str) -> None:
        if not good:
            self.problem(text)
