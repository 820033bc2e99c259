"""A load generator that costs little: MQTT 3.1.1 packets by hand on one socket, one thread, for rates that a client library cannot make.

Only what a benchmark needs of the protocol (OASIS MQTT 3.1.1, sections 3.1 to 3.9): CONNECT, SUBSCRIBE, PUBLISH and PUBACK at QoS 1.
"""

import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

RECEIVE_BYTES = 1 << 18
ANSWER_TIMEOUT_S = 10.0
DRAIN_S = 5.0


def _length(value: int) -> bytes:
    """MQTT's variable byte integer."""
    out = bytearray()
    while True:
        value, byte = value >> 7, value & 0x7F
        out.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(out)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("!H", len(raw)) + raw


@dataclass(slots=True)
class Rate:
    """One round: replies per second, what was sent, what never came back, what came twice."""

    per_second: float
    sent: int
    lost: int
    twice: int


class RawLoad:
    """Publishes numbered messages on `send_topic`, takes the replies on `receive_topic`; one connection for both."""

    def __init__(self, port: int, send_topic: str, receive_topic: str, make: Callable[[int], bytes], read: Callable[[bytes], int | None]) -> None:
        self._topic = _text(send_topic)
        self._make = make
        self._read = read
        self._socket = socket.create_connection(("127.0.0.1", port), ANSWER_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()
        self._out = bytearray()
        self._open: set[int] = set()
        self._next = 0
        self.twice = 0
        body = _text("MQTT") + bytes((4, 2)) + struct.pack("!H", 0) + _text(f"load-{id(self):x}")
        self._socket.sendall(b"\x10" + _length(len(body)) + body)
        self._expect(0x20)
        body = struct.pack("!H", 1) + _text(receive_topic) + b"\x01"
        self._socket.sendall(b"\x82" + _length(len(body)) + body)
        self._expect(0x90)
        self._socket.setblocking(False)

    def _expect(self, kind: int) -> None:
        while True:
            for head, _ in self._packets():
                if head & 0xF0 == kind:
                    return
            self._fill()

    def _fill(self) -> None:
        data = self._socket.recv(RECEIVE_BYTES)
        if not data:
            raise ConnectionError("the broker closed the connection")
        self._buffer += data

    def _packets(self) -> list[tuple[int, bytes]]:
        """Whole packets received so far: first byte and body."""
        found, at, buffer = [], 0, self._buffer
        while len(buffer) - at >= 2:
            length, shift, start = 0, 0, at + 1
            while start < len(buffer):
                byte = buffer[start]
                length |= (byte & 0x7F) << shift
                start, shift = start + 1, shift + 7
                if not byte & 0x80:
                    break
            else:
                break
            if len(buffer) - start < length:
                break
            found.append((buffer[at], bytes(buffer[start : start + length])))
            at = start + length
        del buffer[:at]
        return found

    def _send(self, count: int) -> None:
        for _ in range(count):
            payload, number = self._make(self._next), self._next
            self._open.add(number)
            self._next += 1
            self._out += b"\x32" + _length(len(self._topic) + 2 + len(payload)) + self._topic + struct.pack("!H", number % 65535 + 1) + payload

    def _turn(self, wait_s: float) -> int:
        """Write what waits, read what came; how many replies."""
        readable, writable, _ = select.select([self._socket], [self._socket] if self._out else [], [], wait_s)
        if writable:
            del self._out[: self._socket.send(self._out)]
        if not readable:
            return 0
        self._fill()
        replies = 0
        for head, body in self._packets():
            if head & 0xF0 != 0x30:
                continue
            start = 2 + struct.unpack_from("!H", body)[0]
            if head & 0x06:
                self._out += b"\x40\x02" + body[start : start + 2]
                start += 2
            number = self._read(body[start:])
            if number is None:
                continue
            if number in self._open:
                self._open.discard(number)
                replies += 1
            else:
                self.twice += 1
        return replies

    def warm_up(self, seconds: float = 30) -> None:
        """Until the first reply: the other side listens."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._send(1)
            again = time.monotonic() + 0.2
            while time.monotonic() < again:
                if self._turn(0.05):
                    self._drain()
                    self._open.clear()
                    self.twice = 0
                    return
        raise TimeoutError("no reply came")

    def _drain(self) -> None:
        end = time.monotonic() + DRAIN_S
        while (self._open or self._out) and time.monotonic() < end:
            self._turn(0.05)

    def closed_loop(self, seconds: float, window: int) -> Rate:
        """At most `window` messages without a reply for `seconds`."""
        first, self.twice, replies = self._next, 0, 0
        started = time.perf_counter()
        self._send(window)
        while time.perf_counter() - started < seconds:
            came = self._turn(0.2)
            replies += came
            self._send(came)
        rate = replies / (time.perf_counter() - started)
        self._drain()
        lost = len(self._open)
        self._open.clear()
        return Rate(rate, self._next - first, lost, self.twice)

    def close(self) -> None:
        """DISCONNECT."""
        self._socket.setblocking(True)
        self._socket.sendall(b"\xe0\x00")
        self._socket.close()
