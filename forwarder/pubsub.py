"""The Pub/Sub sink: ordered per site, sites in parallel, one request in flight per key.

It uses the generated low-level client's channel and messages in protobuf's own bytes. The official
publisher on top of it batches in threads of its own, at 16 times the CPU, and pauses an
ordering key after an error until it is told to resume; a spool needs neither. While it only
waits for answers, the next batch is read, sorted and encoded (:mod:`forwarder.readahead`).
"""

import logging
import queue
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import grpc
from google.auth.credentials import AnonymousCredentials, Credentials
from google.auth.exceptions import GoogleAuthError
from google.pubsub_v1 import PublisherClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcTransport
from google.pubsub_v1.types import PublishResponse as _PublishResponse

from forwarder.access import cannot_build, find_credentials, why_no_token
from forwarder.faults import CREDENTIALS_REMEDY, PLUGIN_FAILURE, Blame, FaultError, blame_grpc
from forwarder.lanes import Lane, Lanes, Request, sort_as_many_as_fit, sort_by_site
from forwarder.refusals import RefusalRun, refuses_all
from forwarder.sink import Delivery, Fault, FaultKind
from forwarder.wire import MessageEncoder
from lifecycle import Settings
from spool import DeadLetter, Reading

log = logging.getLogger("forwarder.pubsub")

REQUEST_MAX_BYTES = 9_000_000
"""Below the service's 10 MB, which counts overheads that we do not see."""

DEADLINE_S = 20.0
GIVE_BACK_AFTER_S = 60.0
"""A delivery that looks for guilty rows for longer than this hands the rest back, so that what
it found is settled before the watchdog takes the search for a hang."""

BATCH_MAX_ROWS = 8_000
BATCH_MAX_BYTES = 8 * 1024 * 1024
GATHER_S = 0.005
"""See :class:`forwarder.sink.Sink`: whoever subscribes wants the readings soon."""

RELEASED_MAX = 8
"""So many sites are asked for a row that is accepted, in a delivery that is refused elsewhere."""

CHANNEL_OPTIONS = (
    # A dead path is noticed after 40 s at the latest, not after the kernel's many minutes.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # A new channel must not inherit the dead connection of the one that it replaces.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
)
EMULATOR_OPTIONS = (
    *CHANNEL_OPTIONS,
    # It stands on this machine or beside it, without TLS: HTTPS_PROXY is not for it.
    ("grpc.enable_http_proxy", 0),
)
PUBLISH_METHOD = "/google.pubsub.v1.Publisher/Publish"

PublishResponse = _PublishResponse.pb()

_Ended: TypeAlias = "queue.SimpleQueue[tuple[Callable[[], Any], Lane, list[Reading]]]"
"""Of requests that have come to their end: returns the answer or raises, and what it was for."""


class PubSubSink:
    """Publishes readings as KPI events to one topic.

    Args:
        settings: Project, topic, endpoint or emulator, instance id.
    """

    name = "pubsub"
    max_rows = BATCH_MAX_ROWS
    max_bytes = BATCH_MAX_BYTES
    gather_s = GATHER_S

    def __init__(self, settings: Settings) -> None:
        topic = settings.pubsub_topic
        if not topic.startswith("projects/"):
            topic = f"projects/{settings.gcp_project_id}/topics/{topic}"
        self._topic = topic
        self._emulator = settings.pubsub_emulator_host
        self._endpoint = settings.pubsub_endpoint
        self._encoder = MessageEncoder(topic, settings.instance_id)
        self._metadata = (("x-goog-request-params", f"topic={topic}"),)
        self._client: PublisherClient | None = None
        self._publish: grpc.UnaryUnaryMultiCallable | None = None
        self._credentials: Credentials | None = None
        self._refusals = RefusalRun(hold=settings.refused_policy == "hold")
        self._suspects: list[DeadLetter] = []
        """Refused since the last row that was accepted in this delivery."""
        self._suspected: set[str] = set()
        """The sites of rows that the last delivery held because they were refused."""
        self._released = 0
        """How often lanes that were kept back were let go in this delivery."""
        self._ready: Lanes | None = None
        """The batch after this one."""
        self.meanwhile: Callable[[], bool] = lambda: False
        """Called while a delivery only waits for the service (:mod:`forwarder.readahead`)."""

    def prepare(self, rows: list[Reading]) -> list[Reading]:
        """Sort the next batch; see :class:`forwarder.readahead.WaitingSink`."""
        self._ready = sort_as_many_as_fit(rows)
        return self._ready.rows

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        """Publish ``rows``; see :class:`forwarder.sink.Sink`."""
        try:
            self._connect()
        except FaultError as error:
            return Delivery(retry=list(rows), fault=error.fault)
        self._refusals.begin()
        self._suspects.clear()
        delivery = Delivery()
        self._run(self._lanes(rows, delivery), delivery)
        # Lanes end in any order; the cursor needs the order of seq.
        delivery.retry.sort()
        fault = delivery.fault
        if fault is not None:
            if PLUGIN_FAILURE in fault.problem and self._credentials is not None:
                fault = delivery.fault = why_no_token(self._credentials, fault.problem)
            if fault.kind is FaultKind.HOLD or "DEADLINE_EXCEEDED" in fault.problem:
                # The key file may be another one by the next try, or the path may be dead: it
                # begins with a new connection.
                self.close()
        return delivery

    def close(self) -> None:
        """Close the channel."""
        if self._client is not None:
            self._client.transport.close()
            self._client = None
            self._publish = None

    def _connect(self) -> None:
        if self._publish is not None:
            return
        if self._emulator:
            channel = grpc.insecure_channel(self._emulator, options=EMULATOR_OPTIONS)
            transport = PublisherGrpcTransport(channel=channel, credentials=AnonymousCredentials())
        else:
            host = self._endpoint or PublisherClient.DEFAULT_ENDPOINT
            if not host.rpartition(":")[2].isdigit():  # a colon may be IPv6's
                host = f"{host}:443"
            self._credentials = find_credentials(PublisherGrpcTransport.AUTH_SCOPES)
            try:
                channel = PublisherGrpcTransport.create_channel(
                    host,
                    credentials=self._credentials,
                    scopes=PublisherGrpcTransport.AUTH_SCOPES,
                    options=CHANNEL_OPTIONS,
                )
            except (GoogleAuthError, OSError, ValueError) as error:
                raise FaultError(cannot_build(error)) from error
            transport = PublisherGrpcTransport(host=host, channel=channel)
        self._client = PublisherClient(transport=transport)
        self._publish = transport.grpc_channel.unary_unary(
            PUBLISH_METHOD,
            request_serializer=None,  # they are bytes already: forwarder/wire.py
            response_deserializer=PublishResponse.FromString,
        )

    def _lanes(self, rows: Sequence[Reading], delivery: Delivery) -> list[Lane]:
        """Return the lanes of ``rows``, if possible those that were prepared."""
        ready = self._ready
        if ready is not None and ready.rows is rows:
            self._ready = None
        else:
            ready = sort_by_site(list(rows))
        delivery.dead += ready.dead
        return ready.lanes

    def _run(self, lanes: list[Lane], delivery: Delivery) -> None:
        """Send all lanes to their end: per lane one request at a time, all lanes at once."""
        ended: _Ended = queue.SimpleQueue()
        give_back_at = time.monotonic() + GIVE_BACK_AFTER_S
        alone = len(lanes) == 1 and len(lanes[0].waiting) == 1
        first, reserve = self._kept_back(lanes)
        in_flight = sum(self._send_next(lane, ended, alone=alone) for lane in first)
        parked: list[Lane] = []
        while in_flight or reserve:
            if not in_flight:
                in_flight = self._release(reserve, ended)
                continue
            while ended.empty() and (self.meanwhile() or self._encode_ahead()):
                pass  # in pieces: a lane whose answer is there goes on first
            # Bounded by the deadline of each call.
            answer, lane, sent = ended.get()
            in_flight -= 1
            self._judge(answer, lane, sent, delivery)
            if lane.waiting and time.monotonic() >= give_back_at:
                fault = Fault(FaultKind.TRANSIENT, f"publish to {self._topic}: not finished yet")
                self._give_back(lane, delivery, fault)
            parked.append(lane)
            if not self._refusals.enough:
                in_flight += sum(self._send_next(lane, ended) for lane in parked)
                parked.clear()
            if self._refusals.enough and not in_flight and self._released > RELEASED_MAX:
                break
        self._end_search(parked + reserve, delivery)

    def _kept_back(self, lanes: list[Lane]) -> tuple[list[Lane], list[Lane]]:
        """Return the lanes to begin with, and those that wait.

        Where rows were refused and held in the last delivery, their sites come first. That a row
        of another site is accepted after them shows that they are at fault themselves; before
        them it would show nothing.
        """
        self._released = 0
        if not self._suspected:
            return lanes, []
        first: list[Lane] = []
        others: list[Lane] = []
        for lane in lanes:
            suspected = lane.waiting[0].rows[0][4] in self._suspected
            (first if suspected else others).append(lane)
        if not first:
            return others, []
        if others:
            self._refusals.search_deep()
        return first, others

    def _release(self, reserve: list[Lane], ended: "_Ended") -> int:
        """Let lanes that waited go on; return how many requests are in flight now.

        While the search has come to rest by refusals, it is a row of one of them, and of another
        one if that is refused as well.
        """
        self._released += 1
        if not self._refusals.enough:
            sent = sum(self._send_next(lane, ended) for lane in reserve)
            reserve.clear()
            return sent
        lane = reserve.pop(0)
        lane.first_alone()
        return self._send_next(lane, ended)

    def _encode_ahead(self) -> bool:
        """Make the next request of the batch that was prepared; return whether there was one."""
        for lane in self._ready.lanes if self._ready else ():
            for request in lane.waiting:
                if not request.body:
                    request.body = self._encoder.request(request.rows)
                    return True
        return False

    def _send_next(self, lane: Lane, ended: "_Ended", *, alone: bool = False) -> int:
        """Start the lane's next request; return 1, or 0 if the lane is at its end.

        Where it is ``alone``, this thread can wait for the answer itself. gRPC starts a thread
        whenever there is a call and there was none, which costs as much as everything else that
        is done for a single reading.
        """
        if not lane.waiting or self._publish is None:
            return 0
        request = lane.waiting.popleft()
        body = request.body or self._encoder.request(request.rows)
        if len(request.rows) > 1 and len(body) > REQUEST_MAX_BYTES:
            lane.split(request.rows)
            return self._send_next(lane, ended)
        if alone:
            call = partial(self._publish, body, timeout=DEADLINE_S, metadata=self._metadata)
            ended.put((call, lane, request.rows))
            return 1
        future = self._publish.future(body, timeout=DEADLINE_S, metadata=self._metadata)
        future.add_done_callback(lambda done: ended.put((done.result, lane, request.rows)))
        return 1

    def _judge(
        self,
        answered: Callable[[], Any],
        lane: Lane,
        sent: list[Reading],
        delivery: Delivery,
    ) -> None:
        """Decide what the answer to one request means for its rows and its lane."""
        try:
            answer = answered()
        except grpc.RpcError as error:
            code, details = error.code().name, error.details() or ""
        except grpc.FutureCancelledError:
            code, details = "CANCELLED", "the call was cancelled"
        else:
            if len(answer.message_ids) == len(sent):
                self._refusals.accepted()
                delivery.dead += self._suspects
                self._suspects.clear()
                return
            code = "UNKNOWN"
            details = f"{len(answer.message_ids)} message ids came for {len(sent)} messages"
        blame = blame_grpc(code)
        if blame is Blame.ROWS and len(sent) == 1:
            self._suspects.append(DeadLetter(sent[0], code.lower(), details))
            self._refusals.refused()
        elif blame is Blame.ROWS:
            # The service names no message: halve until the guilty one stands alone.
            lane.split(sent)
        else:
            lane.waiting.appendleft(Request(sent))
            self._give_back(lane, delivery, self._fault(code, details, blame))

    def _end_search(self, parked: list[Lane], delivery: Delivery) -> None:
        """Bury the rows that were refused last, unless it is the topic that refuses all."""
        self._suspected = {letter.row[4] for letter in self._suspects}
        if not self._refusals.of_all:
            self._suspected.clear()
            delivery.dead += self._suspects
            return
        project, topic = self._topic.split("/")[1::2]
        fault = refuses_all(
            f"publish to {self._topic}",
            self._suspects[0].detail,
            "look at its schema and mend it: "
            f"gcloud pubsub topics describe {topic} --project={project}",
        )
        delivery.retry += [letter.row for letter in self._suspects]
        delivery.fault = fault
        for lane in parked:
            self._give_back(lane, delivery, fault)

    def _give_back(self, lane: Lane, delivery: Delivery, fault: Fault) -> None:
        """End the lane: what it has not delivered is to be tried again."""
        delivery.retry += lane.give_up()
        if delivery.fault is None or fault.kind is FaultKind.HOLD:
            delivery.fault = fault

    def _fault(self, code: str, details: str, blame: Blame) -> Fault:
        problem = f"publish to {self._topic}: {code}: {details}"
        if blame is Blame.NOBODY:
            return Fault(FaultKind.TRANSIENT, problem)
        project, topic = self._topic.split("/")[1::2]
        return Fault(
            FaultKind.HOLD,
            problem,
            {
                "NOT_FOUND": f"create it: gcloud pubsub topics create {topic} --project={project}",
                "PERMISSION_DENIED": f"allow it: gcloud pubsub topics add-iam-policy-binding "
                f"{topic} --project={project} --role=roles/pubsub.publisher "
                "--member=serviceAccount:ACCOUNT",
                "UNAUTHENTICATED": CREDENTIALS_REMEDY,
            }.get(code, f"look at it: gcloud pubsub topics describe {topic} --project={project}"),
        )
