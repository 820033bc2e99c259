"""Functions whose image is a container's: a program that answers HTTP, kept running, and called over the loopback of its own network, where nobody else is.

The contract is the usual one of such platforms: the program listens on the port that `PORT` names and answers a POST, whose body is what the caller sent; a status from 200 to 299 is success, and its body the answer.

`spec` is a container's (`container_spec`), without `network`, and

    timeout_s        seconds of one call, its wait for a turn included
    concurrency      calls that run at once (1: a program need not be made for more)
    queue            calls that wait beyond those; further ones are refused
    output           bytes kept of an answer
    port, path       where it listens (8080), and what is asked for (/)

A call that takes too long ends the program, since nothing less is sure to end what it does; the runner starts it again. With a `concurrency` of 1 no other call ends with it.
"""

import asyncio
import contextlib
import ctypes
import errno
import http.client
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .container import ContainerDriver
from .face import Key, Phase, Refused
from .function_call import Answer
from .function_frames import MAX_INPUT
from .function_spec import DEFAULT_OUTPUT, DEFAULT_QUEUE, DEFAULT_TIMEOUT_S, MAX_CONCURRENCY, MAX_OUTPUT, MAX_QUEUE, MAX_TIMEOUT_S

CALL_KEYS = ("concurrency", "output", "path", "port", "queue", "timeout_s")

DEFAULT_PORT, MAX_PATH = 8080, 1024
"""What programs made for such platforms listen on; bytes of a path."""

LOOK_S = 0.01
"""Pause between two looks whether a program that was just started listens by now."""

MAX_CALLS = 256
"""Calls of the agent under way, of all functions: each holds a thread and an answer of at most 1 MiB."""

MAX_POOLS = 64
"""Functions whose settings are kept at hand, each with a few hundred bytes."""

_NEW_NETWORK = 0x4000_0000
"""CLONE_NEWNET, of setns(2)."""

_PATH = re.compile(r"/[!-~]*\Z")


@dataclass(frozen=True, slots=True)
class Calls:
    """How a function is called; the fields are those of `spec`."""

    timeout_s: float
    concurrency: int
    queue: int
    output_bytes: int
    port: int
    path: str


def calls(spec: Mapping[str, Any]) -> Calls:
    """Read and check. Raises `Refused`."""
    if "network" in spec:
        raise Refused("spec.network", "a function is called over its own loopback", "leave it out, or submit a container")
    timeout = spec.get("timeout_s", DEFAULT_TIMEOUT_S)
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or not 0.001 <= timeout <= MAX_TIMEOUT_S:
        raise Refused("spec.timeout_s", f"{str(timeout)[:40]} is no number of seconds from 0.001 to {MAX_TIMEOUT_S:g}", "say how long a call may take")
    path = spec.get("path", "/")
    if not isinstance(path, str) or len(path) > MAX_PATH or not _PATH.match(path):
        raise Refused("spec.path", f"{str(path)[:40]!r} is no path of an address", "begin it with /, and encode what is no plain character")

    def whole(key: str, default: int, least: int, most: int) -> int:
        value = spec.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise Refused(f"spec.{key}", f"{str(value)[:40]} is no whole number from {least} to {most}", "give one, or leave it out")
        return value

    return Calls(
        float(timeout), whole("concurrency", 1, 1, MAX_CONCURRENCY), whole("queue", DEFAULT_QUEUE, 0, MAX_QUEUE), whole("output", DEFAULT_OUTPUT, 0, MAX_OUTPUT), whole("port", DEFAULT_PORT, 1, 65_535), path,
    )


def container(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The `spec` of the container that answers the calls. Raises `Refused`."""
    told, env = calls(spec), spec.get("env", {})
    if not isinstance(env, dict):
        raise Refused("spec.env", "is not an object", "give names and texts, or leave it out")
    if env.get("PORT", str(told.port)) != str(told.port):
        raise Refused("spec.env", f"PORT is not {told.port}", "say the port with spec.port alone")
    return {**{name: value for name, value in spec.items() if name not in CALL_KEYS}, "env": {**env, "PORT": str(told.port)}}


@dataclass(slots=True)
class _Pool:
    """What is known of one instance."""

    key: Key
    calls: Calls
    turns: asyncio.Semaphore
    waiting: int = 0
    """Calls that run or wait."""


class ContainerFunctions:
    """Calls of functions that run as containers.

    Args:
        driver: of the containers.
        wanted: entries of desired state: which workloads are functions, and their documents.
    """

    def __init__(self, driver: ContainerDriver, wanted: Callable[[], Sequence[Mapping[str, Any]]]) -> None:
        self._driver, self._wanted = driver, wanted
        self._pools: dict[str, _Pool] = {}
        self._calls = 0

    async def call(self, function: str, body: bytes, timeout_s: float | None = None) -> Answer | None:
        """Call it once; None where no such function is wanted here, of a container or at all. Raises `Refused` where it does not run, or has no room."""
        entry = next((one for one in self._wanted() if one["id"] == function and one["kind"] == "function" and one["wanted"] == "running"), None)
        if entry is None:
            self._pools.pop(function, None)
            return None
        key = Key(function, int(entry["epoch"]))
        try:
            await self._driver.status(key)
        except Refused:
            return None  # it is no container
        if len(body) > MAX_INPUT:
            raise Refused("body", f"{len(body)} bytes are over {MAX_INPUT}", "send less, or where it can be fetched")
        pool = self._pool(key, calls((entry.get("document") or {}).get("spec") or {}))
        if self._calls >= MAX_CALLS:
            raise Refused("calls", f"{MAX_CALLS} are under way on this node, the most there may be", "come again")
        if pool.waiting >= pool.calls.queue + pool.calls.concurrency:
            raise Refused("calls", f"{pool.waiting} run and wait, as many as may", "come again, or let more run at once (spec.concurrency, spec.queue)")
        seconds = min(timeout_s or pool.calls.timeout_s, pool.calls.timeout_s)
        pool.waiting += 1
        self._calls += 1
        try:
            return await self._in_turn(pool, body, seconds)
        finally:
            pool.waiting -= 1
            self._calls -= 1

    def _pool(self, key: Key, told: Calls) -> _Pool:
        pool = self._pools.get(key.id)
        if pool is None or pool.key != key or pool.calls != told:
            pool = self._pools[key.id] = _Pool(key, told, asyncio.Semaphore(told.concurrency))
            while len(self._pools) > MAX_POOLS:
                del self._pools[next(iter(self._pools))]
        return pool

    async def _in_turn(self, pool: _Pool, body: bytes, seconds: float) -> Answer:
        end = asyncio.get_running_loop().time() + seconds
        try:
            async with asyncio.timeout_at(end):
                await pool.turns.acquire()
        except TimeoutError:
            return _ended("timed out", b"it waited for its turn all that time")
        try:
            return await self._answered(pool, body, end)
        finally:
            pool.turns.release()

    async def _answered(self, pool: _Pool, body: bytes, end: float) -> Answer:
        """Its turn has come. Until the program listens nothing is sent, so that is tried again; what was sent never is."""
        cold, link = False, None
        try:
            async with asyncio.timeout_at(end):
                while True:
                    status = await self._driver.status(pool.key)
                    if status.phase is Phase.RUNNING:
                        link, began = _Link(status.pid), time.perf_counter_ns()
                        try:
                            code, answer, cut = await _ask(link, pool.calls, body)
                        except NotSent as error:
                            if error.errno in (errno.EPERM, errno.EACCES):
                                raise Refused("node", "the agent may not enter the network of a container", "run it as root") from None
                        else:
                            good = 200 <= code < 300
                            return Answer("exited" if good else "failed", 0 if good else code, answer, b"", cut, cold, (time.perf_counter_ns() - began) // 1000)
                    cold = True
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            if link is None or not link.sent:
                return _ended("timed out", f"it does not run, or does not listen on port {pool.calls.port} yet".encode())
            await asyncio.shield(self._driver.stop(pool.key, 0.0))
            return _ended("timed out", b"")
        except (http.client.HTTPException, OSError) as error:
            return _ended("crashed", f"it did not answer to the end: {type(error).__name__}".encode())


def _ended(what: str, why: bytes) -> Answer:
    return Answer(what, 0, b"", why, False, False, 0)


class NotSent(OSError):
    """The program could not be reached."""


async def _ask(link: "_Link", told: Calls, body: bytes) -> tuple[int, bytes, bool]:
    """Status, body and whether there was more of it. Raises `NotSent`, and OSError or HTTPException where it did not answer in order.

    In a thread of its own, which enters the network of the process and never leaves it: no thread that does other work is ever in it. A connection for each: one that is kept may be closed by the
    program just when it is used, and a call is not sent twice.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[tuple[int, bytes, bool]] = loop.create_future()

    def settle(found: tuple[int, bytes, bool] | BaseException) -> None:
        if answer.done():
            return  # nobody waits any more
        if isinstance(found, BaseException):
            answer.set_exception(found)
        else:
            answer.set_result(found)

    def run() -> None:
        found: tuple[int, bytes, bool] | BaseException
        try:
            found = link.ask(told, body)
        except Exception as error:  # whatever it was: it is for who waits
            found = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, found)

    threading.Thread(target=run, name="call of a function", daemon=True).start()
    try:
        return await answer
    finally:
        link.end()


class _Link:
    """A connection into the network of a process, for one call.

    Attributes:
        sent: from now on something may have arrived.
    """

    def __init__(self, pid: int) -> None:
        self._pid, self._over, self._lock = pid, False, threading.Lock()
        self.sent = False
        self._socket: socket.socket | None = None

    def ask(self, told: Calls, body: bytes) -> tuple[int, bytes, bool]:
        """Blocks; the thread is in that network from then on."""
        try:
            enter(self._pid)
            with self._lock:
                if self._over:
                    raise ConnectionAbortedError(errno.ECONNABORTED, "it is not wanted any more")
                self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            self._socket.connect(("127.0.0.1", told.port))
        except OSError as error:
            raise NotSent(error.errno, error.strerror) from None
        connection = http.client.HTTPConnection("127.0.0.1", told.port)
        connection.sock, self.sent = self._socket, True
        try:
            connection.request("POST", told.path, body, {"Content-Type": "application/octet-stream", "Connection": "close"})
            with connection.getresponse() as response:
                found = response.read(told.output_bytes + 1)
                return response.status, found[:told.output_bytes], len(found) > told.output_bytes
        finally:
            connection.close()

    def end(self) -> None:
        """What waits in `ask` does not any more; from any thread."""
        with self._lock:
            self._over = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)


def enter(pid: int) -> None:
    """This thread is in the network of a process from now on. Raises OSError."""
    network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(network, _NEW_NETWORK) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(network)
