"""The local bus: any MQTT client that publishes JSON. Parses and hands over; decides nothing.

A QoS 1 message is acknowledged when what came of it is durable: the broker's window is then the back-pressure.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from ..clock import Clock
from ..contract import jsoncodec, topics
from ..contract.device_messages import REGISTER, RESULT, Reading, parse_telemetry
from ..contract.errors import ContractError
from ..metrics import Metrics
from ..mqtt_reconnect import run_session
from ..mqtt_session import Endpoint, MqttSession, SessionClosed

log = logging.getLogger(__name__)

RETRY_BASE_S = 0.5
RETRY_CAP_S = 10.0
"""The bus is on this host or next to it: asked again soon, without the uplink's long pauses."""

OUR_LEAVES = ("desired", "command")
DEVICE_SPEAKS = ("telemetry", "register", "reported", "result")

TOPICS_REMEMBERED = 4_096
"""Topics that were read before: those of a thousand devices, 0.7 MB at most with the longest names."""

Done = Callable[[], None]


def client_name(edge: str) -> str:
    """How an edge is called at its local broker: under this name it keeps a session there."""
    return f"novacron-bus-{edge}"


class Sink(Protocol):
    """Who takes what devices say. `done` is to be called once it is durable."""

    def readings(self, device: str, readings: list[Reading], done: Done) -> None:
        """Readings of one message, in order."""

    def registered(self, device: str, message: dict[str, Any], done: Done) -> None:
        """A device said what it is."""

    def reported(self, device: str, patch: Any, done: Done) -> None:
        """A device reported twin state."""

    def result(self, device: str, message: dict[str, Any], done: Done) -> None:
        """A device replied to a command."""

    def refused(self, device: str, error: ContractError) -> None:
        """A message of `device` (empty if unknown) was refused."""

    def batch_end(self) -> None:
        """Everything that came in one read of the socket has been handed over."""

    def batch_sent(self) -> None:
        """What `batch_end` published is on its way."""

    def bus_up(self) -> None:
        """The bus is there (again)."""


class Aside(Protocol):
    """Somebody who speaks with others over the same connection, so that what is said keeps its order with what is sent to devices."""

    topics: tuple[str, ...]
    """What to subscribe to."""
    prefix: str
    """How the topics begin that are its own."""

    def connected(self) -> None:
        """Connected; the subscription follows."""

    def message(self, topic: str, payload: bytes) -> None:
        """A message on one of its topics."""


class Bus:
    """The connection to the local broker.

    Args:
        next_pause_s: seconds to wait before the next try.
        session: makes connections.
        aside: who else speaks on this bus; None for nobody.
    """

    def __init__(
        self, endpoint: Endpoint, edge: str, sink: Sink, clock: Clock, metrics: Metrics, *, next_pause_s: Callable[[], float], keepalive_s: int = 15,
        receive_max: int = 100, session: Callable[..., MqttSession] = MqttSession, aside: Aside | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._edge = edge
        self._sink = sink
        self._clock = clock
        self._metrics = metrics
        self._next_pause_s = next_pause_s
        self._keepalive_s = keepalive_s
        self._receive_max = receive_max
        self._make_session = session
        self._aside = aside
        self._session: MqttSession | None = None
        self._topics: dict[str, tuple[str, str]] = {}
        self._subscribed = False
        self._task: asyncio.Task[None] | None = None
        self.last_error = ""
        self._wake = asyncio.Event()
        self.on_session: Callable[[bool], None] = lambda _up: None

    @property
    def up(self) -> bool:
        """Connected and subscribed."""
        return self._subscribed and self._session is not None and self._session.open

    def start(self) -> "asyncio.Task[None]":
        """Begin; call inside the running loop. The task never ends by itself."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="bus")
        return self._task

    async def stop(self) -> None:
        """Disconnect and end."""
        if self._session is not None:
            await self._session.disconnect()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        await run_session(
            self._make, self._serve, protocol=self._endpoint.protocol, next_pause_s=self._next_pause_s, on_failure=self._failed, wake=self._wake, broker="the local broker",
        )

    def _make(self, protocol5: bool) -> MqttSession:
        # Where devices are shared, nothing is kept for us: it may be another's to decide by then, and what was under way would come, and be decided, twice.
        return self._make_session(
            self._endpoint, client_name(self._edge), self._message, persistent=self._aside is None, keepalive_s=self._keepalive_s, protocol5=protocol5,
            receive_max=self._receive_max,
        )

    def _failed(self, error: SessionClosed) -> None:
        self._session = None
        self._subscribed = False
        self.last_error = error.reason
        self.on_session(False)

    async def _serve(self, session: MqttSession) -> None:
        self._session = session
        session.after_read, session.after_write = self._sink.batch_end, self._sink.batch_sent
        # Before the subscription: what it brings leads to commands of this connection, which must not be taken for ones that still wait.
        self._sink.bus_up()
        if self._aside is not None:
            self._aside.connected()
            await session.subscribe(self._aside.topics)
        await session.subscribe(topics.bus_subscriptions())
        self._subscribed = True
        self._metrics.inc("bus_connects_total")
        self.on_session(True)
        await asyncio.wait((session.closed,))

    def publish(self, device: str, leaf: str, payload: bytes, *, retain: bool = False, expiry_s: int | None = None, on_ack: Done | None = None) -> bool:
        """Publish to a device; False where the bus is not there."""
        if self._session is None:
            return False
        return self._session.publish(topics.device_topic(device, leaf), payload, retain=retain, expiry_s=expiry_s, on_ack=on_ack)

    def publish_aside(self, topic: str, payload: bytes, retain: bool) -> bool:
        """Publish for `aside`; False where the bus is not there."""
        return self._session is not None and self._session.publish(topic, payload, retain=retain)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is published inside goes out in one write."""
        if self._session is None:
            yield
        else:
            with self._session.together():
                yield

    def _message(self, topic: str, payload: bytes, done: Done) -> None:
        device = ""
        if self._aside is not None and topic.startswith(self._aside.prefix):
            self._aside.message(topic, payload)
            done()
            return
        try:
            known = self._topics.get(topic)
            if known is None:
                known = topics.parse(topic, "device", DEVICE_SPEAKS)
                if len(self._topics) < TOPICS_REMEMBERED:
                    self._topics[topic] = known
            device, leaf = known
            if leaf == "telemetry":
                self._sink.readings(device, parse_telemetry(jsoncodec.decode(payload, look=False)), done)
            elif not payload:
                done()  # a cleared retained message
            elif leaf == "register":
                self._sink.registered(device, REGISTER.parse(jsoncodec.decode(payload)), done)
            elif leaf == "reported":
                self._sink.reported(device, jsoncodec.decode(payload), done)
            else:
                self._sink.result(device, RESULT.parse(jsoncodec.decode(payload)), done)
        except ContractError as error:
            self._metrics.inc("device_rejected_messages_total", reason=error.reason)
            self._sink.refused(device, error)
            done()
