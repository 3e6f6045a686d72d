"""Every directory below guest_tests/ is a group: one boot of a guest, one test here, a subtest for each test inside.

While one group is reported, the next one runs already: two guests, for two cores. A group that measures time runs alone.
"""

import os
import pathlib
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ET

import guest
import psutil
import pytest

GROUPS = pathlib.Path(__file__).parent / "guest_tests"
AT_ONCE = min(2, os.cpu_count() or 1)


def options(group):
    """Return what a group says in its guest.toml: `memory` in MiB, `timeout` in seconds; both may be missing."""
    file = GROUPS / group / "guest.toml"
    given = tomllib.loads(file.read_text()) if file.exists() else {}
    return {"memory": given.get("memory", guest.Job.memory >> 20) << 20, "timeout": given.get("timeout", guest.Job.timeout)}


def runs_alone(group):
    """Tell whether a group says `alone = true`: another guest beside it would be measured, too."""
    file = GROUPS / group / "guest.toml"
    return file.exists() and tomllib.loads(file.read_text()).get("alone", False)


def groups():
    """Return a parameter for each group; pytest's own timeout comes after the guest's, which knows what to show."""
    names = sorted(path.parent.name for path in GROUPS.glob("*/test_*.py"))
    return [pytest.param(name, marks=pytest.mark.timeout(options(name)["timeout"] + 60)) for name in dict.fromkeys(names)]


class Guests:
    """The guests of this run, started in the order of the tests, at most AT_ONCE at a time."""

    def __init__(self, names):
        self._waiting = list(names)
        self._running = {}

    def take(self, group):
        """Return the group's guest, booted, and boot the next ones beside it."""
        if group not in self._running:
            self._waiting.remove(group)
            self._boot(group)
        while self._waiting and len(self._running) < AT_ONCE and not runs_alone(group) and not runs_alone(self._waiting[0]):
            self._boot(self._waiting.pop(0))
        return self._running[group]

    def _boot(self, group):
        path = (GROUPS / group).relative_to(guest.CHECKOUT)
        self._running[group] = guest.Guest(guest.pytest_job(["-v", str(path)], **options(group))).start()

    def done(self, group):
        """Kill and remove a guest."""
        if group in self._running:
            self._running.pop(group).close()

    def close(self):
        """Kill and remove all."""
        for group in list(self._running):
            self.done(group)


@pytest.fixture(scope="session")
def guests(request):
    if os.geteuid() != 0:
        pytest.skip("booting a guest that binds this machine's root directory needs root")
    guest.install()
    guest.remove_leftovers()
    guests = Guests(
        item.callspec.params["group"] for item in request.session.items if "guests" in getattr(item, "fixturenames", ())
    )
    yield guests
    guests.close()


@pytest.fixture
def booted(guests, group):
    yield guests.take(group)
    guests.done(group)


@pytest.mark.minutes
@pytest.mark.root
@pytest.mark.parametrize("group", groups())
def test_in_guest(group, booted, subtests):
    for line in booted.follow():
        print(line, flush=True)
    code = booted.exit_code()
    if code:
        print("the guest's kernel said:", *booted.kernel_log.splitlines()[-40:], sep="\n")
    for case in ET.parse(booted.junit).iter("testcase"):
        with subtests.test(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"):
            for bad in [*case.iter("failure"), *case.iter("error")]:
                pytest.fail(bad.text or bad.get("message", ""), pytrace=False)
            for skipped in case.iter("skipped"):
                pytest.skip(skipped.get("message", ""))
    assert code == 0, f"pytest ended with {code} in the guest"


@pytest.mark.root
def test_a_guest_that_does_not_end_is_killed_at_its_deadline_and_leaves_nothing(tmp_path, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    guest.install()
    monkeypatch.setattr(guest.tempfile, "tempdir", str(tmp_path))
    with guest.Guest(guest.Job(command=["sh", "-c", "sleep 1000 & echo here; wait"], timeout=15)) as endless:
        lines = []
        for line in endless.follow():
            lines.append(line)
            if line == "here":
                family = psutil.Process(endless._process.pid).children(recursive=True)
        with pytest.raises(guest.GuestDied, match="deadline of 15 s"):
            endless.exit_code()
    assert "here" in lines
    assert endless.seconds < 25
    # The kernel, its disk, and a process for each of the guest's.
    assert len(family) > 5
    assert not [process for process in family if process.is_running()]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
def test_a_guest_dies_with_the_process_that_started_it(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    guest.install()
    command = [sys.executable, guest.__file__, "--timeout", "60", "--command", "--", "sh", "-c", "echo here; sleep 1000"]
    starter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)})
    while starter.stdout.readline() not in ("here\n", ""):
        pass
    family = psutil.Process(starter.pid).children(recursive=True)
    assert len(family) > 5
    starter.kill()
    starter.communicate()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


@pytest.mark.root
def test_the_guest_cannot_write_to_the_machine(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root")
    guest.install()
    script = f"touch /usr/intruder /host/intruder /host{tmp_path}/intruder {guest.CHECKOUT}/intruder /opt/intruder; touch /etc/mine && exit 7"
    with guest.Guest(guest.Job(command=["sh", "-c", script], timeout=60)) as curious:
        assert curious.exit_code() == 7
    for place in ("/usr", "/", tmp_path, guest.CHECKOUT, "/opt"):
        assert not (pathlib.Path(place) / "intruder").exists()
    assert not pathlib.Path("/etc/mine").exists()
