"""What makes spool.db whole: its tables and its epoch."""

import sqlite3
import time
import uuid
from pathlib import Path

from spool.errors import file_fault
from spool.locks import OwnerConnection


def migrate_spool(conn: OwnerConnection, path: Path) -> None:
    """Bring the file to the current format; give a new one its epoch.

    Raises:
        StorageFaultError: It cannot be written.
    """
    from spool.migrations import migrate, spool_migrations  # noqa: PLC0415 - see that module

    def initialise(conn: sqlite3.Connection) -> None:
        created_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        new = {"epoch": str(uuid.uuid4()), "created_at": created_at, "app_env": ""}
        for key, value in new.items():
            conn.execute("INSERT OR IGNORE INTO meta (key, value) VALUES (?, ?)", (key, value))

    try:
        migrate(conn, spool_migrations, initialise)
    except OSError as error:
        raise file_fault(error, "migration", path) from error
