"""What docs/install.md tells a newcomer to do, on hostpath: one `kubectl apply`, and uninstalling in the right order."""

from cluster import driver
from cluster.driver import HOSTPATH
from cluster.images import BUSYBOX
from cluster.kubectl import Kubectl, Object, ready
from cluster.layout import CHECKOUT
from cluster.nodes import Node
from cluster.objects import claim, of_claim, pod, storage_class
from cluster.progress import wait_until
from cluster.story import Story

EXAMPLE = CHECKOUT / "deploy" / "examples" / "claim.yaml"


def test_the_example_is_bound_and_written_to_by_one_apply(story: Story):
    story.k.run("apply", "-f", "-", stdin=EXAMPLE.read_text().replace("busybox:1.36", BUSYBOX))
    story.k.wait("pod", "writer", ready)
    assert story.bound("data")["spec"]["storageClassName"] == "tatami"
    assert story.k.sh("writer", "wc -l < /data/dates").strip() == "1"


def test_an_uninstalled_driver_leaves_nothing_but_retained_data_and_a_new_one_goes_on_with_it(story: Story):
    story.make(storage_class("keep", reclaimPolicy="Retain"), claim("data", storage_class="keep"))
    story.run(pod("writer", {"/data": of_claim("data")}))
    story.k.sh("writer", "echo kept > /data/letter")
    image = Kubectl(driver.NAMESPACE).find("daemonsets")[0]["spec"]["template"]["spec"]["containers"][0]["image"]
    pv = story.bound("data")["metadata"]["name"]
    story.k.delete("pod", "writer")
    for node in story.nodes.values():
        # The pod is gone before the kubelet has unstaged its volume.
        wait_until(f"{node.name} to let go of all volumes", lambda: _mounts(node) == [], 60)  # noqa: B023
    driver.uninstall()
    try:
        assert not Kubectl().exists("csidriver", HOSTPATH)
        for kind in ("pods", "daemonsets", "deployments", "configmaps"):
            # helm does not wait for the pods of what it has deleted.
            wait_until(f"the end of the driver's {kind}", lambda: _of_the_release(kind) == [], 60)  # noqa: B023
        for node in story.nodes.values():
            wait_until(f"{node.name} to forget the driver", lambda: _drivers(node.name) == [], 60)  # noqa: B023
            assert list(node.see("/var/lib/kubelet/plugins_registry").iterdir()) == []
            assert _mounts(node) == []
    finally:
        driver.upgrade(driver.values(image.rpartition(":")[2]))
        story.k.patch("pv", pv, {"spec": {"persistentVolumeReclaimPolicy": "Delete"}})
    story.run(pod("reader", {"/data": of_claim("data")}), 120)
    assert story.k.sh("reader", "cat /data/letter") == "kept\n"


def _mounts(node: Node) -> list[str]:
    return [mount for mount in node.mounts() if HOSTPATH in mount]


def _of_the_release(kind: str) -> list[Object]:
    return Kubectl(driver.NAMESPACE).find(kind, "app.kubernetes.io/instance=tatami")


def _drivers(node: str) -> list[str]:
    return [one["name"] for one in Kubectl().get("csinode", node)["spec"].get("drivers") or []]
