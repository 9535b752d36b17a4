"""Whatever a topic holds, a log line is one line, harmless on a terminal, and lost to nobody."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lifecycle import configure_logging, fields, printable

ROOT = Path(__file__).parent.parent
NASTY = [
    "\x1b[2J\x1b]0;owned\x07",
    "a\nCRITICAL forged line",
    "a\r\nb",
    "\x9b31m",
    "\0",
    "\ud800",
    "\udcff\udcfe",
    "\u2028\u2029\x85\x0b\x0c",
    "\u202eabc",
    "\x7f",
    "\ufeff",
    "é 中 😀",
    '"} {"severity":"EMERGENCY',
    "%s %d",
]
log = logging.getLogger("tests.logs")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raising


def logged(form: str, message: str, *arguments: object, **values: object) -> str:
    """Return what is written for one record."""
    stream = io.StringIO()
    configure_logging("collector", "DEBUG", form, stream)
    log.warning(message, *arguments, extra=fields(**values))
    return stream.getvalue()


def parsed(text: str) -> dict[str, object]:
    assert text.endswith("\n")
    assert text.isascii()
    assert text[:-1].isprintable(), "one line, nothing that a terminal acts on"
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("text", NASTY)
def test_a_json_line_is_one_line_of_ascii_and_gives_the_text_back(text: str) -> None:
    line = parsed(logged("json", "topic %s", text, topic=text, key=[text, {"a": text}]))
    assert line["message"] == f"topic {text}"
    assert line["topic"] == text
    assert line["key"] == [text, {"a": text}]


@pytest.mark.parametrize("text", NASTY)
def test_a_text_line_is_one_line_without_control_characters(text: str) -> None:
    line = logged("text", "topic %s", text, topic=text)
    assert line.endswith("\n")
    assert line[:-1].isprintable()
    assert line.encode()
    assert "WARNING collector: topic " in line
    assert " topic=" in line


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters()), form=st.sampled_from(["json", "text"]))
def test_no_text_makes_more_than_one_printable_line(text: str, form: str) -> None:
    line = logged(form, "%s", text, value=text)
    assert line[:-1].isprintable()
    assert line.endswith("\n")


@given(st.text(st.characters()))
def test_printable_text_is_printable_and_what_was_so_is_unchanged(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown == text or not text.isprintable()


def test_a_json_line_has_the_names_that_googles_agents_read() -> None:
    line = parsed(logged("json", "it %s", "works", seq=7))
    assert list(line)[:3] == ["time", "severity", "message"]
    assert (line["severity"], line["message"], line["seq"]) == ("WARNING", "it works", 7)
    assert (line["role"], line["logger"]) == ("collector", "tests.logs")
    time = str(line["time"])
    assert len(time) == len("2024-01-01T00:00:00.000000Z")
    assert time.endswith("Z")


@pytest.mark.parametrize(
    ("level", "severity"),
    [
        (logging.DEBUG, "DEBUG"),
        (logging.INFO, "INFO"),
        (logging.WARNING, "WARNING"),
        (logging.ERROR, "ERROR"),
        (logging.CRITICAL, "CRITICAL"),
    ],
)
def test_severities_are_googles(level: int, severity: str) -> None:
    stream = io.StringIO()
    configure_logging("r", "DEBUG", "json", stream)
    log.log(level, "x")
    assert parsed(stream.getvalue())["severity"] == severity


class Odd:
    """Something that is no JSON."""

    def __str__(self) -> str:
        """Return what a terminal would act on."""
        return "odd \x1b"


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {b"k": 1}, {(1, 2): 3}, {"a": {1, 2}}, Odd(), b"\xff", 1j]
)
def test_a_field_that_is_no_json_does_not_lose_the_line(value: object) -> None:
    for form in ("json", "text"):
        line = logged(form, "kept", value=value)
        assert "kept" in line
        assert line[:-1].isprintable()
    assert parsed(logged("json", "kept", value=value))["message"] == "kept"


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_traceback_holds_no_raw_text_of_the_network(form: str) -> None:
    stream = io.StringIO()
    configure_logging("r", "DEBUG", form, stream)
    try:
        raise ValueError("\x1b[2J\nCRITICAL forged")
    except ValueError:
        log.exception("failed")
    lines = stream.getvalue().splitlines()
    assert all(line.isprintable() for line in lines)
    assert "ValueError" in stream.getvalue()
    assert not any(line.startswith("CRITICAL") for line in lines)
    assert form == "text" or len(lines) == 1


def test_the_level_is_held_and_libraries_chatter_is_not_shown() -> None:
    stream = io.StringIO()
    configure_logging("r", "INFO", "json", stream)
    log.debug("hidden")
    logging.getLogger("google.auth").info("hidden")
    logging.getLogger("urllib3.connectionpool").info("hidden")
    logging.getLogger("urllib3").warning("shown")
    assert stream.getvalue().count("\n") == 1
    assert "shown" in stream.getvalue()


def test_configuring_twice_writes_each_line_once() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("r", "INFO", "json", first)
    configure_logging("r", "INFO", "text", second)
    log.info("x")
    assert (first.getvalue(), second.getvalue().count("\n")) == ("", 1)


SCRIPT = """
import logging, sys
from lifecycle import configure_logging
configure_logging("r", "INFO", sys.argv[1])
for n in range(20_000):
    logging.getLogger("x").info("line %d \\u00e9 \\u4e2d", n, extra={"unlimited": True})
sys.stderr.write("survived\\n")
from lifecycle import ExitCode, leave
leave(ExitCode.CLEAN)
"""


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_broken_pipe_does_not_end_the_program(form: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, form],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == "survived\n"
        assert process.wait(20) == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_line_is_lost_where_the_terminal_is_not_utf8(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "text"],
        check=True,
        capture_output=True,
        cwd=ROOT,
        env={"PYTHONIOENCODING": encoding},
    )
    assert done.stdout.count(b"\n") == 20_000
