"""The write streams of tables in memory: offsets, ends, lifetimes. No protocol is known here."""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.fakes.rows import Row
from tests.fakes.tables import NotFoundError, Table, TableStore

DEFAULT_STREAM = "_default"


class StreamError(Exception):
    """An append or a call that a stream refuses.

    Attributes:
        code: The gRPC status by name.
        kind: The StorageErrorCode by name; empty for none.
    """

    def __init__(self, code: str, kind: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.kind = kind


@dataclass(slots=True)
class WriteStream:
    """One application-created stream of type COMMITTED."""

    name: str
    table: Table
    row_count: int = 0
    finalized: bool = False


class WriteStreams:
    """All streams; thread-safe.

    Args:
        tables: Where the rows go.
    """

    def __init__(self, tables: TableStore) -> None:
        self._tables = tables
        self._lock = threading.RLock()
        self._streams: dict[str, WriteStream] = {}
        self._numbers = itertools.count(1)

    @property
    def names(self) -> list[str]:
        """The names of all streams that were ever created and not forgotten."""
        with self._lock:
            return list(self._streams)

    def create(self, parent: str) -> WriteStream:
        """Create a stream of the table ``projects/P/datasets/D/tables/T``."""
        table = self.table(parent)
        with self._lock:
            name = f"{parent}/streams/S{next(self._numbers)}"
            stream = self._streams[name] = WriteStream(name, table)
            return stream

    def table(self, path: str) -> Table:
        """Return the table of that path, or of a stream's."""
        parts = path.split("/")
        if len(parts) < 6 or parts[::2][:3] != ["projects", "datasets", "tables"]:
            raise StreamError("INVALID_ARGUMENT", "", f"Invalid resource name: {path}")
        try:
            return self._tables.table(".".join(parts[1:6:2]))
        except NotFoundError as error:
            raise StreamError("NOT_FOUND", "TABLE_NOT_FOUND", f"{error} Entity: {path}") from error

    def stream(self, name: str) -> WriteStream:
        """Return a stream, if it and the table it was made for are still there."""
        with self._lock:
            stream = self._streams.get(name)
            if stream is None or self.table(name) is not stream.table:
                raise StreamError(
                    "NOT_FOUND",
                    "STREAM_NOT_FOUND",
                    f"Requested entity was not found. Entity: {name}",
                )
            return stream

    def finalize(self, name: str) -> int:
        """End a stream; return its number of rows."""
        with self._lock:
            stream = self.stream(name)
            stream.finalized = True
            return stream.row_count

    def forget(self, name: str) -> None:
        """Let a stream be gone, as one without traffic for three days is."""
        with self._lock:
            del self._streams[name]

    def append(
        self, name: str, offset: int | None, count: int, load: Callable[[], Sequence[Row]]
    ) -> int | None:
        """Append rows, all or none; return their offset, or None on the default stream."""
        with self._lock:
            if name.rpartition("/")[2] == DEFAULT_STREAM:
                if offset is not None:
                    text = f"Offset can't be specified for the default stream. Entity: {name}"
                    raise StreamError("INVALID_ARGUMENT", "", text)
                self._tables.append(self.table(name), [None] * count, load)
                return None
            stream = self.stream(name)
            if stream.finalized:
                raise StreamError(
                    "INVALID_ARGUMENT",
                    "STREAM_FINALIZED",
                    f"Stream has been finalized. Entity: {name}",
                )
            end = stream.row_count
            if offset is not None and offset < end:
                text = (
                    f"The offset is within stream, expected offset {end}, received {offset} "
                    f"Entity: {name}"
                )
                raise StreamError("ALREADY_EXISTS", "OFFSET_ALREADY_EXISTS", text)
            if offset is not None and offset > end:
                text = (
                    f"The offset is beyond stream, expected offset {end}, received {offset} "
                    f"Entity: {name}"
                )
                raise StreamError("OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE", text)
            self._tables.append(stream.table, [None] * count, load)
            stream.row_count += count
            return end
