"""Shows, call by call, that no PUBACK leaves before its reading is synced to the disk.

The collector runs under strace. The criterion, for each message: its payload's bytes are in a
pwrite64 to ``spool.db-wal``; an fdatasync of that file begins after this write and succeeds; and
the send that holds its PUBACK begins after that fdatasync has ended. That the reading is part of
a committed transaction is SQLite's matter; that the commit's frame is synced with it follows from
the order, because SQLite writes it before that fdatasync.
"""

import re
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.latency import DELAY_VARIABLE, DELAYS
from bench.processes import BenchError, Process
from bench.prune import WITHOUT_SINKS, result, wire_broker
from bench.publish import reading
from bench.report import Row
from bench.rig import START_TIMEOUT_S, Rig, rig, wait_for
from bench.wire_broker import mid_of

MAX_COUNT = 2_000
STRACE_SECONDS = 4.0
GROUP = 5
INTERVAL_MS = 20.0
SYSCALLS = "trace=pwrite64,fdatasync,fsync,sendto,sendmsg,write"
STRING_MAX_BYTES = 1_000_000
WAL = "spool.db-wal"

_LINE = re.compile(r"^(?P<pid>\d+)\s+(?P<rest>.*)$")
_CALL = re.compile(r"^(?P<call>\w+)\((?P<fd>\d+)<(?P<file>[^>]*)>(?P<arguments>.*)$", re.DOTALL)
_RESUMED = re.compile(r"^<\.\.\. (?P<call>\w+) resumed>")
_HEX = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_PUBACK = struct.Struct("!BBH")


@dataclass(frozen=True)
class Call:
    """One system call's begin or end, in the order in which strace saw it."""

    name: str
    file: str
    data: bytes
    began: bool
    ended: bool
    failed: bool


def calls(log: Path) -> Iterator[Call]:
    """Yield begins and ends; a call that nothing interrupted is both at once."""
    pending: dict[str, str] = {}
    for line in log.read_text(encoding="ascii", errors="replace").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        pid, rest = match["pid"], match["rest"]
        failed = ") = -1" in rest
        resumed = _RESUMED.match(rest)
        if resumed is not None:
            yield Call(resumed["call"], pending.pop(pid, ""), b"", False, True, failed)  # noqa: FBT003 - named in the class
            continue
        call = _CALL.match(rest)
        if call is None:
            continue
        unfinished = rest.endswith("<unfinished ...>")
        if unfinished:
            pending[pid] = _path(call["file"])
        text = _HEX.search(call["arguments"])
        data = bytes.fromhex(text[1].replace("\\x", "")) if text else b""
        yield Call(call["call"], _path(call["file"]), data, True, not unfinished, failed)  # noqa: FBT003 - named in the class


def _path(shown: str) -> str:
    """Return a path that ``-xx`` shows in hex; sockets are shown as they are."""
    if not shown.startswith("\\x"):
        return shown
    return bytes.fromhex(shown.replace("\\x", "")).decode("utf-8", "replace")


@dataclass
class Verdict:
    """What the log shows."""

    syncs: int = 0
    acks: int = 0
    early: list[int] = field(default_factory=list)
    """Messages whose PUBACK was sent before their sync had ended."""
    sends: int = 0


def judge(log: Path, payloads: dict[int, bytes]) -> Verdict:
    """Follow each message through the log.

    Args:
        log: strace's.
        payloads: By packet identifier.
    """
    verdict = Verdict()
    unwritten = {payload: mid for mid, payload in payloads.items()}
    written: set[int] = set()
    syncing: set[int] = set()
    durable: set[int] = set()
    pattern = re.compile(rb'\{"site_code".*?\}')
    for call in calls(log):
        in_wal = call.file.endswith(WAL)
        if call.name == "pwrite64" and in_wal and call.ended and not call.failed:
            found = (unwritten.get(text) for text in pattern.findall(call.data))
            written.update(mid for mid in found if mid is not None)
        if call.name == "fdatasync" and in_wal:
            if call.began:
                syncing = set(written)
            if call.ended and not call.failed:
                durable |= syncing
                verdict.syncs += 1
        if (
            call.name in {"sendto", "sendmsg", "write"}
            and call.began
            and call.file.startswith("TCP")
        ):
            mids = _acked(call.data)
            verdict.sends += bool(mids)
            verdict.acks += len(mids)
            verdict.early += [mid for mid in mids if mid not in durable]
    return verdict


def _acked(data: bytes) -> list[int]:
    if len(data) % _PUBACK.size or data[:2] != b"\x40\x02":
        return []
    return [mid for kind, _, mid in _PUBACK.iter_unpack(data) if kind == 0x40]  # noqa: PLR2004 - PUBACK


def _strace(setup: Rig, port: int, log: Path, settings: Mapping[str, str]) -> Process:
    binary = shutil.which("strace")
    if binary is None:
        raise BenchError("strace is not installed: apt-get install strace")
    # -D: the process that we start, and stop, is the collector, and strace stands behind it.
    command = [binary, "-D", "-f", "-yy", "-xx", "-s", str(STRING_MAX_BYTES), "-e", SYSCALLS]
    environ = setup.environ(MQTT_PORT=str(port), LOG_LEVEL="INFO", **WITHOUT_SINKS, **settings)
    program = [sys.executable, "-m", "collector"]
    process = setup.start(
        Process("collector", [*command, "-o", str(log), *program], setup.directory, environ)
    )
    process.wait_output('"subscribed"', START_TIMEOUT_S)
    return process


def rows(_rounds: int, count: int) -> list[Row]:
    """Return the check, for each delay: how many PUBACKs went too early. One run says it."""
    seconds = min(STRACE_SECONDS, count / GROUP * INTERVAL_MS / 1000)
    return [_row(f"fsync{name}", seconds, settings) for name, (settings, _) in DELAYS.items()]


def _row(name: str, seconds: float, settings: Mapping[str, str]) -> Row:
    row = Row(
        name,
        "PUBACKs that were sent before an fdatasync of spool.db-wal had ended that began after "
        "their reading was written there (strace, call by call)",
        "PUBACKs",
        "<= 0",
    )
    with rig() as setup:
        log = setup.directory / "strace.txt"
        arguments = [f"--seconds={seconds}", f"--group={GROUP}", f"--interval-ms={INTERVAL_MS}"]
        broker, port = wire_broker(setup, "steady", *arguments)
        process = _strace(setup, port, log, settings)
        broker.say("go")
        sent = int(result(broker)["sent"])
        process.stop()
        ended = f"{process.pid} +++ exited"
        wait_for(
            lambda: ended in re.sub(" +", " ", log.read_text("ascii")),
            "strace ends",
            START_TIMEOUT_S,
        )
        payloads = {mid_of(number): reading(number)[1] for number in range(sent)}
        verdict = judge(log, payloads)
    if verdict.acks != sent or not verdict.syncs:
        raise BenchError(f"strace saw {verdict.acks} of {sent} PUBACKs, {verdict.syncs} syncs")
    if verdict.early:
        raise BenchError(f"{len(verdict.early)} PUBACKs were sent too early: {verdict.early[:10]}")
    row.ours.append(len(verdict.early))
    row.notes.append(
        f"{sent} messages, {verdict.syncs} fdatasyncs of spool.db-wal, {verdict.sends} sends with "
        f"PUBACKs, {DELAY_VARIABLE} {settings.get(DELAY_VARIABLE, 'at its default')}"
    )
    return row
