"""A pool as it lies on disk, read without the driver: what is there, and what no record names."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from csi_driver.linux import mountinfo

TEMPORARY_PREFIX = ".tmp."
KINDS = ("volumes", "snapshots", "groups")


@dataclass(frozen=True)
class Kept:
    """A volume that was deleted with `onDelete` retain or archive: its id, and where its data lies."""

    record: Path
    id: str
    data: Path


class Pool:
    def __init__(self, root: Path):
        self.root = root
        self.control = root / ".csi"

    def records(self, kind: str) -> dict[str, dict]:
        """Read all records of `volumes`, `snapshots` or `groups`, by id."""
        folder = self.control / kind
        return {
            name.removesuffix(".json"): json.loads((folder / name).read_bytes()) for name in _names(folder) if _is_record(name)
        }

    def record(self, kind: str, handle: str) -> dict:
        return json.loads((self.control / kind / f"{id_of(handle)}.json").read_bytes())

    def directory_of(self, volume_handle: str) -> Path:
        return self.root / self.record("volumes", volume_handle)["directory"]

    def snapshot_data(self, handle: str) -> Path:
        return self.control / "snapshots-data" / id_of(handle)

    def kept(self) -> list[Kept]:
        found = []
        for name in _names(self.control / "retained"):
            record = json.loads((self.control / "retained" / name).read_bytes())
            found.append(Kept(self.control / "retained" / name, record["id"], self.root / record["directory"]))
        for name in _names(self.control / "archived"):
            record = json.loads((self.control / "archived" / name).read_bytes())
            data = self.root / "archived" / f"{record['directory'].rpartition('/')[2]}.{record['token']}"
            found.append(Kept(self.control / "archived" / name, record["id"], data))
        return found

    def busy(self) -> list[str]:
        """List what the sweeper has still to remove."""
        return [f"{folder}/{name}" for folder in ("staging", "trash") for name in _names(self.control / folder)]

    def wait_until_swept(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := self.busy()) and time.monotonic() < until:
            time.sleep(0.05)
        assert not left, f"still there {seconds} s after the last call: {left[:5]} ({len(left)} in all)"

    def unnamed(self, parents: frozenset[str] = frozenset()) -> list[str]:
        """List everything in the pool that no record names. Staging and trash count: nothing may run, and the sweep be over.

        Not counted are young `.tmp.*` files: another controller may be writing one this moment, so the sweeper leaves them for an
        hour. And the directories `parents` (relative) while they are empty: those above a volume of a `directory` template, which
        the next volume of that template may be about to use.
        """
        volumes, snapshots = self.records("volumes"), self.records("snapshots")
        kept = {str(each.data) for each in self.kept()}
        found = [f".csi/{name}" for name in self.busy()]
        found += [f".csi/snapshots-data/{name}" for name in _names(self.control / "snapshots-data") if name not in snapshots]
        found += [f".csi/manifests/{name}" for name in _names(self.control / "manifests") if name not in snapshots]
        for kind in (*KINDS, "retained", "archived"):
            folder = self.control / kind
            found += [
                f".csi/{kind}/{name}"
                for name in _names(folder)
                if not _is_record(name) and not _is_young_temporary(folder / name)
            ]
        known = {
            *KINDS,
            "retained",
            "archived",
            "snapshots-data",
            "manifests",
            "staging",
            "trash",
            "parents",
            "format.json",
            "lock",
            "promises",
        }
        found += [f".csi/{name}" for name in _names(self.control) if name not in known]
        named = {str(self.root / record["directory"]) for record in volumes.values()} | kept
        for name in _names(self.root):
            if name != ".csi":
                found += self._unnamed_below(name, named, parents | {"archived"})
        return found

    def _unnamed_below(self, name: str, named: set[str], parents: frozenset[str]) -> list[str]:
        path = self.root / name
        if str(path) in named:
            return []
        if name in parents and path.is_dir() and not path.is_symlink():
            return [each for inside in _names(path) for each in self._unnamed_below(f"{name}/{inside}", named, parents)]
        return [name]

    def missing(self) -> list[str]:
        """List the content that a record names and that is not there."""
        places = [self.root / record["directory"] for record in self.records("volumes").values() if record["phase"] == "ready"]
        places += [self.control / "snapshots-data" / name for name in self.records("snapshots")]
        places += [each.data for each in self.kept()]
        return [str(place) for place in places if not place.is_dir()]


def id_of(handle: str) -> str:
    return handle.rpartition(".")[2]


def mounts_below(path: Path) -> list[str]:
    return [mount.mount_point for mount in mountinfo.mounts_below(path)]


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def _is_record(name: str) -> bool:
    return name.endswith(".json") and not name.startswith(TEMPORARY_PREFIX)


def _is_young_temporary(path: Path) -> bool:
    return path.name.startswith(TEMPORARY_PREFIX) and time.time() - path.stat().st_mtime < 3600
