"""Signs of life: who counts as running, silent, stopped or failed, also by a clock that was set."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spool import SinkState
from spool.beat import BEAT_S, FORWARDER_LIMIT_S, GONE_AFTER_S, LifeWatch, SeenBeat


@pytest.fixture
def state(tmp_path: Path) -> SinkState:
    state = SinkState.open(tmp_path, "pubsub")
    state.beat.begin("DEV")
    return state


def seen(state: SinkState) -> SeenBeat:
    with state.transaction("look") as conn:
        beat = SeenBeat.read(conn)
    assert beat is not None
    return beat


def after(beat: SeenBeat, seconds: float) -> int:
    return beat.beat_us + int(seconds * 1e6)


def test_a_living_process_may_be_silent_up_to_its_limit(state: SinkState) -> None:
    beat, watch = seen(state), LifeWatch()
    assert (beat.pid, beat.mode) == (os.getpid(), "DEV")
    assert watch.life(beat, after(beat, 1)) == "running"
    assert watch.life(beat, after(beat, FORWARDER_LIMIT_S)) == "running"
    assert watch.life(beat, after(beat, FORWARDER_LIMIT_S + 1)) == "silent"


@pytest.mark.parametrize("age_s", [GONE_AFTER_S + 1, -GONE_AFTER_S - 1])
def test_a_process_that_is_gone_is_silent_soon_whatever_the_clock_says(
    state: SinkState, age_s: float
) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ticks = Path(f"/proc/{child.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    with state.transaction("pretend") as conn:
        conn.execute("UPDATE beat SET pid = ?, start_ticks = ?", (child.pid, int(ticks[19])))
    beat, watch = seen(state), LifeWatch()
    assert watch.life(beat, after(beat, 1)) == "running"
    assert watch.life(beat, after(beat, age_s)) == "running"
    child.kill()
    child.wait()
    assert child.stdin is not None
    child.stdin.close()
    assert watch.life(beat, after(beat, age_s)) == "silent"


def test_where_proc_does_not_show_the_process_only_the_age_counts(state: SinkState) -> None:
    """As in another PID namespace."""
    with state.transaction("pretend") as conn:
        conn.execute("UPDATE beat SET pid = 4194303")
    beat, watch = seen(state), LifeWatch()
    assert watch.life(beat, after(beat, 1)) == "running"
    assert watch.life(beat, after(beat, GONE_AFTER_S + 1)) == "running"
    assert watch.life(beat, after(beat, FORWARDER_LIMIT_S + 1)) == "silent"


@pytest.mark.parametrize("end", ["stopped", "failed"])
def test_an_end_is_told_until_the_next_begin(state: SinkState, end: str) -> None:
    state.beat.end(end, "why\x1b[2J")  # type: ignore[arg-type]
    beat = seen(state)
    assert LifeWatch().life(beat, after(beat, 1)) == end
    assert beat.detail == r"why\x1b[2J"
    state.beat.begin("DEV")
    assert LifeWatch().life(seen(state), after(beat, 1)) == "running"


def test_one_is_due_after_a_while_and_at_once_when_the_clock_was_set(
    state: SinkState, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not _due(state)
    now_ns = time.time_ns()
    for step_s in (3 * BEAT_S, -3 * BEAT_S):
        monkeypatch.setattr(time, "time_ns", lambda step_s=step_s: now_ns + int(step_s * 1e9))
        assert _due(state)
        state.beat.turn()
        assert not _due(state)
        assert seen(state).beat_us == time.time_ns() // 1000


def _due(state: SinkState) -> bool:
    return state.beat.due
