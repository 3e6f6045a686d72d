"""A real server's other side: services whose answers the test writes, and a client that calls any method by name."""

import threading
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import quote

import grpc

from csi_driver.rpc import csi_pb2 as csi
from csi_driver.rpc.lanes import LANES
from csi_driver.telemetry.metrics import Metrics
from csi_driver.volumes.services import Services

DRIVER = "hostpath.csi.test"
WELL_KNOWN = ("volumes", "attachments", "snapshots", "groups", "capacity", "node")


class Port:
    """A service of services.py: answers each method with what the test says, a value, an error to raise or a function to call."""

    def __init__(self, **answers):
        self.asked = []
        self.answers = answers

    def __getattr__(self, name):
        def method(*arguments):
            self.asked.append((name, *arguments))
            answer = self.answers.get(name)
            if isinstance(answer, BaseException):
                raise answer
            return answer(*arguments) if callable(answer) else answer

        return method


class Hung:
    """An answer that does not come until the test is over."""

    def __init__(self):
        self.entered = threading.Semaphore(0)
        self._over = threading.Event()

    def __call__(self, *_):
        self.entered.release()
        self._over.wait(60)

    def wait_for(self, calls):
        for _ in range(calls):
            assert self.entered.acquire(timeout=20), "the calls did not get into their lane"

    def release(self):
        self._over.set()


class Client:
    """Calls any method by name, as a sidecar would."""

    def __init__(self, socket):
        self._kept = []  # grpc cancels a call that nobody refers to any more
        self.channel = grpc.insecure_channel(
            f"unix:{quote(str(socket))}",
            options=[
                ("grpc.enable_retries", 0),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_receive_message_length", -1),
            ],
        )

    def start(self, method, request=None, *, timeout=10, metadata=()):
        descriptor = method_descriptor(method)
        request = request if request is not None else message_class(descriptor.input_type)()
        call = self.channel.unary_unary(
            path_of(method),
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=message_class(descriptor.output_type).FromString,
        )
        future = call.future(request, timeout=timeout, metadata=metadata)
        self._kept.append(future)
        return future

    def __call__(self, method, request=None, **options):
        return self.start(method, request, **options).result()

    def refusal(self, method, request=None, **options):
        error = self.start(method, request, **options).exception()
        assert error is not None, f"{method} was not refused"
        return error.code(), error.details()


class CountingMetrics(Metrics):
    """Notes what it is told."""

    def __init__(self):
        self.finished = []
        self.rejected = []
        self.lanes = {}
        self.in_flight = {}

    def lane_opened(self, lane, capacity):
        self.lanes[lane] = capacity

    @contextmanager
    def in_lane(self, lane):
        self.in_flight[lane] = self.in_flight.get(lane, 0) + 1
        try:
            yield
        finally:
            self.in_flight[lane] -= 1

    def call_rejected(self, lane):
        self.rejected.append(lane)

    def call_finished(self, method, code, seconds):
        self.finished.append((method, code, seconds))


def served_methods():
    """Every method that a process with all services serves, as its descriptor."""
    services = csi.DESCRIPTOR.services_by_name
    return [method for name in ("Identity", "Controller", "GroupController", "Node") for method in services[name].methods]


def method_descriptor(name):
    return next(method for method in served_methods() if method.name == name)


def path_of(name):
    return f"/{method_descriptor(name).containing_service.full_name}/{name}"


def message_class(descriptor):
    return getattr(csi, descriptor.name)


def small_lanes(capacity=2):
    return tuple(replace(lane, capacity=capacity) for lane in LANES)


def all_services(**ports):
    ports = {name: Port() for name in WELL_KNOWN} | {"health": Port()} | ports
    return Services(**ports)
