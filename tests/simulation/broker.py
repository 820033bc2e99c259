"""A broker: QoS 1 both ways, retained messages, persistent sessions, Last Will, take-over by a second client of the same name.

Beyond MQTT it may, for a client whose path is given to it, lose, double or overtake a message that it has acknowledged: brokers with full
queues, bridges and failovers do, and the contract promises to survive it. Retained messages sent at a subscription never are: they are the
first on a fresh connection.
"""

import random
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.mqtt_session import Will

from .loop import SimLoop
from .network import Connection, Path

QUEUE_MAX = 10_000
"""Messages kept for one absent client; past it the newest is dropped, as brokers do."""

OVERTAKE_S = 1.5
"""How late a message may come that others overtake; the hub's grace is two seconds."""

Tap = Callable[[str, str, bytes], None]


@dataclass(slots=True, eq=False)
class Message:
    """One message on its way to one client."""

    topic: str
    payload: bytes
    retained: bool = False
    again: bool = False
    expires_s: float | None = None


class ServerSession:
    """What the broker knows of one client."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.connection: Connection | None = None
        self.client: Any = None
        self.will: Will | None = None
        self.persistent = False
        self.filters: list[str] = []
        self.window = 100
        self.unacknowledged: OrderedDict[int, Message] = OrderedDict()
        self.queue: list[Message] = []
        self.next_id = 1


class LocalClient:
    """A client beside the broker (a device): no connection to lose; the broker calls `message(topic, payload)`."""

    def __init__(self, filters: list[str], message: Callable[[str, bytes], None]) -> None:
        self.filters = filters
        self.message = message


@dataclass(eq=False)
class SimBroker:
    """One broker.

    Attributes:
        where: whose broker it is, in words.
        accepts_per_s: connections it can accept each second; others wait.
        refuses: client names that it lets not in (no certificate).
        slams: accepts and closes at once.
        happened: effects of faults, counted (see coverage.py).
    """

    name: str
    loop: SimLoop
    draw: random.Random
    where: str = "a local broker"
    accepts_per_s: float = 200.0
    up: bool = True
    slams: bool = False
    refuses: set[str] = field(default_factory=set)
    sessions: dict[str, ServerSession] = field(default_factory=dict)
    retained: dict[str, bytes] = field(default_factory=dict)
    local: list[LocalClient] = field(default_factory=list)
    on_publish: Tap = lambda _client, _topic, _payload: None
    on_acknowledged: Callable[[str, Message], None] = lambda _client, _message: None
    on_deliver: Callable[[str, Message], None] = lambda _client, _message: None
    happened: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    _accept_free_s: float = 0.0
    _routes: dict[str, list[ServerSession]] = field(default_factory=dict)

    # -- life ----------------------------------------------------------------------------------------------------------------

    def stop(self, keep: bool = False) -> None:
        """The broker ends; sessions and retained messages are lost unless it keeps them."""
        self.up = False
        for session in self.sessions.values():
            if session.connection is not None:
                connection, session.connection = session.connection, None
                connection.close_by_server("the broker went away")
        if not keep:
            self.happened[f"sessions lost at {self.where}"] += len(self.sessions)
            self.sessions.clear()
            self.retained.clear()
        self._routes.clear()

    def start(self) -> None:
        """It listens again."""
        self.up = True
        self._accept_free_s = self.loop.time()

    # -- connections ---------------------------------------------------------------------------------------------------------

    def accept(self, client: Any, connection: Connection) -> None:
        """A CONNECT has arrived: answered in turn."""
        now = self.loop.time()
        self._accept_free_s = max(self._accept_free_s, now) + 1.0 / self.accepts_per_s
        self.loop.call_at(self._accept_free_s, self._accept, client, connection, context=self.loop.outside)

    def _accept(self, client: Any, connection: Connection) -> None:
        if not connection.server_open:
            return
        if not self.up or self.slams:
            connection.close_by_server("the broker closed the connection at once")
            return
        if client.client_id in self.refuses:
            connection.down.send(client.refused, "not authorised")
            connection.close_by_server("not authorised")
            return
        session = self.sessions.get(client.client_id)
        if session is not None and session.connection is not None:
            old, old_client, session.connection = session.connection, session.client, None
            old.down.send(old_client.taken_over)
            old.close_by_server("taken over")
            self._last_will(session)
        if session is None or not client.persistent:
            session = self.sessions[client.client_id] = ServerSession(client.client_id)
            self._routes.clear()
        session.connection, session.client, session.will, session.persistent = connection, client, client.will, client.persistent
        session.window = client.receive_max
        connection.down.send(client.accepted_by)
        waiting = list(session.unacknowledged.values()) + session.queue
        for message in session.unacknowledged.values():
            message.again = True
        session.unacknowledged.clear()
        session.queue = waiting
        self._drain(session)

    def closed(self, client: Any, connection: Connection, graceful: bool) -> None:
        """The connection has ended at this side."""
        session = self.sessions.get(client.client_id)
        if session is None or session.connection is not connection:
            return
        session.connection = None
        if not graceful:
            self._last_will(session)
        if not session.persistent:
            self.sessions.pop(session.name, None)
            self._routes.clear()

    def _last_will(self, session: ServerSession) -> None:
        will, session.will = session.will, None
        if will is not None:
            self.publish(session.name, will.topic, will.payload, will.retain)

    def subscribe(self, client: Any, connection: Connection, filters: list[str]) -> None:
        """A SUBSCRIBE has arrived; retained messages follow its acknowledgement."""
        session = self.sessions.get(client.client_id)
        if session is None or session.connection is not connection:
            return
        session.filters = sorted(set(session.filters) | set(filters))
        self._routes.clear()
        connection.down.send(client.subscribed)
        for topic in sorted(self.retained):
            if any(matches(pattern, topic) for pattern in filters):
                self._hand(session, Message(topic, self.retained[topic], retained=True))

    # -- messages ------------------------------------------------------------------------------------------------------------

    def published(self, client: Any, connection: Connection, identifier: int, topic: str, payload: bytes, retain: bool, expiry_s: int | None) -> None:
        """A PUBLISH (QoS 1) has arrived."""
        if not connection.server_open:
            return
        connection.down.send(client.publish_acknowledged, identifier)
        self.publish(client.client_id, topic, payload, retain, expiry_s, connection.path)

    def publish(self, client: str, topic: str, payload: bytes, retain: bool = False, expiry_s: int | None = None, path: Path | None = None) -> None:
        """Keep and forward one message; `client` published it."""
        if not self.up:
            return
        self.on_publish(client, topic, payload)
        if retain:
            if payload:
                self.retained[topic] = payload
            else:
                self.retained.pop(topic, None)
        routes = self._routes.get(topic)
        if routes is None:
            routes = self._routes[topic] = [self.sessions[name] for name in sorted(self.sessions) if any(matches(pattern, topic) for pattern in self.sessions[name].filters)]
        expires_s = self.loop.time() + expiry_s if expiry_s is not None else None
        for session in routes:
            self._forward(session, topic, payload, expires_s, path)
        for beside in self.local:
            if any(matches(pattern, topic) for pattern in beside.filters):
                self.loop.call_later(0.001, beside.message, topic, payload, context=self.loop.outside)

    def _forward(self, session: ServerSession, topic: str, payload: bytes, expires_s: float | None, path: Path | None) -> None:
        ways = [way for way in (path, session.connection.path if session.connection is not None else None) if way is not None]
        for way in ways:
            if way.loss and self.draw.random() < way.loss:
                self.dropped += 1
                self.happened["messages lost"] += 1
                return
        copies = 1 + sum(bool(way.duplicate) and self.draw.random() < way.duplicate for way in ways)
        self.happened["messages doubled"] += copies - 1
        for _ in range(copies):
            late = max((self.draw.random() * OVERTAKE_S for way in ways if way.reorder and self.draw.random() < way.reorder), default=0.0)
            message = Message(topic, payload, expires_s=expires_s)
            if late:
                self.happened["messages overtaken"] += 1
                self.loop.call_later(late, self._hand_late, session, message, context=self.loop.outside)
            else:
                self._hand(session, message)

    def _hand_late(self, session: ServerSession, message: Message) -> None:
        if self.sessions.get(session.name) is session:
            self._hand(session, message)

    def _hand(self, session: ServerSession, message: Message) -> None:
        if session.connection is None and not session.persistent:
            return
        if len(session.queue) >= QUEUE_MAX:
            self.dropped += 1
            return
        session.queue.append(message)
        self._drain(session)

    def _drain(self, session: ServerSession) -> None:
        connection = session.connection
        if connection is None:
            return
        while session.queue and len(session.unacknowledged) < session.window:
            message = session.queue.pop(0)
            if message.expires_s is not None and message.expires_s < self.loop.time():
                continue
            identifier = session.next_id
            session.next_id += 1
            session.unacknowledged[identifier] = message
            connection.down.send(self._arrive, session.name, session.client, identifier, message)

    def _arrive(self, name: str, client: Any, identifier: int, message: Message) -> None:
        self.on_deliver(name, message)
        client.arrived(identifier, message)

    def acknowledged(self, client: Any, connection: Connection, identifier: int) -> None:
        """A PUBACK of the client has arrived."""
        session = self.sessions.get(client.client_id)
        if session is None or session.connection is not connection:
            return
        session.unacknowledged.pop(identifier, None)
        self._drain(session)


def matches(pattern: str, topic: str) -> bool:
    """MQTT topic filter with `+`, or the topic itself."""
    if "+" not in pattern:
        return pattern == topic
    wanted, given = pattern.split("/"), topic.split("/")
    return len(wanted) == len(given) and all(want in ("+", word) for want, word in zip(wanted, given, strict=True))
