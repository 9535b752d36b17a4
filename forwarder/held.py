"""The readings of held sites: which wait, since when, and when to try them again.

Does no I/O. Of a reading that waits only its seq is kept, eight bytes; the reading itself
stays in the spool.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from forwarder.sink import Fault
from lifecycle import printable

SWEEP = 0.2
"""When one site is due, those are tried with it that are due within this share of their wait:
fewer deliveries, and fewer of them that wait for a deadline."""

_COMPACT_FROM = 4_096
"""So many numbers in front of an array may be spent before they are cut off."""


@dataclass(slots=True)
class HeldSite:
    """One site whose readings wait."""

    seqs: "array[int]" = field(default_factory=lambda: array("q"))
    """Of its readings that wait, in order, from ``spent`` on."""
    spent: int = 0
    fault: Fault | None = None
    """Why; None after a restart, before it was tried."""
    failures: int = 0
    """In a row, without a reading that was accepted."""
    due_s: float = 0.0
    """When to try it again, on the monotonic clock."""
    wait_s: float = 0.0
    """How long it waits in all."""

    @property
    def first(self) -> int:
        """The seq of the first reading that waits."""
        return self.seqs[self.spent]

    @property
    def waiting(self) -> int:
        """How many readings wait."""
        return len(self.seqs) - self.spent

    def through(self, seq: int) -> "array[int]":
        """Return those that wait up to ``seq``."""
        return self.seqs[self.spent : bisect_right(self.seqs, seq, self.spent)]

    def forget_after(self, seq: int) -> None:
        """Forget those behind ``seq``."""
        del self.seqs[bisect_right(self.seqs, seq, self.spent) :]

    def spend(self, count: int, again: Iterable[int] = ()) -> None:
        """Take the first ``count`` away, and put ``again``, which were among them, back."""
        self.spent += count
        back = array("q", again)
        if back:
            self.seqs = back + self.seqs[self.spent :]
            self.spent = 0
        elif self.spent >= _COMPACT_FROM and self.spent > len(self.seqs) // 2:
            del self.seqs[: self.spent]
            self.spent = 0


class HeldSites:
    """All held sites, by site code."""

    def __init__(self) -> None:
        self._sites: dict[str, HeldSite] = {}
        self._noted: dict[str, tuple[int, str]] = {}
        """As the sink's file has them."""

    def __len__(self) -> int:
        """Return how many sites are held."""
        return len(self._sites)

    def __contains__(self, site: object) -> bool:
        """Return whether the site is held."""
        return site in self._sites

    def __getitem__(self, site: str) -> HeldSite:
        """Return the site, which is held."""
        return self._sites[site]

    def hold(self, site: str) -> HeldSite:
        """Return the site, held from now on if it was not."""
        return self._sites.setdefault(site, HeldSite())

    def release_those_without_readings(self) -> None:
        """Let go of the sites of which no reading waits."""
        for site in [site for site, held in self._sites.items() if not held.waiting]:
            del self._sites[site]

    def oldest(self) -> tuple[str, HeldSite]:
        """Return the site with the first of all waiting readings."""
        return min(self._sites.items(), key=lambda item: item[1].first)

    def faults(self) -> Iterator[Fault]:
        """Yield why each site waits, where that is known."""
        return (held.fault for held in self._sites.values() if held.fault is not None)

    def suspects(self) -> dict[str, HeldSite]:
        """Return the sites whose readings were refused, and may be at fault themselves."""
        return {site: held for site, held in self._sites.items() if held.fault and held.fault.probe}

    def next_due_s(self) -> float:
        """Return when the first site is due."""
        return min(held.due_s for held in self._sites.values())

    def due(self, now_s: float) -> dict[str, HeldSite]:
        """Return the sites to try now: if one is due, also those that nearly are."""
        if self.next_due_s() > now_s:
            return {}
        return {
            site: held
            for site, held in self._sites.items()
            if held.due_s - SWEEP * held.wait_s <= now_s
        }

    def take_through(self, seq: int) -> list[int]:
        """Take away, and return in order, all readings up to ``seq``."""
        taken: list[int] = []
        for held in self._sites.values():
            gone = held.through(seq)
            held.spend(len(gone))
            taken += gone
        self.release_those_without_readings()
        return sorted(taken)

    def forget_after(self, seq: int) -> None:
        """Forget the readings behind ``seq``: they will be read again."""
        for held in self._sites.values():
            held.forget_after(seq)
        self.release_those_without_readings()

    def loaded(self, noted: Mapping[str, tuple[int, str]]) -> None:
        """Take up what the sink's file has."""
        self._sites.clear()
        self._noted = dict(noted)

    def changes(self) -> tuple[dict[str, tuple[int, str]], list[str]]:
        """Return what differs from the sink's file: sites to note, and sites to forget.

        Call :meth:`noted` once that is durable.
        """
        changed: dict[str, tuple[int, str]] = {}
        for site, held in self._sites.items():
            before = self._noted.get(site, (0, ""))
            now = (held.first, printable(held.fault.problem) if held.fault else before[1])
            if now != before:
                changed[site] = now
        return changed, [site for site in self._noted if site not in self._sites]

    def noted(self, changed: Mapping[str, tuple[int, str]], released: Iterable[str]) -> None:
        """The sink's file has what :meth:`changes` returned."""
        for site in released:
            del self._noted[site]
        self._noted.update(changed)
