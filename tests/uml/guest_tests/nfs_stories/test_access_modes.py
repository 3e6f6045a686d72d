"""Two nodes and one volume: what each access mode gives and refuses, and whether locks hold between the nodes."""

import itertools
import subprocess
import sys

import pytest
from driver_in_guest import ROX, RWO, RWOP, RWX, of_pod, refused, shell

NAMES = itertools.count()
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
getattr(fcntl, sys.argv[2])(file, fcntl.LOCK_EX)
print("taken", flush=True)
time.sleep(300)
"""
TRY = """
import fcntl, sys
file = open(sys.argv[1], "a+")
try:
    getattr(fcntl, sys.argv[2])(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("got it")
except BlockingIOError:
    print("refused")
"""


@pytest.fixture
def volume(cluster):
    """A volume of the pool `default`, deleted after the test."""
    volume = cluster.create(f"access-{next(NAMES)}", pool="default")
    yield volume
    for driver in cluster.nodes:
        use = cluster.use(volume, cluster.nodes.index(driver))
        for pod in ("pod", "other-pod"):
            cluster.unpublish(of_pod(use, pod))
        cluster.unmount(use)
    cluster.delete(volume)


@pytest.mark.parametrize("pool", ["default", "v41", "v3"])
def test_what_one_node_writes_the_other_reads(cluster, pool):
    volume = cluster.create(f"shared-{pool}", pool=pool)
    first, second = cluster.use(volume, 0), cluster.use(volume, 1)
    cluster.mount(first)
    cluster.mount(second)
    shell(first, f"echo from-first >{first.target}/file")
    assert shell(second, f"cat {second.target}/file && echo from-second >>{second.target}/file") == "from-first\n"
    assert shell(first, f"cat {first.target}/file") == "from-first\nfrom-second\n"
    for use in (first, second):
        cluster.unmount(use)
    cluster.delete(volume)


@pytest.mark.parametrize("pool", ["default", "v41", "v3"])
def test_two_volumes_on_one_node_are_no_mounts_of_one_another_to_the_kubelet(cluster, pool):
    """It compares device and root of all mounts before it unstages one, and NFS shows `/` as the root of every directory."""
    uses = [cluster.use(cluster.create(f"beside-{number}-{pool}", pool=pool), 0) for number in (1, 2)]
    for use in uses:
        cluster.mount(use)
    rows = [line.split() for line in shell(uses[0], "cat /proc/self/mountinfo").splitlines()]
    staged = [(row[2], row[3]) for row in rows if row[4] in {str(use.staging) for use in uses}]
    assert len(staged) == len(set(staged)) == 2
    for use in uses:
        cluster.unmount(use)
        cluster.delete(use.volume)


def test_a_readonlymany_volume_refuses_writes_in_the_kernel_on_every_node(cluster, volume):
    writer = cluster.use(volume, mode=RWX)
    cluster.mount(writer)
    shell(writer, f"echo content >{writer.target}/file")
    cluster.unmount(writer)
    for use in (cluster.use(volume, 0, mode=ROX), cluster.use(volume, 1, mode=ROX)):
        cluster.mount(use)
        for place in (use.target, use.staging):
            assert shell(use, f"cat {place}/file") == "content\n"
            for attempt in ("echo x >{}/new", "echo x >>{}/file", "rm {}/file", "chmod 600 {}/file", "touch {}"):
                done = shell(use, attempt.format(place), check=False)
                assert done.returncode != 0
                assert "Read-only file system" in done.stderr


def test_a_readonly_pod_beside_a_writing_one_cannot_write(cluster, volume):
    writer = cluster.use(volume)
    reader = cluster.use(volume, readonly=True, pod="other-pod")
    cluster.mount(writer)
    cluster.publish(reader)
    assert "Read-only" in shell(reader, f"touch {reader.target}/file", check=False).stderr
    shell(writer, f"touch {writer.target}/file")


def test_a_readwriteonce_volume_refuses_the_second_node_until_the_first_has_let_go(cluster, volume):
    first, second = cluster.use(volume, 0, mode=RWO), cluster.use(volume, 1, mode=RWO)
    cluster.mount(first)
    with refused("FAILED_PRECONDITION", cluster.node_id(first.driver)):
        cluster.attach(second)
    # Not even a node that was never told may mount it: what it needs comes from the controller.
    with refused("FAILED_PRECONDITION", "publish_context"):
        cluster.stage(second)
    # Other pods of the same node may.
    cluster.publish(of_pod(first, "other-pod"))
    cluster.unpublish(of_pod(first, "other-pod"))
    cluster.unmount(first)
    cluster.mount(second)
    shell(second, f"echo moved >{second.target}/file")


def test_a_readwriteonce_volume_refuses_other_modes_of_a_second_node_too(cluster, volume):
    cluster.attach(cluster.use(volume, 0, mode=RWO))
    for mode in (RWX, ROX, RWOP):
        with refused("FAILED_PRECONDITION", cluster.node_id(cluster.nodes[0])):
            cluster.attach(cluster.use(volume, 1, mode=mode))


def test_a_readwriteoncepod_volume_refuses_the_second_pod_and_the_second_node(cluster, volume):
    first = cluster.use(volume, 0, mode=RWOP)
    cluster.mount(first)
    with refused("FAILED_PRECONDITION", str(first.target)):
        cluster.publish(of_pod(first, "other-pod"))
    with refused("FAILED_PRECONDITION", cluster.node_id(first.driver)):
        cluster.attach(cluster.use(volume, 1, mode=RWOP))
    cluster.unpublish(first)
    cluster.publish(of_pod(first, "other-pod"))


@pytest.mark.parametrize("kind", ["flock", "lockf"])
@pytest.mark.parametrize("pool", ["default", "v41", "v3"])
def test_a_lock_taken_on_one_node_is_refused_on_the_other_until_it_is_given_back(cluster, pool, kind):
    volume = cluster.create(f"locks-{pool}-{kind}", pool=pool)
    first, second = cluster.use(volume, 0), cluster.use(volume, 1)
    cluster.mount(first)
    cluster.mount(second)
    holder = first.driver.node.popen(
        [sys.executable, "-c", HOLD, f"{first.target}/lock", kind], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "taken\n"
        attempt = [TRY, f"{second.target}/lock", kind]
        assert second.driver.node.python(*attempt, timeout=60).stdout == "refused\n"
        holder.kill()
        holder.wait(10)
        assert second.driver.node.python(*attempt, timeout=60).stdout == "got it\n"
    finally:
        holder.kill()
        holder.wait(10)
        holder.stdout.close()
    for use in (first, second):
        cluster.unmount(use)
    cluster.delete(volume)
