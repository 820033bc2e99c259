"""One MQTT connection, driven by the asyncio loop: paho does the protocol, the loop does the waiting.

Each connection is a new paho client: paho's own resend queue lives in memory and would compete with the journal, which is the only
place that remembers. Reconnecting is the caller's business (`mqtt_reconnect`), so that back-off has jitter, which paho's has not.

Nagle's algorithm against delayed acknowledgement costs 15 to 45 ms a message between 20 and 500 messages per second: TCP_NODELAY is set
on our side, and TCP_QUICKACK after each read, so that a broker that lacks `set_tcp_nodelay` is not held up by us either.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contract.errors import ContractError
from .contract.lean_dataclass import dataclass, field
from .contract.topics import packet_bytes
from .lean_imports import import_paho, packet_properties
from .mqtt_client import traffic_client
from .system.reasons import Reasons

if TYPE_CHECKING:
    from .config.schema import BusConfig, UplinkConfig

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
"""TCP, TLS and CONNACK together: a broker that needs longer is as good as down."""

MISC_INTERVAL_S = 1.0
"""How often keep-alive is looked at; paho's resolution is one second."""

READ_PACKETS = 200
"""Packets read per turn of the loop: bounds how long one busy socket keeps the loop from anything else (about 10 ms)."""

SESSION_EXPIRY_S = 3600
"""How long an MQTT 5 broker keeps a persistent session: a device's QoS 1 messages outlive a restart of the agent, not a decommissioned one."""

PASSWORD_MAX_BYTES = 65_535
"""MQTT has no longer password (OASIS MQTT 5.0, 1.5.6)."""

RECEIVE_BUFFER_LIMIT = 100
"""Unacknowledged messages a broker may have under way to us (MQTT 5 receive maximum)."""

SESSION_TAKEN_OVER = 142
"""MQTT 5 reason code: another client connected with our name."""

PACKET_TOO_LARGE = 149
"""MQTT 5 reason code: the broker takes no packet of that size."""

PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a broker is and how to be let in. `protocol` is `auto`, `5` or `3.1.1`. What stands in files is read anew at each connection."""

    host: str
    port: int
    tls: bool = False
    username: str = ""
    password: str = field(default="", repr=False)
    password_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    protocol: str = "auto"

    @staticmethod
    def configured(part: "UplinkConfig | BusConfig") -> "Endpoint":
        """As a section of the configuration says; raises `ContractError` naming `url`."""
        return Endpoint.parse(
            part.url, username=part.username, password=part.password, password_file=part.password_file, ca_file=part.ca_file, cert_file=part.cert_file,
            key_file=part.key_file, protocol=part.protocol,
        )

    @staticmethod
    def parse(
        url: str, *, username: str = "", password: str = "", password_file: str = "", ca_file: str = "", cert_file: str = "", key_file: str = "", protocol: str = "auto",
    ) -> "Endpoint":
        """From `mqtt://[user:password@]host[:port]` or `mqtts://...`; raises `ContractError` naming `url`."""
        from urllib.parse import unquote, urlsplit  # an edge alone has no address to read

        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ContractError("url", f"{url[:120]!r} ({error})", "use mqtt://host:port or mqtts://host:port", "url") from None
        if parts.scheme not in PORTS or not parts.hostname:
            raise ContractError("url", f"{url[:120]!r} is not a broker's address", "use mqtt://host:port or mqtts://host:port", "url")
        return Endpoint(
            parts.hostname, port or PORTS[parts.scheme], parts.scheme == "mqtts", username or unquote(parts.username or ""),
            password or unquote(parts.password or ""), password_file, ca_file, cert_file, key_file, protocol,
        )

    def check_files(self) -> None:
        """Raises `SessionClosed` naming a file that cannot be read."""
        for name, path in (("password_file", self.password_file), ("ca_file", self.ca_file), ("cert_file", self.cert_file), ("key_file", self.key_file)):
            try:
                if path:
                    Path(path).open("rb").close()
            except OSError as error:
                raise SessionClosed(f"{name} {path}: {error.strerror}") from None

    def secret(self) -> str:
        """The password, from its file where there is one. Raises `SessionClosed`."""
        if not self.password_file:
            return self.password
        try:
            with Path(self.password_file).open("rb") as file:
                said = file.read(PASSWORD_MAX_BYTES + 1).decode().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SessionClosed(f"password_file {self.password_file}: {getattr(error, 'strerror', None) or 'is not text'}") from None
        if not said or len(said.encode()) > PASSWORD_MAX_BYTES:
            raise SessionClosed(f"password_file {self.password_file}: {'is too long for a password' if said else 'is empty'}")
        return said


@dataclass(frozen=True, slots=True)
class Will:
    """What the broker publishes when the link dies without a word."""

    topic: str
    payload: bytes
    retain: bool = True


class SessionClosed(Exception):
    """The connection could not be made or is gone; `taken_over` when another client has our name, `too_large` when a packet of ours was."""

    def __init__(self, reason: str, taken_over: bool = False, refused: bool = False, too_large: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.taken_over = taken_over
        self.refused = refused
        self.too_large = too_large


Message = Callable[[str, bytes, Callable[[], None]], None]
"""Called with topic, payload and the acknowledgement to call once the message's consequences are durable."""


class MqttSession:
    """One connection. `connect`, then `subscribe` and `publish`; `closed` resolves to a `SessionClosed` when it ends.

    Args:
        endpoint: the broker.
        client_id: unique at the broker.
        on_message: see `Message`; runs on the loop.
        will: published by the broker if we vanish.
        persistent: keep the session at the broker across connections.
        keepalive_s: seconds between signs of life.
        protocol5: speak MQTT 5, else 3.1.1.
    """

    def __init__(
        self, endpoint: Endpoint, client_id: str, on_message: Message, *, will: Will | None = None, persistent: bool = False,
        keepalive_s: int = 15, protocol5: bool = True, receive_max: int = RECEIVE_BUFFER_LIMIT,
    ) -> None:
        self.connack_timeout_s = CONNECT_TIMEOUT_S
        self.endpoint = endpoint
        self.client_id = client_id
        self.protocol5 = protocol5
        self._on_message = on_message
        self._will = will
        self._persistent = persistent
        self._keepalive_s = keepalive_s
        self._receive_max = receive_max
        self._client: Any = None  # a `TrafficClient`
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[SessionClosed] = self._loop.create_future()
        self._connected: asyncio.Future[None] = self._loop.create_future()
        self._acks: dict[int, Callable[[], None] | None] = {}
        self._subscribed: dict[int, asyncio.Future[None]] = {}
        self._misc: asyncio.TimerHandle | None = None
        self._socket: Any = None  # a socket or an SSLSocket
        self._descriptor = -1  # paho may close the socket before we deregister it
        self._writing = False
        self._flush_soon = False
        self._corked = False
        self.after_read: Callable[[], None] | None = None
        """Called after each read of the socket, when every message in it has been handed over; what it publishes goes out in one write."""
        self.after_write: Callable[[], None] | None = None
        """Called after that write: for what nobody waits for."""
        self.reached = False
        """A TCP connection was made."""
        self.accepted = False
        """The broker accepted CONNECT."""
        self.packet_max = 0
        """Bytes of a packet that the broker takes; 0 where it has not said so, as none does with MQTT 3.1.1."""
        self._too_large = Reasons()
        self.on_too_large: Callable[[], None] | None = None
        """Called where the broker refuses a message for its size (MQTT 5)."""

    # -- life ----------------------------------------------------------------------------------------------------------------

    async def connect(self) -> None:
        """Connect and wait for the broker's word. Raises `SessionClosed`."""
        paho = import_paho()
        from paho.mqtt.enums import CallbackAPIVersion

        protocol = paho.MQTTv5 if self.protocol5 else paho.MQTTv311
        client = traffic_client()(
            CallbackAPIVersion.VERSION2, client_id=self.client_id, protocol=protocol, manual_ack=True, reconnect_on_failure=False,
            clean_session=None if self.protocol5 else not self._persistent,
        )
        self._client = client
        client.connect_timeout = CONNECT_TIMEOUT_S
        try:
            self._let_in(client)
        except SessionClosed as error:
            self._end(error)
            raise
        if self._will is not None:
            client.will_set(self._will.topic, self._will.payload, qos=1, retain=self._will.retain)
        client.on_connect = self._connected_callback
        client.on_disconnect = self._disconnected_callback
        client.on_message = self._message_callback
        client.on_taken = self._taken
        client.on_acknowledged = self._acknowledged
        client.on_refused = self._refused
        client.on_subscribe = self._subscribed_callback
        client.on_socket_register_write = self._want_write_callback
        arguments: dict[str, Any] = {}
        if self.protocol5:
            arguments = {"clean_start": not self._persistent, "properties": self._connect_properties()}
        try:
            await asyncio.wait_for(
                self._loop.run_in_executor(None, lambda: client.connect(self.endpoint.host, self.endpoint.port, self._keepalive_s, **arguments)),
                CONNECT_TIMEOUT_S * 2,
            )
        except (OSError, ValueError, TimeoutError) as error:
            # paho's own limit is half of it and begins once there is an address: without a word only looking one up takes so long.
            why = str(error) or f"nothing within {CONNECT_TIMEOUT_S * 2:g} s; see that a name server answers"
            self._end(SessionClosed(f"cannot connect to {self.endpoint.host}:{self.endpoint.port}: {why}"))
            raise self.closed.result() from None
        except asyncio.CancelledError:
            self._end(SessionClosed("cancelled"))
            raise
        sock: Any = client.socket()
        if sock is None:
            self._end(SessionClosed("the broker closed the connection at once"))
            raise self.closed.result()
        self._socket, self._descriptor = sock, sock.fileno()
        if self._descriptor < 0:
            self._end(SessionClosed("the broker closed the connection at once"))
            raise self.closed.result()
        self.reached = True
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._loop.add_reader(self._descriptor, self._readable)
        self._flush()
        self._misc = self._loop.call_later(MISC_INTERVAL_S, self._tick)
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

    def _let_in(self, client: Any) -> None:
        """Give paho what the broker asks for. Raises `SessionClosed` where a file cannot be used: it may be one that is just being replaced."""
        endpoint = self.endpoint
        if endpoint.username:
            client.username_pw_set(endpoint.username, endpoint.secret())
        if not endpoint.tls:
            return
        endpoint.check_files()  # ssl does not say which of them it could not read
        try:
            client.tls_set(endpoint.ca_file or None, endpoint.cert_file or None, endpoint.key_file or None)
        except (OSError, ValueError) as error:
            files = ", ".join(path for path in (endpoint.ca_file, endpoint.cert_file, endpoint.key_file) if path)
            raise SessionClosed(f"certificates or key cannot be used ({files}): {getattr(error, 'reason', None) or error}") from None

    def _connect_properties(self) -> Any:
        from paho.mqtt.packettypes import PacketTypes

        properties = packet_properties()(PacketTypes.CONNECT)
        properties.ReceiveMaximum = self._receive_max
        if self._persistent:
            properties.SessionExpiryInterval = SESSION_EXPIRY_S
        return properties

    async def disconnect(self) -> None:
        """Say goodbye (no Last Will) and close."""
        if self._client is not None and not self.closed.done():
            self._client.at_once = True
            self._client.disconnect()
            self._flush()
            self._end(SessionClosed("closed by us"))

    def abort(self, reason: str, too_large: bool = False) -> None:
        """Close without a word: the broker publishes the Last Will."""
        self._end(SessionClosed(reason, too_large=too_large))

    @property
    def open(self) -> bool:
        """Connected and not closed."""
        return self._connected.done() and not self.closed.done()

    def _end(self, error: SessionClosed) -> None:
        if self.closed.done():
            return
        self.closed.set_result(error)
        if self._misc is not None:
            self._misc.cancel()
        if self._socket is not None:
            try:
                self._loop.remove_reader(self._descriptor)
                self._loop.remove_writer(self._descriptor)
            except (OSError, ValueError):
                pass  # the descriptor is gone already
            try:
                self._socket.close()
            except OSError:
                pass
            self._socket = None
        if not self._connected.done():
            self._connected.set_exception(error)
            self._connected.exception()
        for waiter in self._subscribed.values():
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()
        self._acks.clear()
        if self._client is not None:
            self._client.ended = True
            self._client = None

    # -- the loop's side -----------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        client, sock = self._client, self._socket
        if client is None or sock is None:
            return
        self._corked = True
        try:
            fine = client.take(READ_PACKETS)
            if self.closed.done():
                return
            if not fine:
                self._end(SessionClosed("the connection was lost"))
                return
            if self.after_read is not None:
                self.after_read()
                if self.closed.done():
                    return
        finally:
            self._corked = False
        self._flush()
        try:
            # After the write: a command does not wait for it, and the write has carried the acknowledgement already where there was one.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        except OSError:
            pass  # not Linux, or the socket has just gone; it is a hint
        if self.after_write is not None and not self.closed.done():
            self.after_write()
        if self._client is client and (client.has_more or (self.endpoint.tls and sock.pending())):
            self._loop.call_soon(self._readable)  # read already, so the socket will not call

    def _writable(self) -> None:
        self._flush()

    def _want_write_callback(self, _client: Any, _userdata: Any, _sock: Any) -> None:
        # May run on the connecting thread; `connect` flushes by itself once it has the socket.
        if self._socket is not None and not self._flush_soon and not self._corked:
            self._flush_soon = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_soon = False
        client, sock = self._client, self._socket
        if client is None or sock is None or self._corked:
            return
        if client.want_write():
            client.loop_write()
            if self.closed.done() or self._socket is None:
                return
        if not client.push():
            self._end(SessionClosed("the connection was lost"))
            return
        wants = client.unsent
        if wants and not self._writing:
            self._loop.add_writer(self._descriptor, self._writable)
        elif not wants and self._writing:
            self._loop.remove_writer(self._descriptor)
        self._writing = wants

    def _tick(self) -> None:
        client = self._client
        if client is None:
            return
        if client.loop_misc() != 0 and not self.closed.done():
            self._end(SessionClosed("no sign of life from the broker"))
            return
        self._flush()
        self._misc = self._loop.call_later(MISC_INTERVAL_S, self._tick)

    # -- paho's callbacks ----------------------------------------------------------------------------------------------------

    def _connected_callback(self, client: Any, _userdata: Any, _flags: Any, reason_code: Any, properties: Any) -> None:
        if reason_code.is_failure:
            self._end(SessionClosed(f"refused: {reason_code}", refused=True))
        elif not self._connected.done():
            self.accepted = True
            self.packet_max = int(getattr(properties, "MaximumPacketSize", 0))
            client.quota = int(getattr(properties, "ReceiveMaximum", client.quota))
            self._connected.set_result(None)

    def _disconnected_callback(self, _client: Any, _userdata: Any, _flags: Any, reason_code: Any, _properties: Any) -> None:
        code = getattr(reason_code, "value", 0)
        self._end(SessionClosed(f"disconnected: {reason_code}", taken_over=code == SESSION_TAKEN_OVER, too_large=code == PACKET_TOO_LARGE))

    def _taken(self, topic: bytes, payload: bytes, mid: int) -> None:
        client = self._client

        def acknowledge() -> None:
            # A new connection has a new client: an acknowledgement that comes late for the old one is void.
            if self._client is client and client is not None:
                client.acknowledge(mid)
                if not self._corked and not self._flush_soon:
                    self._flush_soon = True
                    self._loop.call_soon(self._flush)

        self._hand_over(topic, payload, acknowledge if mid else _nothing)

    def _message_callback(self, client: Any, _userdata: Any, message: Any) -> None:
        """A message that paho has read: QoS 2, or with properties."""
        mid, qos = message.mid, message.qos
        if qos == 1:
            self._taken(message._topic, message.payload, mid)
            return

        def acknowledge() -> None:
            if self._client is client and client is not None:
                client.ack(mid, qos)

        self._hand_over(message._topic, message.payload, acknowledge if qos else _nothing)

    def _hand_over(self, raw_topic: bytes, payload: bytes, acknowledge: Callable[[], None]) -> None:
        try:
            topic = raw_topic.decode()
        except UnicodeDecodeError:
            log.warning("a message whose topic is not UTF-8 was dropped")
            acknowledge()
            return
        try:
            self._on_message(topic, payload, acknowledge)
        except Exception:
            log.exception("handling a message on %s failed", topic)
            acknowledge()

    def _refused(self, code: int) -> None:
        if code == PACKET_TOO_LARGE and self.on_too_large is not None:
            self.on_too_large()

    def _acknowledged(self, mid: int) -> None:
        callback = self._acks.pop(mid, None)
        if callback is not None:
            callback()

    def _subscribed_callback(self, _client: Any, _userdata: Any, mid: int, reason_codes: Any, _properties: Any) -> None:
        waiter = self._subscribed.pop(mid, None)
        if waiter is None or waiter.done():
            return
        refused = [str(code) for code in reason_codes if code.is_failure]
        if refused:
            waiter.set_exception(SessionClosed(f"subscription refused: {', '.join(refused)}", refused=True))
        else:
            waiter.set_result(None)

    # -- use -----------------------------------------------------------------------------------------------------------------

    async def subscribe(self, topics: Sequence[str], qos: int = 1) -> None:
        """Subscribe and wait for the broker's word. Raises `SessionClosed`."""
        if self._client is None:
            raise SessionClosed("not connected")
        code, mid = self._client.subscribe([(topic, qos) for topic in topics])
        if code != 0 or mid is None:
            raise SessionClosed(f"subscribe failed ({code})")
        waiter = self._subscribed[mid] = self._loop.create_future()
        self._flush()
        try:
            await asyncio.wait_for(waiter, CONNECT_TIMEOUT_S)
        except TimeoutError:
            self._end(SessionClosed("the broker did not answer SUBSCRIBE"))
            raise self.closed.result() from None

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, expiry_s: int | None = None, on_ack: Callable[[], None] | None = None) -> bool:
        """Hand one message to the socket at QoS 1; `on_ack` runs when the broker has acknowledged it.

        Args:
            topic: without wildcards.
            expiry_s: MQTT 5 message expiry (3.3.2.3.3); a 3.1.1 broker does not get it, the payload's own expiry holds.

        Returns:
            False where the connection is gone, or would be for a packet that the broker does not take: nothing was sent and `on_ack` will not run.
        """
        client = self._client
        if client is None:
            return False
        if self.packet_max and packet_bytes(topic, payload) > self.packet_max:
            if self._too_large.worth(topic, self._loop.time()):
                log.warning("a message of %d bytes on %s was not sent: %s:%d takes packets of at most %d (mosquitto: max_packet_size)", len(payload), topic, self.endpoint.host, self.endpoint.port, self.packet_max)
            return False
        properties = b""
        if self.protocol5:
            properties = b"\0" if expiry_s is None else b"\x05\x02" + min(max(1, expiry_s), 0xFFFFFFFF).to_bytes(4, "big")
        mid = client.send(topic.encode(), payload, retain, properties, self._acks)
        if mid == 0:
            return False
        self._acks[mid] = on_ack
        # Sent at once and not at the end of this turn of the loop: what stands in the turn's queue would hold a command up.
        self._flush()
        return True

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is published inside goes to the socket in one write: a kill leaves all of it or none."""
        if self._corked:
            yield  # the turn of the loop writes at its end
            return
        self._corked = True
        try:
            yield
        finally:
            self._corked = False
            self._flush()


def _nothing() -> None:
    """A QoS 0 message needs no acknowledgement."""
