"""The chart against the driver that it installs: what it says must be what the code takes, and no more than is needed."""

import json
import re
from fractions import Fraction

import click
import pytest

from csi_driver import __version__
from csi_driver.cli import serve
from csi_driver.config import DEFAULT_NAMES, DEFAULT_POOL_PATH, Budget, ServeOptions, load_settings, parse_settings
from csi_driver.volumes import parameters
from csi_driver.volumes.model import OnDelete
from tests.deploy.conftest import NFS, ROOT
from tests.deploy.rendered import WORKLOADS, containers, driver_of, named, of_kind

CHART = ROOT / "deploy" / "chart" / "tatami"
SIDECARS = {"provisioner", "attacher", "resizer", "snapshotter"}


# --- rendering --------------------------------------------------------------------------------------------------------------------


def test_helm_finds_nothing_to_complain_about(chart):
    assert "0 chart(s) failed" in chart.helm("lint", "--strict", str(CHART))
    assert "0 chart(s) failed" in chart.helm("lint", "--strict", str(CHART), *NFS)


@pytest.mark.parametrize("name", ["hostpath.yaml", "nfs.yaml"])
def test_the_committed_manifests_are_what_the_chart_makes(chart, name):
    assert (chart.MANIFESTS / name).read_text() == chart.render(name)


def test_the_defaults_install_hostpath_with_a_default_class_and_no_nfs(objects):
    found = objects()
    assert [driver["metadata"]["name"] for driver in of_kind(found, "CSIDriver")] == [DEFAULT_NAMES["hostpath"]]
    usual, copies = of_kind(found, "StorageClass")
    assert usual["metadata"]["annotations"] == {"storageclass.kubernetes.io/is-default-class": "true"}
    assert (usual["provisioner"], usual["volumeBindingMode"]) == (DEFAULT_NAMES["hostpath"], "WaitForFirstConsumer")
    assert "annotations" not in copies["metadata"]
    assert (copies["provisioner"], copies["volumeBindingMode"]) == (DEFAULT_NAMES["hostpath"], "Immediate")


def test_nfs_comes_with_its_first_pool_and_hostpath_can_be_left_out(objects):
    assert {d["metadata"]["name"] for d in of_kind(objects(*NFS), "CSIDriver")} == set(DEFAULT_NAMES.values())
    alone = objects(*NFS, "--set=hostpath.enabled=false")
    assert {d["metadata"]["name"] for d in of_kind(alone, "CSIDriver")} == {DEFAULT_NAMES["nfs"]}
    assert not any("hostpath" in found["metadata"]["name"] for found in alone)


def test_a_cluster_without_the_snapshot_apis_gets_no_snapshotter_and_no_class(objects):
    found = objects(*NFS, apis=())
    assert not of_kind(found, "VolumeSnapshotClass", "VolumeGroupSnapshotClass", "VolumeAttributesClass")
    assert {c["name"] for _, _, c in containers(found)} == {"driver"} | SIDECARS - {"snapshotter"}
    assert not any("snapshot" in str(role["rules"]) for role in of_kind(found, "ClusterRole"))
    forced = objects("--set=snapshots=always", apis=())
    assert of_kind(forced, "VolumeSnapshotClass")
    assert not of_kind(objects("--set=snapshots=never"), "VolumeSnapshotClass")


def test_names_are_unique(everything):
    identities = [(found["kind"], found["metadata"]["name"], found["metadata"].get("namespace")) for found in everything]
    assert len(identities) == len(set(identities))


def test_each_selector_finds_the_pods_of_one_workload(everything):
    labels = {w["metadata"]["name"]: w["spec"]["template"]["metadata"]["labels"] for w in of_kind(everything, *WORKLOADS)}
    for found in of_kind(everything, "PodDisruptionBudget", "NetworkPolicy", "Service", *WORKLOADS):
        spec = found["spec"]
        selector = spec.get("podSelector") or spec["selector"]
        selector = selector.get("matchLabels", selector)
        matched = [name for name, given in labels.items() if selector.items() <= given.items()]
        assert matched == [found["metadata"]["name"]]


def test_a_changed_pool_restarts_the_pods_that_read_it_and_no_others(objects):
    def checksums(*options):
        return {
            w["metadata"]["name"]: w["spec"]["template"]["metadata"]["annotations"]["checksum/pools"]
            for w in of_kind(objects(*NFS, *options), *WORKLOADS)
        }

    before, after = checksums(), checksums("--set=nfs.pools.fast.path=/other")
    assert {name for name in before if before[name] != after[name]} == {"tatami-nfs-node", "tatami-nfs-controller"}


# --- the driver's side ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hostpath", "nfs"])
def test_the_pools_are_accepted_by_the_drivers_own_parser(everything, kind):
    text = named(everything, "ConfigMap", f"tatami-{kind}")["data"]["pools.toml"]
    settings = parse_settings(text.encode(), "pools.toml")
    assert (settings.backend, settings.name) == (kind, DEFAULT_NAMES[kind])
    if kind == "nfs":
        assert settings.pools["fast"].options == ("vers=4.2", "hard")
    else:
        assert settings == load_settings(None)
        assert settings.pools["default"].path == DEFAULT_POOL_PATH


def test_all_that_pools_can_say_arrives(objects, tmp_path):
    values = tmp_path / "values.yaml"
    budget = "size: 500Gi, overcommit: 1.5, reserve: 5%"
    pools = f"{{default: {{path: '/mnt/ä<&>x', {budget}}}, b-2: {{path: /b, inline: true}}}}"
    values.write_text(f"hostpath: {{defaultPool: b-2, maxVolumesPerNode: 110, pools: {pools}}}\n")
    text = named(objects(f"--values={values}"), "ConfigMap", "tatami-hostpath")["data"]["pools.toml"]
    settings = parse_settings(text.encode(), "pools.toml")
    assert (settings.default_pool, settings.max_volumes_per_node) == ("b-2", 110)
    assert settings.pools["default"].budget == Budget(500 * 1024**3, Fraction(3, 2), 0, Fraction(1, 20))
    assert {str(pool.path): pool.inline for pool in settings.pools.values()} == {"/mnt/ä<&>x": False, "/b": True}


def test_all_flags_of_the_driver_exist_and_are_accepted_together(everything):
    known = {option.opts[0]: option for option in serve.command.params if isinstance(option, click.Option)}
    seen = set()
    for name, _, container in containers(everything):
        if container["name"] != "driver":
            continue
        word, *flags = container["args"]
        assert word == "serve"
        pairs = dict(flag.partition("=")[::2] for flag in flags)
        assert set(pairs) <= set(known), name
        given = {known[flag].name: value for flag, value in pairs.items()}
        node_id = given.get("node_id", "n").replace("$(NODE_NAME)", "node-1").replace("$(HOST_IP)", "192.0.2.1")
        assert "$" not in node_id
        usual = {option.name: option.default for option in known.values()}
        options = {**usual, **given, "node_id": node_id, "kubelet_registration_path": given.get("kubelet_registration_path")}
        ServeOptions(**{**options, "metrics_address": given.get("metrics_address")}).checked()
        for flag, value in pairs.items():
            if isinstance(known[flag].type, click.Choice):
                assert value in known[flag].type.choices
        seen.add((name, pairs["--role"]))
    assert seen == {
        ("tatami-hostpath-node", "all"),
        ("tatami-hostpath-resizer", "expansion"),
        ("tatami-nfs-node", "node"),
        ("tatami-nfs-controller", "controller"),
    }


def test_nodes_register_themselves_with_the_socket_that_they_serve(everything):
    for name in ("tatami-hostpath-node", "tatami-nfs-node"):
        flags = dict(flag.partition("=")[::2] for flag in driver_of(everything, name)["args"])
        assert flags["--endpoint"] == f"unix://{flags['--kubelet-registration-path']}"
        mounted = {mount["mountPath"]: mount for mount in driver_of(everything, name)["volumeMounts"]}
        assert mounted[flags["--kubelet-dir"]]["mountPropagation"] == "Bidirectional"
        assert flags["--kubelet-registration-path"].startswith(flags["--kubelet-dir"] + "/plugins/")


def test_each_pool_of_a_node_is_the_same_path_inside_and_outside(everything):
    pod = named(everything, "DaemonSet", "tatami-hostpath-node")["spec"]["template"]["spec"]
    outside = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    inside = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"].startswith("pool-")}
    assert inside == {"pool-default": str(DEFAULT_POOL_PATH)}
    assert all(outside[name] == path for name, path in inside.items())


def test_the_data_of_a_pool_is_the_same_path_in_the_controller_which_may_do_there_what_a_server_does(objects):
    data = ["--set=nfs.pools.fast.data=/srv/tatami", "--set=nfs.controller.nodeSelector.kubernetes\\.io/hostname=nas"]
    found = objects(*NFS, *data)
    pod = named(found, "Deployment", "tatami-nfs-controller")["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["kubernetes.io/hostname"] == "nas"
    assert {"name": "pool-fast", "hostPath": {"path": "/srv/tatami", "type": "Directory"}} in pod["volumes"]
    driver = driver_of(found, "tatami-nfs-controller")
    assert {m["name"]: m["mountPath"] for m in driver["volumeMounts"]}["pool-fast"] == "/srv/tatami"
    assert {"SYS_ADMIN", "CHOWN", "SYS_RESOURCE"} < set(driver["securityContext"]["capabilities"]["add"])
    settings = parse_settings(named(found, "ConfigMap", "tatami-nfs")["data"]["pools.toml"].encode(), "pools.toml")
    assert str(settings.pools["fast"].data) == "/srv/tatami"


def test_the_csidrivers_say_what_the_driver_does(everything):
    specs = {driver["metadata"]["name"]: driver["spec"] for driver in of_kind(everything, "CSIDriver")}
    for spec in specs.values():
        assert spec["podInfoOnMount"]  # else inline volumes are not known as such
        assert spec["volumeLifecycleModes"] == ["Persistent"]
        assert (spec["fsGroupPolicy"], spec["storageCapacity"]) == ("File", True)
    assert {name: spec["attachRequired"] for name, spec in specs.items()} == {
        DEFAULT_NAMES["hostpath"]: False,
        DEFAULT_NAMES["nfs"]: True,
    }


@pytest.mark.parametrize("kind", ["hostpath", "nfs"])
def test_pods_can_have_inline_volumes_only_where_a_pool_of_that_driver_takes_them(objects, kind):
    pool = {"hostpath": "hostpath.pools.default", "nfs": "nfs.pools.fast"}[kind]
    found = {driver["metadata"]["name"]: driver for driver in of_kind(objects(*NFS, f"--set={pool}.inline=true"), "CSIDriver")}
    modes = {name: driver["spec"]["volumeLifecycleModes"] for name, driver in found.items()}
    assert modes.pop(DEFAULT_NAMES[kind]) == ["Persistent", "Ephemeral"]
    assert list(modes.values()) == [["Persistent"]]


def test_classes_name_the_driver_and_parameters_that_it_takes(objects):
    classes = objects(
        *NFS,
        "--set=hostpath.storageClasses[0].name=tatami",
        "--set=hostpath.storageClasses[0].pool=default",
        "--set-string=hostpath.storageClasses[0].parameters.mode=2770",
        "--set=hostpath.storageClasses[0].parameters.uid=1000",
        "--set=hostpath.storageClasses[0].parameters.verify=true",
        "--set=hostpath.snapshotClasses[0].name=tatami",
        "--set=hostpath.snapshotClasses[0].parameters.digests=true",
        "--set-string=hostpath.storageClasses[0].parameters.directory=$\\{pvc.name\\}",
    )
    (first,) = (c for c in of_kind(classes, "StorageClass") if c["metadata"]["name"] == "tatami")
    metadata = {f"csi.storage.k8s.io/{what}": "x" for what in ("pvc/name", "pvc/namespace", "pv/name")}
    parsed = parameters.parse_class_parameters(first["parameters"] | metadata)
    assert (parsed.pool, parsed.ownership.uid, parsed.ownership.mode) == ("default", 1000, 0o2770)
    (snapshots,) = (c for c in of_kind(classes, "VolumeSnapshotClass") if c["metadata"]["name"] == "tatami")
    assert snapshots["parameters"] == {"digests": "true"}
    assert parameters.parse_snapshot_parameters(snapshots["parameters"])
    for found in of_kind(classes, "VolumeAttributesClass"):
        assert parameters.parse_mutable_parameters(found["parameters"]) == OnDelete.RETAIN
    drivers = {d["metadata"]["name"] for d in of_kind(classes, "CSIDriver")}
    groups = of_kind(classes, "VolumeGroupSnapshotClass")
    assert {c["driver"] for c in groups} == {DEFAULT_NAMES["nfs"]}  # external-snapshotter cannot make them per node
    users = of_kind(classes, "StorageClass", "VolumeSnapshotClass", "VolumeAttributesClass")
    assert {c.get("provisioner") or c.get("driver") or c.get("driverName") for c in users} == drivers


def test_numbers_of_a_values_file_reach_the_driver_as_they_are_written(objects, tmp_path):
    values = tmp_path / "values.yaml"
    written = '{uid: 1000650000, gid: 4294967294, inodes: 10000000, mode: "0770", verify: true}'
    values.write_text(f"hostpath: {{storageClasses: [{{name: '123', parameters: {written}}}]}}\n")
    found = named(objects(f"--values={values}"), "StorageClass", "123")
    parsed = parameters.parse_class_parameters(found["parameters"])
    assert (parsed.ownership.uid, parsed.ownership.gid, parsed.ownership.mode) == (1000650000, 4294967294, 0o770)
    assert (found["parameters"]["inodes"], found["parameters"]["verify"]) == ("10000000", "true")


def test_a_mode_that_yaml_has_made_another_number_of_is_refused(chart, tmp_path):
    values = tmp_path / "values.yaml"
    values.write_text("hostpath: {storageClasses: [{name: tatami, parameters: {mode: 0770}}]}\n")
    with pytest.raises(RuntimeError, match="parameters/mode': got number, want string"):
        chart.template(f"--values={values}")


def test_the_parameters_that_the_schema_allows_are_those_of_the_driver(chart):
    schema = json.loads((CHART / "values.schema.json").read_text())
    classes = schema["definitions"]["storageClass"]["properties"]
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("## StorageClass parameters") :]
    documented = set(re.findall(r"^\| `(\w+)` \|", table[: table.index("## Inline")], re.MULTILINE))
    assert set(classes["parameters"]["properties"]) == documented - {"pool"}
    assert set(schema["definitions"]["onDelete"]["enum"]) == set(OnDelete)


def test_the_chart_is_for_this_version_of_the_driver():
    assert f"\nappVersion: {__version__}\n" in (CHART / "Chart.yaml").read_text()


# --- least privilege --------------------------------------------------------------------------------------------------------------


def test_only_the_driver_on_the_nodes_is_privileged(everything):
    privileged = {(name, c["name"]) for name, _, c in containers(everything) if c["securityContext"].get("privileged")}
    assert privileged == {("tatami-hostpath-node", "driver"), ("tatami-nfs-node", "driver")}


def test_where_selinux_enforces_the_pods_that_need_it_are_not_confined_by_it(everything):
    asked = {
        w["metadata"]["name"]: w["spec"]["template"]["spec"]["securityContext"].get("seLinuxOptions")
        for w in of_kind(everything, *WORKLOADS)
    }
    assert {name for name, options in asked.items() if options} == {"tatami-hostpath-node", "tatami-nfs-controller"}


def test_every_container_has_a_read_only_root(everything):
    assert all(c["securityContext"]["readOnlyRootFilesystem"] for _, _, c in containers(everything))


def test_everything_else_drops_all_and_only_the_nfs_controller_takes_something_back(everything):
    added = {}
    for name, _, container in containers(everything):
        context = container["securityContext"]
        if context.get("privileged"):
            continue
        assert context["capabilities"]["drop"] == ["ALL"]
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert context["allowPrivilegeEscalation"] is False
        if "add" in context["capabilities"]:
            added[name, container["name"]] = "SYS_ADMIN" in context["capabilities"]["add"]
    assert added == {("tatami-nfs-controller", "driver"): True}


def test_what_touches_no_host_runs_as_nobody(everything):
    pod = named(everything, "Deployment", "tatami-hostpath-resizer")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert all("hostPath" not in volume for volume in pod["volumes"])


def test_only_sidecars_have_credentials_of_the_api(everything):
    for _, pod, container in containers(everything):
        assert pod["automountServiceAccountToken"] is False
        has = any(mount["name"] == "api-access" for mount in container["volumeMounts"])
        assert has == (container["name"] != "driver")
    assert all(account["automountServiceAccountToken"] is False for account in of_kind(everything, "ServiceAccount"))


def test_no_rule_has_a_wildcard_and_none_reads_secrets(everything):
    rules = [rule for role in of_kind(everything, "Role", "ClusterRole") for rule in role["rules"]]
    assert rules
    for rule in rules:
        assert set(rule) == {"apiGroups", "resources", "verbs"}
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert "secrets" not in rule["resources"]
        assert not {"bind", "escalate", "impersonate"} & set(rule["verbs"])


@pytest.mark.parametrize("kind", ["hostpath", "nfs"])
def test_every_rule_says_for_which_sidecar_of_its_pod_it_is(chart, everything, kind):
    lines = (chart.MANIFESTS / f"{kind}.yaml").read_text().splitlines()
    rules = [number for number, line in enumerate(lines) if re.match(r" *- \{apiGroups:", line)]
    assert len(rules) > 5
    present = {c["name"] for name, _, c in containers(everything) if kind in name}
    for number in rules:
        comment = re.fullmatch(r" *# ([a-z, ]+): \S.*?(?:; ([a-z]+): .*)?", lines[number - 1])
        assert comment, f"{lines[number]} has no comment that says for which sidecar it is"
        assert set(comment[1].split(", ")) <= present


def test_no_sidecar_is_without_rules_and_nodes_of_nfs_have_none(everything):
    subjects = {s["name"] for b in of_kind(everything, "RoleBinding", "ClusterRoleBinding") for s in b["subjects"]}
    assert subjects == {"tatami-hostpath-node", "tatami-hostpath-resizer", "tatami-nfs-controller"}
    for binding in of_kind(everything, "RoleBinding", "ClusterRoleBinding"):
        named(everything, binding["roleRef"]["kind"], binding["roleRef"]["name"])
        for subject in binding["subjects"]:
            named(everything, "ServiceAccount", subject["name"])


def test_no_port_of_a_host_is_taken_by_default(objects):
    for name, pod, container in containers(objects(*NFS)):
        assert not any("hostPort" in port for port in container.get("ports", []))
        if pod.get("hostNetwork"):
            assert "ports" not in container, name
            assert not any("metrics-address" in argument for argument in container["args"])
            assert container["name"] != "driver" or "exec" in container["livenessProbe"]


# --- images -----------------------------------------------------------------------------------------------------------------------


def test_images_carry_no_registry_until_one_is_given(objects):
    for _, _, container in containers(objects(*NFS)):
        assert re.fullmatch(r"(?:tatami|sig-storage/csi-[a-z]+):[\w.]+", container["image"])
    for _, _, container in containers(objects(*NFS, "--set=global.imageRegistry=registry.example.com/mirror")):
        assert container["image"].startswith("registry.example.com/mirror/")
    images = {
        c["image"]
        for _, _, c in containers(objects("--set=image.registry=a.example.com", f"--set=image.digest=sha256:{'0' * 64}"))
    }
    assert f"a.example.com/tatami@sha256:{'0' * 64}" in images
    assert "sig-storage/csi-provisioner:v6.3.0" in images
