"""Nothing that a PV, a class, a claim or a context says makes a node mount anything but what the pool says."""

import itertools

import pytest
from driver_in_guest import Volume, mount_options, refused, sources

from csi_driver.rpc import csi_pb2 as csi

NAMES = itertools.count()
EVIL = "10.99.0.253"


@pytest.fixture
def volume(cluster):
    """A volume, attached to the first node."""
    volume = cluster.create(f"hostile-{next(NAMES)}", pool="default")
    cluster.attach(cluster.use(volume))
    return volume


@pytest.fixture(autouse=True)
def nothing_else_is_mounted(cluster, story_server):
    """After each test, whatever a node has mounted is of the pools' server."""
    yield
    for driver in cluster.nodes:
        for target, source in sources(driver.node).items():
            assert source.startswith(f"{story_server.address}:/srv/"), target


HOSTILE_FLAGS = [
    f"addr={EVIL}",
    f"mountaddr={EVIL}",
    f"mounthost={EVIL}",
    f"vers=4.2,addr={EVIL}",
    f"hard\taddr={EVIL}",
    f"hard\naddr={EVIL}",
    f"hard addr={EVIL}",
    f"source={EVIL}:/srv/xfs",
    f"{EVIL}:/srv/xfs",
    "clientaddr=10.99.0.1",
    "port=2050",
    "mountport=20480",
    "bind",
    "remount",
    "bg",
    "-o",
    "--bind",
    "fsc=../../etc",
    "sec=krb9",
    "vers=4.2\0",
    "rsize=1m",
    "loop",
    "x-systemd.automount",
    "context=system_u",
    "",
]


@pytest.mark.parametrize("flag", HOSTILE_FLAGS)
def test_a_mount_option_that_leads_elsewhere_is_refused_wherever_it_is_said(cluster, volume, flag):
    use = cluster.use(volume, flags=(flag,))
    before = sources(use.driver.node)
    with refused("INVALID_ARGUMENT", "mount_flags"):
        cluster.create(f"refused-{next(NAMES)}", flags=(flag,), pool="default")
    with refused("INVALID_ARGUMENT", "mount_flags"):
        cluster.stage(use)
    cluster.detach(cluster.use(volume))
    with refused("INVALID_ARGUMENT", "mount_flags"):
        cluster.attach(use)
    assert sources(use.driver.node) == before


HOSTILE_DIRECTORIES = [
    "..", "../other", "a/../../b", "/etc", "", ".", ".csi", ".csi/volumes", "a b", "a,b", "a:b", f"{EVIL}:/srv", "-o", "a\\b", 'a"b', "a\nb",
    "lost+found", "archived", "a//b", "x" * 200,
]  # fmt: skip


@pytest.mark.parametrize("directory", HOSTILE_DIRECTORIES)
def test_a_directory_that_leads_elsewhere_is_refused_in_a_context(cluster, volume, directory):
    use = cluster.use(volume)
    told = {**cluster.attach(use), "directory": directory}
    before = sources(use.driver.node)
    with refused("INVALID_ARGUMENT", "directory"):
        cluster.stage(use, told)
    static = Volume("an-admins-directory", {"pool": "default", "directory": directory})
    with refused("INVALID_ARGUMENT", "directory"):
        cluster.attach(cluster.use(static))
    with refused("INVALID_ARGUMENT", "directory"):
        cluster.stage(cluster.use(static), told)
    assert sources(use.driver.node) == before


@pytest.mark.parametrize("key", ["server", "share", "path", "subDir", "source", "options", "mountOptions", "addr"])
def test_a_volume_context_that_names_a_server_or_a_share_changes_nothing_or_is_refused(cluster, story_server, volume, key):
    evil = {key: f"{EVIL}:/srv/evil"}
    # Of a volume of ours nothing in the PV is read: it is mounted from where the pool is.
    use = cluster.use(Volume(volume.handle, {**volume.context, **evil}))
    told = {**cluster.attach(use), **evil}
    cluster.stage(use, told)
    assert sources(use.driver.node)[str(use.staging)] == f"{story_server.address}:/srv/xfs/default/{told['directory']}"
    cluster.unstage(use)
    static = Volume("an-admins-directory", {"pool": "default", "directory": "somewhere", **evil})
    with refused("INVALID_ARGUMENT", key):
        cluster.attach(cluster.use(static))
    with refused("INVALID_ARGUMENT", key):
        cluster.create(f"refused-{next(NAMES)}", pool="default", **evil)


@pytest.mark.parametrize(
    "change", [{"pool": "v41"}, {"pool": "nowhere"}, {"layout": "image"}, {"epoch": "-1"}, {"capacity": "many"}]
)
def test_a_publish_context_that_is_not_what_the_controller_said_is_refused(cluster, volume, change):
    use = cluster.use(volume)
    told = {**cluster.attach(use), **change}
    with refused("INVALID_ARGUMENT", next(iter(change))):
        cluster.stage(use, told)
    for key in ("pool", "directory", "layout", "epoch"):
        with refused("INVALID_ARGUMENT", key):
            cluster.stage(use, {name: value for name, value in cluster.attach(use).items() if name != key})
    assert str(use.staging) not in sources(use.driver.node)


def test_a_static_volume_cannot_name_a_volume_of_the_driver_or_what_is_above_or_in_it(cluster, volume):
    directory = cluster.attach(cluster.use(volume))["directory"]
    for place in (directory, f"{directory}/inside"):
        with refused("INVALID_ARGUMENT", "overlaps"):
            cluster.attach(cluster.use(Volume("an-admins-directory", {"pool": "default", "directory": place})))


def test_a_static_volume_cannot_be_reached_through_a_symlink(cluster, story_server):
    story_server.tree("/srv/xfs/default/way").symlink_to("/srv/xfs/v41")
    story_server.tree("/srv/xfs/default/up").symlink_to("..")
    for place, code in (("way", "NOT_FOUND"), ("way/inside", "INVALID_ARGUMENT"), ("up/v41", "INVALID_ARGUMENT")):
        with refused(code, place):
            cluster.attach(cluster.use(Volume("an-admins-directory", {"pool": "default", "directory": place})))


@pytest.mark.parametrize("key", ["server", "pool", "share", "mountOptions"])
def test_a_snapshot_class_says_nothing(cluster, volume, key):
    request = csi.CreateSnapshotRequest(name="hostile", source_volume_id=volume.handle, parameters={key: EVIL})
    with refused("INVALID_ARGUMENT", key):
        cluster.controller.call("CreateSnapshot", request)


def test_a_misspelt_mount_option_is_refused_at_createvolume_and_the_right_one_is_named(cluster):
    with refused("INVALID_ARGUMENT", "hrad", "did you mean `hard`"):
        cluster.create("typo", flags=("vers=4.2", "hrad"), pool="default")
    with refused("INVALID_ARGUMENT", "nconnect"):
        cluster.create("typo", flags=("nconnect=many",), pool="default")
    with refused("INVALID_ARGUMENT", "contradicts"):
        cluster.create("typo", flags=("hard", "soft"), pool="default")


def test_the_mount_options_of_a_class_win_over_the_pools_and_are_in_force(cluster):
    flags = ("vers=4.1", "noatime", "rsize=65536")
    volume = cluster.create("options", flags=flags, pool="default")
    use = cluster.use(volume, flags=flags)
    cluster.mount(use)
    for place in (use.staging, use.target):
        own, shared = mount_options(use.driver.node, place)
        assert "noatime" in own
        assert {"vers=4.1", "rsize=65536"} <= shared
    cluster.unmount(use)
    cluster.delete(volume)
