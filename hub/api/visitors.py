"""Who may be connected to the API: so many at once, each with so long for what it came for.

asyncio and aiohttp take whoever comes and wait for ever: four thousand connections that begin to speak TLS and go no further took 1.3 GB here, and as many with half a request are held until they go by
themselves. So connections are accepted here: of too many the one that has been idle for longest gives way, and one that asks for nothing is closed.
"""

import asyncio
import errno
import logging
import socket
import ssl
from asyncio import sslproto
from collections.abc import Callable
from typing import Any

from edge_runtime.system.reasons import Reasons

log = logging.getLogger(__name__)

VISITORS_MAX = 512
"""Connections at once."""

TLS_READ_BYTES = 32 << 10
"""Two records of TLS. asyncio sets a quarter of a megabyte aside for each connection before it has said a word, and gives it back late."""

HANDSHAKE_S = 10.0
"""For the beginning of TLS."""

FIRST_S = 15.0
"""For the first request, whole but for its body."""

IDLE_S = 75.0
"""Between two requests; browsers and proxies expect about a minute."""

SWEEP_S = 1.0
ACCEPT_MOST = 64
"""Taken per turn of the loop: others have their turn, too."""

BACKLOG = 128
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
PAUSE_S = 1.0
"""Where the system has no descriptor or memory for one more."""


class _Visitor:
    __slots__ = ("handler", "since", "socket", "task", "transport")

    def __init__(self, sock: socket.socket, now: float) -> None:
        self.socket, self.since = sock, now
        self.task: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport | None = None
        self.handler: Any = None  # aiohttp's `RequestHandler`

    @property
    def busy(self) -> bool:
        """A request of it is being answered. aiohttp tells it nowhere else."""
        return self.handler is not None and bool(self.handler._request_in_progress)

    @property
    def asked(self) -> bool:
        """It has had a request."""
        return self.handler is not None and bool(self.handler._request_count)


class Visitors:
    """Accepts connections for an aiohttp server.

    Args:
        protocol: makes aiohttp's side of one (`AppRunner.server`).
        shown: TLS is spoken by it; None for none.
    """

    def __init__(self, protocol: Callable[[], Any], shown: ssl.SSLContext | None) -> None:
        self._protocol, self._shown = protocol, shown
        if shown is not None:
            sslproto.SSLProtocol.max_size = TLS_READ_BYTES
        self._loop = asyncio.get_running_loop()
        self._listeners: list[socket.socket] = []
        self._open: set[_Visitor] = set()
        self._sweeping: asyncio.TimerHandle | None = None
        self._complaints = Reasons()
        self.gave_way = 0
        """Connections that were ended for others."""

    async def listen(self, host: str, port: int) -> int:
        """Begin, on every address of `host`; the port, where 0 was given a free one. Raises OSError."""
        found = await self._loop.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        wrong: OSError | None = None
        for family, kind, protocol, _, address in dict.fromkeys(found):
            try:
                port = self._listen(socket.socket(family, kind, protocol), (address[0], port, *address[2:]))
            except OSError as error:
                if wrong is None or error.errno not in _ABSENT:
                    wrong = error
                if error.errno not in _ABSENT:
                    break
        if wrong is not None and (not self._listeners or wrong.errno not in _ABSENT):  # `localhost` also names an IPv6 that a container may not have
            self.close()
            raise OSError(wrong.errno, f"the API cannot listen on {host}:{port}: {wrong.strerror}")
        for listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)
        self._sweep()
        return port

    def _listen(self, listener: socket.socket, address: tuple[Any, ...]) -> int:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if listener.family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
        self._listeners.append(listener)
        port: int = listener.getsockname()[1]
        return port

    def close(self) -> None:
        """Nobody comes any more; who is there is aiohttp's to end."""
        for listener in self._listeners:
            self._loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()
        if self._sweeping is not None:
            self._sweeping.cancel()
        for visitor in self._open:
            if visitor.transport is None and visitor.task is not None:
                visitor.task.cancel()
        self._open.clear()

    def __len__(self) -> int:
        """Connections now."""
        return len(self._open)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(ACCEPT_MOST):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no descriptor or memory for one more: the same again at once is no better
                if self._complaints.worth(str(error.strerror), self._loop.time()):
                    log.error("no connection to the API can be taken: %s", error.strerror)
                self._loop.remove_reader(listener)
                self._loop.call_later(PAUSE_S, self._again, listener)
                return
            sock.setblocking(False)
            if len(self._open) >= VISITORS_MAX and not self._make_room():
                self.gave_way += 1
                sock.close()
                continue
            visitor = _Visitor(sock, self._loop.time())
            self._open.add(visitor)
            visitor.task = self._loop.create_task(self._greet(visitor))

    def _again(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            self._loop.add_reader(listener, self._accept, listener)

    async def _greet(self, visitor: _Visitor) -> None:
        try:
            visitor.transport, visitor.handler = await self._loop.connect_accepted_socket(  # type: ignore[assignment]
                self._protocol, visitor.socket, ssl=self._shown, ssl_handshake_timeout=HANDSHAKE_S if self._shown is not None else None
            )
            visitor.since = self._loop.time()
        except OSError:  # it went, or does not speak TLS, or not in time
            self._open.discard(visitor)
            visitor.socket.close()
        except asyncio.CancelledError:
            visitor.socket.close()
            raise

    def _make_room(self) -> bool:
        idle = min((one for one in self._open if not one.busy), key=lambda one: one.since, default=None)
        if idle is None:
            return False
        self.gave_way += 1
        self._end(idle)
        return True

    def _end(self, visitor: _Visitor) -> None:
        self._open.discard(visitor)
        if visitor.transport is not None:
            visitor.transport.abort()
        elif visitor.task is not None:
            visitor.task.cancel()

    def _sweep(self) -> None:
        now = self._loop.time()
        for visitor in list(self._open):
            if visitor.transport is None:
                continue
            if visitor.transport.is_closing():
                self._open.discard(visitor)
            elif visitor.busy:
                visitor.since = now
            elif not visitor.asked and now - visitor.since > FIRST_S:
                self._end(visitor)
        self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)
