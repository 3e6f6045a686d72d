"""Registration with the kubelet, seen as the kubelet sees it: a socket that appears, two calls, a socket that goes."""

import os
import shutil
import signal
import socket
import stat
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from csi_driver.errors import FailedPrecondition
from csi_driver.linux.mountinfo import mounts_below
from csi_driver.rpc import pluginregistration_pb2 as plugin
from csi_driver.rpc import registration
from csi_driver.rpc.pluginregistration_pb2_grpc import RegistrationStub
from csi_driver.rpc.registration import KubeletRegistration
from tests.driver_process import DRIVER, DriverProcess

ENDPOINT = Path("/var/lib/kubelet/plugins/hostpath.csi.tatami.dev/csi.sock")


@pytest.fixture
def registry():
    # Socket paths end at 107 bytes; pytest's directories are longer.
    directory = Path(tempfile.mkdtemp(prefix="tatami-", dir="/tmp"))
    yield directory / "plugins_registry"
    shutil.rmtree(directory)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(registration, "WATCH_SECONDS", 0.05)


def offered(registry):
    return KubeletRegistration(DRIVER, registry, ENDPOINT)


def path_in(registry):
    return registry / f"{DRIVER}-reg.sock"


def dial(path):
    return grpc.insecure_channel(f"unix:{path}", options=[("grpc.use_local_subchannel_pool", 1)])


def ask(path):
    with dial(path) as channel:
        return RegistrationStub(channel).GetInfo(plugin.InfoRequest(), timeout=5)


def notify(path, **status):
    with dial(path) as channel:
        RegistrationStub(channel).NotifyRegistrationStatus(plugin.RegistrationStatus(**status), timeout=5)


def eventually(condition, seconds=20):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


def test_the_kubelet_is_told_name_kind_version_and_where_the_host_has_the_socket(registry):
    with offered(registry):
        info = ask(path_in(registry))
    assert (info.type, info.name, info.endpoint) == ("CSIPlugin", DRIVER, str(ENDPOINT))
    assert list(info.supported_versions) == ["1.0.0"]


def test_the_socket_is_served_when_it_appears_and_is_roots_alone(registry):
    registry.mkdir()
    with offered(registry):
        assert os.listdir(registry) == [f"{DRIVER}-reg.sock"]
        assert stat.S_IMODE(path_in(registry).lstat().st_mode) == 0o600
        assert stat.S_ISSOCK(path_in(registry).lstat().st_mode)


def test_the_socket_goes_with_the_driver(registry):
    with offered(registry):
        pass
    assert os.listdir(registry) == []


def test_it_says_what_the_kubelet_said(registry):
    with offered(registry) as registered:
        assert "not registered" in registered.problem()
        notify(path_in(registry), plugin_registered=False, error="no such version")
        assert "no such version" in registered.problem()
        notify(path_in(registry), plugin_registered=True)
        assert registered.problem() is None


def test_what_a_killed_driver_left_is_replaced_in_one_step(registry):
    registry.mkdir()
    for left in (path_in(registry), registry / f".{DRIVER}-reg.sock.0123abcd"):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(left))
    with offered(registry):
        assert ask(path_in(registry)).name == DRIVER
        assert os.listdir(registry) == [f"{DRIVER}-reg.sock"]


def test_a_socket_that_was_removed_is_made_anew_and_waits_for_the_kubelet_again(registry, impatient):
    with offered(registry) as registered:
        notify(path_in(registry), plugin_registered=True)
        path_in(registry).unlink()
        eventually(path_in(registry).exists)
        assert ask(path_in(registry)).name == DRIVER
        assert "not registered" in registered.problem()


def test_a_registry_that_was_removed_is_made_anew(registry, impatient):
    with offered(registry):
        shutil.rmtree(registry)
        eventually(path_in(registry).exists)
        assert ask(path_in(registry)).name == DRIVER


def test_a_place_that_a_newer_driver_has_taken_is_left_to_it(registry, impatient):
    with ExitStack() as older:
        older.enter_context(offered(registry))
        with offered(registry):
            newer = path_in(registry).lstat().st_ino
            time.sleep(0.3)  # several looks of the older one
            older.close()
            assert path_in(registry).lstat().st_ino == newer
            assert ask(path_in(registry)).name == DRIVER


def test_a_path_that_is_too_long_is_refused(tmp_path):
    with pytest.raises(FailedPrecondition, match="cannot listen"), offered(tmp_path / ("x" * 100)):
        pass


# --- the real process ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path, registry):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = DriverProcess(
        tmp_path, TATAMI_KUBELET_REGISTRATION_PATH=str(ENDPOINT), TATAMI_METRICS_ADDRESS=f"127.0.0.1:{port}"
    )
    process.kubelet = registry.parent
    process.port = port
    yield process
    process.close()
    assert not mounts_below(registry.parent)


def get(driver, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{driver.port}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except urllib.error.URLError as error:  # not listening yet: the CSI socket comes first
        return 0, str(error)


def test_a_driver_is_ready_when_the_kubelet_has_taken_it(driver, registry):
    driver.start()
    eventually(path_in(registry).exists)
    assert ask(path_in(registry)).endpoint == str(ENDPOINT)
    assert get(driver, "/readyz") == (503, "the kubelet has not registered this driver yet\n")
    notify(path_in(registry), plugin_registered=True)
    assert get(driver, "/readyz") == (200, "ok\n")
    assert driver.stop() == 0
    assert os.listdir(registry) == []


def test_a_driver_that_was_killed_comes_back_on_the_same_path(driver, registry):
    driver.start()
    eventually(path_in(registry).exists)
    driver.kill()
    assert path_in(registry).exists()
    driver.start()
    eventually(lambda: path_in(registry).exists() and _answers(path_in(registry)))


def test_healthz_fails_when_the_drivers_own_socket_is_gone(driver):
    driver.start()
    eventually(lambda: get(driver, "/healthz") == (200, "ok\n"))
    driver.socket.unlink()
    status, text = get(driver, "/healthz")
    assert status == 503
    assert "Probe is not answered" in text


def test_healthz_fails_while_the_process_hangs_and_recovers(driver):
    driver.start()
    eventually(lambda: get(driver, "/healthz") == (200, "ok\n"))
    os.kill(driver.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(f"http://127.0.0.1:{driver.port}/healthz", timeout=1)
    finally:
        os.kill(driver.process.pid, signal.SIGCONT)
    eventually(lambda: get(driver, "/healthz") == (200, "ok\n"))


def _answers(path):
    try:
        return ask(path).name == DRIVER
    except grpc.RpcError:
        return False
