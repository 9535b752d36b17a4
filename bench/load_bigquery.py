"""A BigQuery that costs little, so that a benchmark measures its clients and not its service."""

from typing import Any

import msgspec

from tests.fakes import FakeBigQuery, rest
from tests.fakes.http1 import Reply, Request
from tests.fakes.rest import ApiError

JUDGED_EVERY = 20
"""One request in so many is held against the table row by row, the first one among them."""

_ANSWER = rest.json_reply({"kind": "bigquery#tableDataInsertAllResponse"})


class _Entry(msgspec.Struct):
    insertId: str  # noqa: N815 - the service's spelling
    json: msgspec.Raw


class _Body(msgspec.Struct):
    rows: list[_Entry]


_decode = msgspec.json.Decoder(_Body).decode


class LoadBigQuery(FakeBigQuery):
    """The fake, but it only counts most rows.

    A request's JSON is read to its end all the same, and each row must have an insert id. These
    are not remembered: a client that sends a row twice is seen by the count.
    """

    def __init__(self, port: int = 0) -> None:
        super().__init__(port, keep=False, dedup=False)

    def _insert_all(self, route: rest.Route, request: Request, fault: object) -> Reply:
        if self.requests % JUDGED_EVERY == 1:
            return super()._insert_all(route, request, fault)
        try:
            entries: list[Any] = _decode(request.body).rows
        except msgspec.DecodeError as error:
            raise ApiError(400, "invalid", str(error)) from error
        self.store.append(
            self.store.table(route.table), [entry.insertId for entry in entries], list
        )
        return _ANSWER
