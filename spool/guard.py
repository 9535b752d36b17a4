"""The rule that readings of one environment never reach another's services."""

from collections.abc import Sequence

from spool.errors import WrongEnvironmentError
from spool.progress import SinkProgress
from spool.writer import SpoolWriter


def claim_environment(writer: SpoolWriter, app_env: str, sinks: Sequence[SinkProgress]) -> None:
    """Mark the spool as filled under ``app_env``, unless another's readings still wait in it.

    Raises:
        WrongEnvironmentError: Undelivered readings of another ``APP_ENV`` are in the spool.
    """
    before = writer.meta("app_env")
    if before == app_env:
        return
    if before:
        refuse_backlog(
            before,
            app_env,
            {p.sink: pending(writer, p) for p in sinks if p.enabled},
            str(writer.path),
        )
        writer.set_meta("app_env_from_seq", str(writer.last_seq()))
    writer.set_meta("app_env", app_env)


def pending(writer: SpoolWriter, sink: SinkProgress) -> int:
    """Return how many readings the sink has still to receive."""
    return writer.last_seq() - max(sink.position_in(writer.epoch), writer.first_seq() - 1)


def refuse_backlog(before: str, app_env: str, waiting: dict[str, int], path: str) -> None:
    """Raise if anything waits.

    Raises:
        WrongEnvironmentError: With the counts and what to do.
    """
    waiting = {sink: rows for sink, rows in waiting.items() if rows > 0}
    if waiting:
        counts = ", ".join(f"{rows} for {sink}" for sink, rows in waiting.items())
        raise WrongEnvironmentError(
            f"APP_ENV is {app_env}; {path} still holds readings taken under {before} that are not "
            f"delivered yet ({counts}). Either set APP_ENV={before} again and let them drain "
            "(look at the view backlog), or give this environment a directory of its own with "
            "SPOOL_DIR"
        )
