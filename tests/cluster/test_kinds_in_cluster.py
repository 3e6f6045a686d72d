"""Other ways to have a volume, on hostPath: inline, generic ephemeral, by VolumeAttributesClass."""

import shutil

from cluster.driver import HOSTPATH, POOL
from cluster.objects import claim, of_claim, pod
from cluster.progress import wait_until
from cluster.story import Story, directory_of


def _inline(**attributes: str) -> dict[str, object]:
    return {"csi": {"driver": HOSTPATH, "volumeAttributes": attributes}}


def test_an_inline_volume_lives_as_long_as_its_pod(story: Story):
    story.run(pod("user", {"/data": _inline(size="1Gi", pool="default")}))
    story.k.sh("user", "echo mine > /data/letter")
    node = story.node_of("user")
    found = [path for path in node.see(POOL).glob("**/letter") if path.read_text() == "mine\n"]
    assert len(found) == 1, found
    story.k.delete("pod", "user")
    wait_until("the end of the data", lambda: not found[0].exists(), 30)


def test_an_inline_volume_may_not_say_more_than_its_size_and_pool(story: Story):
    story.make(pod("user", {"/data": _inline(size="1Gi", directory="../../etc")}))
    event = story.refused("Pod", "user", "FailedMount", "directory")
    assert "InvalidArgument" in event
    story.k.delete("pod", "user")


def test_a_generic_ephemeral_volume_comes_and_goes_with_its_pod(story: Story):
    template = {"metadata": {}, "spec": claim("unused")["spec"]}
    story.run(pod("user", {"/data": {"ephemeral": {"volumeClaimTemplate": template}}}))
    story.k.sh("user", "echo mine > /data/letter")
    pv = story.bound("user-volume-0")
    directory = story.node_of("user").see(directory_of(pv))
    assert (directory / "letter").read_text() == "mine\n"
    story.k.delete("pod", "user")
    story.k.gone("pvc", "user-volume-0")
    story.k.gone("pv", pv["metadata"]["name"])
    wait_until("the end of the directory", lambda: not directory.exists(), 10)


def test_a_volume_attributes_class_decides_when_the_volume_is_made(story: Story):
    story.make(claim("data", volumeAttributesClassName="tatami-retain"))
    story.run(pod("user", {"/data": of_claim("data")}))
    story.k.sh("user", "echo kept > /data/letter")
    pv = story.bound("data")
    directory = story.node_of("user").see(directory_of(pv))
    story.k.delete("pod", "user")
    story.k.delete("pvc", "data")
    story.k.gone("pv", pv["metadata"]["name"])  # the class of the volume is Delete; the data stays by onDelete: retain
    assert (directory / "letter").read_text() == "kept\n"
    shutil.rmtree(directory)  # as an admin does; until then the volume's size is not given to another
