"""A batch for Pub/Sub: a lane of requests per site, to be sent one after the other.

Limits (https://cloud.google.com/pubsub/quotas#resource_limits, which the emulator does not
enforce): one ordering key a request, 1,000 messages and 10 MB a request, 1,024 bytes for an
ordering key and an attribute's value.
"""

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import itemgetter

from spool import DeadLetter, Reading

REQUEST_MAX_MESSAGES = 1_000
KEY_MAX_BYTES = 1_024
ATTRIBUTE_MAX_BYTES = 1_024
UNDOUBTED_CHARS = 1_024 // 4
"""UTF-8 takes at most four bytes a character: up to here a name is within both limits."""

_seq_of = itemgetter(0)


@dataclass(slots=True)
class Request:
    """Rows of one site that travel together."""

    rows: list[Reading]
    body: bytes = b""
    """What is sent; empty until somebody makes it."""


@dataclass(slots=True)
class Lane:
    """The requests of one site within a batch, first to last."""

    waiting: deque[Request] = field(default_factory=deque)
    begun: bool = False
    """Whether one of them was sent."""

    def split(self, rows: list[Reading]) -> None:
        """Put both halves of a request's ``rows`` back at the head, in order."""
        half = len(rows) // 2
        self.waiting.appendleft(Request(rows[half:]))
        self.waiting.appendleft(Request(rows[:half]))

    def first_alone(self) -> None:
        """Let the next request have one row, the others of it follow."""
        rows = self.waiting.popleft().rows
        if len(rows) > 1:
            self.waiting.appendleft(Request(rows[1:]))
        self.waiting.appendleft(Request(rows[:1]))

    def give_up(self) -> list[Reading]:
        """Return the rows of what still waits, and let nothing wait any more."""
        rows = [row for request in self.waiting for row in request.rows]
        self.waiting.clear()
        return rows


@dataclass(slots=True)
class Lanes:
    """A batch, sorted by site.

    Attributes:
        rows: All of it, in the order of seq.
        lanes: Each row is in one of them, or dead.
        dead: Those that no request may carry.
    """

    rows: list[Reading]
    lanes: list[Lane]
    dead: list[DeadLetter]


def sort_by_site(rows: list[Reading]) -> Lanes:
    """Sort ``rows`` into lanes, in requests of lawful size."""
    by_site, dead = _by_site(rows)
    return Lanes(rows, [_lane(site_rows) for site_rows in by_site], dead)


def sort_as_many_as_fit(rows: list[Reading]) -> Lanes:
    """Sort into lanes those of ``rows``, from the first, that go well together.

    The lanes run side by side, so the longest decides how long the batch takes. Where some have
    a few rows more than fill their requests, all would wait for those few to be sent and
    answered: what is behind the first such row is left to the next batch.
    """
    by_site, dead = _by_site(rows)
    longest = max(map(len, by_site), default=0)
    full = max(1, longest // REQUEST_MAX_MESSAGES) * REQUEST_MAX_MESSAGES
    if longest <= full:
        return Lanes(rows, [_lane(site_rows) for site_rows in by_site], dead)
    end = min(site_rows[full][0] for site_rows in by_site if len(site_rows) > full)
    fitting = (_before(end, site_rows) for site_rows in by_site)
    return Lanes(
        _before(end, rows),
        [_lane(site_rows) for site_rows in fitting if site_rows],
        [letter for letter in dead if letter.row[0] < end],
    )


def _before(seq: int, rows: list[Reading]) -> list[Reading]:
    return rows[: bisect_left(rows, seq, key=_seq_of)]


def _by_site(rows: Iterable[Reading]) -> tuple[Iterable[list[Reading]], list[DeadLetter]]:
    """Return the rows by site, and those that can never be sent."""
    by_site: defaultdict[str, list[Reading]] = defaultdict(list)
    dead = []
    for row in rows:
        site = row[4]
        if len(site) > UNDOUBTED_CHARS or len(row[6]) > UNDOUBTED_CHARS:
            problem = _over_limit(row)
            if problem:
                dead.append(DeadLetter(row, "limit", problem))
                continue
        by_site[site].append(row)
    return by_site.values(), dead


def _lane(rows: list[Reading]) -> Lane:
    return Lane(
        deque(
            Request(rows[start : start + REQUEST_MAX_MESSAGES])
            for start in range(0, len(rows), REQUEST_MAX_MESSAGES)
        )
    )


def _over_limit(row: Reading) -> str:
    """Return why the service could never take this row; empty if it could."""
    for value, limit, what in (
        (row[4], KEY_MAX_BYTES, "site_code, the ordering key,"),
        (row[6], ATTRIBUTE_MAX_BYTES, "pi_tag, the attribute kpi_name,"),
    ):
        size = len(value.encode())
        if size > limit:
            return f"{what} has {size} bytes; Pub/Sub takes at most {limit}"
    return ""
