"""NFS pools as far as they need no NFS: what a node is told and believes, what an unreachable server does to the others."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from bench import make_bench, mount_capability

from csi_driver.backends.nfs import NfsBackend
from csi_driver.config import NfsPool
from csi_driver.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from csi_driver.linux import mountinfo
from csi_driver.volumes.answers import HealthLevel
from csi_driver.volumes.assembly import assemble
from csi_driver.volumes.handles import Handle
from csi_driver.volumes.model import AccessMode, NodePublication
from csi_driver.volumes.nodes import Nodes, address_towards
from csi_driver.volumes.placement import Placements

HANDLE = str(Handle("fast", "a" * 26))
TOLD = {"pool": "fast", "directory": "ns/claim", "layout": "directory", "epoch": "3", "capacity": "1048576"}
NODE = "node-1@127.0.0.1"


def nfs_pool(name: str = "fast", **changes) -> NfsPool:
    # Nobody serves NFS at this port, and the kernel of most machines that this runs on could not mount it.
    settings = {"server": "127.0.0.1", "path": Path("/srv/share"), "options": ("vers=4.2", "port=1", "hard")}
    return NfsPool(name, **{**settings, **changes})


@pytest.fixture
def bench(tmp_path):
    """A domain with two pools of servers that are not there."""
    backends = {name: NfsBackend(nfs_pool(name, inline=True), tmp_path / "shares" / name) for name in ("fast", "slow")}
    made = make_bench(tmp_path, (), backends=backends, default_pool="fast", node_id=NODE, topology=None)
    yield made
    made.domain.stop(5)


@pytest.fixture
def placements(bench):
    return Placements(bench.domain.pools, NODE)


def find(placements, handle=HANDLE, told=TOLD, context=None):
    return placements.find(handle, mount_capability(AccessMode.MULTI_NODE_MULTI_WRITER, "hard"), told, context or {})


def test_a_node_takes_a_volumes_place_from_the_publish_context(placements, bench):
    place = find(placements)
    assert (place.store.name, place.directory, place.static, place.capacity_bytes) == ("fast", "ns/claim", False, 1048576)
    assert bench.pool("fast").backend.generation == 0, "nothing was mounted in order to find it"


def test_without_a_publish_context_nothing_is_believed(placements):
    with pytest.raises(FailedPrecondition, match="attachRequired"):
        find(placements, told={}, context={"pool": "fast", "directory": "ns/claim"})


@pytest.mark.parametrize("key", ["pool", "directory", "layout", "epoch"])
def test_a_publish_context_that_lacks_something_is_refused_by_its_name(placements, key):
    with pytest.raises(InvalidArgument, match=key):
        find(placements, told={name: value for name, value in TOLD.items() if name != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("directory", bad)
            for bad in ("..", "../x", "a/../b", "/etc", "", ".csi", "a b", "a,b", "a:b", "a\nb", "-o", "archived/x", "a//b")
        ),
        ("pool", "slow"),
        ("pool", "10.0.0.9:/srv"),
        ("layout", "zfs"),
        ("accessType", ""),
        ("accessType", "block"),
        ("fsType", "ntfs"),
        ("fsType", ""),
        *(("epoch", bad) for bad in ("", "-1", "1.0", "٣", "9" * 19)),
        *(("capacity", bad) for bad in ("", "-1", "many", "1e9")),
    ],
)
def test_a_publish_context_that_no_controller_of_ours_gives_is_refused(placements, key, value):
    image = {"layout": "image", "accessType": "mount", "fsType": "ext4"} if key in {"accessType", "fsType"} else {}
    with pytest.raises(InvalidArgument, match=key):
        find(placements, told={**TOLD, **image, key: value})


@pytest.mark.parametrize("key", ["server", "share", "source", "options"])
def test_what_else_a_context_says_of_a_volume_of_ours_changes_nothing(placements, key):
    evil = {key: "10.0.0.9:/srv/evil"}
    assert find(placements, told={**TOLD, **evil}, context=evil) == find(placements)


def test_a_static_volume_is_where_the_controller_found_it(placements):
    context = {"pool": "fast", "directory": "data/old"}
    place = find(placements, "an-admins-volume", {**TOLD, "directory": "data/old", "epoch": "0"}, context)
    assert (place.directory, place.static) == ("data/old", True)
    with pytest.raises(InvalidArgument, match="no such pool"):
        find(placements, "an-admins-volume", TOLD, {**context, "pool": "nowhere"})
    with pytest.raises(InvalidArgument, match="server"):
        find(placements, "an-admins-volume", TOLD, {**context, "server": "10.0.0.9"})
    with pytest.raises(NotFound):
        find(placements, "an-admins-volume", TOLD, {})
    with pytest.raises(InvalidArgument, match="static"):
        find(placements, "an-admins-volume", {**TOLD, "layout": "image", "accessType": "mount", "fsType": "ext4"}, context)


@pytest.mark.parametrize("flag", ["addr=10.0.0.9", "hrad", "port=2049", "vers=9", "bind"])
def test_a_mount_flag_that_no_nfs_mount_may_have_is_refused_wherever_it_is_said(bench, flag):
    capability = mount_capability(AccessMode.MULTI_NODE_MULTI_WRITER, flag)
    request = replace(bench.request("v", pool="fast"), capabilities=(capability,))
    with pytest.raises(InvalidArgument, match=r"mount_flags\[0\]"):
        bench.volumes.create(request, time.monotonic() + 10)
    with pytest.raises(InvalidArgument, match=r"mount_flags\[0\]"):
        Placements(bench.domain.pools, NODE).find(HANDLE, capability, TOLD, {})


# --- a server that is away --------------------------------------------------------------------------------------------------------


def test_a_server_that_is_away_at_the_start_is_said_in_health_and_not_by_a_probe(bench):
    assert bench.health.ready() is None
    (first, second) = bench.health.storage()
    assert {first.level, second.level} == {HealthLevel.INACCESSIBLE}
    assert {first.reason, second.reason} == {"PoolUnreachable"}
    assert "127.0.0.1:/srv/share" in first.message


def test_a_call_about_a_pool_that_cannot_be_mounted_is_unavailable_whatever_the_reason_and_at_once_the_second_time(bench):
    for call in (
        lambda: bench.volumes.delete(HANDLE),
        lambda: bench.volumes.get(HANDLE),
        lambda: bench.create("v", pool="fast"),
        lambda: bench.attachments.publish(HANDLE, NodePublication(NODE, AccessMode.SINGLE_NODE_WRITER), mount_capability(), {}),
    ):
        with pytest.raises(Unavailable, match="fast"):
            call()
    started = time.monotonic()
    for _ in range(100):
        with pytest.raises(Unavailable):
            bench.pool("fast").backend.root()
    assert time.monotonic() - started < 0.5


def test_nothing_is_written_below_a_share_that_is_not_mounted(bench, tmp_path):
    with pytest.raises(Unavailable):
        bench.create("v", pool="fast")
    assert [path for path in (tmp_path / "shares").rglob("*") if path.is_file()] == []
    assert not (tmp_path / "shares/fast/.csi").exists()
    for place in ("fast", "slow"):
        assert (tmp_path / "shares" / place).stat().st_mode & 0o777 == 0o700
    assert not mountinfo.mounts_below(tmp_path / "shares")


def test_a_node_alone_mounts_no_share(tmp_path, bench):
    installation = replace(
        bench.installation,
        controller=False,
        backends={"fast": NfsBackend(nfs_pool(), tmp_path / "node-shares" / "fast")},
    )
    domain = assemble(installation)
    domain.prepare()
    domain.sweeper.sweep()
    assert domain.services.health.ready() is None
    assert list(domain.services.health.storage()) == []
    assert not (tmp_path / "node-shares").exists()


def test_an_unknown_volume_is_unpublished_and_unstaged_without_its_server(bench):
    for handle in (HANDLE, "an-admins-volume"):
        bench.node.unpublish(handle, bench.target("pod"))
        bench.node.unstage(handle, bench.staging_of(handle))


def test_an_inline_volume_whose_server_is_away_is_unpublished_all_the_same(bench):
    with pytest.raises(Unavailable):
        bench.node.publish(_inline(bench, "csi-1"))
    bench.node.unpublish("csi-1", bench.target("pod"))
    assert not Path(bench.target("pod")).exists()


def _inline(bench, handle):
    from csi_driver.volumes.parameters import EPHEMERAL
    from csi_driver.volumes.requests import PublishVolume

    return PublishVolume(handle, bench.target("pod"), mount_capability(), False, volume_context={EPHEMERAL: "true"})


# --- names ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "path", "directory", "source"),
    [
        ("nas.example", "/srv/share", "ns/claim", "nas.example:/srv/share/ns/claim"),
        ("[fd00::1]", "/srv", "v", "[fd00::1]:/srv/v"),
        ("10.0.0.7", "/", "v", "10.0.0.7:/v"),
    ],
)
def test_the_source_of_a_volume_is_its_pools_server_and_path(tmp_path, server, path, directory, source):
    backend = NfsBackend(nfs_pool(server=server, path=Path(path)), tmp_path / "share")
    assert backend.source_of(directory) == source
    assert backend.is_staged(directory, tmp_path) is False
    assert backend.mounts_of(directory) == []


def test_a_pool_whose_options_no_mount_can_have_is_not_made(tmp_path):
    with pytest.raises(InvalidArgument, match=r"\[pools.fast\] options\[1\]"):
        NfsBackend(nfs_pool(options=("hard", "addr=10.0.0.9")), tmp_path)


@pytest.mark.parametrize("node_id", ["node-1@10.0.0.7", "node-1.example@fd00::7"])
def test_a_node_of_nfs_pools_is_a_name_and_an_address(node_id):
    Nodes("other", only_own=False, with_address=True).check(node_id)


@pytest.mark.parametrize(
    "node_id",
    [
        "node-1",
        "node-1@",
        "@10.0.0.7",
        "node-1@10.0.0",
        "node-1@nas.example",
        "node-1@10.0.0.7@x",
        "a b@10.0.0.7",
        "Node@10.0.0.7",
    ],
)
def test_an_id_of_another_shape_is_no_node(node_id):
    with pytest.raises(NotFound, match="address"):
        Nodes("other", only_own=False, with_address=True).check(node_id)


def test_this_nodes_address_is_the_one_from_which_it_would_speak_to_the_server():
    assert address_towards(["127.0.0.1"]) == "127.0.0.1"
    assert address_towards(["no-such-host.invalid", "127.0.0.5"]) == "127.0.0.1"
