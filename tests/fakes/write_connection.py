"""One AppendRows call: what came first holds for what follows, answers go out in order."""

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import DecodeError

from tests.fakes.faults import LoseAnswer
from tests.fakes.write_calls import EndOfCallError, check_routing, cut_off, end_call, meet_fault
from tests.fakes.write_faults import InStream, Withhold, WrongOffset
from tests.fakes.write_messages import (
    AppendRowsRequest,
    append_answer,
    error_answer,
    on_wire,
    row_errors_answer,
    schema_message,
    status_message,
    status_of,
)
from tests.fakes.write_rows import RowReader, SchemaError, row_reader
from tests.fakes.write_streams import MalformedError, StreamError, WriteStream, is_default

if TYPE_CHECKING:
    from tests.fakes.rows import Column
    from tests.fakes.tables import Table
    from tests.fakes.write_api import FakeWriteApi

# https://cloud.google.com/bigquery/quotas#write-api-limits. In its answers the service counts
# 10 MiB, and newer versions of its reference say 20 MB: this is the strictest of the three.
REQUEST_MAX_BYTES = 10_000_000

_NEVER = math.inf


class _Event(Enum):
    """What happens to a call beside requests."""

    NO_MORE = "the client has finished or left"
    RELEASED = "the faults let go of what hangs"


@dataclass(slots=True)
class _Arrival:
    at: float  # time.monotonic()
    raw: bytes


@dataclass(slots=True)
class _Answer:
    due: float  # time.monotonic()
    content: bytes | EndOfCallError


class Connection:
    """One AppendRows call, as the fake sees it.

    Attributes:
        stream: What it appends to at the moment; empty before the first request.
        trace_id: As the first request gave it; the service looks at no other.
        received: How many appends came.
        answered: How many were answered.
        in_flight_max: The highest number of appends that waited for an answer at once.
    """

    def __init__(self, api: "FakeWriteApi", number: int, context: grpc.ServicerContext) -> None:
        self.stream = ""
        self.trace_id = ""
        self.received = 0
        self.answered = 0
        self.in_flight_max = 0
        self._api = api
        self._number = number
        self._context = context
        self._descriptor = b""
        self._columns: tuple[Column, ...] = ()
        self._appends_since_change = 0
        self._ends_with: grpc.StatusCode | None = None
        self._events: queue.SimpleQueue[_Arrival | _Event] = queue.SimpleQueue()

    def answers(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Carry each append out when it comes, and answer it `latency_s` later."""
        self._context.add_callback(lambda: self._events.put(_Event.NO_MORE))
        forget = self._api.faults.on_release(lambda: self._events.put(_Event.RELEASED))
        # Requests are taken while others are under way, however long their answers take.
        threading.Thread(
            target=self._read, args=(requests,), name="fake-appends", daemon=True
        ).start()
        try:
            yield from self._answers()
        finally:
            forget()

    def _read(self, requests: Iterator[bytes]) -> None:
        try:
            for raw in requests:
                self.received += 1
                self.in_flight_max = max(self.in_flight_max, self.received - self.answered)
                self._events.put(_Arrival(time.monotonic(), raw))
        except Exception:  # noqa: BLE001, S110 - gRPC's way to say that the caller has left
            pass
        finally:
            self._events.put(_Event.NO_MORE)

    def _answers(self) -> Iterator[bytes]:
        waiting: deque[_Answer] = deque()
        more = True
        while more or waiting:
            wait_s = max(0.0, waiting[0].due - time.monotonic()) if waiting else _NEVER
            if wait_s == 0:
                yield self._sent(waiting.popleft().content)
                continue
            try:
                event = self._events.get(timeout=None if wait_s == _NEVER else wait_s)
            except queue.Empty:
                continue
            if event is _Event.NO_MORE:
                more = False
                if not self._context.is_active():
                    return
            elif event is _Event.RELEASED:
                if waiting and waiting[-1].due == _NEVER:
                    end_call(self._context, cut_off("The fake let go of an answer.").status)
            elif more:
                more = self._queue(self._meet_fault(event), waiting)

    def _queue(self, answer: _Answer, waiting: deque[_Answer]) -> bool:
        """Put an answer behind those that wait; return whether the call goes on after it."""
        if waiting:
            answer.due = max(answer.due, waiting[-1].due)
        waiting.append(answer)
        if self._ends_with is None:
            return isinstance(answer.content, bytes)
        if self._ends_with is not grpc.StatusCode.OK:
            end = status_message(self._ends_with.name, "Errors found while processing rows.")
            waiting.append(_Answer(answer.due, EndOfCallError(end)))
        return False

    def _sent(self, content: bytes | EndOfCallError) -> bytes:
        self.answered += 1
        if isinstance(content, EndOfCallError):
            end_call(self._context, content.status)
        return content

    def _meet_fault(self, arrival: _Arrival) -> _Answer:
        """Carry one append out unless a fault is planned for it."""
        fault = self._api.faults.take("AppendRows")
        try:
            meet_fault(self._api.faults, fault, self._context)
            content: bytes | EndOfCallError = on_wire(self._answer(fault, arrival.raw))
        except EndOfCallError as end:
            content = end
        due = _NEVER if isinstance(fault, Withhold) else arrival.at + self._api.latency_s
        return _Answer(due, content)

    def _answer(self, fault: object, raw: bytes) -> Any:  # noqa: ANN401 - protobuf's class
        try:
            request = AppendRowsRequest.FromString(raw)
            self._begin(request, len(raw))
            if isinstance(fault, InStream) and not fault.carried_out:
                return self._planned(fault)
            answer = self._append(request, len(raw))
        except DecodeError as error:
            raise EndOfCallError(
                status_message("INTERNAL", "Failed parsing the request.")
            ) from error
        except StreamError as error:
            return self._refused(error)
        if isinstance(fault, LoseAnswer):
            raise cut_off()
        if isinstance(fault, InStream):
            return self._planned(fault)
        if isinstance(fault, WrongOffset) and answer.append_result.HasField("offset"):
            answer.append_result.offset.value += fault.shift
        return answer

    def _planned(self, fault: InStream) -> Any:  # noqa: ANN401 - protobuf's class
        status = status_message(fault.code, fault.message, fault.kind, self.stream)
        return error_answer(self.stream, status)

    def _refused(self, error: StreamError) -> Any:  # noqa: ANN401 - protobuf's class
        """Return the answer that says so, or end the call."""
        status = status_of(error)
        if isinstance(error, MalformedError):
            self._api.note_violation(self.stream, str(error))
            raise EndOfCallError(status) from error
        if error.kind in self._api.ending:
            raise EndOfCallError(status) from error
        return error_answer(self.stream, status)

    def _begin(self, request: Any, size: int) -> None:  # noqa: ANN401 - protobuf's class
        """Take over what a request says for the later ones too; refuse what is malformed."""
        if size > REQUEST_MAX_BYTES:
            text = f"AppendRows request too large: {size} limit {REQUEST_MAX_BYTES}"
            raise MalformedError(text, self.stream or request.write_stream)
        if not self.stream:
            if not request.write_stream:
                raise MalformedError("A stream must be specified in the first request.")
            check_routing(self._context, "write_stream", request.write_stream)
            self.trace_id = request.trace_id
        if request.write_stream not in {"", self.stream}:
            self._direct(request.write_stream)
        if request.HasField("arrow_rows"):
            raise StreamError("UNIMPLEMENTED", "", "This fake reads no Arrow.", self.stream)
        schema = request.proto_rows.writer_schema
        if schema.HasField("proto_descriptor"):
            self._descriptor = schema.proto_descriptor.SerializeToString()
        if not self._descriptor:
            raise MalformedError("Schema must be specified in the first request.", self.stream)
        if not request.proto_rows.rows.serialized_rows:
            raise MalformedError("Rows must be specified.", self.stream)

    def _direct(self, name: str) -> None:
        """Append to this stream from now on; only among default streams that may change."""
        if self.stream and not (is_default(self.stream) and is_default(name)):
            raise MalformedError(f"The connection is for {self.stream}.", name)
        self.stream = name
        self._descriptor = b""
        self._columns = ()

    def _append(self, request: Any, size: int) -> Any:  # noqa: ANN401 - protobuf's classes
        api, name = self._api, self.stream
        offset = request.offset.value if request.HasField("offset") else None
        where = -1 if offset is None else offset
        api.faults.before_append(name, where)
        stream = api.streams.open_for_append(name, offset)
        if api.streams.claim(name, self._number):
            text = "an append on an older connection, after one on a newer connection"
            api.note_violation(name, text)
        rows = list(request.proto_rows.rows.serialized_rows)
        reader = self._reader(stream)
        errors = self._errors(reader, rows, stream.table) if api.strict else []
        if errors and api.faults.unnamed:
            raise StreamError("INVALID_ARGUMENT", "", "The request cannot be processed.", name)
        if errors:
            self._ends_with = api.faults.end_after_row_errors
            return row_errors_answer(name, errors)
        there = api.streams.append(name, offset, len(rows), lambda: reader.rows(rows))
        if not stream.pending:
            api.note_append(name, there, len(rows), size)
        api.faults.after_append(name, -1 if there is None else there)
        answer = append_answer(name, there)
        self._tell_schema(stream.table, answer)
        return answer

    def _reader(self, stream: WriteStream) -> RowReader:
        columns = tuple(stream.table.columns.values())
        try:
            return row_reader(self._descriptor, columns, check=self._api.strict)
        except SchemaError as error:
            kind = "SCHEMA_MISMATCH_EXTRA_FIELDS" if error.extra_fields else ""
            text = "Schema mismatch due to extra fields in user schema"
            raise StreamError(
                "INVALID_ARGUMENT", kind, str(error), self.stream, detail=text
            ) from error

    def _errors(
        self, reader: RowReader, rows: list[bytes], table: "Table"
    ) -> list[tuple[int, str]]:
        errors = reader.errors(rows, table.partition_column)
        poison = self._api.faults.poison
        if poison is not None:
            known = {index for index, _ in errors}
            errors += [
                (index, "poisoned, as planned")
                for index, content in enumerate(rows)
                if index not in known and poison(reader.rows([content])[0])
            ]
            errors.sort()
        return errors[:1] if self._api.faults.incomplete else errors

    def _tell_schema(self, table: "Table", answer: Any) -> None:  # noqa: ANN401 - protobuf's class
        """Tell once of a table that has other columns than at the connection's first append."""
        columns = tuple(table.columns.values())
        if not self._columns:
            self._columns = columns
        if columns == self._columns:
            return
        self._appends_since_change += 1
        if self._appends_since_change >= self._api.schema_lag:
            self._columns = columns
            self._appends_since_change = 0
            answer.updated_schema.CopyFrom(schema_message(table))
