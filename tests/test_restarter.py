"""The restarter: what is FATAL is started again with backoff, but for refused settings."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from xmlrpc.client import Fault

import pytest

from lifecycle.refusal import (
    SLOW_START_S,
    STILL_REFUSED_S,
    Refusal,
    examine,
    forget_refusal,
    note_refusal,
    read_refusal,
    still_refused,
)
from lifecycle.restarter import BACKOFF_MAX_S, Restarter, events

SETTINGS = "APP_ENV=LOCAL\n"


class Control:
    """Stands for supervisord's RPC interface: states are set by the test, starts are counted."""

    def __init__(self, **states: str) -> None:
        self.states = states
        self.started: list[str] = []
        self.fault: Exception | None = None

    def getAllProcessInfo(self) -> list[dict[str, object]]:  # noqa: N802 - supervisor's name
        return [
            {"name": name, "group": name, "statename": state, "spawnerr": ""}
            for name, state in self.states.items()
        ]

    def startProcess(self, name: str, wait: bool) -> bool:  # noqa: FBT001, N802 - the same
        assert not wait, "supervisord's tries take longer than an event may"
        self.started.append(name.partition(":")[2])
        if self.fault is not None:
            raise self.fault
        return True


class Bench:
    """A restarter, the time and the circumstances it sees."""

    def __init__(self, control: Control, run_dir: str = "") -> None:
        self.now_s = 1000.0
        self.present = "a"
        self.control = control
        self.restarter = Restarter(
            lambda: control, lambda: self.present, run_dir, lambda: self.now_s
        )

    def starts_over(self, seconds: int) -> list[int]:
        """Return after how many seconds a start was made, with a look every 5 s."""
        made = []
        for second in range(0, seconds, 5):
            before = len(self.control.started)
            self.restarter.turn()
            made += [second] * (len(self.control.started) - before)
            self.now_s += 5.0
        return made


def test_a_fatal_program_is_started_at_once_and_then_with_backoff() -> None:
    assert Bench(Control(collector="FATAL")).starts_over(150) == [0, 5, 15, 35, 65, 95, 125]
    assert BACKOFF_MAX_S == 30.0


def test_a_program_that_ran_again_is_started_at_once_the_next_time() -> None:
    bench = Bench(Control(collector="FATAL"))
    bench.starts_over(65)
    bench.control.states["collector"] = "RUNNING"
    bench.starts_over(5)
    bench.control.states["collector"] = "FATAL"
    assert bench.starts_over(10) == [0, 5]


@pytest.mark.parametrize(
    "state", ["STOPPED", "STARTING", "RUNNING", "BACKOFF", "STOPPING", "EXITED", "UNKNOWN"]
)
def test_only_what_is_fatal_is_started(state: str) -> None:
    bench = Bench(Control(collector=state, other="FATAL"))
    bench.starts_over(30)
    assert {*bench.control.started} == {"other"}


@pytest.mark.parametrize("fault", [Fault(20, "NO_FILE"), Fault(50, "SPAWN_ERROR")])
def test_a_start_that_supervisord_refuses_is_tried_again_and_stops_no_other(fault: Fault) -> None:
    bench = Bench(Control(collector="FATAL", other="FATAL"))
    bench.control.fault = fault
    assert bench.starts_over(10) == [0, 0, 5, 5]


@pytest.mark.parametrize("error", [ConnectionRefusedError(), Fault(6, "SHUTDOWN_STATE")])
def test_a_supervisord_that_does_not_answer_is_asked_again(error: Exception) -> None:
    answers: list[Exception] = [error]
    control = Control(collector="FATAL")

    def connect() -> Control:
        if answers:
            raise answers.pop()
        return control

    restarter = Restarter(connect, str, "")
    restarter.turn()
    assert control.started == []
    restarter.turn()
    assert control.started == ["collector"]


def test_a_refused_program_stays_fatal_until_the_circumstances_change(tmp_path: Path) -> None:
    bench = Bench(Control(collector="FATAL", other="FATAL"), str(tmp_path))
    note_refusal(str(tmp_path), "collector", "a", "APP_ENV: not set", 0.0)
    bench.starts_over(60)
    assert "collector" not in bench.control.started
    bench.present = "b"
    bench.control.started.clear()
    bench.starts_over(5)
    assert "collector" in bench.control.started
    note_refusal(str(tmp_path), "collector", "b", "APP_ENV: still not set", 0.0)
    bench.control.started.clear()
    bench.starts_over(60)
    assert "collector" not in bench.control.started


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"\xff\x00", b'{"fingerprint": 1}'])
def test_a_note_that_cannot_be_read_holds_nothing(garbage: bytes, tmp_path: Path) -> None:
    (tmp_path / "collector.refused").write_bytes(garbage)
    assert read_refusal(str(tmp_path), "collector") is None
    forget_refusal(str(tmp_path), "collector")
    assert not (tmp_path / "collector.refused").exists()


def test_a_note_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    note_refusal(str(tmp_path / "gone"), "collector", "a", "why", 0.0)
    assert "cannot note" in caplog.text
    note_refusal("", "collector", "a", "why", 0.0)
    assert read_refusal("", "collector") is None


Change = Callable[[Path], object]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (lambda _: None, False),
        (lambda d: (d / "env").write_text(SETTINGS + "# corrected\n"), True),
        (lambda d: os.utime(d / "env", (1, 1)), True),
        (lambda d: (d / "password").unlink(), True),
        (lambda d: (d / "spool" / "spool.db").rename(d / "moved"), True),
        (lambda d: (d / "spool" / "spool.db-wal").touch(), False),
        (lambda d: (d / "env").unlink(), True),
    ],
)
def test_what_counts_as_a_change(change: Change, differs: bool, tmp_path: Path) -> None:  # noqa: FBT001 - pytest passes it by name
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / "spool.db").touch()
    (tmp_path / "env").write_text(SETTINGS)
    environ = {
        "SLUICE_ENV_FILE": str(tmp_path / "env"),
        "SPOOL_DIR": str(tmp_path / "spool"),
        "MQTT_USERNAME": "gate",
        "MQTT_PASSWORD_FILE": str(tmp_path / "password"),
    }
    (tmp_path / "password").touch()
    before = examine(environ, "host")
    change(tmp_path)
    after = examine(environ, "host")
    assert (before.fingerprint != after.fingerprint) is differs


@pytest.mark.parametrize(("age_s", "still"), [(0.0, True), (STILL_REFUSED_S, False), (-5.0, False)])
def test_an_old_refusal_is_tried_in_earnest(
    age_s: float,
    still: bool,  # noqa: FBT001 - pytest passes it by name
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lifecycle.refusal.time.time", lambda: 1e9)
    assert still_refused(Refusal("a", "why", 1e9 - age_s, SLOW_START_S), "a") is still
    assert not still_refused(Refusal("a", "why", 1e9 - age_s, SLOW_START_S), "b")
    assert not still_refused(Refusal("a", "why", 1e9 - age_s, SLOW_START_S / 2), "a")


def test_the_events_protocol_is_supervisords() -> None:
    header = (
        b"ver:3.0 server:supervisor serial:21 pool:restarter poolserial:10 eventname:TICK_5 len:15"
    )
    answers = io.BytesIO()
    source = io.BytesIO(2 * (header + b"\nwhen:1201063880"))
    assert len(list(events(source, answers))) == 2
    assert answers.getvalue() == 2 * b"READY\nRESULT 2\nOK" + b"READY\n"
