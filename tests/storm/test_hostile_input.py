"""Whatever is asked, the answer is a specific code with a message that helps, the process goes on, and nothing foreign is touched."""

import os
import re
import stat
import subprocess
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import grpc
import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from csi_driver.linux import mountinfo
from csi_driver.rpc import csi_pb2 as csi
from tests.driver_process import DriverProcess, write_pools
from tests.storm.client import METHODS, Client, capability, create_volume
from tests.storm.hostile import FORGED, SECRET, Request, World, foreign_handles, raw_requests, requests, right_requests

pytestmark = [pytest.mark.minutes, pytest.mark.root]

Code = grpc.StatusCode
SPECIFIC = {
    Code.OK,
    Code.INVALID_ARGUMENT,
    Code.NOT_FOUND,
    Code.ALREADY_EXISTS,
    Code.ABORTED,
    Code.OUT_OF_RANGE,
    Code.FAILED_PRECONDITION,
    Code.RESOURCE_EXHAUSTED,
}
"""Not INTERNAL, UNKNOWN or UNIMPLEMENTED. Nor UNAVAILABLE or DEADLINE_EXCEEDED, which no request may bring about on a sound machine."""
HANG_SECONDS = 20
EXAMPLES = int(os.environ.get("TATAMI_HOSTILE_EXAMPLES") or 100)
STARTED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (?:DEBUG|INFO|WARNING|ERROR) ")

bounded = settings(
    deadline=None,
    database=None,
    print_blob=True,
    max_examples=EXAMPLES,
    suppress_health_check=list(HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # shrinking would ask a server that has changed since
)


class Scene:
    """A live driver with volumes, snapshots and mounts, and around them what it must never touch."""

    def __init__(self, home: Path, cleaning: ExitStack):
        self.home = home
        self.answers: dict[str, Counter[str]] = {}
        config = write_pools(home)
        config.write_text(config.read_text() + f'[pools.other]\npath = "{home}/pools/other"\ninline = true\n')
        config.write_text(config.read_text().replace("[driver]\n", '[driver]\ndefault_pool = "default"\n'))
        self.driver = DriverProcess(home, config=config)
        cleaning.callback(self.driver.close)
        self.driver.start()
        self.client = cleaning.enter_context(Client(self.driver.endpoint))
        self.kubelet = self.driver.kubelet
        self.canaries = self._make_canaries(cleaning)
        self.world = self._populate()
        self.before = self.picture()
        self.mounts = foreign_mounts(self.home)

    def _make_canaries(self, cleaning: ExitStack) -> list[Path]:
        outside = self.home / "outside"
        foreign_files = self.kubelet / "foreign-files"
        foreign_mount = self.kubelet / "foreign-mount"
        static = self.home / "pools" / "default" / "static"
        for top in (outside, foreign_files, foreign_mount, static):
            top.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "foreign", str(foreign_mount)], check=True)
        cleaning.callback(subprocess.run, ["umount", str(foreign_mount)], check=False)
        for top in (outside, foreign_files, foreign_mount, static):
            (top / "inner").mkdir(mode=0o751)
            (top / "inner" / "precious").write_text(f"precious in {top}")
            (top / "link").symlink_to(outside)
            os.setxattr(top / "inner", "user.note", b"mine")
            os.utime(top / "inner", (1, 1))
        # What a pod could leave where the kubelet will ask for a mount next.
        (self.kubelet / "way-out").symlink_to(outside)
        (self.kubelet / "file").write_text("a file")
        return [outside, foreign_files, foreign_mount, static, self.kubelet / "file", self.kubelet / "way-out"]

    def _populate(self) -> World:
        (self.kubelet / "pods").mkdir()
        handles = self.ensure()
        staging, target = str(self.kubelet / "staging"), str(self.kubelet / "pods" / "target")
        roots = [str(self.home / "pools" / name) for name in ("default", "other")]
        paths = (
            staging, target, f"{target}/", f"{self.kubelet}//pods/./target", f"{self.kubelet}/pods/second", str(self.kubelet),
            *(str(canary) for canary in self.canaries), f"{self.kubelet}/foreign-files/inner", f"{self.kubelet}/way-out/new", f"{self.kubelet}/file/new",
            f"{self.kubelet}/way-out/inner", f"{self.kubelet}/foreign-mount/inner", f"{target}/inside",
            f"{self.kubelet}/../outside/inner", f"{self.kubelet}/plugins", f"{self.kubelet}/plugins/hostpath.csi.tatami.dev/volumes", *roots,
            f"{roots[0]}/.csi", f"{roots[0]}/.csi/volumes", f"{roots[0]}/new", "/", "/etc", "/tmp", "/proc/self/root/etc", "/dev/null", "relative/path",
        )  # fmt: skip
        everything = (*handles, *foreign_handles(handles[0]), *foreign_handles(handles[2]))
        return World(everything, paths, ("keep", "keep-other", "hostile", "snap", "group", "fresh"), staging, target)

    def ensure(self) -> tuple[str, ...]:
        """Make what has to exist, or find it: a name always becomes the same handle."""
        volume = self.call("CreateVolume", create_volume("keep")).volume.volume_id
        other = self.call("CreateVolume", create_volume("keep-other")).volume.volume_id
        snapshot = self.call(
            "CreateSnapshot", csi.CreateSnapshotRequest(name="snap", source_volume_id=volume)
        ).snapshot.snapshot_id
        request = csi.CreateVolumeGroupSnapshotRequest(name="group", source_volume_ids=[volume, other])
        group = self.call("CreateVolumeGroupSnapshot", request).group_snapshot
        staging = str(self.kubelet / "staging")
        stage = csi.NodeStageVolumeRequest(volume_id=volume, staging_target_path=staging, volume_capability=capability())
        self.client.code("NodeStageVolume", stage)
        return volume, other, snapshot, group.group_snapshot_id, group.snapshots[0].snapshot_id

    def call(self, method: str, request):
        """Make a right call, which may meet the sweeper at work or the leavings of a spoiled request that was right enough."""
        for _ in range(100):
            try:
                return self.client.call(method, request)
            except grpc.RpcError as error:
                if error.code() is not Code.ABORTED:
                    raise AssertionError(f"{method}: {error.code()} {error.details()}") from error
                time.sleep(0.02)
        raise AssertionError(f"{method} stays ABORTED")

    def picture(self) -> dict[str, tuple]:
        """Bytes and metadata (but not the time of the last reading) of everything that the driver must not touch."""
        return {str(path): describe(path) for canary in self.canaries for path in (canary, *sorted(canary.rglob("*")))}

    def judge(self, request: Request) -> None:
        """Send a request and look at the answer and at the world."""
        try:
            response = self.client.call(request.method, request.message, HANG_SECONDS)
            code, details = Code.OK, ""
        except grpc.RpcError as error:
            response, code, details = None, error.code(), error.details()
        self.answers.setdefault(request.method, Counter())[code.name] += 1
        assert code in SPECIFIC, f"{code.name}: {details!r}\n{request!r}\n{self.driver.tail(30)}"
        if code is not Code.OK:
            check_message(request, code, details)
        assert self.client.call("Probe", csi.ProbeRequest(), 5).ready.value
        now = self.picture()
        assert now == self.before, (
            f"{request!r} touched {[path for path in self.before.keys() | now if self.before.get(path) != now.get(path)]}"
        )
        assert foreign_mounts(self.home) == self.mounts, repr(request)
        self.restore(request, response)

    def restore(self, request: Request, response) -> None:
        """Undo what a request did that was right after all."""
        if response is None:
            return
        if request.method == "CreateVolume" and response.volume.volume_id not in self.world.handles:
            self.call("DeleteVolume", csi.DeleteVolumeRequest(volume_id=response.volume.volume_id))
        elif request.method == "CreateSnapshot" and response.snapshot.snapshot_id not in self.world.handles:
            self.call("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=response.snapshot.snapshot_id))
        elif (
            request.method == "CreateVolumeGroupSnapshot"
            and response.group_snapshot.group_snapshot_id not in self.world.handles
        ):
            group = response.group_snapshot.group_snapshot_id
            self.call("DeleteVolumeGroupSnapshot", csi.DeleteVolumeGroupSnapshotRequest(group_snapshot_id=group))
        elif request.method.startswith(("Delete", "NodeUn")):
            self.ensure()

    def take_away(self, path: str) -> None:
        """Undo what was mounted at a path, whichever volume it was."""
        for handle in (self.world.handles[0], "static-handle", "csi-inline"):
            self.client.code("NodeUnpublishVolume", csi.NodeUnpublishVolumeRequest(volume_id=handle, target_path=path))
            self.client.code("NodeUnstageVolume", csi.NodeUnstageVolumeRequest(volume_id=handle, staging_target_path=path))


def describe(path: Path) -> tuple:
    status = path.lstat()
    content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    attributes = [(name, os.getxattr(path, name, follow_symlinks=False)) for name in os.listxattr(path, follow_symlinks=False)]
    owner = (stat.filemode(status.st_mode), status.st_uid, status.st_gid, status.st_nlink)
    return (*owner, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, content, attributes)


def foreign_mounts(home: Path) -> list[tuple[str, str]]:
    """All mounts of the scene, and of its directories anywhere else, that the driver has no business with."""
    ours = f"{home}/kubelet/"
    return [
        (mount.mount_point, mount.fs_type)
        for mount in mountinfo.read_mounts()
        if (mount.mount_point.startswith(f"{home}/") or home.name in mount.root)
        and (not mount.mount_point.startswith(ours) or mount.fs_type == "tmpfs")
    ]


def check_message(request: Request, code: Code, details: str) -> None:
    """A refusal names what it is about: for a bad argument the field, else a thing."""
    assert len(details) > 10, f"{code.name}: {details!r}\n{request!r}"
    assert "Traceback" not in details
    assert len(details.encode()) < 8192
    if code is Code.INVALID_ARGUMENT and not isinstance(request.message, bytes):
        names = field_names(type(request.message).DESCRIPTOR)
        assert any(name in details for name in names), f"{details!r} names no field of\n{request!r}"


def field_names(descriptor) -> set[str]:
    names = set()
    for field in descriptor.fields:
        names.add(field.name)
        if field.message_type is not None and not field.message_type.GetOptions().map_entry:
            names |= field_names(field.message_type)
    return names


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    with ExitStack() as cleaning:
        made = Scene(tmp_path_factory.mktemp("hostile"), cleaning)
        yield made
        log = made.driver.log.read_bytes()
        assert made.driver.process.poll() is None
        assert SECRET.encode() not in log, "a secret is in the log"
        assert b"Traceback" not in log
        lines = log.decode(errors="replace").splitlines()
        assert not [line for line in lines if line.startswith(FORGED)], "a request forged a line of the log"
        assert not [line for line in log.decode().split("\n") if line and not STARTED.match(line)][:3]
        assert len(log) < 400 * 1024**2


@pytest.mark.parametrize("method", sorted(METHODS))
def test_any_request_gets_a_specific_code_and_touches_nothing_foreign(scene: Scene, method: str):
    # The calls that make and remove mounts have the most to spoil.
    @settings(bounded, max_examples=EXAMPLES * (3 if method.startswith(("NodeStage", "NodeUn", "NodePublish")) else 1))
    @given(st.deferred(lambda: requests(method, scene.world)))
    def check(request: Request) -> None:
        scene.judge(request)

    check()
    answers = scene.answers[method]
    print(method, dict(answers))
    # Requests that are all refused, or none, would show little.
    assert answers["OK"] > 0
    assert len(answers) > 1 or not METHODS[method][1].DESCRIPTOR.fields


@pytest.mark.parametrize("method", sorted(METHODS))
def test_any_bytes_get_a_specific_code(scene: Scene, method: str):
    @settings(bounded, max_examples=25)
    @given(st.deferred(lambda: raw_requests(method, scene.world)))
    def check(request: Request) -> None:
        scene.judge(request)

    check()


@pytest.mark.parametrize("method", ["NodeStageVolume", "NodePublishVolume", "NodeUnpublishVolume", "NodeUnstageVolume"])
def test_no_path_leads_out_of_the_kubelets_directory(scene: Scene, method: str):
    """Every hostile path in requests that are right but for it: no other mistake may hide this one."""
    for path in scene.world.paths:
        for message in right_requests(method, scene.world):
            setattr(message, "target_path" if hasattr(message, "target_path") else "staging_target_path", path)
            scene.judge(Request(method, message))
            scene.take_away(path)
            scene.ensure()
