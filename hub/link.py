"""The hub's connection to the broker: subscribes, hands over, publishes; comes back by itself."""

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import Callable
from typing import Any

import aiomqtt

from edge_runtime.contract import jsoncodec, topics
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.limits import BROKER_PACKET_BYTES, PROTOCOL_VERSION
from edge_runtime.contract.presence import HUB_PRESENCE
from edge_runtime.system.reach import reach
from edge_runtime.system.reasons import Reasons

from .broker import Broker

log = logging.getLogger(__name__)

RETRY_BASE_S, RETRY_CAP_S = 0.2, 5.0
DOUBLINGS_MAX = 16
"""Far beyond the cap, and below the number of failures (1,024, within the hour) of which two to the power of it is no float any more."""

OUTBOX_MAX = 20_000
"""Messages to publish that wait; receipts that are dropped here are told again with the next batch."""

INFLIGHT = 200
"""Messages under way to the broker, where it takes as many."""

SOCKET_OPTIONS = ((socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),)
"""Nagle's algorithm would hold receipts back by 40 ms."""

EdgeMessage = Callable[[str, str, bytes, bool], None]


class _Client(aiomqtt.Client):
    """Tells of messages that the broker refuses (MQTT 5; with 3.1.1 it cannot say so)."""

    on_refused: Callable[[str], None] = staticmethod(lambda _reason: None)
    packet_max = 0
    """Bytes of a packet that the broker takes; 0 where it has not said so."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        inner: Any = self._client
        inner._create_socket_connection = lambda: reach(inner._host, inner._port, inner._connect_timeout)  # paho tries one address after the other, each for as long

    def _on_connect(self, client: Any, userdata: Any, flags: Any, reason_code: Any, properties: Any = None) -> None:
        self.packet_max = int(getattr(properties, "MaximumPacketSize", 0))
        client._max_inflight_messages = min(INFLIGHT, int(getattr(properties, "ReceiveMaximum", INFLIGHT)))  # paho does not look, and lets nobody tell it from here on; nothing is under way yet
        super()._on_connect(client, userdata, flags, reason_code, properties)

    def _on_publish(self, client: Any, userdata: Any, mid: int, reason_code: Any, properties: Any) -> None:
        if reason_code.is_failure:
            self.on_refused(str(reason_code))
        super()._on_publish(client, userdata, mid, reason_code, properties)


class HubLink:
    """One hub at one broker.

    Args:
        on_message: called with edge, leaf (`up`, `status`, `answer`), payload and whether it was retained.
        on_up: called after each subscription; returns nothing, may publish.
        shared_group: MQTT 5 shared subscription for several hubs; empty for one.
        client: makes MQTT clients; None takes aiomqtt's.
        entropy: where the pauses between tries are drawn.
    """

    def __init__(
        self, broker: Broker, hub: str, boot: str, *, on_message: EdgeMessage, on_up: Callable[[], None], on_bad: Callable[[str, ContractError], None],
        now_ms: Callable[[], int], shared_group: str = "", client: Callable[..., Any] | None = None, entropy: random.Random | None = None,
    ) -> None:
        self._broker = broker
        self._hub = hub
        self._boot = boot
        self._on_message = on_message
        self._on_up = on_up
        self._on_bad = on_bad
        self._now_ms = now_ms
        self._make_client = client or _Client
        self._entropy = entropy or random.Random()
        self._group = shared_group if broker.mqtt5 else ""
        self._outbox: asyncio.Queue[tuple[str, bytes, bool]] = asyncio.Queue(OUTBOX_MAX)
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self.up = False
        self.last_error = ""
        self.dropped = 0
        self.refusal = ""
        """Why the broker refuses what the hub says, at this connection; empty where it does not."""
        self._unsaid = ""
        """The topic on which the broker did not take what was to be said last."""
        self.rival = ""
        """The name of another hub that speaks to the same edges, heard at this connection; empty where there is none."""
        self._rival_boot = ""

    def start(self) -> "asyncio.Task[None]":
        """Begin. The task never ends by itself."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="hub link")
        return self._task

    async def stop(self) -> None:
        """Say goodbye and end."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def publish(self, edge: str, leaf: str, payload: bytes, retain: bool) -> None:
        """Queue a message to an edge."""
        try:
            self._outbox.put_nowait((topics.edge_topic(edge, leaf), payload, retain))
        except asyncio.QueueFull:
            self.dropped += 1

    def _status(self, state: str) -> bytes:
        body: dict[str, Any] = {"v": PROTOCOL_VERSION, "hub": self._hub, "boot": self._boot, "state": state, "speaks": [PROTOCOL_VERSION]}
        if state == "online":
            body["time_ms"] = self._now_ms()
        return jsoncodec.encode(body).encode()

    async def _run(self) -> None:
        failures, reasons = 0, Reasons()
        while not self._stopping:
            try:
                self.refusal = self._unsaid = self.rival = self._rival_boot = ""
                async with self._client() as client:
                    granted = await client.subscribe([(topic, 1) for topic in topics.hub_subscriptions(self._group)], timeout=10)
                    if refused := sorted({str(code) for code in granted or () if getattr(code, "is_failure", False)}):
                        raise aiomqtt.MqttError(f"it does not let the hub hear its edges ({', '.join(refused)}): give {self._broker.username or 'who comes without a name'} all rights on novacron/#")
                    await client.subscribe([(topics.HUB_STATUS, 1)], timeout=10)  # where it may not hear that, it does without
                    if reasons.told:
                        log.info("the broker is there again")
                        reasons.told = False
                    self.up, failures = True, 0
                    self._on_up()
                    await client.publish(topics.HUB_STATUS, self._status("online"), qos=1, retain=True)
                    if self._stopping:
                        # asyncio.wait_for (until Python 3.12), by which aiomqtt waits, forgets a cancellation where what it waits for ends in the same turn.
                        await client.publish(topics.HUB_STATUS, self._status("offline"), qos=1, retain=True, timeout=2)
                        return
                    sender = asyncio.get_running_loop().create_task(self._send(client))
                    try:
                        await self._receive(client)
                    finally:
                        sender.cancel()
                        await asyncio.gather(sender, return_exceptions=True)
                        if asyncio.current_task() is not None and asyncio.current_task().cancelling():  # type: ignore[union-attr]
                            await client.publish(topics.HUB_STATUS, self._status("offline"), qos=1, retain=True, timeout=2)
            except aiomqtt.MqttError as error:
                self.last_error = str(error)
            except OSError as error:
                self.last_error = str(error)
            except Exception as error:  # a fault of ours: the next connection may do without it
                self.last_error = f"{type(error).__name__}: {error}"
                log.exception("what the connection to the broker does has failed")
            self.up = False
            if self._stopping:
                return  # the goodbye failed, and its error took the cancellation's place
            failures += 1
            if reasons.worth(self.last_error, asyncio.get_running_loop().time()):
                log.warning("no connection to the broker: %s", self.last_error)
            await asyncio.sleep(self._entropy.random() * min(RETRY_CAP_S, RETRY_BASE_S * 2 ** min(failures, DOUBLINGS_MAX)))

    def _client(self) -> aiomqtt.Client:
        broker = self._broker
        client: aiomqtt.Client = self._make_client(
            *broker.inside, username=broker.username or None, password=broker.password or None, identifier=f"novacron-hub-{self._hub}-{self._boot}",  # two hubs with one would end each other's connections in turn, and neither would hear of the other
            protocol=aiomqtt.ProtocolVersion.V5 if broker.mqtt5 else aiomqtt.ProtocolVersion.V311, keepalive=15, timeout=10,
            will=aiomqtt.Will(topics.HUB_STATUS, self._status("offline"), qos=1, retain=True), socket_options=SOCKET_OPTIONS,
            max_queued_incoming_messages=5_000, max_inflight_messages=INFLIGHT, max_queued_outgoing_messages=OUTBOX_MAX,
            tls_params=aiomqtt.TLSParameters(ca_certs=broker.ca_file or None) if broker.tls else None,
        )
        if isinstance(client, _Client):
            client.on_refused = self._refused
        return client

    def _too_large(self, topic: str, size: int, most: int) -> None:
        """It would end the connection, and be said again at the next."""
        self.dropped += 1
        refusal = f"packets have at most {most} bytes there, and what is to be said on {topic} has {size}: let it take {BROKER_PACKET_BYTES} (mosquitto: max_packet_size)"
        if refusal != self.refusal:  # it is said again until the edge has it
            log.error("the broker: %s", refusal)
        self.refusal, self._unsaid = refusal, topic

    def _refused(self, reason: str) -> None:
        if not self.refusal:
            log.error("the broker refuses what the hub says (%s): edges hear nothing of it; give it all rights on novacron/#", reason)
        self.refusal = f"{reason}: give it all rights on novacron/#"

    async def _receive(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            topic = str(message.topic)
            payload = message.payload if isinstance(message.payload, bytes | bytearray) else str(message.payload or "").encode()
            if topic == topics.HUB_STATUS:
                self._heard_hub(bytes(payload), bool(message.retain))
                continue
            try:
                edge, leaf = topics.parse(topic, "edge", ("up", "status", "answer"))
            except ContractError as error:
                self._on_bad("", error)
                continue
            self._on_message(edge, leaf, bytes(payload), bool(message.retain))

    def _heard_hub(self, payload: bytes, retained: bool) -> None:
        """A hub's presence: ours, or one that should not be there. What is retained may be of one that was killed, ours before us: it lives only where it speaks."""
        try:
            said = HUB_PRESENCE.parse(jsoncodec.decode(payload))
        except ContractError:
            return
        if said["boot"] == self._boot or (retained and said["state"] == "online"):
            return
        if said["state"] == "online":
            if said["boot"] != self._rival_boot:
                log.error("another hub (%s) speaks to the edges of this broker: they send everything again each time, and obey whichever was last; stop one of the two, or give it a broker of its own", said["hub"])
                self.rival, self._rival_boot = said["hub"], said["boot"]
                self._say_status()  # it is to hear of us too
            return
        if said["boot"] == self._rival_boot:
            self.rival = self._rival_boot = ""
        self._say_status()  # the edges have just heard that there is no hub

    def _say_status(self) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._outbox.put_nowait((topics.HUB_STATUS, self._status("online"), True))

    async def _send(self, client: aiomqtt.Client) -> None:
        while True:
            topic, payload, retain = await self._outbox.get()
            most = getattr(client, "packet_max", 0)
            if most and (size := topics.packet_bytes(topic, payload)) > most:
                self._too_large(topic, size, most)
                continue
            if topic == self._unsaid:
                self.refusal = self._unsaid = ""
            # paho holds the message until it is acknowledged; awaiting each acknowledgement would cost a round trip per message.
            try:
                client._client.publish(topic, payload, qos=1, retain=retain)
            except ValueError as error:  # one message that cannot be sent is not the end of the others
                self.dropped += 1
                log.error("a message on %s cannot be sent: %s", topic, error)
