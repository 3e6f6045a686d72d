import json
import subprocess
import sys

import pytest

from tests.cli.trials import REPOSITORY, SECONDS


@pytest.fixture
def endpoint(trials):
    _, serving = trials.serving()
    return serving["endpoint"]


def call(endpoint, *arguments, stdin=""):
    argv = [sys.executable, "-m", "csi_driver", "call", "--endpoint", endpoint, *arguments]
    return subprocess.run(argv, cwd=REPOSITORY, input=stdin, capture_output=True, text=True, timeout=SECONDS, check=False)


def test_the_answer_is_json_with_the_names_of_the_spec(endpoint):
    done = call(endpoint, "NodeGetInfo")
    assert json.loads(done.stdout)["node_id"] == "this-node"
    assert json.loads(call(endpoint, "Controller/GetCapacity", '{"parameters": {"pool": "demo"}}').stdout)["available_capacity"]
    assert done.returncode == 0


def test_a_request_can_come_from_standard_input(endpoint):
    done = call(endpoint, "ListVolumes", "-", stdin='{"max_entries": 3}')
    assert (done.returncode, json.loads(done.stdout)) == (0, {})


def test_a_refusal_is_its_code_and_message_on_stderr(endpoint):
    done = call(endpoint, "ControllerGetVolume", '{"volume_id": "unknown"}')
    assert (done.returncode, done.stdout) == (1, "")
    assert "NOT_FOUND: volume 'unknown' does not exist" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["NodeGetInf"], "CSI has no method NodeGetInf"),
        (["Node/CreateVolume"], "CSI has no method Node/CreateVolume"),
        (["ListVolumes", "{"], "is not JSON"),
        (["ListVolumes", "[]"], "must be a JSON object"),
        (["ListVolumes", '{"max": 3}'], 'no field named "max"'),
    ],
)
def test_a_mistake_in_what_is_typed_is_named_and_nothing_is_sent(endpoint, arguments, words):
    done = call(endpoint, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_a_missing_driver_is_said_to_be_missing(tmp_path):
    done = call(f"unix://{tmp_path}/csi.sock", "Probe")
    assert done.returncode == 1
    assert "is the driver running?" in done.stderr
    assert call("tcp://127.0.0.1:1", "Probe").returncode == 2
