"""What a disk may hold after a power cut, for any point of a log of system calls.

The model, which promises no more than POSIX and less than any journalling file system keeps:

* A file holds everything that its last completed sync found. Each later write is kept, missing,
  or torn at sectors of 512 bytes, independently of the others; a truncation happened or did not.
* After a sync that failed, what it was to write is dropped: the pages count as clean, so no later
  sync writes them. Each such write is kept, missing or torn for as long as nothing is written in
  its place and synced (Linux; https://wiki.postgresql.org/wiki/Fsync_Errors).
* A name is there, or gone, once its directory was synced; later changes of names happened up
  to some point, in their order. A file's own sync does not make its name durable.

That one disk never does all of this at once makes the images harder, not wrong.
"""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePath

from tests.torture.syscalls import Event, Kind

SECTOR_BYTES = 512
_SUFFIXES = ("", "-wal", "-journal")


@dataclass(frozen=True, slots=True)
class _Write:
    offset: int
    data: bytes

    def apply(self, content: bytearray) -> None:
        end = self.offset + len(self.data)
        if len(content) < end:
            content.extend(bytes(end - len(content)))
        content[self.offset : end] = self.data

    def left_by(self, later: "_Change") -> "list[_Write]":
        """Return what ``later`` leaves of it."""
        begin, end = self.offset, self.offset + len(self.data)
        if isinstance(later, _Truncation):
            covered, until = later.size, max(end, later.size)
        else:
            covered, until = later.offset, later.offset + len(later.data)
        parts = ((begin, min(end, covered)), (max(begin, until), end))
        return [_Write(a, self.data[a - begin : b - begin]) for a, b in parts if a < b]


@dataclass(frozen=True, slots=True)
class _Truncation:
    size: int

    def apply(self, content: bytearray) -> None:
        del content[self.size :]
        content.extend(bytes(self.size - len(content)))


_Change = _Write | _Truncation
_Naming = tuple[tuple[str, "_Inode | None"], ...]


@dataclass(eq=False, slots=True)
class _Inode:
    synced: bytearray = field(default_factory=bytearray)
    later: list[_Change] = field(default_factory=list)
    syncing: dict[int, int] = field(default_factory=dict)
    """Of each sync under way: how many of ``later`` it found."""
    dropped: list[_Write] = field(default_factory=list)
    """What syncs that failed were to write, as far as nothing was synced in its place since."""

    def sync(self, event: Event) -> None:
        if event.kind is Kind.SYNC_BEGINS:
            self.syncing[event.number] = len(self.later)
        elif event.kind is Kind.SYNC_FAILS:
            # A truncation is the file system's own journal's affair, not the pages'.
            found = self._found(event.number)
            self.dropped += [change for change in found if isinstance(change, _Write)]
        else:
            for change in self._found(event.number):
                change.apply(self.synced)
                self.dropped = [part for write in self.dropped for part in write.left_by(change)]

    def _found(self, sync: int) -> list[_Change]:
        found = self.syncing.pop(sync, 0)
        changes = self.later[:found]
        del self.later[:found]
        self.syncing = {n: max(0, count - found) for n, count in self.syncing.items()}
        return changes


class Disk:
    """Follows a log, and gives out images of what a power cut would leave at this point.

    Args:
        directory: SPOOL_DIR, as it was when the log was made.
        names: The databases; their logs and journals belong to them.
        files: Name and content of what was there when the log began, all of it durable: after
            a power cut the disk is what it is.
    """

    def __init__(
        self, directory: str, names: Iterable[str], files: Mapping[str, bytes] | None = None
    ) -> None:
        self._directory = directory
        self._names = {f"{name}{suffix}" for name in names for suffix in _SUFFIXES}
        self._synced = {name: _Inode(bytearray(content)) for name, content in (files or {}).items()}
        self._live = dict(self._synced)
        self._later: list[_Naming] = []
        self._syncing: dict[int, int] = {}

    def apply(self, event: Event) -> None:
        """Let the next event happen."""
        if event.path == self._directory:
            self._directory_event(event)
            return
        name = self._name(event.path)
        if name is None:
            return
        match event.kind:
            case Kind.CREATE:
                self._inode(name)
            case Kind.WRITE:
                self._inode(name).later.append(_Write(event.number, event.data))
            case Kind.TRUNCATE:
                self._inode(name).later.append(_Truncation(event.number))
            case Kind.SYNC_BEGINS | Kind.SYNC_ENDS | Kind.SYNC_FAILS:
                self._inode(name).sync(event)
            case Kind.UNLINK:
                self._live.pop(name, None)
                self._later.append(((name, None),))
            case Kind.RENAME:
                self._rename(name, self._name(event.data.decode()))
            case _:
                pass

    def _directory_event(self, event: Event) -> None:
        if event.kind is Kind.SYNC_BEGINS:
            self._syncing[event.number] = len(self._later)
        elif event.kind is Kind.SYNC_ENDS:
            found = self._syncing.pop(event.number, 0)
            for naming in self._later[:found]:
                _name_in(self._synced, naming)
            del self._later[:found]
            self._syncing = {n: max(0, count - found) for n, count in self._syncing.items()}

    def _name(self, path: str) -> str | None:
        name = PurePath(path).name
        return name if path == f"{self._directory}/{name}" and name in self._names else None

    def _inode(self, name: str) -> _Inode:
        if name not in self._live:
            self._live[name] = _Inode()
            self._later.append(((name, self._live[name]),))
        return self._live[name]

    def _rename(self, old: str, new: str | None) -> None:
        inode = self._live.pop(old, None)
        naming: _Naming = ((old, None),)
        if new is not None and inode is not None:
            self._live[new] = inode
            naming += ((new, inode),)
        self._later.append(naming)

    def cut(self, chance: random.Random) -> dict[str, bytes]:
        """Return name and content of each file of one image.

        Args:
            chance: Decides what of the unsynced is kept.
        """
        names = dict(self._synced)
        for naming in self._later[: _how_far(len(self._later), chance)]:
            _name_in(names, naming)
        return {name: _content(inode, chance) for name, inode in sorted(names.items())}


def _name_in(names: dict[str, _Inode], naming: _Naming) -> None:
    for name, inode in naming:
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


def _how_far(count: int, chance: random.Random) -> int:
    return chance.choice((0, count, chance.randint(0, count)))


def _all(changes: list[_Change], _: random.Random) -> list[_Change]:
    return changes


def _none(_: list[_Change], __: random.Random) -> list[_Change]:
    return []


def _first(changes: list[_Change], chance: random.Random) -> list[_Change]:
    """Keep up to one, which is torn: a disk that writes in order."""
    end = chance.randint(0, len(changes))
    torn = [part for change in changes[end : end + 1] for part in _torn(change, chance)]
    return [*changes[:end], *torn]


def _all_but_one(changes: list[_Change], chance: random.Random) -> list[_Change]:
    missing = chance.randrange(len(changes)) if changes else 0
    return [change for index, change in enumerate(changes) if index != missing]


def _any(changes: list[_Change], chance: random.Random) -> list[_Change]:
    kept: list[_Change] = []
    for change in changes:
        fate = chance.randrange(3)
        if fate == 0:
            kept.append(change)
        elif fate == 1:
            kept += _torn(change, chance)
    return kept


_FATES: tuple[Callable[[list[_Change], random.Random], list[_Change]], ...] = (
    _all,
    _none,
    _first,
    _all_but_one,
    _any,
    _any,
)


def _content(inode: _Inode, chance: random.Random) -> bytes:
    content = bytearray(inode.synced)
    for change in chance.choice(_FATES)([*inode.dropped], chance):
        change.apply(content)
    for change in chance.choice(_FATES)(inode.later, chance):
        change.apply(content)
    return bytes(content)


def _torn(change: _Change, chance: random.Random) -> list[_Change]:
    """Return some of the sectors of a write; a truncation is whole or not."""
    if isinstance(change, _Truncation):
        return [change] if chance.random() < 0.5 else []
    offset, data = change.offset, change.data
    ends = range(offset // SECTOR_BYTES * SECTOR_BYTES, offset + len(data), SECTOR_BYTES)
    sectors = [(max(offset, end), min(offset + len(data), end + SECTOR_BYTES)) for end in ends]
    return [
        _Write(begin, data[begin - offset : end - offset])
        for begin, end in sectors
        if chance.random() < 0.5
    ]
