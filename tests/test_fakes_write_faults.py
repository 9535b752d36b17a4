"""What tests can make the write API's fake do, seen by Google's own client."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.api_core import exceptions
from google.cloud.bigquery_storage_v1 import types

from tests.appending import (
    COLUMNS,
    DEADLINE_S,
    DEFAULT,
    FIELDS,
    HEADER,
    REF,
    SERVICE,
    Api,
    error_of,
    kind_of,
    reading,
    request,
)
from tests.harness.waiting import listens, wait_until

FOREVER_S = 3600.0


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as made:
        yield made


def test_any_call_can_be_aborted(api: Api) -> None:
    stream = api.stream
    asks: dict[str, Callable[[], object]] = {
        "CreateWriteStream": api.create,
        "GetWriteStream": lambda: api.get(stream),
        "FinalizeWriteStream": lambda: api.finalize(stream),
        "AppendRows": lambda: api.open().append([reading()], 0),
    }
    for call, ask in asks.items():
        api.fake.faults.abort(
            grpc.StatusCode.PERMISSION_DENIED, "no", calls={call}, kind="KMS_PERMISSION_DENIED"
        )
        with pytest.raises(exceptions.PermissionDenied, match="no") as caught:
            ask()
        assert kind_of(caught.value) == "KMS_PERMISSION_DENIED"
    assert api.fake.faults.fired == len(asks)
    assert (api.fake.streams.created, api.fake.appended) == (1, [])


def test_a_call_whose_answer_is_lost_was_carried_out(api: Api) -> None:
    call = api.open()
    api.fake.faults.lose_answer(times=3, calls={"*"})
    with pytest.raises(exceptions.ServiceUnavailable, match="Socket closed"):
        call.append([reading("a")], 0)
    with pytest.raises(exceptions.ServiceUnavailable):
        api.create()
    with pytest.raises(exceptions.ServiceUnavailable):
        api.finalize(api.stream)
    assert api.names() == ["a"]
    assert api.fake.streams.created == 2
    assert error_of(api.open().append([reading()], 1))[1] == "STREAM_FINALIZED"


def test_the_nth_append_can_be_chosen_and_a_cut_comes_before_it(api: Api) -> None:
    api.fake.faults.skip(2)
    api.fake.faults.cut()
    call = api.open()
    for n in range(2):
        call.append([reading(str(n))], n)
    with pytest.raises(exceptions.ServiceUnavailable, match="Socket closed"):
        call.append([reading("2")], 2)
    assert api.names() == ["0", "1"]
    assert api.fake.requests == 3


@pytest.mark.parametrize("code", ["INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "ABORTED"])
@pytest.mark.parametrize("carried_out", [False, True])
def test_an_error_in_the_stream_leaves_the_connection_open(
    api: Api,
    code: str,
    carried_out: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    api.fake.faults.refuse(code, "planned", carried_out=carried_out, kind="KMS_SERVICE_ERROR")
    call = api.open()
    assert error_of(call.append([reading("a")], 0)) == (code, "KMS_SERVICE_ERROR", "planned")
    assert api.names() == (["a"] if carried_out else [])
    # What the first request said holds all the same.
    assert ("error" in call.append([reading("b")], 0)) == carried_out


def test_an_answer_may_name_another_offset(api: Api) -> None:
    api.fake.faults.wrong_offset(5)
    call = api.open()
    assert call.append([reading()], 0).append_result.offset == 5
    assert call.append([reading()], 1).append_result.offset == 1
    api.fake.faults.wrong_offset(5)
    assert error_of(call.append([reading()], 0))[0] == "ALREADY_EXISTS"
    api.fake.faults.wrong_offset(5)
    assert error_of(call.append([{"name": "bad"}], 2))[0] == "INVALID_ARGUMENT"
    api.fake.faults.wrong_offset(5)
    assert "offset" not in api.open(DEFAULT).append([reading()]).append_result


def test_withheld_answers_are_of_appends_that_were_carried_out(api: Api) -> None:
    api.fake.faults.skip(1)
    api.fake.faults.withhold()
    call = api.open()
    for n in range(4):
        call.send([reading(str(n))], n)
    assert call.receive().append_result.offset == 0
    assert api.tables.wait_for(4, DEADLINE_S)
    assert api.fake.connections[0].answered == 1
    api.fake.faults.clear()
    with pytest.raises(exceptions.ServiceUnavailable, match="let go"):
        call.receive()


def test_what_hangs_was_not_carried_out_and_ends_with_the_server(api: Api) -> None:
    api.fake.faults.hang()
    call = api.open()
    call.send([reading()], 0)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(call.receive)
        assert api.fake.faults.wait_fired(1, DEADLINE_S)
        api.fake.stop()
        with pytest.raises(exceptions.GoogleAPICallError):
            answer.result(DEADLINE_S)
    assert api.names() == []


def test_a_caller_that_leaves_lets_go_of_what_hangs_and_of_what_is_withheld(api: Api) -> None:
    append = api.channel.stream_stream(
        f"{SERVICE}/AppendRows", request_serializer=types.AppendRowsRequest.serialize
    )
    first = request([reading("a")], 0, stream=api.stream, fields=FIELDS)
    for plan in (api.fake.faults.hang, api.fake.faults.withhold):
        fired = api.fake.faults.fired
        plan()
        requests: queue.SimpleQueue[types.AppendRowsRequest | None] = queue.SimpleQueue()
        requests.put(first)
        metadata = ((HEADER, f"write_stream={api.stream}"),)
        call = append(iter(requests.get, None), metadata=metadata, timeout=DEADLINE_S)
        assert api.fake.faults.wait_fired(fired + 1, DEADLINE_S)
        if plan == api.fake.faults.withhold:
            assert api.tables.wait_for(1, DEADLINE_S)
        call.cancel()
        requests.put(None)
        wait_until(no_appends_run, DEADLINE_S, "the call's threads end")
    assert api.names() == ["a"]


def no_appends_run() -> bool:
    return not any(thread.name == "fake-appends" for thread in threading.enumerate())


def test_a_delayed_append_is_carried_out_afterwards(api: Api) -> None:
    api.fake.faults.delay(0.001, times=2)
    call = api.open()
    assert [call.append([reading()], n).append_result.offset for n in range(3)] == [0, 1, 2]
    assert api.fake.faults.fired == 2
    assert api.tables.table_count(REF) == 3


def test_poison_is_named_by_its_rows_or_only_the_first_of_them(api: Api) -> None:
    api.fake.faults.poison = lambda row: row["name"] in {"b", "d"}
    call = api.open()
    rows = [reading(name) for name in "abcd"]
    assert [error.index for error in call.append(rows, 0).row_errors] == [1, 3]
    api.fake.faults.incomplete = True
    assert [error.index for error in call.append(rows, 0).row_errors] == [1]
    api.fake.faults.clear()
    assert "append_result" in call.append(rows, 0)
    assert api.names() == list("abcd")


@pytest.mark.parametrize("in_stream", [True, False])
def test_poison_may_be_refused_without_a_name(api: Api, *, in_stream: bool) -> None:
    api.fake.ending = set() if in_stream else {""}
    api.fake.faults.poison = lambda row: row["name"] == "b"
    api.fake.faults.unnamed = True
    call = api.open()
    if in_stream:
        answer = call.append([reading("a"), reading("b")], 0)
        assert error_of(answer)[:2] == ("INVALID_ARGUMENT", "")
        assert not answer.row_errors
    else:
        with pytest.raises(exceptions.InvalidArgument):
            call.append([reading("a"), reading("b")], 0)
    assert api.names() == []
    assert "append_result" in api.open().append([reading("a")], 0)


@pytest.mark.parametrize("end", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OK])
def test_a_call_may_end_behind_the_answer_that_names_bad_rows(
    api: Api, end: grpc.StatusCode
) -> None:
    api.fake.faults.poison = lambda row: row["name"] == "b"
    api.fake.faults.end_after_row_errors = end
    call = api.open()
    assert [error.index for error in call.append([reading("b")], 0).row_errors] == [0]
    with pytest.raises((exceptions.InvalidArgument, StopIteration)):
        call.append([reading("a")], 0)
    assert api.names() == []
    assert "append_result" in api.open().append([reading("a")], 0)


def test_the_hooks_are_called_before_and_after_the_rows_are_there(api: Api) -> None:
    seen: list[tuple[str, str, int, int]] = []

    def note(moment: str) -> Callable[[str, int], None]:
        return lambda name, at: seen.append((moment, name, at, api.tables.table_count(REF)))

    api.fake.faults.before_append = note("before")
    api.fake.faults.after_append = note("after")
    call = api.open()
    call.append([reading(), reading()], 0)
    call.append([reading()])
    call.append([{"name": "bad"}], 3)
    assert seen == [
        ("before", api.stream, 0, 0),
        ("after", api.stream, 0, 2),
        ("before", api.stream, -1, 2),
        ("after", api.stream, 2, 3),
        ("before", api.stream, 3, 3),
    ]


# Answers under way, restarts, counts.


def test_appends_are_carried_out_while_earlier_answers_are_still_on_their_way(api: Api) -> None:
    api.fake.latency_s = FOREVER_S
    call = api.open()
    for n in range(4):
        call.send([reading(str(n))], n)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(call.receive)
        assert api.tables.wait_for(4, DEADLINE_S)
        assert (api.fake.in_flight_max, api.fake.requests) == (4, 4)
        assert api.fake.connections[0].answered == 0
        api.fake.stop()
        with pytest.raises(exceptions.GoogleAPICallError):
            answer.result(DEADLINE_S)
    assert api.names() == ["0", "1", "2", "3"]


def test_a_call_that_sends_nothing_more_still_gets_its_answers_or_the_end(api: Api) -> None:
    call = api.open()
    call.append([reading("a")], 0)
    api.fake.latency_s = 0.05
    call.send([reading("b")], 1)
    call.close()
    assert call.receive().append_result.offset == 1
    with pytest.raises(StopIteration):
        call.receive()
    api.fake.latency_s = FOREVER_S
    call = api.open()
    call.send([reading("c")], 2)
    call.close()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(call.receive)
        assert api.tables.wait_for(3, DEADLINE_S)
        wait_until(no_appends_run, DEADLINE_S, "the end of the requests is seen")
        api.fake.stop()
        with pytest.raises(exceptions.GoogleAPICallError):
            answer.result(DEADLINE_S)


def test_late_answers_keep_their_order_and_the_end_of_the_call_comes_behind_them(api: Api) -> None:
    api.fake.latency_s = 0.05
    api.fake.faults.skip(3)
    api.fake.faults.cut()
    call = api.open()
    for _ in range(6):
        call.send([reading()])
    assert [call.receive().append_result.offset for _ in range(3)] == [0, 1, 2]
    with pytest.raises(exceptions.ServiceUnavailable):
        call.receive()
    # What came behind the cut went with it.
    assert api.tables.table_count(REF) == 3


def test_streams_and_rows_survive_a_restart(api: Api) -> None:
    call = api.open()
    call.append([reading("a")], 0)
    api.fake.restart()
    with pytest.raises(exceptions.GoogleAPICallError):
        call.append([reading("b")], 1)
    again = api.open()
    again.send([reading("c")], 1)
    assert again.receive().append_result.offset == 1
    assert api.names() == ["a", "c"]


def test_a_call_may_end_in_peace_while_the_server_goes_away(api: Api) -> None:
    call = api.open()
    call.append([reading("a")], 0)
    with ThreadPoolExecutor(1) as pool:
        gone = pool.submit(api.fake.stop, DEADLINE_S)
        wait_until(lambda: not listens(api.fake.port), DEADLINE_S, "new connections are refused")
        assert call.append([reading("b")], 1).append_result.offset == 1
        call.close()
        with pytest.raises(StopIteration):
            call.receive()
        gone.result(DEADLINE_S)
    assert api.names() == ["a", "b"]


# Lifetimes.


def test_a_stream_that_expired_is_not_found(api: Api) -> None:
    call = api.open()
    call.append([reading()], 0)
    api.fake.streams.forget(api.stream)
    with pytest.raises(exceptions.NotFound):
        call.append([reading()], 1)
    asks: list[Callable[[str], object]] = [api.get, api.finalize]
    for ask in asks:
        with pytest.raises(exceptions.NotFound):
            ask(api.stream)


def test_a_stream_that_expired_may_still_tell_its_rows(api: Api) -> None:
    call = api.open()
    call.append([reading(), reading()], 0)
    api.fake.streams.forget(api.stream, countable=True)
    with pytest.raises(exceptions.NotFound):
        call.append([reading()], 2)
    assert api.get(api.stream).name == api.stream
    assert api.finalize(api.stream) == 2


def test_a_stream_ends_with_its_table_and_a_new_table_does_not_have_it(api: Api) -> None:
    api.open().append([reading("a")], 0)
    api.tables.store.delete(REF)
    for name in (api.stream, DEFAULT):
        with pytest.raises(exceptions.NotFound) as caught:
            api.open(name).append([reading("b")])
        assert kind_of(caught.value) == "TABLE_NOT_FOUND"
    api.tables.create_table(REF, COLUMNS, partition_by=None)
    with pytest.raises(exceptions.NotFound) as caught:
        api.open().append([reading("c")], 1)
    assert kind_of(caught.value) == "STREAM_NOT_FOUND"
    with pytest.raises(exceptions.NotFound):
        api.finalize(api.stream)
    api.open(DEFAULT).append([reading("d")])
    assert api.names() == ["d"]
