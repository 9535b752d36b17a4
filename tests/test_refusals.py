"""A service that refuses every row is held; rows at fault amid healthy ones are dead letters."""

import json
import random
from collections.abc import Iterator, Sequence

import pytest

from forwarder.appendcalls import AppendCalls
from forwarder.appends import Meaning, Refusal, cut_rows, leave_out
from forwarder.faults import FaultError
from forwarder.refusals import REFUSED_ALONE_MAX, REFUSED_AMID_MAX, RefusalRun
from forwarder.sink import Delivery, FaultKind
from lifecycle import load_settings
from spool import DeadLetter, Reading
from tests.test_sink_contract import (
    SERVICES,
    BigQuery,
    PubSub,
    Service,
    Storage,
    check,
    check_order,
    deliver_to_the_end,
    readings,
)

REMEDIES = {
    "pubsub": "gcloud pubsub topics describe readings --project=p-1",
    "bigquery": "bq show --schema p-1:d.readings",
}

STORAGE_ENVIRONMENT = {
    "APP_ENV": "DEV",
    "GCP_PROJECT_ID": "p-1",
    "BIGQUERY_DATASET": "d",
    "BIGQUERY_TABLE": "readings",
    "PUBSUB_ENABLED": "false",
}


@pytest.fixture(params=SERVICES)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    made = SERVICES[request.param]()
    yield made
    made.close()


def deliver(service: Service, rows: Sequence[Reading]) -> Delivery:
    delivery = service.sink.deliver(rows)
    check(service, rows, delivery)
    return delivery


def held(service: Service, delivery: Delivery, rows: Sequence[Reading]) -> None:
    """Hold a delivery to a hold that gives up no row and says what to do."""
    assert delivery.dead == []
    assert delivery.retry == list(rows)
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.HOLD
    assert "every row is refused" in delivery.fault.problem
    assert REMEDIES[service.sink.name] in delivery.fault.remedy
    assert "REFUSED_POLICY=dead-letter" in delivery.fault.remedy


@pytest.mark.parametrize("name", SERVICES)
def test_an_operator_may_choose_to_put_aside_what_is_refused(name: str) -> None:
    service = SERVICES[name](REFUSED_POLICY="dead-letter")
    rows = readings(2 * REFUSED_AMID_MAX)
    poison(service, rows[:-1])
    assert deliver_to_the_end(service, rows) == [row[0] for row in rows[:-1]]
    assert service.arrived() == [rows[-1][0]]
    service.close()


def poison(service: Service, rows: Sequence[Reading]) -> None:
    """Have these rows refused, and no others."""
    if isinstance(service, PubSub):
        ids = {row[1].hex() for row in rows}
        service.fake.faults.poison = lambda data: json.loads(data)["event_id"] in ids
    else:
        service.poison({row[0] for row in rows})


@pytest.mark.parametrize("count", [REFUSED_ALONE_MAX + 1, 700, 2500])
def test_a_backlog_of_which_every_row_is_refused_is_held_and_goes_on_once_that_is_mended(
    service: Service, count: int
) -> None:
    rows = readings(count)
    poison(service, rows)
    for _ in range(3):
        held(service, deliver(service, rows), rows)
    service.mend()
    assert deliver_to_the_end(service, rows) == []
    assert sorted(service.arrived()) == [row[0] for row in rows]
    check_order(service, rows)


def test_readings_that_come_one_by_one_are_held_after_a_small_number_of_dead_letters(
    service: Service,
) -> None:
    rows = readings(REFUSED_ALONE_MAX + 5)
    poison(service, rows)
    for row in rows[:REFUSED_ALONE_MAX]:
        delivery = deliver(service, [row])
        assert ([letter.row for letter in delivery.dead], delivery.retry) == ([row], [])
    waiting, last = rows[REFUSED_ALONE_MAX], rows[-1]
    for _ in range(3):
        held(service, deliver(service, [waiting]), [waiting])
    service.mend()
    assert deliver(service, [waiting]) == Delivery()
    # One that was accepted ends the run.
    poison(service, [last])
    assert [letter.row for letter in deliver(service, [last]).dead] == [last]


def test_a_hold_ends_although_its_first_rows_were_at_fault_themselves(service: Service) -> None:
    rows = readings(600)
    poison(service, rows)
    for row in rows[:REFUSED_ALONE_MAX]:
        assert deliver(service, [row]).dead
    rest = rows[REFUSED_ALONE_MAX:]
    held(service, deliver(service, rest), rest)
    guilty = rest[: REFUSED_ALONE_MAX - 1]
    poison(service, guilty)
    assert deliver_to_the_end(service, rest) == [row[0] for row in guilty]
    assert len(service.arrived()) == len(rest) - len(guilty)
    check_order(service, rest)


@pytest.mark.parametrize("share", [0.03, 0.3, 0.6])
def test_many_rows_at_fault_amid_good_ones_are_dead_letters_and_no_other(
    service: Service, share: float
) -> None:
    dice = random.Random(7)  # noqa: S311 - a test's dice
    rows = readings(1500)
    guilty = [row for row in rows if dice.random() < share]
    poison(service, guilty)
    assert deliver_to_the_end(service, rows) == [row[0] for row in guilty]
    assert sorted(service.arrived()) == [row[0] for row in rows if row not in guilty]
    check_order(service, rows)


@pytest.mark.parametrize("first", [0, 300, 850])
def test_a_burst_of_bad_readings_is_buried_wherever_it_stands(service: Service, first: int) -> None:
    rows = readings(1000, sites=["S1"])
    guilty = rows[first : first + (150 if first else REFUSED_ALONE_MAX)]
    poison(service, guilty)
    assert deliver_to_the_end(service, rows) == [row[0] for row in guilty]
    check_order(service, rows)


def test_a_schema_that_changes_in_the_middle_of_a_delivery_holds_the_rest(
    service: Service,
) -> None:
    rows = readings(5000, sites=["S1"])
    poison(service, rows[2000:])
    delivery = deliver(service, rows)
    held(service, delivery, rows[2000:])
    service.mend()
    assert deliver_to_the_end(service, delivery.retry) == []
    check_order(service, rows)


SEARCH_MAX_REQUESTS = 4 * REFUSED_ALONE_MAX
"""The rows that are tried alone, and the halves on the way to them; each row alone would be
thousands."""


@pytest.mark.parametrize("service", ["pubsub"], indirect=True)
def test_a_topic_that_refuses_all_is_not_searched_to_the_end(service: Service) -> None:
    assert isinstance(service, PubSub)
    requests = []

    def refuse(data: bytes) -> bool:
        requests.append(data)  # the first message of each is enough for the fake
        return True

    service.fake.faults.poison = refuse
    rows = readings(2500)
    held(service, deliver(service, rows), rows)
    assert REFUSED_ALONE_MAX < len(requests) < SEARCH_MAX_REQUESTS


@pytest.mark.parametrize("service", ["insert_all"], indirect=True)
def test_a_table_that_refuses_whole_requests_is_not_searched_to_the_end(service: Service) -> None:
    assert isinstance(service, BigQuery)
    service.fake.faults.status(400, "invalid", "this table takes no rows", times=None)
    rows = readings(500)
    delivery = deliver(service, rows)
    held(service, delivery, rows)
    assert delivery.fault is not None
    assert "this table takes no rows" in delivery.fault.problem
    assert REFUSED_ALONE_MAX < service.fake.faults.fired < SEARCH_MAX_REQUESTS
    service.mend()
    assert deliver_to_the_end(service, rows) == []


@pytest.mark.parametrize("service", ["storage", "storage_default"], indirect=True)
def test_a_service_that_names_only_the_first_bad_row_of_each_append_is_held_too(
    service: Service,
) -> None:
    assert isinstance(service, Storage)
    service.fake.faults.incomplete = True  # until it is mended
    rows = readings(300)
    poison(service, rows)
    delivery = deliver(service, rows)
    assert len(delivery.dead) == REFUSED_ALONE_MAX
    assert delivery.fault is not None
    assert delivery.fault.kind is FaultKind.HOLD
    left = delivery.retry
    for _ in range(3):
        delivery = deliver(service, left)
        held(service, delivery, left)
    guilty = [*left[5:7], left[-1]]
    poison(service, guilty)
    assert deliver_to_the_end(service, left) == [row[0] for row in guilty]


@pytest.mark.parametrize(
    ("named", "buried"),
    [(range(1), 20), (range(100), 200), (range(200), 200), (range(201), 0), (range(2000), 0)],
)
def test_a_list_of_bad_rows_that_may_be_cut_off_is_believed_for_a_while(
    named: range, buried: int
) -> None:
    """The write API says of its list that it may not be complete, because of its size."""
    calls = AppendCalls(load_settings(STORAGE_ENVIRONMENT, "gate-1"))
    rows = readings(2000)
    refusal = Refusal(Meaning.ROWS, "INVALID_ARGUMENT", "", [(i, "no good") for i in named])
    dead: list[DeadLetter] = []

    def bury() -> None:
        while True:
            (append,) = cut_rows(rows[len(dead) :], 0)
            calls.blame_rows(append, refusal)
            dead.extend(leave_out(append, refusal))

    for _ in range(3):  # deliveries of the same rows
        calls.refusals.begin()
        with pytest.raises(FaultError, match=r"every row is refused.*no good.*bq show --schema"):
            bury()
    assert len(dead) == buried
    calls.close()


@pytest.mark.parametrize("named", [[1], [0, 2], [1999], [*range(1000), 1500]])
def test_a_row_that_was_passed_over_in_the_list_was_found_good(named: list[int]) -> None:
    calls = AppendCalls(load_settings(STORAGE_ENVIRONMENT, "gate-1"))
    (append,) = cut_rows(readings(2000), 0)
    refusal = Refusal(Meaning.ROWS, "INVALID_ARGUMENT", "", [(i, "no good") for i in named])
    for _ in range(REFUSED_AMID_MAX + 1):
        calls.blame_rows(append, refusal)
    calls.close()


def test_a_run_goes_on_from_one_delivery_to_the_next_and_ends_with_an_accepted_row() -> None:
    run = RefusalRun()

    def after(rows: int) -> tuple[bool, bool]:
        run.refused(rows)
        return run.of_all, run.enough

    for _ in range(REFUSED_ALONE_MAX):
        run.begin()
        assert after(1) == (False, False)
    for _ in range(3):
        run.begin()
        # A longer batch is searched for a row that is accepted.
        assert after(1) == (True, False)
    run.accepted()
    assert after(REFUSED_AMID_MAX) == (False, False)
    assert after(1) == (True, True)
    run.begin()
    # The service was well in the delivery before.
    assert after(REFUSED_ALONE_MAX) == (False, False)
    # And it was held, so this one searches further for a row that is accepted.
    assert after(1) == (True, False)
    assert after(2 * REFUSED_AMID_MAX) == (True, True)
