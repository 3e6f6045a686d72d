"""The groups of guest tests, and their guests: two are at work from the beginning of a run on, beside the tests of the machine itself.

Guests wait much of their time, for servers to come back and leases to run out, and so do the machine's own long tests. A group that
measures time runs alone, after all others.
"""

import os
import pathlib
import threading
import tomllib
from collections.abc import Iterable

import guest
import pytest

GROUPS = pathlib.Path(__file__).parent / "guest_tests"
AT_ONCE = min(2, os.cpu_count() or 1)


def group_parameters():
    """Return a parameter for each group; pytest's own timeout comes after the guest's, which knows what to show."""
    names = sorted({path.parent.name for path in GROUPS.glob("*/test_*.py")}, key=lambda name: (runs_alone(name), name))
    return [pytest.param(name, marks=pytest.mark.timeout(_options(name)["timeout"] + 60)) for name in names]


def runs_alone(group: str) -> bool:
    """Tell whether a group says `alone = true`: what runs beside it would be measured, too."""
    return _said(group).get("alone", False)


def _options(group: str) -> dict:
    """Return what a group says in its guest.toml: `memory` in MiB, `timeout` in seconds; both may be missing."""
    said = _said(group)
    return {"memory": said.get("memory", guest.Job.memory >> 20) << 20, "timeout": said.get("timeout", guest.Job.timeout)}


def _said(group: str) -> dict:
    file = GROUPS / group / "guest.toml"
    return tomllib.loads(file.read_text()) if file.exists() else {}


class Guests:
    """The guests of a run. A thread boots them in the given order, the next one as soon as there is room beside the others."""

    def __init__(self, groups: Iterable[str]) -> None:
        self._guests = {group: guest.Guest(_job(group)) for group in groups}
        self._asked_for: set[str] = set()
        self._closing = threading.Event()
        self._boots = threading.Thread(target=self._boot_all, name="boots", daemon=True)
        self._boots.start()

    def asked_for(self, group: str) -> guest.Guest:
        """Return the group's guest, which has been at work for long perhaps. One that runs alone begins now."""
        self._asked_for.add(group)
        return self._guests[group]

    def close(self) -> None:
        """Kill and remove all."""
        self._closing.set()
        self._boots.join()
        for mine in self._guests.values():
            mine.close()

    def _boot_all(self) -> None:
        at_work: dict[str, guest.Guest] = {}
        for group, mine in self._guests.items():
            while not self._may_begin(group, at_work):
                if self._closing.wait(0.1):
                    return
                at_work = {name: other for name, other in at_work.items() if not other.ended}
            at_work[group] = mine.start()

    def _may_begin(self, group: str, at_work: Iterable[str]) -> bool:
        if runs_alone(group):
            return group in self._asked_for and not at_work
        return len(at_work) < AT_ONCE and not any(map(runs_alone, at_work))


def _job(group: str) -> guest.Job:
    path = (GROUPS / group).relative_to(guest.CHECKOUT)
    return guest.pytest_job(["-v", str(path)], **_options(group))
