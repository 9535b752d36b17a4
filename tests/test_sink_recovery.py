"""A sink's damaged file: what its new one begins with, and what it must not believe."""

import errno
import os
from pathlib import Path

import pytest

from spool import (
    LOGGED,
    CorruptFileError,
    DeadLetter,
    Settlement,
    SinkFile,
    SinkState,
    SpoolWriter,
    StorageFaultError,
    UnreadableFileError,
    set_aside,
    sink_path,
    spool_path,
)
from spool.setaside import LASTING_S, LASTING_STARTS, SUSPICION_S, confirmed, lasting, readable
from spool.sinkrecovery import RESTORED
from tests.test_spool_sinkstate import dead, row
from tests.test_spool_writer import edit, look, new_reading

SINK = "bigquery"
ROWS = 20
SETTLED = 12


@pytest.fixture
def epoch(tmp_path: Path) -> str:
    """A spool, a sink that has settled a part of it, and the collector's snapshot of that."""
    writer = SpoolWriter.open(tmp_path)
    writer.append([new_reading(n) for n in range(1, ROWS + 1)], [], {})
    state = SinkState.open(tmp_path, SINK)
    state.settle(Settlement(writer.epoch, SETTLED, SETTLED - 2, [dead(3), dead(8)]))
    state.close()
    seen = SinkFile(tmp_path, SINK, enabled=True)
    writer.write_progress([seen.read()])
    seen.close()
    writer.close()
    return writer.epoch


def damage(directory: Path) -> Path:
    return set_aside(sink_path(directory, SINK))


def test_the_cursor_and_the_counters_are_those_of_the_snapshot(tmp_path: Path, epoch: str) -> None:
    damaged = damage(tmp_path)
    state = SinkState.open(tmp_path, SINK)
    assert state.position(epoch) == SETTLED
    assert state.counters() == {
        "delivered": SETTLED - 2,
        "dead_lettered": 2,
        "dropped": 0,
        LOGGED: 0,
        RESTORED: 1,
    }
    assert state.restored is not None
    assert (state.restored.damaged, state.restored.seq) == (damaged, SETTLED)
    state.close()
    again = SinkState.open(tmp_path, SINK)
    assert again.restored is None, "said once"
    assert again.position(epoch) == SETTLED


def test_dead_letters_are_copied_but_those_that_will_die_again(tmp_path: Path, epoch: str) -> None:
    state = SinkState.open(tmp_path, SINK)
    state.settle(Settlement(epoch, 15, 2, [DeadLetter(row(14), "invalid", "since the snapshot")]))
    state.settle(Settlement("an-earlier-epoch", 1, 0, [dead(1)]))
    state.close()
    damage(tmp_path)
    state = SinkState.open(tmp_path, SINK)
    there = look(state.path, "SELECT epoch, seq FROM dead_letter ORDER BY id")
    assert there == [(epoch, 3), (epoch, 8), ("an-earlier-epoch", 1)]
    assert state.restored is not None
    assert state.restored.dead_letters == 3
    # Refused once more, it is one dead letter, and counted.
    state.settle(Settlement(epoch, 15, 2, [dead(14)]))
    counters = state.counters()
    assert sum(counters[n] for n in ("delivered", "dead_lettered", "dropped")) == 15


def test_without_a_snapshot_delivery_begins_at_the_first_row(tmp_path: Path, epoch: str) -> None:
    edit(spool_path(tmp_path), "DELETE FROM sink_progress")
    damage(tmp_path)
    state = SinkState.open(tmp_path, SINK)
    assert (state.position(epoch), state.known_epoch()) == (0, "")
    assert state.counters() == {RESTORED: 1}
    assert state.restored is not None


def test_a_snapshot_beyond_the_spools_end_is_not_believed(tmp_path: Path, epoch: str) -> None:
    edit(spool_path(tmp_path), "UPDATE sink_progress SET cursor_seq = 21")
    damage(tmp_path)
    assert SinkState.open(tmp_path, SINK).position(epoch) == 0


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 1000])
def test_a_missing_or_damaged_spool_is_no_obstacle(
    tmp_path: Path, epoch: str, content: bytes | None
) -> None:
    damage(tmp_path)
    for path in tmp_path.glob("spool.db*"):
        path.unlink()
    if content is not None:
        spool_path(tmp_path).write_bytes(content)
    assert SinkState.open(tmp_path, SINK).position(epoch) == 0


def test_garbage_in_the_damaged_file_is_no_obstacle(tmp_path: Path, epoch: str) -> None:
    damage(tmp_path).write_bytes(b"garbage" * 1000)
    state = SinkState.open(tmp_path, SINK)
    assert state.position(epoch) == SETTLED
    assert look(state.path, "SELECT count(*) FROM dead_letter") == [(0,)]


def test_a_file_that_was_never_set_aside_begins_at_the_first_row(
    tmp_path: Path, epoch: str
) -> None:
    """Somebody who removes the file wants everything sent again."""
    for path in tmp_path.glob(f"{SINK}.db*"):
        path.unlink()
    state = SinkState.open(tmp_path, SINK)
    assert (state.position(epoch), state.restored) == (0, None)


def test_an_emptied_file_is_damaged_and_its_log_is_kept(tmp_path: Path, epoch: str) -> None:
    path = sink_path(tmp_path, SINK)
    path.write_bytes(b"")
    with pytest.raises(CorruptFileError, match="emptied"):
        SinkState.open(tmp_path, SINK)
    edit(spool_path(tmp_path), "DELETE FROM sink_progress")
    log = path.with_name(f"{path.name}-wal")
    log.write_bytes(b"the log")
    with pytest.raises(CorruptFileError, match="emptied"):
        SinkState.open(tmp_path, SINK)
    assert log.read_bytes() == b"the log"
    log.unlink()
    # As a crash leaves it between making the file and its first page.
    assert SinkState.open(tmp_path, SINK).position(epoch) == 0


def test_damage_is_believed_when_it_is_met_again_soon(tmp_path: Path) -> None:
    damage_of = CorruptFileError("", sink_path(tmp_path, SINK))
    assert not confirmed(damage_of, 1_000.0)
    assert confirmed(damage_of, 1_000.0 + SUSPICION_S)
    assert list(tmp_path.iterdir()) == [], "the next suspicion is a new one"
    assert not confirmed(damage_of, 2_000.0)
    assert not confirmed(damage_of, 2_001.0 + SUSPICION_S), "that one has passed"
    assert not confirmed(damage_of, 1_000.0), "a clock that was set back proves nothing"


def test_a_mark_that_cannot_be_read_is_no_confirmation(tmp_path: Path) -> None:
    path = sink_path(tmp_path, SINK)
    path.with_name(f"{path.name}.suspected").write_text("garbage", encoding="ascii")
    assert not confirmed(CorruptFileError("", path), 1_000.0)
    assert confirmed(CorruptFileError("", path), 1_001.0)


@pytest.fixture
def fault(tmp_path: Path) -> UnreadableFileError:
    return UnreadableFileError("SQLITE_IOERR_CORRUPTFS", sink_path(tmp_path, SINK))


def starts(fault: UnreadableFileError, first_s: float, every_s: float, count: int) -> list[bool]:
    """Return what is said at so many starts that all end by the fault."""
    return [lasting(fault, first_s + n * every_s) for n in range(count)]


def test_what_cannot_be_read_is_believed_after_many_starts_over_minutes(
    fault: UnreadableFileError,
) -> None:
    quick = int(LASTING_S / 6)
    assert starts(fault, 0.0, 6.0, quick) == [False] * quick
    assert lasting(fault, LASTING_S)
    readable(fault.path)
    slow = LASTING_S / 3
    assert starts(fault, 10_000.0, slow, LASTING_STARTS - 1) == [False] * (LASTING_STARTS - 1)
    assert lasting(fault, 10_000.0 + LASTING_STARTS * slow)


@pytest.mark.parametrize(
    "interrupted_by", ["a good start", "a pause", "an earlier clock", "garbage"]
)
def test_what_could_be_read_meanwhile_begins_anew(
    fault: UnreadableFileError, interrupted_by: str
) -> None:
    assert not any(starts(fault, 1_000.0, LASTING_S / 20, 20))
    now_s = 1_000.0 + LASTING_S
    if interrupted_by == "a good start":
        readable(fault.path)
    elif interrupted_by == "a pause":
        now_s += SUSPICION_S
    elif interrupted_by == "an earlier clock":
        now_s = 900.0
    else:
        fault.path.with_name(f"{fault.path.name}.unreadable").write_bytes(b"\xff 1 2")
    assert not any(starts(fault, now_s, LASTING_S / 20, 20))
    assert lasting(fault, now_s + LASTING_S)


def test_nothing_is_believed_of_a_disk_that_takes_no_writes(
    fault: UnreadableFileError, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(starts(fault, 1_000.0, LASTING_S / 20, 20))

    def refused(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refused)
        with pytest.raises(StorageFaultError, match=r"CORRUPTFS; to note that in .* failed"):
            lasting(fault, 1_000.0 + LASTING_S)


def test_what_is_set_aside_says_nothing_of_the_next(fault: UnreadableFileError) -> None:
    assert not any(starts(fault, 1_000.0, LASTING_S / 20, 20))
    fault.path.touch()
    set_aside(fault.path)
    assert not lasting(fault, 1_000.0 + LASTING_S)
