"""Log lines: JSON in the form that Google's agents read, or text for people.

Topics and payloads come from the network, so no byte of theirs may reach a terminal or a
log file as a control character: JSON is written in ASCII only, text is escaped.
"""

import io
import json
import logging
import time
from collections.abc import Mapping
from typing import Protocol, TextIO

from lifecycle.flood import UNLIMITED, BoundedHandler

TEXT_MAX_CHARS = 8_192
"""Of a message or a field: a topic may have 64 KiB, and a service's answer megabytes."""

_SEVERITIES = {"WARN": "WARNING", "FATAL": "CRITICAL"}


def printable(text: str) -> str:
    """Return ``text`` with everything escaped that a terminal might act on."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )


def _cut(value: object) -> object:
    """Return a field's value; of a text that is too long the beginning, and how long it is."""
    if isinstance(value, str) and len(value) > TEXT_MAX_CHARS:
        return f"{value[:TEXT_MAX_CHARS]}... ({len(value)} characters)"
    return value


def unlimited(**values: object) -> dict[str, object]:
    """Return :func:`fields` for a line that is bounded elsewhere (:mod:`lifecycle.flood`)."""
    return {**fields(**values), UNLIMITED: True}


def fields(**values: object) -> dict[str, dict[str, object]]:
    """Return the ``extra`` argument that puts ``values`` into a log line as fields."""
    return {"fields": values}


class Notice(Protocol):
    """What a package that logs nothing wants to have logged."""

    @property
    def severity(self) -> str:
        """A name of logging's levels."""

    @property
    def message(self) -> str:
        """The event."""

    @property
    def values(self) -> Mapping[str, object]:
        """Its fields."""


def log_notice(logger: logging.Logger, notice: Notice) -> None:
    """Log ``notice``."""
    level = logging.getLevelNamesMapping()[notice.severity]
    logger.log(level, notice.message, extra=fields(**notice.values))


def _time(record: logging.LogRecord) -> str:
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.created % 1 * 1_000_000):06d}Z"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time``, ``severity``, ``message``, ``role`` and fields.

    https://cloud.google.com/logging/docs/structured-logging names the special fields.
    """

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, in ASCII."""
        line: dict[str, object] = {
            "time": _time(record),
            "severity": _SEVERITIES.get(record.levelname, record.levelname),
            "message": _cut(record.getMessage()),
            "role": self._role,
            "logger": record.name,
        }
        values: dict[str, object] = getattr(record, "fields", {})
        line.update({name: _cut(value) for name, value in values.items()})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return json.dumps(line, default=str, allow_nan=False)
        except (TypeError, ValueError):
            # NaN is no JSON, and neither is a key that is no text: all as text, none lost.
            return json.dumps({key: str(value) for key, value in line.items()})


class TextFormatter(logging.Formatter):
    """``time SEVERITY role: message key=value …``, with control characters escaped."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback follows on lines of its own."""
        extra = getattr(record, "fields", {})
        tail = "".join(f" {key}={printable(str(_cut(value)))}" for key, value in extra.items())
        text = (
            f"{_time(record)} {record.levelname} {self._role}: "
            f"{printable(str(_cut(record.getMessage())))}{tail}"
        )
        if record.exc_info:
            trace = self.formatException(record.exc_info)
            text += "".join("\n  " + printable(line) for line in trace.split("\n"))
        return text


def configure_logging(
    role: str, level: str = "INFO", form: str = "json", stream: TextIO | None = None
) -> None:
    """Send all log records to ``stream`` (standard output) in the given form."""
    handler = BoundedHandler(stream)
    if isinstance(handler.stream, io.TextIOWrapper):
        # Where the locale is not UTF-8, a line is escaped rather than lost.
        handler.stream.reconfigure(errors="backslashreplace")
    handler.setFormatter(JsonFormatter(role) if form == "json" else TextFormatter(role))
    # A supervisor that was killed leaves a broken pipe behind; that must not end the program.
    logging.raiseExceptions = False
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # Libraries speak up when something is wrong; their chatter is not the operator's.
    for library in ("google", "urllib3", "grpc", "sqlite_utils"):
        logging.getLogger(library).setLevel(logging.WARNING)
