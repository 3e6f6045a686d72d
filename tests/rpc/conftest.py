import io
import logging

import pytest

from csi_driver.rpc.lanes import LANES
from csi_driver.rpc.server import CsiServer
from csi_driver.telemetry import logs
from csi_driver.telemetry.metrics import Metrics
from tests.rpc.harness import DRIVER, Client, Hung, all_services


@pytest.fixture
def serve(tmp_path):
    """Start a server and return it with a client: `serve(services, lanes=..., metrics=...)`."""
    started = []

    def start(services=None, *, topology=True, metrics=None, lanes=LANES, socket=tmp_path / "csi" / "csi.sock"):
        server = CsiServer(
            services or all_services(),
            driver_name=DRIVER,
            topology=topology,
            socket_path=socket,
            metrics=metrics or Metrics(),
            lanes=lanes,
        )
        server.start()
        client = Client(socket)
        started.append((server, client))
        return server, client

    yield start
    for server, client in started:
        client.channel.close()
        server.stop(grace=0.1)


@pytest.fixture
def hung():
    answer = Hung()
    yield answer
    answer.release()


@pytest.fixture
def log_lines():
    """What the driver logs, at debug, as JSON lines; read with getvalue()."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.setLevel(level)
    root.removeHandler(handler)
