"""The claims that every test ends with: nothing lost, in order per site, the books add up."""

from collections import Counter
from collections.abc import Iterable, Sequence

from tests.harness.books import Books, Figures
from tests.harness.cloud import Received
from tests.harness.plant import Sample

_SHOWN = 10


def assert_all_received(
    sent: Iterable[Sample], received: Sequence[Received], *, but: Iterable[int] = ()
) -> None:
    """Check that what the broker acknowledged is what the service has, site by site.

    Args:
        sent: The ledger.
        received: What the service has; a repetition is lawful and ignored.
        but: Numbers that must not be there.
    """
    excepted = set(but)
    expected = {(s.number, s.site) for s in sent if s.number not in excepted}
    there = {(r.number, r.site) for r in received}
    missing, surplus = sorted(expected - there), sorted(there - expected)
    assert not missing, f"{len(missing)} of {len(expected)} are lost: {missing[:_SHOWN]}"
    assert not surplus, f"{len(surplus)} came that nobody sent: {surplus[:_SHOWN]}"


def assert_in_order(received: Sequence[Received], *, by: str = "number") -> None:
    """Check that each site's readings came in the order in which they were sent.

    Args:
        received: In order of arrival; of a reading that came twice the first counts.
        by: ``number``, the sensors' order; ``seq``, the spool's, where the broker itself
            was killed and may have changed the former.
    """
    newest: dict[str, int] = {}
    seen: set[str] = set()
    for one in received:
        if one.event_id in seen:
            continue
        seen.add(one.event_id)
        position = one.number if by == "number" else one.seq
        before = newest.get(one.site, 0)
        assert position > before, f"site {one.site}: {by} {position} came after {before}"
        newest[one.site] = position


def assert_once(received: Sequence[Received]) -> None:
    """Check that no reading came twice, and that they came in the order of seq."""
    seqs = [one.seq for one in received]
    twice = [seq for seq, times in Counter(seqs).items() if times > 1]
    assert not twice, f"{len(twice)} came more than once: {twice[:_SHOWN]}"
    assert seqs == sorted(seqs), "the table's order is not that of seq"


def assert_adds_up(books: Books, sinks: Iterable[str]) -> Figures:
    """Check the two sums of the books at this moment; return the figures."""
    figures = books.figures()
    accounted = figures.spooled + figures.duplicates + figures.rejected
    assert figures.received == accounted, f"received = spooled + duplicates + rejected: {figures}"
    for sink in sinks:
        total = figures.sinks[sink].total
        assert figures.spooled == total, f"{sink}: spooled = delivered + … + pending: {figures}"
    return figures
