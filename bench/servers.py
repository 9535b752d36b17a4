"""The services' stand-ins, each a process of its own: the in-repo fakes, Google's emulator."""

import contextlib
import json
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.pubsub_v1 import types

from bench.processes import BenchError, Process
from bench.rig import START_TIMEOUT_S, free_port

PROJECT, DATASET, TABLE = "bench", "plant", "readings"
TABLE_REF = f"{PROJECT}.{DATASET}.{TABLE}"
NAMES = {
    "GCP_PROJECT_ID": PROJECT,
    "PUBSUB_TOPIC": "unused",
    "BIGQUERY_DATASET": DATASET,
    "BIGQUERY_TABLE": TABLE,
}
"""What the settings want of every program, whichever service it uses."""

EMULATOR_START_TIMEOUT_S = 60.0
PULL_MESSAGES = 1_000
PULL_PAUSE_S = 0.002
"""Between two looks for messages where waiting for them takes longer."""

COUNT_TIMEOUT_S = 300.0
QUIET_PULLS = 3
"""So many empty answers in a row mean that a subscription has nothing more."""

_COMMAND = Path("platform/pubsub-emulator/bin/cloud-pubsub-emulator")
_DEBIAN_ROOT = Path("/usr/lib/google-cloud-sdk")
"""Where Google's Debian package puts it; its gcloud is a script elsewhere."""

_CHANNEL_OPTIONS = (("grpc.max_receive_message_length", -1),)


class Fake:
    """One of ``tests.fakes``, counting only.

    Args:
        kind: ``pubsub`` or ``bigquery``.
        directory: For its log.
        arguments: Of ``python -m MODULE KIND``.
        module: What serves; ``bench.distant`` for a service that is far away, or for load.
    """

    def __init__(
        self, kind: str, directory: Path, *arguments: str, module: str = "tests.fakes"
    ) -> None:
        self.process = Process.python(
            f"fake-{kind}-{uuid.uuid4().hex[:6]}", [module, kind, *arguments], directory
        )
        line = self.process.wait_output('"serving"', START_TIMEOUT_S).splitlines()[-1]
        serving = json.loads(line)
        self.port = int(serving["port"])
        self.write_port = int(serving.get("write_port", 0))

    def counts(self) -> dict[str, Any]:
        """Ask it what it has received."""
        before = self.process.output().count('"counts"')
        self.process.signal(signal.SIGUSR1)
        deadline = time.monotonic() + START_TIMEOUT_S
        # A long line may come in pieces.
        while (said := self.process.output()).count('"counts"') == before or said[-1] != "\n":
            if time.monotonic() > deadline or not self.process.running:
                raise BenchError(f"the fake tells no counts:\n{self.process.output()[-2000:]}")
            time.sleep(0.005)
        counts: dict[str, Any] = json.loads(said.splitlines()[-1])
        return counts


def fake_bigquery(
    directory: Path,
    port: int = 0,
    write_port: int = 0,
    delay_ms: float = 0.0,
    *,
    arrivals: bool = False,
) -> Fake:
    """Start a fake of BigQuery with an empty table TABLE_REF, its answers ``delay_ms`` late.

    With ``arrivals`` its counts tell when so many rows were there.
    """
    return Fake(
        "bigquery",
        directory,
        f"--port={port}",
        f"--write-port={write_port}",
        f"--delay-ms={delay_ms}",
        f"--table={TABLE_REF}",
        *(["--arrivals"] if arrivals else []),
        module="bench.distant",
    )


def bigquery_environ(fake: Fake) -> dict[str, str]:
    """Return what leads a forwarder to the fake."""
    return {
        **NAMES,
        "BIGQUERY_EMULATOR_HOST": f"http://127.0.0.1:{fake.port}",
        "BIGQUERY_STORAGE_EMULATOR_HOST": f"127.0.0.1:{fake.write_port}",
    }


class PubSub:
    """A Pub/Sub server on this machine, with a topic per run.

    Attributes:
        name: Which one, for the report.
        address: ``host:port``.
    """

    def __init__(self, name: str, address: str, fake: Fake | None, process: Process) -> None:
        self.name = name
        self.address = address
        self.process = process
        self._fake = fake
        self._channel = grpc.insecure_channel(address, options=_CHANNEL_OPTIONS)

    @property
    def counts_messages(self) -> bool:
        """Whether the server tells what it received; otherwise a subscription has to."""
        return self._fake is not None

    def new_topic(self) -> str:
        """Create a topic; return its full name."""
        topic = f"projects/{PROJECT}/topics/run-{uuid.uuid4().hex[:12]}"
        self._call("Publisher", "CreateTopic", types.Topic.pb()(name=topic), types.Topic.pb())
        if self._fake is None:
            self.subscribe(topic)
        return topic

    def subscribe(self, topic: str) -> str:
        """Create a subscription without ordering; return its full name."""
        name = topic.replace("/topics/", "/subscriptions/")
        kind = types.Subscription.pb()
        self._call("Subscriber", "CreateSubscription", kind(name=name, topic=topic), kind)
        return name

    def environ(self, topic: str) -> dict[str, str]:
        """Return what leads a forwarder to the topic."""
        return {**NAMES, "PUBSUB_TOPIC": topic, "PUBSUB_EMULATOR_HOST": self.address}

    def count(self, topic: str, expected: int) -> int:
        """Return how many messages the topic received; takes them out of the emulator."""
        if self._fake is not None:
            counts = self._fake.counts()
            if counts["violations"]:
                raise BenchError(f"{counts['violations']} times two requests of one key at once")
            return int(counts["topics"][topic])
        return self._drained(topic, expected)

    def _drained(self, topic: str, expected: int) -> int:
        """Pull everything there is; count distinct messages by their ids."""
        name = topic.replace("/topics/", "/subscriptions/")
        seen: set[str] = set()
        quiet = 0
        deadline = time.monotonic() + COUNT_TIMEOUT_S
        while quiet < QUIET_PULLS and time.monotonic() < deadline:
            received = self.pull(name)
            seen.update(r.message.message_id for r in received)
            quiet = 0 if received else quiet + 1
            if len(seen) >= expected:
                quiet += 1  # and one look more than needed, for what should not be there
        kind = types.DeleteTopicRequest.pb()
        self._call("Publisher", "DeleteTopic", kind(topic=topic), None)
        return len(seen)

    def pull(self, subscription: str) -> list[Any]:
        """Return what one pull brings, acknowledged."""
        received = self._pull(subscription, wait=False)
        self._acknowledge(subscription, received)
        return received

    def _pull(self, subscription: str, *, wait: bool) -> list[Any]:
        answer = self._call(
            "Subscriber",
            "Pull",
            types.PullRequest.pb()(
                subscription=subscription,
                max_messages=PULL_MESSAGES,
                return_immediately=not wait,
            ),
            types.PullResponse.pb(),
        )
        return list(answer.received_messages)

    def next_messages(self, subscription: str) -> list[Any]:
        """Return the next messages, if there are any; for :meth:`acknowledge` afterwards.

        The emulator serves those that wait, in a pull or in a stream, once in 50 ms only: one
        message each 100 ms, with nothing else going on, comes 5 to 50 ms after its publish call
        was answered. Who asks again and again has it at once.
        """
        if self.counts_messages:
            return self._pull(subscription, wait=True)
        received = self._pull(subscription, wait=False)
        if not received:
            time.sleep(PULL_PAUSE_S)
        return received

    def _acknowledge(self, subscription: str, received: list[Any]) -> None:
        if received:
            kind = types.AcknowledgeRequest.pb()
            ids = [r.ack_id for r in received]
            request = kind(subscription=subscription, ack_ids=ids)
            self._call("Subscriber", "Acknowledge", request, None)

    def acknowledge(self, subscription: str, received: list[Any]) -> None:
        """Take messages out of the subscription."""
        self._acknowledge(subscription, received)

    def _call(self, service: str, method: str, request: Any, answer: Any) -> Any:  # noqa: ANN401 - protobuf's classes are made at run time
        call = self._channel.unary_unary(
            f"/google.pubsub.v1.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString if answer is not None else None,
        )
        return call(request, timeout=30.0)

    def close(self) -> None:
        """Leave; the server's process is its owner's to stop."""
        self._channel.close()


def find_emulator() -> Path | None:
    """Return the emulator's start script; None where it, or Java, is not installed."""
    gcloud = shutil.which("gcloud")
    roots = [Path(gcloud).resolve().parents[1]] if gcloud else []
    found = [root / _COMMAND for root in (*roots, _DEBIAN_ROOT) if (root / _COMMAND).exists()]
    return found[0] if found and shutil.which("java") else None


@contextlib.contextmanager
def fake_pubsub(delay_ms: float = 0.0) -> Iterator[PubSub]:
    """Run the in-repo fake of Pub/Sub, its answers ``delay_ms`` late."""
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as directory:
        name = "in-repo fake"
        if delay_ms:
            name = f"in-repo fake, answers {delay_ms:.0f} ms later"
            far = f"--delay-ms={delay_ms}"
            fake = Fake("pubsub", Path(directory), far, module="bench.distant")
        else:
            fake = Fake("pubsub", Path(directory))
        server = PubSub(name, f"127.0.0.1:{fake.port}", fake, fake.process)
        try:
            yield server
        finally:
            server.close()
            fake.process.stop()


@contextlib.contextmanager
def emulator(command: Path) -> Iterator[PubSub]:
    """Run Google's emulator."""
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as directory:
        port = free_port()
        arguments = [str(command), "--host=127.0.0.1", f"--port={port}"]
        process = Process("emulator", arguments, Path(directory))
        server = PubSub("Google's emulator", f"127.0.0.1:{port}", None, process)
        try:
            process.wait_output("Server started", EMULATOR_START_TIMEOUT_S)
            yield server
        finally:
            server.close()
            process.stop()


@contextlib.contextmanager
def pubsub_servers() -> Iterator[list[PubSub]]:
    """Run every Pub/Sub server that there is: the fake, and the emulator where installed."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(fake_pubsub())]
        command = find_emulator()
        if command is not None:
            servers.append(stack.enter_context(emulator(command)))
        yield servers
