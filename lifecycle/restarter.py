"""The supervisord event listener that starts again what supervisord has given up.

supervisord counts a program that dies within ``startsecs`` as a failed start, and after
``startretries`` of them it is FATAL for good, also where only the cause was passing: the OOM
killer, a full disk, a Python that is being upgraded. This program starts such programs again,
with backoff, for ever. The exception is exit code 78: a program that refused its settings stays
FATAL until the circumstances have changed (:mod:`lifecycle.refusal`).

Why a listener and not a very large ``startretries``: the wait between supervisord's tries grows
by a second with each, without limit, and a wrong setting would never show as FATAL. Why
not a plugin within supervisord: an error in it would end supervisord itself.
http://supervisord.org/events.html describes the protocol.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from http.client import HTTPException
from typing import BinaryIO, Protocol
from xmlrpc.client import Error as RpcError

from supervisor.childutils import getRPCInterface

from lifecycle.logs import fields
from lifecycle.refusal import RUN_DIR_VARIABLE, examine, read_refusal
from lifecycle.version import VERSION

BACKOFF_FIRST_S = 5.0
BACKOFF_MAX_S = 30.0
"""Between two starts of a FATAL program; each of them is ``startretries`` + 1 tries by supervisord.
The first start is made at once."""

log = logging.getLogger("lifecycle.restarter")


class ProgramControl(Protocol):
    """What is needed of supervisord (its XML-RPC interface has more)."""

    def getAllProcessInfo(self) -> list[dict[str, object]]:  # noqa: N802 - supervisor's name
        """Return name, group, statename, spawnerr of each program."""

    def startProcess(self, name: str, wait: bool) -> bool:  # noqa: FBT001, N802 - the same
        """Start a program that does not run."""


class Restarter:
    """Decides which FATAL programs are started.

    Args:
        connect: Returns a connection to supervisord.
        fingerprint: Returns that of the present circumstances.
        run_dir: Where refusals are noted; empty for none.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        connect: Callable[[], ProgramControl],
        fingerprint: Callable[[], str],
        run_dir: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._fingerprint = fingerprint
        self._run_dir = run_dir
        self._clock = clock
        self._starts: dict[str, int] = {}
        """How often each program was started since it last ran."""
        self._due_s: dict[str, float] = {}
        self._told: dict[str, str] = {}
        """The circumstances under which a program's refusal was reported."""

    def turn(self) -> None:
        """Look at all programs once, and start those that are due."""
        try:
            control = self._connect()
            for info in control.getAllProcessInfo():
                if info["statename"] == "FATAL":
                    self._consider(control, info)
                elif info["statename"] == "RUNNING":
                    self._forget(str(info["name"]))
        except (OSError, HTTPException, RpcError) as error:
            # The next event comes within 5 s. If supervisord is gone, the input ends.
            log.warning("supervisord does not answer; will retry", extra=fields(error=str(error)))

    def _forget(self, name: str) -> None:
        self._starts.pop(name, None)
        self._due_s.pop(name, None)
        self._told.pop(name, None)

    def _consider(self, control: ProgramControl, info: Mapping[str, object]) -> None:
        name = str(info["name"])
        if refusal := read_refusal(self._run_dir, name):
            present = self._fingerprint()
            if refusal.fingerprint == present:
                self._tell_refused(name, present, refusal.reason)
                return
            if self._told.get(name) != present:
                # Changed, which is a reason to try at once, and once.
                self._told[name] = present
                self._due_s.pop(name, None)
        if self._clock() < self._due_s.get(name, 0.0):
            return
        starts = self._starts.get(name, 0)
        self._starts[name] = starts + 1
        wait_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(starts, 10))
        self._due_s[name] = self._clock() + wait_s
        log.warning(
            "program is FATAL; starting it again",
            extra=fields(program=name, starts=starts + 1, reason=info.get("spawnerr", "")),
        )
        try:
            control.startProcess(f"{info['group']}:{name}", False)  # noqa: FBT003 - positional only
        except RpcError as error:
            log.warning(
                "supervisord could not start the program; will retry",
                extra=fields(program=name, error=str(error), retry_in_s=wait_s),
            )

    def _tell_refused(self, name: str, present: str, reason: str) -> None:
        if self._told.get(name) == present:
            return
        self._told[name] = present
        log.warning(
            "program stays FATAL: exit code 78; it is started again when its settings have changed",
            extra=fields(program=name, reason=reason),
        )


def events(source: BinaryIO, answers: BinaryIO) -> Iterator[None]:
    """Yield once for each event that supervisord sends, until it ends.

    Args:
        source: Standard input.
        answers: Standard output.
    """
    while True:
        answers.write(b"READY\n")
        answers.flush()
        header = source.readline()
        if not header.endswith(b"\n"):
            return
        length = dict(part.split(b":", 1) for part in header.split()).get(b"len", b"0")
        source.read(int(length))
        yield
        answers.write(b"RESULT 2\nOK")
        answers.flush()


def serve(environ: Mapping[str, str], host_name: str) -> None:
    """Listen until supervisord ends.

    Args:
        environ: As supervisord gave it, the same as the programs'.
        host_name: As the programs see it.
    """

    def connect() -> ProgramControl:
        # A connection of its own each time: a broken one would stay broken.
        control: ProgramControl = getRPCInterface(environ).supervisor
        return control

    restarter = Restarter(
        connect,
        fingerprint=lambda: examine(environ, host_name).fingerprint,
        run_dir=environ.get(RUN_DIR_VARIABLE, ""),
    )
    log.info("started", extra=fields(version=VERSION))
    for _ in events(sys.stdin.buffer, sys.stdout.buffer):
        restarter.turn()
