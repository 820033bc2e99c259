"""One call of a function, as the agent makes it: over its host's socket, one connection for each."""

import asyncio
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from .face import Refused
from .function_frames import ANSWERS, ASKS, CRASHED, EXITED, MAX_INPUT, REFUSED, TIMED_OUT, TRAPPED

SPARE_S = 5.0
"""A host that has not answered so long after the deadline hangs: it is stopped by no call."""

MOST = (1 << 20) + (1 << 17)
"""Bytes of an answer's parts: the largest output, and what may be kept of stderr."""

_WORDS = {EXITED: "exited", TRAPPED: "trapped", TIMED_OUT: "timed out", CRASHED: "crashed"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a call.

    Attributes:
        what: `exited`, `trapped`, `timed out` or `crashed`; of a container also `failed`.
        code: exit code, where it has exited; a container's status, where that is no success.
        cut: it wrote more than is kept.
        cold: it waited for a process to be forked.
        ran_us: microseconds from when it was handed to an instance.
    """

    what: str
    code: int
    stdout: bytes
    stderr: bytes
    cut: bool
    cold: bool
    ran_us: int


async def ask(folder: Path, stdin: bytes, timeout_s: float) -> Answer:
    """Call the function of an instance's folder. Raises `Refused` where it cannot be reached, or has no room."""
    if len(stdin) > MAX_INPUT:
        raise Refused("body", f"{len(stdin)} bytes are over {MAX_INPUT}", "send less, or where it can be fetched")
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.setblocking(False)
        where = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            link.connect(f"/proc/self/fd/{where}/call.sock")
        finally:
            os.close(where)
        async with asyncio.timeout(timeout_s + SPARE_S):
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(link, ASKS.pack(max(1, round(timeout_s * 1000)), len(stdin)) + stdin)
            what, cut, cold, code, ran_us, out, err = ANSWERS.unpack(await _exactly(link, ANSWERS.size))
            if out + err > MOST:
                raise OSError("its answer is too large")
            parts = await _exactly(link, out + err)
    except BlockingIOError:
        raise Refused("calls", "as many calls wait as may", "come again") from None
    except (OSError, TimeoutError) as error:
        raise Refused("id", f"the function cannot be reached: {error or 'no answer'}", "come again; see what the hub says of it") from None
    finally:
        link.close()
    if what == REFUSED:
        raise Refused("calls", parts.decode("utf-8", "replace"), "come again, or let more run at once (spec.concurrency, spec.queue)")
    return Answer(_WORDS.get(what, "crashed"), code, parts[:out], parts[out:], bool(cut), bool(cold), ran_us)


async def _exactly(link: socket.socket, size: int) -> bytes:
    loop, found = asyncio.get_running_loop(), bytearray()
    while len(found) < size:
        data = await loop.sock_recv(link, min(65_536, size - len(found)))
        if not data:
            raise OSError("its host closed the connection")
        found += data
    return bytes(found)
