"""Clients of the simulated broker: one with the face of the edge's `MqttSession`, one with that of the hub's `aiomqtt.Client`."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import aiomqtt

from edge_runtime.mqtt_session import CONNECT_TIMEOUT_S, RECEIVE_BUFFER_LIMIT, Endpoint, SessionClosed, Will

from .broker import Message, SimBroker
from .loop import LIFE, SimLoop
from .network import Connection, Path

REFUSED_S = 0.01
"""A connection to a port where nobody listens fails so soon, on top of the path's delay."""

INCOMING_MAX = 5_000
"""What the hub's client holds before it drops, as `max_queued_incoming_messages` of the real one."""


class SimSession:
    """See `edge_runtime.mqtt_session.MqttSession`.

    Args:
        on_attempt: told of every try and of its end (`try`, `up`, `down`), for the oracle.
    """

    def __init__(
        self, broker: SimBroker, path: Path, endpoint: Endpoint, client_id: str, on_message: Callable[[str, bytes, Callable[[], None]], None], *,
        will: Will | None = None, persistent: bool = False, keepalive_s: int = 15, protocol5: bool = True, receive_max: int = RECEIVE_BUFFER_LIMIT,
        on_attempt: Callable[[str], None] = lambda _: None, on_acknowledged: Callable[[Message], None] | None = None,
    ) -> None:
        life = LIFE.get()
        assert life is not None
        self._life = life
        self._broker = broker
        self._path = path
        self._loop: SimLoop = path.loop
        self.client_id = client_id
        self._on_message = on_message
        self.will = will
        self.persistent = persistent
        self.receive_max = receive_max
        self._keepalive_s = keepalive_s
        self._on_attempt = on_attempt
        self._on_acknowledged = on_acknowledged
        self.connack_timeout_s = CONNECT_TIMEOUT_S
        self.closed: asyncio.Future[SessionClosed] = self._loop.create_future()
        self._connected: asyncio.Future[None] = self._loop.create_future()
        self._subscribed: deque[asyncio.Future[None]] = deque()
        self._acks: dict[int, Callable[[], None]] = {}
        self._next = 1
        self._connection: Connection | None = None
        self._graceful = False
        self._refused = False
        self.after_read: Callable[[], None] | None = None
        self.after_write: Callable[[], None] | None = None
        self.reached = False
        self.accepted = False
        self.packet_max = 0
        self.on_too_large: Callable[[], None] | None = None
        self.current_retained = False
        """Whether the message that is being handed over was retained."""

    # -- the face ------------------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """See `MqttSession`."""
        self._on_attempt("try")
        path, broker = self._path, self._broker
        if path.up_blocked or path.down_blocked:
            await asyncio.sleep(CONNECT_TIMEOUT_S)
            self._end(SessionClosed("cannot connect: timed out"))
            raise self.closed.result()
        await asyncio.sleep(path.delay() + REFUSED_S)
        if not broker.up:
            self._end(SessionClosed("cannot connect: connection refused"))
            raise self.closed.result()
        self.reached = True
        self._connection = connection = Connection(path, self._life, self._keepalive_s, self._lost, self._gone_at_broker)
        connection.down.batch_end = self._read_end
        connection.up.send(broker.accept, self, connection)
        try:
            await asyncio.wait_for(asyncio.shield(self._connected), self.connack_timeout_s)
        except TimeoutError:
            self._end(SessionClosed("the broker did not answer CONNECT"))
        except asyncio.CancelledError:
            self._end(SessionClosed("cancelled"))
            raise
        except SessionClosed:
            pass
        if self.closed.done():
            raise self.closed.result()

    async def disconnect(self) -> None:
        """See `MqttSession`."""
        if self._connection is not None and not self.closed.done():
            self._connection.up.send(self._said_goodbye)
            self._end(SessionClosed("closed by us"))

    def abort(self, reason: str, too_large: bool = False) -> None:
        """See `MqttSession`."""
        self._end(SessionClosed(reason, too_large=too_large))

    @property
    def open(self) -> bool:
        """See `MqttSession`."""
        return self._connected.done() and not self.closed.done()

    async def subscribe(self, topics: Iterable[str], qos: int = 1) -> None:
        """See `MqttSession`."""
        if self._connection is None or self.closed.done():
            raise SessionClosed("not connected")
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._subscribed.append(waiter)
        self._connection.up.send(self._broker.subscribe, self, self._connection, list(topics))
        try:
            await asyncio.wait_for(waiter, CONNECT_TIMEOUT_S)
        except TimeoutError:
            self._end(SessionClosed("the broker did not answer SUBSCRIBE"))
            raise self.closed.result() from None

    def publish(self, topic: str, payload: bytes, *, qos: int = 1, retain: bool = False, expiry_s: int | None = None, on_ack: Callable[[], None] | None = None) -> bool:
        """See `MqttSession`."""
        connection = self._connection
        if connection is None or self.closed.done() or not self._life.alive:
            return False
        identifier = self._next
        self._next += 1
        if on_ack is not None:
            self._acks[identifier] = on_ack
        connection.up.send(self._broker.published, self, connection, identifier, topic, payload, retain, expiry_s)
        return True

    # -- what the broker's words do here -------------------------------------------------------------------------------------

    def accepted_by(self) -> None:
        """CONNACK."""
        if not self._connected.done():
            self.accepted = True
            self._on_attempt("up")
            self._connected.set_result(None)

    def refused(self, reason: str) -> None:
        """CONNACK that refuses."""
        self._end(SessionClosed(f"refused: {reason}", refused=True))

    def taken_over(self) -> None:
        """DISCONNECT: another client has our name."""
        self._end(SessionClosed("disconnected: session taken over", taken_over=True))

    def subscribed(self) -> None:
        """SUBACK."""
        if self._subscribed:
            waiter = self._subscribed.popleft()
            if not waiter.done():
                waiter.set_result(None)

    def publish_acknowledged(self, identifier: int) -> None:
        """PUBACK."""
        if self.closed.done():
            return
        callback = self._acks.pop(identifier, None)
        if callback is not None:
            callback()

    def arrived(self, identifier: int, message: Message) -> None:
        """PUBLISH."""
        if self.closed.done():
            return
        connection = self._connection

        def acknowledge() -> None:
            if connection is None or self._connection is not connection or self.closed.done() or not self._life.alive:
                return
            if self._on_acknowledged is not None:
                self._on_acknowledged(message)
            connection.up.send(self._broker.acknowledged, self, connection, identifier)

        self.current_retained = message.retained
        self._on_message(message.topic, message.payload, acknowledge)

    def _read_end(self) -> None:
        if self.after_read is not None and not self.closed.done():
            self.after_read()
        if self.after_write is not None and not self.closed.done():
            self.after_write()

    def _said_goodbye(self) -> None:
        self._graceful = True

    # -- the end -------------------------------------------------------------------------------------------------------------

    def _lost(self, reason: str) -> None:
        self._end(SessionClosed(reason))

    def _gone_at_broker(self, _reason: str) -> None:
        if self._connection is not None:
            self._broker.closed(self, self._connection, self._graceful)

    def _end(self, error: SessionClosed) -> None:
        if self.closed.done() or not self._life.alive:
            return
        self.closed.set_result(error)
        self._on_attempt("down")
        if self._connection is not None:
            self._connection.close_by_client(error.reason)
        if not self._connected.done():
            self._connected.set_exception(error)
            self._connected.exception()
        for waiter in self._subscribed:
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()
        self._acks.clear()


class SimClient:
    """The part of `aiomqtt.Client` that the hub's link uses."""

    def __init__(self, broker: SimBroker, path: Path, hostname: str, port: int, *, identifier: str, will: Any, keepalive: int, **_: Any) -> None:
        self._messages: asyncio.Queue[aiomqtt.Message | None] = asyncio.Queue(INCOMING_MAX)
        self._session = SimSession(
            broker, path, Endpoint(hostname, port), identifier, self._message, will=Will(will.topic, will.payload, will.retain), keepalive_s=keepalive,
            receive_max=1_000,
        )
        self._client = _WithoutWaiting(self._session)

    def _message(self, topic: str, payload: bytes, acknowledge: Callable[[], None]) -> None:
        acknowledge()
        try:
            self._messages.put_nowait(aiomqtt.Message(topic, payload, 1, self._session.current_retained, 0, None))
        except asyncio.QueueFull:
            pass  # as the real one: dropped, the edge sends it again

    async def __aenter__(self) -> "SimClient":
        try:
            await self._session.connect()
        except SessionClosed as error:
            raise aiomqtt.MqttError(error.reason) from None
        self._session.closed.add_done_callback(lambda _: self._wake())
        return self

    def _wake(self) -> None:
        if not self._messages.full():
            self._messages.put_nowait(None)

    async def __aexit__(self, *_: object) -> None:
        await self._session.disconnect()

    async def subscribe(self, topics: list[tuple[str, int]], timeout: float) -> None:
        """See aiomqtt."""
        try:
            await self._session.subscribe([topic for topic, _ in topics])
        except SessionClosed as error:
            raise aiomqtt.MqttError(error.reason) from None

    async def publish(self, topic: str, payload: bytes, qos: int = 1, retain: bool = False, timeout: float = 10) -> None:
        """See aiomqtt."""
        acknowledged = asyncio.Event()
        if not self._session.publish(topic, payload, retain=retain, on_ack=acknowledged.set):
            raise aiomqtt.MqttError("not connected")
        try:
            await asyncio.wait_for(acknowledged.wait(), timeout)
        except TimeoutError:
            raise aiomqtt.MqttError("timed out") from None

    @property
    def messages(self) -> AsyncIterator[aiomqtt.Message]:
        """Messages until the connection ends; then `MqttError`."""
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[aiomqtt.Message]:
        while True:
            message = await self._messages.get()
            if message is None:
                raise aiomqtt.MqttError(self._session.closed.result().reason)
            yield message


class _WithoutWaiting:
    """The paho client below aiomqtt's: publishes without waiting."""

    def __init__(self, session: SimSession) -> None:
        self._session = session

    def publish(self, topic: str, payload: bytes, qos: int = 1, retain: bool = False) -> None:
        self._session.publish(topic, payload, retain=retain)
