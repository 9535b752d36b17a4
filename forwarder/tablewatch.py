"""Notices that a table was dropped and made again, and tells which rows may be in the dead one.

After a table was replaced the service may go on taking rows for the old one for minutes, and
confirms them. ``tables.get`` tells when a table was made: the sink's file remembers that, and how
far delivery was when the table was last seen. What was delivered since may be gone with it. Those
readings are still in the spool, for SPOOL_RETENTION_HOURS.
"""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

import msgspec

from forwarder.tablename import TableName
from lifecycle import fields
from spool import DiskFullError, SinkState, spool_path

log = logging.getLogger("forwarder.bigquery")

OLD_TABLE_LINGERS_S = 600.0
"""So long after a table was made the service may write to the one of before."""

_SEEN_KEY = "bigquery_table"
_LOST_KEY = "bigquery_table_replaced"


class _Seen(msgspec.Struct):
    """The table as it was last seen."""

    table: str
    created_ms: int
    seen_us: int
    epoch: str
    seq: int
    """All up to here was delivered before."""


class _Replaced(msgspec.Struct):
    """What may be in a table that is dead."""

    table: str
    noted_us: int
    seen_us: int
    """When the dead one was last seen alive."""
    epoch: str
    first_seq: int
    last_seq: int


class TableWatch:
    """Remembers one table in the sink's own file.

    Args:
        table: Its name.
        state: The sink's file; None to remember nothing.
        retention_h: How long delivered readings stay in the spool.
        wall: Seconds since 1970.
    """

    def __init__(
        self,
        table: TableName,
        state: SinkState | None,
        retention_h: float,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._table = table
        self._state = state
        self._retention_us = int(retention_h * 3_600e6)
        self._wall = wall
        self._lost: _Replaced | None = None
        if state is not None:
            lost = _decoded(state.remembered(_LOST_KEY), _Replaced)
            if lost is not None and lost.table == str(table):
                self._lost = lost

    @property
    def notice(self) -> str:
        """What an operator has to know, while it can still be helped; empty if there is nothing."""
        lost = self._lost
        if lost is None or lost.last_seq < lost.first_seq:
            return ""
        until_us = lost.noted_us + self._retention_us
        if self._wall() * 1e6 > until_us:
            return ""
        return (
            f"{self._table} was dropped and made again: readings of seq {lost.first_seq} to "
            f"{lost.last_seq} may be in the dead one; they stay in the spool until "
            f"{_time(until_us)} at least, see 'A table that was made again' in docs/bigquery.md"
        )

    def is_now(self, created_ms: int, seen_seq: int, delivered_seq: int) -> bool:
        """Take over what the service says of the table; return whether it is another one.

        Args:
            created_ms: When it was made, milliseconds since 1970.
            seen_seq: What was delivered before the service was asked.
            delivered_seq: What is delivered by now.
        """
        if self._state is None:
            return False
        try:
            return self._compare(self._state, created_ms, seen_seq, delivered_seq)
        except DiskFullError as error:
            # The next answer brings the same, and there may be room then.
            log.warning("the table's creation time could not be noted: %s", error)
            return False

    def _compare(
        self, state: SinkState, created_ms: int, seen_seq: int, delivered_seq: int
    ) -> bool:
        known = _decoded(state.remembered(_SEEN_KEY), _Seen)
        now_us = int(self._wall() * 1e6)
        seen = _Seen(str(self._table), created_ms, now_us, state.known_epoch(), seen_seq)
        if known is None or known.table != seen.table:
            _note(state, seen)
            return False
        if known.created_ms == created_ms:
            self._lingers(state, created_ms, seen.epoch, delivered_seq)
            if (known.epoch, known.seq) != (seen.epoch, seen.seq):
                _note(state, seen)
            return False
        first = known.seq + 1 if known.epoch == seen.epoch else 1
        lost = _Replaced(
            seen.table, now_us, known.seen_us, seen.epoch, first, max(delivered_seq, first - 1)
        )
        _note(state, seen, lost)
        self._lost = lost
        self._tell(state, lost, created_ms, known.created_ms)
        return True

    def _lingers(self, state: SinkState, created_ms: int, epoch: str, delivered_seq: int) -> None:
        """Let what is delivered shortly after the new table was made be in doubt as well."""
        lost = self._lost
        if lost is None or lost.epoch != epoch or delivered_seq <= lost.last_seq:
            return
        if lost.noted_us > (created_ms / 1000 + OLD_TABLE_LINGERS_S) * 1e6:
            return
        if self._wall() > created_ms / 1000 + OLD_TABLE_LINGERS_S:
            return
        lost.last_seq = delivered_seq
        _note(state, None, lost)
        self._tell(state, lost, created_ms, None)

    def _tell(
        self, state: SinkState, lost: _Replaced, created_ms: int, before_ms: int | None
    ) -> None:
        rows = lost.last_seq - lost.first_seq + 1
        log.error(
            "the table was dropped and made again; readings delivered since the old one was last "
            "seen may be in the dead one",
            extra=fields(
                table=str(self._table),
                rows=rows,
                first_seq=lost.first_seq,
                last_seq=lost.last_seq,
                old_table_last_seen=_time(lost.seen_us),
                old_table_made=None if before_ms is None else _time(before_ms * 1000),
                new_table_made=_time(created_ms * 1000),
                in_the_spool_until=_time(lost.noted_us + self._retention_us),
                send_again=self.send_again(state, lost.first_seq, lost.last_seq) if rows else "",
            ),
        )

    def send_again(self, state: SinkState, first_seq: int, last_seq: int) -> str:
        """Return the commands that load a range of the spool's readings into the table.

        Args:
            state: The sink's file, in SPOOL_DIR.
            first_seq: The first one.
            last_seq: The last one.
        """
        # char(33) is an exclamation mark, which an interactive shell would take for its history.
        query = (
            "select json_object('event_id', r.event_id, 'site_code', r.site_code, 'sensor_id', "
            "r.sensor_id, 'pi_tag', r.pi_tag, 'timestamp', r.timestamp, 'value', "
            "json(printf('%' || char(33) || '.17g', r.value)), 'topic', r.topic, 'payload', "
            "cast(w.payload as text), 'received_at', r.received_at, 'seq', r.seq) from readings r "
            "join reading_row "
            "w on w.seq = r.seq where r.seq between "
        )
        query += f"{first_seq} and {last_seq}"
        load = "bq load --source_format=NEWLINE_DELIMITED_JSON"
        return (
            f'sqlite3 -readonly {spool_path(state.path.parent)} "{query}" > again.ndjson && '
            f"{load} {self._table.for_bq} again.ndjson"
        )


def _note(state: SinkState, seen: _Seen | None, lost: _Replaced | None = None) -> None:
    values = {} if seen is None else {_SEEN_KEY: msgspec.json.encode(seen).decode()}
    if lost is not None:
        values[_LOST_KEY] = msgspec.json.encode(lost).decode()
    state.remember(values)


_T = TypeVar("_T")


def _decoded(text: str, kind: type[_T]) -> _T | None:
    try:
        return msgspec.json.decode(text, type=kind) if text else None
    except msgspec.DecodeError:
        return None  # of a later release; it is written again


def _time(microseconds: int) -> str:
    try:
        moment = datetime.fromtimestamp(microseconds // 1_000_000, UTC)
    except (OverflowError, ValueError, OSError):
        return str(microseconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
