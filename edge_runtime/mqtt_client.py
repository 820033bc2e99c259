"""paho's client, with the traffic taken past it: PUBLISH and PUBACK are read and written here, everything else by paho.

A message costs an edge one PUBLISH in, one PUBACK out, one PUBLISH out and one PUBACK in. paho reads a packet in three or four calls, copies it through
seven objects, keeps what it sends in a queue of its own (the journal is ours) and writes each packet by itself: a third of the agent's time. So what a turn
of the loop reads and writes is one system call each way, and these two packets are cut out of the bytes by their lengths (OASIS MQTT 5.0 and 3.1.1,
sections 2.1, 3.3 and 3.4). CONNECT, subscriptions, keep-alive, QoS 2, packets with properties and all that is wrong stay paho's.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from .contract.limits import MAX_MESSAGE_BYTES
from .lean_imports import import_paho
from .system.reach import reach
from .system.reasons import Reasons

log = logging.getLogger(__name__)

READ_BYTES = 65_536
"""Read from the socket at once: about 200 messages, the most that one turn takes on anyway."""

PACKET_MAX = MAX_MESSAGE_BYTES + 2 * 65_536
"""Bytes of a packet that are kept; a topic takes 65,537 of them at most, so that a payload that was cut is still over `MAX_MESSAGE_BYTES` and refused as
too large by whoever reads it. The protocol allows 256 MiB, which a device has not."""

QUOTA_MOST = 65_535
"""Messages that may be under way: packet identifiers have two bytes, and 0 is none. What a broker that says nothing takes."""

_PUBLISH, _PUBACK = 0x30, 0x40

_made: list[Any] = []


def traffic_client() -> Any:
    """The class; made at the first connection, because paho is not imported before."""
    if not _made:
        _made.append(_make(import_paho()))
    return _made[0]


def _length(buffer: bytes, at: int) -> tuple[int, int]:
    """A variable byte integer at `at` and where it ends: (-1, 0) where it is not all there, (-1, -1) where it is none."""
    value = shift = 0
    for index in range(at, at + 4):
        if index >= len(buffer):
            return -1, 0
        value |= (buffer[index] & 0x7F) << shift
        if buffer[index] < 0x80:
            return value, index + 1
        shift += 7
    return -1, -1


def _packed_length(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _make(paho: Any) -> Any:
    class TrafficClient(paho.Client):  # type: ignore[misc]
        """See the module. `take` reads once and hands over; `send`, `acknowledge` gather, `push` writes."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._five = 1 if self._protocol == paho.MQTTv5 else 0
            self._left = b""
            self._skip = 0
            self._gathered = bytearray()
            self._refusals = Reasons()
            self._under_way = 0
            self._waiting: deque[bytes] = deque()
            self.quota = QUOTA_MOST
            """Messages that the broker takes before it has acknowledged one (Receive Maximum, MQTT 5, 3.2.2.3.3); more wait here. It ends the connection of who sends more."""
            self.has_more = False
            """A whole packet was read that has not been taken yet."""
            self.ended = False
            """Set it, and no packet is taken any more."""
            self.at_once = False
            """Write through: set before DISCONNECT, after which paho closes the socket by itself."""
            self.on_taken: Callable[[bytes, bytes, int], None] = lambda _topic, _payload, _mid: None
            """A message: topic, payload, and the packet identifier to acknowledge, 0 for QoS 0."""
            self.on_acknowledged: Callable[[int], None] = lambda _mid: None
            """The broker has acknowledged what was sent with this packet identifier."""
            self.on_refused: Callable[[int], None] = lambda _code: None
            """Before that, where it refuses it: by the reason code of MQTT 5."""

        def _create_socket_connection(self) -> Any:
            return reach(self._host, self._port, self._connect_timeout)

        # -- in --------------------------------------------------------------------------------------------------------------

        def take(self, most: int) -> bool:
            """Read the socket once and take up to `most` packets; False where the connection is lost or what came is not MQTT."""
            buffer = self._left
            if not self.has_more:  # else there is enough to do, and what is read ahead has a limit
                try:
                    data = self._sock_recv(READ_BYTES)
                except BlockingIOError:
                    return True
                except OSError:
                    return False
                if not data:
                    return False
                self._last_bytes_received = self._last_msg_in = time.monotonic()  # the name in paho 2.2 and the one before
                if self._skip:
                    skipped = min(self._skip, len(data))
                    self._skip -= skipped
                    data = data[skipped:]
                buffer = buffer + data if buffer else data
            at, end, five = 0, len(buffer), self._five
            self.has_more = False
            self._left = b""
            while end - at >= 2:
                if most <= 0:
                    self.has_more = True
                    break
                command, length, start = buffer[at], buffer[at + 1], at + 2
                if length > 0x7F:
                    length, start = _length(buffer, at + 1)
                    if length < 0:
                        if start < 0:
                            return False
                        break
                stop = start + length
                if stop > end:
                    if length <= PACKET_MAX:
                        break
                    if command & 0xF0 != _PUBLISH:
                        return False
                    if end - start < PACKET_MAX:
                        break
                    self._skip = stop - end  # the connection is at this packet's payload for so many bytes more
                    stop = end
                most -= 1
                if not self._one(command, buffer, start, min(stop, start + PACKET_MAX), five):
                    return False
                at = stop
                if self.ended or self._sock is None:
                    return True
            if at < end:
                self._left = buffer[at:] if at else buffer
            return True

        def _one(self, command: int, buffer: bytes, start: int, stop: int, five: int) -> bool:
            kind = command & 0xF0
            if kind == _PUBLISH and command & 0x04 == 0:  # QoS 0 or 1
                name = start + 2
                body = name + (buffer[start] << 8 | buffer[start + 1]) if stop >= name else stop
                topic_end, mid = body, 0
                if command & 0x02:
                    body += 2
                # No properties, or paho reads them; no topic, or paho knows what that means.
                if topic_end > name and body + five <= stop and (not five or buffer[body] == 0):
                    if command & 0x02:
                        mid = buffer[topic_end] << 8 | buffer[topic_end + 1]
                    self.on_taken(buffer[name:topic_end], buffer[body + five : stop], mid)
                    return True
            elif kind == _PUBACK:
                if stop - start != 2 and (not five or stop - start < 2):
                    return False
                if stop - start > 2 and buffer[start + 2] >= 0x80:
                    if self._refusals.worth(str(buffer[start + 2]), time.monotonic()):
                        log.warning("the broker refused a message (MQTT 5 reason code %d; 135: this client may not say that there; 149: it is too large)", buffer[start + 2])
                    self.on_refused(buffer[start + 2])
                if self._waiting:
                    self._gathered += self._waiting.popleft()
                elif self._under_way:
                    self._under_way -= 1
                self.on_acknowledged(buffer[start] << 8 | buffer[start + 1])
                return True
            return self._by_paho(command, buffer[start:stop])

        def _by_paho(self, command: int, body: bytes) -> bool:
            """Give one whole packet to paho as its own reading would leave it."""
            self._in_packet = {
                "command": command, "have_remaining": 1, "remaining_count": [], "remaining_mult": 1, "remaining_length": len(body), "packet": bytearray(body),
                "to_process": 0, "pos": 0,
            }
            try:
                return bool(self._packet_handle() <= 0)
            except Exception as error:  # paho's own for what is malformed, and whatever else foreign bytes can lead to
                log.warning("a packet of the broker cannot be read: %s", error)
                return False

        # -- out -------------------------------------------------------------------------------------------------------------

        def send(self, topic: bytes, payload: bytes, retain: bool, properties: bytes, taken: Any) -> int:
            """Gather a PUBLISH at QoS 1; its packet identifier, 0 where there is no connection or none is free.

            Args:
                properties: packed, with their length; empty for MQTT 3.1.1.
                taken: the packet identifiers that are under way.
            """
            if self._sock is None or len(taken) >= QUOTA_MOST:
                return 0
            mid: int = self._mid_generate()
            while mid in taken:
                mid = self._mid_generate()
            length = 4 + len(topic) + len(properties) + len(payload)
            packet = b"".join((
                b"\x33" if retain else b"\x32", _packed_length(length), len(topic).to_bytes(2, "big"), topic, mid.to_bytes(2, "big"), properties, payload,
            ))
            if self._under_way < self.quota:
                self._under_way += 1
                self._gathered += packet
            else:
                self._waiting.append(packet)
            return mid

        def acknowledge(self, mid: int) -> None:
            """Gather the PUBACK of a message that was taken."""
            self._gathered += b"\x40\x02" + mid.to_bytes(2, "big")

        @property
        def unsent(self) -> bool:
            """Bytes wait for the socket."""
            return bool(self._gathered) or self.want_write()

        def _sock_send(self, buf: bytes | bytearray) -> int:
            self._gathered += buf  # paho's own packets keep their place among ours
            if self.at_once:
                self.push()
            return len(buf)

        def push(self) -> bool:
            """Write what has gathered, as far as the socket takes it; False where the connection is lost."""
            if self._gathered:
                try:
                    del self._gathered[: super()._sock_send(self._gathered)]
                except BlockingIOError:
                    return True  # the socket is full: the loop says when it is not
                except OSError:
                    return False
                self._last_msg_out = time.monotonic()
            return True

    return TrafficClient
