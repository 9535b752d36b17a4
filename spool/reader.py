"""A forwarder's side of spool.db: it reads what is durable, and changes nothing.

With synchronous=FULL a reader sees a row only after the sync that made it durable, so a
forwarder may send whatever it can read.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

from spool.bell import Listener
from spool.check import last_seq_in_order
from spool.connection import format_version, open_reader
from spool.errors import (
    CorruptFileError,
    CursorAheadError,
    FileMissingError,
    NewerFormatError,
    file_fault,
    translated,
)
from spool.files import spool_path
from spool.records import PAYLOAD, READING_COLUMNS, TOPIC, Reading, lenient_text
from spool.writer import SPOOL_FORMAT

_SELECT = f"SELECT seq, {READING_COLUMNS} FROM reading_row WHERE seq > ? ORDER BY seq LIMIT ?"  # noqa: S608 - our own constant


class SpoolReader:
    """spool.db, opened read-only."""

    def __init__(self, conn: sqlite3.Connection, path: Path) -> None:
        self._conn = conn
        self.path = path
        self._inode = path.stat().st_ino
        self._data_version = -1
        self._listener: Listener | None = None
        meta = dict(conn.execute("SELECT key, value FROM meta"))
        self.epoch: str = meta["epoch"]

    @classmethod
    def open(cls, directory: Path) -> "SpoolReader":
        """Open the spool in ``directory``.

        Raises:
            FileMissingError: The collector has not made it yet.
            StorageFaultError: It cannot be opened; CorruptFileError if it is damaged.
            NewerFormatError: A newer release wrote it.
        """
        path = spool_path(directory)
        conn = open_reader(path)
        try:
            version = format_version(conn, path)
            if version == 0:
                raise FileMissingError(f"{path} is not finished: the collector is making it")
            if version > SPOOL_FORMAT:
                raise NewerFormatError(
                    f"{path} has format {version}, this release knows {SPOOL_FORMAT}; "
                    "install the same release for all of Sluice's programs"
                )
            return cls(conn, path)
        except FileNotFoundError as error:
            conn.close()
            raise FileMissingError(f"{path} went away") from error
        except OSError as error:
            conn.close()
            raise file_fault(error, "look for the file", path) from error
        except sqlite3.Error as error:
            conn.close()
            raise translated(error, "open for reading", path) from error
        except BaseException:
            conn.close()
            raise

    def close(self) -> None:
        """Close."""
        self._stop_listening()
        self._conn.close()

    def listen(self) -> str:
        """Have the kernel tell of new rows from here on; return why it cannot, empty if it does.

        Then :meth:`fileno` is readable once there are some. Call it again from time to time: the
        bell may have been replaced. Rows of before are not announced; look after this.
        """
        if self._listener is not None and not self._listener.replaced():
            return ""
        self._stop_listening()
        try:
            self._listener = Listener.open(self.path.parent)
        except OSError as error:
            return str(error)
        return ""

    @property
    def listening(self) -> bool:
        """Whether new rows are announced."""
        return self._listener is not None

    def fileno(self) -> int:
        """Return the descriptor to wait on while :attr:`listening`."""
        if self._listener is None:
            raise ValueError("nothing is listened to")
        return self._listener.fileno()

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def changed(self) -> bool:
        """Return whether somebody has committed since the last call; cheap enough to poll.

        What is announced after this call began can be waited for.
        """
        if self._listener is not None:
            self._listener.forget()
        try:
            (version,) = self._conn.execute("PRAGMA data_version").fetchone()
        except sqlite3.Error as error:
            raise translated(error, "look for new rows", self.path) from error
        if version == self._data_version:
            return False
        self._data_version = version
        return True

    def replaced(self) -> bool:
        """Return whether the path now leads to another file than the one that is open.

        Raises:
            StorageFaultError: The disk does not tell.
        """
        try:
            return self.path.stat().st_ino != self._inode
        except FileNotFoundError:
            return True
        except OSError as error:
            raise file_fault(error, "look for the file", self.path) from error

    def app_env(self) -> str:
        """Return the ``APP_ENV`` under which the spool is filled; empty if never."""
        return self._meta("app_env")

    def environment_from(self) -> int:
        """Return the last seq that was taken under another ``APP_ENV`` than now; 0 if none."""
        return int(self._meta("app_env_from_seq") or 0)

    def dropped_through(self) -> int:
        """Return the highest seq that SPOOL_FULL_POLICY=drop-oldest has deleted; 0 if none."""
        return int(self._meta("dropped_through_seq") or 0)

    def _meta(self, key: str) -> str:
        try:
            row = self._conn.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise translated(error, "read meta", self.path) from error
        return str(row[0]) if row else ""

    def last_seq(self) -> int:
        """Return the highest seq ever given in this epoch; 0 in a new file.

        Raises:
            StorageFaultError: It cannot be read; CorruptFileError if it is damaged.
        """
        try:
            return last_seq_in_order(self._conn, self.path)
        except sqlite3.Error as error:
            raise translated(error, "read the last seq", self.path) from error

    def read_after(self, seq: int, max_rows: int, max_bytes: int) -> list[Reading]:
        """Return the readings that follow ``seq``, oldest first.

        The statement is finished before this returns: a reader that stayed in it would keep
        the write-ahead log from being reset.

        Args:
            seq: The position after which to read.
            max_rows: At most this many.
            max_bytes: Stop after the row that brings topics and payloads to this sum.

        Raises:
            StorageFaultError: They cannot be read; CorruptFileError if they are damaged.
        """
        try:
            return self._read(seq, max_rows, max_bytes)
        except sqlite3.OperationalError as error:
            if "decode to UTF-8" not in str(error):
                raise translated(error, f"read after seq {seq}", self.path) from error
        except sqlite3.Error as error:
            raise translated(error, f"read after seq {seq}", self.path) from error
        # One flipped bit in a text must not stop everything behind it: read it as well as
        # can be; its checksum is wrong. The module's own decoding is several times faster.
        self._conn.text_factory = lenient_text
        try:
            return self._read(seq, max_rows, max_bytes)
        except sqlite3.Error as error:
            raise translated(error, f"read after seq {seq}", self.path) from error
        finally:
            self._conn.text_factory = str

    def _read(self, seq: int, max_rows: int, max_bytes: int) -> list[Reading]:
        rows: list[Reading] = []
        size = 0
        with closing(self._conn.execute(_SELECT, (seq, max_rows))) as cursor:
            for row in cursor:
                rows.append(row)
                try:
                    size += len(row[PAYLOAD]) + len(row[TOPIC])
                except TypeError:
                    continue  # a flipped bit made it something else; the checksum is wrong
                if size >= max_bytes:
                    break
        self._check_numbers(rows)
        return rows

    def _check_numbers(self, rows: list[Reading]) -> None:
        """Refuse rows whose numbers were damaged; the checksum does not cover them.

        A flipped bit in one passes SQLite's own checks while reading, and a cursor that
        followed it would skip every row up to there.
        """
        if not rows:
            return
        first = rows[0][0]
        in_order = [row[0] for row in rows] == list(range(first, first + len(rows)))
        if not in_order or rows[-1][0] > self.last_seq():
            raise CorruptFileError(
                f"{self.path} is damaged: the numbers of the rows from seq {first} on are not in "
                "order",
                self.path,
            )

    def check_position(self, seq: int) -> None:
        """Make sure that a cursor at ``seq`` can belong to this spool.

        Raises:
            CursorAheadError: It is beyond the last row ever written.
        """
        last = self.last_seq()
        if seq > last:
            raise CursorAheadError(
                f"the cursor stands at seq {seq}, but the last reading in {self.path} is {last}: "
                "the spool has lost rows (restored from a copy? a disk that lies about syncs?). "
                "Nothing is sent, because new readings would be skipped. To begin a new epoch, "
                "which sends everything in the spool again, move spool.db, spool.db-wal and "
                "spool.db-shm away while the collector is stopped; to keep them, ask for help"
            )
