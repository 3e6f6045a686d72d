import os
import signal
import sys
import time

import pytest

from csi_driver.errors import DeadlineExceeded
from csi_driver.linux import commands
from csi_driver.linux.commands import CommandFailed, CommandMissing, run, stuck_children


def python(source):
    return [sys.executable, "-I", "-S", "-c", source]


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def test_a_command_answers_with_both_streams_and_its_exit_code():
    completed = run(["sh", "-c", "echo out; echo err >&2; exit 3"], timeout=10, check=False)
    assert (completed.returncode, completed.stdout, completed.stderr) == (3, "out\n", "err\n")


def test_a_failure_names_the_command_the_exit_code_and_the_last_lines_of_stderr():
    with pytest.raises(CommandFailed) as failed:
        run(["sh", "-c", "echo result; for line in first a b last; do echo $line >&2; done; exit 32"], timeout=10)
    assert failed.value.returncode == 32
    assert failed.value.stdout == "result\n"
    assert "sh -c" in str(failed.value)
    assert "exited with 32: a | b | last" in str(failed.value)
    assert "first" not in str(failed.value).split("exited")[1]


def test_a_command_killed_by_a_signal_says_so():
    with pytest.raises(CommandFailed, match="killed by signal 15"):
        run(["sh", "-c", "kill -TERM $$"], timeout=10)


@pytest.mark.parametrize("name", ["no-such-command-anywhere", "/etc/passwd", "/etc/passwd/mkfs"])
def test_what_cannot_be_started_is_named(name):
    with pytest.raises(CommandMissing, match=name):
        run([name], timeout=10)


def test_arguments_never_meet_a_shell():
    hostile = "$(touch /tmp/x); `id` * 'a' \"b\" \n -rf"
    assert run(["printf", "%s", hostile], timeout=10).stdout == hostile


def test_messages_are_in_the_c_locale_in_a_session_of_its_own_away_from_the_drivers_directory(monkeypatch):
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.setenv("LANGUAGE", "de")
    source = "import os; print(os.environ['LC_ALL'], os.environ['LANGUAGE'], os.getsid(0) == os.getpid(), os.getcwd())"
    assert run(python(source), timeout=10).stdout == "C C True /\n"


def test_open_descriptors_of_the_driver_stay_in_the_driver(tmp_path):
    with (tmp_path / "file").open("w"):
        listing = run(["ls", "-l", "/proc/self/fd"], timeout=10).stdout
    assert str(tmp_path) not in listing


def test_input_larger_than_a_pipe_goes_in_while_output_comes_out():
    data = os.urandom(300_000).hex().encode()
    assert run(["cat"], timeout=30, stdin=data).stdout == data.decode()


def test_a_command_that_does_not_read_its_input_is_no_failure():
    assert run(["true"], timeout=10, stdin=b"x" * 1_000_000).returncode == 0


def test_without_input_a_command_reads_nothing_instead_of_waiting():
    assert run(["cat"], timeout=10).stdout == ""


def test_names_that_are_not_utf8_survive_in_the_output():
    assert os.fsencode(run(["printf", r"\377name"], timeout=10).stdout) == b"\xffname"


def test_errors_that_are_not_utf8_can_be_printed():
    with pytest.raises(CommandFailed) as failed:
        run(["sh", "-c", r"printf '\377\n' >&2; exit 1"], timeout=10)
    assert r"\xff" in str(failed.value)
    str(failed.value).encode("ascii")


def test_endless_output_is_stopped_and_is_no_answer():
    started = time.monotonic()
    with pytest.raises(CommandFailed, match="printed more than"):
        run(["yes"], timeout=60, check=False)
    assert time.monotonic() - started < 30
    wait_until(lambda: stuck_children() == 0)


def test_of_a_long_stderr_the_end_is_kept():
    source = f"import sys; sys.stderr.write('x' * {3 * commands.OUTPUT_LIMIT} + 'the reason'); sys.exit(1)"
    with pytest.raises(CommandFailed) as failed:
        run(python(source), timeout=30)
    assert failed.value.stderr.endswith("xthe reason")
    assert len(failed.value.stderr) == commands.OUTPUT_LIMIT


def test_the_deadline_kills_the_whole_process_group(tmp_path):
    pid_file = tmp_path / "pid"
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"killed after 0\.5 s"):
        run(["sh", "-c", f"sleep 600 & echo $! > {pid_file}; wait"], timeout=0.5)
    assert time.monotonic() - started < 5
    grandchild = int(pid_file.read_text())
    wait_until(lambda: not is_running(grandchild))
    wait_until(lambda: stuck_children() == 0)


def test_a_command_that_closes_its_streams_is_still_held_to_the_deadline():
    with pytest.raises(DeadlineExceeded):
        run(python("import os, time; os.close(1); os.close(2); time.sleep(600)"), timeout=0.5)


def test_a_daemon_left_behind_neither_delays_the_answer_nor_dies(tmp_path):
    pid_file = tmp_path / "pid"
    started = time.monotonic()
    completed = run(["sh", "-c", f"sleep 600 & echo $! > {pid_file}; echo mounted"], timeout=60)
    assert completed.stdout == "mounted\n"
    assert time.monotonic() - started < 10
    daemon = int(pid_file.read_text())
    try:
        assert is_running(daemon)
    finally:
        os.kill(daemon, signal.SIGKILL)


def test_no_descriptor_is_left_open_whatever_happens():
    run(["true"], timeout=10)
    before = len(os.listdir("/proc/self/fd"))
    for argv in (["true"], ["false"], ["no-such-command"], ["sleep", "600"], ["yes"]):
        with pytest.raises(Exception) if argv != ["true"] else open(os.devnull):
            run(argv, timeout=0.5 if argv[0] == "sleep" else 30, stdin=b"x")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.root
def test_a_child_that_not_even_sigkill_can_end_is_left_to_the_reaper(dead_filesystem):
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        run(["ls", f"{dead_filesystem.path}/x"], timeout=2)
    assert time.monotonic() - started < 6
    time.sleep(1)  # ample for a SIGKILL to work where it can
    assert stuck_children() == 1
    assert run(["echo", "others go on"], timeout=10).stdout == "others go on\n"
    dead_filesystem.give_up()
    wait_until(lambda: stuck_children() == 0)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
