"""Every directory below guest_tests/ is a group: one boot of a guest, one test here, a subtest for each test inside (groups.py)."""

import os
import pathlib
import subprocess
import sys
import xml.etree.ElementTree as ET

import guest
import psutil
import pytest
from groups import group_parameters


@pytest.fixture
def booted(guests, group):
    mine = guests.asked_for(group)
    yield mine
    mine.close()


@pytest.mark.minutes
@pytest.mark.root
@pytest.mark.parametrize("group", group_parameters())
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
