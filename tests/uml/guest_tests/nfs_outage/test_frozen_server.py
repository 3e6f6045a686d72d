"""A server that does not answer for a minute while twenty volumes are in use and calls arrive: nothing else may notice."""

import os
import statistics
import time

import pytest
from driver_in_guest import RWO, RWX, Cluster, pool_of, sources
from outage import Callers, Pods, Probes, waiting_for_servers

from csi_driver.rpc import csi_pb2 as csi

VOLUMES = 20
FROZEN_SECONDS = float(os.environ.get("TATAMI_OUTAGE_SECONDS", "60"))
CALM_SECONDS = 25.0
FLOOR_SECONDS = 0.25
"""Below this a call is quick, whatever the ratio: a guest has one processor, and shares it. Kubelet gives a probe a second."""


@pytest.fixture
def two_servers(make_server):
    """Two servers with an exported XFS each: one that will be away, one that stays."""
    servers = make_server("away"), make_server("stays")
    for server in servers:
        server.export(server.filesystem("xfs", name=server.name))
    return servers


@pytest.fixture
def cluster(network, two_servers):
    """A controller and a node with a pool on each server."""
    away, stays = two_servers
    pools = [pool_of(away, f"/srv/{away.name}", "away"), pool_of(stays, f"/srv/{stays.name}", "stays")]
    with Cluster(network, pools, nodes=1) as cluster:
        yield cluster


def asks_of(cluster, uses, name):
    """What kubelet and sidecars ask about the volumes of one pool: node's questions, controller's questions."""
    node = [
        ("NodeGetVolumeStats", csi.NodeGetVolumeStatsRequest(volume_id=use.volume.handle, volume_path=str(use.target)))
        for use in uses[:4]
    ]
    capability = uses[0].capability
    controller = [
        ("CreateVolume", csi.CreateVolumeRequest(name=f"{name}-again", volume_capabilities=[capability], parameters={"pool": name})),
        ("ValidateVolumeCapabilities", csi.ValidateVolumeCapabilitiesRequest(volume_id=uses[0].volume.handle, volume_capabilities=[capability])),
        ("ControllerGetVolumeHealth", csi.ControllerGetVolumeHealthRequest(volume_id=uses[1].volume.handle)),
        ("CreateSnapshot", csi.CreateSnapshotRequest(name=f"{name}-again", source_volume_id=uses[0].volume.handle)),
    ]  # fmt: skip
    return node, controller


def test_a_minute_without_the_server_is_noticed_by_its_own_calls_only_and_leaves_nothing_behind(cluster, two_servers):
    away, _ = two_servers
    node, controller = cluster.nodes[0], cluster.controller
    uses = [
        cluster.use(cluster.create(f"used-{number}", pool="away"), mode=RWX if number % 2 else RWO) for number in range(VOLUMES)
    ]
    for use in uses:
        cluster.mount(use)
    others = [cluster.use(cluster.create(f"other-{number}", pool="stays")) for number in range(2)]
    for use in others:
        cluster.mount(use)
    pods = Pods(uses)
    other_pods = Pods(others)
    pods.wait_until_all_write(time.monotonic(), 60)

    def run(seconds: float, act=lambda: None) -> dict:
        """Probe both processes and ask about both pools for a while; `act` happens at the beginning."""
        asks, other_asks = asks_of(cluster, uses, "away"), asks_of(cluster, others, "stays")
        callers = [Callers(node, asks[0]), Callers(controller, asks[1])]
        other_callers = [Callers(node, other_asks[0]), Callers(controller, other_asks[1])]
        act()
        with Probes(node) as node_probes, Probes(controller) as controller_probes:
            time.sleep(seconds)
        for each in other_callers:
            each.stop()
        return {
            "probes": (node_probes, controller_probes),
            "callers": callers,
            "others": other_callers,
        }

    calm = run(CALM_SECONDS)
    for each in calm["callers"]:
        each.stop()
    before = [(driver.threads(), len(driver.children())) for driver in (node, controller)]

    frozen = []
    storm = run(FROZEN_SECONDS, lambda: (away.freeze(), frozen.append(time.monotonic())))
    (frozen_at,) = frozen
    thawing = time.monotonic()
    hung = [waiting_for_servers(driver) for driver in (node, controller)]
    away.thaw()
    thawed = time.monotonic()
    assert pods.written_between(frozen_at + 1, thawing) == 0, "the server was not away"

    # Probes, and whoever is asked about the other server.
    for name, quiet, loud in zip(("node", "controller"), calm["probes"], storm["probes"], strict=True):
        print(
            f"{name}: probe p99 {quiet.p99() * 1000:.1f} ms calm ({len(quiet.seconds)}), {loud.p99() * 1000:.1f} ms in the outage ({len(loud.seconds)})"
        )
        assert (quiet.unready, loud.unready) == (0, 0)
        assert loud.p99() <= max(2 * quiet.p99(), FLOOR_SECONDS)
    for name, quiet, loud in zip(("node", "controller"), calm["others"], storm["others"], strict=True):
        medians = statistics.median(quiet.seconds), statistics.median(loud.seconds)
        print(
            f"{name}: the other server's calls take {medians[0] * 1000:.0f} ms calm, {medians[1] * 1000:.0f} ms in the outage; {loud.codes}"
        )
        assert {code for _, code in loud.codes} == {"OK"}
        assert medians[1] <= max(2 * medians[0], FLOOR_SECONDS)
    assert other_pods.written_between(frozen_at + 1, thawing) > 2 * len(others) * FROZEN_SECONDS / 4

    # All I/O goes on by itself, and every call about the server that was away works again.
    pods.wait_until_all_write(thawed, 90)
    print(f"all {VOLUMES} volumes were written to again {time.monotonic() - thawed:.1f} s after the thaw; it hung: {hung}")
    for each in storm["callers"]:
        print("meanwhile, of the server that was away:", each.codes)
        assert {code for _, code in each.codes} <= {"OK", "UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED"}
        each.stop()
    # Nobody is kept waiting for a server that is known to be silent: not only once, but for as long as it is.
    refusals = sum(count for (_, code), count in storm["callers"][1].codes.items() if code == "UNAVAILABLE")
    assert refusals > FROZEN_SECONDS / 2
    cluster.create("after", pool="away")

    # Nothing is left behind: no child, no thread that waits for the server, no more threads than calm work needs.
    until = time.monotonic() + 60
    after = []
    while time.monotonic() < until:
        after = [(driver.threads(), len(driver.children()), waiting_for_servers(driver)) for driver in (node, controller)]
        if all(now[0] <= then[0] + 8 and now[1] == 0 and not now[2] for then, now in zip(before, after, strict=True)):
            break
        time.sleep(1)
    else:
        raise AssertionError(f"before {before}, after {after}")
    print(f"threads and children before {before}, after {after}")
    pods.close()
    other_pods.close()
    for use in (*uses, *others):
        cluster.unmount(use)
    assert not sources(node.node)
