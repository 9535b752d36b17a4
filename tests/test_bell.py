"""The collector rings after its commits, and forwarders that listen wake up at once."""

import errno
import select
from pathlib import Path

import pytest

import spool.bell
from forwarder.drain import POLL_ANNOUNCED_S, POLL_IDLE_S, Drain
from lifecycle import StopRequest, Watchdog
from spool import SinkState, SpoolReader, SpoolWriter, claim_environment
from spool.bell import BELL_FILE, Bell, Listener
from tests.test_drain import FakeStop, ScriptedSink, everything_delivered
from tests.test_spool_writer import new_reading


def heard(listener: Listener | SpoolReader) -> bool:
    return bool(select.select([listener], [], [], 0)[0])


def test_a_ring_is_heard_once_forgotten_and_heard_again(tmp_path: Path) -> None:
    bell = Bell.open(tmp_path)
    listener = Listener.open(tmp_path)
    listener.forget()
    assert not heard(listener)
    for _ in range(3):
        bell.ring()
    assert heard(listener)
    listener.forget()
    assert not heard(listener), "however many there were, they are one"
    bell.ring()
    assert heard(listener)
    bell.close()
    listener.close()


def test_a_commit_of_readings_rings_when_its_rows_can_be_read(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    reader = SpoolReader.open(tmp_path)
    assert reader.listen() == ""
    assert reader.changed()
    assert not heard(reader)
    writer.append([new_reading(1)], [], {})
    assert heard(reader)
    assert reader.changed()
    assert len(reader.read_after(0, 10, 10**6)) == 1
    assert not heard(reader), "looking forgets the rings that came before"
    writer.append([], [], {"received": 1})
    assert not heard(reader), "nobody is woken where there is nothing to deliver"
    reader.close()
    writer.close()


def test_the_bells_file_is_for_the_group_and_not_for_others(tmp_path: Path) -> None:
    SpoolWriter.open(tmp_path).close()
    assert (tmp_path / BELL_FILE).stat().st_mode & 0o777 & ~0o640 == 0


def test_a_bell_that_was_replaced_is_listened_to_anew(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    reader = SpoolReader.open(tmp_path)
    assert reader.listen() == ""
    (tmp_path / BELL_FILE).unlink()
    writer.close()
    writer = SpoolWriter.open(tmp_path)
    assert reader.listen() == ""
    reader.changed()
    writer.append([new_reading(1)], [], {})
    assert heard(reader)
    reader.close()
    writer.close()


def test_a_reader_closes_what_it_listened_with(tmp_path: Path) -> None:
    SpoolWriter.open(tmp_path).close()
    before = len([*Path("/proc/self/fd").iterdir()])
    for _ in range(5):
        reader = SpoolReader.open(tmp_path)
        assert reader.listen() == ""
        reader.close()
    assert len([*Path("/proc/self/fd").iterdir()]) == before


@pytest.mark.parametrize("trouble", ["no file", "no inotify left"])
def test_who_cannot_hear_looks_often_and_says_so_once(
    tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = SpoolWriter.open(tmp_path)
    claim_environment(writer, "LOCAL", [])
    if trouble == "no file":
        (tmp_path / BELL_FILE).unlink()
    else:

        def exhausted() -> int:
            raise OSError(errno.EMFILE, "too many open files")

        monkeypatch.setattr(spool.bell, "_new_inotify", exhausted)
    writer.append([new_reading(n) for n in range(3)], [], {})
    stop = drained(tmp_path, writer)
    assert POLL_IDLE_S in stop.waits
    assert POLL_ANNOUNCED_S not in stop.waits
    assert [r.message for r in caplog.records].count(
        next(r.message for r in caplog.records if "not announced" in r.message)
    ) == 1
    writer.close()


def test_who_hears_seldom_looks(tmp_path: Path) -> None:
    writer = SpoolWriter.open(tmp_path)
    claim_environment(writer, "LOCAL", [])
    writer.append([new_reading(n) for n in range(3)], [], {})
    stop = drained(tmp_path, writer)
    assert POLL_ANNOUNCED_S in stop.waits
    assert POLL_IDLE_S not in stop.waits
    writer.close()


def drained(directory: Path, writer: SpoolWriter) -> FakeStop:
    """Drain, and go on for some turns with nothing to do."""
    state = SinkState.open(directory, "pubsub")
    idle = [0]

    def enough() -> bool:
        idle[0] += state.position(writer.epoch) == writer.last_seq()
        return idle[0] > 200

    stop = FakeStop(enough)
    Drain(
        directory=directory,
        sink=ScriptedSink(everything_delivered),
        state=state,
        app_env="LOCAL",
        max_rate=0,
        stop=stop,
        watchdog=Watchdog(["a loop that never turns"], 1.0),
        clock=lambda: stop.now_s,
    ).run()
    state.close()
    return stop


def test_a_wait_ends_with_the_ring_and_with_the_wish_to_stop(tmp_path: Path) -> None:
    bell = Bell.open(tmp_path)
    listener = Listener.open(tmp_path)
    listener.forget()
    stop = StopRequest()
    bell.ring()
    assert not stop.wait(60.0, listener), "the ring ended it"
    listener.forget()
    stop.request("enough")
    assert stop.wait(60.0, listener)
    stop.close()
    listener.close()
    bell.close()
