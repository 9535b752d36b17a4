"""What the write API's fake says of rows and of writer schemas, seen by Google's own client."""

from collections.abc import Iterator

import pytest
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery

from tests.appending import (
    COLUMNS,
    FIELDS,
    NOW,
    NOW_US,
    REF,
    Api,
    F,
    Row,
    error_of,
    kind_of,
    reading,
    request,
    serialized,
    storage_error,
)
from tests.fakes.rows import Column, judge_row


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as made:
        yield made


# Rows.


def test_rows_are_stored_as_insert_all_stores_them(api: Api) -> None:
    inserter = bigquery.Client(
        project="p",
        credentials=AnonymousCredentials(),
        client_options={"api_endpoint": api.tables.url},
    )
    at = NOW.isoformat().replace("+00:00", "Z")
    row: Row = {"name": "ä", "at": at, "value": 0.5, "n": -7, "ok": True, "raw": "AP8="}
    row |= {"price": "12.5", "tags": ["x", "y"]}
    assert inserter.insert_rows_json(REF, [row]) == []
    inserter.close()
    sent = {**row, "at": NOW_US, "raw": b"\x00\xff"}
    api.open().append([sent], 0)
    assert api.tables.rows(REF) == [row, row]


def test_a_time_is_exact_to_the_microsecond_at_both_ends_of_the_range(api: Api) -> None:
    times = [-62_135_596_800_000_000, -1, 253_402_300_799_999_999]
    api.open().append([reading(at=at) for at in times], 0)
    assert [row["at"] for row in api.tables.rows(REF)] == [
        "0001-01-01T00:00:00.000000Z",
        "1969-12-31T23:59:59.999999Z",
        "9999-12-31T23:59:59.999999Z",
    ]


@pytest.mark.parametrize(
    ("fields", "row", "stored"),
    [
        (
            {"price": F.TYPE_BYTES},
            {"price": (-12_500_000_000).to_bytes(8, "little", signed=True)},
            {"price": "-12.5"},
        ),
        ({"price": F.TYPE_INT64}, {"price": 3}, {"price": "3"}),
        ({"ok": F.TYPE_INT64}, {"ok": 2}, {"ok": True}),
        ({"raw": F.TYPE_STRING}, {"raw": "a"}, {"raw": "YQ=="}),
        ({"at": F.TYPE_INT32}, {"at": 0}, {"at": "1970-01-01T00:00:00.000000Z"}),
    ],
)
def test_a_column_takes_each_type_that_is_documented_for_it(
    api: Api, fields: Row, row: Row, stored: Row
) -> None:
    call = api.open(fields={**FIELDS, **fields})
    assert "append_result" in call.append([reading(**row)], 0)
    (found,) = api.tables.rows(REF)
    assert {name: found[name] for name in stored} == stored


def test_a_column_is_found_whatever_the_case_of_its_name(api: Api) -> None:
    api.tables.add_column(REF, Column("Level", "INT64"))
    fields = {"NAME": F.TYPE_STRING, "At": F.TYPE_INT64, "level": F.TYPE_INT64}
    call = api.open(fields=fields)
    assert "append_result" in call.append([{"NAME": "a", "At": NOW_US, "level": 3}], 0)
    assert api.names() == ["a"]
    assert api.tables.rows(REF)[0]["Level"] == 3


GOOD = serialized([reading("good")])[0]
RANGE = "Timestamp field value is out of range"
BAD_ROWS: list[tuple[Row | bytes, str]] = [
    ({"at": NOW_US}, "Field value of name cannot be empty on field name."),
    ({"name": "x"}, "Field value of at cannot be empty on field at."),
    (reading(at=253_402_300_800_000_000), f"{RANGE}: 253402300800000000 on field at."),
    (reading(at=-62_135_596_800_000_001), f"{RANGE}: -62135596800000001 on field at."),
    (reading(price="1" + "0" * 29), f"Invalid NUMERIC value: 1{'0' * 29} on field price."),
    (reading(price="0.0000000001"), "Invalid NUMERIC value: 0.0000000001 on field price."),
    (reading(price=""), "Invalid NUMERIC value:  on field price."),
    (GOOD + b"\x0a\x02\xff\xfe", "Invalid UTF-8 string on field name."),
    (GOOD + b"\x42\x02\xff\xfe", "Invalid UTF-8 string on field tags."),
    (b"\x0a\xff", "The row could not be parsed with the writer schema."),
]


@pytest.mark.parametrize(("bad", "complaint"), BAD_ROWS)
def test_a_bad_row_is_named_and_nothing_of_its_request_is_appended(
    api: Api, bad: Row | bytes, complaint: str
) -> None:
    call = api.open()
    content = bad if isinstance(bad, bytes) else serialized([bad])[0]
    answer = call.append((), 0, raw=[GOOD, content, GOOD, content])
    code, kind, message = error_of(answer)
    assert (code, kind) == ("INVALID_ARGUMENT", "")
    assert message.startswith("Errors found while processing rows. Please refer to the row_errors")
    found = [(e.index, e.code.name) for e in answer.row_errors]
    assert found == [(1, "FIELDS_ERROR"), (3, "FIELDS_ERROR")]
    assert answer.row_errors[0].message == complaint
    assert api.names() == []
    # The connection goes on, and the offset is still free.
    assert call.append((), 0, raw=[GOOD]).append_result.offset == 0
    assert api.names() == ["good"]


def test_the_offset_is_judged_before_the_rows(api: Api) -> None:
    code, kind, _ = error_of(api.open().append([{"name": "no time"}], 5))
    assert (code, kind) == ("OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE")


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (f"{'9' * 29}.{'9' * 9}", True),
        (f"-{'9' * 29}.{'9' * 9}000", True),
        (1, True),
        (0, True),
        (0.25, True),
        ("1e28", True),
        ("1e29", False),
        ("1" * 30, False),
        ("0.0000000001", False),
        ("x", False),
        ("nan", False),
        ("inf", False),
        (True, False),
    ],
)
def test_insert_all_judges_a_numeric_by_the_same_rule(value: object, taken: bool) -> None:  # noqa: FBT001 - a parameter of the table above
    columns = {"price": Column("price", "NUMERIC")}
    assert (judge_row({"price": value}, columns, None, ignore_unknown=False) == []) == taken


# The writer schema and the table's.


def test_a_field_that_the_table_lacks_ends_the_call(api: Api) -> None:
    fields = {**FIELDS, "more": F.TYPE_STRING}
    words = "Input schema has more fields than BigQuery schema, extra fields: 'more' Entity: "
    with pytest.raises(exceptions.InvalidArgument, match=words + api.stream) as caught:
        api.open(fields=fields).append([reading()], 0)
    found = storage_error(caught.value)
    assert found is not None
    assert found.code.name == "SCHEMA_MISMATCH_EXTRA_FIELDS"
    assert found.error_message == "Schema mismatch due to extra fields in user schema"
    assert found.entity == api.stream
    assert api.names() == []
    assert api.fake.violations == []


def test_which_errors_end_the_call_can_be_chosen(api: Api) -> None:
    api.fake.ending = {"STREAM_FINALIZED"}
    call = api.open(fields={**FIELDS, "more": F.TYPE_STRING})
    for _ in range(2):
        code, kind, _ = error_of(call.append([reading()], 0))
        assert (code, kind) == ("INVALID_ARGUMENT", "SCHEMA_MISMATCH_EXTRA_FIELDS")
    api.finalize(api.stream)
    with pytest.raises(exceptions.InvalidArgument) as caught:
        call.append([reading()], 0)
    assert kind_of(caught.value) == "STREAM_FINALIZED"


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"n": F.TYPE_STRING}, "Reading.n, the proto field type string, BigQuery field type INT"),
        ({"at": F.TYPE_STRING}, "Reading.at, the proto field type string, BigQuery field type TIM"),
        ({"name": F.TYPE_BYTES}, "at Reading.name, the proto field type bytes"),
        ({"value": F.TYPE_INT64}, "at Reading.value, the proto field type int64"),
        ({"at": None}, "The required field at is missing in the proto message"),
    ],
)
def test_a_writer_schema_that_does_not_fit_ends_the_call(
    api: Api, fields: Row, complaint: str
) -> None:
    all_fields = {n: kind for n, kind in {**FIELDS, **fields}.items() if kind is not None}
    with pytest.raises(exceptions.InvalidArgument, match=complaint):
        api.open(fields=all_fields).append((), 0, raw=[b""])
    assert api.fake.violations == []


def test_a_repeated_field_does_not_fit_a_column_that_is_none(api: Api) -> None:
    api.tables.store.force_columns(REF, [*COLUMNS[:-1], Column("tags", "STRING")])
    with pytest.raises(exceptions.InvalidArgument, match="the proto field type repeated string"):
        api.open().append([reading()], 0)


def test_a_writer_schema_that_does_not_stand_for_itself_ends_the_call(api: Api) -> None:
    made = request([reading()], 0, stream=api.stream, fields=FIELDS)
    described = made.proto_rows.writer_schema.proto_descriptor
    described.field[0].type, described.field[0].type_name = F.TYPE_ENUM, "Nowhere"
    call = api.open()
    call.send_request(made)
    with pytest.raises(exceptions.InvalidArgument, match="Invalid proto schema"):
        call.receive()


@pytest.mark.parametrize("lag", [1, 3])
def test_a_new_column_is_told_of_once_and_the_old_schema_goes_on(api: Api, lag: int) -> None:
    api.fake.schema_lag = lag
    call = api.open()
    assert "updated_schema" not in call.append([reading()], 0)
    api.tables.add_column(REF, Column("more", "STRING"))
    answers = [call.append([reading()]) for _ in range(5)]
    assert ["updated_schema" in answer for answer in answers].index(True) == lag - 1
    assert sum("updated_schema" in answer for answer in answers) == 1
    told = answers[lag - 1].updated_schema.fields
    assert [field.name for field in told] == [*FIELDS, "more"]
    # The same connection may go over to it, with a request that brings the new schema.
    fields = {**FIELDS, "more": F.TYPE_STRING}
    call.send_request(request([reading(more="x")], fields=fields))
    assert "append_result" in call.receive()
    assert api.tables.rows(REF)[-1]["more"] == "x"


def test_a_change_that_is_no_column_is_not_told_of(api: Api) -> None:
    call = api.open()
    call.append([reading()], 0)
    api.tables.store.update(REF, None, {"description": "other"})
    assert "updated_schema" not in call.append([reading()], 1)


def test_a_column_that_is_dropped_is_an_extra_field_at_once(api: Api) -> None:
    call = api.open()
    call.append([reading("a")], 0)
    api.tables.drop_column(REF, "value")
    with pytest.raises(exceptions.InvalidArgument, match="extra fields: 'value'"):
        call.append([reading("b")], 1)
    assert api.names() == ["a"]


def test_without_strictness_no_row_is_looked_into_before_the_test_does() -> None:
    with Api(strict=False) as api:
        call = api.open()
        assert "append_result" in call.append([reading("a", at=2**62)], 0)
        assert error_of(call.append([reading("b")], 0))[0] == "ALREADY_EXISTS"
        assert "append_result" in call.append([reading("c")], 1)
        assert api.tables.table_count(REF) == 2
        with pytest.raises(OverflowError):
            api.tables.rows(REF)
