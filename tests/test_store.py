"""What the writer thread takes is durable before it is acknowledged, in order, and once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import collector.store
from spool import (
    CorruptFileError,
    DiskFullError,
    SpoolWriter,
    StorageFaultError,
    spool_path,
)
from tests.collector_parts import (
    Fault,
    Logbook,
    Script,
    deliver_through,
    disk_full,
    garbage,
    logbook,
    message,
    read,
)
from tests.store_desk import Desk, desks, ids
from tests.test_spool_writer import look


@pytest.fixture
def book() -> Iterator[Logbook]:
    with logbook() as opened:
        yield opened


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Callable[..., Desk]]:
    with desks(tmp_path) as make:
        yield make


def test_what_several_reads_brought_is_one_transaction(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    d = desk()
    sent = [message(n) for n in range(1, 8)]
    d.inbox.put(read(*sent[:3]))
    d.inbox.put(read(*sent[3:4]))
    d.inbox.put(read(*sent[4:], generation=2))
    d.run()
    assert d.script.appends == [7]
    assert d.ids() == ids(sent)
    assert d.acked == [
        (1, [(1, 1), (1, 2), (1, 3)]),
        (1, [(1, 4)]),
        (2, [(1, 5), (1, 6), (1, 7)]),
    ]
    assert d.counters() == {"received": 7, "spooled": 7}
    assert book.lines() == []


def test_an_acknowledgement_is_handed_over_only_once_everybody_can_read_the_row(
    desk: Callable[..., Desk],
) -> None:
    seen: list[int] = []
    d: Desk = desk(on_ack=lambda: seen.append(len(d.rows()) + d.counters()["rejected"]))
    d.inbox.put(read(message(1), garbage(2)))
    d.inbox.put(read(message(3)))
    d.run()
    assert seen == [3, 3]


def test_a_group_has_a_limit_and_the_order_is_kept_over_groups(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector.store, "GROUP_MAX_MESSAGES", 4)
    d = desk()
    sent = [message(n) for n in range(1, 12)]
    for start in range(0, 11, 2):
        d.inbox.put(read(*sent[start : start + 2]))
    d.run()
    assert d.script.appends == [4, 4, 3]
    assert d.ids() == ids(sent)
    assert [ack for _, acks in d.acked for ack in acks] == [(1, n) for n in range(1, 12)]


def test_rejected_and_duplicate_messages_are_acknowledged_in_their_places(
    desk: Callable[..., Desk],
) -> None:
    d = desk()
    again = message(1, mid=4)
    d.inbox.put(read(message(1), garbage(2), message(3), again, message(5, qos=2)))
    d.run()
    assert d.acked == [(1, [(1, 1), (1, 2), (1, 3), (1, 4), (2, 5)])]
    assert d.ids() == ids([message(1), message(3), message(5)])
    rejected = look(spool_path(d.directory), "SELECT reason, payload FROM rejected_row")
    assert rejected == [("not_json", b"not json 2")]
    assert d.counters() | {"rejected_kept_bytes": 0} == {
        "received": 5,
        "spooled": 3,
        "duplicates": 1,
        "rejected": 1,
        "rejected_kept_bytes": 0,
    }


def test_what_came_with_qos_0_is_spooled_and_never_acknowledged(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    d = desk()
    d.inbox.put(read(message(1, qos=0), garbage(2, qos=0), message(1, qos=0)))
    d.inbox.put(read(message(3, qos=0), message(4), generation=2))
    d.run()
    assert d.acked == [(2, [(1, 4)])]
    assert d.ids() == ids([message(1, qos=0), message(3, qos=0), message(4)])
    assert d.counters()["qos0"] == 4
    assert len(book.lines("messages come with QoS 0")) == 1
    d.assert_adds_up()


def test_a_group_of_nothing_but_rejections_is_stored_and_acknowledged(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    d = desk()
    d.inbox.put(read(garbage(1), garbage(1), garbage(2)))
    d.run()
    assert d.acked == [(1, [(1, 1), (1, 1), (1, 2)])]
    assert d.rows() == []
    # The same garbage twice is two rejections: only what is spooled has duplicates.
    assert (d.counters()["rejected"], d.counters().get("duplicates")) == (3, None)
    (told,) = book.values("message rejected")
    assert told["reason"] == "not_json"
    assert told["look"] == "select * from rejected"
    d.assert_adds_up()


def test_duplicates_are_known_within_a_group_over_groups_and_over_a_restart(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector.store, "GROUP_MAX_MESSAGES", 3)
    d = desk()
    d.inbox.put(read(message(1), message(2), message(1)))
    d.inbox.put(read(message(2), message(3)))
    d.run()
    assert d.script.appends == [2, 1]
    assert d.counters() == {"received": 5, "spooled": 3, "duplicates": 2}
    later = desk()
    later.inbox.put(read(message(3, mid=9), message(4)))
    later.run()
    assert later.acked == [(1, [(1, 9), (1, 4)])]
    assert later.ids() == ids([message(n) for n in (1, 2, 3, 4)])
    assert later.counters() == {"received": 7, "spooled": 4, "duplicates": 3}


def test_a_dedup_window_of_zero_spools_everything(desk: Callable[..., Desk]) -> None:
    d = desk(dedup_window=0)
    d.inbox.put(read(message(1), message(1)))
    d.run()
    assert d.ids() == ids([message(1), message(1)])
    assert d.counters() == {"received": 2, "spooled": 2}


def test_another_site_in_the_payload_is_counted_and_told_once_and_so_are_retained_ones(
    desk: Callable[..., Desk], book: Logbook
) -> None:
    d = desk()
    d.inbox.put(read(message(1, site="S9"), message(2, site="S9"), message(3, retained=True)))
    d.run()
    counts = d.counters()
    assert (counts["site_mismatch"], counts["retained"], counts["spooled"]) == (2, 1, 3)
    (told,) = book.values("differs from the topic's")
    assert told["site_code"] == "S9"


def test_the_sinks_positions_ride_along_with_the_first_group(desk: Callable[..., Desk]) -> None:
    d = desk()
    deliver_through(d.directory, 0, d.writer.epoch)
    d.inbox.put(read(message(1)))
    d.run()
    # One with the group, and the last one at the end; none of its own in between.
    assert d.script.snapshots == 2
    shown = look(spool_path(d.directory), "SELECT sink, pending, state FROM backlog")
    assert shown == [("pubsub", 1, "unknown")]


def test_what_is_to_be_remembered_is_in_meta_after_the_next_turn(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.store.remember("mqtt_subscription", "first")
    d.store.remember("mqtt_subscription", "second")
    d.store.remember("other", "x")
    d.inbox.put(read(message(1)))
    d.run()
    assert d.on_disk.meta("mqtt_subscription") == "second"
    assert d.on_disk.meta("other") == "x"


def test_the_end_of_the_thread_leaves_no_log_behind(desk: Callable[..., Desk]) -> None:
    d = desk()
    d.inbox.put(read(message(1)))
    d.run()
    assert d.store.finished
    assert d.writer.wal_bytes() == 0
    assert not d.stop.requested


def test_the_log_is_worked_off_after_the_acknowledgement_and_its_failure_is_told(
    desk: Callable[..., Desk], book: Logbook, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = desk()
    acked_by_then = []

    def failing(_: SpoolWriter) -> None:
        acked_by_then.append(len(d.acked))
        raise StorageFaultError("checkpoint failed: disk I/O error")

    monkeypatch.setattr(SpoolWriter, "checkpoint_if_due", failing)
    d.inbox.put(read(message(1)))
    d.run()
    assert acked_by_then[0] == 1
    assert not d.stop.requested
    assert book.values("the write-ahead log cannot be worked off")


def test_damage_that_the_log_meets_ends_the_program_after_the_acknowledgement(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    d = desk()

    def failing(writer: SpoolWriter) -> None:
        raise CorruptFileError("checkpoint failed: malformed", writer.path)

    monkeypatch.setattr(SpoolWriter, "checkpoint_if_due", failing)
    d.inbox.put(read(message(1)))
    with pytest.raises(CorruptFileError):
        d.run()
    assert d.acked == [(1, [(1, 1)])]


@pytest.mark.parametrize("durable_share", [0.0, 1.0])
def test_a_failed_commit_is_never_acknowledged_and_ends_the_program(
    desk: Callable[..., Desk], durable_share: float
) -> None:
    script = Script()
    fault = Fault(StorageFaultError("append failed: disk I/O error"), durable_share)
    script.faults.extend([None, fault])
    d: Desk = desk(script=script, on_ack=lambda: d.inbox.put(read(message(2), message(3))))
    d.inbox.put(read(message(1)))
    d.begin()
    d.inbox.close()
    with pytest.raises(StorageFaultError, match="disk I/O error"):
        d.store.join()
    assert d.acked == [(1, [(1, 1)])]
    assert d.store.failure is fault.error
    assert (d.stop.requested, d.stop.from_outside) == (True, False)
    assert d.stop.reason == "the writer thread failed"
    assert script.openings == 1, "the next start finds out what is on the disk"
    # The broker sends again what was not acknowledged.
    later = desk()
    later.inbox.put(read(message(2, mid=12), message(3, mid=13), generation=1))
    later.run()
    assert later.ids() == ids([message(1), message(2), message(3)])
    assert later.acked == [(1, [(1, 12), (1, 13)])]
    later.assert_adds_up()


def test_what_waits_behind_a_failed_commit_is_neither_stored_nor_acknowledged(
    desk: Callable[..., Desk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collector.store, "GROUP_MAX_MESSAGES", 1)
    script = Script()
    script.faults.append(Fault(StorageFaultError("append failed")))
    d = desk(script=script)
    d.inbox.put(read(message(1)))
    d.inbox.put(read(message(2)))
    with pytest.raises(StorageFaultError):
        d.run()
    assert d.rows() == []
    assert d.acked == []


@pytest.mark.parametrize(
    "error",
    [
        CorruptFileError("the file is damaged", Path("spool.db")),
        ValueError("a bug"),
        KeyboardInterrupt(),
    ],
)
def test_whatever_ends_the_thread_is_raised_by_join_and_asks_for_the_stop(
    desk: Callable[..., Desk], error: BaseException
) -> None:
    def fail() -> None:
        raise error

    d = desk(on_ack=fail)
    d.inbox.put(read(message(1)))
    with pytest.raises(type(error)):
        d.run()
    assert d.store.failure is error
    assert d.store.finished
    assert d.stop.requested


def test_a_disk_that_fails_while_it_is_opened_again_ends_the_program(
    desk: Callable[..., Desk],
) -> None:
    script = Script()
    script.faults.append(disk_full())
    d = desk(script=script)
    script.opening_faults.append(StorageFaultError("open failed"))
    d.inbox.put(read(message(1)))
    with pytest.raises(StorageFaultError, match="open failed"):
        d.run()
    assert d.acked == []


def test_a_farewell_that_fails_takes_nothing_back(desk: Callable[..., Desk], book: Logbook) -> None:
    script = Script()
    d = desk(script=script, on_ack=lambda: script.progress_faults.append(DiskFullError("full")))
    d.inbox.put(read(message(1)))
    d.run()
    assert d.acked == [(1, [(1, 1)])]
    assert book.levels("could not tidy up before the end") == ["WARNING"]
