"""How far some sites were delivered ahead of others that are held; in the sink's own file.

The cursor is one number for all sites. While one site is held, the cursor stays before its first
reading, and what was delivered of other sites behind it is noted here, so that a restart does
not send it again. Since each site is delivered in order, two things say all: how far the others
are, and where each held site begins.
"""

import sqlite3
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spool.dead_letters import DeadLetter
    from spool.sinkstate import SinkState


@dataclass(slots=True)
class AheadStep:
    """What changed behind the cursor; written in the transaction that moves it.

    Attributes:
        through: Every reading behind the cursor and up to here is settled, but for those of held
            sites; 0 once no site is held.
        held: Sites that are held from another seq or for another reason than before: the first
            seq that waits, and why.
        released: Sites that are held no longer.
        dead: Dead letters behind the cursor. They are counted when it passes them.
        first: Whether this is the first step: nothing that the file has from before counts.
    """

    through: int = 0
    held: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    released: Collection[str] = ()
    dead: "list[DeadLetter]" = field(default_factory=list)
    first: bool = False


@dataclass(slots=True)
class Ahead:
    """What is settled behind the cursor."""

    through: int
    held: dict[str, tuple[int, str]]
    """By site: the first seq that waits, and why."""
    dead: list[int]
    """The seq of each dead letter behind the cursor, in order."""


def load_ahead(state: "SinkState", epoch: str) -> Ahead | None:
    """Return what is settled behind the cursor in the spool of ``epoch``; None if nothing is.

    Raises:
        StorageFaultError: The file cannot be read.
    """
    position = state.position(epoch)
    with state.transaction("read what was delivered ahead") as conn:
        row = conn.execute("SELECT epoch, through_seq FROM ahead").fetchone()
        if row is None or row[0] != epoch or row[1] <= position:
            return None
        held = {
            site: (first, detail)
            for site, first, detail in conn.execute(
                "SELECT site_code, first_seq, detail FROM held_site"
            )
        }
        dead = conn.execute("SELECT seq FROM dead_ahead ORDER BY seq").fetchall()
    return Ahead(int(row[1]), held, [seq for (seq,) in dead])


def write_ahead(conn: sqlite3.Connection, epoch: str, cursor: int, step: AheadStep) -> None:
    """Write one step, within the transaction that moves the cursor. May be repeated.

    Args:
        conn: The sink's file.
        epoch: Of the spool.
        cursor: Where the cursor is moved to.
        step: What changed.
    """
    if step.first or not step.through:
        # Of an earlier hold, or of another spool.
        for table in ("dead_ahead", "held_site", "ahead"):
            conn.execute(f"DELETE FROM {table}")  # noqa: S608 - our own names
    if not step.through:
        return
    now_us = time.time_ns() // 1000
    conn.execute(
        "INSERT INTO ahead (id, epoch, through_seq) VALUES (1, ?, ?) ON CONFLICT (id) DO UPDATE "
        "SET epoch=excluded.epoch, through_seq=excluded.through_seq",
        (epoch, step.through),
    )
    conn.execute("DELETE FROM dead_ahead WHERE seq <= ?", (cursor,))
    conn.executemany(
        "INSERT INTO dead_ahead (seq) VALUES (?) ON CONFLICT (seq) DO NOTHING",
        [(letter.row[0],) for letter in step.dead],
    )
    conn.executemany("DELETE FROM held_site WHERE site_code = ?", [(s,) for s in step.released])
    conn.executemany(
        "INSERT INTO held_site (site_code, first_seq, detail, since_us) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (site_code) DO UPDATE SET first_seq=excluded.first_seq, "
        "detail=excluded.detail",
        [(site, first, detail, now_us) for site, (first, detail) in step.held.items()],
    )
