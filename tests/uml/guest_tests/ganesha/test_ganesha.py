"""The kernel's NFS client against nfs-ganesha: what the driver meets on a server that is not the kernel's."""

import pathlib
import subprocess
import sys
import time

import pytest
from nodes import CommandFailed

APPEND = """
import os, sys, time
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
while True:
    os.write(file, b"line\\n")
    os.fsync(file)
    print(time.monotonic(), flush=True)
    time.sleep(0.1)
"""


@pytest.fixture
def ganesha(make_ganesha):
    """A ganesha that serves a directory of its own on a tmpfs."""
    server = make_ganesha()
    server.node.run(["/bin/sh", "-c", "mkdir -p /mnt/export && chmod 777 /mnt/export"])
    return server


def test_two_nodes_share_an_export_that_was_added_while_ganesha_ran(ganesha, make_node):
    ganesha.export("/mnt/export")
    first, second = make_node(), make_node()
    target = first.mount(ganesha.node, "/mnt/export", options="vers=4.2")
    second.mount(ganesha.node, "/mnt/export", options="vers=4.1")
    first.run(["/bin/sh", "-c", f"echo hello >{target}/file"])
    assert second.run(["/bin/cat", f"{target}/file"]).stdout == "hello\n"
    assert ganesha.node.path("/mnt/export/file").read_text() == "hello\n"


def test_a_lock_held_by_one_node_is_refused_to_the_other(ganesha, make_node):
    ganesha.export("/mnt/export")
    first, second = make_node(), make_node()
    target = first.mount(ganesha.node, "/mnt/export")
    second.mount(ganesha.node, "/mnt/export")
    holder = first.popen(
        ["/usr/bin/flock", f"{target}/lock", "sh", "-c", "echo taken; exec sleep 100"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "taken\n"
    assert second.run(["/usr/bin/flock", "--nonblock", f"{target}/lock", "true"], check=False).returncode == 1
    holder.stdout.close()


def test_a_client_taken_from_the_list_is_refused_and_comes_back_when_let_in(ganesha, make_node):
    allowed, other = make_node(), make_node()
    number = ganesha.export("/mnt/export", clients=allowed.address)
    target = allowed.mount(ganesha.node, "/mnt/export")
    allowed.run(["/bin/sh", "-c", f"echo one >{target}/file"])
    with pytest.raises(CommandFailed):
        other.mount(ganesha.node, "/mnt/export", options="vers=4.2,soft,timeo=10,retrans=1,retry=0")
    ganesha.update(number, "/mnt/export", clients=other.address)
    with pytest.raises(CommandFailed, match="Permission denied"):
        allowed.run(["/bin/sh", "-c", f"echo two >{target}/file"])
    ganesha.update(number, "/mnt/export", clients=allowed.address)
    allowed.run(["/bin/sh", "-c", f"echo three >{target}/file"])
    assert ganesha.node.path("/mnt/export/file").read_text() == "three\n"


def test_io_goes_on_by_itself_after_a_crash_and_a_start(ganesha, make_node):
    ganesha.export("/mnt/export")
    node = make_node()
    target = node.mount(ganesha.node, "/mnt/export")
    writer = node.popen([sys.executable, "-c", APPEND, f"{target}/log"], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        writer.stdout.readline()
    ganesha.kill()
    time.sleep(2)
    ganesha.start()
    started = time.monotonic()
    moment = 0.0
    while moment < started:
        moment = float(writer.stdout.readline())
    assert moment < started + 60
    writer.kill()
    writer.stdout.close()


def test_a_removed_export_cannot_be_mounted(ganesha, make_node):
    node = make_node()
    number = ganesha.export("/mnt/export")
    target = node.mount(ganesha.node, "/mnt/export")
    node.run(["/bin/umount", target])
    ganesha.unexport(number)
    with pytest.raises(CommandFailed):
        node.mount(ganesha.node, "/mnt/export", options="vers=4.2,soft,timeo=10,retrans=1,retry=0")


def test_files_keep_their_numeric_owner(ganesha, make_node):
    ganesha.export("/mnt/export")
    node = make_node()
    target = node.mount(ganesha.node, "/mnt/export")
    node.run(["/bin/sh", "-c", f"echo >{target}/owned && chown 12345:54321 {target}/owned"])
    status = pathlib.Path(ganesha.node.path("/mnt/export/owned")).stat()
    assert (status.st_uid, status.st_gid) == (12345, 54321)
