"""The sensor's time is RFC 3339 with an offset, and other forms only where they are allowed."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collector.validation import Reason, Validator
from tests.test_validation import GOOD, check, made, reason_for

Y2024 = 1_704_067_200_000_000
TIMES = {
    "2024-01-01T00:00:00Z": Y2024,
    "2024-01-01t00:00:00z": Y2024,
    "2024-01-01 00:00:00Z": Y2024,
    "2024-01-01T02:00:00+02:00": Y2024,
    "2023-12-31T18:30:00-05:30": Y2024,
    "2024-01-01T00:00:00-00:00": Y2024,
    "2024-01-01T00:00:00.5Z": Y2024 + 500_000,
    "2024-01-01T00:00:00.123456Z": Y2024 + 123_456,
    "2024-01-01T00:00:00.123456789Z": Y2024 + 123_457,
    "2024-02-29T00:00:00Z": Y2024 + 59 * 86_400_000_000,
    "1969-12-31T23:59:59.5Z": -500_000,
    "0001-01-01T00:00:00Z": -62_135_596_800_000_000,
    "9999-12-31T23:59:59.999999Z": 253_402_300_799_999_999,
}
NO_TIMES = [
    "",
    "now",
    "2024-01-01",
    "2024-01-01T00:00:00",
    "2024-01-01T00:00Z",
    "2024-01-01T00:00:00+0200",
    "2024-01-01T00:00:00+02",
    "2024-01-01T00:00:00+24:00",
    "2024-01-01T00:00:00+05:60",
    "2024-01-01T00:00:00\u221202:00",
    "2024-01-01T00:00:00.Z",
    "2024-01-01T00:00:00,5Z",
    "2024-01-01T24:00:00Z",
    "2024-01-01T00:60:00Z",
    "2016-12-31T23:59:61Z",
    "2024-02-30T00:00:00Z",
    "2023-02-29T00:00:00Z",
    "2024-13-01T00:00:00Z",
    "0000-01-01T00:00:00Z",
    "10000-01-01T00:00:00Z",
    "0001-01-01T00:00:00+00:01",
    "9999-12-31T23:59:59-00:01",
    "20240101T000000Z",
    " 2024-01-01T00:00:00Z",
    "2024-01-01T00:00:00Z ",
    "2024-01-01T00:00:00Z\n",
    "\uff12024-01-01T00:00:00Z",
]


@pytest.mark.parametrize("text", TIMES)
def test_rfc3339_times_are_understood_to_the_microsecond(text: str) -> None:
    reading, _ = check(made(timestamp=text))
    assert reading is not None
    assert reading[2] == TIMES[text]


@pytest.mark.parametrize("text", NO_TIMES)
def test_what_is_no_rfc3339_time_is_refused(text: str) -> None:
    assert reason_for(made(timestamp=text)) == Reason.BAD_TIMESTAMP


FORMATS = [
    # formats, JSON of the timestamp, microseconds or None for a refusal
    (("rfc3339", "naive"), '"2024-01-01T00:00:00"', Y2024),
    (("rfc3339", "naive"), '"2024-01-01T02:00:00+02:00"', Y2024),
    (("naive",), '"2024-01-01T00:00:00.25"', Y2024 + 250_000),
    (("naive",), '"2024-01-01T00:00:00Z"', None),
    (("naive",), "1704067200", None),
    (("epoch",), "1704067200", Y2024),
    (("epoch",), "1704067200.25", Y2024 + 250_000),
    (("epoch",), "-0.5", -500_000),
    (("epoch",), '"2024-01-01T00:00:00Z"', None),
    (("epoch",), '"1704067200"', None),
    (("epoch",), "1e300", None),
    (("epoch",), "1e305", None),
    (("epoch",), "253402300800", None),
    (("epoch",), "9" * 400, None),
    (("epoch",), "true", None),
    (("epoch",), "null", None),
    (("epoch_ms",), "1704067200250", Y2024 + 250_000),
    (("epoch_ms",), "1704067200250.5", Y2024 + 250_500),
    (("rfc3339", "epoch_ms"), '"2024-01-01T00:00:00Z"', Y2024),
    (("rfc3339", "epoch_ms"), '"2024-01-01T00:00:00"', None),
]


@pytest.mark.parametrize(("formats", "text", "expected"), FORMATS)
def test_other_forms_of_time_are_taken_only_where_set(
    formats: tuple[str, ...], text: str, expected: int | None
) -> None:
    payload = GOOD.replace(b'"2024-01-01T00:00:00Z"', text.encode())
    validator = Validator(formats)
    if expected is None:
        assert reason_for(payload, validator=validator) == Reason.BAD_TIMESTAMP
    else:
        reading, _ = check(payload, validator=validator)
        assert reading is not None
        assert reading[2] == expected


@given(
    st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)),  # noqa: DTZ001 - the zone follows
    st.integers(-23 * 60 - 59, 23 * 60 + 59),
    st.sampled_from("Tt "),
)
def test_any_time_with_any_offset_is_the_same_moment(
    moment: datetime, offset_min: int, separator: str
) -> None:
    zoned = moment.replace(tzinfo=timezone(timedelta(minutes=offset_min)))
    reading, _ = check(made(timestamp=zoned.isoformat(separator)))
    assert reading is not None
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert epoch + timedelta(microseconds=reading[2]) == zoned
