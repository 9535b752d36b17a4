"""Where Google's emulator enforces a rule, the fake does the same.

Runs over the emulator where the variable below names it, or where it is
installed beside `gcloud`; else over the fake alone.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from google.api_core import exceptions
from google.pubsub_v1 import PublisherClient, SubscriberClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport
from google.pubsub_v1.types import PubsubMessage

from tests.fakes import FakePubSub

EMULATOR_VARIABLE = "PUBSUB_EMULATOR_BINARY"
START_LIMIT_S = 60.0
TOPIC = "projects/p/topics/contract"
SUBSCRIPTION = "projects/p/subscriptions/contract-all"


def emulator_binary() -> Path | None:
    if named := os.environ.get(EMULATOR_VARIABLE):
        return Path(named)
    gcloud = shutil.which("gcloud")
    if gcloud is None or shutil.which("java") is None:
        return None
    root = Path(gcloud).resolve().parent.parent
    binary = root / "platform" / "pubsub-emulator" / "bin" / "cloud-pubsub-emulator"
    return binary if binary.exists() else None


@contextmanager
def running_emulator(binary: Path) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with subprocess.Popen(
        [binary, "--host=127.0.0.1", f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # the binary is a script: its Java has to end with it
    ) as process:
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                grpc.channel_ready_future(channel).result(timeout=START_LIMIT_S)
            yield f"127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module", params=["fake", "emulator"])
def channel(request: pytest.FixtureRequest) -> Iterator[grpc.Channel]:
    if request.param == "fake":
        with FakePubSub() as fake, grpc.insecure_channel(fake.address) as opened:
            yield opened
        return
    binary = emulator_binary()
    if binary is None:
        pytest.skip(f"no emulator: set {EMULATOR_VARIABLE} to run over it")
    with running_emulator(binary) as address, grpc.insecure_channel(address) as opened:
        yield opened


@pytest.fixture
def publisher(channel: grpc.Channel) -> Iterator[PublisherClient]:
    client = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
    client.create_topic(name=TOPIC)
    yield client
    client.delete_topic(topic=TOPIC)


@pytest.fixture
def subscriber(channel: grpc.Channel, publisher: PublisherClient) -> Iterator[SubscriberClient]:
    assert publisher.get_topic(topic=TOPIC).name == TOPIC
    client = SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))
    client.create_subscription(
        request={"name": SUBSCRIPTION, "topic": TOPIC, "enable_message_ordering": True}
    )
    yield client
    client.delete_subscription(subscription=SUBSCRIPTION)


def publish(publisher: PublisherClient, messages: list[PubsubMessage]) -> list[str]:
    answer = publisher.publish(topic=TOPIC, messages=messages, retry=None, timeout=20.0)
    return list(answer.message_ids)


def pull(subscriber: SubscriberClient, count: int) -> list[PubsubMessage]:
    got: list[PubsubMessage] = []
    deadline = time.monotonic() + 20.0
    while len(got) < count and time.monotonic() < deadline:
        pulled = subscriber.pull(subscription=SUBSCRIPTION, max_messages=7).received_messages
        got += [received.message for received in pulled]
        if pulled:
            subscriber.acknowledge(
                subscription=SUBSCRIPTION, ack_ids=[received.ack_id for received in pulled]
            )
    return got


def test_what_is_published_is_delivered_once_in_order_with_all_its_parts(
    publisher: PublisherClient, subscriber: SubscriberClient
) -> None:
    ids: list[str] = []
    for i in range(5):
        ids += publish(
            publisher,
            [
                PubsubMessage(data=b"%d" % n, ordering_key="site", attributes={"seq": str(n)})
                for n in range(i * 4, i * 4 + 4)
            ],
        )
    got = pull(subscriber, 20)
    assert [m.message_id for m in got] == ids
    assert [int(m.data) for m in got] == list(range(20))
    assert [dict(m.attributes) for m in got] == [{"seq": str(n)} for n in range(20)]
    assert {m.ordering_key for m in got} == {"site"}


def test_a_thousand_messages_are_taken_and_one_more_is_refused(
    publisher: PublisherClient,
) -> None:
    assert len(publish(publisher, [PubsubMessage(data=b"x")] * 1000)) == 1000
    with pytest.raises(exceptions.InvalidArgument):
        publish(publisher, [PubsubMessage(data=b"x")] * 1001)


def test_an_unknown_topic_is_not_found(publisher: PublisherClient) -> None:
    unknown = "projects/p/topics/unknown"
    with pytest.raises(exceptions.NotFound):
        publisher.get_topic(topic=unknown, retry=None)
    with pytest.raises(exceptions.NotFound):
        publisher.publish(topic=unknown, messages=[PubsubMessage(data=b"x")], retry=None)


def test_a_topic_that_exists_is_not_created_again(publisher: PublisherClient) -> None:
    with pytest.raises(exceptions.AlreadyExists):
        publisher.create_topic(name=TOPIC, retry=None)


def test_a_message_without_data_and_attributes_is_refused(publisher: PublisherClient) -> None:
    with pytest.raises(exceptions.InvalidArgument):
        publish(publisher, [PubsubMessage()])


def test_a_request_without_messages_is_refused(publisher: PublisherClient) -> None:
    with pytest.raises(exceptions.InvalidArgument):
        publish(publisher, [])


def test_a_topic_name_that_is_too_short_is_refused(publisher: PublisherClient) -> None:
    with pytest.raises(exceptions.InvalidArgument):
        publisher.create_topic(name="projects/p/topics/t", retry=None)
