"""The nodes themselves: what one does is not seen by another, and nothing outlives its deadline or its node."""

import os
import pathlib
import time

import pytest
from nodes import CommandFailed, CommandHung


def test_a_mount_made_in_one_node_is_invisible_in_the_other_and_outside(nodes):
    first, second = nodes
    first.run(["/bin/sh", "-c", "mkdir /mnt/private && mount -t tmpfs tmpfs /mnt/private"])
    assert ("/mnt/private", "tmpfs") in first.mounts()
    assert ("/mnt/private", "tmpfs") not in second.mounts()
    assert "/mnt/private" not in pathlib.Path("/proc/self/mountinfo").read_text()


def test_a_mount_in_a_node_propagates_inside_that_node(nodes):
    # A pod's mount namespace is a slave of the node's: that works only where the node's mounts are shared.
    flags = nodes[0].run(["/usr/bin/findmnt", "--noheadings", "--output", "PROPAGATION", "/var/lib/kubelet"]).stdout.strip()
    assert flags == "shared"


def test_nodes_differ_in_host_name_and_nfs_client_id(nodes):
    first, second = (
        node.run(["/bin/sh", "-c", "hostname; cat /sys/fs/nfs/net/nfs_client/identifier"]).stdout.split() for node in nodes
    )
    assert first == [nodes[0].name] * 2
    assert second == [nodes[1].name] * 2
    assert first != second


def test_a_command_that_does_not_end_is_killed_with_its_children(nodes, tmp_path):
    began = time.monotonic()
    with pytest.raises(CommandHung):
        nodes[0].run(["/bin/sh", "-c", f"echo $$ >{tmp_path}/pid; sleep 1000; true"], timeout=2)
    assert time.monotonic() - began < 100
    assert "sleep 1000" not in _commands()
    assert not os.path.exists(f"/proc/{(tmp_path / 'pid').read_text().strip()}")


def test_a_failed_command_says_what_it_printed(nodes):
    with pytest.raises(CommandFailed, match="ended with 3\nout\nbad"):
        nodes[0].run(["/bin/sh", "-c", "echo out; echo bad >&2; exit 3"])


def test_the_pid_of_a_started_program_is_its_own(nodes):
    process = nodes[0].popen(["/bin/sleep", "500"])
    time.sleep(0.5)
    assert pathlib.Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n"
    process.kill()
    assert process.wait(5) == -9


def test_a_closed_node_leaves_no_process_and_no_link(make_node):
    node = make_node("short")
    process = node.popen(["/bin/sh", "-c", "(setsid sleep 777 &) ; exec sleep 778"])
    time.sleep(0.5)
    assert "sleep 777" in _commands()
    node.close()
    assert process.returncode == -9
    assert "sleep 77" not in _commands()
    assert not os.path.exists(f"/sys/class/net/{node.link}")


def _commands():
    found = []
    for entry in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(entry.read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return "\n".join(found)
