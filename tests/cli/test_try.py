"""The trial: that it shows what it says, and that nothing of it is left or seen outside its directory."""

import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

from tests.cli.trials import REPOSITORY, SECONDS, event, mounts_of, processes_of, wait_until

LIFE = [
    *("CreateVolume", "ControllerPublishVolume", "NodeStageVolume", "NodePublishVolume", "write", "NodePublishVolume", "write"),
    *("CreateSnapshot", "write", "CreateVolume", "read", "CreateVolume", "read", "ControllerExpandVolume"),
    *("NodeGetVolumeStats", "GetCapacity", "NodeGetVolumeHealth", "ListVolumes", "DeleteVolume", "CreateVolume"),
    *("DeleteVolume", "DeleteVolume", "DeleteSnapshot", "NodeUnpublishVolume", "NodeUnpublishVolume", "NodeUnstageVolume"),
    *("ControllerUnpublishVolume", "DeleteVolume", "mountinfo"),
]
REFUSED = {"EROFS", "FAILED_PRECONDITION", "INVALID_ARGUMENT"}


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


# --- what is shown ----------------------------------------------------------------------------------------------------------------


def test_plain_output_shows_each_step_with_question_answer_place_and_time(anybodys):
    done = anybodys.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^ *\d+\. (\w+): .* \d+\.\d ms$", done.stdout, re.MULTILINE) == LIFE
    blocks = re.split(r"\n(?= *\d+\. )", done.stdout)[1:]
    for number, block in enumerate(blocks, 1):
        assert block.lstrip().startswith(f"{number}. ")
        assert re.search(r"^      asked     \S", block, re.MULTILINE)
        assert re.search(r"^      (answered|refused )  \S", block, re.MULTILINE)
    assert "\x1b" not in done.stdout
    assert f"All {len(LIFE)} steps went as they should" in done.stdout
    assert mounts_of(anybodys.home) == []
    assert processes_of(anybodys.home) == []


def test_json_output_is_one_object_a_line_with_the_messages_themselves(anybodys):
    done = anybodys.run("--output", "json")
    assert done.returncode == 0
    told = lines_of(done.stdout)
    assert [each["event"] for each in told] == ["started", *["step"] * len(LIFE), "completed", "stopped"]
    steps = [each for each in told if each["event"] == "step"]
    assert [step["call"] for step in steps] == LIFE
    assert [step["number"] for step in steps] == list(range(1, len(LIFE) + 1))
    assert all(step["expected"] for step in steps)
    assert {step["code"] for step in steps} == {"OK", *REFUSED}
    created, restored, cloned = (step for step in steps if step["call"] == "CreateVolume" and step["code"] == "OK")
    assert created["request"]["capacity_range"] == {"required_bytes": str(64 << 20)}
    assert restored["response"]["volume"]["content_source"]["snapshot"]["snapshot_id"]
    assert cloned["response"]["volume"]["content_source"]["volume"]["volume_id"] == created["response"]["volume"]["volume_id"]
    assert [step["answered"] for step in steps if step["call"] == "read"] == ["'first version'", "'second version'"]
    assert all(Path(step["path"]).is_relative_to(anybodys.directory) for step in steps if step["path"])
    assert all(0 <= step["seconds"] < 30 for step in steps)


def test_an_ordinary_user_needs_a_user_namespace_and_root_does_not(anybodys):
    told = lines_of(anybodys.run("--output", "json").stdout)[0]
    is_root = os.geteuid() == 0 and not anybodys.rootless
    assert told["mounts"].startswith("as root" if is_root else "as an ordinary user")


def test_on_a_terminal_colours_are_used_and_no_step_is_wider_than_it(trials):
    for columns in (80, 120):
        output, code = on_a_terminal(columns, trials.argv("try", "--directory", str(trials.directory)))
        assert code == 0, output
        assert "\x1b[" in output
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).replace(
            "\r", "\n"
        )  # a spinner goes back and writes its line anew
        for call in LIFE:
            assert re.search(rf"✔ +\d+\. {call}  ", plain)
        steps = plain.partition("The driver serves until")[0]
        assert max(map(len, steps.splitlines())) <= columns
        assert output.rstrip().endswith(f"the files are in {trials.directory}")
        assert "\x1b[?25h" in output.rpartition("\x1b[?25l")[2], "the cursor stayed hidden"


def on_a_terminal(columns, argv):
    """Run a command on a terminal and type Ctrl-C once it serves; return what it printed and its exit code."""
    ours, theirs = pty.openpty()
    ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("COLUMNS", "LINES", "NO_COLOR"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])",
            *argv,
        ],
        cwd=REPOSITORY,
        env=environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen, typed = b"", False
    while True:
        try:
            seen += os.read(ours, 65536)
        except OSError:  # EIO: nobody has the terminal open any more
            break
        if b"until Ctrl-C." in seen and not typed:
            typed = bool(os.write(ours, b"\x03"))
    os.close(ours)
    return seen.decode(), process.wait(SECONDS)


# --- how it ends ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_it_serves_leaves_no_mount_and_no_process(anybodys, number):
    process, serving = anybodys.serving()
    target = anybodys.mount_a_volume()
    assert str(target) in mounts_of(anybodys.directory, serving["pid"])
    assert mounts_of(anybodys.directory) == [], "a mount of the trial is seen outside of it"
    process.send_signal(number)
    assert lines_of(process.communicate(timeout=SECONDS)[0]) == [{"event": "stopped"}]
    assert process.returncode == 0
    assert processes_of(anybodys.directory) == []
    assert mounts_of(anybodys.directory) == []
    assert list(target.iterdir()) == []


def test_kill_9_leaves_no_mount_and_no_process(anybodys):
    process, serving = anybodys.serving()
    target = anybodys.mount_a_volume()
    assert str(target) in mounts_of(anybodys.directory, serving["pid"])
    process.kill()
    process.wait(SECONDS)
    wait_until(lambda: processes_of(anybodys.directory) == [])
    assert mounts_of(anybodys.directory) == []
    again = anybodys.run()
    assert again.returncode == 0, again.stdout + again.stderr


def test_ctrl_c_amid_the_steps_takes_away_what_they_made(anybodys):
    # The pipe holds a few lines only, so the trial stands still in the midst of its steps until somebody reads.
    process = anybodys.start(pipe_bytes=4096)
    while (told := json.loads(process.stdout.readline())).get("call") != "NodePublishVolume":
        pass
    assert told["code"] == "OK"
    process.send_signal(signal.SIGINT)
    rest = lines_of(process.communicate(timeout=SECONDS)[0])
    assert process.returncode == 130
    assert rest[-1] == {"event": "stopped"}
    assert "completed" not in {each["event"] for each in rest}
    control = anybodys.directory / "pool" / ".csi"
    assert [name for folder in ("volumes", "snapshots") for name in os.listdir(control / folder)] == []
    assert [name for name in os.listdir(anybodys.directory / "pool") if name != ".csi"] == []
    assert processes_of(anybodys.directory) == []


def test_a_driver_that_dies_is_reported_with_its_last_words(trials):
    process, serving = trials.serving()
    os.kill(serving["pid"], signal.SIGKILL)
    failed, stopped = lines_of(process.communicate(timeout=SECONDS)[0])
    assert process.returncode == 1
    assert "signal 9" in failed["error"]
    assert "call done" in failed["error"]
    assert f"{trials.directory}/driver.log" in failed["error"]
    assert stopped == {"event": "stopped"}


def test_a_second_trial_in_the_same_directory_is_refused_and_the_first_serves_on(trials):
    process, _ = trials.serving()
    second = trials.run()
    assert second.returncode == 1
    assert "another trial serves" in second.stderr
    assert trials.call("Probe") == {"ready": True}
    process.send_signal(signal.SIGINT)
    event(process, "stopped")


def test_a_directory_can_be_used_again(trials):
    assert [trials.run().returncode for _ in range(2)] == [0, 0]


# --- what it keeps away from --------------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_nothing_outside_its_directory_is_written(trials):
    layers = trials.home / "layers"
    binds = dict.fromkeys(map(str, (REPOSITORY, sys.prefix, sys.base_prefix)), "ro")
    script = f"""
        mkdir {layers}; mount -t tmpfs layers {layers}; mkdir {layers}/upper {layers}/work {layers}/root
        mkdir -p {trials.directory}
        mount -t overlay -o lowerdir=/,upperdir={layers}/upper,workdir={layers}/work overlay {layers}/root
        for place in /proc /dev /sys {" ".join(binds)} {trials.directory}; do mount --rbind $place {layers}/root$place; done
        find {layers}/upper | sort > {trials.home}/before
        chroot {layers}/root sh -ec 'cd {REPOSITORY}; HOME=/root exec "$@"' sh "$@"
        find {layers}/upper | sort > {trials.home}/after
    """
    done = trials.run(prefix=("unshare", "--mount", "sh", "-ec", script, "sh"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "steps went as they should" in done.stdout
    assert (trials.home / "after").read_text() == (trials.home / "before").read_text()
    assert sorted(os.listdir(trials.directory)) == ["driver.log", "kubelet", "pool", "pools.toml"]


def test_a_directory_with_other_files_is_refused_and_left_as_it_is(trials):
    trials.directory.mkdir()
    (trials.directory / "thesis.txt").write_text("ten years of work")
    done = trials.run()
    assert done.returncode == 1
    assert "holds files that are not a trial's" in done.stderr
    assert os.listdir(trials.directory) == ["thesis.txt"]


def test_settings_of_a_real_driver_do_not_reach_it(trials):
    done = trials.run(TATAMI_ROLE="controller", TATAMI_ENDPOINT="unix:///nowhere/csi.sock", TATAMI_CONFIG="/nowhere.toml")
    assert done.returncode == 0, done.stdout + done.stderr


# --- what can be in the way ---------------------------------------------------------------------------------------------------------


def test_a_directory_with_unusual_letters_works(trials):
    done = trials.run(directory=trials.home / 'a "b" %20 ü')
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_path_too_long_for_a_socket_is_explained(trials):
    directory = trials.home / ("d" * 100)
    done = trials.run(directory=directory)
    assert done.returncode == 1
    assert f"{len(str(directory / 'csi.sock'))} bytes" in done.stderr
    assert "at most 107 bytes" in done.stderr
    assert not directory.exists()


def test_a_driver_that_cannot_start_says_why(trials):
    assert trials.run().returncode == 0
    (trials.directory / "pool").rename(trials.directory / "moved")
    (trials.directory / "pool").write_text("not a directory")
    done = trials.run()
    assert done.returncode == 1
    assert "the driver did not start" in done.stderr
    assert "cannot be made a directory" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_without_any_namespace_it_says_what_to_do(trials):
    # In a user namespace of the test's own, further ones can be forbidden without a trace outside of it.
    script = 'echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --inh-caps=-all --bounding-set=-all "$@"'
    done = trials.run(prefix=("unshare", "--user", "--map-root-user", "sh", "-ec", script, "sh"))
    assert done.returncode == 1
    assert "run it as root" in done.stderr
    assert "user.max_user_namespaces" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (trials.directory / "driver.log").exists()
