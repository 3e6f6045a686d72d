"""What is run for a backend: the parts that its file names, each a testdriver of its own.

The suite has one StorageClass per testdriver, and a driver is more than one class. The file is the testdriver; `Parts` names changes
of it, and what to run with each. `LeftOut` names what nothing here can run, and why.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Part:
    """One run of the suite: a testdriver, and regular expressions for the names of specs to run and not to run (empty: all, none)."""

    backend: str
    name: str
    testdriver: Mapping[str, Any]
    focus: str
    skip: str

    @property
    def title(self) -> str:
        """What it is called in tables and, with dashes, in names of files."""
        return f"{self.backend} {self.name}"


@dataclass(frozen=True)
class LeftOut:
    """Specs by a regular expression, and why they are not run."""

    specs: str
    because: str


def backends() -> list[str]:
    """List the backends that the suite can be run for."""
    return sorted(file.stem for file in HERE.glob("*.yaml"))


def parts(backend: str) -> list[Part]:
    """Return the runs of a backend, in their order."""
    described = _read(backend)
    changes = described.pop("Parts")
    described.pop("LeftOut", None)
    found = []
    for change in changes:
        name, focus, skip = change.pop("Name"), change.pop("Focus", ""), change.pop("Skip", "")
        found.append(Part(backend, name, _merged(described, change), focus, skip))
    return found


def left_out(backend: str) -> list[LeftOut]:
    """Return what no part of a backend runs."""
    return [LeftOut(one["Specs"], one["Because"]) for one in _read(backend).get("LeftOut", [])]


def _read(backend: str) -> dict[str, Any]:
    described: dict[str, Any] = yaml.safe_load((HERE / f"{backend}.yaml").read_text())
    return described


def _merged(described: Any, change: Any) -> Any:
    if not (isinstance(described, Mapping) and isinstance(change, Mapping)):
        return change
    both = {key: _merged(described.get(key), change[key]) if key in change else value for key, value in described.items()}
    return both | {key: value for key, value in change.items() if key not in described}
