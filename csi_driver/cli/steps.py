"""The steps of a tour: do one thing, time it, show it, and see that it went as it should.

What a step makes, it also writes down how to take away. The end of a tour is that list, backwards; so is what happens when somebody
interrupts it.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message

from csi_driver.cli import interrupts
from csi_driver.cli.client import CallFailed, Client, as_json, call_name
from csi_driver.cli.screens import Screen, Step
from csi_driver.cli.trial import TrialFailed

_TIDY_SECONDS = 5.0

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)


@dataclass(frozen=True)
class _Undo:
    title: str
    method: Any  # a grpc.UnaryUnaryMultiCallable for `request`; which one differs from entry to entry
    request: Message
    asked: str
    gone: Path | None


class Steps:
    """Does steps one after another; `count` is how many were done."""

    def __init__(self, client: Client, screen: Screen) -> None:
        self.count = 0
        self._client = client
        self._screen = screen
        self._undo: list[_Undo] = []

    def ask(
        self,
        title: str,
        method: "grpc.UnaryUnaryMultiCallable[Request, Response]",
        request: Request,
        *,
        asked: str,
        answered: Callable[[Response], str],
        path: Callable[[Response], Path | None] = lambda _: None,
        made: Callable[[Response], None] = lambda _: None,
        refused: str | None = None,
    ) -> Response:
        """Make one call and show it: `asked` and `answered` for people, `path` where it is on disk.

        `made` writes down (`later`) what to do about what the call made.         Raises TrialFailed when it is refused, or when `path` is not there; with `refused`, when it is not refused with that code.
        """
        self._screen.begin(call_name(request), title)
        started = time.monotonic()
        reply: Response | None = None
        try:
            with interrupts.held_back():
                reply = self._client.ask(method, request)
                made(reply)
            code, words = "OK", answered(reply)
        except CallFailed as failure:
            code, words = failure.code, failure.message
        step = Step(
            number=self.count + 1,
            call=call_name(request),
            title=title,
            asked=asked,
            answered=words,
            code=code,
            expected=code == (refused or "OK"),
            seconds=time.monotonic() - started,
            path=path(reply) if reply is not None else None,
            request=as_json(request),
            response=as_json(reply) if reply is not None else None,
        )
        self._show(step)
        return reply  # type: ignore[return-value]  # who expects a refusal asks for no reply

    def do(self, call: str, title: str, asked: str, work: Callable[[], str], path: Path, *, refused: int | None = None) -> None:
        """Do something that is no call, and show it; `work` returns its answer for people.

        Raises TrialFailed when it raises OSError; with `refused`, when it does not raise one with that errno.
        """
        self._screen.begin(call, title)
        started = time.monotonic()
        number, code = None, "OK"
        try:
            words = work()
        except OSError as error:
            number, words = error.errno, error.strerror or str(error)
            code = errno.errorcode.get(number or 0, "OSError")
        seconds = time.monotonic() - started
        self._show(Step(self.count + 1, call, title, asked, words, code, number == refused, seconds, path))

    def later(self, title: str, method: object, request: Message, asked: str, *, gone: Path | None = None) -> None:
        """Write down the call that takes away what was just made, and the path that is then `gone`."""
        self._undo.append(_Undo(title, method, request, asked, gone))

    def undo_all(self) -> None:
        """Take away everything, last made first, one step each. Raises TrialFailed when something is refused or does not go."""
        while self._undo:
            undo = self._undo[-1]
            self.ask(undo.title, undo.method, undo.request, asked=undo.asked, answered=lambda _: "done")
            self._undo.pop()
            if undo.gone is not None and os.path.lexists(undo.gone):
                raise TrialFailed(f"{undo.gone} should be gone and is not")

    def tidy(self) -> None:
        """Take away what an interrupted tour has made, without a word; what the driver refuses stays."""
        while self._undo:
            undo = self._undo.pop()
            with contextlib.suppress(CallFailed):
                self._client.ask(undo.method, undo.request, _TIDY_SECONDS)

    def _show(self, step: Step) -> None:
        self.count += 1
        self._screen.show(step)
        if not step.expected:
            raise TrialFailed(f"Step {step.number} ({step.call}) went wrong: {step.code}: {step.answered}")
        if step.path is not None and not os.path.lexists(step.path):
            raise TrialFailed(f"Step {step.number} ({step.call}): {step.path} is not there")
