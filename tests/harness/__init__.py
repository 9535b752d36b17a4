"""Runs the real programs between a real broker and the fakes of the cloud, and keeps the books.

`Rig` is the whole of it: a Mosquitto, the collector and the forwarders as processes,
`Publisher` with a ledger of what the broker acknowledged, `Cloud` with what arrived, and
`books`, which reads the product's own counters as an operator would. Nothing here waits
without a condition and a deadline.
"""

from tests.harness.books import Books, Figures, SinkFigures
from tests.harness.broker import Broker
from tests.harness.checks import (
    assert_adds_up,
    assert_all_received,
    assert_in_order,
    assert_once,
)
from tests.harness.cloud import Cloud, Received
from tests.harness.plant import SITES, Plant, Sample
from tests.harness.programs import Program
from tests.harness.publisher import Load, Packet, Publisher
from tests.harness.rig import (
    COLLECTOR,
    COMMIT_DELAYS_MS,
    FORWARDERS,
    IMPATIENT,
    MORTAL,
    PROGRAMS,
    Rig,
    last_words,
)
from tests.harness.supervisor import Supervisor
from tests.harness.waiting import wait_until

__all__ = [
    "COLLECTOR",
    "COMMIT_DELAYS_MS",
    "FORWARDERS",
    "IMPATIENT",
    "MORTAL",
    "PROGRAMS",
    "SITES",
    "Books",
    "Broker",
    "Cloud",
    "Figures",
    "Load",
    "Packet",
    "Plant",
    "Program",
    "Publisher",
    "Received",
    "Rig",
    "Sample",
    "SinkFigures",
    "Supervisor",
    "assert_adds_up",
    "assert_all_received",
    "assert_in_order",
    "assert_once",
    "last_words",
    "wait_until",
]
