"""From ``__main__`` to the program's body and back to an exit code."""

import gc
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from lifecycle.exitcodes import ExitCode
from lifecycle.exposure import exposed_files
from lifecycle.instance import AlreadyRunningError, InstanceLock
from lifecycle.logs import configure_logging, fields
from lifecycle.proxies import proxies_for_grpc
from lifecycle.refusal import (
    RUN_DIR_VARIABLE,
    Circumstances,
    examine,
    forget_refusal,
    note_refusal,
    read_refusal,
    still_refused,
)
from lifecycle.report import report_settings
from lifecycle.settings import Settings, instance_id_of
from lifecycle.shutdown import StopRequest
from lifecycle.version import VERSION

STORAGE_FAULT_MIN_UPTIME_S = 5.0
"""A process with a storage fault stays this long, above supervisord's ``startsecs``: it counts as
started, and is started again at once and for as long as the fault lasts."""

GC_THRESHOLD = (20_000, 10, 10)
"""Python's own (700) looks for cycles a dozen times in each batch, among thousands of rows that
have none: up to a tenth of the processor time."""

log = logging.getLogger("lifecycle")


@dataclass(frozen=True)
class Program:
    """One of Sluice's programs.

    Attributes:
        role: Its name in supervisorctl, in its logs and in its lock file.
        body: The program itself; returns when asked to stop.
        exit_codes: The exit code for each error class that the body may raise.
        wrong_owner: Names the first of some files that this process may not use, whose it is and
            what to do; empty where that is not the reason (:func:`spool.wrong_owner`).
    """

    role: str
    body: Callable[[Settings, StopRequest], None]
    exit_codes: Mapping[type[Exception], ExitCode]
    wrong_owner: Callable[[Iterable[Path]], str] = lambda _: ""


def run(program: Program, environ: MutableMapping[str, str]) -> ExitCode:
    """Run ``program`` to its end and return the exit code; errors are logged, not raised.

    ``environ`` is completed from the environment file in place, because the libraries of
    the services read variables of their own from it (credentials, proxies, emulators).
    """
    started = time.monotonic()
    _leave_no_core()
    gc.set_threshold(*GC_THRESHOLD)
    configure_logging(program.role)
    found = examine(environ, socket.gethostname())
    run_dir = environ.get(RUN_DIR_VARIABLE, "")
    settings = found.settings
    if settings is None:
        report_settings(program.role, found.problems, found.warnings)
        reason = "; ".join(found.problems)
        note_refusal(run_dir, program.role, found.fingerprint, reason, 0.0)
        return ExitCode.CONFIG
    environ.update(found.environ)
    # Before anything imports grpc, which reads them when its first channel is made.
    variables, proxy_problems = proxies_for_grpc(environ)
    environ.update(variables)
    configure_logging(program.role, settings.log_level, settings.log_format)
    report_settings(program.role, (), found.warnings)
    for problem in proxy_problems:
        log.warning("the proxy: %s", problem)
    for problem in exposed_files(program.role, environ):
        log.warning("a secret is exposed: %s", problem)
    refusal = read_refusal(run_dir, program.role)
    if refusal is not None and still_refused(refusal, found.fingerprint):
        log.critical("ends: %s", refusal.reason, extra=fields(exit_code=int(ExitCode.CONFIG)))
        note_refusal(run_dir, program.role, found.fingerprint, refusal.reason, refusal.after_s)
        return ExitCode.CONFIG
    forget_refusal(run_dir, program.role)
    stop = StopRequest(supervised=environ.get("SUPERVISOR_ENABLED") == "1")
    stop.install(on_overdue=_leave_overdue)
    code = _run_body(program, settings, found, stop)
    if code is ExitCode.STORAGE:
        deadline = started + STORAGE_FAULT_MIN_UPTIME_S
        # The program's own threads also ask for the stop when they fail; only a wish from
        # outside cuts this short.
        while not stop.from_outside and (left_s := deadline - time.monotonic()) > 0:
            stop.sleep(left_s)
    signal.setitimer(signal.ITIMER_REAL, 0)
    stop.close()
    return code


def _leave_no_core() -> None:
    # The memory holds the broker's password and the services' tokens: no crash may write it to
    # the disk. For good, and so also where systemd-coredump collects cores.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _run_body(
    program: Program, settings: Settings, found: Circumstances, stop: StopRequest
) -> ExitCode:
    begun = time.monotonic()
    try:
        _prepare_directory(settings.spool_dir)
        lock = InstanceLock(settings.spool_dir, program.role)
        lock.acquire()
    except AlreadyRunningError as error:
        log.critical("cannot start: %s", error)
        return ExitCode.STORAGE
    except OSError as error:
        reason = _wrong_owner(program, error, settings.spool_dir) or (
            "it must exist and belong to the user that runs this program (check: ls -ld "
            f"{settings.spool_dir}; id)"
        )
        log.critical(
            "cannot start: SPOOL_DIR %s cannot be used: %s; %s", settings.spool_dir, error, reason
        )
        return ExitCode.STORAGE
    log.info(
        "started",
        extra=fields(
            version=VERSION,
            app_env=settings.app_env,
            pid=os.getpid(),
            instance_id=settings.instance_id,
        ),
    )
    _tell_kept_id(settings.instance_id, found.environ)
    try:
        program.body(settings, stop)
    except tuple(program.exit_codes) as error:
        code = next(c for kind, c in program.exit_codes.items() if isinstance(error, kind))
        log.critical("ends: %s", error, extra=fields(exit_code=int(code)))
        if code is ExitCode.CONFIG:
            run_dir = found.environ.get(RUN_DIR_VARIABLE, "")
            after_s = time.monotonic() - begun
            note_refusal(run_dir, program.role, found.fingerprint, str(error), after_s)
        return code
    except Exception as error:
        if _of_the_disk(error, settings.spool_dir):
            remedy = _wrong_owner(program, error, settings.spool_dir) or (
                f"check the disk and its rights: df -h {settings.spool_dir}; ls -la "
                f"{settings.spool_dir}; dmesg | tail"
            )
            log.critical(
                "storage fault: %s; %s",
                error,
                remedy,
                extra=fields(exit_code=int(ExitCode.STORAGE)),
            )
            return ExitCode.STORAGE
        log.critical(
            "ends by an error that nobody foresaw; nothing that was acknowledged is lost. "
            "Please report the traceback",
            exc_info=True,
            extra=fields(exit_code=int(ExitCode.BUG)),
        )
        return ExitCode.BUG
    log.info("stopped: %s", stop.reason, extra=fields(exit_code=0))
    return ExitCode.CLEAN


def _tell_kept_id(instance_id: str, environ: Mapping[str, str]) -> None:
    host_name = socket.gethostname()
    if not environ.get("INSTANCE_ID", "").strip() and instance_id != instance_id_of(host_name):
        log.info(
            "INSTANCE_ID is not set; the one that is kept is used, not the host name",
            extra=fields(instance_id=instance_id, host_name=host_name),
        )


def _of_the_disk(error: Exception, directory: Path) -> bool:
    """Return whether it is a system call that failed on a file in ``directory``.

    The files' own modules translate what they expect; any call on a failing disk can fail.
    """
    if not isinstance(error, OSError):
        return False
    names = [n for n in (error.filename, error.filename2) if isinstance(n, str | bytes)]
    return any(Path(os.fsdecode(name)).is_relative_to(directory) for name in names)


def _wrong_owner(program: Program, error: Exception, directory: Path) -> str:
    """Return whose the file is that the error names, where that is the reason; else empty."""
    name = error.filename if isinstance(error, OSError) else None
    named = [Path(os.fsdecode(name))] if isinstance(name, str | bytes) else []
    return program.wrong_owner([*named, directory])


def _prepare_directory(directory: Path) -> None:
    # 2750 with group sluice: members may look with sqlite3, nobody else; the set-group bit
    # hands the group on to every file that SQLite makes beside the database.
    os.umask(0o027)
    if not directory.exists():
        directory.mkdir(parents=True)
        directory.chmod(0o2750)


def _leave_overdue() -> NoReturn:
    # What is in hand is not settled, so it is not lost: it is delivered, or received, again.
    log.warning("something did not end in time and is given up; it is done again at the next start")
    leave(ExitCode.CLEAN)


def leave(code: ExitCode) -> NoReturn:
    """End the process at once, without the interpreter's own farewell.

    Closing the last connection to a database deletes its -wal and -shm files, and a member
    of the group, who cannot make them anew, could then no longer look into it (SQLite
    answers error 8). Everything that matters was committed and synced before; the operating
    system closes the rest.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            continue  # nobody reads any more
    os._exit(code)
