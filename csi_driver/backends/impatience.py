"""Asking something that may hang, and not waiting for it."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from csi_driver.errors import Unavailable

_T = TypeVar("_T")


class Impatience:
    """Asks in threads of its own, which are left behind when they hang: at most `at_once` of them."""

    def __init__(self, seconds: float, at_once: int) -> None:
        self._seconds = seconds
        self._places = threading.BoundedSemaphore(at_once)

    def ask(self, question: Callable[[], _T]) -> _T:
        """Return the answer or raise what it raised; raises Unavailable where there is none in time, or too many wait for theirs."""
        if not self._places.acquire(blocking=False):
            raise Unavailable("too many questions wait for an answer")
        answer: Future[_T] = Future()

        def work() -> None:
            try:
                answer.set_result(question())
            except BaseException as error:  # noqa: BLE001  # whoever asked gets it
                answer.set_exception(error)
            finally:
                self._places.release()

        try:
            # Not an executor: the interpreter waits for an executor's threads when it ends, and this one may never return.
            threading.Thread(target=work, name="glance", daemon=True).start()
        except RuntimeError as error:
            self._places.release()
            raise Unavailable(f"no thread can be started: {error}") from error
        try:
            return answer.result(self._seconds)
        except TimeoutError as error:
            raise Unavailable(f"there was no answer within {self._seconds:g} s") from error
