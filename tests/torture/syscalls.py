"""Reads strace's logs: what a process did to the files of SPOOL_DIR and said to the broker.

One log per process; `merged` brings several into one order. strace notes a call's begin before
the call is let into the kernel, and its end before the process may go on: whatever one process
does because of what another did has the later time.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

FILE_CALLS = ("openat", "pwrite64", "ftruncate", "fdatasync", "fsync", "unlink", "rename")
SOCKET_CALLS = ("sendto", "recvfrom")
_SYNCS = ("fdatasync", "fsync")
_STRING_MAX_BYTES = 2_000_000
_SYNCS_MAX = 1_000_000_000
"""More than a log has lines: a directory is synced by several processes."""

_LINE = re.compile(r"^(\d+)\s+(\d+\.\d+) (.*)$", re.DOTALL)
_RESUMED = re.compile(r"^<\.\.\. \w+ resumed>(.*)$", re.DOTALL)
_UNFINISHED = "<unfinished ...>"
_CALL = re.compile(r"^(\w+)\((?:(\d+)<(TCP:\[[^\]]*\]|[^>]*)>)?(.*)$", re.DOTALL)
_RETURN = re.compile(r"\)\s+= (-?\d+)(?:<[^>]*>)?[^<]*(?:<(\d+\.\d+)>)?$")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_NUMBERS = re.compile(r"(\d+)")


class Kind(Enum):
    """What an event is."""

    CREATE = "create"
    WRITE = "write"
    TRUNCATE = "truncate"
    SYNC_BEGINS = "a sync begins"
    SYNC_ENDS = "a sync has ended"
    SYNC_FAILS = "a sync has failed"
    UNLINK = "unlink"
    RENAME = "rename"
    SEND = "send"
    RECEIVE = "receive"


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that a process did."""

    at: float
    """Seconds since 1970: of the begin, but of the end for SYNC_ENDS, SYNC_FAILS and RECEIVE."""
    kind: Kind
    path: str
    """Of a socket, strace's name of the connection."""
    data: bytes = b""
    """What was written, sent, received; RENAME's new path."""
    number: int = 0
    """WRITE's offset, TRUNCATE's size; which sync it is, of both its events."""


def command(binary: str, log: Path, *, sockets: bool, inject: str = "") -> list[str]:
    """Return what to put before a program's command, so that ``log`` can be read here.

    Args:
        binary: strace.
        log: Appended to, so that a program started again goes on in it.
        sockets: Whether to log what is said on sockets as well.
        inject: A fault, as strace's ``inject=`` takes it; empty for none.
    """
    calls = ",".join(FILE_CALLS + (SOCKET_CALLS if sockets else ()))
    # -D: the process that is started, and signalled, is the program; strace stands behind it.
    options = ["-D", "-f", "--seccomp-bpf", "-A", "-yy", "-xx", "-ttt", "-T"]
    return [
        binary,
        *options,
        *("-s", str(_STRING_MAX_BYTES), "-e", f"trace={calls}"),
        *(("-e", f"inject={inject}") if inject else ()),
        *("-o", str(log)),
    ]


def merged(logs: Iterable[Path]) -> list[Event]:
    """Return the events of all logs in the order of their times."""
    events = [event for n, log in enumerate(logs) for event in _events(log, n * _SYNCS_MAX)]
    return sorted(events, key=lambda event: event.at)


def _events(log: Path, syncs: int) -> Iterator[Event]:
    begun: dict[str, tuple[float, str]] = {}
    with log.open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            match = _LINE.match(line.rstrip("\n"))
            if match is None:
                continue
            pid, at, rest = match[1], float(match[2]), match[3]
            if rest.endswith(_UNFINISHED):
                begun[pid] = at, rest[: -len(_UNFINISHED)].rstrip()
                continue
            resumed = _RESUMED.match(rest)
            if resumed is not None:
                at, first = begun.pop(pid, (at, ""))
                rest = f"{first}{resumed[1]}" if first.endswith(",") else f"{first} {resumed[1]}"
            syncs += 1
            yield from _call(at, rest, syncs)
    # A process that was killed within a call: what it was writing may be there in part.
    for at, rest in begun.values():
        yield from _call(at, f"{rest}) = 0", syncs + 1, ended=False)


def _call(at: float, text: str, sync: int, *, ended: bool = True) -> Iterator[Event]:
    call, returned = _CALL.match(text), _RETURN.search(text)
    if call is None or returned is None:
        return
    name, path, arguments = call[1], _shown(call[3] or ""), call[4]
    end = at + float(returned[2] or 0)
    if int(returned[1]) < 0:
        if name in _SYNCS:
            yield Event(at, Kind.SYNC_BEGINS, path, number=sync)
            yield Event(end, Kind.SYNC_FAILS, path, number=sync)
        return
    if name in {"openat", "unlink", "rename"}:
        yield from _naming(at, name, arguments)
    elif name in {"sendto", "recvfrom"}:
        if path.startswith("TCP"):
            kind, when = (Kind.SEND, at) if name == "sendto" else (Kind.RECEIVE, end)
            yield Event(when, kind, path, _string(arguments)[: int(returned[1])])
    elif name == "pwrite64":
        data = _string(arguments)[: int(returned[1]) if ended else None]
        yield Event(at, Kind.WRITE, path, data, _last_number(arguments[: arguments.rfind(")")]))
    elif name == "ftruncate":
        yield Event(at, Kind.TRUNCATE, path, number=_last_number(arguments.split(")")[0]))
    else:
        yield Event(at, Kind.SYNC_BEGINS, path, number=sync)
        if ended:
            yield Event(end, Kind.SYNC_ENDS, path, number=sync)


def _naming(at: float, name: str, arguments: str) -> Iterator[Event]:
    """Yield what a call does to names, if anything."""
    if name == "openat" and "O_CREAT" not in arguments:
        return
    path, *new = _strings(arguments)
    kind = {"openat": Kind.CREATE, "unlink": Kind.UNLINK, "rename": Kind.RENAME}[name]
    yield Event(at, kind, path.decode(), new[0] if new else b"")


def _last_number(arguments: str) -> int:
    return int(_NUMBERS.findall(arguments[arguments.rfind('"') + 1 :])[-1])


def _string(arguments: str) -> bytes:
    begin = arguments.find('"') + 1
    return bytes.fromhex(arguments[begin : arguments.find('"', begin)].replace("\\x", ""))


def _strings(arguments: str) -> list[bytes]:
    return [bytes.fromhex(text.replace("\\x", "")) for text in _STRING.findall(arguments)]


def _shown(path: str) -> str:
    """Return a path that ``-xx`` shows in hex; sockets are shown as they are."""
    if not path.startswith("\\x"):
        return path
    return bytes.fromhex(path.replace("\\x", "")).decode("utf-8", "replace")
