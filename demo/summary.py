"""Whether what went in and what came out agree, to the last message."""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from demo.layout import Layout
from demo.ledger import Figures, SinkFigures
from demo.simulator import Published


@dataclass(frozen=True)
class Check:
    """One equation: what it says, in words and in numbers, and whether it holds."""

    words: str
    numbers: str
    holds: bool


def reconcile(published: Published, figures: Figures) -> list[Check]:
    """Return every equation that must hold after the demo.

    What the broker did not acknowledge may have arrived or not. What it delivered again (it
    does so to a collector that was killed before it could acknowledge) was received more
    often than published; such a message counts as a duplicate, or is rejected again.
    """
    return [
        _intake(published, figures),
        _once(published, figures),
        *(_delivery(figures.spooled, sink) for sink in figures.sinks),
    ]


def _intake(published: Published, figures: Figures) -> Check:
    again = max(0, figures.received - published.total)
    came = figures.spooled + figures.rejected + figures.duplicates
    return Check(
        "published" + (" + again" if again else "") + " = spooled + rejected + duplicates",
        f"{published.total}"
        + (f" + {again}" if again else "")
        + f" = {figures.spooled} + {figures.rejected} + {figures.duplicates}",
        published.total + again == came,
    )


def _once(published: Published, figures: Figures) -> Check:
    """Each good reading exactly once: duplicates cannot make up for a loss."""
    distinct = range(published.good, published.good + published.unacked + 1)
    return Check(
        "distinct good readings published = spooled",
        f"{published.good} = {figures.spooled}"
        + (f" (not acknowledged: {published.unacked})" if published.unacked else ""),
        figures.spooled in distinct and figures.rejected >= published.faulty,
    )


def _delivery(spooled: int, sink: SinkFigures) -> Check:
    # The demo's sinks refuse nothing and its spool is never full: one of these is a loss.
    losses = [("dead", sink.dead_lettered), ("dropped", sink.dropped)]
    losses = [(word, number) for word, number in losses if number]
    parts = [("logged", sink.logged), ("pending", sink.pending), *losses]
    return Check(
        f"{sink.name}: spooled = " + " + ".join(word for word, _ in parts),
        f"{spooled} = " + " + ".join(str(number) for _, number in parts),
        spooled == sink.logged + sink.pending and not losses,
    )


def summary_lines(checks: list[Check]) -> Iterator[str]:
    """Yield the summary, for a terminal of 80 columns."""
    width = max(len(check.words) for check in checks)
    for check in checks:
        yield f"  {'ok   ' if check.holds else 'WRONG'}  {check.words:<{width}}  {check.numbers}"
    yield ""
    if all(check.holds for check in checks):
        yield "It adds up: every message is accounted for."
    else:
        yield "IT DOES NOT ADD UP. Please report it, with the logs and the spool."


def look_lines(layout: Layout) -> Iterator[str]:
    """Yield commands that show the spool, with what lies in the demo's directory anyway.

    A fresh machine has no ``sqlite3``, and an unprivileged user cannot install it.
    """
    yield "\nLook for yourself:\n"
    yield f"  cd {shlex.quote(str(layout.root))}"
    for query in (
        "select sink, pending, logged, state from backlog",
        "select reason, count, last_topic from rejected_summary",
    ):
        yield f"  venv/bin/sqlite-utils query {layout.spool.name}/spool.db -t \\"
        yield f"    '{query}'"
    yield ""
