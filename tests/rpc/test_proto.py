"""The protocol file says what the CSI specification says, and the committed code says what the file says."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, unknown_fields

from csi_driver.rpc import csi_pb2

ROOT = Path(__file__).resolve().parents[2]
UPSTREAM = "github.com/container-storage-interface/spec@v1.13.0"
PROTOCOLS = ["csi", "pluginregistration"]
GENERATED = [f"{protocol}_pb2{ending}" for protocol in PROTOCOLS for ending in (".py", ".pyi", "_grpc.py", "_grpc.pyi")]


def run(*command, cwd=ROOT):
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


# --- generated code ------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path):
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    (tmp_path / "csi_driver" / "rpc").mkdir(parents=True)
    for name in GENERATED:
        shutil.copy(ROOT / "csi_driver" / "rpc" / name, tmp_path / "csi_driver" / "rpc" / name)
    return tmp_path


def test_the_committed_code_is_what_the_protocol_file_generates():
    done = run(sys.executable, "proto/generate.py", "--check")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", GENERATED)
def test_an_edited_file_is_named_as_stale_and_left_alone_until_it_is_generated_again(checkout, name):
    edited = checkout / "csi_driver" / "rpc" / name
    current = edited.read_bytes()
    edited.write_bytes(current + b"\n")
    done = run(sys.executable, checkout / "proto" / "generate.py", "--check", cwd=checkout)
    assert done.returncode == 1
    assert done.stderr == f"csi_driver/rpc/{name}: is stale, run proto/generate.py\n"
    assert edited.read_bytes() == current + b"\n"
    assert run(sys.executable, checkout / "proto" / "generate.py", cwd=checkout).returncode == 0
    assert edited.read_bytes() == current


def test_a_missing_file_is_stale(checkout):
    (checkout / "csi_driver" / "rpc" / "csi_pb2_grpc.pyi").unlink()
    done = run(sys.executable, checkout / "proto" / "generate.py", "--check", cwd=checkout)
    assert done.returncode == 1
    assert "csi_driver/rpc/csi_pb2_grpc.pyi" in done.stderr


def test_a_protocol_file_that_does_not_compile_changes_nothing(checkout):
    (checkout / "proto" / "csi.proto").write_text('syntax = "proto3"; message {')
    before = {name: (checkout / "csi_driver" / "rpc" / name).read_bytes() for name in GENERATED}
    done = run(sys.executable, checkout / "proto" / "generate.py", cwd=checkout)
    assert done.returncode != 0
    assert "csi.proto:1:" in done.stderr
    assert {name: (checkout / "csi_driver" / "rpc" / name).read_bytes() for name in GENERATED} == before


def test_the_stubs_use_the_packages_own_messages(tmp_path):
    code = (
        "import sys; from csi_driver.rpc import csi_pb2, csi_pb2_grpc;"
        "assert 'csi_pb2' not in sys.modules; print(csi_pb2.DESCRIPTOR.package, csi_pb2_grpc.NodeStub.__module__)"
    )
    done = run(sys.executable, "-W", "error", "-c", code, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("csi.v1 csi_driver.rpc.csi_pb2_grpc\n", "")


def test_every_secret_is_marked_in_the_running_descriptor():
    fields = [field for message in csi_pb2.DESCRIPTOR.message_types_by_name.values() for field in message.fields]
    marked = [field for field in fields if field.GetOptions().Extensions[csi_pb2.csi_secret]]
    assert len(marked) == 22
    assert marked == [field for field in fields if field.name == "secrets"]


# --- the same protocol ------------------------------------------------------------


def compiled(directory, out):
    """Compile csi.proto of `directory`; return its FileDescriptorProto, read with the very options that the file declares."""
    done = run(
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"-I{directory}",
        "--include_imports",
        f"--descriptor_set_out={out}",
        "csi.proto",
    )
    assert done.returncode == 0, done.stderr
    # A pool of its own: upstream and we declare the same names, which one pool refuses, and each file's extensions must be read
    # as that file declares them.
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    file_set = message_factory.GetMessageClass(pool.FindMessageTypeByName("google.protobuf.FileDescriptorSet"))
    return next(file for file in file_set.FromString(out.read_bytes()).file if file.name == "csi.proto")


def facts(message, path="csi.proto", oneofs=()):
    """Everything that a descriptor says, one line each; things are known by name or range, for their place says nothing."""
    assert not len(unknown_fields.UnknownFieldSet(message)), f"{path} says something that its own options cannot read"
    own_oneofs = [oneof.name for oneof in getattr(message, "oneof_decl", ())]
    for field, content in message.ListFields():
        label = f"{path} ({field.full_name})" if field.is_extension else f"{path} {field.name}"
        for item in content if field.is_repeated else [content]:
            if field.message_type and hasattr(item, "name"):
                yield from facts(item, f"{label}:{item.name}", own_oneofs)
            elif field.message_type and hasattr(item, "start"):
                yield from facts(item, f"{label}:{item.start}-{item.end}")
            elif field.message_type:
                yield from facts(item, label)
            elif field.enum_type:
                yield f"{label}: {field.enum_type.values_by_number[item].name}"
            elif field.name == "oneof_index":
                yield f"{label}: {oneofs[item]}"
            else:
                yield f"{label}: {item}"


def difference(upstream, ours):
    """Say what only upstream has (-) and what only we have (+); an empty text when they agree."""
    theirs, mine = set(facts(upstream)), set(facts(ours))
    lines = [f"- {line}" for line in theirs - mine] + [f"+ {line}" for line in mine - theirs]
    return "\n".join(sorted(lines, key=lambda line: (line[2:], line[0])))


@pytest.fixture(scope="session")
def upstream(tmp_path_factory):
    scratch = tmp_path_factory.mktemp("upstream")
    assert shutil.which("go"), "the tests need go: it brings the CSI specification that ours is compared with"
    done = run("go", "mod", "download", "-json", UPSTREAM, cwd=scratch)
    assert done.returncode == 0, done.stdout + done.stderr
    return compiled(json.loads(done.stdout)["Dir"], scratch / "set")


def test_our_protocol_is_csi_1_13_0_with_every_option(upstream, tmp_path):
    found = difference(upstream, compiled(ROOT / "proto", tmp_path / "set"))
    assert not found, f"proto/csi.proto is not {UPSTREAM} (- theirs, + ours):\n{found}"


def test_the_comparison_reads_all_of_the_specification(upstream):
    lines = list(facts(upstream))
    assert len(lines) == len(set(lines))
    for part, count in {"service": 5, "method": 36, "extension": 7}.items():
        assert sum(bool(re.search(rf"{part}:\w+ name: ", line)) for line in lines) == count
    assert sum(line.endswith("(csi.v1.csi_secret): True") for line in lines) == 22


CHANGES = {
    "a field's number": ("string vendor_version = 2;", "string vendor_version = 9;", "field:vendor_version number: 9"),
    "a field's type": ("int64 limit_bytes = 2;", "uint64 limit_bytes = 2;", "field:limit_bytes type: TYPE_UINT64"),
    "a field's message": ("Confirmed confirmed = 1;", "Volume confirmed = 1;", "field:confirmed type_name: .csi.v1.Volume"),
    "a field's name": ("bool readonly = 4;", "bool read_only = 4;", "field:read_only json_name: readOnly"),
    "a field's label": ("repeated string mount_flags", "string mount_flags", "field:mount_flags label: LABEL_OPTIONAL"),
    "a map's value": (
        "map<string, string> manifest",
        "map<string, bytes> manifest",
        "nested_type:ManifestEntry field:value type: TYPE_BYTES",
    ),
    "a field's presence": ("int64 size_bytes = 1;", "optional int64 size_bytes = 1;", "field:size_bytes proto3_optional: True"),
    "a field out of its oneof": (
        "    VolumeSource volume = 2;\n  }",
        "  }\n  VolumeSource volume = 2;",
        "message_type:VolumeContentSource field:volume oneof_index: type",
    ),
    "a secret unmarked": (
        "secrets = 7 [(csi_secret) = true];",
        "secrets = 7;",
        "field:secrets options (csi.v1.csi_secret): True",
    ),
    "a secret marked false": (
        "secrets = 7 [(csi_secret) = true];",
        "secrets = 7 [(csi_secret) = false];",
        "(csi.v1.csi_secret): False",
    ),
    "a second option lost": (", (alpha_field) = true];", "];", "field:secrets options (csi.v1.alpha_field): True"),
    "a reserved field freed": (
        "  reserved 2;\n\n  repeated VolumeUsage",
        "  repeated VolumeUsage",
        "NodeGetVolumeStatsResponse reserved_range:2-3 start: 2",
    ),
    "a reserved value freed": ("      reserved 11;\n", "", "reserved_range:11-11 start: 11"),
    "an enum value's number": ("ONLINE = 1;", "ONLINE = 3;", "value:ONLINE number: 3"),
    "an enum value's mark": (
        "GET_STORAGE_HEALTH = 8 [(alpha_enum_value) = true];",
        "GET_STORAGE_HEALTH = 8;",
        "value:GET_STORAGE_HEALTH",
    ),
    "an enum value lost": ("  DATA_LOSS = 3;\n", "", "value:DATA_LOSS number: 3"),
    "a message's mark": (
        "message VolumeHealth {\n  option (alpha_message) = true;",
        "message VolumeHealth {",
        "message_type:VolumeHealth options (csi.v1.alpha_message): True",
    ),
    "a service's mark": (
        "  option (alpha_service) = true;\n",
        "",
        "service:SnapshotMetadata options (csi.v1.alpha_service): True",
    ),
    "a stream lost": (
        "(stream GetMetadataDeltaResponse)",
        "(GetMetadataDeltaResponse)",
        "method:GetMetadataDelta server_streaming: True",
    ),
    "a stream of requests": ("GetMetadataDelta(", "GetMetadataDelta(stream ", "method:GetMetadataDelta client_streaming: True"),
    "a method's reply": ("returns (ProbeResponse)", "returns (ProbeRequest)", "method:Probe output_type: .csi.v1.ProbeRequest"),
    "a method lost": ("  rpc Probe(ProbeRequest) returns (ProbeResponse) {}\n", "", "service:Identity method:Probe"),
    "an empty message more": (
        "message ProbeRequest {}",
        "message ProbeRequest {} message More {}",
        "+ csi.proto message_type:More name: More",
    ),
    "a mark's number": ("bool csi_secret = 1059;", "bool csi_secret = 1061;", "extension:csi_secret number: 1061"),
    "the package": ("package csi.v1;", "package csi.v2;", "package: csi.v2"),
    "the Go package": (
        'spec/lib/go/csi";',
        'spec/lib/go/other";',
        "options go_package: github.com/container-storage-interface/spec/lib/go/other",
    ),
}


@pytest.mark.parametrize(("old", "new", "line"), CHANGES.values(), ids=CHANGES)
def test_the_comparison_sees_a_change_of(upstream, tmp_path, old, new, line):
    text = (ROOT / "proto" / "csi.proto").read_text()
    assert old in text
    (tmp_path / "csi.proto").write_text(text.replace(old, new, 1))
    assert line in difference(upstream, compiled(tmp_path, tmp_path / "set"))
