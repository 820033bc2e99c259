"""The link to the hub: connects, says who is there, sends what `lanes` says, takes receipts and desired state."""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from typing import Any

from ..clock import Clock
from ..contract import jsoncodec, topics
from ..contract.desired import Desired, parse_desired
from ..contract.errors import ContractError
from ..contract.lean_dataclass import dataclass
from ..contract.limits import BROKER_PACKET_BYTES, PROTOCOL_VERSION
from ..contract.presence import HUB_PRESENCE
from ..contract.questions import QUESTION
from ..contract.receipts import RECEIPTS
from ..contract.records import encode_batch
from ..journal import Journal
from ..metrics import Metrics
from ..mqtt_reconnect import run_session
from ..mqtt_session import Endpoint, MqttSession, SessionClosed, Will
from ..pace import Pace
from ..system.reasons import Reasons
from .backoff import Backoff
from .lanes import Lanes, Send
from .room import Room
from .window import Window

log = logging.getLogger(__name__)

STATUS_TRUST_MS = 5_000
"""Receipts of another hub than the one whose presence we heard may be late ones for so long after it; later they say that we missed a presence."""

UNHEARD_AFTER = 3
"""Silences of `RECEIPT_TIMEOUT_MS` one after the other, in which everything was sent again each time, from which it is told: a hub that starts, or is busy, needs one."""

AGAINS, AGAINS_MOST = 4, 256
"""Times that the hub asks for the same, the broker having acknowledged it each time, from which its size is in doubt; how many of such are counted at once."""

AROUND = 1_024
"""Bytes of a batch at most beside its records, topic included."""

ANSWER_S = 15.0
"""A broker that has not taken a piece of an answer by then: who asked waits no longer."""


@dataclass(frozen=True, slots=True)
class UplinkSettings:
    """How to reach the hub; times in seconds."""

    endpoint: Endpoint
    edge: str
    keepalive_s: int = 15
    backoff_base_s: float = 1.0
    backoff_cap_s: float = 60.0
    stable_after_s: float = 60.0
    inflight: int = 8
    batch_records: int = 200
    batch_bytes: int = 131_072


class Uplink:
    """One edge's link.

    Args:
        presence: returns what the presence says besides names and times (site, devices, generation, ...).
        on_desired: called with each new desired state (or the error of a bad one and its generation, 0 if unknown).
        on_link: called with True and the hub's name when a hub is there, False and the reason when it is gone.
        session: makes connections.
        entropy: where the pauses between tries are drawn.
        pace: how often the presence is said again.
        on_question: called with each question of the hub.
    """

    def __init__(
        self, settings: UplinkSettings, journal: Journal, clock: Clock, metrics: Metrics, *, presence: Callable[[], dict[str, Any]],
        on_desired: Callable[[Desired], None], on_bad_desired: Callable[[ContractError, int], None], on_link: Callable[[bool, str], None],
        session: Callable[..., MqttSession] = MqttSession, entropy: random.Random | None = None, pace: Pace | None = None,
        on_question: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self._on_question = on_question
        self._settings = settings
        self._journal = journal
        self._clock = clock
        self._metrics = metrics
        self._presence = presence
        self._on_desired = on_desired
        self._on_bad_desired = on_bad_desired
        self._on_link = on_link
        self.lanes = Lanes(settings.inflight)
        self._backoff = Backoff(settings.backoff_base_s, settings.backoff_cap_s, settings.stable_after_s, entropy)
        self._make_session = session
        self._pace = pace or Pace()
        self._session: MqttSession | None = None
        self._wake = asyncio.Event()
        self._retry = asyncio.Event()
        self._hub_boot = ""
        self._status_ms = 0
        self.hub = ""
        self.connected = False
        self.last_error = ""
        self.taken_over = 0
        self.unheard = ""
        """Why the hub may not hear us, where it is there and has not answered for long; empty where it has."""
        self._unanswered = 0
        self._told_unheard = Reasons()
        self._room = Room(settings.batch_bytes)
        self.window = Window(settings.inflight * settings.batch_bytes)
        self._agains: dict[tuple[str, int], int] = {}
        """How often a stream was sent again from a record on, at this link."""
        self._stalled = (0, 0)
        """What the hub had of all streams when everything was sent again last, and how often in a row that was the same."""
        self._task: asyncio.Task[None] | None = None
        self._proven: set[str] = set()
        self._rebases: set[asyncio.Task[None]] = set()
        self._floors: dict[str, int] = {}

    # -- life ----------------------------------------------------------------------------------------------------------------

    def start(self) -> "asyncio.Task[None]":
        """Begin; call inside the running loop. The task never ends by itself."""
        self._journal.on_commit(self._committed)
        self._task = asyncio.get_running_loop().create_task(self._run(), name="uplink")
        return self._task

    async def stop(self, reason: str = "shutdown") -> None:
        """Say goodbye and end."""
        session = self._session
        if session is not None and session.open:
            self._publish_presence("offline", reason)
            await session.disconnect()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def up(self) -> bool:
        """A broker and behind it a hub are there."""
        return self.lanes.up

    def retry_now(self) -> None:
        """Do not wait for the back-off's end (the network has come back)."""
        self._retry.set()

    async def _run(self) -> None:
        protocol = self._settings.endpoint.protocol
        await run_session(self._make, self._serve, protocol=protocol, next_pause_s=self._next_pause, on_failure=self._failed, wake=self._retry, broker="the hub's broker")

    def _next_pause(self) -> float:
        pause = self._backoff.next_s()
        self._metrics.inc("uplink_connect_retries_total")
        return pause

    def _make(self, protocol5: bool) -> MqttSession:
        will = Will(topics.edge_topic(self._settings.edge, "status"), self._presence_payload("offline", "lost", bare=True))
        return self._make_session(
            self._settings.endpoint, f"novacron-edge-{self._settings.edge}", self._message, will=will, keepalive_s=self._settings.keepalive_s,
            protocol5=protocol5,
        )

    def _failed(self, error: SessionClosed) -> None:
        now = self._clock.mono_ms()
        self.connected = False
        self._session = None
        self.last_error = error.reason
        self._backoff.link_down(now / 1000)
        self._less(self._room.lost(error.too_large, now), "does not take a packet")
        self.window.lost()
        if error.taken_over:
            self.taken_over += 1
            self._metrics.inc("uplink_taken_over_total")
            log.error("another client connected as %s: two machines run with one identity", self._settings.edge)
        self._hub_gone(error.reason)

    async def _serve(self, session: MqttSession) -> None:
        self._session = session
        self._room.begin(session.packet_max)
        self.window.begin()
        self._agains.clear()
        self._stalled = (0, 0)
        session.on_too_large = lambda: session.abort("the broker refuses a packet of this size", too_large=True)
        self.connected = True
        self._backoff.link_up(self._clock.mono_ms() / 1000)
        self._metrics.inc("uplink_connects_total")
        await session.subscribe(topics.edge_subscriptions(self._settings.edge))
        self._publish_presence("online", "reconnect")
        heartbeat = asyncio.get_running_loop().create_task(self._heartbeat(session))
        try:
            await self._send_forever(session)
        finally:
            heartbeat.cancel()

    async def _heartbeat(self, session: MqttSession) -> None:
        while session.open:
            await asyncio.sleep(self._pace.heartbeat_s)
            self._publish_presence("online", "heartbeat")

    # -- presence ------------------------------------------------------------------------------------------------------------

    def _presence_payload(self, state: str, reason: str, bare: bool = False) -> bytes:
        stamp = self._clock.stamp()
        body: dict[str, Any] = {
            "v": PROTOCOL_VERSION, "edge": self._settings.edge, "boot": self._journal.boot, "boot_n": self._journal.boot_n, "state": state,
            "reason": reason,
        }
        if not bare:
            # The Last Will is written at connect and published much later: it must not carry a time or a state of then.
            body |= {"time_ms": stamp.wall_ms, "tq": stamp.quality, "speaks": [PROTOCOL_VERSION], **self._presence()}
        return jsoncodec.encode(body).encode()

    def _publish_presence(self, state: str, reason: str) -> None:
        if self._session is not None:
            self._session.publish(topics.edge_topic(self._settings.edge, "status"), self._presence_payload(state, reason), retain=True)

    def announce(self, reason: str = "changed") -> None:
        """Say the presence again now: something in it has changed."""
        if self._session is not None and self._session.open:
            self._publish_presence("online", reason)

    # -- down ----------------------------------------------------------------------------------------------------------------

    def _message(self, topic: str, payload: bytes, acknowledge: Callable[[], None]) -> None:
        try:
            if topic == topics.HUB_STATUS:
                if payload:
                    self._hub_status(HUB_PRESENCE.parse(jsoncodec.decode(payload)))
            else:
                if "." in self._settings.edge and topic.startswith(topics.edge_topic(self._settings.edge.replace(".", "/"), "")):
                    raise ContractError("topic", f"this broker makes slashes of the dots of {self._settings.edge!r}", "give this edge a name without dots, or use another broker", "topic")
                _, leaf = topics.parse(topic, "edge", ("receipts", "desired", "ask"))
                if leaf == "ask":
                    self._question(QUESTION.parse(jsoncodec.decode(payload)))
                elif leaf == "receipts":
                    self._receipts(RECEIPTS.parse(jsoncodec.decode(payload)))
                elif payload:
                    self._desired(payload)
        except ContractError as error:
            self._metrics.inc("uplink_rejected_messages_total", reason=error.reason)
            self.last_error = str(error)
            log.warning("a message on %s was refused: %s", topic, error)
        acknowledge()

    def _hub_status(self, status: dict[str, Any]) -> None:
        if PROTOCOL_VERSION not in status["speaks"]:
            raise ContractError("speaks", f"the hub speaks {status['speaks']}, not {PROTOCOL_VERSION}", "update this edge", "version")
        if status["state"] == "offline":
            self._hub_gone("the hub went offline")
            return
        if self.lanes.up and status["boot"] == self._hub_boot:
            return
        self._hub_here(status["hub"], status["boot"])

    def _hub_here(self, hub: str, boot: str) -> None:
        self.hub, self._hub_boot, self._status_ms = hub, boot, self._clock.mono_ms()
        was_up = self.lanes.up
        self._start_lanes()
        self._publish_presence("online", "hub")
        if not was_up:
            self._on_link(True, self.hub)

    def _start_lanes(self) -> None:
        marks = {name: self._journal.marks(name) for name in self.lanes.streams}
        self._proven.clear()
        self.window.begin()
        self.lanes.link_up({name: mark.next_seq - 1 for name, mark in marks.items()}, {name: mark.floor for name, mark in marks.items()}, self._clock.mono_ms())
        self._wake.set()

    def _hub_gone(self, reason: str) -> None:
        self._hub_boot, self._status_ms = "", self._clock.mono_ms()
        self._heard()
        if self.lanes.up:
            self.lanes.link_down()
            self._on_link(False, reason)

    def _receipts(self, message: dict[str, Any]) -> None:
        if message["edge"] != self._settings.edge:
            raise ContractError("edge", f"is for {message['edge']!r}", "publish on that edge's topic", "topic")
        if message["boot"] != self._hub_boot:
            if self._clock.mono_ms() - self._status_ms < STATUS_TRUST_MS:
                return  # from a hub that has gone, or before its presence
            log.warning("hub %s answers, its presence was missed", message["hub"])
            self._hub_here(message["hub"], message["boot"])
        self._heard()
        if not self.lanes.up:
            return  # numbers are moved (`_rebase`)
        if message["quarantine"] != self.lanes.quarantine:
            self.lanes.quarantine = message["quarantine"]
            if self.lanes.quarantine:
                log.error("the hub has put this identity in quarantine: %s", self.lanes.quarantine)
        doubtful = [mark for mark in message["marks"] if mark["stream"] not in self._proven and mark["upto"] and mark["chain"]]
        if doubtful:
            self._background(self._prove(message, doubtful))
        else:
            self._take_receipts(message)

    def _sent_again(self, send: Send) -> None:
        """The broker has acknowledged what the hub had asked for."""
        if len(self._agains) >= AGAINS_MOST:
            self._agains.clear()
        times = self._agains[send.stream, send.first] = self._agains.get((send.stream, send.first), 0) + 1
        if times >= AGAINS:
            self._doubt()

    def _all_again(self) -> None:
        """The hub is there, and has taken nothing of what was sent."""
        have = sum(lane.receipted for lane in self.lanes.streams.values())
        before, times = self._stalled
        self._stalled = have, times + 1 if have == before else 1
        if self._stalled[1] >= AGAINS:
            self._doubt()

    def _doubt(self) -> None:
        if size := self._room.doubt(self._clock.mono_ms()):
            self._agains.clear()
            self._less(size, "acknowledges packets, and it seems does not pass them on,")

    def _less(self, size: int, problem: str) -> None:
        """Batches of that size are too large for the broker; 0: they are not."""
        if size:
            log.warning("the hub's broker %s of %d bytes: batches have at most %d from now on; let it take %d (mosquitto: max_packet_size)", problem, size, self._room.found, BROKER_PACKET_BYTES)

    def _heard(self) -> None:
        """By the hub, or there is none."""
        self._unanswered, self.unheard = 0, ""

    def _not_heard(self) -> None:
        """The hub is there and says nothing of what was sent, once more: a broker that speaks MQTT 3.1.1 drops what a client may not say without a word."""
        self._unanswered += 1
        if self._unanswered < UNHEARD_AFTER:
            return
        settings = self._settings
        dots = f", and keeps the dots of {settings.edge!r} in topics (nats-server and RabbitMQ make slashes of them)" if "." in settings.edge else ""
        who = settings.endpoint.username or "who comes without a name"
        self.unheard = f"hub {self.hub} is there and answers nothing of what this edge says: see its /healthz, and that its broker lets {who} publish on {topics.edge_topic(settings.edge, '#')}{dots}"
        if self._told_unheard.worth(self.unheard, self._clock.mono_ms() / 1000):
            log.warning("%s", self.unheard)

    def _take_receipts(self, message: dict[str, Any]) -> None:
        now = self._clock.mono_ms()
        for mark in message["marks"]:
            stream = mark["stream"]
            if max(mark["top"], mark["upto"]) > self._journal.durable(stream):
                log.error("the hub holds %s up to %d, this journal ends at %d: continuing above", stream, mark["top"], self._journal.durable(stream))
                self._move_above(mark)
                return
            self._proven.add(stream)
            self.lanes.receipt(stream, mark["upto"], mark["held"], mark["want"], now)
            self._journal.receipt(stream, mark["upto"])
            if mark["want"]:
                self._metrics.inc("uplink_gap_requests_total", len(mark["want"]))
        self.lanes.credit = message["credit"]
        self._wake.set()

    async def _prove(self, message: dict[str, Any], marks: list[dict[str, Any]]) -> None:
        """Once per stream and link: is what the hub holds under our name what we wrote? A new disk may have written more than the old one had sent."""
        for mark in marks:
            stream = mark["stream"]
            if mark["upto"] < self._journal.marks(stream).floor:
                continue  # freed here, or from before this journal: there is nothing to compare with
            chain = await self._journal.chain_at(stream, mark["upto"])
            if not self.lanes.up or message["boot"] != self._hub_boot:
                return  # the link has gone meanwhile
            if chain is not None and chain.hex() != mark["chain"]:
                log.error("the hub holds another history of %s up to %d than this journal: continuing above", stream, mark["top"])
                self._move_above(mark)
                return
        self._take_receipts(message)

    def _move_above(self, mark: dict[str, Any]) -> None:
        """The hub holds records under our name that we never wrote (a replaced or restored disk): ours get numbers above them."""
        self._metrics.inc("journal_rebases_total")
        self.lanes.link_down()
        self._background(self._rebase(mark["stream"], max(mark["top"], mark["upto"])))

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._rebases.add(task)
        task.add_done_callback(self._looked)

    def _looked(self, task: "asyncio.Task[None]") -> None:
        self._rebases.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Nothing would be sent over this link any more: the next one begins with the same question.
            log.error("the journal could not be compared with what the hub holds: %s", error)
            if self._session is not None:
                self._session.abort("the journal could not be compared with what the hub holds")

    async def _rebase(self, stream: str, above: int) -> None:
        await self._journal.rebase(stream, above)
        if self._session is not None and self._session.open:
            self._start_lanes()
            self._publish_presence("online", "rebased")

    def _question(self, message: dict[str, Any]) -> None:
        if message["edge"] != self._settings.edge:
            raise ContractError("edge", f"is for {message['edge']!r}", "publish on that edge's topic", "topic")
        stamp = self._clock.stamp()
        if stamp.quality == "unsynced" or stamp.wall_ms <= message["expires_ms"]:
            self._on_question(message)

    async def answer(self, piece: dict[str, Any]) -> bool:
        """Send one piece of an answer; returns when the broker has it. False where the link is gone: nobody waits any more."""
        session = self._session
        if session is None or not session.open:
            return False
        sent = asyncio.Event()
        if not session.publish(topics.edge_topic(self._settings.edge, "answer"), jsoncodec.encode(piece).encode(), on_ack=sent.set):
            return False
        try:
            async with asyncio.timeout(ANSWER_S):
                return await sent.wait()
        except TimeoutError:
            return False

    def _desired(self, payload: bytes) -> None:
        generation = 0
        try:
            value = jsoncodec.decode(payload)
            if isinstance(value, dict) and type(value.get("generation")) is int:
                generation = value["generation"]
            desired = parse_desired(value, self._settings.edge)
        except ContractError as error:
            self._metrics.inc("uplink_rejected_messages_total", reason=error.reason)
            self._on_bad_desired(error, generation)
            return
        self._on_desired(desired)

    # -- up ------------------------------------------------------------------------------------------------------------------

    def _committed(self, stream: str, seq: int) -> None:
        self.lanes.committed(stream, seq, self._clock.mono_ms())
        if self.lanes.up:
            self._wake.set()

    async def _send_forever(self, session: MqttSession) -> None:
        while session.open:
            now = self._clock.mono_ms()
            if self.lanes.silent(now):
                self.lanes.resyncs += 1
                self._metrics.inc("uplink_resyncs_total")
                self._not_heard()
                self._all_again()
                self._start_lanes()
                self._publish_presence("online", "resync")
            if self.lanes.ask_self(now):
                self._metrics.inc("uplink_resent_tails_total")
            send = self.lanes.next(now) if self.window.room() else None
            if send is None:
                self._wake.clear()
                waiter = asyncio.ensure_future(self._wake.wait())
                await asyncio.wait((waiter, session.closed), timeout=self.lanes.wake_ms(now) / 1000, return_when=asyncio.FIRST_COMPLETED)
                waiter.cancel()
                continue
            await self._send(session, send)

    async def _send(self, session: MqttSession, send: Send) -> None:
        settings = self._settings
        limit, most = min(settings.batch_records, send.last - send.first + 1), self._room.most(self._clock.mono_ms())
        topic = topics.edge_topic(settings.edge, "up")
        bytes_most = min(settings.batch_bytes, self.window.room(), *([max(1, most - AROUND)] if most else []))
        while True:
            records, chain = await self._journal.read(send.stream, send.first, limit, bytes_most, send.last)
            if not self.lanes.up or not session.open:
                return
            marks = self._journal.marks(send.stream)
            self.lanes.released(send.stream, marks.floor)
            if not records or records[0].seq != send.first:
                if marks.floor > send.first:
                    return  # freed or dropped meanwhile; the lanes know the new floor now
                raise SessionClosed(f"stream {send.stream}: record {send.first} is not in the journal")
            last = records[-1].seq
            lane = self.lanes.streams[send.stream]
            history = last + 1 if send.lane == "history" and not send.again else lane.history_next
            payload = encode_batch(
                edge=settings.edge, boot=self._journal.boot, boot_n=self._journal.boot_n, stream=send.stream, lane=send.lane, floor=marks.floor,
                floor_chain=marks.floor_chain, dropped=marks.dropped, live=lane.live_from, history=max(1, history), next_seq=marks.next_seq,
                records=records, chain=chain,
            )
            size = topics.packet_bytes(topic, payload)
            if not most or size <= most:
                break
            if len(records) == 1:
                if size <= session.packet_max or not session.packet_max:
                    break  # what was found is a guess
                raise SessionClosed(f"record {send.first} of {send.stream} takes a packet of {size} bytes, and the hub's broker takes {session.packet_max}: let it take {BROKER_PACKET_BYTES} (mosquitto: max_packet_size)")
            limit = len(records) // 2

        sent_ms = self._clock.mono_ms()

        def acked() -> None:
            now = self._clock.mono_ms()
            self._room.acknowledged(size)
            self.window.acknowledged(size, sent_ms, now)
            if send.again:
                self._sent_again(send)
            self.lanes.acked(send.stream, sent_ms, now)
            self._wake.set()

        if session.publish(topic, payload, on_ack=acked):
            self._room.sent(size)
            self.window.sent(size)
            self.lanes.sent(send, last, sent_ms)
            self._metrics.inc("uplink_sent_records_total", len(records), lane=send.lane)
            self._metrics.inc("uplink_sent_bytes_total", len(payload))
