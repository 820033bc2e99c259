"""A hostile wire on loopback: forwards streams to a receiver, and at a chosen byte does what networks, machines and attackers do."""

import contextlib
import socket
import threading
from collections.abc import Callable

Fault = Callable[["Proxy", bytes], bytes | None]
"""From the bytes that were read, those that go on; None cuts this stream."""

CHUNK = 64 << 10
"""Bytes of one read: a fault falls between any two."""


class Proxy:
    """Listens on a port of its own. `at` counts the bytes towards the receiver, or back from it, over all streams."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._lock = threading.Lock()
        self._passed = {"there": 0, "back": 0}
        self._plans: dict[str, list[tuple[int, Fault]]] = {"there": [], "back": []}
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self.fired = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def plan(self, at: int, fault: Fault, way: str = "there") -> None:
        """Do that to the bytes that hold byte `at`."""
        with self._lock:
            self._plans[way].append((at, fault))
            self._plans[way].sort(key=lambda one: one[0])

    @property
    def passed(self) -> int:
        """Bytes forwarded towards the receiver."""
        return self._passed["there"]

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self.target, 5)
            except OSError:
                client.close()
                continue
            server.settimeout(None)
            with self._lock:
                self._open |= {client, server}
            for source, sink, way in ((client, server, "there"), (server, client, "back")):
                thread = threading.Thread(target=self._pump, args=(source, sink, way), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        try:
            while data := source.recv(CHUNK):
                fault: Fault | None = None
                with self._lock:
                    begin = self._passed[way]
                    self._passed[way] += len(data)
                    if self._plans[way] and self._plans[way][0][0] < begin + len(data):
                        fault = self._plans[way].pop(0)[1]
                        self.fired += 1
                if fault is not None:
                    out = fault(self, data)
                    if out is None:
                        break
                    data = out
                sink.sendall(data)
        except OSError:
            pass
        finally:
            self._end(source)
            self._end(sink)

    def _end(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._open.discard(sock)
        sock.close()

    def cut_all(self) -> None:
        """Every stream."""
        with self._lock:
            streams = list(self._open)
        for sock in streams:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_all()
        self._thread.join()
        for thread in self._threads:
            thread.join()


def cut(_: Proxy, __: bytes) -> None:
    """This stream ends, in the middle of a record."""


def cut_all(proxy: Proxy, _: bytes) -> None:
    """Every stream ends."""
    proxy.cut_all()


def flip(_: Proxy, data: bytes) -> bytes:
    """One bit in the middle."""
    out = bytearray(data)
    out[len(out) // 2] ^= 16
    return bytes(out)


def flip_first(_: Proxy, data: bytes) -> bytes:
    """One bit of the first byte."""
    return bytes((data[0] ^ 1,)) + data[1:]


def repeat(_: Proxy, data: bytes) -> bytes:
    """What was just sent comes again."""
    return data + data


def drop(_: Proxy, data: bytes) -> bytes:
    """Some bytes never come."""
    return data[: len(data) // 2]


def swap(_: Proxy, data: bytes) -> bytes:
    """The second half comes first."""
    return data[len(data) // 2 :] + data[: len(data) // 2]


WIRE_FAULTS: dict[str, Fault] = {"cut": cut, "cut_all": cut_all, "flip": flip, "flip_first": flip_first, "repeat": repeat, "drop": drop, "swap": swap}
"""By name; after each the transfer has to go on by itself."""
