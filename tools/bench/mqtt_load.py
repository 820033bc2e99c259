"""A load generator on bare paho: publishes numbered messages, matches the replies by number, measures the time between.

It runs in the measuring process with paho's own loops in threads: what it costs is in the null measurement (its own message coming back
through the broker) as well as in every other.
"""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from .harness import Tls, percentile

DRAIN_S = 5.0
"""How long late replies are waited for at the end of a round."""


@dataclass(slots=True)
class Latency:
    """Round trips of one round, milliseconds, and what did not come back or came twice."""

    p50: float
    p90: float
    p99: float
    p999: float
    most: float
    sent: int
    received: int
    lost: int
    twice: int
    times: tuple[float, ...] = ()
    """Every round trip."""

    @staticmethod
    def of(times: Sequence[float], sent: int, lost: int, twice: int) -> "Latency":
        """From round trips in milliseconds."""
        return Latency(
            percentile(times, 0.5), percentile(times, 0.9), percentile(times, 0.99), percentile(times, 0.999), max(times, default=float("nan")), sent, len(times), lost, twice, tuple(times),
        )

    @staticmethod
    def pooled(parts: "Sequence[Latency]") -> "Latency":
        """Several stretches as one."""
        return Latency.of(
            [time_ms for part in parts for time_ms in part.times], sum(part.sent for part in parts), sum(part.lost for part in parts), sum(part.twice for part in parts),
        )

    def to_json(self) -> dict[str, Any]:
        """Rounded for the report."""
        return {name: round(getattr(self, name), 3) for name in ("p50", "p90", "p99", "p999", "most", "sent", "received", "lost", "twice")}


class Load:
    """Sends on `send_topic`, listens on `receive_topic`.

    Args:
        make: payload of message n.
        read: n of a reply, None for something else.
        drain_s: how long late replies are waited for at the end of a round, seconds.
        tls: by which the broker is spoken to; None for plainly.
    """

    def __init__(self, port: int, send_topic: str, receive_topic: str, make: Callable[[int], bytes], read: Callable[[bytes], int | None], drain_s: float = DRAIN_S, tls: Tls | None = None) -> None:
        self._drain_s = drain_s
        self._send_topic = send_topic
        self._make = make
        self._read = read
        self._sent: dict[int, float] = {}
        self._times: list[float] = []
        self._twice = 0
        self._next = 0
        self._room = threading.Semaphore(0)
        self._receiver = self._client(port, tls)
        self._sender = self._client(port, tls)
        self._receiver.on_message = self._message
        ready = threading.Event()
        self._receiver.on_subscribe = lambda *_: ready.set()
        self._receiver.subscribe(receive_topic, 1)
        if not ready.wait(10):
            raise TimeoutError("the broker did not answer SUBSCRIBE")

    @staticmethod
    def _client(port: int, tls: Tls | None) -> paho.Client:
        client = paho.Client(CallbackAPIVersion.VERSION2)
        if tls is not None:
            client.tls_set(tls.ca, tls.cert, tls.key)
        client.max_inflight_messages_set(0)
        connected = threading.Event()
        client.on_connect = lambda *_: connected.set()
        client.on_socket_open = _without_nagle
        client.connect("127.0.0.1", port, 30)
        client.loop_start()
        if not connected.wait(10):
            raise TimeoutError("the broker did not answer CONNECT")
        return client

    def close(self) -> None:
        """Disconnect."""
        for client in (self._sender, self._receiver):
            client.disconnect()
            client.loop_stop()

    def _message(self, _client: Any, _userdata: Any, message: Any) -> None:
        now = time.perf_counter()
        number = self._read(message.payload)
        if number is None:
            return
        sent = self._sent.pop(number, None)
        if sent is None:
            self._twice += 1
            return
        self._times.append(now - sent)
        self._room.release()

    def _publish(self) -> None:
        number = self._next
        self._next += 1
        payload = self._make(number)
        self._sent[number] = time.perf_counter()
        self._sender.publish(self._send_topic, payload, 1)

    def warm_up(self, seconds: float = 30) -> None:
        """Until the first reply: the other side listens."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._publish()
            if self._room.acquire(timeout=0.2):
                break
        else:
            raise TimeoutError("no reply came")
        self._settle(0)

    def _settle(self, count: int) -> Latency:
        end = time.monotonic() + self._drain_s
        while self._sent and time.monotonic() < end:
            time.sleep(0.01)
        times, twice, lost = [value * 1000 for value in self._times], self._twice, len(self._sent)
        self._times, self._twice = [], 0
        self._sent.clear()
        return Latency.of(times, count, lost, twice)

    def paced(self, rate: float, seconds: float) -> Latency:
        """`rate` messages per second, evenly spaced, whatever comes back."""
        count = int(rate * seconds)
        start = time.perf_counter()
        for index in range(count):
            due = start + index / rate
            wait = due - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            self._publish()
        return self._settle(count)

    def closed_loop(self, seconds: float, window: int) -> tuple[float, Latency]:
        """At most `window` messages without a reply for `seconds`; replies per second and the latencies."""
        while self._room.acquire(blocking=False):
            pass
        start = time.perf_counter()
        for _ in range(window):
            self._publish()
        count = window
        while time.perf_counter() - start < seconds:
            if self._room.acquire(timeout=1):
                self._publish()
                count += 1
        received = len(self._times)
        rate = received / (time.perf_counter() - start)
        return rate, self._settle(count)


def _without_nagle(_client: Any, _userdata: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def null_load(port: int, make: Callable[[int], bytes], read: Callable[[bytes], int | None], tls: Tls | None = None) -> Load:
    """The broker alone: the generator receives its own messages."""
    return Load(port, "bench/null", "bench/null", make, read, tls=tls)
