"""One event is one line, whatever the values hold."""

import contextvars
import io
import json
import logging
import re
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_driver.telemetry import logs

STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture(autouse=True)
def _root_logger_as_it_was():
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], level = before
    root.setLevel(level)


class Written:
    def __init__(self, log_format, level="info", stream=None):
        self.stream = stream or io.StringIO()
        logs.configure(log_format, level, self.stream)
        self.log = logging.getLogger("csi_driver.test")

    @property
    def text(self):
        return self.stream.getvalue()

    @property
    def json(self):
        return [json.loads(line) for line in self.text.splitlines()]


def test_a_text_line_has_time_level_logger_message_and_pairs():
    written = Written("text")
    written.log.info("volume %s", "created", extra={"volume": "fast.4k", "bytes": 5, "note": "two words", "empty": ""})
    assert re.fullmatch(
        STAMP + r' INFO    csi_driver\.test: volume created volume=fast\.4k bytes=5 note="two words" empty=""\n', written.text
    )


def test_a_json_line_has_the_documented_fields():
    written = Written("json")
    with logs.bind_request("7f3a", "/csi.v1.Node/NodeStageVolume"):
        written.log.warning("slow", extra={"seconds": 1.5, "volume": "a", "list": [1, {"a": None}], "nothing": None})
    (line,) = written.json
    assert re.fullmatch(STAMP, line.pop("ts"))
    assert line == {
        "level": "warning",
        "logger": "csi_driver.test",
        "msg": "slow",
        "seconds": 1.5,
        "volume": "a",
        "list": [1, {"a": None}],
        "nothing": None,
        "request_id": "7f3a",
        "method": "/csi.v1.Node/NodeStageVolume",
    }


def test_the_time_is_utc():
    record = logging.makeLogRecord({"msg": "x", "created": 1_700_000_000.0005})
    assert json.loads(logs.JsonFormatter().format(record))["ts"] == "2023-11-14T22:13:20.000Z"


def test_lines_below_the_level_are_not_written():
    written = Written("text", "warning")
    written.log.info("quiet")
    written.log.warning("loud")
    assert written.text.count("\n") == 1
    assert "loud" in written.text


def test_configuring_again_replaces_the_first():
    first = Written("text")
    second = Written("json")
    second.log.info("once")
    assert first.text == ""
    assert [line["msg"] for line in second.json] == ["once"]


def test_the_request_is_bound_inside_its_context_only_and_nests():
    written = Written("json")
    with logs.bind_request("outer", "m1"):
        with logs.bind_request("inner", "m2"):
            written.log.info("a")
        written.log.info("b")
        assert logs.current_request() == logs.Request("outer", "m1")
    written.log.info("c")
    assert logs.current_request() is None
    assert [line.get("request_id") for line in written.json] == ["inner", "outer", None]


def test_threads_keep_their_requests_apart_and_a_copied_context_takes_it_along():
    written = Written("json")
    with logs.bind_request("mine", "m"):
        bare = threading.Thread(target=written.log.info, args=("bare",))
        copied = threading.Thread(target=contextvars.copy_context().run, args=(written.log.info, "copied"))
        for thread in (bare, copied):
            thread.start()
            thread.join()
    assert {line["msg"]: line.get("request_id") for line in written.json} == {"bare": None, "copied": "mine"}


def test_a_hostile_name_cannot_forge_a_text_line():
    written = Written("text")
    name = "x\n2026-01-01T00:00:00.000Z ERROR   csi_driver: disk gone\r\x1b[2J\u2028\u202e\x85\x7f\ud800"
    written.log.info("deleted %s", name, extra={"volume": name, name: "key"})
    assert written.text.count("\n") == 1
    assert written.text.endswith("\n")
    assert written.text[:-1].isprintable()
    assert "\\n2026-01-01" in written.text


def test_a_hostile_name_cannot_forge_or_steer_a_json_line():
    written = Written("json")
    name = "x\n{}\r\x1b[2J\u2028\x85\x7f\ud800"
    written.log.info("deleted %s", name, extra={"volume": name, name: "key"})
    assert written.text[:-1].isprintable()
    assert written.json[0]["volume"] == name


def test_a_traceback_of_a_hostile_message_stays_indented():
    written = Written("text")
    try:
        raise ValueError("a\n2026-01-01T00:00:00.000Z ERROR forged\x1b[2J")
    except ValueError:
        written.log.exception("failed")
    first, *rest = written.text.splitlines()
    assert first.endswith("csi_driver.test: failed")
    assert any("forged" in row for row in rest)
    assert all(row.startswith("    ") and row.isprintable() for row in rest)


def test_a_traceback_is_a_field_in_json():
    written = Written("json")
    try:
        raise ValueError("why")
    except ValueError:
        written.log.exception("failed")
    (line,) = written.json
    assert line["exception"].startswith("Traceback (most recent call last)")
    assert line["exception"].endswith("ValueError: why")


def test_extras_named_like_our_fields_do_not_replace_them():
    written = Written("json")
    with logs.bind_request("real", "m"):
        written.log.info("x", extra={"level": "error", "request_id": "forged", "ts": "never"})
    (line,) = written.json
    assert (line["level"], line["request_id"]) == ("info", "real")
    assert (line["extra_level"], line["extra_request_id"], line["extra_ts"]) == ("error", "forged", "never")


class Unprintable:
    def __str__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_odd_values_never_cost_the_line(log_format, capsys):
    written = Written(log_format)
    cycle = []
    cycle.append(cycle)
    odd = {
        "nan": float("nan"),
        "huge": 10**5000,
        "cycle": cycle,
        "keys": {(1, 2): 3},
        "deep": [float("inf")],
        "broken": Unprintable(),
        "inside": [Unprintable()],
        "bytes": b"\xff",
    }
    written.log.info("odd", extra=odd)
    written.log.info("wrong %d", "arguments")
    written.log.info("broken %s", Unprintable())
    assert written.text.count("\n") == 3
    assert capsys.readouterr().err == ""  # where logging reports lines that it lost
    if log_format == "json":
        first = json.loads(written.text.splitlines()[0], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert set(odd) <= set(first)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_line_has_a_bounded_length(log_format):
    written = Written(log_format)
    long = "a" * 4_000_000
    written.log.info("name %s", long, extra={"value": long, "list": [long]})
    assert len(written.text) < 4 * logs.MAX_VALUE_CHARACTERS
    assert "(4000000 characters)" in written.text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_only_in_text_on_a_terminal_that_wants_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for log_format, stream, coloured in [
        ("text", Terminal(), True),
        ("json", Terminal(), False),
        ("text", io.StringIO(), False),
    ]:
        written = Written(log_format, stream=stream)
        written.log.error("x")
        assert ("\x1b[31m" in written.text) is coloured
    monkeypatch.setenv("NO_COLOR", "1")
    written = Written("text", stream=Terminal())
    written.log.error("x")
    assert "\x1b" not in written.text


@given(st.text(), st.text(min_size=1), st.one_of(st.text(), st.floats(), st.integers(), st.lists(st.text())))
def test_any_text_is_one_printable_line_and_json_gives_it_back(message, key, value):
    record = logging.makeLogRecord({"msg": message, "name": "n", "levelname": "INFO"})
    if key not in vars(record) and key not in {"message", "asctime"}:
        setattr(record, key, value)
    assert logs.TextFormatter().format(record).isprintable()
    line = logs.JsonFormatter().format(record)
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["msg"] == message
