"""A TCP link between an MQTT client and its broker that reads along: every PUBLISH, and every PUBACK with the message that it acknowledges."""

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any

CONNECT, PUBLISH, PUBACK = 1, 3, 4
CHUNK_BYTES = 65_536
"""Bytes read at once."""
PACKET_BYTES_MAX = 1 << 22
"""A packet longer than this is not one of ours: the stream was misread."""

Seen = Callable[[str, bytes], None]


def length_at(data: bytes | bytearray, start: int) -> tuple[int, int] | None:
    """MQTT's variable length at `start`: value and the offset behind it; None where it is not all there. Raises ValueError."""
    value = 0
    for number in range(4):
        if start + number >= len(data):
            return None
        value |= (data[start + number] & 0x7F) << (7 * number)
        if not data[start + number] & 0x80:
            return value, start + number + 1
    raise ValueError("not a length of MQTT")


class Packets:
    """Cuts one direction of a connection into packets."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """First byte and body of every packet that is complete now. Raises ValueError where it is not MQTT."""
        self._data += data
        found: list[tuple[int, bytes]] = []
        while len(self._data) >= 2:
            length = length_at(self._data, 1)
            if length is None:
                break
            size, start = length
            if size > PACKET_BYTES_MAX:
                raise ValueError(f"a packet of {size} bytes")
            if len(self._data) < start + size:
                break
            found.append((self._data[0], bytes(self._data[start : start + size])))
            del self._data[: start + size]
        return found


def parse_publish(first: int, body: bytes, version: int) -> tuple[str, int, bytes]:
    """Topic, packet id (0 for QoS 0) and payload of a PUBLISH."""
    (size,) = struct.unpack_from(">H", body)
    topic, start, packet = body[2 : 2 + size].decode(), 2 + size, 0
    if first & 0x06:
        (packet,) = struct.unpack_from(">H", body, start)
        start += 2
    if version == 5:
        properties = length_at(body, start)
        if properties is None:
            raise ValueError("a PUBLISH without its properties")
        start = properties[1] + properties[0]
    return topic, packet, body[start:]


class Wiretap:
    """Listens on `port` and forwards to `target_port`, both on loopback.

    Args:
        up: the client published (topic, payload).
        acked: the client acknowledged a message (topic, payload).
        down: the broker delivered (topic, payload).

    All of them are called before the bytes go on.
    """

    def __init__(self, target_port: int, up: Seen, acked: Seen, down: Seen) -> None:
        self._target_port = target_port
        self._up, self._acked, self._down = up, acked, down
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self.port = 0
        self.error: BaseException | None = None

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """End; raises what went wrong in reading along."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.error is not None:
            raise self.error

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            writer.transport.abort()
            return
        for one in (writer, far_writer):
            one.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = _Connection(self._up, self._acked, self._down)
        pumps = [asyncio.create_task(self._pump(reader, far_writer, connection.from_client)), asyncio.create_task(self._pump(far_reader, writer, connection.from_broker))]
        self._tasks.update(pumps)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
            self._tasks.discard(pump)
        for one in (writer, far_writer):
            one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, look: Callable[[bytes], None]) -> None:
        try:
            while data := await reader.read(CHUNK_BYTES):
                try:
                    look(data)
                except Exception as error:
                    self.error = self.error or error
                writer.write(data)
                await writer.drain()
        except OSError:
            return  # one side is gone


class _Connection:
    """What must be remembered of one connection to understand it."""

    def __init__(self, up: Seen, acked: Seen, down: Seen) -> None:
        self._up, self._acked, self._down = up, acked, down
        self._version = 4
        self._client, self._broker = Packets(), Packets()
        self._waiting: dict[int, tuple[str, bytes]] = {}

    def from_client(self, data: bytes) -> None:
        for first, body in self._client.feed(data):
            if first >> 4 == CONNECT:
                (size,) = struct.unpack_from(">H", body)
                self._version = body[2 + size]
            elif first >> 4 == PUBLISH:
                topic, _, payload = parse_publish(first, body, self._version)
                self._up(topic, payload)
            elif first >> 4 == PUBACK:
                (packet,) = struct.unpack_from(">H", body)
                if packet in self._waiting:
                    self._acked(*self._waiting.pop(packet))

    def from_broker(self, data: bytes) -> None:
        for first, body in self._broker.feed(data):
            if first >> 4 == PUBLISH:
                topic, packet, payload = parse_publish(first, body, self._version)
                if packet:
                    self._waiting[packet] = (topic, payload)
                self._down(topic, payload)
