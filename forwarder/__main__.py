"""``python -m forwarder pubsub`` and ``python -m forwarder bigquery``."""

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from forwarder.batch_delivery import LOOP
from forwarder.drain import Drain
from forwarder.loghold import STANDS_STILL, LogHold
from forwarder.pulse import Pulse
from forwarder.registry import build
from lifecycle import (
    SINKS,
    ExitCode,
    Program,
    Settings,
    StopRequest,
    fields,
    leave,
    log_notice,
    run,
    tell_version,
)
from spool import (
    LOGGED,
    CorruptFileError,
    CursorAheadError,
    FileLockedError,
    LockWait,
    NewerFormatError,
    SinkState,
    SpoolError,
    UnreadableFileError,
    WrongEnvironmentError,
    confirmed,
    lasting,
    readable,
    set_aside,
    wrong_owner,
)

WATCHDOG_S = 600.0
"""Above the longest lawful silence. A delivery to BigQuery may wait three times for what Google's
client does (CALL_WAIT_S), look for guilty rows (GIVE_BACK_AFTER_S), send a last request twice, the
second time with a new token, and read or even make the table anew."""

log = logging.getLogger("forwarder")


def main(arguments: list[str]) -> ExitCode:
    """Run the forwarder that the one argument names."""
    if len(arguments) != 1 or arguments[0] not in SINKS:
        return tell_version("forwarder", arguments, f"{{{'|'.join(SINKS)}}}")
    name = arguments[0]

    def body(settings: Settings, stop: StopRequest) -> None:
        if name in settings.enabled_sinks:
            try:
                _drain(name, settings, stop)
            except FileLockedError as error:
                if not stop.requested:
                    raise
                log.warning("ends while a file is locked; the spool keeps all: %s", error)
            return
        # Up and idle, so that supervisorctl shows it and does not start it again and again.
        log.warning("%s_ENABLED is false: idle, nothing is delivered", name.upper())
        while not stop.wait(1.0):
            continue

    codes: dict[type[Exception], ExitCode] = {
        WrongEnvironmentError: ExitCode.CONFIG,
        NewerFormatError: ExitCode.CONFIG,
        CursorAheadError: ExitCode.CONFIG,
        SpoolError: ExitCode.STORAGE,
    }
    return run(Program(f"forwarder-{name}", body, codes, wrong_owner), os.environ)


def _drain(name: str, settings: Settings, stop: StopRequest) -> None:
    _trust(settings)
    lock_wait = LockWait(
        STANDS_STILL, asked_to_stop=lambda: stop.requested, tell=partial(log_notice, log)
    )
    state = _open_state(settings.spool_dir, name, settings.dead_letter_max_bytes, lock_wait)
    state.beat.begin(settings.app_env)
    if settings.app_env == "LOCAL":
        state.delivered_counter = LOGGED
    watchdog = Pulse(LOOP, WATCHDOG_S, state)
    lock_wait.beat = watchdog.waits
    sink = build(name, settings, state)
    try:
        Drain(
            directory=settings.spool_dir,
            sink=sink,
            state=state,
            app_env=settings.app_env,
            max_rate=settings.max_drain_rate,
            stop=stop,
            watchdog=watchdog,
            log_hold=LogHold(state, settings.spool_max_bytes, watchdog),
        ).run()
    except CorruptFileError as error:
        if error.path != state.path:
            raise
        state.close()
        if confirmed(error):
            _set_aside(state.path, error)
        raise
    finally:
        watchdog.stop()
        sink.close()


def _trust(settings: Settings) -> None:
    """Have one list of authorities for all that leads to the cloud."""
    if settings.app_env == "LOCAL":
        return
    from forwarder import authorities  # noqa: PLC0415 - with requests, which LOCAL does not need

    if told := authorities.use(os.environ, settings.cloud_ca_file):
        log.warning("the authorities: %s", told)


def _open_state(
    directory: Path, name: str, dead_letter_max_bytes: int, lock_wait: LockWait
) -> SinkState:
    """Open the sink's file; a damaged one is set aside and a new one takes its place."""
    opened = partial(SinkState.open, directory, name, dead_letter_max_bytes, lock_wait)
    try:
        state = opened()
    except UnreadableFileError as error:
        if not lasting(error):
            raise
        state = _begin_anew(opened, error)
    except CorruptFileError as error:
        log.warning("opened once more, for it may have been a read error that passes: %s", error)
        state = _open_again(opened)
    readable(state.path)
    if state.restored is not None:
        log.critical(
            "a new file takes the place of %s; delivery goes on behind what the collector had "
            "last seen delivered, and what was delivered since is sent once more: with BigQuery "
            "too it may be there twice, because the append journal is lost",
            state.restored.damaged,
            extra=fields(
                sink=name,
                after_seq=state.restored.seq,
                dead_letters_copied=state.restored.dead_letters,
            ),
        )
    return state


def _open_again(opened: Callable[[], SinkState]) -> SinkState:
    try:
        return opened()
    except CorruptFileError as error:
        return _begin_anew(opened, error)


def _begin_anew(
    opened: Callable[[], SinkState], error: CorruptFileError | UnreadableFileError
) -> SinkState:
    _set_aside(error.path, error)
    return opened()


def _set_aside(path: Path, error: SpoolError) -> None:
    log.critical(
        "the sink's own file is damaged; it is set aside, nothing is deleted: %s",
        error,
        extra=fields(file=str(set_aside(path))),
    )


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
