"""A table that was dropped and made again: which readings may be in the dead one is told."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from forwarder import bqservice, tablewatch
from forwarder.tablename import TableName
from tests.fakes.tables import Table, TableStore
from tests.test_poison import METHODS, World
from tests.test_sink_contract import TABLE, BigQuery, PubSub
from tests.test_spool_writer import look

LINE = "the table was dropped and made again"


@pytest.fixture(params=METHODS)
def world(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    monkeypatch.setattr(bqservice, "WATCH_EACH_S", 0.0)  # at each delivery
    made = World(request.param, tmp_path)
    yield made
    made.close()


def store(world: World) -> TableStore:
    assert not isinstance(world.service, PubSub)
    tables = world.service.fake if isinstance(world.service, BigQuery) else world.service.tables
    return tables.store


def deliver(world: World, count: int) -> None:
    world.add_healthy(count)
    world.run(lambda world: world.done)


def seqs(table: Table) -> list[int]:
    return sorted(int(str(row["seq"])) for batch in table.batches for row in batch())


def told(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [r.__dict__["fields"] for r in caplog.records if r.getMessage().startswith(LINE)]


def detail(world: World) -> str:
    return str(look(world.state.path, "SELECT detail FROM status")[0][0])


def test_rows_that_may_be_in_the_dead_table_are_told_with_the_way_to_send_them_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    deliver(world, 10)
    deliver(world, 10)
    assert told(caplog) == []
    dead = store(world).recreate(TABLE, lingers=True)
    deliver(world, 10)
    lines = told(caplog)
    assert lines, "noticed with the first delivery after it"
    # The service still writes to the dead table; what goes there is told as well.
    deliver(world, 10)
    store(world).catch_up(TABLE)
    deliver(world, 10)
    deliver(world, 10)
    lost = set(seqs(dead)) - set(range(1, 21))
    assert lost == set(range(21, 41)), "otherwise this test shows nothing"
    assert set(world.arrived()) == set(range(41, 61))
    line = told(caplog)[-1]
    first, last = int(str(line["first_seq"])), int(str(line["last_seq"]))
    assert first <= min(lost)
    assert last >= max(lost)
    assert first > 10, "what was there when the old table was last seen is not in doubt"
    assert "may be in the dead one" in world.sink.notice  # type: ignore[attr-defined]
    assert world.dead() == []
    _check_command(str(line["send_again"]), world, range(first, last + 1))


def _check_command(command: str, world: World, expected: range) -> None:
    """The part before bq is what a member of the group can run at once."""
    extract, load = command.split(" > again.ndjson && ")
    done = subprocess.run(extract, shell=True, check=True, capture_output=True, text=True)  # noqa: S602 - as an operator would
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["seq"] for row in rows] == list(expected)
    columns = store(world).table(TABLE).columns
    assert set(rows[0]) <= set(columns)
    assert {name for name, c in columns.items() if c.mode == "REQUIRED"} <= set(rows[0])
    assert rows[0]["value"] == 1.5
    assert load == "bq load --source_format=NEWLINE_DELIMITED_JSON p-1:d.readings again.ndjson"


def test_the_notice_stands_in_the_status_while_the_readings_are_in_the_spool(
    world: World,
) -> None:
    deliver(world, 10)
    store(world).recreate(TABLE)
    deliver(world, 10)
    deliver(world, 10)
    shown: list[str] = []

    def until(world: World) -> bool:
        shown.append(detail(world))
        return world.done

    world.add_healthy(1)
    world.run(until)
    assert any("dropped and made again" in text for text in shown)


def test_a_table_that_was_replaced_while_the_forwarder_was_down_is_noticed_at_its_start(
    world: World,
) -> None:
    deliver(world, 10)
    deliver(world, 10)
    known = json.loads(world.state.remembered("bigquery_table"))
    assert known["table"] == TABLE
    assert known["seq"] >= 10
    store(world).recreate(TABLE)
    # As after a restart: a service that knows nothing but what the file remembers.
    watch = tablewatch.TableWatch(_service(world).table, world.state, 24.0)
    assert watch.notice == ""
    assert watch.is_now(known["created_ms"] + 5, 20, 20)
    assert f"{known['seq'] + 1} to 20" in watch.notice
    again = tablewatch.TableWatch(_service(world).table, world.state, 24.0)
    assert again.notice == watch.notice, "it is remembered"
    later = tablewatch.TableWatch(_service(world).table, world.state, 24.0, wall=lambda: 9e9)
    assert later.notice == "", "and forgotten once the readings have left the spool"


def _service(world: World) -> bqservice.TableService:
    holder: object = getattr(world.sink, "_calls", world.sink)
    service = getattr(holder, "_service")  # noqa: B009 - what the sink looks with
    assert isinstance(service, bqservice.TableService)
    return service


def test_another_table_in_the_settings_is_no_table_that_was_replaced(world: World) -> None:
    deliver(world, 10)
    deliver(world, 10)
    other = TableName("p-1", "d", "other")
    watch = tablewatch.TableWatch(other, world.state, 24.0)
    assert not watch.is_now(1, 20, 20)
    assert watch.notice == ""


def test_the_write_stream_of_a_dead_table_is_given_up_with_what_was_on_its_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead table has those rows, and says so: they must go to the new one all the same."""
    monkeypatch.setattr(bqservice, "WATCH_EACH_S", 0.0)
    world = World("storage", tmp_path)
    deliver(world, 10)
    assert not isinstance(world.service, PubSub | BigQuery)
    streams = world.service.fake.streams
    world.service.fake.faults.lose_answer()
    store(world).recreate(TABLE, lingers=True)
    monkeypatch.setattr(bqservice, "WATCH_EACH_S", 1e9)
    _service(world)._watch_at = 1e18  # noqa: SLF001 - it is not looked at before the answer is lost
    world.add_healthy(10)

    def until(world: World) -> bool:
        # After the answer was lost: the rows are in the dead table, unconfirmed.
        store(world).catch_up(TABLE)
        _service(world)._watch_at = 0.0  # noqa: SLF001 - now
        return world.done

    world.run(until)
    assert sorted(world.arrived()) == list(range(11, 21))
    assert len(streams.names) == 2
    world.close()


def test_a_look_at_the_table_that_fails_stops_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bqservice, "WATCH_WAIT_S", 0.05)
    deliver(world, 10)
    assert not isinstance(world.service, PubSub)
    rest = world.service.fake if isinstance(world.service, BigQuery) else world.service.tables
    rest.faults.status(503, "backendError", times=2, calls={"tables.get"})
    rest.faults.hang(times=1, calls={"tables.get"})
    for _ in range(5):
        deliver(world, 10)
    assert sorted(world.arrived()) == list(range(1, 61))
    rest.faults.clear()
