"""containerd by gRPC over its Unix socket: one call at a time, in our namespace. Imports grpc: 17 MB of memory, so only what runs containers by containerd imports this."""

import asyncio
from functools import partial
from typing import Any

import grpc

from .containerd_wire import Method, WireError, decode, encode
from .face import Failed

NAMESPACE = "novacron"
"""Of containers in containerd: what others have there is out of our reach, and ours out of theirs by name."""

CALL_S = 60.0
"""A call that takes longer hangs: the slowest starts a container."""

MAX_ANSWER = 16 << 20
"""Bytes of an answer: a list of a node's containers has 8 KiB for each."""

BACKOFF_MS = 200
"""Between two tries to connect, at most: the socket is on this machine, and a try costs nothing."""

SAID = 2000
"""Characters of containerd's own words in an error."""


class Away(Failed):
    """It does not answer."""


class Absent(Failed):
    """It does not know what was asked for."""


class There(Failed):
    """It has that already."""


class Client:
    """What talks to one containerd. Connects when it is first called, and again where that was lost.

    Args:
        path: of its socket.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._channel: Any = None
        self._calls: dict[str, Any] = {}

    def close(self) -> None:
        """What is under way is given up."""
        if self._channel is not None:
            self._channel.close()
        self._channel, self._calls = None, {}

    async def call(self, method: Method, seconds: float = CALL_S, **value: Any) -> dict[str, Any]:
        """One call and its answer. Raises `Away`, `Absent`, `There`, and `Failed` with containerd's words."""
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[Any] = loop.create_future()
        under_way = self._made(method).future(encode(method.request, value), timeout=seconds, metadata=(("containerd-namespace", NAMESPACE),))
        under_way.add_done_callback(lambda done: _tell(loop, answered, done))
        try:
            done = await answered
        finally:
            under_way.cancel()
        try:
            return decode(method.answer, done.result())
        except WireError as error:
            raise Failed("containerd", f"its answer to {method.path} cannot be read: {error}", "see whether this is containerd's socket") from None
        except grpc.RpcError as error:
            raise self._failure(method, error) from None

    def _made(self, method: Method) -> Any:
        if self._channel is None:
            self._channel = grpc.insecure_channel(f"unix:{self.path}", options=(
                ("grpc.default_authority", "localhost"), ("grpc.max_receive_message_length", MAX_ANSWER), ("grpc.enable_http_proxy", 0),
                ("grpc.initial_reconnect_backoff_ms", BACKOFF_MS), ("grpc.min_reconnect_backoff_ms", BACKOFF_MS), ("grpc.max_reconnect_backoff_ms", BACKOFF_MS),
            ))
        if method.path not in self._calls:
            self._calls[method.path] = self._channel.unary_unary(method.path)
        return self._calls[method.path]

    def _failure(self, method: Method, error: Any) -> Failed:
        code, said = error.code(), str(error.details() or "")[:SAID]
        word = method.path.rpartition("/")[2].lower()
        if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
            return Away("containerd", f"does not answer at {self.path} ({said or code.name})", "start it; what runs goes on meanwhile")
        kind = {grpc.StatusCode.NOT_FOUND: Absent, grpc.StatusCode.ALREADY_EXISTS: There}.get(code, Failed)
        return kind(word, f"containerd says: {said or code.name}", "look at the node")


def _tell(loop: asyncio.AbstractEventLoop, answered: "asyncio.Future[Any]", done: Any) -> None:
    """From a thread of grpc's."""
    try:
        loop.call_soon_threadsafe(partial(_set, answered, done))
    except RuntimeError:  # the loop is closed: nobody waits
        pass


def _set(answered: "asyncio.Future[Any]", done: Any) -> None:
    if not answered.done():
        answered.set_result(done)
