"""One MQTT connection: every byte however it arrives, every message however many, goodbye and death told apart, TLS, slow readers."""

import asyncio
import contextlib
import random
import shutil
import socket
import ssl
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from paho.mqtt import properties as paho_properties
from paho.mqtt.packettypes import PacketTypes

from edge_runtime.lean_imports import import_paho
from edge_runtime.mqtt_reconnect import run_session
from edge_runtime.mqtt_session import READ_PACKETS, Endpoint, MqttSession, SessionClosed, Will
from hub.broker.choose import ExternalBroker
from hub.link import _Client

from .edges import MOSQUITTO, LocalBroker
from .silent import Name, silent
from .waiting import until


def endpoint(port: int, **more: Any) -> Endpoint:
    return Endpoint("127.0.0.1", port, **more)


class Inbox:
    """Takes messages and acknowledges them at once, or keeps the acknowledgements."""

    def __init__(self, acknowledge: bool = True) -> None:
        self.messages: list[tuple[str, bytes]] = []
        self.acks: list[Callable[[], None]] = []
        self._acknowledge = acknowledge

    def __call__(self, topic: str, payload: bytes, done: Callable[[], None]) -> None:
        self.messages.append((topic, payload))
        if self._acknowledge:
            done()
        else:
            self.acks.append(done)


@pytest.mark.parametrize("protocol5", [False, True], ids=["3.1.1", "5"])
async def test_bursts_larger_than_a_turn_and_messages_larger_than_a_read_arrive_in_order(broker: LocalBroker, protocol5: bool) -> None:
    inbox, acked = Inbox(), []
    receiver = MqttSession(endpoint(broker.port), "receiver", inbox, protocol5=protocol5)
    sender = MqttSession(endpoint(broker.port), "sender", Inbox(), protocol5=protocol5)
    await receiver.connect()
    await sender.connect()
    await receiver.subscribe(["t/#"])
    turns = []
    receiver.after_read = lambda: turns.append(len(inbox.messages))
    sizes = [10] * (3 * READ_PACKETS) + [150_000, 10, 70_000] + [500] * 100
    for number, size in enumerate(sizes):
        assert sender.publish("t/x", b"%06d" % number + b"x" * size, on_ack=lambda number=number: acked.append(number), expiry_s=60)  # type: ignore[misc]
    await until(lambda: len(inbox.messages) == len(sizes) and len(acked) == len(sizes), what="every message and every acknowledgement")
    assert [int(payload[:6]) for _, payload in inbox.messages] == list(range(len(sizes))) and [len(payload) - 6 for _, payload in inbox.messages] == sizes
    assert acked == list(range(len(sizes)))
    assert max(after - before for before, after in zip([0, *turns], turns, strict=False)) <= READ_PACKETS  # no turn takes more than it may
    await receiver.disconnect()
    await sender.disconnect()


async def test_a_broker_behind_addresses_that_lead_nowhere_is_reached_by_edge_and_hub(broker: LocalBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site whose IPv6 ends at its router, a broker with two such addresses: paho's own tries each for as long as a connection may take, and never comes to the third."""
    with silent("127.0.0.2", broker.port), silent("127.0.0.3", broker.port):
        Name(monkeypatch, "hub.example", ["127.0.0.2", "127.0.0.3", "127.0.0.1"])
        monkeypatch.delattr(socket, "create_connection")  # one after the other: the hub's client, which waits for it without a limit, would come to the third after all
        inbox = Inbox()
        session = MqttSession(Endpoint("hub.example", broker.port), "edge", inbox)
        await session.connect()
        await session.subscribe(["t/#"])
        probed = ExternalBroker(f"mqtt://hub.example:{broker.port}")
        await probed.start()
        assert probed.mqtt5
        async with _Client(*probed.inside, protocol=aiomqtt.ProtocolVersion.V5, identifier="hub", timeout=10) as client:
            await client.publish("t/x", b"reached", qos=1)
            await until(lambda: inbox.messages == [("t/x", b"reached")], what="the hub's message")
        await session.disconnect()


async def test_goodbye_has_no_last_will_and_death_has_one(broker: LocalBroker) -> None:
    inbox = Inbox()
    watcher = MqttSession(endpoint(broker.port), "watcher", inbox)
    await watcher.connect()
    await watcher.subscribe(["will/#"])
    for name, polite in (("a", True), ("b", False)):
        session = MqttSession(endpoint(broker.port), name, Inbox(), will=Will(f"will/{name}", b"gone", retain=False))
        await session.connect()
        session.publish(f"will/{name}", b"last words")
        if polite:
            await session.disconnect()
        else:
            await until(lambda: inbox.messages[-1:] == [("will/b", b"last words")], what="the last words")
            session.abort("pulled")
    await until(lambda: ("will/b", b"gone") in inbox.messages, what="the Last Will of b")
    assert ("will/a", b"last words") in inbox.messages and ("will/a", b"gone") not in inbox.messages
    await watcher.disconnect()


class RawBroker:
    """Bytes by hand, for what no real broker does on purpose: CONNACK to anyone, then whatever `script` writes."""

    def __init__(self, script: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any], connack: bytes = b"\x20\x02\x00\x00") -> None:
        self._script = script
        self._connack = connack
        self.port = 0
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> "RawBroker":
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readexactly(2)
            await reader.readexactly(head[1])
            writer.write(self._connack)
            try:
                await self._script(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()

        self._server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()


def publish_packet(number: int, size: int) -> bytes:
    """A PUBLISH of MQTT 3.1.1 at QoS 1, written out by the standard (3.3)."""
    body = struct.pack("!H", 1) + b"t" + struct.pack("!H", number) + b"p" * size
    length, left = b"", len(body)
    while True:
        left, digit = left // 128, left % 128
        length += bytes((digit | (0x80 if left else 0),))
        if not left:
            return b"\x32" + length + body


async def test_a_name_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr("edge_runtime.mqtt_session.CONNECT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_words, **_more: answers.wait(60) and [])  # a real one that says nothing needs a network of its own
    session = MqttSession(Endpoint("hub.example", 1883), "edge", Inbox())
    try:
        with pytest.raises(SessionClosed, match="cannot connect to hub.example:1883: nothing within 0.1 s; see that a name server answers"):
            await session.connect()
    finally:
        answers.set()


async def test_a_taken_over_session_says_so() -> None:
    # By hand: mosquitto 2.0.11 closes the connection without the reason code that MQTT 5 has for it.
    async def script(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"\xe0\x01\x8e")
        await writer.drain()

    async with RawBroker(script, b"\x20\x03\x00\x00\x00") as raw:
        session = MqttSession(endpoint(raw.port), "same", Inbox())
        try:
            await session.connect()
        except SessionClosed:
            pass  # both packets came at once
        assert (await asyncio.wait_for(session.closed, 10)).taken_over


@pytest.mark.parametrize("seed", range(4))
async def test_packets_cut_anywhere_are_put_together(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice((0, 1, 120, 130, 20_000)) for _ in range(40)]
    stream = b"".join(publish_packet(number + 1, size) for number, size in enumerate(sizes))

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        at = 0
        while at < len(stream):
            step = draw.choice((1, 1, 2, 3, 7, 4096, 65_536))
            writer.write(stream[at : at + step])
            at += step
            await writer.drain()
            await asyncio.sleep(0)  # lets the receiver read in between: both run on this loop
        for _ in sizes:
            acks.append(await reader.readexactly(4))

    acks: list[bytes] = []
    inbox = Inbox()
    async with RawBroker(script) as raw:
        session = MqttSession(endpoint(raw.port), "cut", inbox, protocol5=False)
        await session.connect()
        await until(lambda: len(acks) == len(sizes), what="every PUBACK")
        session.abort("done")
    assert [len(payload) for _, payload in inbox.messages] == sizes
    assert [struct.unpack("!H", ack[2:])[0] for ack in acks] == list(range(1, len(sizes) + 1))


async def test_a_broker_that_does_not_read_holds_nothing_up_and_loses_nothing() -> None:
    go, received = asyncio.Event(), bytearray()

    async def script(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await go.wait()
        while data := await reader.read(65_536):
            received.extend(data)

    async with RawBroker(script) as raw:
        session = MqttSession(endpoint(raw.port), "full", Inbox(), protocol5=False)
        await session.connect()
        payloads = [bytes((number,)) * 100_000 for number in range(100)]  # 10 MB: more than the socket's buffers take
        for payload in payloads:
            assert session.publish("t", payload)
        assert session._client.unsent and session.open
        go.set()
        await until(lambda: len(received) >= sum(map(len, payloads)) and not session._client.unsent, what="all bytes at the other side")
        for payload in payloads:
            assert payload in received
        session.abort("done")


async def test_no_more_is_under_way_than_a_broker_takes() -> None:
    """By hand: mosquitto acknowledges each message before it reads the next, so that it never sees too many."""
    most, count, seen, under_way, highest = 10, 300, [], 0, 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal under_way, highest
        while len(seen) < count:
            with contextlib.suppress(TimeoutError):  # all that comes without an acknowledgement
                while True:
                    head = await asyncio.wait_for(reader.readexactly(2), 0.05)
                    packet = await reader.readexactly(head[1])
                    assert head[0] == 0x32
                    seen.append((packet[3:5], packet[6:]))
                    under_way += 1
                    highest = max(highest, under_way)
            for mid, _ in seen[-under_way:]:
                writer.write(b"\x40\x02" + mid)
            under_way = 0
            await writer.drain()
        await reader.read()

    async with RawBroker(script, b"\x20\x06\x00\x00\x03\x21\x00" + bytes((most,))) as raw:
        session = MqttSession(endpoint(raw.port), "many", Inbox(), protocol5=True)
        await session.connect()
        acknowledged: list[int] = []
        for number in range(count):
            assert session.publish("t", b"%d" % number, on_ack=lambda number=number: acknowledged.append(number))
        await until(lambda: len(acknowledged) == count, what="all are acknowledged")
        assert [payload for _, payload in seen] == [b"%d" % number for number in range(count)] and acknowledged == list(range(count))
        assert highest == most
        await session.disconnect()


async def test_garbage_from_a_broker_ends_the_session_and_nothing_else() -> None:
    draw = random.Random(7)
    for _ in range(30):
        noise = bytes(draw.randrange(256) for _ in range(draw.randrange(1, 300)))

        async def script(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter, noise: bytes = noise) -> None:
            writer.write(noise)
            await writer.drain()

        async with RawBroker(script) as raw:
            session = MqttSession(endpoint(raw.port), "noise", Inbox(), protocol5=False)
            try:
                await session.connect()
            except SessionClosed:
                pass  # the noise came with the CONNACK
            assert (await asyncio.wait_for(session.closed, 10)).reason


async def test_tls_bursts_arrive_whole_and_a_stranger_is_not_trusted(tmp_path: Path) -> None:
    if not MOSQUITTO or shutil.which("openssl") is None:
        pytest.skip("mosquitto or openssl is not installed")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True,
    )
    broker = LocalBroker(tmp_path / "broker", extra=f"certfile {cert}\nkeyfile {key}\n")
    broker.start()
    try:
        inbox = Inbox()
        receiver = MqttSession(endpoint(broker.port, tls=True, ca_file=str(cert)), "receiver", inbox)
        sender = MqttSession(endpoint(broker.port, tls=True, ca_file=str(cert)), "sender", Inbox())
        await receiver.connect()
        await sender.connect()
        await receiver.subscribe(["t"])
        sizes = [40_000, 10] * 10 + [300] * 400
        for size in sizes:
            assert sender.publish("t", b"x" * size)
        await until(lambda: [len(payload) for _, payload in inbox.messages] == sizes, what="every message over TLS")
        await receiver.disconnect()
        await sender.disconnect()
        stranger = MqttSession(endpoint(broker.port, tls=True), "stranger", Inbox())
        with pytest.raises(Exception, match="certificate"):
            await stranger.connect()
        assert ssl.OPENSSL_VERSION_INFO >= (1, 1, 1)
    finally:
        broker.stop()


def test_the_shared_property_tables_are_those_of_paho() -> None:
    import_paho()
    from paho.mqtt import _packet

    assert _packet.Properties is not paho_properties.Properties  # what the agent uses
    made, original = _packet.Properties(PacketTypes.PUBLISH), paho_properties.Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    for one in (made, original):
        one.MessageExpiryInterval, one.UserProperty, one.ResponseTopic = 7, ("a", "b"), "r/t"
    packed = original.pack()  # type: ignore[no-untyped-call]
    assert made.pack() == packed and made.json() == original.json()  # type: ignore[no-untyped-call]
    read = _packet.Properties(PacketTypes.PUBLISH)
    assert read.unpack(packed)[1] == len(packed) and read.json() == original.json()  # type: ignore[no-untyped-call]
    assert _packet.Properties(PacketTypes.PUBLISH).unpack(b"\0rest") is not None and _packet.Properties(PacketTypes.PUBLISH).isEmpty()
    with pytest.raises(Exception, match="does not apply"):
        made.SessionExpiryInterval = 3


async def test_an_end_in_the_middle_of_a_subscription_is_an_end() -> None:
    """`asyncio.wait_for` forgets a cancellation where what it waits for has just ended; a session that ends with its task must not start over."""
    asked, made = asyncio.Event(), []

    async def script(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(2)  # SUBSCRIBE, which is never answered
        asked.set()
        await reader.read()

    def make(_protocol5: bool) -> MqttSession:
        made.append(MqttSession(endpoint(raw.port), "ends", Inbox(), protocol5=False))
        return made[-1]

    async with RawBroker(script) as raw:
        task = asyncio.create_task(run_session(
            make, lambda session: session.subscribe(["t"]), protocol="3.1.1", next_pause_s=lambda: 0.01, on_failure=lambda _error: None, wake=asyncio.Event(), broker="it",
        ))
        await asyncio.wait_for(asked.wait(), 10)
        await made[0].disconnect()
        task.cancel()
        done, _ = await asyncio.wait((task,), timeout=5)
        task.cancel()
        assert done and task.cancelled() and len(made) == 1
