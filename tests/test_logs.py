"""Log lines are lines: whatever the network sent stays inside one, harmless."""

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifecycle import configure_logging, fields, printable

HOSTILE = ["\x1b[31m", "a\nb", "\r", "\x00", "\x9b2J", "\u202e", "\ud800", "\u2028"]
TEXT = st.text(st.characters(exclude_categories=()), max_size=50)


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    """Leave the logging of the test run as it was."""
    root = logging.getLogger()
    handlers, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.raiseExceptions = raising


def logged(form: str, message: str, **values: object) -> str:
    stream = io.StringIO()
    configure_logging("collector", form=form, stream=stream)
    logging.getLogger("test").warning("%s", message, extra=fields(**values))
    return stream.getvalue()


def test_a_json_line_has_what_googles_agents_read() -> None:
    line = json.loads(logged("json", "hello", topic="a/b", count=3))
    assert line["severity"] == "WARNING"
    assert line["message"] == "hello"
    assert line["time"].endswith("Z")
    assert (line["role"], line["topic"], line["count"]) == ("collector", "a/b", 3)


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_text_stays_one_printable_line(form: str, hostile: str) -> None:
    line = logged(form, f"x{hostile}y", topic=f"t{hostile}")
    assert line.count("\n") == 1
    assert line[:-1].isprintable()


@given(TEXT, TEXT)
def test_any_text_gives_one_line_of_json_that_says_the_same(message: str, topic: str) -> None:
    line = logged("json", message, topic=topic)
    assert line.count("\n") == 1
    assert line.isascii()
    decoded = json.loads(line)
    assert decoded["message"] == message
    assert decoded["topic"] == topic


@given(TEXT)
def test_printable_is_printable(text: str) -> None:
    assert printable(text).isprintable()


def test_what_is_no_json_is_told_as_text() -> None:
    line = json.loads(logged("json", "x", value=float("nan"), key={1: 2}, raw=b"\xff"))
    assert line["value"] == "nan"
    assert "255" in line["raw"] or "xff" in line["raw"]


@pytest.mark.parametrize("form", ["json", "text"])
def test_a_traceback_is_kept(form: str) -> None:
    stream = io.StringIO()
    configure_logging("collector", form=form, stream=stream)
    try:
        raise ValueError("bad\x1b")
    except ValueError:
        logging.getLogger("test").exception("failed")
    assert "ValueError" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_a_broken_pipe_does_not_end_the_program() -> None:
    code = (
        "import logging, os, sys\n"
        "from lifecycle import configure_logging, leave, ExitCode\n"
        "configure_logging('collector')\n"
        "sys.stdin.readline()\n"
        "for _ in range(100): logging.getLogger().warning('x' * 1000)\n"
        "os.write(2, b'alive')\n"
        "leave(ExitCode.CLEAN)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stderr is not None
        assert process.stderr.read() == b"alive"
        assert process.wait(20) == 0
