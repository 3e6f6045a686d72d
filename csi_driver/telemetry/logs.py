"""Logs on stderr: stdlib logging, as text for people or as one JSON object a line for collectors.

Names, paths and messages of requests are written by others, so no value may end a line or move a terminal's cursor: everything that
cannot be printed is escaped, the lines of a traceback are indented, and a value has a bounded length. Say what varies through
`extra={...}` and each becomes a field: `log.info("volume created", extra={"volume": handle})`.

The request a line belongs to comes from a context variable. A thread does not inherit it: a job that goes on after its call runs in
`contextvars.copy_context()`.
"""

import contextvars
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, TextIO

MAX_VALUE_CHARACTERS = 4096
"""A gRPC message may hold 4 MiB in one field; a log line should not."""

MAX_TRACEBACK_CHARACTERS = 16 * MAX_VALUE_CHARACTERS

_STANDARD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_OWN_FIELDS = frozenset({"ts", "level", "logger", "msg", "request_id", "method", "exception"})
_COLOURS = {"DEBUG": "2", "WARNING": "33", "ERROR": "31", "CRITICAL": "31;1"}  # SGR parameters, console_codes(4)


@dataclass(frozen=True)
class Request:
    """The call that a line of the log belongs to."""

    request_id: str
    method: str


_request: contextvars.ContextVar[Request | None] = contextvars.ContextVar("request", default=None)


@contextmanager
def bind_request(request_id: str, method: str) -> Iterator[None]:
    """Mark every line that is logged in this context with the request's id and method."""
    token = _request.set(Request(request_id, method))
    try:
        yield
    finally:
        _request.reset(token)


def current_request() -> Request | None:
    """Return the request that this context works for, None outside of one."""
    return _request.get()


def configure(log_format: Literal["text", "json"], level: str, stream: TextIO | None = None) -> None:
    """Send all logging to `stream` (stderr by default) from `level` on; replaces what was configured before.

    Colours are used for text on a terminal, unless NO_COLOR is set (no-color.org).
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    colours = stream.isatty() and not os.environ.get("NO_COLOR")
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter(colours=colours))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class TextFormatter(logging.Formatter):
    """`2026-11-20T08:15:30.123Z INFO    csi_driver.rpc: volume created volume=fast.4k request_id=7f3a`, traceback below, indented."""

    def __init__(self, *, colours: bool = False) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname:<7}"
        if self._colours and record.levelname in _COLOURS:
            level = f"\x1b[{_COLOURS[record.levelname]}m{level}\x1b[0m"
        fields = {key: value for key, value in _fields(record).items() if value is not None}
        pairs = "".join(f" {printable(key)}={_quoted(value)}" for key, value in fields.items())
        line = f"{_timestamp(record)} {level} {printable(record.name)}: {printable(_message(record))}{pairs}"
        trace = _traceback(record)
        if trace is None:
            return line
        return "\n".join([line, *(f"    {printable(row)}" for row in trace.split("\n"))])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, logger, msg, request_id and method inside a request, extra fields, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": _shortened(_message(record)),
        }
        line |= {key: _jsonable(value) for key, value in _fields(record).items()}
        trace = _traceback(record)
        if trace is not None:
            line["exception"] = trace
        # ASCII only: all that could break a line or a terminal, U+2028 and DEL included, is escaped or absent.
        return json.dumps(line).replace("\x7f", "\\u007f")


def printable(text: str) -> str:
    """Escape what cannot be printed (control characters, line ends, bidi overrides, lone surrogates) and bound the length."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in _shortened(text))


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """Return the extra fields and then the request's; an extra that bears the name of one of ours is kept under `extra_NAME`."""
    fields = {
        f"extra_{key}" if key in _OWN_FIELDS else key: value
        for key, value in vars(record).items()
        if key not in _STANDARD_ATTRIBUTES
    }
    request = current_request()
    return fields if request is None else fields | {"request_id": request.request_id, "method": request.method}


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _message(record: logging.LogRecord) -> str:
    # A line with wrong arguments is still a line: logging itself would drop it and print a traceback instead.
    try:
        return record.getMessage()
    except Exception as error:  # noqa: BLE001  # any __str__ of any argument
        return f"{record.msg!r} (arguments do not fit: {type(error).__name__})"


def _traceback(record: logging.LogRecord) -> str | None:
    parts = []
    if record.exc_info and record.exc_info[0] is not None:
        parts.append("".join(traceback.format_exception(*record.exc_info)).rstrip("\n"))
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)[:MAX_TRACEBACK_CHARACTERS] or None


def _jsonable(value: object) -> object:
    """Return `value` as something that JSON can hold and that is not too long for a line."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:  # readers hold no more
        return value
    if isinstance(value, float) and math.isfinite(value):  # JSON has no infinity
        return value
    if isinstance(value, Mapping | list | tuple):
        try:
            text = json.dumps(value, default=_text, allow_nan=False)
        except (TypeError, ValueError, RecursionError):  # keys that are no text, NaN, cycles
            return _shortened(_text(value))
        # Back again rather than `value` itself: what was no JSON inside of it is text now.
        return json.loads(text) if len(text) <= MAX_VALUE_CHARACTERS else _shortened(text)
    return _shortened(_text(value))


def _quoted(value: object) -> str:
    text = printable(_text(value))
    if text and not any(c in ' "=' for c in text):
        return text
    return '"' + text.replace('"', '\\"') + '"'


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001  # a broken __str__ must not cost the line
        return f"<{type(value).__name__}: {type(error).__name__}>"


def _shortened(text: str) -> str:
    if len(text) <= MAX_VALUE_CHARACTERS:
        return text
    return f"{text[:MAX_VALUE_CHARACTERS]}… ({len(text)} characters)"
