import json
import logging
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode

from csi_driver import errors
from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc import lanes
from csi_driver.rpc.calls import REQUEST_ID_KEY
from csi_driver.rpc.redaction import SERVICE_ACCOUNT_TOKENS, loggable
from csi_driver.volumes.answers import NodeInfo
from tests.rpc.harness import (
    Client,
    CountingMetrics,
    Port,
    all_services,
    message_class,
    method_descriptor,
    path_of,
    served_methods,
    small_lanes,
)

SECRET = "correct-horse-battery"
MOUNT = csi.VolumeCapability(
    mount=csi.VolumeCapability.MountVolume(), access_mode=csi.VolumeCapability.AccessMode(mode="SINGLE_NODE_WRITER")
)

# One call per lane that reaches the domain, and the answer of the fake services that hangs it.
INTO_LANE = {
    "controller": ("DeleteVolume", csi.DeleteVolumeRequest(volume_id="v")),
    "capture": ("CreateSnapshot", csi.CreateSnapshotRequest(name="n", source_volume_id="v")),
    "node": ("NodeUnpublishVolume", csi.NodeUnpublishVolumeRequest(volume_id="v", target_path="/t")),
    "node-read": ("NodeGetInfo", csi.NodeGetInfoRequest()),
}


def hanging_services(hung):
    return all_services(
        volumes=Port(delete=hung, create=hung),
        snapshots=Port(create=hung),
        node=Port(unpublish=hung, info=hung),
        health=Port(ready=hung),
    )


def create_request(**fields):
    return csi.CreateVolumeRequest(name="n", volume_capabilities=[MOUNT], **fields)


def entries(log_lines):
    return [json.loads(line) for line in log_lines.getvalue().splitlines()]


# --- lanes ------------------------------------------------------------------------------------------------------------------------


def fill(call, hung, names, capacity):
    running = [call.start(*INTO_LANE[name], timeout=60) for name in names for _ in range(capacity)]
    hung.wait_for(len(running))
    return running


def test_probe_answers_while_every_lane_is_stuck(serve, hung):
    _, call = serve(hanging_services(hung), lanes=small_lanes(2))
    fill(call, hung, INTO_LANE, 2)
    # health.ready hangs too: that Probe says so, within its second, instead of hanging as well.
    for _ in range(20):
        began = time.monotonic()
        assert call("Probe", timeout=5).ready.value is False
        assert time.monotonic() - began < 2
    assert call("GetPluginInfo").name


def test_probe_answers_at_once_while_calls_stream_into_full_lanes(serve, hung):
    services = hanging_services(hung)
    services.health.answers["ready"] = None
    _, call = serve(services, lanes=small_lanes(2))
    fill(call, hung, INTO_LANE, 2)
    flood = [call.start(*INTO_LANE[name], timeout=20) for name in INTO_LANE for _ in range(100)]
    slowest = 0.0
    for _ in range(20):
        began = time.monotonic()
        assert call("Probe", timeout=10).ready.value is True
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 3
    assert {refused.exception().code() for refused in flood} == {StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("name", INTO_LANE)
def test_a_full_lane_refuses_at_once_and_the_others_do_not_notice(serve, hung, name):
    metrics = CountingMetrics()
    services = hanging_services(hung)
    _, call = serve(services, lanes=small_lanes(3), metrics=metrics)
    fill(call, hung, [name], 3)
    began = time.monotonic()
    code, message = call.refusal(*INTO_LANE[name])
    assert code is StatusCode.UNAVAILABLE
    assert f"many {name} calls" in message
    assert time.monotonic() - began < 2
    assert metrics.rejected == [name]
    for other, request in INTO_LANE.items():
        if other != name:
            call.start(*request, timeout=30)
    hung.wait_for(len(INTO_LANE) - 1)


def test_a_place_is_free_again_when_the_call_ends_and_not_when_its_caller_gives_up(serve, hung):
    metrics = CountingMetrics()
    _, call = serve(hanging_services(hung), lanes=small_lanes(1), metrics=metrics)
    assert call.refusal("NodeGetInfo", timeout=0.5)[0] is StatusCode.DEADLINE_EXCEEDED
    assert call.refusal("NodeGetInfo")[0] is StatusCode.UNAVAILABLE
    assert metrics.in_flight["node-read"] == 1
    hung.release()
    until = time.monotonic() + 10
    while metrics.in_flight["node-read"] and time.monotonic() < until:
        time.sleep(0.01)
    assert metrics.in_flight["node-read"] == 0


def test_a_call_that_raises_gives_its_place_back(serve):
    _, call = serve(all_services(node=Port(info=ValueError("bug"))), lanes=small_lanes(1))
    assert [call.refusal("NodeGetInfo")[0] for _ in range(5)] == [StatusCode.INTERNAL] * 5


def test_lanes_can_never_take_all_threads():
    places = lanes.Lanes(CountingMetrics())
    assert places.threads >= sum(lane.capacity for lane in lanes.LANES) + 8


@pytest.mark.parametrize(
    ("method", "request_", "lane"),
    [
        ("Probe", csi.ProbeRequest(), lanes.IDENTITY),
        ("NodeGetCapabilities", csi.NodeGetCapabilitiesRequest(), lanes.IDENTITY),
        ("CreateVolume", csi.CreateVolumeRequest(), lanes.CONTROLLER),
        ("CreateVolume", csi.CreateVolumeRequest(volume_content_source=csi.VolumeContentSource()), lanes.CAPTURE),
        ("CreateSnapshot", csi.CreateSnapshotRequest(), lanes.CAPTURE),
        ("CreateVolumeGroupSnapshot", csi.CreateVolumeGroupSnapshotRequest(), lanes.CAPTURE),
        ("ListVolumes", csi.ListVolumesRequest(), lanes.CONTROLLER),
        ("DeleteVolumeGroupSnapshot", csi.DeleteVolumeGroupSnapshotRequest(), lanes.CONTROLLER),
        ("NodeStageVolume", csi.NodeStageVolumeRequest(), lanes.NODE),
        ("NodeGetVolumeStats", csi.NodeGetVolumeStatsRequest(), lanes.NODE_READ),
        ("NodeGetStorageHealth", csi.NodeGetStorageHealthRequest(), lanes.NODE_READ),
    ],
)
def test_each_kind_of_call_has_its_lane(method, request_, lane):
    assert lanes.lane_of(method, request_) is lane


# --- deadlines --------------------------------------------------------------------------------------------------------------------


def remaining_in_service(serve, **options):
    seen = []
    _, call = serve(all_services(volumes=Port(create=lambda _, deadline: seen.append(deadline - time.monotonic()))))
    call.refusal("CreateVolume", create_request(), **options)  # the fake makes no volume, so there is nothing to show
    return seen[0]


def test_the_domain_is_told_the_callers_deadline(serve):
    assert 5 < remaining_in_service(serve, timeout=7) <= 7.1


def test_a_caller_without_a_deadline_gets_the_lanes(serve):
    assert lanes.CONTROLLER.seconds - 2 < remaining_in_service(serve, timeout=None) <= lanes.CONTROLLER.seconds


def test_no_caller_gets_more_than_the_lane_allows(serve):
    assert lanes.CONTROLLER.most_seconds - 2 < remaining_in_service(serve, timeout=86400) <= lanes.CONTROLLER.most_seconds


def test_a_call_whose_deadline_passed_in_the_queue_is_not_begun(serve):
    class Expired:
        def time_remaining(self):
            return 0.0

    from csi_driver.rpc.calls import _deadline_of

    with pytest.raises(errors.DeadlineExceeded, match="not begun"):
        _deadline_of(lanes.NODE, Expired())


# --- status -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["x" * 10**6, "🦄" * 10**5, "\udcff\n\0"])
def test_a_monstrous_message_reaches_the_client_with_its_code(serve, text):
    _, call = serve(all_services(volumes=Port(delete=errors.NotFound(text))))
    code, message = call.refusal("DeleteVolume", csi.DeleteVolumeRequest(volume_id="x"))
    assert code is StatusCode.NOT_FOUND
    assert message


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff", b"\x0a\x02\xc3\x28", b"\x0a\xff\xff\xff\xff\x0f"], ids=["tags", "utf-8", "length"]
)
def test_bytes_that_are_no_message_are_an_invalid_argument(serve, data, log_lines):
    metrics = CountingMetrics()
    _, call = serve(metrics=metrics)
    code, message = call.refusal("DeleteVolume", data)
    assert code is StatusCode.INVALID_ARGUMENT
    assert "malformed" in message
    assert metrics.finished[0][:2] == (path_of("DeleteVolume"), "INVALID_ARGUMENT")


def test_an_unforeseen_error_shows_its_traceback_to_the_log_and_its_id_to_the_caller(serve, log_lines):
    _, call = serve(all_services(volumes=Port(delete=ValueError("inner workings"))))
    code, message = call.refusal("DeleteVolume", csi.DeleteVolumeRequest(volume_id="x"), metadata=((REQUEST_ID_KEY, "id-9"),))
    assert code is StatusCode.INTERNAL
    assert "id-9" in message
    assert "inner workings" not in message
    assert "ValueError: inner workings" in entries(log_lines)[-1]["exception"]


def test_a_service_that_this_process_does_not_serve_is_unimplemented(serve):
    services = all_services(node=None, groups=None)
    _, call = serve(services)
    assert call.refusal("NodeGetInfo")[0] is StatusCode.UNIMPLEMENTED
    assert call.refusal("GroupControllerGetCapabilities")[0] is StatusCode.UNIMPLEMENTED
    assert call("ControllerGetCapabilities").capabilities


# --- request ids and the log ------------------------------------------------------------------------------------------------------


def test_the_request_id_is_in_every_log_line(serve, log_lines):
    def delete(handle):
        logging.getLogger("csi_driver.volumes").info("deleting")
        logging.getLogger("csi_driver.volumes").warning("slowly")

    _, call = serve(all_services(volumes=Port(delete=delete)))
    log_lines.truncate(0)
    log_lines.seek(0)
    for number in range(3):
        call("DeleteVolume", csi.DeleteVolumeRequest(volume_id="x"), metadata=((REQUEST_ID_KEY, f"id-{number}"),))
        lines = [line for line in entries(log_lines) if line.get("request_id") == f"id-{number}"]
        assert [line["msg"] for line in lines] == ["call begins", "deleting", "slowly", "call done"]
        assert {line["method"] for line in lines} == {"DeleteVolume"}
    assert all("request_id" in line for line in entries(log_lines))


def test_calls_at_the_same_time_do_not_mix_up_their_ids(serve, log_lines):
    both = threading.Barrier(2)

    def delete(handle):
        both.wait(10)
        logging.getLogger("csi_driver.volumes").info("deleting", extra={"volume": handle})

    _, call = serve(all_services(volumes=Port(delete=delete)))
    running = [
        call.start("DeleteVolume", csi.DeleteVolumeRequest(volume_id=f"v{n}"), metadata=((REQUEST_ID_KEY, f"id-{n}"),))
        for n in range(2)
    ]
    for one in running:
        one.result()
    said = {(line["volume"], line["request_id"]) for line in entries(log_lines) if line["msg"] == "deleting"}
    assert said == {("v0", "id-0"), ("v1", "id-1")}


@pytest.mark.parametrize("unusable", ["", "a b", "x" * 65, "\x7f", "-leading", "../../etc"])
def test_an_unusable_request_id_is_replaced(serve, log_lines, unusable):
    _, call = serve()
    metadata = ((REQUEST_ID_KEY, unusable),) if unusable.isprintable() else ()
    future = call.start("DeleteVolume", csi.DeleteVolumeRequest(volume_id="x"), metadata=metadata)
    future.result()
    own = dict(future.trailing_metadata())[REQUEST_ID_KEY]
    assert own != unusable
    assert len(own) == 16
    assert entries(log_lines)[-1]["request_id"] == own


def test_the_answer_tells_the_request_id_also_when_it_is_an_error(serve):
    _, call = serve()
    future = call.start("DeleteVolume", metadata=((REQUEST_ID_KEY, "id-1"),))
    assert future.exception().code() is StatusCode.INVALID_ARGUMENT
    assert dict(future.trailing_metadata())[REQUEST_ID_KEY] == "id-1"


def test_the_end_of_a_call_says_code_and_duration_and_a_refusal_says_why(serve, log_lines):
    _, call = serve(all_services(volumes=Port(delete=lambda _: time.sleep(0.05))))
    call("DeleteVolume", csi.DeleteVolumeRequest(volume_id="x"))
    done = entries(log_lines)[-1]
    assert (done["level"], done["code"]) == ("info", "OK")
    assert 0.05 <= done["seconds"] < 5
    call.refusal("DeleteVolume", csi.DeleteVolumeRequest())
    refused = entries(log_lines)[-1]
    assert (refused["level"], refused["code"]) == ("warning", "INVALID_ARGUMENT")
    assert "volume_id is missing" in refused["error"]


def test_what_is_asked_all_the_time_is_not_logged_at_info_unless_it_fails(serve, log_lines):
    services = all_services()
    _, call = serve(services)
    for method in ("Probe", "GetPluginInfo", "GetPluginCapabilities", "ControllerGetCapabilities", "NodeGetCapabilities"):
        call(method)
    loud = [line for line in entries(log_lines) if line["level"] != "debug" and "request_id" in line]
    assert loud == []
    services.health.answers["ready"] = ValueError("bug")
    assert call.refusal("Probe")[0] is StatusCode.INTERNAL
    assert entries(log_lines)[-1]["level"] == "error"


def test_above_debug_the_request_of_a_call_that_went_well_is_not_logged(serve, log_lines):
    logging.getLogger().setLevel(logging.INFO)
    _, call = serve()
    call("DeleteVolume", csi.DeleteVolumeRequest(volume_id="x"))
    assert "request" not in entries(log_lines)[-1]


# --- secrets ----------------------------------------------------------------------------------------------------------------------


def secret_fields(descriptor):
    return [field for field in descriptor.fields if field.GetOptions().Extensions[csi.csi_secret]]


def messages_with_secrets():
    return [descriptor for descriptor in csi.DESCRIPTOR.message_types_by_name.values() if secret_fields(descriptor)]


def with_secrets(descriptor):
    message = message_class(descriptor)()
    for field in secret_fields(descriptor):
        getattr(message, field.name)["password"] = SECRET
    return message


def test_there_are_as_many_messages_with_secrets_as_the_protocol_file_says():
    text = (Path(__file__).resolve().parents[2] / "proto" / "csi.proto").read_text()
    declared = text.count("csi_secret) = true")
    assert declared == len(messages_with_secrets()) > 15


@pytest.mark.parametrize("descriptor", messages_with_secrets(), ids=lambda descriptor: descriptor.name)
def test_a_secret_is_stripped_from_every_message_that_has_one(descriptor):
    message = with_secrets(descriptor)
    assert SECRET in str(message)
    assert SECRET not in str(loggable(message))
    assert "password" not in str(loggable(message))


@pytest.mark.parametrize("method", [method.name for method in served_methods() if secret_fields(method.input_type)])
@pytest.mark.parametrize("answer", ["refused", "bug", "done"])
def test_a_secret_never_reaches_the_log(serve, log_lines, method, answer):
    failure = {"refused": errors.NotFound("gone"), "bug": ValueError("bug"), "done": None}[answer]

    class Anything(Port):
        def __getattr__(self, name):
            if failure is not None:
                raise failure
            return super().__getattr__(name)

    names = ("volumes", "attachments", "snapshots", "groups", "capacity", "node", "health")
    services = all_services(**{name: Anything() for name in names})
    services.health.__dict__["ready"] = lambda: None
    _, call = serve(services)
    message = with_secrets(method_descriptor(method).input_type)
    for field in ("volume_id", "snapshot_id", "group_snapshot_id", "name", "source_volume_id"):
        if hasattr(message, field):
            setattr(message, field, "x")
    call.start(method, message).exception()
    assert f'"{method}"' in log_lines.getvalue()
    assert SECRET not in log_lines.getvalue()


def test_tokens_of_service_accounts_and_values_of_mount_flags_are_stripped(serve, log_lines):
    request = csi.NodePublishVolumeRequest(
        volume_id="v",
        target_path="/t",
        volume_context={SERVICE_ACCOUNT_TOKENS: json.dumps({"": {"token": SECRET}}), "pool": "fast"},
        volume_capability=csi.VolumeCapability(
            mount=csi.VolumeCapability.MountVolume(mount_flags=["nosuid", f"password={SECRET},"]),
            access_mode=csi.VolumeCapability.AccessMode(mode="SINGLE_NODE_WRITER"),
        ),
    )
    _, call = serve()
    code, message = call.refusal("NodePublishVolume", request)
    assert code is StatusCode.INVALID_ARGUMENT
    assert SECRET not in message
    assert SECRET not in log_lines.getvalue()
    shown = entries(log_lines)[-1]["request"]
    assert shown["volume_context"]["pool"] == "fast"
    assert shown["volume_capability"]["access_mode"]["mode"] == "SINGLE_NODE_WRITER"
    assert shown["volume_capability"]["mount"]["mount_flags"][0] == "nosuid"


def test_what_is_no_secret_is_shown_as_it_is():
    request = create_request(
        parameters={"pool": "fast"},
        accessibility_requirements=csi.TopologyRequirement(requisite=[csi.Topology(segments={"zone": "a"})]),
    )
    request.volume_capabilities[0].access_mode.mode = 99  # a mode of a later CSI
    assert loggable(request) == {
        "name": "n",
        "volume_capabilities": [{"mount": {}, "access_mode": {"mode": 99}}],
        "parameters": {"pool": "fast"},
        "accessibility_requirements": {"requisite": [{"segments": {"zone": "a"}}]},
    }


# --- metrics ----------------------------------------------------------------------------------------------------------------------


def test_every_call_is_counted_by_method_and_code(serve):
    metrics = CountingMetrics()
    _, call = serve(all_services(node=Port(info=NodeInfo("n", 0, None))), metrics=metrics)
    call("NodeGetInfo")
    call.refusal("NodeGetVolumeStats")
    assert [(method, code) for method, code, _ in metrics.finished] == [
        ("/csi.v1.Node/NodeGetInfo", "OK"),
        ("/csi.v1.Node/NodeGetVolumeStats", "INVALID_ARGUMENT"),
    ]
    assert all(0 <= seconds < 5 for *_, seconds in metrics.finished)
    assert set(metrics.lanes) == {lane.name for lane in lanes.LANES}


def test_a_method_that_a_client_made_up_is_not_counted(serve):
    metrics = CountingMetrics()
    _, call = serve(metrics=metrics)
    with pytest.raises(grpc.RpcError) as raised:
        call.channel.unary_unary("/csi.v1.Node/MadeUp")(b"", timeout=10)
    assert raised.value.code() is StatusCode.UNIMPLEMENTED
    assert metrics.finished == []


# --- start and stop ---------------------------------------------------------------------------------------------------------------


def test_stop_lets_a_running_call_end_and_refuses_new_ones(serve, hung):
    server, call = serve(hanging_services(hung))
    running = call.start(*INTO_LANE["controller"], timeout=30)
    hung.wait_for(1)
    stopped = []
    stopper = threading.Thread(target=lambda: stopped.append(server.stop(grace=20)))
    stopper.start()
    time.sleep(0.3)
    assert call.refusal("GetPluginInfo")[0] is StatusCode.UNAVAILABLE
    hung.release()
    stopper.join(20)
    assert stopped == [True]
    assert running.exception() is None


def test_calls_that_arrive_on_an_open_connection_after_the_stop_began_are_refused(serve, hung):
    server, call = serve(hanging_services(hung))
    server._calls.refuse_new()
    code, message = call.refusal("GetPluginInfo")
    assert code is StatusCode.UNAVAILABLE
    assert "shutting down" in message


def test_stop_does_not_wait_longer_than_its_grace_for_a_call_that_hangs(serve, hung):
    server, call = serve(hanging_services(hung))
    running = call.start(*INTO_LANE["controller"], timeout=30)
    hung.wait_for(1)
    began = time.monotonic()
    assert server.stop(grace=0.5) is False
    assert time.monotonic() - began < 5
    assert running.exception() is not None


def test_a_call_that_hangs_does_not_keep_the_process_from_ending(tmp_path):
    socket = str(tmp_path / "s.sock")
    program = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
        from pathlib import Path
        from csi_driver.rpc.server import CsiServer
        from csi_driver.telemetry.metrics import Metrics
        from tests.rpc.harness import Hung, Port, all_services

        hung = Hung()
        server = CsiServer(all_services(node=Port(info=hung)), driver_name="x", topology=False,
                           socket_path=Path({socket!r}), metrics=Metrics())
        server.start()
        print("serves", flush=True)
        hung.wait_for(1)
        print("hangs", server.stop(grace=0.2), flush=True)
    """
    # The caller is another process, as in life: this one's end must not wait for a client of its own.
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "serves\n"
        call = Client(socket)
        running = call.start("NodeGetInfo", timeout=60)
        assert process.stdout.readline() == "hangs False\n"
        began = time.monotonic()
        assert process.wait(50) == 0
        assert time.monotonic() - began < 30  # the call hangs for 60
        running.cancel()


def test_the_socket_and_its_directory_are_made_for_root_only(serve, tmp_path):
    path = tmp_path / "plugins" / "hostpath csi%41" / "csi.sock"
    _, call = serve(socket=path)
    assert call("GetPluginInfo").name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) & 0o007 == 0


def test_starting_leaves_the_umask_as_it_was(serve, tmp_path):
    serve()
    made = tmp_path / "made"
    made.touch()
    assert stat.S_IMODE(made.stat().st_mode) != 0o600


def test_the_socket_of_a_killed_driver_is_replaced(serve, tmp_path):
    path = tmp_path / "csi.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
        left.listen()
    assert path.exists()
    _, call = serve(socket=path)
    assert call("GetPluginInfo").name


def test_a_socket_that_somebody_serves_is_left_alone(serve, tmp_path):
    _, first = serve()
    with pytest.raises(errors.FailedPrecondition, match="another process serves"):
        serve()
    assert first("GetPluginInfo").name


def test_a_file_in_the_sockets_place_is_left_alone(serve, tmp_path):
    path = tmp_path / "csi.sock"
    path.write_text("mine")
    with pytest.raises(errors.FailedPrecondition, match="no socket"):
        serve(socket=path)
    assert path.read_text() == "mine"


def test_a_place_that_cannot_be_listened_on_is_named(serve, tmp_path):
    path = tmp_path / ("x" * 120) / "csi.sock"
    with pytest.raises(errors.FailedPrecondition, match="cannot listen on"):
        serve(socket=path)
