"""An NFS server in a pod, whose disk is a volume of the hostpath class, under volumes of an NFS pool: what docs/nfs.md tells an admin.

Two drivers of this project above one another: what writes to a volume of the upper one ends up in a directory of the lower one's.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster import driver
from cluster.kubectl import Kubectl, Object
from cluster.layout import CHECKOUT, NETWORK
from cluster.nfs_objects import claim, pod
from cluster.nfs_objects import directory_of as directory_in_share
from cluster.nfs_server_image import nfs_server_image
from cluster.objects import of_claim
from cluster.progress import PATIENCE, wait_until
from cluster.share import Share
from cluster.story import Story, directory_of, node_of_volume
from cluster.writer import COMMAND, Writer

EXAMPLE = CHECKOUT / "deploy" / "examples" / "nfs-server.yaml"
CLASS = "tatami-inner"
GAP = 60 * PATIENCE  # seconds: a new server, its grace period, and clients that ask again after ever longer pauses
# name of its volume and pod -> node, and whose volume it looks at
WRITERS = {"one": ("nfs1", "two"), "two": ("nfs2", "one")}

MOUNT_FROM_A_POD = """
mkdir -p /run/from-a-pod
network=$(ls /run/netns | head -n 1)
if nsenter --net="/run/netns/$network" mount -t nfs -o vers=4.2,retry=0 "$1:/export" /run/from-a-pod 2>&1; then
  umount /run/from-a-pod
fi
"""


@pytest.fixture
def server(story: Story) -> str:
    """The example, with the image and the network of this cluster; its address."""
    image, archive = nfs_server_image()
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda node: node.import_image(archive), story.nodes.values()))
    text = EXAMPLE.read_text()
    for written, here in (("nfs-ganesha:4.3", image), ("192.0.2.0/24", f"{NETWORK}.0/24")):
        assert text.count(written) == 1
        text = text.replace(written, here)
    story.k.run("apply", "-f", "-", stdin=text)
    story.pods_ready("nfs-server", 1)
    address: str = story.k.get("service", "nfs-server")["spec"]["clusterIP"]
    return address


@pytest.fixture
def upper(story: Story, share: Share, server: str) -> Iterator[str]:
    """A third release of the chart, with a pool on that server. Returns its namespace."""
    running = Kubectl(driver.NFS_NAMESPACE).find("daemonsets")[0]["spec"]["template"]["spec"]["containers"][0]["image"]
    wanted = driver.nfs_values(running.rpartition(":")[2], server, "/export")
    wanted["snapshots"] = "never"
    wanted["nfs"]["pools"]["default"]["size"] = "5Gi"  # of the server's disk
    wanted["nfs"] |= {
        "driverName": "inner.csi.tatami.dev",
        "storageClasses": [{"name": CLASS}],
        "volumeAttributesClasses": [],
        "node": wanted["nfs"]["node"] | {"metricsPort": 9820},
        "controller": wanted["nfs"]["controller"] | {"metricsPort": 9821, "replicas": 1},
    }
    namespace = f"{story.namespace}-driver"
    story.releases.append(namespace)
    try:
        driver.upgrade(wanted, "inner", namespace)
        yield namespace
    finally:
        # Also when the story failed: what uses the server goes before the driver, the driver before the server.
        try:
            _remove_volumes(story)
        finally:
            driver.uninstall("inner", namespace)
            Kubectl().delete("namespace", namespace, wait=False)


def test_a_server_on_a_hostpath_volume_comes_back_to_its_data_under_the_writers_of_its_pool(
    story: Story, share: Share, upper: str, server: str
):
    disk = story.bound("nfs-server")
    node = story.nodes[node_of_volume(disk)[0]]
    export = node.see(directory_of(disk)) / "export"
    story.make(*(claim(name, storage_class=CLASS) for name in WRITERS))
    writers = []
    for name, (place, other) in WRITERS.items():
        volumes = {"/data": of_claim(name), "/other": of_claim(other)}
        story.run(pod(name, volumes, node=place, command=COMMAND, restartPolicy="Never"), 120)
        writers.append(Writer(story, name))
    directories = {name: export / directory_in_share(story.bound(name)) for name in WRITERS}
    for name, (_, other) in WRITERS.items():
        assert f" {server}:/export/{directories[name].name} " in f" {_sources(story, name)} "
        # What is written on one guest lies in the hostpath volume of another node, and is read on the other guest.
        assert (directories[name] / "log").read_text().startswith("1 ")
        assert story.k.sh(name, "head -n 1 /other/log").startswith("1 "), other

    # Whoever is no node, as the pods are not, finds no export.
    assert "No such file or directory" in share.nodes[1].sh(MOUNT_FROM_A_POD, server)

    before = [writer.written() for writer in writers]
    first = story.pods("nfs-server")[0]["metadata"]["name"]
    story.k.delete("pod", first)
    second = story.pods_ready("nfs-server", 1)[0]
    assert second["metadata"]["name"] != first
    assert second["spec"]["nodeName"] == node.name
    assert story.k.get("service", "nfs-server")["spec"]["clusterIP"] == server
    for writer, lines in zip(writers, before, strict=True):
        writer.check(lines, GAP)

    before = [writer.written() for writer in writers]
    starts = _restarts(story, second["metadata"]["name"])
    node.machine.kill("ganesha.nfsd")
    wait_until("the server's next start", lambda: _restarts(story, second["metadata"]["name"]) > starts, 60)
    for writer, lines in zip(writers, before, strict=True):
        writer.check(lines, GAP)

    # Away in the order of docs/nfs.md: pods and claims, then (the fixture) their driver, then the server and its disk.
    _remove_volumes(story)
    for directory in directories.values():
        wait_until(f"the end of {directory}", lambda: not directory.exists(), 60)  # noqa: B023


def _sources(story: Story, name: str) -> str:
    return story.k.sh(name, "cut -d' ' -f1 /proc/mounts").replace("\n", " ")


def _remove_volumes(story: Story) -> None:
    story.k.delete("pods", *WRITERS, now=True, timeout=120)
    story.k.delete("pvc", *WRITERS, timeout=120)
    wait_until("the end of the pool's volumes", lambda: not _of_the_pool(story), 60)


def _of_the_pool(story: Story) -> list[Object]:
    return [pv for pv in story.volumes() if pv["spec"]["storageClassName"] == CLASS]


def _restarts(story: Story, name: str) -> int:
    count: int = story.k.get("pod", name)["status"]["containerStatuses"][0]["restartCount"]
    return count
