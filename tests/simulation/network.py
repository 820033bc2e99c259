"""The network between one client and one broker: delay, partition in either direction, connections that break as TCP's do.

A connection delivers in order and loses nothing while it stands, however long a partition holds messages back; it breaks when one side has
heard nothing for one and a half keep-alives, when the broker goes, or when either closes it. What a broker may do beyond that (lose, double,
reorder a message) is in broker.py.
"""

import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .loop import Life, SimLoop

KEEPALIVE_FACTOR = 1.5
"""Silence after which the other side is taken for dead, in keep-alives (MQTT 5, 3.1.2.10)."""


@dataclass(eq=False)
class Path:
    """The way from one machine to one broker.

    Attributes:
        delay_s, jitter_s: least delay of a message and what a draw adds at most.
        loss, duplicate, reorder: what the broker does to messages of this client, probabilities (see broker.py).
        up_blocked, down_blocked: a partition, towards the broker and from it.
        happened: effects of faults, counted (see coverage.py).
    """

    name: str
    loop: SimLoop
    draw: random.Random
    delay_s: float = 0.005
    jitter_s: float = 0.005
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    up_blocked: bool = False
    down_blocked: bool = False
    connections: "dict[Connection, None]" = field(default_factory=dict)
    happened: Counter[str] = field(default_factory=Counter)
    _blocks: int = 0

    def delay(self) -> float:
        """Seconds of the next message."""
        return self.delay_s + self.jitter_s * self.draw.random()

    def block(self, up: bool, down: bool) -> None:
        """Change the partition; connections notice by silence, or get what was held back."""
        if (up, down) == (self.up_blocked, self.down_blocked):
            return
        self.up_blocked, self.down_blocked = up, down
        self._blocks += 1
        for connection in list(self.connections):
            connection.path_changed()

    def watch(self, seconds: float, still: Callable[[], bool], act: Callable[[], None]) -> None:
        """`act` after `seconds` if the partition has not changed by then and `still` holds."""
        serial = self._blocks

        def due() -> None:
            if self._blocks == serial and still():
                self.happened["links ended by silence"] += 1
                act()

        self.loop.call_later(seconds, due, context=self.loop.outside)


class Direction:
    """One direction of a connection: messages arrive in order, at their times; held back while the path is blocked."""

    def __init__(self, path: Path, blocked: Callable[[], bool], enter: Callable[..., Any], batch_end: Callable[[], None] | None = None) -> None:
        self._path = path
        self._loop = path.loop
        self._blocked = blocked
        self._enter = enter
        self.batch_end = batch_end
        self._queue: deque[tuple[float, Callable[..., Any], tuple[Any, ...]]] = deque()
        self._last = 0.0
        self._pumping = False
        self.open = True

    def send(self, function: Callable[..., Any], *arguments: Any, extra_s: float = 0.0) -> None:
        """Have `function` called at the other end."""
        if not self.open:
            return
        self._last = max(self._last, self._loop.time() + self._path.delay() + extra_s)
        self._queue.append((self._last, function, arguments))
        self._schedule()

    def _schedule(self) -> None:
        if not self._pumping and self._queue and not self._blocked():
            self._pumping = True
            self._loop.call_at(self._queue[0][0], self._pump, context=self._loop.outside)

    def resume(self) -> None:
        """The path is open again: what was held back is sent again and arrives."""
        if self._queue and not self._blocked():
            now = self._loop.time()
            late = [(max(when, now + self._path.delay_s), function, arguments) for when, function, arguments in self._queue]
            self._queue = deque(late)
            self._last = max(self._last, late[-1][0])
            self._schedule()

    def _pump(self) -> None:
        self._pumping = False
        if not self.open or self._blocked():
            return
        now = self._loop.time()
        delivered = False
        while self._queue and self._queue[0][0] <= now + 1e-9 and self.open and not self._blocked():
            _, function, arguments = self._queue.popleft()
            self._enter(function, *arguments)
            delivered = True
        if delivered and self.batch_end is not None and self.open:
            self._enter(self.batch_end)
        self._schedule()

    def close(self) -> None:
        """Nothing arrives any more."""
        self.open = False
        self._queue.clear()


class Connection:
    """One TCP connection of a client (a process) to a broker.

    Args:
        life: the client's process; what arrives after its end is lost.
        client_closed, server_closed: called with the reason, once, where that side notices the end.
    """

    def __init__(self, path: Path, life: Life, keepalive_s: float, client_closed: Callable[[str], None], server_closed: Callable[[str], None]) -> None:
        self.path = path
        self.life = life
        self._silence_s = keepalive_s * KEEPALIVE_FACTOR
        self._client_closed = client_closed
        self._server_closed = server_closed
        self.up = Direction(path, lambda: path.up_blocked, lambda function, *arguments: function(*arguments))
        self.down = Direction(path, lambda: path.down_blocked, life.run)
        self.client_open = True
        self.server_open = True
        path.connections[self] = None
        if path.up_blocked or path.down_blocked:
            self.path_changed()

    def path_changed(self) -> None:
        """The partition is another one."""
        self.up.resume()
        self.down.resume()
        path = self.path
        if path.up_blocked or path.down_blocked:
            path.watch(self._silence_s, lambda: self.client_open, lambda: self._end_client("no sign of life from the broker"))
        if path.up_blocked:
            path.watch(self._silence_s, lambda: self.server_open, lambda: self._end_server("keep-alive"))

    def close_by_client(self, reason: str = "closed") -> None:
        """The client closes (or its process ends: the kernel does); the broker notices when the word arrives."""
        if self.client_open:
            self.client_open = False
            self.down.close()
            self.up.send(self._end_server, reason)
            self._forget()

    def close_by_server(self, reason: str) -> None:
        """The broker closes or ends; the client notices when the word arrives."""
        if self.server_open:
            self.server_open = False
            self.up.close()
            self.down.send(self._end_client, reason)
            self._server_closed(reason)
            self._forget()

    def vanish(self) -> None:
        """The client's machine lost power: what it sent is on its way, then no word, and the broker notices by silence."""
        self.client_open = False
        self.down.close()
        self.path.loop.call_later(self._silence_s, self._end_server, "keep-alive", context=self.path.loop.outside)
        self._forget()

    def _end_server(self, reason: str) -> None:
        if self.server_open:
            self.server_open = False
            self.up.close()
            self._server_closed(reason)
            self.down.send(self._end_client, "the connection was lost")
            self._forget()

    def _end_client(self, reason: str) -> None:
        if self.client_open:
            self.client_open = False
            self.down.close()
            self.life.run(self._client_closed, reason)
            self.up.send(self._end_server, "the connection was lost")
            self._forget()

    def _forget(self) -> None:
        if not self.client_open and not self.server_open:
            self.path.connections.pop(self, None)
