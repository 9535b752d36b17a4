"""The write streams of tables in memory: offsets, ends, lifetimes. No protocol is known here."""

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.fakes.rows import Row
from tests.fakes.tables import NotFoundError, Table, TableStore

DEFAULT_STREAM = "_default"


class StreamError(Exception):
    """An append or a call that a stream refuses.

    Attributes:
        code: The gRPC status by name.
        kind: The StorageErrorCode by name; empty for none.
        entity: The resource that the error is about.
        detail: The StorageError's own text, where it is not the status's.
    """

    def __init__(
        self, code: str, kind: str, message: str, entity: str = "", *, detail: str = ""
    ) -> None:
        super().__init__(f"{message} Entity: {entity}" if entity else message)
        self.code = code
        self.kind = kind
        self.entity = entity
        self.detail = detail or message


class MalformedError(StreamError):
    """A request that no client may send, whatever the state of stream and table."""

    def __init__(self, message: str, entity: str = "") -> None:
        super().__init__("INVALID_ARGUMENT", "", message, entity)


@dataclass(slots=True)
class WriteStream:
    """One stream; application-created ones are of type COMMITTED, or PENDING."""

    name: str
    table: Table
    pending: bool = False
    """Whether its rows are to be committed, which nothing here does: they are never seen."""
    row_count: int = 0
    finalized: bool = False
    created_ms: int = field(default_factory=lambda: int(time.time() * 1000))
    expired: bool = False
    """Whether it takes no appends any more, and can only be asked for its row count."""
    writers: list[int] = field(default_factory=list)
    """The connections that have appended to it, in the order of their first appends."""


class WriteStreams:
    """All streams; thread-safe.

    Args:
        tables: Where the rows go.

    Attributes:
        project_numbers: Project ids, each with the number that stands for it in the names of new
            streams.
        plain: Whether a stream that takes no appends any more says so by FAILED_PRECONDITION
            without a StorageError.
    """

    def __init__(self, tables: TableStore) -> None:
        self.project_numbers: dict[str, str] = {}
        self.plain = False
        self._tables = tables
        self._lock = threading.RLock()
        self._streams: dict[str, WriteStream] = {}
        self._numbers = itertools.count(1)
        self._created = 0

    @property
    def names(self) -> list[str]:
        """The names of the COMMITTED streams that were ever created and not forgotten."""
        with self._lock:
            return [name for name, stream in self._streams.items() if not stream.pending]

    @property
    def created(self) -> int:
        """How many COMMITTED streams were created, forgotten ones too."""
        return self._created

    def create(self, parent: str, *, pending: bool = False) -> WriteStream:
        """Create a stream of the table ``projects/P/datasets/D/tables/T``."""
        table = self.table(parent)
        with self._lock:
            self._created += not pending
            _, project, rest = parent.split("/", 2)
            project = self.project_numbers.get(project, project)
            number = f"{'P' if pending else 'S'}{next(self._numbers)}"
            name = f"projects/{project}/{rest}/streams/{number}"
            stream = self._streams[name] = WriteStream(name, table, pending=pending)
            return stream

    def table(self, path: str) -> Table:
        """Return the table of that path, or of a stream's."""
        parts = path.split("/")
        if len(parts) < 6 or parts[:6:2] != ["projects", "datasets", "tables"]:
            raise MalformedError(f"Invalid resource name: {path}")
        ids = {number: project for project, number in self.project_numbers.items()}
        project, dataset, table = parts[1:6:2]
        try:
            return self._tables.writable(f"{ids.get(project, project)}.{dataset}.{table}")
        except NotFoundError as error:
            text = "Requested entity was not found."
            raise StreamError("NOT_FOUND", "TABLE_NOT_FOUND", text, path) from error

    def stream(self, name: str) -> WriteStream:
        """Return a stream, if it and the table it was made for are still there.

        A table that was deleted and created anew has no streams but its default one.
        """
        with self._lock:
            table = self.table(name)
            if is_default(name):
                return WriteStream(name, table, created_ms=table.created_ms)
            stream = self._streams.get(name)
            if stream is None or table is not stream.table:
                raise _not_found(name)
            return stream

    def finalize(self, name: str) -> int:
        """End a stream; return its number of rows."""
        with self._lock:
            if is_default(name):
                raise MalformedError("The default stream cannot be finalized.", name)
            stream = self.stream(name)
            stream.finalized = True
            return stream.row_count

    def forget(self, name: str, *, countable: bool = False) -> None:
        """Let a stream be gone, as one without traffic for three days is.

        Args:
            name: Which.
            countable: Whether it can still be got and finalized, which is not documented.
        """
        with self._lock:
            if countable:
                self._streams[name].expired = True
            else:
                del self._streams[name]

    def open_for_append(self, name: str, offset: int | None) -> WriteStream:
        """Return the stream if it takes an append at ``offset`` now; None means its end."""
        with self._lock:
            if is_default(name):
                if offset is not None:
                    text = "Offset can't be specified for the default stream."
                    raise MalformedError(text, name)
                return self.stream(name)
            stream = self.stream(name)
            if self.plain and (stream.expired or stream.finalized):
                raise StreamError("FAILED_PRECONDITION", "", "Stream is not open.", name)
            if stream.expired:
                raise _not_found(name)
            if stream.finalized:
                text = "Stream has been finalized and cannot be appended."
                raise StreamError("INVALID_ARGUMENT", "STREAM_FINALIZED", text, name)
            end = stream.row_count
            if offset is not None and offset < end:
                text = f"The offset is within stream, expected offset {end}, received {offset}"
                raise StreamError("ALREADY_EXISTS", "OFFSET_ALREADY_EXISTS", text, name)
            if offset is not None and offset > end:
                text = f"The offset is beyond stream, expected offset {end}, received {offset}"
                raise StreamError("OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE", text, name)
            return stream

    def append(
        self, name: str, offset: int | None, count: int, load: Callable[[], Sequence[Row]]
    ) -> int | None:
        """Append rows, all or none; return their offset, or None on the default stream."""
        with self._lock:
            stream = self.open_for_append(name, offset)
            if not stream.pending:
                self._tables.append(stream.table, [None] * count, load)
            if is_default(name):
                return None
            end = stream.row_count
            stream.row_count += count
            return end

    def claim(self, name: str, connection: int) -> bool:
        """Note that a connection appends to a stream; return whether a newer one already has.

        Default streams, which several may append to, keep no such books.
        """
        with self._lock:
            writers = self.stream(name).writers
            if connection not in writers:
                writers.append(connection)
            return writers[-1] != connection


def is_default(name: str) -> bool:
    """Return whether a name is that of a table's default stream."""
    return name.rpartition("/")[2] == DEFAULT_STREAM


def _not_found(name: str) -> StreamError:
    text = "Requested entity was not found."
    return StreamError("NOT_FOUND", "STREAM_NOT_FOUND", text, name)
