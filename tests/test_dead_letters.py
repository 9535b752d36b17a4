"""Dead letters are counted in the transaction that keeps them; only an operator deletes them."""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlite_utils import Database, Migrations

from spool import DeadLetter, Gap, Settlement, SinkState, StorageFaultError, sink_path
from spool import dead_letters as module
from spool.connection import open_owner
from spool.dead_letters import DETAIL_MAX_CHARS, DISCARD_STEP_ROWS
from spool.migrations import _run_script, migrate
from spool.sinkstate import GAP_ROWS_MAX, SINK_FORMAT
from tests.test_spool_sinkstate import EPOCH, dead, row
from tests.test_spool_writer import edit, look

second_format = Migrations("sink")


@second_format(name="1")
def _first(db: Database) -> None:
    _run_script(db, "sink_1.sql", 1)


@second_format(name="2")
def _second(db: Database) -> None:
    _run_script(db, "sink_2.sql", 2)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[SinkState]:
    opened = SinkState.open(tmp_path, "pubsub")
    yield opened
    opened.close()


def keep(state: SinkState, first: int, last: int) -> None:
    """Settle rows that are all dead letters."""
    state.settle(Settlement(EPOCH, last, 0, [dead(seq) for seq in range(first, last + 1)]))


def counted(state: SinkState) -> tuple[int, int]:
    usage = state.dead_letters.usage()
    return usage.kept, usage.kept_bytes


def there(state: SinkState) -> tuple[object, ...]:
    """Return what is counted by reading all of them."""
    return look(state.path, "SELECT count(*), coalesce(sum(kept_bytes), 0) FROM dead_letter")[0]


def assert_adds_up(state: SinkState) -> None:
    counters = state.counters()
    kept, _ = counted(state)
    assert counters.get("dead_lettered", 0) == kept + counters.get("dead_letters_discarded", 0)
    assert counted(state) == there(state)


def test_what_they_take_is_counted_with_them(state: SinkState) -> None:
    assert counted(state) == (0, 0)
    keep(state, 1, 3)
    assert counted(state)[0] == 3
    assert_adds_up(state)
    keep(state, 3, 4)  # the third is there already
    assert counted(state)[0] == 4
    assert_adds_up(state)


def test_the_count_is_about_what_the_file_takes(state: SinkState) -> None:
    def pages() -> int:
        (page_bytes,), (count,) = (
            look(state.path, f"PRAGMA {name}")[0] for name in ("page_size", "page_count")
        )
        return int(str(page_bytes)) * int(str(count))

    empty = pages()
    for first in range(1, 4001, 500):
        letters = [dead(seq) for seq in range(first, first + 500)]
        state.settle(Settlement(str(uuid4()), first + 499, 0, letters))
    _, kept_bytes = counted(state)
    assert 0.7 < kept_bytes / (pages() - empty) < 1.1


def test_a_settlement_that_fails_counts_nothing(state: SinkState) -> None:
    keep(state, 1, 2)
    before = counted(state)
    with pytest.raises(StorageFaultError):
        state.settle(Settlement(EPOCH, 9, 5, [dead(3)], [Gap(7, 2, "backwards")]))
    assert counted(state) == before
    assert_adds_up(state)


def test_they_are_counted_across_a_kill_and_never_by_reading_them(tmp_path: Path) -> None:
    state = SinkState.open(tmp_path, "pubsub")
    keep(state, 1, 5)
    edit(state.path, "UPDATE dead_letter_usage SET kept = 77")
    # No close, as after SIGKILL.
    again = SinkState.open(tmp_path, "pubsub")
    assert counted(again)[0] == 77, "a start reads one number"


def test_a_file_of_an_older_format_is_counted_once(tmp_path: Path) -> None:
    path = sink_path(tmp_path, "bigquery")
    conn = open_owner(path)
    migrate(conn, second_format, lambda _: None)
    values = [
        (0, "invalid", "détail", EPOCH, *row(seq)) for seq in range(1, 301)
    ]  # as that release wrote them
    conn.executemany(
        "INSERT INTO dead_letter (died_us, reason, detail, epoch, seq, event_id, received_us, "
        "timestamp_us, site_code, sensor_id, pi_tag, value, topic, payload, crc) "
        "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        values,
    )
    conn.execute("INSERT INTO counter VALUES ('dead_lettered', 300)")
    conn.close()
    state = SinkState.open(tmp_path, "bigquery")
    assert counted(state)[0] == 300
    assert_adds_up(state)
    assert look(path, "PRAGMA user_version") == [(SINK_FORMAT,)]
    assert len(look(path, "SELECT * FROM dead_letters")) == 300
    state.settle(Settlement(EPOCH, 301, 0, [dead(301)]))
    assert_adds_up(state)
    state.close()


def test_only_those_that_were_seen_are_discarded_and_the_sums_add_up(state: SinkState) -> None:
    keep(state, 1, 2 * DISCARD_STEP_ROWS + 10)
    (last_seen,) = look(state.path, "SELECT id FROM dead_letters WHERE seq = 2005")[0]
    before = look(state.path, "PRAGMA page_count")[0]
    assert state.dead_letters.discard(int(str(last_seen))) == 2005
    assert look(state.path, "SELECT min(seq), count(*) FROM dead_letters") == [(2006, 5)]
    assert_adds_up(state)
    assert state.counters()["dead_letters_discarded"] == 2005
    assert state.counters()["dead_lettered"] == 2010, "a total does not go down"
    assert look(state.path, "SELECT kept, dead_lettered, discarded FROM dead_letter_budget") == [
        (5, 2010, 2005)
    ]
    assert look(state.path, "PRAGMA page_count")[0] < before, "the space is handed back"
    assert look(state.path, "PRAGMA integrity_check") == [("ok",)]
    assert state.dead_letters.discard(int(str(last_seen))) == 0
    # A number is never given twice: what comes later is not what was asked to be discarded.
    state.dead_letters.discard(10**6)
    keep(state, 2011, 2011)
    assert look(state.path, "SELECT id > 2010 FROM dead_letters") == [(1,)]


def test_a_discard_that_is_cut_short_has_counted_what_it_deleted(
    state: SinkState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DISCARD_STEP_ROWS", 10)
    keep(state, 1, 30)
    steps = 0
    real = SinkState.transaction

    def fails_later(self: SinkState, operation: str):  # type: ignore[no-untyped-def]  # noqa: ANN202 - a context manager
        nonlocal steps
        steps += operation == "discard dead letters"
        if steps > 2:
            raise StorageFaultError("the disk")
        return real(self, operation)

    with monkeypatch.context() as patch:
        patch.setattr(SinkState, "transaction", fails_later)
        with pytest.raises(StorageFaultError):
            state.dead_letters.discard(10**6)
    assert counted(state)[0] == 10
    assert_adds_up(state)


def test_the_view_shows_how_much_of_the_limit_is_used(tmp_path: Path) -> None:
    state = SinkState.open(tmp_path, "pubsub", 100_000)
    keep(state, 1, 40)
    _, kept_bytes = counted(state)
    assert look(
        state.path, "SELECT kept, kept_bytes, max_bytes, percent FROM dead_letter_budget"
    ) == [(40, kept_bytes, 100_000, round(kept_bytes / 1000, 1))]
    state.close()
    state = SinkState.open(tmp_path, "pubsub", 200_000)
    assert look(state.path, "SELECT max_bytes FROM dead_letter_budget") == [(200_000,)]
    state.close()


def test_a_service_that_talks_too_much_is_cut_short(state: SinkState) -> None:
    state.settle(Settlement(EPOCH, 1, 0, [DeadLetter(row(1), "invalid", "x" * 10**6)]))
    ((detail,),) = look(state.path, "SELECT detail FROM dead_letters")
    assert len(str(detail)) == DETAIL_MAX_CHARS
    assert str(detail).endswith("x...")


def test_the_oldest_gaps_give_way_and_their_sum_stays(state: SinkState) -> None:
    many = [Gap(2 * n + 1, 2 * n + 1, "dropped") for n in range(GAP_ROWS_MAX + 5)]
    last = many[-1].last_seq
    state.settle(Settlement(EPOCH, last, last - len(many), [], many))
    assert look(state.path, "SELECT count(*), min(first_seq), max(last_seq) FROM gap") == [
        (GAP_ROWS_MAX, 11, last)
    ]
    assert state.counters()["dropped"] == len(many)
    assert state.counters()["gaps_forgotten"] == 5
    state.settle(Settlement(EPOCH, last + 1, 1))
    assert state.counters()["gaps_forgotten"] == 5


@settings(max_examples=40)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["keep", "deliver", "discard", "reopen"]), st.integers(1, 30)),
        max_size=25,
    )
)
def test_any_order_of_steps_adds_up(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    directory = tmp_path_factory.mktemp("sink")
    state = SinkState.open(directory, "pubsub")
    seq = delivered = discarded = died = 0
    for step, number in steps:
        if step == "keep":
            keep(state, seq + 1, seq + number)
            seq, died = seq + number, died + number
        elif step == "deliver":
            state.settle(Settlement(EPOCH, seq + number, number))
            seq, delivered = seq + number, delivered + number
        elif step == "discard":
            through = min(died, discarded + number)
            assert state.dead_letters.discard(through) == through - discarded
            discarded = through
        else:
            state = SinkState.open(directory, "pubsub")  # no close, as after SIGKILL
        assert_adds_up(state)
        counters = state.counters()
        assert counters.get("delivered", 0) + counters.get("dead_lettered", 0) == seq
        assert state.position(EPOCH) == seq
        assert counted(state)[0] == died - discarded
    state.close()
