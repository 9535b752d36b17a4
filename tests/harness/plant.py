"""The sensors: numbered readings of eight sites, each recognisable wherever it turns up."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from tests.harness.publisher import Packet

SITES = ("FAE1", "FAE2", "FAE3", "NORD", "SÜD", "OST-4", "WEST 5", "Ω")
TAGS = ("PT-101", "TT-202", "FT-303")


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading as the sensor means it. ``number`` is its value, and unique in a plant."""

    number: int
    site: str
    tag: str
    measured_at: datetime

    @property
    def topic(self) -> str:
        """Where it is published."""
        return f"FCTS/FAE/{self.site}/SolvExtract/{self.tag}"

    @property
    def sensor(self) -> str:
        """The sensor_id."""
        return f"{self.tag}/{self.site}"

    @property
    def payload(self) -> bytes:
        """The message."""
        return json.dumps(
            {
                "site_code": self.site,
                "sensor_id": self.sensor,
                "timestamp": self.measured_at.isoformat(),
                "value": self.number,
                "unit": "bar",
            }
        ).encode()

    def packet(self) -> Packet:
        """Return what to publish, at QoS 1."""
        return Packet(self.topic.encode(), self.payload, sample=self)


class Plant:
    """Makes samples, site after site, each site's in the order of their numbers."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._began = datetime.now(UTC)

    def samples(self, count: int) -> Iterator[Sample]:
        """Yield the next ``count`` samples."""
        for number in itertools.islice(self._numbers, count):
            yield Sample(
                number,
                SITES[number % len(SITES)],
                TAGS[number // len(SITES) % len(TAGS)],
                self._began + timedelta(milliseconds=number),
            )

    def packets(self, count: int) -> list[Packet]:
        """Return the next ``count`` samples as packets."""
        return [sample.packet() for sample in self.samples(count)]
