"""The Pub/Sub fake holds to what the service documents, seen by the official clients."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.api_core import exceptions
from google.pubsub_v1 import PublisherClient, SubscriberClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcTransport
from google.pubsub_v1.types import PublishResponse, PubsubMessage

from tests.fakes import FakePubSub
from tests.fakes.in_flight import GIVE_UP_GRACE_S, InFlight

TOPIC = "projects/p/topics/readings"
SUBSCRIPTION = "projects/p/subscriptions/readings-all"
DEADLINE_S = 10.0
# gRPC waits a second and more before it dials again; a restart shall not cost that.
QUICK_RECONNECT = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
]


@pytest.fixture
def fake() -> Iterator[FakePubSub]:
    with FakePubSub(topics=[TOPIC]) as server:
        yield server


@pytest.fixture
def channel(fake: FakePubSub) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(fake.address, options=QUICK_RECONNECT) as opened:
        yield opened


@pytest.fixture
def publisher(channel: grpc.Channel) -> PublisherClient:
    return PublisherClient(transport=PublisherGrpcTransport(channel=channel))


@pytest.fixture
def subscriber(channel: grpc.Channel) -> SubscriberClient:
    return SubscriberClient(transport=SubscriberGrpcTransport(channel=channel))


def publish(
    publisher: PublisherClient,
    *messages: PubsubMessage,
    topic: str = TOPIC,
    timeout_s: float = DEADLINE_S,
) -> PublishResponse:
    return publisher.publish(topic=topic, messages=list(messages), retry=None, timeout=timeout_s)


def message(data: bytes = b"x", key: str = "", **attributes: str) -> PubsubMessage:
    return PubsubMessage(data=data, ordering_key=key, attributes=attributes)


def with_attributes(attributes: dict[str, str]) -> PubsubMessage:
    return PubsubMessage(data=b"x", attributes=attributes)


def refused(publisher: PublisherClient, *messages: PubsubMessage) -> str:
    with pytest.raises(exceptions.InvalidArgument) as caught:
        publish(publisher, *messages)
    return str(caught.value)


def test_what_is_published_is_stored_in_order_with_the_ids_that_were_answered(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    first = publish(publisher, message(b"1", "a", seq="1"), message(b"2", "a", seq="2"))
    second = publish(publisher, message(b"3", "b", seq="3"))
    stored = fake.messages(TOPIC)
    assert [m.data for m in stored] == [b"1", b"2", b"3"]
    assert [m.message_id for m in stored] == [*first.message_ids, *second.message_ids]
    assert [m.attributes for m in stored] == [{"seq": "1"}, {"seq": "2"}, {"seq": "3"}]
    assert {k: [m.data for m in ms] for k, ms in fake.by_key(TOPIC).items()} == {
        "a": [b"1", b"2"],
        "b": [b"3"],
    }
    assert stored[0].published_at <= stored[2].published_at <= time.monotonic()
    assert fake.last_seq(TOPIC) == {"a": "2", "b": "3"}
    assert (fake.count, fake.requests) == (3, 2)


def test_without_keep_only_counts_and_the_last_seq_remain() -> None:
    with (
        FakePubSub(topics=[TOPIC], keep=False) as fake,
        grpc.insecure_channel(fake.address) as channel,
    ):
        client = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
        publish(client, message(key="a", seq="8"), message(key="a", seq="9"))
        assert fake.messages(TOPIC) == []
        assert fake.topic_count(TOPIC) == 2
        assert fake.last_seq(TOPIC) == {"a": "9"}


def test_without_keep_every_twentieth_request_is_judged_message_by_message() -> None:
    with (
        FakePubSub(topics=[TOPIC], keep=False) as fake,
        grpc.insecure_channel(fake.address) as channel,
    ):
        client = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
        wrong = [message(key="a"), message(key="b")]
        assert "same ordering key" in refused(client, *wrong)
        publish(client, message(key="a"))
        for _ in range(19):
            publish(client, *wrong)
            assert "maximum value is 1000" in refused(client, *[message()] * 1001)
        assert "same ordering key" in refused(client, *wrong)
        assert fake.topic_count(TOPIC) == 39


def test_a_thousand_messages_are_taken_and_one_more_is_refused(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    publish(publisher, *[message()] * 1000)
    assert "maximum value is 1000" in refused(publisher, *[message()] * 1001)
    assert fake.count == 1000


def test_a_request_without_messages_is_refused(publisher: PublisherClient) -> None:
    refused(publisher)


def test_ten_million_bytes_are_taken_and_more_are_refused(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    publish(publisher, message(b"x" * 9_999_900))
    assert "exceeds the limit" in refused(publisher, message(b"x" * 10_000_000))
    assert fake.count == 1


@pytest.mark.parametrize("keys", [("a", "b"), ("a", ""), ("", "a")])
def test_a_request_with_two_ordering_keys_is_refused(
    fake: FakePubSub, publisher: PublisherClient, keys: tuple[str, str]
) -> None:
    text = refused(publisher, *[message(key=key) for key in keys])
    assert "they must all have the same ordering key" in text
    assert fake.count == 0


def test_lengths_are_counted_in_bytes_and_the_documented_ones_are_the_last_taken(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    publish(publisher, message(key="é" * 512))
    publish(publisher, message(a="é" * 512))
    publish(publisher, with_attributes({"é" * 128: "v"}))
    publish(publisher, with_attributes({f"k{i}": "v" for i in range(100)}))
    assert fake.count == 4
    assert "ordering key is too long" in refused(publisher, message(key="é" * 512 + "x"))
    assert "value that is too long" in refused(publisher, message(a="é" * 512 + "x"))
    assert "key that is too long" in refused(publisher, with_attributes({"é" * 128 + "x": "v"}))
    assert "101" in refused(publisher, with_attributes({f"k{i}": "v" for i in range(101)}))
    assert fake.count == 4


def test_an_attribute_that_begins_with_goog_is_refused_each_time(
    publisher: PublisherClient,
) -> None:
    for _ in range(2):
        assert "goog" in refused(publisher, message(google_thing="v"))


def test_a_message_needs_data_or_an_attribute(fake: FakePubSub, publisher: PublisherClient) -> None:
    publish(publisher, message(b"", a="v"))
    assert "empty" in refused(publisher, message(), message(b"", key=""))
    assert fake.count == 1


def test_an_unknown_topic_is_not_found_until_it_is_created(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    other = "projects/p/topics/other"
    with pytest.raises(exceptions.NotFound, match=r"Resource not found \(resource=other\)"):
        publish(publisher, message(), topic=other)
    with pytest.raises(exceptions.NotFound):
        publisher.get_topic(topic=other, retry=None)
    assert publisher.create_topic(name=other).name == other
    assert publisher.get_topic(topic=other).name == other
    with pytest.raises(exceptions.AlreadyExists):
        publisher.create_topic(name=other)
    publish(publisher, message(), topic=other)
    assert (fake.topic_count(other), fake.topic_count(TOPIC)) == (1, 0)
    publisher.delete_topic(topic=other)
    with pytest.raises(exceptions.NotFound):
        publish(publisher, message(), topic=other)


def test_a_name_that_is_no_topic_is_invalid(publisher: PublisherClient) -> None:
    with pytest.raises(exceptions.InvalidArgument):
        publisher.create_topic(name="projects/p/topics/1")


def test_two_requests_of_one_key_at_once_are_a_violation_and_still_stored(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    fake.faults.delay(0.5, times=1)
    with ThreadPoolExecutor() as threads:
        first = threads.submit(publish, publisher, message(b"1", "a"))
        assert fake.faults.wait_fired(1, DEADLINE_S)
        publish(publisher, message(b"other", "b"))
        publish(publisher, message(b"2", "a"))
        first.result()
    assert [(v.topic, v.ordering_key) for v in fake.violations] == [(TOPIC, "a")]
    assert [m.data for m in fake.by_key(TOPIC)["a"]] == [b"2", b"1"]


def test_requests_one_after_the_other_are_no_violation(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    for i in range(200):
        publish(publisher, message(b"%d" % i, "a"))
    assert fake.violations == []


def test_a_retry_after_the_deadline_is_no_violation(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    fake.faults.hang(times=5)
    for _ in range(5):
        with pytest.raises(exceptions.DeadlineExceeded):
            publish(publisher, message(key="a"), timeout_s=0.1)
    publish(publisher, message(key="a"))
    fake.stop()  # every call has been judged once the server is down
    assert fake.violations == []
    assert fake.count == 1


class Context:
    """The part of a call's context that tells when its caller has left."""

    def __init__(self) -> None:
        self.leave: Callable[[], None] = lambda: None

    def add_callback(self, callback: Callable[[], None]) -> None:
        self.leave = callback


@pytest.mark.parametrize(
    ("left_after_s", "violations"),
    [
        pytest.param(GIVE_UP_GRACE_S / 2, 0, id="a retry that overtook the news"),
        pytest.param(GIVE_UP_GRACE_S * 2, 1, id="a caller that sent before it gave up"),
        pytest.param(None, 1, id="a caller that still waits"),
    ],
)
def test_a_second_request_is_a_violation_unless_the_first_was_given_up(
    left_after_s: float | None, violations: int
) -> None:
    now = 100.0
    in_flight = InFlight(clock=lambda: now)
    context = Context()
    first = in_flight.begin(TOPIC, "a", context)
    second = in_flight.begin(TOPIC, "a", Context())
    if left_after_s is not None:
        now += left_after_s
        context.leave()
    in_flight.end(second)
    in_flight.end(first)
    assert len(in_flight.violations) == violations


def test_messages_without_a_key_may_be_in_flight_together(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    fake.faults.delay(0.2, times=2)
    with ThreadPoolExecutor() as threads:
        for done in [threads.submit(publish, publisher, message()) for _ in range(2)]:
            done.result()
    assert fake.violations == []


def test_wait_for_returns_when_the_messages_are_there(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    assert not fake.wait_for(1, timeout_s=0.0)
    with ThreadPoolExecutor() as threads:
        waiting: Future[bool] = threads.submit(fake.wait_for, 3, DEADLINE_S)
        publish(publisher, message(), message())
        assert not waiting.done()
        publish(publisher, message())
        assert waiting.result()


def test_a_planned_status_meets_as_many_requests_as_planned(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    fake.faults.abort(grpc.StatusCode.PERMISSION_DENIED, "User not authorized.", times=2)
    for _ in range(2):
        with pytest.raises(exceptions.PermissionDenied, match="User not authorized"):
            publish(publisher, message())
    publish(publisher, message())
    assert (fake.count, fake.faults.fired) == (1, 2)


def test_a_fault_until_cleared_stays_and_leaves_other_calls_alone(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    fake.faults.abort(grpc.StatusCode.UNAVAILABLE, times=None)
    for _ in range(5):
        with pytest.raises(exceptions.ServiceUnavailable):
            publish(publisher, message())
    publisher.get_topic(topic=TOPIC, retry=None)
    fake.faults.clear()
    publish(publisher, message())
    assert fake.count == 1


def test_faults_can_be_meant_for_every_call(fake: FakePubSub, publisher: PublisherClient) -> None:
    fake.faults.abort(grpc.StatusCode.UNAUTHENTICATED, times=None, calls={"*"})
    with pytest.raises(exceptions.Unauthenticated):
        publisher.get_topic(topic=TOPIC, retry=None)
    with pytest.raises(exceptions.Unauthenticated):
        publish(publisher, message())


def test_a_hung_request_ends_with_its_deadline_and_is_not_stored(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    fake.faults.hang()
    with pytest.raises(exceptions.DeadlineExceeded):
        publish(publisher, message(), timeout_s=0.2)
    publish(publisher, message(b"after"))
    assert [m.data for m in fake.messages(TOPIC)] == [b"after"]


def test_clear_lets_a_hung_request_go_as_unavailable(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    fake.faults.hang(times=None)
    with ThreadPoolExecutor() as threads:
        hung = threads.submit(publish, publisher, message())
        assert fake.faults.wait_fired(1, DEADLINE_S)
        fake.faults.clear()
        assert isinstance(hung.exception(), exceptions.ServiceUnavailable)
    assert fake.count == 0


def test_a_lost_answer_leaves_the_message_stored_and_the_caller_in_doubt(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    fake.faults.lose_answer()
    with pytest.raises(exceptions.ServiceUnavailable):
        publish(publisher, message(b"doubt"))
    publish(publisher, message(b"doubt"))
    assert [m.data for m in fake.messages(TOPIC)] == [b"doubt", b"doubt"]


def test_a_delay_is_waited_for_and_the_request_is_stored(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    fake.faults.delay(0.2, times=1)
    began = time.monotonic()
    publish(publisher, message())
    assert time.monotonic() - began >= 0.2
    assert fake.count == 1


def test_one_poisoned_message_refuses_its_whole_request(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    fake.faults.poison = lambda data: b"bad" in data
    assert "Message failed schema validation" in refused(publisher, message(), message(b"bad"))
    publish(publisher, message(b"good"))
    fake.faults.clear()
    publish(publisher, message(b"bad"))
    assert [m.data for m in fake.messages(TOPIC)] == [b"good", b"bad"]


def test_a_stopped_fake_refuses_connections_and_keeps_its_store_and_port(
    fake: FakePubSub, publisher: PublisherClient
) -> None:
    publish(publisher, message(b"1"))
    address = fake.address
    for data in (b"2", b"3"):
        fake.stop()
        with pytest.raises(exceptions.ServiceUnavailable):
            publish(publisher, message(b"lost"), timeout_s=1.0)
        fake.start()
        publisher.publish(
            topic=TOPIC, messages=[message(data)], timeout=DEADLINE_S
        )  # with the client's own retry, which the reconnect may need
    assert fake.address == address
    assert [m.data for m in fake.messages(TOPIC)] == [b"1", b"2", b"3"]


def test_stop_ends_hung_requests_at_once(fake: FakePubSub, publisher: PublisherClient) -> None:
    fake.faults.hang(times=None)
    with ThreadPoolExecutor() as threads:
        hung = threads.submit(publish, publisher, message())
        assert fake.faults.wait_fired(1, DEADLINE_S)
        fake.stop()
        assert isinstance(hung.exception(timeout=DEADLINE_S), exceptions.GoogleAPICallError)
    assert fake.count == 0


def test_a_port_that_is_taken_is_an_error(fake: FakePubSub) -> None:
    with pytest.raises(RuntimeError):
        FakePubSub(fake.port).start()


# The flag is deprecated for subscribers; a test uses it to see that nothing is there.
@pytest.mark.filterwarnings("ignore:The return_immediately flag")
def test_an_ordered_subscription_delivers_each_key_in_order(
    publisher: PublisherClient, subscriber: SubscriberClient
) -> None:
    subscriber.create_subscription(
        request={"name": SUBSCRIPTION, "topic": TOPIC, "enable_message_ordering": True}
    )
    for i in range(10):
        publish(publisher, message(b"%d" % i, "a"), message(b"%d'" % i, "a"))
    got: list[bytes] = []
    while len(got) < 20:
        pulled = subscriber.pull(subscription=SUBSCRIPTION, max_messages=3).received_messages
        got += [received.message.data for received in pulled]
        again = subscriber.pull(
            request={"subscription": SUBSCRIPTION, "max_messages": 3, "return_immediately": True}
        )
        assert not again.received_messages, "the key has messages out"
        subscriber.acknowledge(
            subscription=SUBSCRIPTION, ack_ids=[received.ack_id for received in pulled]
        )
    assert got == [d for i in range(10) for d in (b"%d" % i, b"%d'" % i)]


def test_what_is_refused_by_the_subscriber_comes_again_with_all_that_follows(
    publisher: PublisherClient, subscriber: SubscriberClient
) -> None:
    subscriber.create_subscription(
        request={"name": SUBSCRIPTION, "topic": TOPIC, "enable_message_ordering": True}
    )
    sent = publish(publisher, *[message(b"%d" % i, "a") for i in range(4)])
    pulled = subscriber.pull(subscription=SUBSCRIPTION, max_messages=4).received_messages
    assert [received.message.message_id for received in pulled] == list(sent.message_ids)
    subscriber.acknowledge(subscription=SUBSCRIPTION, ack_ids=[pulled[0].ack_id])
    subscriber.modify_ack_deadline(
        subscription=SUBSCRIPTION, ack_ids=[pulled[1].ack_id], ack_deadline_seconds=0
    )
    again = subscriber.pull(subscription=SUBSCRIPTION, max_messages=10).received_messages
    assert [received.message.data for received in again] == [b"1", b"2", b"3"]


def test_a_subscription_of_an_unknown_topic_is_not_found(subscriber: SubscriberClient) -> None:
    with pytest.raises(exceptions.NotFound):
        subscriber.create_subscription(name=SUBSCRIPTION, topic="projects/p/topics/nowhere")
    with pytest.raises(exceptions.NotFound):
        subscriber.pull(subscription=SUBSCRIPTION, max_messages=1, retry=None)


def test_many_publishers_lose_nothing(fake: FakePubSub, publisher: PublisherClient) -> None:
    def run(key: str) -> None:
        for i in range(50):
            publish(publisher, message(b"%d" % i, key))

    threads = [threading.Thread(target=run, args=(f"site-{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {k: [int(m.data) for m in ms] for k, ms in fake.by_key(TOPIC).items()} == {
        f"site-{i}": list(range(50)) for i in range(8)
    }
    assert fake.violations == []
    assert len({m.message_id for m in fake.messages(TOPIC)}) == 400


def test_it_runs_as_a_process_that_tells_its_counts() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes", "pubsub", "--topic", TOPIC],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    with process:
        assert process.stdout is not None
        try:
            serving = json.loads(process.stdout.readline())
            assert serving["event"] == "serving"
            with grpc.insecure_channel(f"127.0.0.1:{serving['port']}") as channel:
                client = PublisherClient(transport=PublisherGrpcTransport(channel=channel))
                publish(client, message(key="a", seq="7"))
            process.send_signal(signal.SIGUSR1)
            counts = json.loads(process.stdout.readline())
            assert (counts["event"], counts["count"]) == ("counts", 1)
            process.send_signal(signal.SIGTERM)
            stopped = json.loads(process.stdout.readline())
            assert stopped["event"] == "stopped"
            assert stopped["last_seq"] == {TOPIC: {"a": "7"}}
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
