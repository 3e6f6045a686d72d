"""From the wire to the ports and back: what reaches the domain, and what of its answer reaches the caller."""

import time
from dataclasses import replace

import pytest
from grpc import StatusCode

from csi_driver import __version__, errors
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.volumes.answers import (
    Capacity,
    GroupSnapshot,
    HealthEntry,
    HealthLevel,
    NodeInfo,
    Snapshot,
    Usage,
    Volume,
    VolumeHealth,
    VolumeStats,
)
from csi_driver.volumes.model import (
    AccessMode,
    AccessType,
    ContentSource,
    Form,
    GroupRecord,
    Layout,
    NodePublication,
    OnDelete,
    Phase,
    SnapshotRecord,
    SourceKind,
    VolumeRecord,
)
from csi_driver.volumes.requests import GIB, Capability, CapacityRange, CreateSnapshot, Page, PublishVolume, StageVolume
from tests.rpc.harness import DRIVER, Port, all_services, served_methods

NODE = {"topology.hostpath.csi.test/node": "node-1"}
MOUNT = csi.VolumeCapability(
    mount=csi.VolumeCapability.MountVolume(), access_mode=csi.VolumeCapability.AccessMode(mode="SINGLE_NODE_WRITER")
)
CAPABILITY = Capability(AccessType.MOUNT, AccessMode.SINGLE_NODE_WRITER)
CREATED = 1_700_000_000_123_456_789


def volume(handle="fast.v1", *, source=None, published=(), topology=NODE):
    record = VolumeRecord(
        id="v1",
        handle=handle,
        name="pvc-1",
        driver=DRIVER,
        pool="fast",
        token="t",
        phase=Phase.READY,
        created_at_ns=CREATED,
        directory="v1",
        capacity_bytes=3 * GIB,
        source=source,
        published=tuple(NodePublication(node, AccessMode.SINGLE_NODE_WRITER) for node in published),
    )
    return Volume(record, {"pool": "fast"}, topology)


def snapshot(handle="fast.s1", *, group=None, phase=Phase.READY):
    record = SnapshotRecord(
        id="s1",
        handle=handle,
        name="snap-1",
        driver=DRIVER,
        pool="fast",
        token="t",
        phase=phase,
        created_at_ns=CREATED,
        source_handle="fast.v1",
        size_bytes=5,
        group_handle=group,
    )
    return Snapshot(record, NODE)


def group(*members):
    record = GroupRecord(
        id="g1",
        handle="fast.g1",
        name="group-1",
        driver=DRIVER,
        pool="fast",
        token="t",
        phase=Phase.READY,
        created_at_ns=CREATED,
        sources=("fast.v1",),
        members=tuple(member.record.handle for member in members),
    )
    return GroupSnapshot(record, members)


def create_request(**fields):
    return csi.CreateVolumeRequest(name="pvc-1", volume_capabilities=[MOUNT], **fields)


# --- identity ---------------------------------------------------------------------------------------------------------------------


def test_the_driver_says_its_name_and_version(serve):
    _, call = serve()
    assert call("GetPluginInfo") == csi.GetPluginInfoResponse(name=DRIVER, vendor_version=__version__)


@pytest.mark.parametrize("role", [{"node": None}, dict.fromkeys(("volumes", "attachments", "snapshots", "groups", "capacity"))])
@pytest.mark.parametrize("topology", [True, False])
def test_every_instance_of_an_installation_says_the_same_capabilities(serve, role, topology):
    _, call = serve(all_services(**role), topology=topology)
    said = call("GetPluginCapabilities").capabilities
    services = {csi.PluginCapability.Service.Type.Name(one.service.type) for one in said if one.HasField("service")}
    expansion = [one.volume_expansion.type for one in said if one.HasField("volume_expansion")]
    local = {"VOLUME_ACCESSIBILITY_CONSTRAINTS", "SNAPSHOT_ACCESSIBILITY_CONSTRAINTS"} if topology else set()
    assert services == {"CONTROLLER_SERVICE", "GROUP_CONTROLLER_SERVICE"} | local
    assert expansion == [csi.PluginCapability.VolumeExpansion.ONLINE]


def test_probe_says_whether_the_pools_can_be_served_and_the_log_says_why_not(serve, log_lines):
    services = all_services()
    _, call = serve(services)
    assert call("Probe").ready.value is True
    services.health.answers["ready"] = "pool fast is away"
    response = call("Probe")
    assert response.HasField("ready")
    assert response.ready.value is False
    assert "pool fast is away" in log_lines.getvalue()


def test_probe_does_not_wait_for_pools_that_hang(serve, hung):
    _, call = serve(all_services(health=Port(ready=hung)))
    for _ in range(3):
        began = time.monotonic()
        assert call("Probe", timeout=5).ready.value is False
        assert time.monotonic() - began < 1.5


# --- capabilities -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "kind", "expected"),
    [
        (
            "ControllerGetCapabilities",
            csi.ControllerServiceCapability.RPC.Type,
            (
                "CREATE_DELETE_VOLUME PUBLISH_UNPUBLISH_VOLUME LIST_VOLUMES GET_CAPACITY CREATE_DELETE_SNAPSHOT LIST_SNAPSHOTS CLONE_VOLUME "
                "PUBLISH_READONLY EXPAND_VOLUME LIST_VOLUMES_PUBLISHED_NODES GET_VOLUME SINGLE_NODE_MULTI_WRITER MODIFY_VOLUME GET_SNAPSHOT "
                "GET_VOLUME_HEALTH LIST_VOLUME_HEALTH"
            ),
        ),
        (
            "NodeGetCapabilities",
            csi.NodeServiceCapability.RPC.Type,
            (
                "STAGE_UNSTAGE_VOLUME GET_VOLUME_STATS EXPAND_VOLUME SINGLE_NODE_MULTI_WRITER GET_VOLUME_HEALTH GET_STORAGE_HEALTH "
                "VOLUME_MOUNT_GROUP"
            ),
        ),
        (
            "GroupControllerGetCapabilities",
            csi.GroupControllerServiceCapability.RPC.Type,
            "CREATE_DELETE_GET_VOLUME_GROUP_SNAPSHOT",
        ),
    ],
)
def test_each_service_advertises_what_it_serves_and_no_other(serve, method, kind, expected):
    _, call = serve()
    said = [kind.Name(one.rpc.type) for one in call(method).capabilities]
    assert sorted(said) == sorted(expected.split())


def test_every_method_of_every_registered_service_is_implemented(serve):
    _, call = serve()
    for method in served_methods():
        error = call.start(method.name).exception()
        assert error is None or error.code() is not StatusCode.UNIMPLEMENTED, method.name


# --- volumes ----------------------------------------------------------------------------------------------------------------------


def test_a_created_volume_is_shown_with_all_that_its_pv_needs(serve):
    volumes = Port(create=volume(source=ContentSource(SourceKind.SNAPSHOT, "fast.s1")))
    _, call = serve(all_services(volumes=volumes))
    source = csi.VolumeContentSource(snapshot=csi.VolumeContentSource.SnapshotSource(snapshot_id="fast.s1"))
    shown = call("CreateVolume", create_request(volume_content_source=source, capacity_range={"required_bytes": 7})).volume
    assert shown == csi.Volume(
        volume_id="fast.v1",
        capacity_bytes=3 * GIB,
        volume_context={"pool": "fast"},
        content_source=source,
        accessible_topology=[csi.Topology(segments=NODE)],
    )
    ((_, asked, _),) = volumes.asked
    assert (asked.name, asked.capacity, asked.capabilities) == ("pvc-1", CapacityRange(7), (CAPABILITY,))
    assert asked.source == ContentSource(SourceKind.SNAPSHOT, "fast.s1")


def test_a_clone_names_its_volume_and_a_volume_for_all_nodes_names_no_topology(serve):
    volumes = Port(create=volume(source=ContentSource(SourceKind.VOLUME, "fast.v0"), topology=None))
    _, call = serve(all_services(volumes=volumes))
    shown = call("CreateVolume", create_request()).volume
    assert shown.content_source.volume.volume_id == "fast.v0"
    assert not shown.accessible_topology


def test_an_empty_volume_shows_no_source(serve):
    _, call = serve(all_services(volumes=Port(create=volume())))
    assert not call("CreateVolume", create_request()).volume.HasField("content_source")


def test_delete_asks_for_the_handle_as_it_is(serve):
    volumes = Port()
    _, call = serve(all_services(volumes=volumes))
    call("DeleteVolume", csi.DeleteVolumeRequest(volume_id="../../etc"))
    assert volumes.asked == [("delete", "../../etc")]


def test_expand_tells_the_new_size_and_that_the_node_has_nothing_to_do(serve):
    volumes = Port(expand=99, get=volume())
    _, call = serve(all_services(volumes=volumes))
    request = csi.ControllerExpandVolumeRequest(volume_id="v", capacity_range={"required_bytes": 90}, volume_capability=MOUNT)
    assert call("ControllerExpandVolume", request) == csi.ControllerExpandVolumeResponse(capacity_bytes=99)
    assert volumes.asked == [("expand", "v", CapacityRange(90), CAPABILITY), ("get", "v")]


def test_expand_of_an_image_leaves_the_rest_to_the_node(serve):
    image = volume()
    image = replace(image, record=replace(image.record, form=Form(Layout.IMAGE, AccessType.BLOCK)))
    _, call = serve(all_services(volumes=Port(expand=99, get=image)))
    request = csi.ControllerExpandVolumeRequest(volume_id="v", capacity_range={"required_bytes": 90})
    told = csi.ControllerExpandVolumeResponse(capacity_bytes=99, node_expansion_required=True)
    assert call("ControllerExpandVolume", request) == told


def test_modify_hands_on_what_is_to_change(serve):
    volumes = Port()
    _, call = serve(all_services(volumes=volumes))
    call("ControllerModifyVolume", csi.ControllerModifyVolumeRequest(volume_id="v", mutable_parameters={"onDelete": "retain"}))
    assert volumes.asked == [("modify", "v", OnDelete.RETAIN)]


def test_volumes_are_shown_with_the_nodes_they_are_published_to(serve):
    volumes = Port(list=([volume("a", published=["n1", "n2"]), volume("b")], "next"), get=volume("a", published=["n1"]))
    _, call = serve(all_services(volumes=volumes))
    listed = call("ListVolumes", csi.ListVolumesRequest(max_entries=2, starting_token="token"))
    assert [(entry.volume.volume_id, list(entry.status.published_node_ids)) for entry in listed.entries] == [
        ("a", ["n1", "n2"]),
        ("b", []),
    ]
    assert all(entry.HasField("status") for entry in listed.entries)
    assert listed.next_token == "next"
    got = call("ControllerGetVolume", csi.ControllerGetVolumeRequest(volume_id="a"))
    assert (got.volume.volume_id, list(got.status.published_node_ids)) == ("a", ["n1"])
    assert volumes.asked == [("list", Page(2, "token")), ("get", "a")]


def test_twenty_thousand_volumes_fit_into_one_answer(serve):
    _, call = serve(
        all_services(volumes=Port(list=([volume(f"fast.{n:026}", published=["n" * 200]) for n in range(20_000)], "")))
    )
    response = call("ListVolumes", timeout=60)
    assert len(response.entries) == 20_000
    assert response.ByteSize() > 4 << 20  # more than gRPC's usual limit


def test_a_volume_with_all_capabilities_is_confirmed_with_what_was_asked(serve):
    volumes = Port(validate=None)
    _, call = serve(all_services(volumes=volumes))
    request = csi.ValidateVolumeCapabilitiesRequest(volume_id="v", volume_capabilities=[MOUNT], volume_context={"pool": "fast"})
    response = call("ValidateVolumeCapabilities", request)
    assert list(response.confirmed.volume_capabilities) == [MOUNT]
    assert response.confirmed.volume_context == {"pool": "fast"}
    assert response.message == ""
    assert volumes.asked == [("validate", "v", (CAPABILITY,), {"pool": "fast"})]


def test_a_volume_without_a_capability_is_not_confirmed_and_the_reason_fits_the_field(serve):
    _, call = serve(all_services(volumes=Port(validate="é" * 200)))
    request = csi.ValidateVolumeCapabilitiesRequest(volume_id="v", volume_capabilities=[MOUNT])
    response = call("ValidateVolumeCapabilities", request)
    assert not response.HasField("confirmed")
    assert response.message.startswith("ééé")
    assert response.message.endswith("…")
    assert len(response.message.encode()) <= 128


def test_capacity_is_shown_with_its_bounds_only_where_there_are_any(serve):
    capacity = Port(available=Capacity(100, maximum_volume_bytes=50))
    _, call = serve(all_services(capacity=capacity))
    response = call("GetCapacity")
    assert (response.available_capacity, response.maximum_volume_size.value) == (100, 50)
    assert not response.HasField("minimum_volume_size")
    capacity.answers["available"] = Capacity(0)
    assert not call("GetCapacity").HasField("maximum_volume_size")


# --- attachments ------------------------------------------------------------------------------------------------------------------


def test_publishing_hands_on_who_and_how_and_returns_the_context(serve):
    attachments = Port(publish={"directory": "v1"})
    _, call = serve(all_services(attachments=attachments))
    request = csi.ControllerPublishVolumeRequest(volume_id="v", node_id="n1", volume_capability=MOUNT, readonly=True)
    assert call("ControllerPublishVolume", request).publish_context == {"directory": "v1"}
    publication = NodePublication("n1", AccessMode.SINGLE_NODE_WRITER, readonly=True)
    assert attachments.asked == [("publish", "v", publication, CAPABILITY, {})]


def test_unpublishing_without_a_node_means_all_nodes(serve):
    attachments = Port()
    _, call = serve(all_services(attachments=attachments))
    call("ControllerUnpublishVolume", csi.ControllerUnpublishVolumeRequest(volume_id="v"))
    assert attachments.asked == [("unpublish", "v", "")]


# --- snapshots and groups ---------------------------------------------------------------------------------------------------------


def test_a_snapshot_is_shown_with_the_time_of_its_cut(serve):
    snapshots = Port(create=snapshot(group="fast.g1"), get=snapshot(phase=Phase.CREATING))
    _, call = serve(all_services(snapshots=snapshots))
    shown = call("CreateSnapshot", csi.CreateSnapshotRequest(name="snap-1", source_volume_id="fast.v1")).snapshot
    assert (shown.snapshot_id, shown.source_volume_id, shown.size_bytes) == ("fast.s1", "fast.v1", 5)
    assert shown.creation_time.ToNanoseconds() == CREATED
    assert (shown.ready_to_use, shown.group_snapshot_id) == (True, "fast.g1")
    assert [topology.segments for topology in shown.accessible_topology] == [NODE]
    assert snapshots.asked[0][1] == CreateSnapshot("snap-1", "fast.v1")
    assert call("GetSnapshot", csi.GetSnapshotRequest(snapshot_id="fast.s1")).snapshot.ready_to_use is False


def test_snapshots_are_listed_and_limited(serve):
    snapshots = Port(list=([snapshot("a"), snapshot("b")], "next"))
    _, call = serve(all_services(snapshots=snapshots))
    response = call("ListSnapshots", csi.ListSnapshotsRequest(max_entries=2, snapshot_id="s", source_volume_id="v"))
    assert [entry.snapshot.snapshot_id for entry in response.entries] == ["a", "b"]
    assert response.next_token == "next"
    assert snapshots.asked == [("list", Page(2), "s", "v")]
    call("DeleteSnapshot", csi.DeleteSnapshotRequest(snapshot_id="a"))
    assert snapshots.asked[-1] == ("delete", "a")


def test_a_group_is_ready_when_all_its_members_are(serve):
    groups = Port(create=group(snapshot("a", group="fast.g1")), get=group(snapshot("a"), snapshot("b", phase=Phase.CREATING)))
    _, call = serve(all_services(groups=groups))
    request = csi.CreateVolumeGroupSnapshotRequest(name="group-1", source_volume_ids=["v1", "v2"])
    shown = call("CreateVolumeGroupSnapshot", request).group_snapshot
    assert (shown.group_snapshot_id, shown.ready_to_use, shown.creation_time.ToNanoseconds()) == ("fast.g1", True, CREATED)
    assert [member.group_snapshot_id for member in shown.snapshots] == ["fast.g1"]
    request = csi.GetVolumeGroupSnapshotRequest(group_snapshot_id="fast.g1", snapshot_ids=["a", "b"])
    assert call("GetVolumeGroupSnapshot", request).group_snapshot.ready_to_use is False
    call("DeleteVolumeGroupSnapshot", csi.DeleteVolumeGroupSnapshotRequest(group_snapshot_id="fast.g1"))
    assert groups.asked[0][:3] == ("create", "group-1", ("v1", "v2"))
    assert groups.asked[1:] == [("get", "fast.g1", ("a", "b")), ("delete", "fast.g1", ())]


# --- node -------------------------------------------------------------------------------------------------------------------------


def test_the_node_says_who_and_where_it_is(serve):
    node = Port(info=NodeInfo("node-1", 8, NODE))
    _, call = serve(all_services(node=node))
    expected = csi.NodeGetInfoResponse(
        node_id="node-1", max_volumes_per_node=8, accessible_topology=csi.Topology(segments=NODE)
    )
    assert call("NodeGetInfo") == expected
    node.answers["info"] = NodeInfo("node-1", 0, None)
    assert not call("NodeGetInfo").HasField("accessible_topology")


def test_staging_and_publishing_hand_on_all_that_the_node_needs(serve):
    node = Port(expand=12)
    _, call = serve(all_services(node=node))
    contexts = {"publish_context": {"a": "b"}, "volume_context": {"c": "d"}}
    common = {"volume_id": "v", "staging_target_path": "/staging/", "volume_capability": MOUNT}
    call("NodeStageVolume", csi.NodeStageVolumeRequest(**common, **contexts))
    call("NodePublishVolume", csi.NodePublishVolumeRequest(**common, **contexts, target_path="/target", readonly=True))
    call("NodeUnpublishVolume", csi.NodeUnpublishVolumeRequest(volume_id="v", target_path="/target"))
    call("NodeUnstageVolume", csi.NodeUnstageVolumeRequest(volume_id="v", staging_target_path="/staging"))
    request = csi.NodeExpandVolumeRequest(volume_id="v", volume_path="/target")
    assert call("NodeExpandVolume", request).capacity_bytes == 12
    assert node.asked == [
        ("stage", StageVolume("v", "/staging", CAPABILITY, **contexts)),
        ("publish", PublishVolume("v", "/target", CAPABILITY, True, "/staging", **contexts)),
        ("unpublish", "v", "/target"),
        ("unstage", "v", "/staging"),
        ("expand", "v", "/target", CapacityRange()),
    ]


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("NodeStageVolume", csi.NodeStageVolumeRequest(volume_id="v", staging_target_path="rel", volume_capability=MOUNT)),
        ("NodeUnstageVolume", csi.NodeUnstageVolumeRequest(volume_id="v", staging_target_path="/a/../b")),
        ("NodeUnpublishVolume", csi.NodeUnpublishVolumeRequest(volume_id="v", target_path="/")),
        ("NodeUnpublishVolume", csi.NodeUnpublishVolumeRequest(volume_id="", target_path="/t")),
        ("NodePublishVolume", csi.NodePublishVolumeRequest(volume_id="v", target_path="/a\n", volume_capability=MOUNT)),
    ],
)
def test_a_path_that_cannot_be_meant_never_reaches_the_node(serve, method, request_):
    node = Port()
    _, call = serve(all_services(node=node))
    assert call.refusal(method, request_)[0] is StatusCode.INVALID_ARGUMENT
    assert node.asked == []


def test_stats_are_the_volumes_own_and_leave_out_what_is_not_known(serve):
    node = Port(stats=VolumeStats(Usage(10, 100, 90), Usage(3, None, None)))
    _, call = serve(all_services(node=node))
    response = call("NodeGetVolumeStats", csi.NodeGetVolumeStatsRequest(volume_id="v", volume_path="/target"))
    assert list(response.usage) == [
        csi.VolumeUsage(unit="BYTES", used=10, total=100, available=90),
        csi.VolumeUsage(unit="INODES", used=3),
    ]
    assert node.asked[0][:3] == ("stats", "v", "/target")


# --- health -----------------------------------------------------------------------------------------------------------------------


def test_health_is_shown_by_csis_names(serve):
    unwell = VolumeHealth(
        "v",
        (
            HealthEntry(HealthLevel.DEGRADED, "PoolFull", "1% left"),
            HealthEntry(HealthLevel.INACCESSIBLE, "DirectoryMissing", ""),
            HealthEntry(HealthLevel.DATA_LOSS, "RecordDamaged", "x"),
        ),
    )
    health = Port(volume=unwell, list=([unwell], "next"))
    node = Port(health=VolumeHealth("v", ()))
    _, call = serve(all_services(health=health, node=node))
    shown = call("ControllerGetVolumeHealth", csi.ControllerGetVolumeHealthRequest(volume_id="v")).volume_health
    assert shown.volume_id == "v"
    assert [(entry.status, entry.reason, entry.message) for entry in shown.health_statuses] == [
        (csi.DEGRADED, "PoolFull", "1% left"),
        (csi.INACCESSIBLE, "DirectoryMissing", ""),
        (csi.DATA_LOSS, "RecordDamaged", "x"),
    ]
    listed = call("ControllerListVolumeHealth", csi.ControllerListVolumeHealthRequest(max_entries=1))
    assert (list(listed.entries), listed.next_token) == ([shown], "next")
    request = csi.NodeGetVolumeHealthRequest(volume_id="v", volume_publish_path="/t", staging_target_path="/s")
    assert call("NodeGetVolumeHealth", request).volume_health == csi.VolumeHealth(volume_id="v")
    assert node.asked == [("health", "v", "/t", "/s")]


def test_the_same_trouble_of_two_pools_is_one_entry(serve):
    entries = [
        HealthEntry(HealthLevel.INACCESSIBLE, "PoolAway", "pool a is away"),
        HealthEntry(HealthLevel.DEGRADED, "PoolAway", "pool c is slow"),
        HealthEntry(HealthLevel.INACCESSIBLE, "PoolAway", "pool b is away"),
    ]
    _, call = serve(all_services(health=Port(storage=entries)))
    shown = call("NodeGetStorageHealth").backend_health
    assert [(entry.status, entry.reason, entry.message) for entry in shown] == [
        (csi.STORAGE_UNREACHABLE, "PoolAway", "pool a is away; pool b is away"),
        (csi.STORAGE_DEGRADED, "PoolAway", "pool c is slow"),
    ]


# --- what the domain refuses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFound("no such volume"), StatusCode.NOT_FOUND),
        (errors.AlreadyExists("other size"), StatusCode.ALREADY_EXISTS),
        (errors.OperationPending("a copy is running"), StatusCode.ABORTED),
        (errors.ResourceExhausted("pool is full"), StatusCode.RESOURCE_EXHAUSTED),
        (errors.RecordDamaged("record v1 is damaged"), StatusCode.INTERNAL),
    ],
)
def test_what_the_domain_refuses_reaches_the_caller_in_its_words(serve, error, code):
    _, call = serve(all_services(volumes=Port(create=error)))
    assert call.refusal("CreateVolume", create_request()) == (code, str(error))
