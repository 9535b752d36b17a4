"""The Pub/Sub sink: ordered per site, sites in parallel, one request in flight per key.

It uses the generated low-level client's channel and messages in protobuf's own bytes. The official
publisher on top of it batches in threads of its own, at 16 times the CPU, and pauses an
ordering key after an error until it is told to resume; a spool needs neither. While it only
waits for answers, the next batch is read, sorted and encoded (:mod:`forwarder.readahead`).
"""

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
from google.pubsub_v1.types import PublishResponse as _PublishResponse

from forwarder.faults import Blame, FaultError, blame_grpc
from forwarder.lanes import Lane, Lanes, Request, sort_as_many_as_fit, sort_by_site
from forwarder.publisher import (
    Connection,
    call_fault,
    connect,
    is_global,
    missing_access,
    routing,
    subscription_lister,
)
from forwarder.publishfault import publish_fault
from forwarder.recreated import Notes, RecreatedTopic
from forwarder.refusals import RefusalRun, refuses_all
from forwarder.sink import Delivery, Fault, FaultKind
from forwarder.wire import MessageEncoder
from lifecycle import PUBSUB_GATHER_S, Settings, fields
from spool import DeadLetter, Reading

if TYPE_CHECKING:
    from google.auth.credentials import Credentials

log = logging.getLogger("forwarder.pubsub")

REQUEST_MAX_BYTES = 9_000_000
"""Below the service's 10 MB, which counts overheads that we do not see."""

IN_FLIGHT_MAX = 100
"""Requests on their way at once. Google's front ends take about as many streams per connection;
more would wait in the client while their deadlines run."""

DEADLINE_S = 20.0
"""Of each request, from when it is sent."""

START_WITHIN_S = DEADLINE_S
"""What could not be sent so long after the delivery began is handed back, untried: the others do
not wait longer for sites that do not answer."""

GIVE_BACK_AFTER_S = 60.0
"""A delivery that looks for guilty rows for longer than this hands the rest back, so that what
it found is settled before the watchdog takes the search for a hang."""

BATCH_MAX_ROWS = 8_000
ROWS_PER_SITE = 8
MANY_SITES_MAX_ROWS = 16_000
"""Each site has requests of its own. Where there are many, a batch of 8,000 rows would be as many
requests with a row or two each, so it may be larger, up to a bound that memory sets (measured with
5,000 sites: 135 MB for the process, 150 MB with 24,000 rows; 105 MB with 8 sites)."""

BATCH_MAX_BYTES = 8 * 1024 * 1024
RELEASED_MAX = 8
"""So many sites are asked for a row that is accepted, in a delivery that is refused elsewhere."""

PUBLISH_METHOD = "/google.pubsub.v1.Publisher/Publish"

PublishResponse = _PublishResponse.pb()

_Ended: TypeAlias = "queue.SimpleQueue[tuple[Callable[[], Any], Lane, list[Reading]]]"
"""Of requests that have come to their end: returns the answer or raises, and what it was for."""


class PubSubSink:
    """Publishes readings as KPI events to one topic.

    Args:
        settings: Project, topic, endpoint or emulator, instance id.
        notes: The sink's own file; None to remember nothing across restarts.
    """

    name = "pubsub"
    max_bytes = BATCH_MAX_BYTES

    def __init__(self, settings: Settings, notes: Notes | None = None) -> None:
        topic = settings.pubsub_topic
        if not topic.startswith("projects/"):
            topic = f"projects/{settings.gcp_project_id}/topics/{topic}"
        self.max_rows = BATCH_MAX_ROWS
        self.gather_s = PUBSUB_GATHER_S
        self._topic = topic
        self._settings = settings
        self._encoder = MessageEncoder(topic, settings.instance_id)
        self._metadata = routing(topic)
        self._recreated = RecreatedTopic(topic, notes)
        self._connection: Connection | None = None
        self._publish: grpc.UnaryUnaryMultiCallable | None = None
        self._credentials: Credentials | None = None
        self._refusals = RefusalRun(hold=settings.refused_policy == "hold")
        self._accepted = False
        """Whether a row was accepted in this delivery."""
        self._not_found = False
        """Whether the topic was missing in this delivery."""
        self._suspects: list[DeadLetter] = []
        """Refused since the last row that was accepted in this delivery."""
        self._suspected: set[str] = set()
        """The sites of rows that the last delivery held because they were refused."""
        self._released = 0
        """How often lanes that were kept back were let go in this delivery."""
        self._ready: Lanes | None = None
        """The batch after this one."""
        self._not_encoded: list[Request] = []
        """Its requests that are still to be made, last to first."""
        self.meanwhile: Callable[[], bool] = lambda: False
        """Called while a delivery only waits for the service (:mod:`forwarder.readahead`)."""
        if is_global(settings):
            log.warning(
                "the order of a site's readings is kept within one region only, and the global "
                "endpoint may use several: set PUBSUB_ENDPOINT to a regional one",
                extra=fields(example="PUBSUB_ENDPOINT=europe-west1-pubsub.googleapis.com:443"),
            )

    def prepare(self, rows: list[Reading]) -> list[Reading]:
        """Sort the next batch; see :class:`forwarder.readahead.WaitingSink`."""
        self._ready = sort_as_many_as_fit(rows)
        self._not_encoded = [r for lane in self._ready.lanes for r in lane.waiting][::-1]
        return self._ready.rows

    def deliver(self, rows: Sequence[Reading]) -> Delivery:
        """Publish ``rows``; see :class:`forwarder.sink.Sink`."""
        try:
            self._connect()
        except FaultError as error:
            return Delivery(retry=list(rows), fault=error.fault)
        if self._recreated.missing and (why := self._look_at_topic()) is not None:
            return Delivery(retry=list(rows), fault=why)
        self._refusals.begin()
        self._suspects.clear()
        self._accepted = self._not_found = False
        was_missing = self._recreated.missing
        delivery = Delivery()
        self._run(self._lanes(rows, delivery), delivery)
        # Lanes end in any order; the cursor needs the order of seq.
        delivery.retry.sort()
        # In one delivery both, accepted and missing: it is being deleted just now.
        if self._accepted and was_missing and not self._not_found:
            open_seqs = {r[0] for r in delivery.retry} | {d.row[0] for d in delivery.dead}
            self._recreated.accepted(next(r[0] for r in rows if r[0] not in open_seqs))
        fault = delivery.fault
        if fault is not None:
            why = call_fault(self._settings, fault.problem, self._credentials)
            if why is not None:
                fault = delivery.fault = why
                delivery.faults = dict.fromkeys(delivery.faults, fault)
            if fault.kind is FaultKind.HOLD and not self._accepted:
                # It is the topic or the account, as far as can be told, and no single site.
                delivery.faults.clear()
            dead_path = fault.kind is FaultKind.HOLD or "DEADLINE_EXCEEDED" in fault.problem
            if dead_path and not self._accepted:
                # The key file may be another one by the next try, or the path may be dead: it
                # begins with a new connection.
                self.close()
        return delivery

    def check(self) -> Fault | None:
        """Look whether messages could be published; see :class:`forwarder.sink.CheckingSink`."""
        return missing_access(self._settings)

    def close(self) -> None:
        """Close the channel."""
        if self._connection is not None:
            self._connection.close()
            self._connection = self._publish = None

    def _connect(self) -> None:
        if self._publish is not None:
            return
        self._connection = connect(self._settings)
        self._credentials = self._connection.credentials or self._credentials
        self._publish = self._connection.channel.unary_unary(
            PUBLISH_METHOD,
            request_serializer=None,  # they are bytes already: forwarder/wire.py
            response_deserializer=PublishResponse.FromString,
        )

    def _look_at_topic(self) -> Fault | None:
        """Return why nothing may be published to a topic that was missing before."""
        if self._connection is None:
            return None
        lister = subscription_lister(self._connection.channel, self._topic, DEADLINE_S)
        fault = self._recreated.look(lister)
        if fault is not None:
            fault = call_fault(self._settings, fault.problem, self._credentials) or fault
            self.close()  # as after any refusal: the next try begins with a new connection
        return fault

    def _lanes(self, rows: Sequence[Reading], delivery: Delivery) -> list[Lane]:
        """Return the lanes of ``rows``, if possible those that were prepared."""
        ready = self._ready
        if ready is not None and ready.rows is rows:
            self._ready, self._not_encoded = None, []
        else:
            ready = sort_by_site(list(rows))
        delivery.dead += ready.dead
        # After a few sites' retry the next batch is of all again, so it shrinks by half at most.
        likes = max(len(ready.lanes) * ROWS_PER_SITE, self.max_rows // 2, BATCH_MAX_ROWS)
        self.max_rows = min(likes, MANY_SITES_MAX_ROWS)
        return ready.lanes

    def _run(self, lanes: list[Lane], delivery: Delivery) -> None:
        """Send all lanes to their end: per lane one request at a time, many lanes at once."""
        ended: _Ended = queue.SimpleQueue()
        begun_s = time.monotonic()
        alone = len(lanes) == 1 and len(lanes[0].waiting) == 1
        first, reserve = self._kept_back(lanes)
        ready = deque(first)  # those that were not begun come first
        in_flight = 0
        while True:
            while ready and in_flight < IN_FLIGHT_MAX and not self._refusals.enough:
                in_flight += self._send_next(ready.popleft(), ended, alone=alone)
                alone = False
            if not in_flight:
                if not reserve or (self._refusals.enough and self._released > RELEASED_MAX):
                    break
                in_flight = self._release(reserve, ready, ended)
                continue
            while ended.empty() and (self.meanwhile() or self._encode_ahead()):
                pass  # in pieces: a lane whose answer is there goes on first
            # Bounded by the deadline of each call.
            answer, lane, sent = ended.get()
            in_flight -= 1
            self._judge(answer, lane, sent, delivery)
            took_s = time.monotonic() - begun_s
            if took_s >= START_WITHIN_S:
                self._give_back_late(ready, reserve, delivery)
            if lane.waiting and took_s >= GIVE_BACK_AFTER_S:
                self._give_back_untried(lane, delivery)
            if lane.waiting:
                ready.append(lane)
        self._end_search([*ready, *reserve], delivery)

    def _give_back_late(self, ready: deque[Lane], reserve: list[Lane], delivery: Delivery) -> None:
        """Hand back the lanes that could not be begun in time."""
        while ready and not ready[0].begun:
            self._give_back_untried(ready.popleft(), delivery)
        while reserve:
            self._give_back_untried(reserve.pop(), delivery)

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

    def _release(self, reserve: list[Lane], ready: deque[Lane], ended: "_Ended") -> int:
        """Let lanes that waited go on; return how many requests are in flight now.

        While the search has come to rest by refusals, it is a row of one of them, and of another
        one if that is refused as well.
        """
        self._released += 1
        if not self._refusals.enough:
            ready.extend(reserve)
            reserve.clear()
            return 0
        lane = reserve.pop(0)
        lane.first_alone()
        return self._send_next(lane, ended)

    def _encode_ahead(self) -> bool:
        """Make the next request of the batch that was prepared; return whether there was one."""
        if not self._not_encoded:
            return False
        request = self._not_encoded.pop()
        request.body = self._encoder.request(request.rows)
        return True

    def _send_next(self, lane: Lane, ended: "_Ended", *, alone: bool = False) -> int:
        """Start the lane's next request; return 1, or 0 if the lane is at its end.

        Where it is ``alone``, this thread can wait for the answer itself. gRPC starts a thread
        whenever there is a call and there was none, which costs as much as everything else that
        is done for a single reading.
        """
        if not lane.waiting or self._publish is None:
            return 0
        lane.begun = True
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
                self._accepted = True
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
            fault = publish_fault(self._topic, code, details, blame)
            delivery.faults[sent[0][4]] = fault
            self._give_back(lane, delivery, fault)
            if code == "NOT_FOUND":
                self._not_found = True
                self._recreated.seen_missing()

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
        if delivery.faults:  # these sites are held with the others, and looked at with them
            delivery.faults |= {letter.row[4]: fault for letter in self._suspects}
        delivery.fault = fault
        for lane in parked:
            self._give_back(lane, delivery, fault)

    def _give_back_untried(self, lane: Lane, delivery: Delivery) -> None:
        """End a lane for lack of time; its site is not at fault."""
        delivery.retry += lane.give_up()
        if delivery.fault is None and not (self._accepted and not lane.begun):
            problem = f"publish to {self._topic}: not finished yet"
            delivery.fault = Fault(FaultKind.TRANSIENT, problem)

    def _give_back(self, lane: Lane, delivery: Delivery, fault: Fault) -> None:
        """End the lane: what it has not delivered is to be tried again."""
        delivery.retry += lane.give_up()
        if delivery.fault is None or fault.kind is FaultKind.HOLD:
            delivery.fault = fault
