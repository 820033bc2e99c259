"""A TCP connection to a name with several addresses, not all of which need answer (RFC 8305, Happy Eyeballs).

Python tries them one after the other, each for as long as a connection may take. Where the addresses of one family lead nowhere without a word (a site whose IPv6 ends at its router), a broker with two of them is
never reached within that time, at no attempt, since they come in the same order each time.
"""

import errno
import os
import select
import socket
import time
from typing import Any

NEXT_S = 0.25
"""Seconds before the next address is tried beside those that have not answered (RFC 8305, section 8)."""
ADDRESSES_MOST = 16
"""Of a name: all of them are tried within the time that a connection may take."""


def interleaved(found: list[Any]) -> list[Any]:
    """Addresses in their order, but that families take turns (section 4): one that leads nowhere holds up the other once."""
    first = [one for one in found if one[0] == found[0][0]]
    other = [one for one in found if one[0] != found[0][0]]
    turns = [one for pair in zip(first, other, strict=False) for one in pair]
    return turns + first[len(other) :] + other[len(first) :]


def reach(host: str, port: int, seconds: float) -> socket.socket:
    """A socket that is connected to whichever address answers first, with that timeout. Blocks, for as long at the most once there are addresses. Raises OSError: what became of the first address that failed."""
    waiting = interleaved(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))[:ADDRESSES_MOST]
    trying: dict[int, socket.socket] = {}
    events, failed = select.poll(), []
    now = due = time.monotonic()
    end = now + seconds
    try:
        while waiting or trying:
            if waiting and (now >= due or not trying):
                family, kind, protocol, _, address = waiting.pop(0)
                due = now + NEXT_S
                try:
                    sock = socket.socket(family, kind, protocol)
                except OSError as error:  # a kernel without that family
                    failed.append(error)
                    continue
                sock.setblocking(False)
                trying[sock.fileno()] = sock
                code = sock.connect_ex(address)
                if code not in (0, errno.EINPROGRESS):
                    failed.append(OSError(code, os.strerror(code)))
                    trying.pop(sock.fileno()).close()
                    due = now
                    continue
                events.register(sock, select.POLLOUT)
            if now >= end:
                raise TimeoutError("timed out")
            for descriptor, _ in events.poll(max(0.0, (min(end, due) if waiting else end) - now) * 1000):
                events.unregister(descriptor)
                sock = trying.pop(descriptor)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0:
                    sock.settimeout(seconds)
                    return sock
                sock.close()
                failed.append(OSError(code, os.strerror(code)))
                due = now
            now = time.monotonic()
        raise failed[0]
    finally:
        for sock in trying.values():
            sock.close()
