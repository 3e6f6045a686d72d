"""Metrics over real HTTP on loopback: the numbers are true, and neither a dead pool nor a slow client stops a scrape or a probe."""

import contextlib
import http.client
import logging
import socket
import subprocess
import sys
import threading
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from csi_driver import __version__
from csi_driver.config import ConfigError
from csi_driver.telemetry import http_endpoint
from csi_driver.telemetry.http_endpoint import serve_metrics
from csi_driver.telemetry.metrics import JobUsage, Metrics, PoolUsage, PrometheusMetrics, code_label


@pytest.fixture
def metrics():
    return PrometheusMetrics("hostpath.csi.tatami.dev", {"backend": "hostpath", "role": "all"})


@pytest.fixture
def serving():
    with contextlib.ExitStack() as stack:

        def serving(metrics, *ready, address="127.0.0.1:0"):
            endpoint = serve_metrics(address, metrics, *ready)
            stack.callback(endpoint.stop)
            return endpoint

        yield serving


def get(endpoint, path, host="127.0.0.1", **headers):
    connection = http.client.HTTPConnection(host, endpoint.port, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode(), dict(response.getheaders())


def samples(text):
    """{name: {labels: value}}; labels as a tuple of their values in the order of their names."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def scrape(metrics):
    return samples(metrics.render("")[0].decode())


def eventually(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


# --- what is counted --------------------------------------------------------------------------------------------------------------


def test_a_call_is_counted_with_upstreams_names_and_buckets(metrics, serving):
    metrics.call_finished("/csi.v1.Controller/CreateVolume", "ALREADY_EXISTS", 0.3)
    metrics.call_finished("/csi.v1.Controller/CreateVolume", "OK", 0.002)
    status, text, headers = get(serving(metrics), "/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert (
        'csi_plugin_operations_seconds_count{driver_name="hostpath.csi.tatami.dev",grpc_status_code="AlreadyExists",'
        'method_name="/csi.v1.Controller/CreateVolume"} 1.0'
    ) in text
    buckets = {
        float(labels[2]): value
        for labels, value in samples(text)["csi_plugin_operations_seconds_bucket"].items()
        if labels[1] == "AlreadyExists"
    }
    assert {0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 25, 50, 120, 300, 600, float("inf")} <= set(buckets)
    assert (buckets[0.25], buckets[0.5]) == (0, 1)
    assert min(buckets) <= 0.001


@pytest.mark.parametrize(
    ("python", "go"),
    [("OK", "OK"), ("CANCELLED", "Canceled"), ("NOT_FOUND", "NotFound"), ("DEADLINE_EXCEEDED", "DeadlineExceeded")],
)
def test_codes_are_labelled_as_go_names_them(python, go):
    assert code_label(python) == go


def test_lanes_show_capacity_calls_in_flight_rejections_and_the_age_of_a_hung_call(metrics):
    metrics.lane_opened("node", 4)
    idle = scrape(metrics)
    assert idle["tatami_lane_capacity"] == {("node",): 4}
    assert idle["tatami_lane_calls_in_flight"] == {("node",): 0}
    assert idle["tatami_lane_oldest_call_age_seconds"] == {("node",): 0}
    assert idle["tatami_lane_rejected_total"] == {("node",): 0}
    with metrics.in_lane("node"):
        time.sleep(0.2)
        with metrics.in_lane("node"):
            busy = scrape(metrics)
        metrics.call_rejected("node")
    assert busy["tatami_lane_calls_in_flight"] == {("node",): 2}
    assert busy["tatami_lane_oldest_call_age_seconds"][("node",)] >= 0.2
    after = scrape(metrics)
    assert after["tatami_lane_calls_in_flight"] == {("node",): 0}
    assert after["tatami_lane_oldest_call_age_seconds"] == {("node",): 0}
    assert after["tatami_lane_rejected_total"] == {("node",): 1}


def test_a_call_that_fails_leaves_its_lane(metrics):
    with pytest.raises(ValueError, match="x"), metrics.in_lane("node"):
        raise ValueError("x")
    assert scrape(metrics)["tatami_lane_calls_in_flight"] == {("node",): 0}


def test_pools_report_what_they_know_and_nothing_else(metrics):
    metrics.watch_pool("fast", lambda: PoolUsage(100, 40, 60, 7, 2, 1, 80))
    metrics.watch_pool("slow", lambda: PoolUsage(volumes=3))
    found = scrape(metrics)
    assert found["tatami_pool_readable"] == {("fast",): 1, ("slow",): 1}
    assert found["tatami_pool_size_bytes"] == {("fast",): 100}
    assert found["tatami_pool_free_bytes"] == {("fast",): 40}
    assert found["tatami_pool_used_bytes"] == {("fast",): 60}
    assert found["tatami_pool_volumes"] == {("fast",): 7, ("slow",): 3}
    assert found["tatami_pool_snapshots"] == {("fast",): 2}
    assert found["tatami_pool_trash"] == {("fast",): 1}
    assert found["tatami_pool_promised_bytes"] == {("fast",): 80}


def test_jobs_are_counted_at_each_scrape(metrics):
    usage = JobUsage(running=2, waiting=1, bytes=100)
    metrics.watch_jobs(lambda: usage)
    found = scrape(metrics)
    assert found["tatami_jobs_running"] == {(): 2}
    assert found["tatami_jobs_waiting"] == {(): 1}
    assert found["tatami_jobs_bytes_total"] == {(): 100}
    usage = JobUsage(running=0, waiting=0, bytes=150)
    assert scrape(metrics)["tatami_jobs_bytes_total"] == {(): 150}


def test_a_pool_that_fails_reports_nothing_and_is_logged_once_per_outage(metrics, caplog):
    broken = True

    def read():
        if broken:
            raise OSError(116, "Stale file handle")
        return PoolUsage(free_bytes=5)

    metrics.watch_pool("fast", read)
    metrics.watch_pool("slow", lambda: PoolUsage(free_bytes=9))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            found = scrape(metrics)
            assert found["tatami_pool_readable"] == {("fast",): 0, ("slow",): 1}
            assert found["tatami_pool_free_bytes"] == {("slow",): 9}
        broken = False
        assert scrape(metrics)["tatami_pool_free_bytes"] == {("fast",): 5, ("slow",): 9}
        broken = True
        scrape(metrics)
    assert [record.pool for record in caplog.records] == ["fast", "fast"]


def test_a_pool_that_hangs_costs_one_wait_and_one_thread_and_comes_back_with_fresh_numbers(metrics):
    release, values = threading.Event(), iter(range(1, 100))

    def read():
        value = next(values)
        if value == 1:
            release.wait(60)
        return PoolUsage(free_bytes=value)

    metrics.watch_pool("dead", read)
    metrics.watch_pool("alive", lambda: PoolUsage(free_bytes=9))
    before = threading.active_count()
    began = time.monotonic()
    assert scrape(metrics)["tatami_pool_free_bytes"] == {("alive",): 9}
    first = time.monotonic() - began
    assert 1.5 < first < 4
    began = time.monotonic()
    for _ in range(20):
        assert scrape(metrics)["tatami_pool_readable"] == {("alive",): 1, ("dead",): 0}
    assert time.monotonic() - began < 1.5  # nobody waits again for the question that is overdue
    assert threading.active_count() <= before + 2
    release.set()
    eventually(lambda: scrape(metrics)["tatami_pool_readable"][("dead",)] == 1)
    assert scrape(metrics)["tatami_pool_free_bytes"][("dead",)] > 1  # 1 is the answer that came too late


def test_the_sweepers_results_add_up(metrics):
    for pool in ("fast", "away"):
        metrics.sweeper_opened(pool)
    assert scrape(metrics)["tatami_sweeper_last_run_timestamp_seconds"] == {("away",): 0, ("fast",): 0}
    metrics.sweep_finished("fast", 0.5, {"staging": 2, "trash": 1}, failed=0)
    metrics.sweep_finished("fast", 0.25, {"staging": 3}, failed=4)
    found = scrape(metrics)
    assert found["tatami_sweeper_removed_total"] == {("staging", "fast"): 5, ("trash", "fast"): 1}
    assert found["tatami_sweeper_failures_total"] == {("away",): 0, ("fast",): 4}
    assert found["tatami_sweeper_runs_total"] == {("away",): 0, ("fast",): 2}
    assert found["tatami_sweeper_last_run_seconds"] == {("away",): 0, ("fast",): 0.25}
    assert time.time() - found["tatami_sweeper_last_run_timestamp_seconds"][("fast",)] < 60
    assert found["tatami_sweeper_last_run_timestamp_seconds"][("away",)] == 0, (
        "a pool whose server is away hides behind no other"
    )


def test_build_and_process_are_described(metrics):
    text = metrics.render("")[0].decode()
    found = samples(text)
    (line,) = [line for line in text.splitlines() if line.startswith("tatami_build_info{")]
    for pair in (f'version="{__version__}"', 'backend="hostpath"', 'role="all"', 'driver_name="hostpath.csi.tatami.dev"'):
        assert pair in line
    assert found["process_resident_memory_bytes"][()] > 1e6
    assert found["process_open_fds"][()] > 2
    assert found["tatami_threads"][()] == threading.active_count()
    assert not [name for name in found if name.endswith("_created")]


def test_two_drivers_in_one_process_do_not_share_their_counts(metrics):
    other = PrometheusMetrics("other")
    metrics.call_rejected("node")
    assert "tatami_lane_rejected_total" not in scrape(other)


def test_concurrent_calls_are_all_counted(metrics):
    def work():
        for _ in range(200):
            with metrics.in_lane("node"):
                metrics.call_finished("/m", "OK", 0.1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        scrape(metrics)
    found = scrape(metrics)
    assert found["csi_plugin_operations_seconds_count"] == {("hostpath.csi.tatami.dev", "OK", "/m"): 1600}
    assert found["tatami_lane_calls_in_flight"] == {("node",): 0}


def test_without_metrics_everything_can_be_called_and_prometheus_is_not_imported():
    script = (
        "import sys\nfrom csi_driver.telemetry.metrics import Metrics, PoolUsage\n"
        "from csi_driver.telemetry.http_endpoint import serve_metrics\n"
        "metrics = Metrics()\nmetrics.lane_opened('a', 1)\nmetrics.call_rejected('a')\nmetrics.call_finished('/m', 'OK', 1.0)\n"
        "metrics.watch_pool('p', PoolUsage)\nmetrics.sweep_finished('p', 1.0, {'trash': 1}, 0)\n"
        "with metrics.in_lane('a'):\n    assert metrics.render('')[0] == b''\n"
        "serve_metrics('127.0.0.1:0', metrics).stop()\n"
        "assert 'prometheus_client' not in sys.modules\nprint('fine')"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "fine\n", "")


# --- the HTTP endpoint ------------------------------------------------------------------------------------------------------------


def test_openmetrics_is_given_to_who_asks_for_it(metrics, serving):
    _, text, headers = get(serving(metrics), "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")


def test_health_readiness_and_unknown_paths(serving):
    reason = None
    endpoint = serving(Metrics(), lambda: reason)
    assert get(endpoint, "/healthz")[:2] == (200, "ok\n")
    assert get(endpoint, "/readyz?verbose")[:2] == (200, "ok\n")
    reason = "pool fast: server nas does not answer"
    assert get(endpoint, "/readyz")[:2] == (503, "pool fast: server nas does not answer\n")
    assert get(endpoint, "/healthz")[0] == 200
    assert get(endpoint, "/")[0] == 404
    assert "Python" not in get(endpoint, "/healthz")[2]["Server"]


def test_a_readiness_check_that_fails_or_hangs_is_not_ready_and_does_not_hang_the_probe(serving, caplog):
    def fails():
        raise RuntimeError("internal detail")

    status, text, _ = get(serving(Metrics(), fails), "/readyz")
    assert (status, text) == (503, "the readiness check failed; see the log\n")
    assert "internal detail" in caplog.text
    release = threading.Event()
    endpoint = serving(Metrics(), lambda: release.wait(60) and None)
    began = time.monotonic()
    assert get(endpoint, "/readyz")[0] == 503
    assert time.monotonic() - began < 1  # the kubelet's default
    assert get(endpoint, "/healthz")[0] == 200
    release.set()
    eventually(lambda: get(endpoint, "/readyz")[0] == 200)


def test_metrics_that_cannot_be_shown_are_an_error_not_half_a_page(serving, caplog):
    class Broken(Metrics):
        def render(self, accept):
            raise RuntimeError("internal detail")

    status, text, _ = get(serving(Broken()), "/metrics")
    assert (status, text) == (500, "the metrics cannot be shown; see the log\n")
    assert "internal detail" in caplog.text


def test_idle_clients_cannot_keep_a_probe_out(serving):
    endpoint = serving(Metrics())
    with contextlib.ExitStack() as stack:
        idle = []
        for _ in range(3 * http_endpoint.MAX_CONNECTIONS):
            idle.append(stack.enter_context(socket.create_connection(("127.0.0.1", endpoint.port), timeout=10)))
            idle[-1].sendall(b"GET /healthz HTTP/1.1\r\nX: ")
        began = time.monotonic()
        assert get(endpoint, "/healthz")[0] == 200
        assert time.monotonic() - began < 2
        idle[0].settimeout(2)  # well before a request times out by itself
        assert_cut(idle[0])  # the oldest gave way
        workers = [thread for thread in threading.enumerate() if "process_request_thread" in thread.name]
        assert len(workers) <= http_endpoint.MAX_CONNECTIONS + 2


def assert_cut(connection):
    """The other side has ended it: in order, or with a reset where bytes of ours were still unread there (tcp(7))."""
    with contextlib.suppress(ConnectionResetError):
        assert connection.recv(1) == b""


def test_a_silent_client_is_cut_off_in_time(serving):
    endpoint = serving(Metrics())
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=http_endpoint.REQUEST_SECONDS + 3) as silent:
        assert_cut(silent)


def test_stopping_ends_the_listener_its_thread_and_open_connections(metrics):
    before = set(threading.enumerate())
    endpoint = serve_metrics("127.0.0.1:0", metrics)
    assert get(endpoint, "/metrics")[0] == 200
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=10) as idle:
        idle.sendall(b"GET ")
        eventually(lambda: len(set(threading.enumerate()) - before) == 2)
        endpoint.stop()
        idle.settimeout(2)
        assert_cut(idle)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", endpoint.port), timeout=10)
    eventually(lambda: set(threading.enumerate()) <= before)
    endpoint.stop()


def test_a_taken_port_is_a_configuration_error(serving):
    endpoint = serving(Metrics())
    with pytest.raises(ConfigError) as caught:
        serve_metrics(f"127.0.0.1:{endpoint.port}", Metrics())
    assert str(caught.value) == f"--metrics-address = 127.0.0.1:{endpoint.port}: cannot listen there: Address already in use"


def test_without_a_host_every_address_is_served(serving):
    endpoint = serving(Metrics(), address=":0")
    assert get(endpoint, "/healthz")[0] == 200
    if socket.has_dualstack_ipv6():
        assert get(endpoint, "/healthz", host="::1")[0] == 200


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this kernel has no IPv6")
def test_an_ipv6_address_is_served(serving):
    assert get(serving(Metrics(), address="[::1]:0"), "/healthz", host="::1")[0] == 200


def test_log_lines_of_clients_are_debug_only(serving, capsys, caplog):
    with caplog.at_level(logging.INFO):
        get(serving(Metrics()), "/healthz")
    assert caplog.records == []
    assert capsys.readouterr().err == ""
