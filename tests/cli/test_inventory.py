"""`tatami volumes` and `tatami snapshots`: run as a process beside a driver that serves the same pools."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from csi_driver.rpc import csi_pb2 as csi
from tests.cli.trials import REPOSITORY, SECONDS
from tests.driver_process import DriverProcess, write_pools
from tests.storm.client import Client, create_volume

DAMAGED_ID = "a" * 26


class Site:
    """A driver with two pools, a volume of 50 files, and what can be asked on the command line."""

    def __init__(self, home):
        write_pools(home, "default_pool = 'default'")
        with (home / "pools.toml").open("a") as config:
            config.write(f'[pools.other]\npath = "{home}/pools/other"\n')
        self.home = home
        self.pool = home / "pools/default"
        self.driver = DriverProcess(home).start()
        self.client = Client(self.driver.endpoint)
        self.volume = self.create("pvc-1")
        top = next(path for path in self.pool.iterdir() if path.name in self.volume)
        for number in range(50):
            (top / f"file-{number}").write_bytes(b"%d" % number * 1000)
        (top / "odd\nname").write_bytes(b"content")
        self.snapshot = self.snap("snap-1", self.volume)

    def create(self, name, **source):
        return self.client.call("CreateVolume", create_volume(name, **source)).volume.volume_id

    def snap(self, name, volume):
        return self.client.call(
            "CreateSnapshot", csi.CreateSnapshotRequest(name=name, source_volume_id=volume)
        ).snapshot.snapshot_id

    def argv(self, *arguments):
        where = ["--config", str(self.home / "pools.toml"), "--node-id", "node-1"]
        return [sys.executable, "-m", "csi_driver", *arguments[:2], *where, *arguments[2:]]

    def run(self, *arguments, code=0):
        done = subprocess.run(
            self.argv(*arguments), cwd=REPOSITORY, capture_output=True, text=True, timeout=SECONDS, check=False
        )
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done

    def json(self, *arguments, code=0):
        return json.loads(self.run(*arguments, "--output", "json", code=code).stdout)

    def content(self, name):
        return self.pool / ".csi/snapshots-data" / self.snapshot.rpartition(".")[2] / name

    def flip_a_byte(self, name):
        """As a disk does: neither the size nor a time shows it."""
        path = self.content(name)
        status, data = path.stat(), bytearray(path.read_bytes())
        data[0] ^= 1
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def damage(self, kind):
        (self.pool / f".csi/{kind}/{DAMAGED_ID}.json").write_text("nonsense")

    def close(self):
        self.client.close() if hasattr(self.client, "close") else self.client.channel.close()
        self.driver.close()


@pytest.fixture
def site(tmp_path):
    made = Site(tmp_path)
    yield made
    made.close()


def rows(text):
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


# --- list and show ----------------------------------------------------------------------------------------------------------------


def test_a_volume_is_shown_with_what_its_pv_says_of_its_limit(site):
    context = dict(site.client.call("CreateVolume", create_volume("held")).volume.volume_context)
    (shown,) = [volume for volume in site.json("volumes", "list") if volume["name"] == "held"]
    assert (shown["limiter"], shown["limit"]) == (context["limiter"], context["limit"])
    assert context["limit"] in site.run("volumes", "show", shown["handle"]).stdout


def test_volumes_are_listed_with_what_matters_of_them(site):
    restored = site.create("pvc-2", snapshot=site.snapshot)
    publish = csi.ControllerPublishVolumeRequest(
        volume_id=restored, node_id="node-1", volume_capability=create_volume("x").volume_capabilities[0]
    )
    site.client.call("ControllerPublishVolume", publish)
    head, *found = rows(site.run("volumes", "list").stdout)
    assert head == ["HANDLE", "NAME", "SIZE", "LIMITER", "MADE BY", "PUBLISHED TO", "ON DELETE", "PHASE"]
    assert sorted(row[1:] for row in found) == [
        ["pvc-1", "1.0 MiB", "none", "-", "-", "delete", "ready"],
        ["pvc-2", "1.0 MiB", "none", "copy_file_range", "node-1", "delete", "ready"],
    ]
    by_name = {each["name"]: each for each in site.json("volumes", "list")}
    assert by_name["pvc-2"]["source"] == {"kind": "snapshot", "handle": site.snapshot}
    assert by_name["pvc-2"]["published"][0]["node"] == "node-1"
    assert by_name["pvc-2"]["capture"]["files"] == 51
    shown = site.run("volumes", "show", "pvc-2").stdout
    assert f"made from:    snapshot {site.snapshot}" in shown
    assert "node-1 (SINGLE_NODE_MULTI_WRITER)" in shown
    assert site.json("volumes", "show", restored) == by_name["pvc-2"]


def test_snapshots_are_listed_with_how_they_were_made(site):
    head, row = rows(site.run("snapshots", "list").stdout)
    assert head[4:9] == ["CONSISTENCY", "MADE BY", "NOT CARRIED", "DIGESTS", "PHASE"]
    assert row[:3] == [site.snapshot, "snap-1", "1.0 MiB"]
    assert row[4:] == ["file by file", "copy_file_range", "-", "no", "ready", site.volume]
    (found,) = site.json("snapshots", "list")
    assert (found["volume"], found["size_bytes"], found["digests"]) == (site.volume, 1024**2, None)
    assert site.json("snapshots", "list", "--volume", site.volume) == [found]
    assert site.json("snapshots", "list", "--volume", "another") == []
    for text in ("snap-1", site.snapshot, site.snapshot.rpartition(".")[2]):
        assert site.json("snapshots", "show", text) == found
    assert "consistency: file by file" in site.run("snapshots", "show", "snap-1").stdout


def test_what_a_capture_could_not_carry_is_shown(site):
    record = site.pool / f".csi/snapshots/{site.snapshot.rpartition('.')[2]}.json"
    body = json.loads(record.read_bytes())
    body["capture"]["not_carried"] = {"acl": 2, "device": 1}
    record.write_text(json.dumps(body))
    assert rows(site.run("snapshots", "list").stdout)[1][6] == "3"
    assert "not carried: 2 acl, 1 device" in site.run("snapshots", "show", "snap-1").stdout


def test_a_damaged_record_is_a_row_that_says_so(site):
    site.damage("snapshots")
    site.damage("volumes")
    for kind in ("snapshots", "volumes"):
        assert "damaged" in next(row for row in rows(site.run(kind, "list").stdout) if DAMAGED_ID in row[0])
        found = next(each for each in site.json(kind, "list") if each["phase"] == "damaged")
        assert found["handle"].endswith(DAMAGED_ID)
        assert f"{DAMAGED_ID}.json is damaged" in found["error"]
        assert site.json(kind, "show", DAMAGED_ID, code=1) == found
    assert site.json("snapshots", "verify", DAMAGED_ID, code=1)[0]["outcome"] == "damaged"


def test_one_pool_can_be_asked_alone(site):
    assert [each["name"] for each in site.json("volumes", "list", "--pool", "default")] == ["pvc-1"]
    assert site.json("volumes", "list", "--pool", "other") == []
    assert site.json("volumes", "list", "--pool", "other", "--pool", "default")
    assert "there are the pools default, other" in site.run("volumes", "list", "--pool", "third", code=2).stderr


def test_a_pool_that_is_not_there_is_named_and_the_others_are_shown(site):
    (site.home / "pools/other/.csi").rename(site.home / "away")
    done = site.run("volumes", "list", code=1)
    assert "pvc-1" in done.stdout
    assert "pool other has no" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("snapshots", "show", "nobody"), 2, "there is no snapshot 'nobody' in default, other"),
        (("volumes", "show", "\x1b[31m"), 2, r"there is no volume '\x1b[31m'"),
        (("snapshots", "show", "nopool." + "a" * 26), 1, "which is not configured here"),
        (("snapshots", "show", "default.aaaaaaaaaa." + "a" * 26), 1, "lives on another node"),
        (("snapshots", "verify"), 2, "Missing argument"),
        (("snapshots", "verify", "snap-1", "nobody"), 2, "there is no snapshot 'nobody'"),
    ],
)
def test_what_is_typed_wrongly_is_named(site, arguments, code, words):
    done = site.run(*arguments, code=code)
    assert (done.stdout, words in done.stderr) == ("", True), done.stderr


def test_looking_needs_no_driver_and_changes_nothing(site):
    assert site.driver.stop() == 0
    before = {path: path.lstat().st_mtime_ns for path in site.pool.rglob("*")}
    site.run("volumes", "list")
    site.run("snapshots", "show", "snap-1")
    assert {path: path.lstat().st_mtime_ns for path in site.pool.rglob("*")} == before


# --- verify -----------------------------------------------------------------------------------------------------------------------


def test_verify_makes_digests_once_and_finds_what_has_changed_since(site):
    first = site.run("snapshots", "verify", "snap-1").stdout
    assert first.startswith(f"{site.snapshot}: digests made: 51 files, ")
    assert site.json("snapshots", "show", "snap-1")["digests"]["files"] == 51
    assert site.run("snapshots", "verify", site.snapshot).stdout.startswith(f"{site.snapshot}: whole: 51 files, ")
    site.flip_a_byte("file-7")
    site.content("file-8").unlink()
    site.content("more").touch()
    (found,) = site.json("snapshots", "verify", "snap-1", code=1)
    assert found["outcome"] == "damaged"
    assert found["differences"] == [
        {"what": "changed", "path": "file-7"},
        {"what": "missing", "path": "file-8"},
        {"what": "unexpected", "path": "more"},
    ]
    shown = site.run("snapshots", "verify", "snap-1", code=1).stdout
    assert "damaged: 51 files" in shown
    assert "  changed     file-7\n" in shown
    assert os.listdir(site.pool / ".csi/manifests") == [site.snapshot.rpartition(".")[2]]


def test_verify_tells_of_each_and_the_worst_is_the_exit_code(site):
    site.snap("snap-2", site.volume)
    site.run("snapshots", "verify", "snap-1", "snap-2")
    site.flip_a_byte("file-1")
    found = site.json("snapshots", "verify", "snap-2", "snap-1", code=1)
    assert [each["outcome"] for each in found] == ["whole", "damaged"]


def test_a_manifest_that_was_changed_is_damage_too(site):
    site.run("snapshots", "verify", "snap-1")
    manifest = site.pool / ".csi/manifests" / site.snapshot.rpartition(".")[2]
    manifest.write_bytes(manifest.read_bytes().replace(b"file-7", b"file-X"))
    (found,) = site.json("snapshots", "verify", "snap-1", code=1)
    assert "manifest of snapshot" in found["error"]


def test_what_is_locked_by_the_driver_is_not_verified_and_that_is_not_damage(site):
    """As while the driver deletes it: the lock file is what two processes agree by."""
    from csi_driver.linux.byte_range_locks import ByteRangeLocks
    from csi_driver.volumes.locks import _offset

    control = os.open(site.pool / ".csi", os.O_RDONLY)
    with ByteRangeLocks(control, "lock").try_hold(_offset(f"content:{site.snapshot.rpartition('.')[2]}")):
        (found,) = site.json("snapshots", "verify", "snap-1", code=2)
    os.close(control)
    assert found["outcome"] == "not verified"


def test_a_snapshot_cannot_be_deleted_while_it_is_verified_and_ctrl_c_leaves_nothing(site):
    # Behind a write lease whoever opens the file waits (fcntl(2)): nobody is so quick that nothing can be seen of it.
    told = signal.signal(signal.SIGIO, signal.SIG_IGN)
    leased = os.open(site.content("leased"), os.O_RDWR | os.O_CREAT)
    fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    running = subprocess.Popen(site.argv("snapshots", "verify", "snap-1"), cwd=REPOSITORY, stdout=slave, stderr=slave)
    os.close(slave)
    shown = read_until(master, r" [1-9][0-9]* files", 30)
    assert re.search(r"[1-9][0-9.]*/[0-9.]+ *KiB", re.sub(r"\x1b\[[0-9;]*m", "", shown)), shown
    with pytest.raises(Exception, match="it is being verified"):
        site.client.call("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=site.snapshot))
    running.send_signal(signal.SIGINT)
    assert "stopped, nothing was compared" in read_until(master, "compared", 30)
    assert running.wait(20) == 130
    os.close(master)
    os.close(leased)
    signal.signal(signal.SIGIO, told)
    assert os.listdir(site.pool / ".csi/manifests") == []
    site.client.call("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=site.snapshot))


def test_colours_are_for_terminals_only(site):
    assert "\x1b" not in site.run("snapshots", "list").stdout
    master, slave = pty.openpty()
    subprocess.run(site.argv("snapshots", "list"), cwd=REPOSITORY, stdout=slave, check=True, timeout=SECONDS)
    os.close(slave)
    assert "\x1b[32mready" in read_until(master, "ready", 10)
    os.close(master)


def read_until(descriptor, pattern, seconds):
    until, shown = time.monotonic() + seconds, ""
    while time.monotonic() < until and not re.search(pattern, shown):
        if select.select([descriptor], [], [], 0.1)[0]:
            try:
                shown += os.read(descriptor, 65536).decode(errors="replace")
            except OSError:  # EIO: the other side was closed
                break
    return shown
