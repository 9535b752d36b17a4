"""What is the exactly-once sink's own: its stream, its journal, the table's schema."""

import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.cloud.bigquery_storage_v1 import types
from google.rpc import status_pb2  # type: ignore[import-untyped]

import forwarder.appendcalls
import forwarder.appends
import forwarder.storage
from forwarder.appends import Meaning, refusal_of
from forwarder.bigquery import InsertAllSink
from forwarder.certificates import certificate_fault
from forwarder.defaultstream import DefaultStreamSink
from forwarder.drain import Drain
from forwarder.rowproto import RequestEncoder
from forwarder.sink import Delivery, FaultKind, Sink
from forwarder.storage import StorageSink
from forwarder.writeapi import Appender, CallError, WriteApi, storage_error
from lifecycle import Settings, Watchdog, load_settings
from spool import (
    AppendJournal,
    DeadLetter,
    DiskFullError,
    Reading,
    Settlement,
    SinkState,
    SpoolWriter,
    claim_environment,
)
from tests.fakes import FakeBigQuery, FakeWriteApi
from tests.fakes.rows import Column
from tests.fakes.tables import READINGS
from tests.test_drain import FakeStop
from tests.test_sink_contract import readings
from tests.test_spool_writer import edit, look, new_reading

TABLE = "p-1.d.readings"
EPOCH = "an-epoch"


class Bench:
    """The service, the sink's file, and sinks that come and go."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tables = FakeBigQuery().start()
        self.tables.create_dataset("p-1.d")
        self.api = FakeWriteApi(self.tables.store).start()
        self.state = SinkState.open(directory, "bigquery")

    def settings(self, **variables: str) -> Settings:
        environment = {
            "APP_ENV": "DEV",
            "GCP_PROJECT_ID": "p-1",
            "BIGQUERY_DATASET": "d",
            "BIGQUERY_TABLE": "readings",
            "PUBSUB_ENABLED": "false",
            "BIGQUERY_EMULATOR_HOST": self.tables.url,
            "BIGQUERY_STORAGE_EMULATOR_HOST": self.api.address,
        }
        return load_settings(environment | variables, "gate-1")

    @contextmanager
    def sink(self, epoch: str = EPOCH, **variables: str) -> Iterator[StorageSink]:
        """A sink as it is after a start of the program."""
        sink = StorageSink(self.settings(**variables), self.state)
        sink.resume(epoch)
        yield sink
        sink.close()

    def settle(self, seq: int, epoch: str = EPOCH) -> None:
        self.state.settle(Settlement(epoch, seq))

    def seqs(self, table: str = TABLE) -> list[int]:
        return [int(str(row["seq"])) for row in self.tables.rows(table)]

    def possibly_repeated(self) -> int:
        return self.state.counters().get("possibly_repeated", 0)

    def close(self) -> None:
        self.state.close()
        self.api.stop()
        self.tables.stop()
        assert self.api.violations == []


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.tables.create_table(TABLE)
    yield made
    made.close()


def delivered(sink: Sink, rows: Sequence[Reading]) -> None:
    assert sink.deliver(rows) == Delivery()


def delivered_by_turns(
    bench: Bench, sink: StorageSink, rows: Sequence[Reading], epoch: str = EPOCH
) -> list[DeadLetter]:
    """Deliver as the drain loop does: what is confirmed is settled, and the rest comes again."""
    dead: list[DeadLetter] = []
    todo = list(rows)
    while todo:
        delivery = sink.deliver(todo)
        assert delivery.fault is None, delivery.fault
        assert len(delivery.retry) < len(todo), "something was decided"
        dead += delivery.dead
        todo = delivery.retry
        bench.settle(todo[0][0] - 1 if todo else rows[-1][0], epoch)
    return dead


def interrupted(bench: Bench, rows: Sequence[Reading]) -> None:
    """Let the rows arrive, with the answer lost and the program gone before it asked again."""
    bench.api.faults.lose_answer()
    with bench.sink() as sink:
        assert sink.deliver(rows).retry == list(rows)


def test_an_interrupted_append_is_repeated_at_its_place_and_found_to_be_there(
    bench: Bench,
) -> None:
    rows = readings(30)
    interrupted(bench, rows)
    with bench.sink() as sink:
        delivered(sink, rows)
    assert bench.seqs() == list(range(1, 31))
    assert len(bench.api.streams.names) == 1


def test_rows_that_came_meanwhile_go_behind_the_interrupted_ones(bench: Bench) -> None:
    rows = readings(50)
    interrupted(bench, rows[:30])
    with bench.sink() as sink:
        delivered_by_turns(bench, sink, rows)
    assert bench.seqs() == list(range(1, 51))
    assert [a.rows for a in bench.api.appended] == [30, 20]
    assert [a.stream for a in bench.api.appended] == bench.api.streams.names


def test_the_first_batch_after_a_crash_reaches_as_far_as_what_was_being_sent(
    bench: Bench, tmp_path: Path
) -> None:
    """MAX_DRAIN_RATE may be lower than before: the same rows must be read together again."""
    writer = SpoolWriter.open(tmp_path)
    claim_environment(writer, "DEV", [])
    writer.append([new_reading(n) for n in range(1, 41)], [], {})
    rows: list[Reading] = [(n, *new_reading(n)) for n in range(1, 31)]
    bench.api.faults.lose_answer()
    with bench.sink(epoch=writer.epoch) as sink:
        assert sink.deliver(rows).retry == rows
    sink = StorageSink(bench.settings(), bench.state)
    stop = FakeStop(lambda: bench.state.position(writer.epoch) == 40)
    Drain(
        directory=tmp_path,
        sink=sink,
        state=bench.state,
        app_env="DEV",
        max_rate=7,
        stop=stop,
        watchdog=Watchdog(["a loop that never turns"], 1.0),
        clock=lambda: stop.now_s,
    ).run()
    sink.close()
    writer.close()
    assert bench.seqs() == list(range(1, 41))
    assert [a.rows for a in bench.api.appended][:2] == [30, 7]


@pytest.mark.parametrize("arrived", [True, False])
def test_rows_that_are_missing_now_are_found_out_by_the_streams_length(
    bench: Bench, *, arrived: bool
) -> None:
    """drop-oldest has taken some, or a checksum has failed since: the cut cannot be repeated."""
    rows = readings(60)
    if arrived:
        interrupted(bench, rows[:30])
    else:
        bench.api.faults.abort(grpc.StatusCode.UNAVAILABLE, "away")
        with bench.sink() as sink:
            assert sink.deliver(rows[:30]).retry
    with bench.sink() as sink:
        todo = rows[3:]
        for _ in range(3):
            delivery = sink.deliver(todo)
            if not delivery.retry:
                break
            assert delivery.fault is None, delivery.fault
            assert arrived, "something was found to have arrived"
            bench.settle(delivery.retry[0][0] - 1)
            todo = delivery.retry
        assert delivery.retry == []
    expected = range(1, 61) if arrived else range(4, 61)
    assert bench.seqs() == list(expected)
    assert bench.possibly_repeated() == 0
    assert len(bench.api.streams.names) == 2


def test_rows_of_a_stranger_in_the_stream_are_not_taken_for_ours(bench: Bench) -> None:
    """A restored bigquery.db knows an earlier end of its stream than the service does."""
    rows = readings(30)
    with bench.sink() as sink:
        delivered(sink, rows[:10])
        bench.settle(10)
    edit(bench.state.path, "UPDATE append_stream SET next_offset = 4")
    with bench.sink() as sink:
        delivered(sink, rows[10:])
    assert Counter(bench.seqs()) == Counter(range(1, 31)), "nothing lost, nothing twice"
    assert bench.possibly_repeated() == 6, "what is behind the offset may have been these"


def test_an_outdated_end_of_the_stream_is_waited_for(bench: Bench) -> None:
    """Right after a reconnection the service may not know yet what it has confirmed."""
    rows = readings(30)
    with bench.sink() as sink:
        delivered(sink, rows[:10])
        bench.settle(10)
        stream = bench.api.streams.stream(*bench.api.streams.names)
        stream.row_count = 4
        for _ in range(2):
            delivery = sink.deliver(rows[10:])
            assert delivery.retry == rows[10:]
            assert delivery.fault is not None
            assert delivery.fault.kind is FaultKind.TRANSIENT
            assert "expected offset 4" in delivery.fault.problem
        stream.row_count = 10
        delivered(sink, rows[10:])
    assert bench.seqs() == list(range(1, 31))
    assert len(bench.api.streams.names) == 1


def test_a_stream_that_was_finalized_is_replaced_without_loss_or_repetition(bench: Bench) -> None:
    rows = readings(60)
    with bench.sink() as sink:
        delivered(sink, rows[:20])
        bench.settle(20)
        (first,) = bench.api.streams.names
        bench.api.streams.finalize(first)
        delivered(sink, rows[20:40])
        bench.settle(40)
        delivered(sink, rows[40:])
    assert bench.seqs() == list(range(1, 61))
    assert len(bench.api.streams.names) == 2
    assert bench.possibly_repeated() == 0


def test_a_stream_that_is_forgotten_between_batches_repeats_nothing(bench: Bench) -> None:
    """Three days without traffic: nothing was on its way, so nothing is in doubt."""
    rows = readings(40)
    with bench.sink() as sink:
        delivered(sink, rows[:20])
        bench.settle(20)
        bench.api.streams.forget(*bench.api.streams.names)
        delivered(sink, rows[20:])
    assert bench.seqs() == list(range(1, 41))
    assert bench.possibly_repeated() == 0


def test_a_forgotten_stream_with_lost_answers_repeats_what_it_counts(bench: Bench) -> None:
    rows = readings(40)
    interrupted(bench, rows)
    bench.api.streams.forget(*bench.api.streams.names)
    with bench.sink() as sink:
        delivered(sink, rows)
    assert Counter(bench.seqs()) == dict.fromkeys(range(1, 41), 2)
    assert bench.possibly_repeated() == 40


def test_a_new_spool_begins_a_new_stream(bench: Bench) -> None:
    rows = readings(30)
    interrupted(bench, rows)
    with bench.sink(epoch="another") as sink:
        delivered(sink, rows[:10])
    assert len(bench.api.streams.names) == 2
    assert bench.possibly_repeated() == 30, "the salvaged rows may be those of the old spool"


def test_another_table_in_the_settings_gets_a_stream_of_its_own(bench: Bench) -> None:
    rows = readings(30)
    with bench.sink() as sink:
        delivered(sink, rows[:10])
        bench.settle(10)
    bench.tables.create_table("p-1.d.other")
    with bench.sink(BIGQUERY_TABLE="other") as sink:
        delivered(sink, rows[10:])
    assert bench.seqs() == list(range(1, 11))
    assert bench.seqs("p-1.d.other") == list(range(11, 31))


def test_a_refused_certificate_gives_up_no_stream_of_another_table(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = readings(30)
    interrupted(bench, rows)
    bench.tables.create_table("p-1.d.other")

    def refused(_: WriteApi, name: str) -> int:
        raise CallError("UNAVAILABLE", f"CERTIFICATE_VERIFY_FAILED: unable to ask for {name}")

    with bench.sink(BIGQUERY_TABLE="other") as sink:
        with monkeypatch.context() as patched:
            patched.setattr(WriteApi, "finalize_stream", refused)
            # As against the cloud: an emulator's connection has no certificate.
            patched.setattr(WriteApi, "access_fault", lambda _, details: certificate_fault(details))
            fault = sink.deliver(rows).fault
            assert fault is not None
            assert fault.kind is FaultKind.HOLD
        delivered(sink, rows)
    assert bench.possibly_repeated() == 0, "the stream could be asked later"
    assert bench.seqs() == list(range(1, 31))
    assert bench.seqs("p-1.d.other") == []


def test_refused_rows_in_the_middle_of_a_window_are_left_out_and_the_others_go_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.appends, "REQUEST_MAX_ROWS", 10)
    rows = readings(100)
    guilty = {15, 16, 44, *range(61, 71)}
    bench.api.faults.poison = lambda row: row["seq"] in guilty
    bench.api.faults.incomplete = True
    with bench.sink() as sink:
        dead = delivered_by_turns(bench, sink, rows)
    assert sorted(letter.row[0] for letter in dead) == sorted(guilty)
    assert {letter.reason for letter in dead} == {"invalid"}
    assert bench.seqs() == [seq for seq in range(1, 101) if seq not in guilty]
    assert bench.possibly_repeated() == 0


def test_dead_letters_survive_a_crash_before_the_cursor(bench: Bench) -> None:
    rows = readings(20)
    bench.api.faults.poison = lambda row: row["seq"] == 7
    with bench.sink() as sink:
        assert [letter.row[0] for letter in sink.deliver(rows).dead] == [7]
    bench.api.faults.clear()
    with bench.sink() as sink:  # nothing was settled: the same rows come again
        delivery = sink.deliver(rows)
    assert [(d.row[0], d.reason, d.detail) for d in delivery.dead] == [
        (7, "invalid", "poisoned, as planned")
    ]
    assert bench.seqs() == [seq for seq in range(1, 21) if seq != 7]


def test_a_row_that_no_request_can_hold_is_a_dead_letter(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.appends, "ROW_MAX_BYTES", 5_000)
    rows = readings(3, payload=b"{}")
    large: Reading = (*rows[1][:9], b"x" * 6_000, rows[1][10])
    with bench.sink() as sink:
        delivery = sink.deliver([rows[0], large, rows[2]])
    assert [(d.row[0], d.reason) for d in delivery.dead] == [(2, "limit")]
    assert bench.seqs() == [1, 3]


def test_nothing_is_sent_while_the_journal_cannot_be_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = readings(5)
    with bench.sink() as sink:
        delivered(sink, rows[:1])
        bench.settle(1)

        def full(*_: object) -> None:
            raise DiskFullError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(AppendJournal, "add", full)
            delivery = sink.deliver(rows[1:])
            assert delivery.retry == rows[1:]
            assert delivery.fault is not None
            assert delivery.fault.kind is FaultKind.TRANSIENT
            assert "disk is full" in delivery.fault.problem
        assert bench.seqs() == [1]
        delivered(sink, rows[1:])
    assert bench.seqs() == [1, 2, 3, 4, 5]


def test_the_journal_is_durable_before_anything_is_sent(bench: Bench) -> None:
    seen: list[object] = []

    def look_at_it(_: str, offset: int) -> None:
        # Through a connection of its own: only what is committed.
        seen.append(
            (offset, *look(bench.state.path, "SELECT start_offset, row_count FROM append_cut"))
        )

    bench.api.faults.before_append = look_at_it
    with bench.sink() as sink:
        delivered(sink, readings(12))
    assert seen == [(0, (0, 12))]


def test_no_more_appends_are_on_their_way_than_is_allowed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.appends, "REQUEST_MAX_ROWS", 5)
    bench.api.latency_s = 0.02
    on_their_way = [0]
    most = [0]
    send, receive = Appender.send, Appender.receive

    def counted_send(self: Appender, request: bytes) -> None:
        on_their_way[0] += 1
        most[0] = max(most[0], on_their_way[0])
        send(self, request)

    def counted_receive(self: Appender) -> object:
        answer = receive(self)
        on_their_way[0] -= 1
        return answer

    monkeypatch.setattr(Appender, "send", counted_send)
    monkeypatch.setattr(Appender, "receive", counted_receive)
    with bench.sink() as sink:
        delivered(sink, readings(60))
    assert most[0] == forwarder.appendcalls.IN_FLIGHT_MAX
    assert bench.seqs() == list(range(1, 61))


def test_a_connection_that_the_service_closed_while_idle_is_no_fault(bench: Bench) -> None:
    rows = readings(20)
    with bench.sink() as sink:
        delivered(sink, rows[:10])
        bench.settle(10)
        appender = sink._calls._appender  # noqa: SLF001 - whose end is awaited
        assert appender is not None
        bench.api.stop()
        appender._reader.join(10)  # noqa: SLF001 - the same
        assert appender.ended
        bench.api.start()
        delivered_in_the_end(sink, rows[10:])
    assert bench.seqs() == list(range(1, 21))


def delivered_in_the_end(sink: Sink, rows: Sequence[Reading]) -> None:
    """Deliver, although the channel may still wait a while before it connects again."""
    for _ in range(200):
        delivery = sink.deliver(rows)
        if not delivery.retry:
            return
        assert delivery.fault is not None
        assert delivery.fault.kind is FaultKind.TRANSIENT
    raise AssertionError("it is never delivered")


# The table's schema.


def test_a_column_that_is_added_is_filled_after_the_service_has_told_of_it(bench: Bench) -> None:
    bench.tables.drop_column(TABLE, "source")
    rows = readings(40)
    with bench.sink() as sink:
        delivered(sink, rows[:10])
        bench.settle(10)
        bench.tables.add_column(TABLE, Column("source", "STRING"))
        delivered(sink, rows[10:20])  # its answer carries the new schema
        bench.settle(20)
        delivered(sink, rows[20:])
    sources = [row.get("source") for row in bench.tables.rows(TABLE)]
    assert sources == [None] * 20 + ["gate-1"] * 20
    assert len(bench.api.streams.names) == 1


@pytest.mark.parametrize(
    ("break_it", "mend_it", "remedy"),
    [
        (
            lambda t: t.drop_column(TABLE, "pi_tag"),
            lambda t: t.add_column(TABLE, Column("pi_tag", "STRING")),
            "ALTER TABLE `p-1.d.readings` ADD COLUMN pi_tag STRING",
        ),
        (
            lambda t: t.add_column(TABLE, Column("unit", "STRING", "REQUIRED")),
            lambda t: t.drop_column(TABLE, "unit"),
            "ALTER COLUMN unit DROP NOT NULL",
        ),
        (
            lambda t: (
                t.drop_column(TABLE, "value"),
                t.add_column(TABLE, Column("value", "STRING")),
            ),
            lambda t: (
                t.drop_column(TABLE, "value"),
                t.add_column(TABLE, Column("value", "FLOAT", "REQUIRED")),
            ),
            "RENAME COLUMN value TO value_old",
        ),
    ],
    ids=["dropped", "newly required", "retyped"],
)
def test_a_change_that_does_not_fit_is_a_hold_and_goes_on_once_mended(
    bench: Bench,
    break_it: Callable[[FakeBigQuery], object],
    mend_it: Callable[[FakeBigQuery], object],
    remedy: str,
) -> None:
    rows = readings(40)
    with bench.sink() as sink:
        delivered(sink, rows[:10])
        bench.settle(10)
        break_it(bench.tables)
        for _ in range(2):
            delivery = sink.deliver(rows[10:])
            assert delivery.retry == rows[10:]
            assert delivery.dead == []
            assert delivery.fault is not None
            assert delivery.fault.kind is FaultKind.HOLD
            assert remedy in str(delivery.fault)
        mend_it(bench.tables)
        delivered(sink, rows[10:])
    assert bench.seqs() == list(range(1, 41))


def test_a_dropped_column_that_nobody_needs_stops_nothing(bench: Bench) -> None:
    rows = readings(20)
    with bench.sink() as sink:
        delivered(sink, rows[:10])
        bench.settle(10)
        bench.tables.drop_column(TABLE, "payload")
        delivered(sink, rows[10:])
    assert bench.seqs() == list(range(1, 21))


def test_a_missing_table_is_a_hold_or_is_made_if_told_to(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    rows = readings(5)
    with bench.sink() as sink:
        delivery = sink.deliver(rows)
        assert delivery.fault is not None
        assert delivery.fault.kind is FaultKind.HOLD
        assert "CREATE TABLE `p-1.d.readings`" in delivery.fault.remedy
    with bench.sink(BIGQUERY_CREATE_TABLE="true") as sink:
        delivered(sink, rows)
    table = bench.tables.store.table(TABLE)
    assert table.extras["timePartitioning"] == {"type": "DAY", "field": "timestamp"}
    assert table.extras["clustering"] == {"fields": ["site_code", "pi_tag"]}
    bench.close()


def test_a_table_that_was_dropped_and_made_again_gets_the_rest(bench: Bench) -> None:
    rows = readings(30)
    with bench.sink() as sink:
        delivered(sink, rows[:10])
        bench.settle(10)
        bench.tables.store.delete(TABLE)
        delivery = sink.deliver(rows[10:])
        assert delivery.retry == rows[10:]
        assert delivery.fault is not None
        assert delivery.fault.kind is FaultKind.HOLD
        assert "CREATE TABLE" in delivery.fault.remedy
        bench.tables.create_table(TABLE, READINGS)
        delivered(sink, rows[10:])
    assert bench.seqs() == list(range(11, 31))
    assert bench.possibly_repeated() == 0


@pytest.mark.parametrize(
    ("code", "kind", "remedy"),
    [
        ("PERMISSION_DENIED", FaultKind.HOLD, "roles/bigquery.dataEditor"),
        ("UNAUTHENTICATED", FaultKind.HOLD, "GOOGLE_APPLICATION_CREDENTIALS"),
        ("RESOURCE_EXHAUSTED", FaultKind.TRANSIENT, ""),
        ("INTERNAL", FaultKind.TRANSIENT, ""),
        ("ABORTED", FaultKind.TRANSIENT, ""),
        ("DEADLINE_EXCEEDED", FaultKind.TRANSIENT, ""),
        ("UNKNOWN", FaultKind.TRANSIENT, ""),
        ("CANCELLED", FaultKind.TRANSIENT, ""),
        ("UNIMPLEMENTED", FaultKind.HOLD, "insert_all"),
    ],
)
@pytest.mark.parametrize("in_stream", [True, False])
def test_every_refusal_is_a_fault_of_its_kind_and_kills_no_row(
    bench: Bench, code: str, kind: FaultKind, remedy: str, *, in_stream: bool
) -> None:
    rows = readings(10)
    with bench.sink() as sink:
        if in_stream:
            bench.api.faults.refuse(code, "as planned")
        else:
            bench.api.faults.abort(grpc.StatusCode[code], "as planned")
        delivery = sink.deliver(rows)
        assert (delivery.retry, delivery.dead) == (rows, [])
        assert delivery.fault is not None
        assert delivery.fault.kind is kind, delivery.fault
        assert code in delivery.fault.problem
        assert "as planned" in delivery.fault.problem
        assert remedy in delivery.fault.remedy
        delivered(sink, rows)
    assert bench.seqs() == list(range(1, 11))


@pytest.mark.parametrize("call", ["CreateWriteStream", "FinalizeWriteStream"])
@pytest.mark.parametrize("code", ["UNAVAILABLE", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"])
def test_a_stream_that_cannot_be_made_or_ended_now_is_tried_again(
    bench: Bench, call: str, code: str
) -> None:
    rows = readings(20)
    with bench.sink() as sink:
        if call == "FinalizeWriteStream":
            delivered(sink, rows[:10])
            bench.settle(10)
            bench.api.streams.finalize(*bench.api.streams.names)
            rows = rows[10:]
        bench.api.faults.abort(grpc.StatusCode[code], "as planned", calls={call})
        delivery = sink.deliver(rows)
        assert delivery.retry == rows
        assert delivery.fault is not None
        held = code == "PERMISSION_DENIED"
        assert delivery.fault.kind is (FaultKind.HOLD if held else FaultKind.TRANSIENT)
        delivered(sink, rows)
    assert bench.seqs() == list(range(1, 21))


# Another method, and back.


def test_to_insert_all_and_back_repeats_at_most_what_was_on_its_way(bench: Bench) -> None:
    rows = readings(60)
    interrupted(bench, rows[:20])
    other = InsertAllSink(bench.settings(BIGQUERY_WRITE_METHOD="insert_all"))
    delivered(other, rows[:40])
    other.close()
    bench.settle(40)
    with bench.sink() as sink:
        delivered(sink, rows[40:])
    times = Counter(bench.seqs())
    assert set(times) == set(range(1, 61)), "nothing lost"
    assert {seq for seq, n in times.items() if n > 1} == set(range(1, 21)), "one window at most"
    assert max(times.values()) == 2


def test_to_insert_all_and_back_when_the_interrupted_append_never_arrived(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forwarder.storage, "OUTDATED_END_S", 0.0)
    rows = readings(60)
    with bench.sink() as sink:
        delivered(sink, rows[:5])
        bench.settle(5)
        bench.api.faults.abort(grpc.StatusCode.UNAVAILABLE, "away")
        assert sink.deliver(rows[5:20]).retry
    other = InsertAllSink(bench.settings(BIGQUERY_WRITE_METHOD="insert_all"))
    delivered(other, rows[5:40])
    other.close()
    bench.settle(40)
    with bench.sink() as sink:
        delivered(sink, rows[40:])
    assert Counter(bench.seqs()) == Counter(range(1, 61))
    assert bench.possibly_repeated() == 0


def test_the_default_stream_is_at_least_once_and_needs_no_journal(bench: Bench) -> None:
    rows = readings(30)
    sink = DefaultStreamSink(bench.settings(BIGQUERY_WRITE_METHOD="storage_default"))
    bench.api.faults.lose_answer()
    assert sink.deliver(rows).retry == rows
    delivered(sink, rows)
    sink.close()
    assert Counter(bench.seqs()) == dict.fromkeys(range(1, 31), 2)
    assert bench.api.streams.names == []
    assert look(bench.state.path, "SELECT * FROM append_stream") == []


def test_from_the_default_stream_to_storage_with_a_backlog(bench: Bench) -> None:
    rows = readings(40)
    sink = DefaultStreamSink(bench.settings(BIGQUERY_WRITE_METHOD="storage_default"))
    delivered(sink, rows[:20])
    sink.close()
    bench.settle(20)
    with bench.sink() as storage:
        delivered(storage, rows[20:])
    assert bench.seqs() == list(range(1, 41))


def test_the_journal_is_readable_for_people(bench: Bench) -> None:
    interrupted(bench, readings(30))
    with sqlite3.connect(bench.state.path) as conn:
        conn.row_factory = sqlite3.Row
        (shown,) = [dict(row) for row in conn.execute("SELECT * FROM appends")]
    conn.close()
    assert shown.pop("stream") in bench.api.streams.names
    assert shown == {"start_offset": 0, "row_count": 30, "first_seq": 1, "last_seq": 30}


# Found by reading the code as an adversary.


def others(rows: Sequence[Reading]) -> list[Reading]:
    """Return other readings with the same numbers."""
    return [(row[0], b"\x77" * 16, *row[2:]) for row in rows]


def arrived_others(bench: Bench) -> int:
    return sum(row["event_id"] == "77" * 16 for row in bench.tables.rows(TABLE))


def test_a_call_that_ends_between_two_requests_confirms_nothing_of_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the default stream nothing but the order tells which answer belongs to which rows."""
    monkeypatch.setattr(forwarder.appends, "REQUEST_MAX_ROWS", 10)
    sink = DefaultStreamSink(bench.settings(BIGQUERY_WRITE_METHOD="storage_default"))
    encode = RequestEncoder.rows
    calls = [0]

    def when_the_call_has_ended(self: RequestEncoder, rows: Iterable[Reading]) -> list[bytes]:
        calls[0] += 1
        if calls[0] == 2:
            appender = sink._calls._appender  # noqa: SLF001 - whose end is awaited
            assert appender is not None
            appender._reader.join(10)  # noqa: SLF001 - the same
        return encode(self, rows)

    monkeypatch.setattr(RequestEncoder, "rows", when_the_call_has_ended)
    bench.api.faults.cut()
    delivery = sink.deliver(readings(30))
    assert delivery.retry == readings(30)
    delivered(sink, delivery.retry)
    sink.close()
    assert set(bench.seqs()) == set(range(1, 31))


@pytest.mark.parametrize("same", [True, False])
def test_a_restored_copy_of_the_files_loses_nothing_and_counts_what_repeats(
    bench: Bench, *, same: bool
) -> None:
    rows = readings(10)
    with bench.sink() as sink:
        delivered(sink, rows)
        bench.settle(10)
    edit(bench.state.path, "UPDATE append_stream SET next_offset = 4")
    edit(bench.state.path, "UPDATE cursor SET seq = 4")
    again = rows[4:] if same else others(rows[4:])
    with bench.sink() as sink:
        for part in (again[:4], again[4:]):
            delivered(sink, part)
            bench.settle(part[-1][0])
    assert bench.possibly_repeated() == 6
    if same:
        assert Counter(bench.seqs()) == Counter({n: 1 + (n > 4) for n in range(1, 11)})
    else:
        assert arrived_others(bench) == 6


def test_a_full_disk_does_not_bring_the_old_spools_cuts_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = readings(30)
    interrupted(bench, rows)

    def full(*_: object) -> None:
        raise DiskFullError("the disk is full")

    with bench.sink(epoch="another") as sink:
        with monkeypatch.context() as patch:
            patch.setattr(AppendJournal, "begin_stream", full)
            assert sink.deliver(others(rows)).retry == others(rows)
        delivered(sink, others(rows))
    assert arrived_others(bench) == 30
    assert bench.possibly_repeated() == 30


def test_what_was_left_out_of_the_old_spool_is_another_reading_in_the_new_one(
    bench: Bench,
) -> None:
    rows = readings(30)
    bench.api.faults.poison = lambda row: row["seq"] == 7
    with bench.sink() as sink:
        assert len(sink.deliver(rows).dead) == 1
    bench.api.faults.clear()
    with bench.sink(epoch="another") as sink:
        delivered(sink, others(rows))


def test_an_error_that_is_newer_than_the_library_is_no_bug_of_ours() -> None:
    status = status_pb2.Status(code=3, message="x")
    number = types.StorageError.pb()(code=99)
    status.details.add().Pack(number)
    assert storage_error(status) == "STORAGE_ERROR_99"


def test_a_changed_table_needs_no_right_on_the_old_one(bench: Bench) -> None:
    rows = readings(20)
    interrupted(bench, rows[:10])
    bench.tables.create_table("p-1.d.other")
    bench.api.faults.abort(
        grpc.StatusCode.PERMISSION_DENIED, "not yours", times=None, calls={"FinalizeWriteStream"}
    )
    with bench.sink(BIGQUERY_TABLE="other") as sink:
        delivered(sink, rows)
    assert bench.seqs("p-1.d.other") == list(range(1, 21))
    assert bench.possibly_repeated() == 10


def test_a_row_that_reads_well_again_is_not_passed_for_delivered(bench: Bench) -> None:
    """It failed its checksum when the cut was made, and the crash came before it was buried."""
    rows = readings(30)
    interrupted(bench, [row for row in rows if row[0] != 5])
    with bench.sink() as sink:
        delivered(sink, rows)
    assert set(bench.seqs()) == set(range(1, 31))
    assert bench.possibly_repeated() == 29


def test_new_streams_that_are_refused_at_once_are_not_made_without_end(bench: Bench) -> None:
    rows = readings(10)
    bench.api.faults.refuse("NOT_FOUND", times=None)
    with bench.sink() as sink:
        delivery = sink.deliver(rows)
        assert delivery.retry == rows
        assert delivery.fault is not None
        assert delivery.fault.kind is FaultKind.TRANSIENT
        assert bench.api.streams.created <= 3
        bench.api.faults.clear()
        delivered(sink, rows)


def test_an_answer_without_a_result_confirms_nothing() -> None:
    answer = types.AppendRowsResponse.pb()()
    refusal = refusal_of(answer, None)
    assert refusal is not None
    assert refusal.meaning is Meaning.FAULT


def test_rows_are_not_blamed_while_the_service_learns_of_a_mended_table(bench: Bench) -> None:
    rows = readings(40)
    with bench.sink() as sink:
        delivered(sink, rows[:10])
        bench.settle(10)
        bench.tables.add_column(TABLE, Column("unit", "STRING", "REQUIRED"))
        held = sink.deliver(rows[10:])
        assert held.fault is not None
        assert held.fault.kind is FaultKind.HOLD
        bench.tables.drop_column(TABLE, "unit")
        bench.api.faults.poison = lambda _: True  # it has not heard of it yet
        delivery = sink.deliver(rows[10:])
        assert (delivery.retry, delivery.dead) == (rows[10:], [])
        bench.api.faults.clear()
        delivered(sink, rows[10:])
    assert bench.seqs() == list(range(1, 41))
