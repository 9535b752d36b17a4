"""Verified fakes of the services that Sluice delivers to, on real sockets.

A fake is a server that the official client talks to, so that what is tested
is the bytes on the wire and not an agreement between two mocks. It is at least
as strict as the service: where the service's limit is documented, the fake
enforces it with the service's own code; where it is not known whether the
service would take a thing, the fake refuses it.

`FakePubSub` (gRPC) stores what was published, `FakeBigQuery` (REST) and
`FakeWriteApi` (gRPC, before the same tables) store the rows that were inserted.
All keep their store across `stop()` and `start()` on the same port, and have a
`faults` seam that a test may use at any time.
`python -m tests.fakes` runs one as a process of its own.
"""

from tests.fakes.bigquery import FakeBigQuery
from tests.fakes.pubsub import FakePubSub
from tests.fakes.write_api import FakeWriteApi

__all__ = ["FakeBigQuery", "FakePubSub", "FakeWriteApi"]
