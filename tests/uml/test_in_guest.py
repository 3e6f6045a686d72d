"""Every directory below guest_tests/ is a group: one boot of a guest, one test here, a subtest for each test inside.

Two guests are at work at once, for two cores, whichever is reported. A group that measures time runs alone, after the others.
"""

import os
import pathlib
import subprocess
import sys
import threading
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
    names = sorted({path.parent.name for path in GROUPS.glob("*/test_*.py")}, key=lambda name: (runs_alone(name), name))
    return [pytest.param(name, marks=pytest.mark.timeout(options(name)["timeout"] + 60)) for name in names]


class Guests:
    """The guests of this run. A thread boots them in the order of the tests, the next one as soon as there is room beside the others."""

    def __init__(self, names):
        self._guests = {name: self._made(name) for name in names}
        self._closing = threading.Event()
        self._boots = threading.Thread(target=self._boot_all, name="boots", daemon=True)
        self._boots.start()

    @staticmethod
    def _made(group):
        path = (GROUPS / group).relative_to(guest.CHECKOUT)
        return guest.Guest(guest.pytest_job(["-v", str(path)], **options(group)))

    def _boot_all(self):
        at_work = {}
        for group, mine in self._guests.items():
            while not has_room(group, at_work):
                if self._closing.wait(0.1):
                    return
                at_work = {name: other for name, other in at_work.items() if not other.ended}
            at_work[group] = mine.start()

    def __getitem__(self, group):
        """Return the group's guest, which may have been at work for long, or begin when others have ended."""
        return self._guests[group]

    def close(self):
        """Kill and remove all."""
        self._closing.set()
        self._boots.join()
        for mine in self._guests.values():
            mine.close()


def has_room(group, at_work):
    """Tell whether the group's guest may begin beside those at work."""
    return len(at_work) < AT_ONCE and not (at_work and any(map(runs_alone, (group, *at_work))))


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
    yield guests[group]
    guests[group].close()


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
