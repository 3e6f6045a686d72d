"""What the kernel's NFS does, as far as the driver's design relies on it."""

import subprocess
import sys
import time
import uuid

import pytest
from nodes import CommandFailed

# Clone argv[2] from argv[1] by FICLONE; says the error's name if that fails.
CLONE = """
import errno, fcntl, os, sys
source, target = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT, 0o600)
try:
    fcntl.ioctl(target, 0x40049409, source)
    print("cloned")
except OSError as error:
    print(errno.errorcode[error.errno])
"""
# Take an exclusive lock on argv[2] with the function argv[1]; hold it for argv[3] seconds, or say that it is held by another.
LOCK = """
import fcntl, sys, time
file = open(sys.argv[2], "r+")
try:
    getattr(fcntl, sys.argv[1])(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("held", flush=True)
else:
    print("taken", flush=True)
    time.sleep(float(sys.argv[3]))
"""
# fsync what is written, so that the error, if any, comes here.
WRITE = """
import errno, os, sys
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o644)
written = 0
try:
    while written < int(sys.argv[2]):
        written += os.write(file, bytes(1 << 20))
    os.fsync(file)
    print("written")
except OSError as error:
    print(errno.errorcode[error.errno])
"""
# Keep a file open, and say what each access gives, a line for each line of the input.
HOLD = """
import errno, os, sys
file = os.open(sys.argv[1], os.O_RDWR)
for line in sys.stdin:
    try:
        os.pwrite(file, b"x", 0)
        os.fsync(file)
        print("fine", flush=True)
    except OSError as error:
        print(errno.errorcode[error.errno], flush=True)
"""


@pytest.fixture
def share(server, xfs):
    """A directory of this test's own on the shared export: the same path on the server and to clients."""
    path = xfs / f"share-{uuid.uuid4().hex[:8]}"
    server.tree(path).mkdir()
    return path


@pytest.fixture
def mounted(nodes, server, share):
    """The share, mounted by v4.2 at the same place in both nodes."""
    target = f"/mnt/{share.name}"
    for node in nodes:
        node.mount(server.node, share, target)
    yield target
    for node in nodes:
        node.detach(target)


def test_what_one_node_writes_the_other_reads(nodes, mounted, server, share):
    first, second = nodes
    first.run(["/bin/sh", "-c", f"echo hello >{mounted}/file"])
    assert second.run(["/bin/cat", f"{mounted}/file"]).stdout == "hello\n"
    assert server.tree(share / "file").read_text() == "hello\n"


@pytest.mark.parametrize("version", ["4.2", "4.1"])
def test_the_version_asked_for_is_the_one_mounted(nodes, server, share, version):
    nodes[0].mount(server.node, share, "/mnt/version", options=f"vers={version}")
    options = nodes[0].run(["/usr/bin/findmnt", "--noheadings", "--output", "OPTIONS", "/mnt/version"]).stdout
    assert f"vers={version}," in options
    nodes[0].run(["/bin/umount", "/mnt/version"])


def test_v3_mounts_and_its_locks_hold_across_nodes(make_server, make_node):
    server = make_server("third", v3=True)
    path = server.filesystem("ext4")
    server.export(path)
    first, second = make_node(), make_node()
    for node in (first, second):
        node.start_statd()
        node.mount(server.node, path, "/mnt/v3", options="vers=3,proto=tcp,mountproto=tcp")
    assert "vers=3," in first.run(["/usr/bin/findmnt", "--noheadings", "--output", "OPTIONS", "/mnt/v3"]).stdout
    first.run(["/bin/sh", "-c", "echo three >/mnt/v3/file"])
    assert second.run(["/bin/cat", "/mnt/v3/file"]).stdout == "three\n"
    _locks_hold(first, second, "lockf", "/mnt/v3/file")


@pytest.mark.parametrize("kind", ["flock", "lockf"])
def test_a_lock_held_by_one_node_is_refused_to_the_other(nodes, mounted, kind):
    nodes[0].run(["/bin/sh", "-c", f"echo >{mounted}/lock"])
    _locks_hold(*nodes, kind, f"{mounted}/lock")


def _locks_hold(first, second, kind, path):
    holder = first.popen([sys.executable, "-c", LOCK, kind, path, "60"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "taken\n"
    assert second.python(LOCK, kind, path, "0").stdout == "held\n"
    holder.kill()
    holder.wait(10)
    holder.stdout.close()
    # The kernel gives the lock back with the process that held it.
    assert second.python(LOCK, kind, path, "0").stdout == "taken\n"


def test_a_clone_over_v42_happens_on_the_server(nodes, mounted, server, share):
    nodes[0].run(["/bin/dd", "if=/dev/urandom", f"of={mounted}/source", "bs=1M", "count=16", "conv=fsync"])
    assert nodes[0].python(CLONE, f"{mounted}/source", f"{mounted}/target").stdout == "cloned\n"
    extents = server.node.run(["/usr/sbin/filefrag", "-v", str(share / "target")]).stdout
    assert "shared" in extents
    assert server.tree(share / "target").read_bytes() == server.tree(share / "source").read_bytes()


def test_a_clone_over_v41_is_refused(nodes, server, share):
    nodes[0].mount(server.node, share, "/mnt/older", options="vers=4.1")
    nodes[0].run(["/bin/sh", "-c", "echo data >/mnt/older/source"])
    assert nodes[0].python(CLONE, "/mnt/older/source", "/mnt/older/target").stdout == "ENOTSUP\n"
    nodes[0].run(["/bin/umount", "/mnt/older"])


class Holder:
    """A program in a node that keeps a file open and tries to write to it when asked."""

    def __init__(self, node, path):
        node.run(["/bin/sh", "-c", f"echo >{path}"])
        self._process = node.popen(
            [sys.executable, "-c", HOLD, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def write(self):
        """Return "fine" or the error's name."""
        self._process.stdin.write("\n")
        return self._process.stdout.readline().strip()

    def close(self):
        self._process.kill()
        self._process.communicate(timeout=10)


def test_unexporting_fences_also_open_files_and_re_exporting_lets_them_write_again(make_node, make_server):
    node, server = make_node(), make_server("fence")
    path = server.filesystem("xfs")
    for name in ("fenced", "other"):
        server.tree(path / name).mkdir()
        server.export(path / name)
    target = node.mount(server.node, path / "fenced")
    holder = Holder(node, f"{target}/file")
    assert holder.write() == "fine"
    server.unexport(path / "fenced")
    assert holder.write() == "ESTALE"
    assert "Stale file handle" in node.run(["/bin/sh", "-c", f"echo >{target}/another"], check=False).stderr
    server.export(path / "fenced")
    node.run(["/bin/sh", "-c", f"echo back >{target}/another"])
    assert server.tree(path / "fenced/another").read_text() == "back\n"
    # Not fenced for good: the client still has its open state, and goes on where it was.
    assert holder.write() == "fine"
    holder.close()


def test_unexporting_the_last_export_of_a_client_gives_eacces_instead(make_node, make_server):
    # rpc.mountd then knows no such client any more, and the kernel refuses its credentials before it looks at the handle.
    node, server = make_node(), make_server("last")
    path = server.filesystem("xfs")
    server.export(path)
    target = node.mount(server.node, path)
    holder = Holder(node, f"{target}/file")
    assert holder.write() == "fine"
    server.unexport(path)
    assert holder.write() == "EACCES"
    holder.close()


def test_a_read_only_export_refuses_a_write(make_node, make_server):
    server = make_server("readonly")
    path = server.filesystem("btrfs")
    server.export(path, "ro,no_subtree_check,no_root_squash")
    node = make_node()
    target = node.mount(server.node, path)
    with pytest.raises(CommandFailed, match="Read-only file system"):
        node.run(["/bin/sh", "-c", f"echo >{target}/file"])


@pytest.mark.parametrize(("kind", "refused_as"), [("xfs", "ENOSPC"), ("ext4", "EDQUOT")])
def test_a_project_quota_binds_a_user_over_nfs_and_shows_in_the_clients_df(nodes, server, kind, refused_as):
    path = server.filesystem(kind, name=f"quota-{kind}")
    server.export(path)
    volume = path / "volume"
    server.tree(volume).mkdir()
    server.tree(volume).chmod(0o777)
    server.set_quota(volume, 7, limit=20 << 20)
    target = nodes[0].mount(server.node, volume)
    assert nodes[0].run(["/bin/df", "--block-size=1", "--output=size", target]).stdout.split()[-1] == str(20 << 20)
    user = ["/usr/bin/setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]
    small, large = ([*user, "/usr/bin/python3", "-c", WRITE, f"{target}/{size}", str(size << 20)] for size in (10, 15))
    assert nodes[0].run(small).stdout == "written\n"
    # XFS answers ENOSPC for a project, also to a client; ext4 EDQUOT.
    assert nodes[0].run(large).stdout == f"{refused_as}\n"
    server.set_quota(volume, 7, limit=40 << 20)
    assert nodes[0].run(large).stdout == "written\n"
    nodes[0].run(["/bin/umount", target])


@pytest.mark.parametrize(("kind", "outcome"), [("xfs", "ENOSPC"), ("ext4", "written")])
def test_a_project_quota_binds_root_on_xfs_and_not_on_ext4(nodes, server, kind, outcome):
    path = server.filesystem(kind, name=f"root-{kind}")
    server.export(path)
    volume = path / "volume"
    server.tree(volume).mkdir()
    server.set_quota(volume, 8, limit=20 << 20)
    target = nodes[0].mount(server.node, volume)
    assert nodes[0].python(WRITE, f"{target}/file", str(40 << 20)).stdout == f"{outcome}\n"
    nodes[0].run(["/bin/umount", target])


def test_a_project_quota_binds_on_the_server_itself(server):
    path = server.filesystem("xfs", name="local")
    volume = path / "volume"
    server.tree(volume).mkdir()
    server.set_quota(volume, 9, limit=20 << 20, inodes=10)
    assert server.node.python(WRITE, str(volume / "file"), str(40 << 20)).stdout == "ENOSPC\n"
    server.tree(volume / "file").unlink()
    server.node.run(["/bin/sh", "-c", f"cd {volume} && touch 1 2 3 4 5 6 7 8 9"])
    with pytest.raises(CommandFailed, match="No space left on device"):
        server.node.run(["/bin/sh", "-c", f"cd {volume} && touch 10"])


def test_an_image_on_nfs_is_a_direct_io_loop_device_with_a_filesystem(nodes, mounted, server, share):
    node = nodes[0]
    node.run(["/usr/bin/truncate", "--size=256M", f"{mounted}/image"])
    loop = node.run(["/sbin/losetup", "--find", "--show", "--direct-io=on", f"{mounted}/image"]).stdout.strip()
    try:
        assert node.run(["/sbin/losetup", "--noheadings", "--output", "DIO", loop]).stdout.strip() == "1"
        node.run(["/sbin/mkfs.ext4", "-q", loop])
        node.run(["/bin/mkdir", "-p", "/mnt/inside"])
        node.run(["/bin/mount", loop, "/mnt/inside"])
        node.run(["/bin/sh", "-c", "cd /mnt/inside && for i in $(seq 50); do echo $i >$i; done && sync -f ."])
        # A snapshot of the running filesystem, on the server, seen through the client.
        assert node.python(CLONE, f"{mounted}/image", f"{mounted}/snapshot").stdout == "cloned\n"
        node.run(["/usr/bin/truncate", "--size=512M", f"{mounted}/image"])
        node.run(["/sbin/losetup", "--set-capacity", loop])
        node.run(["/sbin/resize2fs", loop])
        assert int(node.run(["/bin/df", "--block-size=1M", "--output=size", "/mnt/inside"]).stdout.split()[-1]) > 400
        node.run(["/bin/umount", "/mnt/inside"])
        node.run(["/sbin/e2fsck", "-fn", loop])
    finally:
        node.run(["/bin/umount", "--lazy", "/mnt/inside"], check=False)
        node.run(["/sbin/losetup", "--detach", loop])
    assert server.tree(share / "image").stat().st_size == 512 << 20
    # The journal of the snapshot is replayed as after a power cut; then it is clean and holds the files.
    assert node.run(["/sbin/e2fsck", "-p", f"{mounted}/snapshot"], check=False).returncode in (0, 1)
    assert node.run(["/sbin/debugfs", "-R", "cat /50", f"{mounted}/snapshot"]).stdout == "50\n"


@pytest.mark.parametrize("milliseconds", [1, 20])
def test_delay_adds_to_the_round_trip(nodes, mounted, server, milliseconds):
    code = """
import os, sys, time
taken = []
for number in range(50):
    began = time.monotonic()
    os.path.exists(f"{sys.argv[1]}{number}")
    taken.append(time.monotonic() - began)
print(min(taken))
"""
    plain = float(nodes[0].python(code, f"{mounted}/plain").stdout)
    server.delay(milliseconds)
    try:
        slow = float(nodes[0].python(code, f"{mounted}/slow").stdout)
    finally:
        server.delay(0)
    # A lookup is one round trip; the quickest is the one that nothing else on the machine has disturbed.
    assert 0.9 < (slow - plain) / (milliseconds / 1000) < 2.5


def test_two_servers_at_once_know_only_their_own_exports(make_server, make_node):
    servers = [make_server("one"), make_server("two")]
    node = make_node()
    for number, server in enumerate(servers):
        path = server.filesystem("xfs", name=f"only{number}")
        server.export(path)
        server.tree(path / "who").write_text(server.name)
        assert node.run(["/bin/cat", node.mount(server.node, path) / "who"]).stdout == server.name
    with pytest.raises(CommandFailed, match="No such file or directory"):
        node.mount(servers[0].node, "/srv/only1")


def test_a_mount_of_a_refusing_server_fails_in_seconds(make_server, nodes):
    server = make_server("down")
    server.stop()
    began = time.monotonic()
    with pytest.raises(CommandFailed, match=r"refused|timed out"):
        nodes[0].mount(server.node, "/srv/x", options="vers=4.2,soft,timeo=10,retrans=1,retry=0")
    assert time.monotonic() - began < 60  # without these options: two minutes
