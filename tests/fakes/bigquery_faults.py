"""The faults of the BigQuery fake."""

from collections.abc import Callable
from dataclasses import dataclass

from tests.fakes.faults import FaultPlan
from tests.fakes.rows import Row


@dataclass(frozen=True, slots=True)
class HttpStatus:
    """Answer with this error; the request is not carried out."""

    status: int
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class RowErrors:
    """Answer 200, but report rows as not inserted for a passing reason."""

    reason: str
    where: Callable[[Row], bool]
    stop_others: bool


class BigQueryFaults(FaultPlan):
    """Faults for the requests to come.

    A request whose caller leaves during a delay is carried out all the same: HTTP
    has no way to take a request back.

    Attributes:
        poison: a predicate on a row. A row that it holds for is "invalid".
    """

    def __init__(self) -> None:
        super().__init__("insertAll")
        self.poison: Callable[[Row], bool] | None = None

    def status(
        self,
        status: int,
        reason: str,
        message: str = "",
        times: int | None = 1,
        calls: set[str] | None = None,
    ) -> None:
        """Answer the next `times` requests with this HTTP status and reason."""
        self.add(HttpStatus(status, reason, message or reason), times, calls)

    def row_errors(
        self,
        reason: str,
        where: Callable[[Row], bool] = lambda _: True,
        times: int | None = 1,
        *,
        stop_others: bool = False,
    ) -> None:
        """Report the rows for which `where` holds as not inserted ("backendError", "timeout").

        The other rows are inserted, unless `stop_others`: then they are "stopped".
        """
        self.add(RowErrors(reason, where, stop_others), times)

    def clear(self) -> None:
        """Forget every fault, the poison too, and let go of what hangs."""
        self.poison = None
        super().clear()
