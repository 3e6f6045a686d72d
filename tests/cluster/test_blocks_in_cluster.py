"""Raw blocks (`volumeMode: Block`), on hostPath: a device that a pod writes, reads, sees grow, or may only read."""

import pytest

from cluster.objects import claim, of_claim, pod, storage_class
from cluster.progress import wait_until
from cluster.story import Story, directory_of

MIB = 1 << 20
WRITE = "printf '%-512s' '{text}' | dd of=/dev/data bs=512 seek={block} conv=fsync,notrunc 2>/dev/null"
READ = "dd if=/dev/data bs=512 skip={block} count=1 2>/dev/null"


def _user(story: Story, name: str, *, read_only: bool = False, node: str = "") -> None:
    """Run a pod that has the claim `data` as /dev/data."""
    story.run(pod(name, devices={"/dev/data": of_claim("data", read_only=read_only)}, node=node))


def _read(story: Story, name: str, block: int = 0) -> str:
    return story.k.sh(name, READ.format(block=block)).rstrip(" ")


def _size(story: Story, name: str) -> int:
    return int(story.k.sh(name, "blockdev --getsize64 /dev/data"))


def test_a_pod_writes_blocks_and_the_next_one_reads_them(story: Story):
    story.make(claim("data", size="64Mi", volumeMode="Block"))
    _user(story, "first")
    assert story.k.sh("first", "stat -c %F /dev/data").strip() == "block special file"
    assert _size(story, "first") == 64 * MIB
    last = 64 * MIB // 512 - 1
    story.k.sh("first", f"{WRITE.format(text='begin', block=0)}; {WRITE.format(text='end', block=last)}")
    with pytest.raises(RuntimeError):
        story.k.sh("first", WRITE.format(text="beyond", block=last + 1))
    pv = story.bound("data")
    assert pv["spec"]["volumeMode"] == "Block"
    image = story.node_of("first").see(directory_of(pv)) / "image"
    assert image.stat().st_size == 64 * MIB

    story.k.delete("pod", "first")
    _user(story, "second")
    assert (_read(story, "second"), _read(story, "second", last)) == ("begin", "end")
    story.k.delete("pod", "second")
    story.k.delete("pvc", "data")
    story.k.gone("pv", pv["metadata"]["name"])
    wait_until("the end of the image", lambda: not image.exists(), 10)


def test_a_device_grows_while_it_is_used(story: Story):
    story.make(claim("data", size="64Mi", volumeMode="Block"))
    _user(story, "user")
    story.k.sh("user", WRITE.format(text="begin", block=0))
    story.resize("data", "96Mi")
    story.resized("data", "96Mi")
    assert _size(story, "user") == 96 * MIB
    story.k.sh("user", WRITE.format(text="new end", block=96 * MIB // 512 - 1))
    assert (_read(story, "user"), _read(story, "user", 96 * MIB // 512 - 1)) == ("begin", "new end")
    assert story.k.get("pod", "user")["status"]["containerStatuses"][0]["restartCount"] == 0


def test_a_reader_of_a_device_reads_what_its_writer_wrote_and_cannot_write(story: Story):
    story.make(claim("data", size="64Mi", volumeMode="Block"))
    _user(story, "writer")
    story.k.sh("writer", WRITE.format(text="hello", block=3))
    _user(story, "reader", read_only=True)
    assert _read(story, "reader", 3) == "hello"
    with pytest.raises(RuntimeError):
        story.k.sh("reader", WRITE.format(text="no", block=3))
    assert _read(story, "writer", 3) == "hello"


def test_a_class_of_directories_refuses_blocks_where_the_admin_looks(story: Story):
    story.make(storage_class("directories", parameters={"layout": "directory"}))
    story.make(claim("data", size="64Mi", storage_class="directories", volumeMode="Block"))
    story.make(pod("user", devices={"/dev/data": of_claim("data")}))
    story.refused("PersistentVolumeClaim", "data", "ProvisioningFailed", "layout")
    assert story.volumes() == []
