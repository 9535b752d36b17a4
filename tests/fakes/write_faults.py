"""The faults of the write API's fake."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from tests.fakes.faults import FaultPlan

if TYPE_CHECKING:
    from tests.fakes.rows import Row


@dataclass(frozen=True, slots=True)
class EndCall:
    """End the call with this status; the request is not carried out.

    Attributes:
        kind: The StorageErrorCode by name that comes with it; empty for none.
    """

    code: grpc.StatusCode
    details: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class InStream:
    """Answer an append with this error inside the stream; it is not carried out, or is."""

    code: str
    message: str
    kind: str = ""
    carried_out: bool = False


@dataclass(frozen=True, slots=True)
class Withhold:
    """Carry an append out, and answer neither it nor the later ones of its connection."""


@dataclass(frozen=True, slots=True)
class WrongOffset:
    """Carry an append out, and answer with another offset than the one it went to."""

    shift: int


@dataclass(frozen=True, slots=True)
class Skip:
    """Serve the request as if nothing were planned, so that a later one meets the next fault."""


class WriteFaults(FaultPlan):
    """Faults for the requests to come; the default call is AppendRows, where each append counts.

    To let the third append lose its answer: ``skip(2)``, then ``lose_answer()``. A request that
    was skipped counts in `fired`.

    Attributes:
        poison: a predicate on a row. An append with such a row is refused, unless the fake is
            not strict.
        incomplete: whether only the first bad row of an append is named.
        unnamed: whether an append with bad rows is refused as a whole, without naming them.
        end_after_row_errors: with which status the call ends behind an answer that names bad
            rows; None lets it go on, OK ends it without an error.
        before_append: called with stream and offset (-1: none) before an append is carried out.
        after_append: called with stream and offset (-1: none) after it was, before the answer.
    """

    def __init__(self) -> None:
        super().__init__("AppendRows")
        self.poison: Callable[[Row], bool] | None = None
        self.incomplete = False
        self.unnamed = False
        self.end_after_row_errors: grpc.StatusCode | None = None
        self.before_append: Callable[[str, int], None] = lambda *_: None
        self.after_append: Callable[[str, int], None] = lambda *_: None
        self._released: set[Callable[[], None]] = set()

    def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        times: int | None = 1,
        calls: set[str] | None = None,
        *,
        kind: str = "",
    ) -> None:
        """End the next `times` calls with `code`; for AppendRows, at an append."""
        self.add(EndCall(code, details, kind), times, calls)

    def cut(self, times: int | None = 1, calls: set[str] | None = None) -> None:
        """Break the connection at the next `times` requests, before they are carried out."""
        self.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed", times, calls)

    def refuse(
        self,
        code: str,
        message: str = "",
        times: int | None = 1,
        *,
        kind: str = "",
        carried_out: bool = False,
    ) -> None:
        """Answer the next `times` appends with an error inside the stream.

        Args:
            code: The gRPC status by name.
            message: The status's text; the default is its name.
            times: How many; None means until `clear()`.
            kind: The StorageErrorCode by name; empty for none.
            carried_out: Whether the rows are appended all the same.
        """
        self.add(InStream(code, message or code, kind, carried_out), times)

    def withhold(self, times: int | None = 1) -> None:
        """Carry the next `times` appends out without an answer, until cleared or stopped.

        Answers are in order: the later appends of that connection get none either.
        """
        self.add(Withhold(), times)

    def wrong_offset(self, shift: int = 1, times: int | None = 1) -> None:
        """Carry the next `times` appends out, but name an offset that is `shift` too high."""
        self.add(WrongOffset(shift), times)

    def skip(self, times: int, calls: set[str] | None = None) -> None:
        """Serve the next `times` requests as usual; what is planned after it is for later ones."""
        self.add(Skip(), times, calls)

    def clear(self) -> None:
        """Forget every fault, the poison and the hooks too, and let go of what hangs."""
        self.poison = None
        self.incomplete = self.unnamed = False
        self.end_after_row_errors = None
        self.before_append = self.after_append = lambda *_: None
        super().clear()

    def release(self) -> None:
        """Let go of the requests that hang or wait; what is planned stays planned."""
        super().release()
        for notify in list(self._released):
            notify()

    def on_release(self, notify: Callable[[], None]) -> Callable[[], None]:
        """Have `notify` called at each release; return what ends that."""
        self._released.add(notify)
        return lambda: self._released.discard(notify)
