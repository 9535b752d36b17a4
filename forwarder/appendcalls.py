"""The connection over which a sink appends: the table's columns, one call, several requests.

Both sinks of the write API use it, the one with offsets and the one on the default stream.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from forwarder.appends import Append, Refusal
from forwarder.bqservice import TableService
from forwarder.faults import (
    CREDENTIALS_REMEDY,
    Blame,
    FaultError,
    blame_grpc,
)
from forwarder.partitions import WRITE_API_PAST_DAYS
from forwarder.probe import DryRun, candidates
from forwarder.refusals import RefusalRun, refuses_all
from forwarder.rowproto import RequestEncoder
from forwarder.sink import Fault, FaultKind
from forwarder.writeapi import DEADLINE_S, Appender, CallError, WriteApi
from lifecycle import Settings
from spool import DeadLetter, Reading, SinkState

if TYPE_CHECKING:
    from forwarder.table import Column

IN_FLIGHT_MAX = 4
SCHEMA_SETTLES_S = 600.0


class AppendCalls:
    """Sends appends to a stream of one table and brings their answers.

    Args:
        settings: Project, dataset, table, emulators, instance id, whether to create the table.
        state: The sink's own file, which remembers the table.

    Attributes:
        table: ``projects/P/datasets/D/tables/T``.
        refusals: Counts refused rows; the sink tells it of deliveries and of accepted appends.
        unanswered: What was sent and has had no answer yet; after a CallError what never will.
    """

    def __init__(self, settings: Settings, state: SinkState | None = None) -> None:
        self._source = settings.instance_id
        self._service = TableService(settings, DEADLINE_S, WRITE_API_PAST_DAYS, state)
        self.table = self._service.table.resource
        self._api = WriteApi(settings, self.table)
        self._dry_run = DryRun(self._api)
        self._columns: Sequence[Column] = ()
        self._encoder: RequestEncoder | None = None
        self._outdated = False
        self._appender: Appender | None = None
        self._changed_at = float("-inf")
        self.refusals = RefusalRun(hold=settings.refused_policy == "hold")
        self.unanswered: deque[Append] = deque()

    def close(self) -> None:
        """Close all connections; the next ones have credentials that are read anew."""
        self.disconnect()
        self._service.close()

    def disconnect(self) -> None:
        """Close the connection to the stream, and its channel: a new one must not inherit it."""
        if self._appender is not None:
            self._appender.close()
            self._appender = None
        self._api.close()

    def begin(self, delivered_seq: int) -> bool:
        """Begin a delivery; return whether the table is found to be another one than before.

        Args:
            delivered_seq: Up to here all was delivered.
        """
        self.refusals.begin()
        recreated = self._service.look(delivered_seq)
        if recreated:
            self._leave_old_table()
        return recreated

    def recreated(self) -> bool:
        """Return whether what :meth:`prepare` has read is another table than before."""
        recreated = self._service.recreated()
        if recreated:
            self._leave_old_table()
        return recreated

    def _leave_old_table(self) -> None:
        """The connection, and what it was told, may be the dead table's."""
        self.disconnect()
        self._dry_run.forget()
        self._outdated = True

    def stream_refused(self) -> None:
        """Have :meth:`prepare` look at the table: its stream may be gone because it is."""
        self._outdated = True

    def check(self) -> Fault | None:
        """Return why nothing could be delivered; see :class:`forwarder.sink.CheckingSink`."""
        return self._service.check(self._api.target)

    @property
    def notice(self) -> str:
        """What an operator has to know of the table; empty if there is nothing."""
        return self._service.notice

    def prepare(self) -> None:
        """Know the table's columns; look again where the service has said that they changed.

        Raises:
            FaultError: The table cannot be read, or does not fit.
        """
        if self._outdated or not self._columns:
            self.columns_changed()

    def out_of_range(
        self, rows: Sequence[Reading], after_seq: int = 0
    ) -> tuple[list[Reading], list[DeadLetter]]:
        """Return the rows to be sent, and dead letters of those that the table cannot take.

        Args:
            rows: In the order of seq. The table's columns are known: :meth:`prepare`.
            after_seq: Up to here nothing is taken out.
        """
        good, dead = self._service.limits.split(rows, after_seq)
        return list(good), dead

    def columns_changed(self) -> bool:
        """Read the table's columns anew; return whether they are others than before.

        Raises:
            FaultError: The table cannot be read, or does not fit.
        """
        before, self._columns = self._columns, ()
        try:
            columns = self._service.read_columns(fresh=bool(before))
        except FaultError as error:
            if error.fault.kind is FaultKind.HOLD:
                self._changed_at = time.monotonic()
            raise
        self._outdated = False
        self._columns = columns
        if columns == before:
            return False
        if before:
            self._changed_at = time.monotonic()
        # The type of the rows is told once per connection.
        self.disconnect()
        self._dry_run.forget()
        self._encoder = RequestEncoder(columns, self._source)
        return True

    @property
    def schema_settles(self) -> bool:
        """Whether the table was changed, or mended, a moment ago.

        The write API learns of it minutes after the table shows it, and refuses rows until then.
        """
        return time.monotonic() - self._changed_at < SCHEMA_SETTLES_S

    def adapt(self, refusal: Refusal) -> bool:
        """After the refusal of a whole request: look at the table again; return whether it changed.

        Raises:
            FaultError: It cannot be read, does not fit, or the write API does not know it yet.
        """
        self.disconnect()
        if self.columns_changed():
            return True
        # A new column is in the table at once, and known to the write API minutes later.
        if refusal.kind == "SCHEMA_MISMATCH_EXTRA_FIELDS":
            fault = self.fault("append", CallError(refusal.code, refusal.details))
            raise FaultError(Fault(FaultKind.TRANSIENT, fault.problem))
        return False

    def refuses_all(self, words: str) -> FaultError:
        """Return what to raise where the service refuses every row.

        Args:
            words: The service's.
        """
        if self.schema_settles:
            problem = f"append: every row is refused, and the table has changed: {words}"
            return FaultError(Fault(FaultKind.TRANSIENT, problem))
        what = f"append to {self._service.table}"
        return FaultError(refuses_all(what, words, self._service.show))

    def blame_rows(self, append: Append, refusal: Refusal, behind: Iterable[Append] = ()) -> None:
        """Return if the rows that an append was refused for are at fault themselves.

        Args:
            append: The append.
            refusal: Why it was refused.
            behind: Other appends of this delivery that are not in the table yet.

        Raises:
            FaultError: It seems to be the table that refuses every row.
        """
        words = refusal.rows[0][1]
        named = {index for index, _ in refusal.rows if 0 <= index < len(append.rows)}
        if not named:
            return  # that is for the sink to find out
        if len(named) == len(append.rows):
            if self.schema_settles:
                raise self.refuses_all(words)
            self.refusals.refused(len(named))
        elif max(named) < len(named):
            # Of those behind them nothing is known: the service does not always name all.
            self.refusals.refused(len(named), in_doubt=len(named) > 1)
        else:
            self.refusals.accepted()  # as good as accepted: they were looked at, and not named
        if self.refusals.of_all and self._takes_others(append, named, behind):
            self.refusals.accepted()
        if self.refusals.of_all:
            raise self.refuses_all(words)
        self.refusals.buried()

    def _takes_others(self, append: Append, named: set[int], behind: Iterable[Append]) -> bool:
        """Return whether the service would take rows that it has not refused in this delivery."""
        if self._encoder is None:
            return False
        refused = [append.rows[index] for index in named]
        others = [row for index, row in enumerate(append.rows) if index not in named]
        others += [row for other in behind for row in other.rows]
        return bool(others) and self._dry_run.accepts_any(
            self._encoder, candidates(others, refused)
        )

    def create_stream(self, *, trial: bool = False) -> str:
        """Make a stream; return its name.

        Args:
            trial: One whose rows are looked at, and are never in the table.

        Raises:
            FaultError: It cannot be made now.
        """
        try:
            return self._api.create_stream(pending=trial)
        except CallError as error:
            self._after(error)
            if error.code == "NOT_FOUND":
                self._columns = ()
            raise FaultError(self.fault("create a write stream", error)) from error

    def finalize_stream(self, name: str) -> int | None:
        """Close a stream; return how many rows it has, or None if the service does not know it.

        Raises:
            FaultError: The service cannot be asked now.
        """
        self.disconnect()
        try:
            return self._api.finalize_stream(name)
        except CallError as error:
            self._after(error)
            if error.code == "NOT_FOUND":
                return None
            raise FaultError(self.fault("finalize the write stream", error)) from error

    def send(
        self, stream: str, appends: Sequence[Append], *, with_offsets: bool = True
    ) -> Iterator[tuple[Append, Any]]:
        """Send appends, several on their way at once; yield each with its answer, in order.

        Whoever stops early calls :meth:`drain` before anything else is sent.

        Args:
            stream: Its name.
            appends: In the order in which to send them.
            with_offsets: False on the default stream.

        Raises:
            CallError: The connection ended, or an answer did not come. It is closed.
            FaultError: There are no credentials.
        """
        self.unanswered.clear()
        waiting = iter(appends)
        append = next(waiting, None)
        while append is not None or self.unanswered:
            while append is not None and len(self.unanswered) < IN_FLIGHT_MAX:
                self._send(stream, append, with_offsets=with_offsets)
                append = next(waiting, None)
            answer = self._receive()
            yield self.unanswered.popleft(), answer

    def drain(self) -> None:
        """After a refusal: take the answers to what is still on its way, whatever they say.

        What comes next begins a new call. Whether a call whose first request was refused
        knows the rows' type is not documented.

        Raises:
            CallError: The connection ended, or an answer did not come. It is closed.
        """
        while self.unanswered:
            self._receive()
            self.unanswered.popleft()
        if self._appender is not None:
            self._appender.close()
            self._appender = None

    def _send(self, stream: str, append: Append, *, with_offsets: bool) -> None:
        if self._encoder is None:
            raise RuntimeError("send before prepare")
        appender = self._appender
        # The service closes a connection that was idle for some minutes. While answers are
        # missing, those that came and the end stand in the old one's queue: a new one's first
        # answer must not be taken for theirs.
        idle = not self.unanswered
        if appender is None or appender.stream != stream or (appender.ended and idle):
            if appender is not None:
                appender.close()
            appender = self._appender = self._api.open(stream)
        self.unanswered.append(append)
        appender.send(
            self._encoder.request(
                self._encoder.rows(append.rows),
                append.cut.offset if with_offsets else None,
                stream=stream if appender.fresh else "",
            )
        )

    def _receive(self) -> Any:  # noqa: ANN401 - an AppendRowsResponse, which has no type
        if self._appender is None:
            raise RuntimeError("receive before send")
        try:
            answer = self._appender.receive()
        except CallError:
            self.disconnect()
            raise
        if answer.HasField("updated_schema"):
            self._outdated = True
        return answer

    def _after(self, error: CallError) -> None:
        if error.code in {"DEADLINE_EXCEEDED", "UNAVAILABLE"}:
            self.disconnect()  # the path may be dead: the next try begins with a new connection

    def fault(self, what: str, error: CallError) -> Fault:
        """Return the fault to report when the service refuses ``what``, or cannot be reached."""
        if error.code == "UNAVAILABLE" and (fault := self._api.access_fault(error.details)):
            return fault
        problem = f"{what} of {self._service.table}: {error.code}: {error.details}"
        blame = blame_grpc(error.code)
        if blame is Blame.NOBODY or (error.code == "NOT_FOUND" and self._service.settling):
            return Fault(FaultKind.TRANSIENT, problem)
        remedy = {
            "NOT_FOUND": self._service.remedy(404),
            "PERMISSION_DENIED": self._service.remedy(403),
            "UNAUTHENTICATED": CREDENTIALS_REMEDY,
        }
        return Fault(
            FaultKind.HOLD,
            problem,
            remedy.get(
                error.code,
                f"{self._service.show}; until it is mended, "
                "BIGQUERY_WRITE_METHOD=insert_all may work",
            ),
        )
