"""The write API's fake holds to what the service documents, seen by Google's own client.

Rows and schemas: `test_fakes_write_rows.py`; lifetimes and faults: `test_fakes_write_faults.py`.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.api_core import exceptions
from google.cloud.bigquery_storage_v1 import types, writer
from google.cloud.bigquery_storage_v1.services.big_query_write import BigQueryWriteClient
from google.cloud.bigquery_storage_v1.services.big_query_write.transports import (
    BigQueryWriteGrpcTransport,
)

from tests.appending import (
    COLUMNS,
    DEADLINE_S,
    DEFAULT,
    FIELDS,
    HEADER,
    NOW_US,
    REF,
    SERVICE,
    TABLE,
    Api,
    Call,
    F,
    descriptor,
    error_of,
    kind_of,
    reading,
    request,
    storage_error,
)
from tests.fakes.write_api import Appended
from tests.fakes.write_connection import REQUEST_MAX_BYTES

READING: dict[str, Any] = {
    "event_id": F.TYPE_STRING,
    "site_code": F.TYPE_STRING,
    "sensor_id": F.TYPE_STRING,
    "pi_tag": F.TYPE_STRING,
    "timestamp": F.TYPE_INT64,
    "value": F.TYPE_DOUBLE,
}


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as made:
        yield made


# Streams.


def test_a_stream_is_created_with_the_schema_of_its_table(api: Api) -> None:
    made = api.create()
    assert made.name.startswith(f"{TABLE}/streams/")
    assert made.type_ == types.WriteStream.Type.COMMITTED
    assert made.commit_time == made.create_time
    shown = [(f.name, f.type_.name, f.mode.name) for f in made.table_schema.fields]
    assert shown == [
        ("name", "STRING", "REQUIRED"),
        ("at", "TIMESTAMP", "REQUIRED"),
        ("value", "DOUBLE", "NULLABLE"),
        ("n", "INT64", "NULLABLE"),
        ("ok", "BOOL", "NULLABLE"),
        ("raw", "BYTES", "NULLABLE"),
        ("price", "NUMERIC", "NULLABLE"),
        ("tags", "STRING", "REPEATED"),
    ]


def test_each_stream_has_a_name_of_its_own(api: Api) -> None:
    made = [api.create().name for _ in range(3)]
    assert len(set(made)) == 3
    assert (api.fake.streams.names, api.fake.streams.created) == (made, 3)


def test_no_stream_without_a_table(api: Api) -> None:
    with pytest.raises(exceptions.NotFound) as caught:
        api.create("projects/p/datasets/d/tables/other")
    assert kind_of(caught.value) == "TABLE_NOT_FOUND"


def test_other_types_of_streams_are_refused_plainly(api: Api) -> None:
    with pytest.raises(exceptions.MethodNotImplemented, match="only streams of type COMMITTED"):
        api.create(kind="BUFFERED")


def test_the_rows_of_a_pending_stream_are_looked_at_and_in_no_table(api: Api) -> None:
    made = api.create(kind="PENDING")
    assert made.type_ == types.WriteStream.Type.PENDING
    assert "commit_time" not in made
    api.fake.faults.poison = lambda row: row["name"] == "b"
    call = api.open(made.name)
    assert "append_result" in call.append([reading("a")], 0)
    assert [error.index for error in call.append([reading("b")], 1).row_errors] == [0]
    assert api.finalize(made.name) == 1
    assert api.names() == []
    assert made.name not in api.fake.streams.names


def test_names_may_come_back_with_the_projects_number(api: Api) -> None:
    api.fake.streams.project_numbers["p"] = "4711"
    made = api.create()
    assert made.name.startswith("projects/4711/datasets/d/tables/readings/streams/")
    assert "append_result" in api.open(made.name).append([reading("a")], 0)
    assert (api.finalize(made.name), api.names()) == (1, ["a"])


@pytest.mark.parametrize("end", ["finalized", "expired"])
def test_the_end_of_a_stream_may_be_told_without_a_storage_error(api: Api, end: str) -> None:
    api.fake.streams.plain = True
    if end == "finalized":
        api.finalize(api.stream)
    else:
        api.fake.streams.forget(api.stream, countable=True)
    api.fake.ending = set()
    code, kind, _ = error_of(api.open().append([reading("a")], 0))
    assert (code, kind) == ("FAILED_PRECONDITION", "")
    assert api.finalize(api.stream) == 0


def test_only_the_full_view_of_a_stream_has_the_schema(api: Api) -> None:
    for name in (api.stream, DEFAULT):
        full, basic = api.get(name, "FULL"), api.get(name)
        assert (full.name, basic.name) == (name, name)
        assert (len(full.table_schema.fields), len(basic.table_schema.fields)) == (len(COLUMNS), 0)


def test_an_unknown_stream_is_not_found(api: Api) -> None:
    other = f"{TABLE}/streams/other"
    asks: list[Callable[[str], object]] = [api.get, api.finalize]
    for ask in asks:
        with pytest.raises(exceptions.NotFound):
            ask(other)
    with pytest.raises(exceptions.NotFound, match=f"not found. Entity: {other}") as caught:
        api.open(other).append([reading()], 0)
    found = storage_error(caught.value)
    assert found is not None
    assert (found.code.name, found.entity) == ("STREAM_NOT_FOUND", other)


def test_a_finalized_stream_tells_its_rows_and_takes_no_more(api: Api) -> None:
    call = api.open()
    call.append([reading("a"), reading("b")], 0)
    for _ in range(2):
        assert api.finalize(api.stream) == 2
    for _ in range(2):  # the connection goes on
        code, kind, message = error_of(call.append([reading("c")], 2))
        assert (code, kind) == ("INVALID_ARGUMENT", "STREAM_FINALIZED")
        assert "Stream has been finalized" in message
    assert api.names() == ["a", "b"]


def test_the_default_stream_cannot_be_finalized(api: Api) -> None:
    with pytest.raises(exceptions.InvalidArgument):
        api.finalize(DEFAULT)


# Routing.


@pytest.mark.parametrize("header", ["", "write_stream=", f"write_stream={DEFAULT}", "name=x"])
def test_appends_need_their_routing_header(api: Api, header: str) -> None:
    with pytest.raises(exceptions.InvalidArgument, match=HEADER):
        api.open(header=header).append([reading()], 0)
    assert api.names() == []
    assert [HEADER in found.text for found in api.fake.violations] == [True]


def test_the_routing_header_may_be_escaped_and_have_other_parameters(api: Api) -> None:
    escaped = api.stream.replace("/", "%2F")
    call = api.open(header=f"write_location=eu&write_stream={escaped}")
    assert call.append([reading()], 0).append_result.offset == 0
    assert api.fake.violations == []


@pytest.mark.parametrize(
    ("method", "asked", "parameter"),
    [
        ("CreateWriteStream", types.CreateWriteStreamRequest(parent=TABLE), "parent"),
        ("GetWriteStream", types.GetWriteStreamRequest(name=DEFAULT), "name"),
        ("FinalizeWriteStream", types.FinalizeWriteStreamRequest(name=DEFAULT), "name"),
    ],
)
def test_the_other_calls_need_their_routing_header(
    api: Api,
    method: str,
    asked: Any,  # noqa: ANN401 - one of three classes of messages
    parameter: str,
) -> None:
    call = api.channel.unary_unary(f"{SERVICE}/{method}", request_serializer=type(asked).serialize)
    for metadata in ((), ((HEADER, f"{parameter}=other"),)):
        with pytest.raises(grpc.RpcError) as caught:
            call(asked, timeout=DEADLINE_S, metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert HEADER in caught.value.details()
    assert len(api.fake.violations) == 2
    assert api.fake.streams.created == 0


# What a request must have.


def test_later_requests_may_leave_out_stream_and_schema(api: Api) -> None:
    call = api.open(trace_id="sluice:1")
    answers = [call.append([reading("a")], 0), call.append([reading("b")], 1, trace_id="other")]
    assert [answer.append_result.offset for answer in answers] == [0, 1]
    assert [answer.write_stream for answer in answers] == [api.stream, api.stream]
    assert api.names() == ["a", "b"]
    assert [connection.trace_id for connection in api.fake.connections] == ["sluice:1"]


@pytest.mark.parametrize(
    ("lacks", "complaint"),
    [
        ("stream", "A stream must be specified"),
        ("schema", "Schema must be specified"),
        ("rows", "Rows must be specified"),
        ("name", "Invalid resource name"),
    ],
)
def test_a_first_request_that_lacks_something_ends_the_call(
    api: Api, lacks: str, complaint: str
) -> None:
    stream = f"{TABLE}/nothing/S1".replace("tables", "views") if lacks == "name" else api.stream
    call = api.open(stream)
    call.send_request(
        request(
            [] if lacks == "rows" else [reading()],
            0,
            stream="" if lacks == "stream" else stream,
            fields=None if lacks == "schema" else FIELDS,
        )
    )
    with pytest.raises(exceptions.InvalidArgument, match=complaint):
        call.receive()
    assert len(api.fake.violations) == 1
    assert api.fake.appended == []


def test_a_connection_for_one_stream_takes_no_other(api: Api) -> None:
    call = api.open()
    call.append([reading()], 0)
    with pytest.raises(exceptions.InvalidArgument, match="The connection is for"):
        call.append([reading()], 0, stream=api.create().name, fields=FIELDS)
    assert len(api.fake.violations) == 1


def test_one_connection_serves_the_default_streams_of_several_tables(api: Api) -> None:
    api.tables.create_table("p.d.other", COLUMNS, partition_by=None)
    other = "projects/p/datasets/d/tables/other/streams/_default"
    call = api.open(DEFAULT)
    call.append([reading("a")])
    call.append([reading("b")], stream=other, fields=FIELDS)
    call.append([reading("c")], stream=DEFAULT, fields=FIELDS)
    assert api.names() == ["a", "c"]
    assert api.names("p.d.other") == ["b"]
    with pytest.raises(exceptions.InvalidArgument, match="Schema must be specified"):
        call.append([reading("d")], stream=other)
    assert len(api.fake.violations) == 1


def of_size(size: int, stream: str) -> types.AppendRowsRequest:
    """Return a request of so many bytes."""
    length = size
    for _ in range(3):  # lengths of lengths change but once
        made = request([reading("x" * length)], 0, stream=stream, fields=FIELDS)
        length += size - len(types.AppendRowsRequest.serialize(made))
    assert len(types.AppendRowsRequest.serialize(made)) == size
    return made


def test_a_request_of_the_largest_size_is_taken_and_a_larger_one_ends_the_call(api: Api) -> None:
    call = api.open()
    call.send_request(of_size(REQUEST_MAX_BYTES, api.stream))
    assert call.receive().append_result.offset == 0
    call.send_request(of_size(REQUEST_MAX_BYTES + 1, api.stream))
    words = f"AppendRows request too large: {REQUEST_MAX_BYTES + 1} limit {REQUEST_MAX_BYTES}"
    with pytest.raises(exceptions.InvalidArgument, match=words):
        call.receive()
    assert api.tables.table_count(REF) == 1
    assert len(api.fake.violations) == 1


def test_arrow_is_refused_plainly(api: Api) -> None:
    made = types.AppendRowsRequest(write_stream=api.stream)
    made.arrow_rows.rows.serialized_record_batch = b"x"
    call = api.open()
    call.send_request(made)
    with pytest.raises(exceptions.MethodNotImplemented, match="no Arrow"):
        call.receive()
    assert api.fake.violations == []


# Offsets.


@pytest.mark.parametrize(
    ("offset", "error", "words"),
    [
        (0, ("ALREADY_EXISTS", "OFFSET_ALREADY_EXISTS"), "is within stream, expected offset 2"),
        (1, ("ALREADY_EXISTS", "OFFSET_ALREADY_EXISTS"), "is within stream, expected offset 2"),
        (3, ("OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE"), "is beyond stream, expected offset 2"),
    ],
)
def test_an_append_lands_only_at_the_end_of_its_stream(
    api: Api, offset: int, error: tuple[str, str], words: str
) -> None:
    call = api.open()
    call.append([reading("a"), reading("b")], 0)
    answer = call.append([reading("c")], offset)
    said = f"The offset {words}, received {offset} Entity: {api.stream}"
    assert error_of(answer) == (*error, said)
    found = storage_error(answer.error)
    assert found is not None
    assert found.entity == api.stream
    assert answer.write_stream == api.stream
    # "User can retry with adjusted offset within the same RPC connection."
    assert call.append([reading("d")], 2).append_result.offset == 2
    assert api.names() == ["a", "b", "d"]


def test_an_append_without_an_offset_goes_to_the_end(api: Api) -> None:
    call = api.open()
    answers = [call.append([reading(), reading()]) for _ in range(3)]
    assert [answer.append_result.offset for answer in answers] == [0, 2, 4]


def test_a_new_connection_goes_on_where_the_old_one_ended(api: Api) -> None:
    api.open().append([reading(), reading()], 0)
    assert api.open().append([reading()], 2).append_result.offset == 2
    assert api.fake.calls == 2
    assert api.fake.violations == []


def test_two_connections_that_take_turns_on_a_stream_are_a_violation(api: Api) -> None:
    older, newer = api.open(), api.open()
    older.append([reading()], 0)
    newer.append([reading()], 1)
    assert api.fake.violations == []
    older.append([reading()], 2)
    assert [found.stream for found in api.fake.violations] == [api.stream]
    assert "older connection" in api.fake.violations[0].text


@pytest.mark.parametrize("name", [DEFAULT, f"{TABLE}/_default"])
def test_the_default_stream_takes_appends_without_offset_from_several_connections(
    api: Api, name: str
) -> None:
    calls = [api.open(name), api.open(name)]
    answers = [calls[i].append([reading(str(n))]) for n, i in enumerate((0, 1, 0))]
    assert all("append_result" in answer for answer in answers)
    assert not any("offset" in answer.append_result for answer in answers)
    assert api.names() == ["0", "1", "2"]
    assert api.fake.violations == []


def test_an_offset_on_the_default_stream_ends_the_call(api: Api) -> None:
    with pytest.raises(exceptions.InvalidArgument, match="default stream"):
        api.open(DEFAULT).append([reading()], 0)
    assert api.names() == []
    assert len(api.fake.violations) == 1


# Counts, other clients, the process.


def test_what_was_appended_is_counted_by_append(api: Api) -> None:
    call = api.open()
    call.append([reading(), reading()], 0)
    call.append([reading()], 0)
    call.append([reading()], 2)
    api.open(DEFAULT).append([reading()])
    assert api.fake.appended == [
        Appended(api.stream, 0, 2, 0),
        Appended(api.stream, 2, 1, 0),
        Appended(DEFAULT, None, 1, 0),
    ]
    assert all(append.size > 20 for append in api.fake.appended)
    assert (api.fake.requests, api.fake.calls) == (4, 2)


def test_the_librarys_own_writer_works_against_it(api: Api) -> None:
    template = types.AppendRowsRequest(write_stream=api.stream)
    template.proto_rows.writer_schema.proto_descriptor = descriptor(FIELDS)
    appends = writer.AppendRowsStream(api.client, template)
    futures = [appends.send(request([reading(str(n))], n, stream=api.stream)) for n in range(5)]
    offsets = [future.result(timeout=DEADLINE_S).append_result.offset for future in futures]
    assert offsets == [0, 1, 2, 3, 4]
    again = appends.send(request([reading("again")], 2, stream=api.stream))
    with pytest.raises(exceptions.AlreadyExists, match="expected offset 5, received 2"):
        again.result(timeout=DEADLINE_S)
    appends.close()
    assert api.names() == ["0", "1", "2", "3", "4"]
    assert api.fake.connections[0].trace_id.startswith("python-writer")
    assert api.fake.violations == []


def test_it_runs_beside_the_rest_fake_as_a_process_that_tells_its_counts() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes", "bigquery", "--table", REF, "--create", "--keep"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    with process:
        assert process.stdout is not None
        try:
            serving = json.loads(process.stdout.readline())
            assert serving["event"] == "serving"
            with grpc.insecure_channel(f"127.0.0.1:{serving['write_port']}") as channel:
                transport = BigQueryWriteGrpcTransport(channel=channel)
                call = Call(BigQueryWriteClient(transport=transport), DEFAULT, fields=READING)
                row = {name: NOW_US if name == "timestamp" else "x" for name in READING}
                call.send_request(request([{**row, "value": 1.5}], stream=DEFAULT, fields=READING))
                assert "append_result" in call.receive()
                call.close()
            process.send_signal(signal.SIGTERM)
            stopped = json.loads(process.stdout.readline())
            assert (stopped["appends"], stopped["tables"]) == (1, {REF: 1})
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()


def test_rows_of_a_pending_stream_are_judged_and_not_seen_without_a_commit(api: Api) -> None:
    stream = api.create(kind="PENDING")
    assert stream.type_.name == "PENDING"
    call = api.open(stream.name)
    assert "error" not in call.append([reading("a")])
    answer = call.append([reading("b"), {"at": NOW_US}])
    assert [error.index for error in answer.row_errors] == [1]
    assert api.names() == []
    assert (api.fake.appended, api.fake.streams.names) == ([], [])
