"""``python -m forwarder pubsub`` and ``python -m forwarder bigquery``."""

import logging
import os
import sys

from forwarder.drain import LOOP, Drain
from forwarder.registry import SINKS, build
from lifecycle import ExitCode, Program, Settings, StopRequest, Watchdog, leave, run
from spool import CursorAheadError, NewerFormatError, SinkState, SpoolError, WrongEnvironmentError

WATCHDOG_S = 300.0
"""Above the longest lawful silence: a batch whose requests all run into their deadlines."""

log = logging.getLogger("forwarder")


def main(arguments: list[str]) -> ExitCode:
    """Run the forwarder that the one argument names."""
    if len(arguments) != 1 or arguments[0] not in SINKS:
        sys.stderr.write(f"usage: python -m forwarder {{{'|'.join(SINKS)}}}\n")
        return ExitCode.CONFIG
    name = arguments[0]

    def body(settings: Settings, stop: StopRequest) -> None:
        if name in settings.enabled_sinks:
            _drain(name, settings, stop)
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
    return run(Program(f"forwarder-{name}", body, codes), os.environ)


def _drain(name: str, settings: Settings, stop: StopRequest) -> None:
    watchdog = Watchdog([LOOP], WATCHDOG_S)
    state = SinkState.open(settings.spool_dir, name)
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
        ).run()
    finally:
        watchdog.stop()
        sink.close()


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
