"""The threads in which calls are served: as many as are needed, up to a bound, and none that keeps the process from ending.

Not a ThreadPoolExecutor: the interpreter joins its threads at exit, and a thread that hangs on a dead server would keep the driver
alive until the kubelet kills it, after the whole grace period of the pod.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Work = Callable[[], None]


class DaemonThreads(ThreadPoolExecutor):
    """At most `limit` daemon threads, started when work finds none idle. An executor by type only, because grpc asks for that."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._work: queue.SimpleQueue[_Work] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._guard = threading.Lock()
        self._started = 0

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Run `fn` as soon as a thread is free."""
        future: Future[_T] = Future()
        self._work.put(lambda: _run(future, lambda: fn(*args, **kwargs)))
        if not self._idle.acquire(blocking=False):
            self._start_one()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing: the threads end with the process."""

    def _start_one(self) -> None:
        with self._guard:
            if self._started == self._limit:
                return  # the work waits for whoever ends first
            self._started += 1
            number = self._started
        threading.Thread(target=self._serve, name=f"call {number}", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self._work.get()()
            self._idle.release()


def _run(future: "Future[Any]", work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001  # grpc reads it from the future; the thread serves on
        future.set_exception(error)
