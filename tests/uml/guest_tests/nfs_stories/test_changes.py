"""What changes below running volumes: servers move, directories are replaced, node processes restart; and what is not the driver's own."""

import os
import subprocess
import sys
import time

import pytest
from driver_in_guest import RWO, Volume, of_pod, pool_of, refused, shell, sources

from csi_driver.rpc import csi_pb2 as csi

APPEND = """
import os, sys, time
file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
while True:
    os.write(file, b"line\\n")
    os.fsync(file)
    print("wrote", flush=True)
    time.sleep(0.1)
"""


def test_a_pool_that_moves_to_another_server_is_followed_by_the_next_stage(cluster, story_server, story_pools, make_server):
    volume = cluster.create("traveller", pool="moving")
    before, after = cluster.use(volume, 0), cluster.use(volume, 1)
    cluster.mount(before)
    shell(before, f"echo content >{before.target}/file && sync {before.target}/file")
    # The admin copies the share to a new machine and changes the pool's server; no PV is touched.
    new = make_server("new")
    new_path = new.filesystem("xfs", name="new")
    shell(new.node, f"cp -a {story_server.tree('/srv/xfs/moving')}/. {new_path}/")
    new.export(new_path)
    cluster.configure([*(pool for name, pool in story_pools.items() if name != "moving"), pool_of(new, new_path, "moving")])
    try:
        cluster.restart()
        directory = cluster.attach(after)["directory"]
        cluster.stage(after)
        cluster.publish(after)
        assert sources(after.driver.node)[str(after.staging)] == f"{new.address}:{new_path}/{directory}"
        assert shell(after, f"cat {after.target}/file") == "content\n"
        # Where it was mounted before, it still is, and goes as it should.
        assert sources(before.driver.node)[str(before.target)] == f"{story_server.address}:/srv/xfs/moving/{directory}"
        cluster.unmount(before)
        assert str(before.staging) not in sources(before.driver.node)
        made = cluster.create("settler", pool="moving")
        assert new.tree(new_path / cluster.attach(cluster.use(made))["directory"]).is_dir()
        cluster.detach(cluster.use(made))
        cluster.unmount(after)
    finally:
        cluster.configure(story_pools.values())
        cluster.restart()


def test_a_pool_whose_share_is_empty_at_the_new_server_is_not_served(cluster, story_pools, make_server):
    volume = cluster.create("left-behind", pool="moving")
    new = make_server("empty")
    new_path = new.filesystem("xfs", name="empty")
    new.export(new_path)
    cluster.configure([*(pool for name, pool in story_pools.items() if name != "moving"), pool_of(new, new_path, "moving")])
    try:
        cluster.restart()
        # Not "not found": its data is somewhere, and external-provisioner must not forget it.
        with refused("UNAVAILABLE", "moving"):
            cluster.controller.call("DeleteVolume", csi.DeleteVolumeRequest(volume_id=volume.handle))
        with refused("UNAVAILABLE", "moving"):
            cluster.attach(cluster.use(volume))
        assert not list(new.tree(new_path).iterdir())
    finally:
        cluster.configure(story_pools.values())
        cluster.restart()


def test_a_restarted_node_process_finds_its_mounts_and_disturbs_no_pod(cluster):
    volume = cluster.create("restarted", pool="default")
    use = cluster.use(volume, mode=RWO)
    cluster.mount(use)
    writer = use.driver.node.popen([sys.executable, "-c", APPEND, f"{use.target}/log"], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "wrote\n"
    before = sources(use.driver.node)
    for end in (use.driver.kill, use.driver.stop):
        end()
        use.driver.start()
        assert sources(use.driver.node) == before
        assert writer.poll() is None
        # All again, as the kubelet does after it lost its own memory: the same answer, and no second mount.
        cluster.stage(use)
        cluster.publish(use)
        assert sources(use.driver.node) == before
        asked = csi.NodeGetVolumeStatsRequest(volume_id=volume.handle, volume_path=str(use.target))
        assert use.driver.insist("NodeGetVolumeStats", asked).usage
    lines = shell(use, f"wc -l <{use.target}/log")
    time.sleep(1)
    assert int(shell(use, f"wc -l <{use.target}/log")) > int(lines)
    second = of_pod(use, "second")
    cluster.publish(second)
    cluster.unpublish(second)
    writer.kill()
    writer.wait(10)
    writer.stdout.close()
    cluster.unmount(use)
    assert not any(volume.short in target for target in sources(use.driver.node))


def test_a_share_that_was_replaced_on_the_server_is_mounted_again_by_the_controller(cluster, story_server):
    volume = cluster.create("before-the-swap", pool="stale")
    place = story_server.tree("/srv/xfs/stale")
    # As after a restore from a backup: the same names, other inodes.
    shell(
        story_server.node,
        "cd /srv/xfs && cp -a stale stale.new && mv stale stale.old && mv stale.new stale && rm -rf stale.old",
    )
    assert cluster.create("before-the-swap", pool="stale").handle == volume.handle
    made = cluster.create("after-the-swap", pool="stale")
    assert (place / ".csi/volumes" / f"{made.handle.rpartition('.')[2]}.json").exists()
    for each in (volume, made):
        cluster.delete(each)


def test_a_volume_whose_directory_was_replaced_on_the_server_is_mounted_again_by_the_next_stage(cluster, story_server):
    volume = cluster.create("swapped", pool="stale")
    use = cluster.use(volume)
    directory = cluster.attach(use)["directory"]
    cluster.stage(use)
    cluster.publish(use)
    shell(use, f"echo content >{use.target}/file && sync {use.target}/file")
    cluster.unpublish(use)
    shell(story_server.node, f"cd /srv/xfs/stale && cp -a {directory} new && rm -rf {directory} && mv new {directory}")
    assert "Stale" in shell(use, f"ls {use.staging}", check=False).stderr
    cluster.stage(use)
    cluster.publish(use)
    assert shell(use, f"cat {use.target}/file") == "content\n"
    cluster.unmount(use)
    cluster.delete(volume)


def test_after_a_stale_export_has_come_back_all_goes_on(cluster, story_server):
    volume = cluster.create("unexported", pool="default")
    use = cluster.use(volume)
    cluster.mount(use)
    story_server.unexport("/srv/xfs")
    try:
        assert shell(use, f"ls {use.target}", check=False).returncode
        request = csi.CreateVolumeRequest(
            name="meanwhile", volume_capabilities=[use.capability], parameters={"pool": "default"}
        )
        # Whatever happens now may be over soon, so nothing final is said.
        with refused("UNAVAILABLE", "default"):
            cluster.controller.call("CreateVolume", request)
    finally:
        story_server.export("/srv/xfs")
    cluster.delete(cluster.create("meanwhile", pool="default"))
    cluster.stage(use)
    assert shell(use, f"touch {use.target}/file && ls {use.target}") == "file\n"
    cluster.unmount(use)
    cluster.delete(volume)


def test_a_static_volume_is_mounted_and_never_changed_or_deleted(cluster, story_server):
    top = story_server.tree("/srv/xfs/default/legacy/data")
    top.mkdir(parents=True)
    (top / "file").write_text("old\n")
    top.chmod(0o751)
    volume = Volume("legacy-data", {"pool": "default", "directory": "legacy/data"})
    first, second = cluster.use(volume, 0), cluster.use(volume, 1)
    for use in (first, second):
        cluster.mount(use)
        assert shell(use, f"cat {use.target}/file") == "old\n"
        assert sources(use.driver.node)[str(use.target)] == f"{story_server.address}:/srv/xfs/default/legacy/data"
    shell(first, f"echo new >{first.target}/new")
    assert shell(second, f"cat {second.target}/new") == "new\n"
    for use in (first, second):
        cluster.unmount(use)
    cluster.delete(volume)
    assert (top / "file").read_text() == "old\n"
    assert top.stat().st_mode & 0o7777 == 0o751
    with refused("NOT_FOUND"):
        cluster.attach(cluster.use(Volume("nothing-there", {"pool": "default", "directory": "legacy/nothing"})))


# --- groups and owners ---------------------------------------------------------------------------------------------------------------


def groups_of(use) -> set[str]:
    """Return the groups of all that is in a mounted volume, as the node sees them."""
    return set(shell(use, f"find {use.target} -printf '%g\\n'").split())


def test_a_new_volume_belongs_to_the_pods_group_and_so_does_what_is_written_into_it(cluster):
    volume = cluster.create("group-new", pool="default")
    use = cluster.use(volume, group="4321")
    cluster.mount(use)
    done = use.driver.node.run(
        ["/usr/bin/setpriv", "--reuid=1000", "--regid=1000", "--groups=4321", "--", "/usr/bin/mkdir", f"{use.target}/dir"]
    )
    assert done.returncode == 0
    assert shell(use, f"stat -c %g:%A {use.target} {use.target}/dir").split() == ["4321:drwxrwsr-x", "4321:drwxr-sr-x"]
    cluster.unmount(use)
    cluster.delete(volume)


def test_restored_content_is_given_to_the_group_once(cluster):
    origin = cluster.create("group-origin", pool="default")
    use = cluster.use(origin)
    cluster.mount(use)
    shell(
        use,
        f"mkdir -p {use.target}/a/b && touch {use.target}/a/b/file{{1..40}} && ln -s nowhere {use.target}/link && chmod 600 {use.target}/a/b/file1",
    )
    snapshot = cluster.snapshot("group", origin)
    restored = cluster.create("group-restored", pool="default", snapshot=snapshot)
    pod = cluster.use(restored, 1, group="4321")
    cluster.mount(pod)
    assert groups_of(pod) == {"4321"}
    assert shell(pod, f"stat -c %A {pod.target}/a {pod.target}/a/b/file1").split() == ["drwxrwsr-x", "-rw-rw----"]
    # What a tenant then does himself, stays: the walk is over.
    shell(pod, f"chgrp 777 {pod.target}/a/b/file2")
    cluster.unmount(pod)
    cluster.mount(pod)
    assert groups_of(pod) == {"4321", "777"}
    # The origin, and what was captured of it, are as they were.
    assert groups_of(use) == {"0"} or groups_of(use) == {"root"}
    cluster.unmount(pod)
    cluster.unmount(use)


def test_a_file_that_a_squashed_root_may_not_read_is_named_and_nothing_is_left_of_what_was_captured(cluster, story_server):
    volume = cluster.create("secretive", pool="squashed", mode="0777")
    use = cluster.use(volume)
    cluster.mount(use)
    as_owner = ["/usr/bin/setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", "--", "/bin/sh", "-c"]
    made = f"cd {use.target} && mkdir folder && echo open >folder/open && echo hidden >folder/secret && chmod 600 folder/secret"
    assert use.driver.node.run([*as_owner, made]).returncode == 0
    control = story_server.tree("/srv/squashed/.csi")
    for act in (
        lambda: cluster.snapshot("secretive", volume),
        lambda: cluster.create("secretive-clone", pool="squashed", volume=volume.handle),
    ):
        with refused("FAILED_PRECONDITION", "'folder/secret' cannot be copied whole"):
            act()
        assert not list((control / "staging").iterdir())
        assert not list((control / "snapshots").glob("*.json"))
        assert not list((control / "snapshots-data").iterdir())
        assert len(list((control / "volumes").glob("*.json"))) == 1
    # Once its owner lets it be read, the same request is carried out.
    assert use.driver.node.run([*as_owner, f"chmod 644 {use.target}/folder/secret"]).returncode == 0
    snapshot = cluster.snapshot("secretive", volume)
    restored = cluster.create("secretive-restored", pool="squashed", snapshot=snapshot)
    second = cluster.use(restored, 1)
    assert shell(second, f"cat {cluster.mount(second)}/folder/secret") == "hidden\n"
    for each, made_volume in ((use, volume), (second, restored)):
        cluster.unmount(each)
        cluster.delete(made_volume)
    cluster.controller.insist("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id=snapshot))


def test_a_root_squashing_server_works_and_what_it_cannot_do_is_said_with_what_would_help(cluster, story_server):
    volume = cluster.create("squashed", pool="squashed", mode="0777")
    use = cluster.use(volume)
    cluster.mount(use)
    done = use.driver.node.run(
        [
            "/usr/bin/setpriv",
            "--reuid=1000",
            "--regid=1000",
            "--clear-groups",
            "--",
            "/bin/sh",
            "-c",
            f"echo content >{use.target}/file",
        ]
    )
    assert done.returncode == 0
    (inside,) = story_server.tree("/srv/squashed").glob(f"{cluster.attach(use)['directory']}/file")
    assert inside.read_text() == "content\n"
    assert inside.parent.stat().st_uid == 65534
    snapshot = cluster.snapshot("squashed", volume)
    restored = cluster.create("squashed-restored", pool="squashed", snapshot=snapshot)
    second = cluster.use(restored, 1)
    assert shell(second, f"cat {cluster.mount(second)}/file") == "content\n"
    # What cannot be had is refused by name of the export's option, and the pool says so by itself, too.
    with refused("FAILED_PRECONDITION", "no_root_squash"):
        cluster.create("squashed-owner", pool="squashed", uid="1000")
    health = cluster.controller.call("ControllerGetVolumeHealth", csi.ControllerGetVolumeHealthRequest(volume_id=volume.handle))
    assert "no_root_squash" in str(health)
    foreign = cluster.use(volume, 1, group="4321")
    cluster.attach(foreign)
    with refused("FAILED_PRECONDITION", "no_root_squash"):
        cluster.stage(foreign)
    cluster.unstage(foreign)
    cluster.detach(foreign)
    for each in (use, second):
        cluster.unmount(each)
        cluster.delete(each.volume)


@pytest.mark.parametrize("pool", ["default", "v3"])
def test_a_deleted_volume_leaves_nothing_of_itself_on_the_server(cluster, story_server, pool):
    volume = cluster.create(f"deleted-{pool}", pool=pool)
    use = cluster.use(volume)
    place = story_server.tree(f"/srv/xfs/{pool}") / cluster.attach(use)["directory"]
    cluster.stage(use)
    cluster.publish(use)
    shell(use, f"mkdir -p {use.target}/a/b && touch {use.target}/a/b/file && chmod 0 {use.target}/a")
    cluster.unmount(use)
    cluster.delete(volume)
    assert not place.exists()
    trash = story_server.tree(f"/srv/xfs/{pool}/.csi/trash")
    until = time.monotonic() + 30
    while os.listdir(trash) and time.monotonic() < until:
        time.sleep(0.1)
    assert not os.listdir(trash)
