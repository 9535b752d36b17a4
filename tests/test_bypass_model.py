"""A service that refuses single sites: the others go on; nothing is lost, reordered or repeated."""

from collections import Counter
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule

from forwarder.sink import Delivery
from spool import Reading
from tests.test_drain import SITES, TRANSIENT, RandomSink
from tests.test_drain_model import LAG_ROWS, DrainMachine, MoodySink


class KeyedSink(MoodySink):
    """Tells which sites failed; some are refused for as long as it is told to."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.refused: set[str] = set()
        self.trouble = TRANSIENT

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        """Refuse the readings of some sites, and do with the others what the mood says."""
        refused = [row for row in rows if row[4] in self.refused]
        others = [row for row in rows if row[4] not in self.refused]
        delivery = super().deliver(others) if others else Delivery()
        if refused:
            delivery.retry = sorted([*delivery.retry, *refused])
            delivery.fault = delivery.fault or self.trouble
        if delivery.fault is not None:
            delivery.faults = {row[4]: delivery.fault for row in delivery.retry}
        return delivery


class BypassMachine(DrainMachine):
    """The drain's model, with a sink that names sites."""

    sink: KeyedSink

    def make_sink(self) -> KeyedSink:
        """Return the service."""
        return KeyedSink()

    def teardown(self) -> None:
        """Take every site again, and deliver to the end."""
        self.sink.refused = set()
        super().teardown()

    @rule(sites=st.sets(st.sampled_from(SITES)))
    def some_sites_are_refused(self, sites: set[str]) -> None:
        self.sink.refused = sites

    @rule(waits=st.integers(1, 40))
    def drain_well(self, waits: int) -> None:
        """Run while the service takes every site that it does not refuse."""
        self.sink.feel(0)
        self.drain(waits, None)

    def what_a_crash_repeats_is_bounded(self) -> None:
        """Say nothing: what was delivered ahead of the cursor is noted apart."""

    @invariant()
    def only_a_crash_repeats_and_at_most_one_batch_and_the_lag(self) -> None:
        times = Counter(row[0] for row in self.sink.acknowledged)
        repeated = sum(count - 1 for count in times.values())
        assert repeated <= self.crashes * (RandomSink.max_rows + LAG_ROWS - 1)


TestBypassModel = BypassMachine.TestCase
TestBypassModel.settings = settings(max_examples=40, stateful_step_count=25)
