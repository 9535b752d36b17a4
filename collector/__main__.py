"""``python -m collector``."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from collector.clockwatch import ClockWatch
from collector.gather import Gathering
from collector.housekeeping import STANDS_STILL, Housekeeping, warn_of_small_disk
from collector.identity import KeptIdentity
from collector.inbox import Inbox
from collector.mqtt import LOOP as NETWORK_LOOP
from collector.mqtt import BrokerSession
from collector.store import LOOP as WRITER_LOOP
from collector.store import SALVAGE_KEY, Store
from collector.validation import Validator
from lifecycle import (
    SINKS,
    ExitCode,
    Program,
    Settings,
    StopRequest,
    Watchdog,
    fields,
    leave,
    log_notice,
    run,
    tell_version,
)
from spool import (
    Ballast,
    BrokerLink,
    Budget,
    Conditions,
    CorruptFileError,
    DiskFullError,
    FileLockedError,
    LockWait,
    NewerFormatError,
    Retention,
    Salvage,
    SinkFile,
    SinkFiles,
    SinkProgress,
    SpoolError,
    SpoolWriter,
    StorageFaultError,
    UnreadableFileError,
    WrongEnvironmentError,
    claim_environment,
    confirmed,
    lasting,
    prepare_apart,
    readable,
    refuse_backlog,
    set_aside,
    spool_path,
    wrong_owner,
)

WATCHDOG_S = 120.0
"""Above the longest lawful silence: one commit or checkpoint on a very slow disk."""

FINISH_TIMEOUT_S = 8.0
"""What is in the inbox is committed and acknowledged within this; the rest comes again."""

US_PER_HOUR = 3_600_000_000
SUBSCRIPTION_KEY = "mqtt_subscription"
QOS0_KEY = "mqtt_qos0_filters"
"""In meta: which filters of the subscription the broker has granted with QoS 0 only."""

log = logging.getLogger("collector")


def _body(settings: Settings, stop: StopRequest) -> None:
    try:
        _run_with_spool(settings, stop)
    except FileLockedError as error:
        if not stop.requested:
            raise
        log.warning("ends while a file is locked; the broker keeps its messages: %s", error)


def _run_with_spool(settings: Settings, stop: StopRequest) -> None:
    sinks = SinkFiles(settings.spool_dir, {s: s in settings.enabled_sinks for s in SINKS})
    lock_wait = LockWait(
        STANDS_STILL, asked_to_stop=lambda: stop.requested, tell=partial(log_notice, log)
    )
    writer, salvage = _open_spool(settings, sinks, lock_wait)
    try:
        if salvage is not None:
            _claim_salvage(salvage, settings.app_env, [sink.read() for sink in sinks])
        claim_environment(writer, settings.app_env, [sink.read() for sink in sinks])
        writer.beat.begin(settings.app_env)
        warn_of_small_disk(writer, settings.spool_max_bytes)
        _collect(settings, stop, writer, salvage, sinks)
    except CorruptFileError as error:
        if error.path != writer.path:
            raise
        writer.close()
        if confirmed(error):
            # Move it now, while we know; the restart makes a new one and salvages this one.
            _tell_set_aside(set_aside(writer.path))
        raise
    except Exception as error:
        # Also over what the writer thread has said at its orderly end, which was not the reason.
        if not (stop.requested or isinstance(error, StorageFaultError)):
            with contextlib.suppress(SpoolError):
                writer.beat.end("failed", str(error) or type(error).__name__)
        raise


def _claim_salvage(salvage: Salvage, app_env: str, sinks: Sequence[SinkProgress]) -> None:
    """Refuse to copy what was taken under another environment.

    Raises:
        WrongEnvironmentError: Readings of another ``APP_ENV`` wait in the damaged spool.
    """
    epoch = salvage.epoch
    waiting = {p.sink: salvage.waiting(p.position_in(epoch)) for p in sinks if p.enabled}
    if not any(waiting.values()):
        return
    if salvage.app_env:
        if salvage.app_env != app_env:
            refuse_backlog(salvage.app_env, app_env, waiting, str(salvage.path))
        return
    # To refuse would be to receive nothing, for a change that hardly ever falls together with
    # damage of just that page.
    log.critical(
        "which APP_ENV the damaged spool was filled under cannot be read: its readings are taken "
        "for those of the present one",
        extra=fields(file=str(salvage.path), app_env=app_env),
    )


def _open_spool(
    settings: Settings, sinks: Iterable[SinkFile], lock_wait: LockWait | None = None
) -> tuple[SpoolWriter, Salvage | None]:
    """Open the spool; a damaged one is set aside and a new one takes its place."""
    directory = settings.spool_dir
    try:
        writer = _open_writer(directory, lock_wait)
    except DiskFullError as error:
        # To open the spool is to sync its log and to read it, and both may need room.
        if not Ballast(directory, settings.spool_max_bytes).release():
            raise
        log.warning("gave up the ballast file, so that the spool can be opened: %s", error)
        writer = _open_writer(directory, lock_wait)
    except UnreadableFileError as error:
        if not lasting(error):
            raise
        writer = _begin_anew(directory, error, lock_wait)
    except CorruptFileError as error:
        log.warning("opened once more, for it may have been a read error that passes: %s", error)
        writer = _open_again(directory, lock_wait)
    readable(writer.path)
    if position := writer.meta(SALVAGE_KEY):
        return writer, Salvage.resumed(position)
    # A start that was cut short may have made the file and not come to what follows here.
    if writer.meta("app_env") or writer.last_seq():
        return writer, None
    # By time of damage: the second one of a second has "-2" at its end.
    damaged = sorted(
        path
        for path in directory.glob(f"{spool_path(directory).name}.damaged-*Z*")
        if not path.name.endswith(("-wal", "-shm"))
    )
    seen = [sink.read() for sink in sinks]
    if not damaged:
        if any(p.epoch for p in seen):
            log.critical(
                "spool.db was not there, although forwarders have worked on one: a new one is "
                "begun. If it was moved away, its undelivered readings are still in it"
            )
        return writer, None
    salvage = Salvage(damaged[-1], 0)
    # A cursor of another epoch says nothing about this file.
    epoch = salvage.epoch
    salvage.skip_to(min((p.position_in(epoch) for p in seen if p.enabled), default=0))
    writer.set_meta(SALVAGE_KEY, salvage.position())
    return writer, salvage


def _open_again(directory: Path, lock_wait: LockWait | None) -> SpoolWriter:
    try:
        return _open_writer(directory, lock_wait)
    except CorruptFileError as error:
        return _begin_anew(directory, error, lock_wait)


def _begin_anew(directory: Path, error: SpoolError, lock_wait: LockWait | None) -> SpoolWriter:
    log.critical("the spool is damaged: %s", error)
    _tell_set_aside(set_aside(spool_path(directory)))
    return _open_writer(directory, lock_wait)


def _open_writer(directory: Path, lock_wait: LockWait | None) -> SpoolWriter:
    prepare_apart(directory, os.environ)
    return SpoolWriter.open(directory, lock_wait=lock_wait)


def _tell_set_aside(path: os.PathLike[str]) -> None:
    log.critical(
        "the damaged spool was set aside, nothing was deleted; what can be read of it is copied "
        "into a new one",
        extra=fields(file=os.fspath(path)),
    )


def _collect(
    settings: Settings,
    stop: StopRequest,
    writer: SpoolWriter,
    salvage: Salvage | None,
    sinks: Iterable[SinkFile],
) -> None:
    watchdog = Watchdog([NETWORK_LOOP, WRITER_LOOP], WATCHDOG_S)
    writer.lock_wait.beat = partial(watchdog.beat, WRITER_LOOP)
    inbox = Inbox(on_room=stop.wake, gathering=Gathering(settings.commit_delay_ms / 1000))
    conditions = Conditions()
    link = BrokerLink(f"{settings.mqtt_broker}:{settings.mqtt_port}")
    known = json.loads(writer.meta(SUBSCRIPTION_KEY) or "[]")
    known_weak = json.loads(writer.meta(QOS0_KEY) or "[]")
    chosen = any(os.environ.get(name, "").strip() for name in ("INSTANCE_ID", "MQTT_CLIENT_ID"))
    identity = KeptIdentity(settings, known, chosen=chosen)
    settings = identity.settings
    broker = [settings.mqtt_broker, settings.mqtt_port, settings.mqtt_client_id]

    def on_subscribed(filters: Sequence[str], weak: Sequence[str]) -> None:
        nonlocal known_weak
        if filters:
            identity.subscribed()
        store.remember(SUBSCRIPTION_KEY, json.dumps([*broker, *filters]))
        if list(weak) != known_weak:
            known_weak = list(weak)
            store.remember(QOS0_KEY, json.dumps(known_weak))

    session = BrokerSession(
        settings,
        inbox,
        stop,
        watchdog,
        known_filters=known[3:] if known[:3] == broker else (),
        weak_filters=known_weak,
        last_reading_us=writer.received_us(writer.last_seq()),
        on_subscribed=on_subscribed,
        conditions=conditions,
        link=link,
    )
    store = Store(
        # Opened again only after SQLITE_FULL, which comes before the sync; a sync that failed
        # (SQLITE_IOERR_FSYNC) ends the process.
        open_writer=partial(
            SpoolWriter.open, settings.spool_dir, synced=True, lock_wait=writer.lock_wait
        ),
        writer=writer,
        inbox=inbox,
        validator=Validator(
            settings.timestamp_formats,
            reject_site_mismatch=settings.site_mismatch == "reject",
            max_payload_bytes=settings.max_payload_bytes,
        ),
        housekeeping=Housekeeping(
            sinks=sinks,
            retention=Retention(int(settings.spool_retention_hours * US_PER_HOUR)),
            budget=Budget(settings.spool_max_bytes),
            ballast=Ballast(settings.spool_dir, settings.spool_max_bytes),
            salvage=salvage,
            conditions=conditions,
            link=link,
            clock_watch=ClockWatch(conditions, writer.received_us(writer.last_seq())),
        ),
        dedup_window=settings.dedup_window,
        acknowledge=session.acknowledge,
        drop_oldest=settings.spool_full_policy == "drop-oldest",
        stop=stop,
        watchdog=watchdog,
    )
    store.start()
    try:
        session.run()
    finally:
        inbox.close()
        session.finish(lambda: store.finished, FINISH_TIMEOUT_S)
        watchdog.stop()
    if not store.finished:
        log.warning("the writer is still waiting for the disk; the broker keeps its messages")
        return
    store.join()


def main(arguments: Sequence[str] = ()) -> ExitCode:
    """Run the collector; it has no arguments but ``--version``."""
    if arguments:
        return tell_version("collector", arguments)
    codes: dict[type[Exception], ExitCode] = {
        WrongEnvironmentError: ExitCode.CONFIG,
        NewerFormatError: ExitCode.CONFIG,
        SpoolError: ExitCode.STORAGE,
    }
    return run(Program("collector", _body, codes, wrong_owner), os.environ)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
