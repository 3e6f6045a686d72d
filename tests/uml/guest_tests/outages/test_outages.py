"""A server that stops, freezes and dies: what goes on by itself afterwards, and what can be done meanwhile."""

import subprocess
import sys
import time

import pytest
from nodes import CommandHung

# Append a line and fsync it, ten times a second, and print the time of each.
APPEND = """
import os, sys, time
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
while True:
    os.write(file, b"line\\n")
    os.fsync(file)
    print(time.monotonic(), flush=True)
    time.sleep(0.1)
"""
# umount2(argv[1], MNT_DETACH | UMOUNT_NOFOLLOW), and what it said.
DETACH = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
result = libc.umount2(sys.argv[1].encode(), 2 | 8)
print("detached" if result == 0 else os.strerror(ctypes.get_errno()))
"""
SLACK = 2.0
"""Seconds in which a program may still print, on a busy machine, what it wrote before."""


@pytest.fixture
def writing(make_server, make_node):
    """A server, a node, and a program in the node that writes to the server all the time."""
    server = make_server()
    path = server.filesystem("xfs")
    server.export(path)
    node = make_node()
    target = node.mount(server.node, path)
    writer = node.popen([sys.executable, "-c", APPEND, f"{target}/log"], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        writer.stdout.readline()
    yield server, node, target, writer
    writer.kill()
    writer.stdout.close()


def test_io_goes_on_by_itself_after_a_freeze(writing):
    server, _, _, writer = writing
    server.freeze()
    frozen = time.monotonic()
    time.sleep(3 + SLACK)
    server.thaw()
    thawed = time.monotonic()
    times = []
    while not times or times[-1] < thawed:
        times.append(float(writer.stdout.readline()))
    # Written before the freeze took hold, or after its end; nothing in between.
    assert not [moment for moment in times if frozen + SLACK < moment < thawed]
    assert times[-1] < thawed + 60


def test_io_goes_on_by_itself_after_a_stop_and_start(writing):
    server, _, _, writer = writing
    server.stop()
    stopped = time.monotonic()
    time.sleep(3 + SLACK)
    server.start()
    started = time.monotonic()
    times = []
    while not times or times[-1] < started:
        times.append(float(writer.stdout.readline()))
    assert not [moment for moment in times if stopped + SLACK < moment < started]
    assert times[-1] < started + 120


def test_a_lock_survives_the_servers_restart(make_server, make_node):
    server = make_server()
    path = server.filesystem("xfs")
    server.export(path)
    first, second = make_node(), make_node()
    target = first.mount(server.node, path)
    second.mount(server.node, path)
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('taken', flush=True); time.sleep(300)"
    holder = first.popen([sys.executable, "-c", hold, f"{target}/lock"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "taken\n"
    server.stop()
    server.start()
    again = second.run(["/usr/bin/flock", "--nonblock", f"{target}/lock", "true"], check=False, timeout=60)
    assert again.returncode == 1
    assert holder.poll() is None
    holder.kill()
    holder.stdout.close()
    assert second.run(["/usr/bin/flock", "--timeout", "20", f"{target}/lock", "true"], timeout=60).returncode == 0


def test_with_a_dead_server_statfs_hangs_and_a_lazy_detach_of_a_mount_in_use_returns(writing):
    server, node, target, _ = writing
    server.kill()
    with pytest.raises(CommandHung):
        node.python("import os, sys; os.statvfs(sys.argv[1])", str(target), timeout=5)
    assert node.python(DETACH, str(target), timeout=60).stdout == "detached\n"
    assert str(target) not in [place for place, _ in node.mounts()]


def test_with_a_dead_server_the_lazy_detach_of_its_last_idle_mount_takes_effect_at_once_but_hangs_its_caller(
    make_server, make_node
):
    # DESTROY_SESSION is sent on the way back to user space and waits for an answer: the caller has to be a process that can be
    # killed, and mountinfo, not its end, says that the mount is gone.
    server, node = make_server(), make_node()
    path = server.filesystem("xfs")
    server.export(path)
    target = node.mount(server.node, path)
    server.kill()
    began = time.monotonic()
    caller = node.popen([sys.executable, "-c", DETACH, str(target)])
    while str(target) in [place for place, _ in node.mounts()]:
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    with pytest.raises(subprocess.TimeoutExpired):
        caller.wait(10)
    caller.kill()
    assert caller.wait(30) == -9


def test_with_a_dead_server_a_bind_of_its_mount_is_detached_too(writing):
    server, node, target, _ = writing
    node.run(["/bin/sh", "-c", f"mkdir /var/lib/kubelet/volume && mount --bind {target} /var/lib/kubelet/volume"])
    server.kill()
    for place in ("/var/lib/kubelet/volume", str(target)):
        assert node.python(DETACH, place, timeout=60).stdout == "detached\n"
    assert not [kind for _, kind in node.mounts() if kind.startswith("nfs")]


def test_while_one_server_is_dead_another_can_be_mounted_at_once(writing, make_server):
    server, node, _, _ = writing
    server.kill()
    other = make_server("other")
    path = other.filesystem("xfs", name="other")
    other.export(path)
    began = time.monotonic()
    target = node.mount(other.node, path)
    node.run(["/bin/sh", "-c", f"echo >{target}/file"])
    assert time.monotonic() - began < 60
