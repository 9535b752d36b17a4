"""From a message to a reading or to a rejection with its reason. Strict, and never raises."""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec

from collector.packets import Message
from spool import REJECTED_PAYLOAD_BYTES, NewReading, Rejection, row_crc

TOPIC_LEVELS = 5
TOPIC_CACHE_ENTRIES = 10_000
TOPIC_CACHED_MAX_BYTES = 512
"""A few thousand tags are usual; a flood of invented topics must not fill the memory."""

REJECTED_TEXT_CHARS = 1_000
"""How much of a topic or of a name from the payload a rejection keeps: MQTT allows topics of
64 KiB, and ten thousand of them must not fill the disk."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MIN_US = -62_135_596_800_000_000
_MAX_US = 253_402_300_799_999_999
"""0001-01-01 to 9999-12-31T23:59:59.999999Z: BigQuery's TIMESTAMP and Python's datetime."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Reason:
    """The codes of rejected messages; docs/rejected.md explains each to the operator."""

    TOPIC_NOT_UTF8 = "topic_not_utf8"
    TOPIC_SHAPE = "topic_shape"
    EMPTY_PAYLOAD = "empty_payload"
    TOO_LARGE = "payload_too_large"
    NOT_UTF8 = "payload_not_utf8"
    NOT_JSON = "not_json"
    TOO_DEEP = "too_deep"
    NOT_OBJECT = "not_an_object"
    MISSING_FIELD = "missing_field"
    BAD_FIELD = "bad_field"
    BAD_VALUE = "bad_value"
    BAD_TIMESTAMP = "bad_timestamp"
    CONTROL_CHARACTER = "control_character"
    SITE_MISMATCH = "site_mismatch"


class _Refused(Exception):  # noqa: N818 - not an error of the program: the outcome of a check
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class _Payload(msgspec.Struct):
    """The fields that we need; others are allowed, and stay in the stored payload."""

    site_code: str
    sensor_id: str
    timestamp: str
    value: float


class _NumericPayload(msgspec.Struct):
    site_code: str
    sensor_id: str
    timestamp: str | int | float
    value: float


class _Topic(NamedTuple):
    text: str
    site: str
    tag: str


class Validator:
    """Checks messages against the contract of topic and payload.

    Args:
        timestamp_formats: TIMESTAMP_FORMATS.
        reject_site_mismatch: SITE_MISMATCH=reject.
        max_payload_bytes: MAX_PAYLOAD_BYTES.
    """

    def __init__(
        self,
        timestamp_formats: Sequence[str] = ("rfc3339",),
        *,
        reject_site_mismatch: bool = False,
        max_payload_bytes: int = 256 * 1024,
    ) -> None:
        self._naive = "naive" in timestamp_formats
        self._text = self._naive or "rfc3339" in timestamp_formats
        self._offset = "rfc3339" in timestamp_formats
        self._per_second = {"epoch": 1_000_000, "epoch_ms": 1_000}
        self._unit = next(
            (self._per_second[f] for f in timestamp_formats if f in self._per_second), 0
        )
        shape: type[_Payload | _NumericPayload] = _NumericPayload if self._unit else _Payload
        self._decode: Callable[[bytes], _Payload | _NumericPayload] = msgspec.json.Decoder(
            shape
        ).decode
        self._reject_mismatch = reject_site_mismatch
        self._max_bytes = max_payload_bytes
        self._topics: dict[bytes, _Topic] = {}

    def check(
        self, message: Message, identity: bytes, received_us: int
    ) -> tuple[NewReading | None, Rejection | None, bool]:
        """Return the reading to spool, or else the rejection to record; the other is None.

        The third says whether the reading's site_code, which is the payload's, is not the topic's.

        Args:
            message: As received.
            identity: Its event id.
            received_us: When, in microseconds since 1970 UTC.
        """
        try:
            return self._reading(message, identity, received_us)
        except _Refused as refusal:
            return None, _rejection(message, received_us, refusal), False
        except (UnicodeDecodeError, RecursionError, msgspec.DecodeError) as error:
            return None, _rejection(message, received_us, _undecodable(error)), False

    def _reading(
        self, message: Message, identity: bytes, received_us: int
    ) -> tuple[NewReading, None, bool]:
        raw_topic, payload, _, _, _, size = message
        topic = self._topics.get(raw_topic) or self._topic(raw_topic)
        if size > self._max_bytes:
            raise _Refused(
                Reason.TOO_LARGE,
                f"the payload has {size} bytes, more than MAX_PAYLOAD_BYTES={self._max_bytes}",
            )
        if not payload:
            raise _Refused(Reason.EMPTY_PAYLOAD, "the payload is empty")
        payload.decode()  # the decoder skips unknown fields without looking at their bytes
        fields = self._decode(payload)
        site, sensor, value = fields.site_code, fields.sensor_id, fields.value
        if not (site and sensor and site.isprintable() and sensor.isprintable()):
            _check_name("site_code", site)
            _check_name("sensor_id", sensor)
        differs = site != topic.site
        if differs and self._reject_mismatch:
            raise _Refused(
                Reason.SITE_MISMATCH,
                f"site_code {site!r} in the payload, {topic.site!r} in the topic "
                "(SITE_MISMATCH=reject)",
            )
        raw = fields.timestamp
        timestamp_us = self._parsed(raw) if isinstance(raw, str) else self._scaled(raw)
        tag, text = topic.tag, topic.text
        names = site + sensor + tag + text
        crc = row_crc(identity, (received_us, timestamp_us, value), names, payload)
        reading = (
            identity,
            received_us,
            timestamp_us,
            site,
            sensor,
            tag,
            value,
            text,
            payload,
            crc,
        )
        return reading, None, differs

    def _topic(self, raw: bytes) -> _Topic:
        known = self._topics.get(raw)
        if known is None:
            known = _parse_topic(raw)
            if len(self._topics) >= TOPIC_CACHE_ENTRIES:
                self._topics.clear()
            if len(raw) <= TOPIC_CACHED_MAX_BYTES:
                self._topics[raw] = known
        return known

    def _scaled(self, raw: float) -> int:
        scaled = raw * self._unit
        if not _MIN_US <= scaled <= _MAX_US:
            raise _Refused(Reason.BAD_TIMESTAMP, "timestamp is outside the years 1 to 9999")
        return round(scaled)

    def _parsed(self, raw: str) -> int:
        if not self._text:
            raise _Refused(
                Reason.BAD_TIMESTAMP, "timestamp is a text; TIMESTAMP_FORMATS expects a number"
            )
        try:
            moment = msgspec.convert(raw, datetime)
        except msgspec.ValidationError:
            raise _Refused(
                Reason.BAD_TIMESTAMP, f"timestamp {raw[:80]!r} is not RFC 3339"
            ) from None
        if moment.tzinfo is None:
            if not self._naive:
                raise _Refused(
                    Reason.BAD_TIMESTAMP,
                    f"timestamp {raw!r} has no offset (TIMESTAMP_FORMATS=rfc3339,naive would take "
                    "it as UTC)",
                )
            moment = moment.replace(tzinfo=UTC)
        elif not self._offset or (raw[-1] not in "Zz" and raw[-3] != ":"):
            # The decoder also takes "+0200", which RFC 3339 does not.
            raise _Refused(
                Reason.BAD_TIMESTAMP,
                f"timestamp {raw!r} does not have the form that TIMESTAMP_FORMATS asks for",
            )
        since = moment - _EPOCH
        value = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
        if not _MIN_US <= value <= _MAX_US:
            raise _Refused(
                Reason.BAD_TIMESTAMP, f"timestamp {raw!r} is outside the years 1 to 9999 in UTC"
            )
        return value


def _undecodable(error: UnicodeDecodeError | RecursionError | msgspec.DecodeError) -> _Refused:
    """Return what the decoding of a payload refuses."""
    if isinstance(error, UnicodeDecodeError):
        return _Refused(Reason.NOT_UTF8, f"byte {error.start} of the payload is not UTF-8")
    if isinstance(error, RecursionError):
        return _Refused(Reason.TOO_DEEP, "the JSON is nested too deeply")
    if isinstance(error, msgspec.ValidationError):
        return _Refused(_reason_of(str(error)), str(error))
    return _Refused(Reason.NOT_JSON, f"not JSON: {error}")


def _check_name(name: str, text: str) -> None:
    if not text:
        raise _Refused(Reason.BAD_FIELD, f"{name} is empty")
    if _CONTROL.search(text):
        raise _Refused(Reason.CONTROL_CHARACTER, f"{name} has a control character")


def _parse_topic(raw: bytes) -> _Topic:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise _Refused(Reason.TOPIC_NOT_UTF8, "the topic is not UTF-8") from None
    levels = text.split("/")
    if (
        len(levels) != TOPIC_LEVELS
        or (levels[0], levels[1], levels[3]) != ("FCTS", "FAE", "SolvExtract")
        or not levels[2]
        or not levels[4]
    ):
        raise _Refused(Reason.TOPIC_SHAPE, "the topic is not FCTS/FAE/<site>/SolvExtract/<pi_tag>")
    if _CONTROL.search(text):
        raise _Refused(Reason.CONTROL_CHARACTER, "the topic has a control character")
    return _Topic(text, levels[2], levels[4])


def _reason_of(sentence: str) -> str:
    """Return the code for one of msgspec's sentences (tests hold them to it)."""
    if "missing required field" in sentence:
        return Reason.MISSING_FIELD
    if "`$.value`" in sentence:
        return Reason.BAD_VALUE
    if "`$.timestamp`" in sentence:
        return Reason.BAD_TIMESTAMP
    return Reason.BAD_FIELD if "`$." in sentence else Reason.NOT_OBJECT


def _rejection(message: Message, received_us: int, refusal: _Refused) -> Rejection:
    return (
        received_us,
        refusal.reason,
        refusal.detail[:REJECTED_TEXT_CHARS],
        message.topic.decode("utf-8", "backslashreplace")[:REJECTED_TEXT_CHARS],
        message.payload[:REJECTED_PAYLOAD_BYTES],
        message.size,
        message.qos,
        int(message.retained),
    )
