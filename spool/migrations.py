"""From any older format of a file to the current one, by sqlite-utils' migrations.

Imported only when there is something to migrate, because sqlite-utils takes memory; and the
collector, which runs for months, has even that done by ``python -m spool.migrations SPOOL_DIR``
(:func:`spool.apart.prepare_apart`).
"""

import contextlib
import sqlite3
import sys
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

from sqlite_utils import Database, Migrations

from spool.connection import APPLICATION_ID
from spool.errors import SpoolError
from spool.locks import OwnerConnection, begin, commit
from spool.shown import with_shown_texts
from spool.writer import SpoolWriter


def _statements(script: str) -> Iterator[str]:
    """Yield the script's statements.

    executescript() would commit in between, and a half-made file is worse than none.
    """
    buffer = ""
    for line in script.splitlines(keepends=True):
        buffer += line
        if sqlite3.complete_statement(buffer):
            yield buffer
            buffer = ""
    if buffer.strip() and not buffer.lstrip().startswith("--"):
        raise ValueError(f"the SQL script ends inside a statement: {buffer[-60:]!r}")


def _run_script(db: Database, name: str, version: int) -> None:
    script = files("spool.schema").joinpath(name).read_text(encoding="utf-8")
    for statement in _statements(with_shown_texts(script)):
        db.conn.execute(statement)
    db.conn.execute(f"PRAGMA application_id={APPLICATION_ID}")
    db.conn.execute(f"PRAGMA user_version={version}")


spool_migrations = Migrations("spool")
sink_migrations = Migrations("sink")


@spool_migrations(name="1")
def _spool_1(db: Database) -> None:
    _run_script(db, "spool_1.sql", 1)


@spool_migrations(name="2")
def _spool_2(db: Database) -> None:
    _run_script(db, "spool_2.sql", 2)


@spool_migrations(name="3")
def _spool_3(db: Database) -> None:
    _run_script(db, "spool_3.sql", 3)


@spool_migrations(name="4")
def _spool_4(db: Database) -> None:
    _run_script(db, "spool_4.sql", 4)


@sink_migrations(name="1")
def _sink_1(db: Database) -> None:
    _run_script(db, "sink_1.sql", 1)


@sink_migrations(name="2")
def _sink_2(db: Database) -> None:
    _run_script(db, "sink_2.sql", 2)


@sink_migrations(name="3")
def _sink_3(db: Database) -> None:
    _run_script(db, "sink_3.sql", 3)


@sink_migrations(name="4")
def _sink_4(db: Database) -> None:
    _run_script(db, "sink_4.sql", 4)


@sink_migrations(name="5")
def _sink_5(db: Database) -> None:
    _run_script(db, "sink_5.sql", 5)


def migrate(
    conn: OwnerConnection,
    migrations: Migrations,
    initialise: Callable[[sqlite3.Connection], None],
) -> None:
    """Bring the file to the current format and run ``initialise``, in one transaction.

    ``initialise`` fills in what a new file needs to be whole (its epoch), so that no crash
    can leave a file of the right format without it.
    """
    db = Database(conn, execute_plugins=False)
    begin(conn)
    try:
        migrations.apply(db)
        initialise(conn)
    except BaseException:
        conn.rollback()
        raise
    commit(conn)


if __name__ == "__main__":
    # Whoever started this opens the file next, meets the same error and tells it.
    with contextlib.suppress(SpoolError):
        SpoolWriter.open(Path(sys.argv[1])).close()
