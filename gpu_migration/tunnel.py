"""Carries the bytes of a local socket over an authenticated stream: what a QEMU says to the server of a disk that is elsewhere."""

import contextlib
import socket
import threading

from .errors import MigrationError, Unauthentic
from .wire import PAYLOAD_MAX, Kind, Stream

_BUFFER = 1 << 20
"""Bytes that are taken from the socket at once: a whole request of a mirror, which copies up to 1 MiB."""
assert _BUFFER <= PAYLOAD_MAX


class Tunnel:
    """Both ways at once, until either end closes; then both are closed. What is not read waits in the sockets: there is no queue."""

    def __init__(self, local: socket.socket, stream: Stream, patience: float) -> None:
        """`patience`: seconds that a silent far end is borne."""
        self._local, self._stream = local, stream
        self.sent = 0
        """Bytes taken from the local socket."""
        stream.lasting(patience)
        local.settimeout(None)
        self._threads = [threading.Thread(target=work, daemon=True, name="tunnel") for work in (self._out, self._into)]
        for thread in self._threads:
            thread.start()

    def _out(self) -> None:
        buffer = memoryview(bytearray(_BUFFER))
        with contextlib.suppress(OSError):
            while count := self._local.recv_into(buffer):
                self.sent += count
                self._stream.send(Kind.NBD, buffer[:count])
        self.hang_up()

    def _into(self) -> None:
        with contextlib.suppress(OSError, Unauthentic, MigrationError):
            while True:
                kind, _, _, payload = self._stream.receive()
                if kind != Kind.NBD:
                    break
                self._local.sendall(payload)
        self.hang_up()

    def hang_up(self) -> None:
        """Both ends see the end of it. The descriptors stay until the threads are done, so that no other file gets their numbers."""
        with contextlib.suppress(OSError):
            self._local.shutdown(socket.SHUT_RDWR)
        self._stream.hang_up()

    def close(self) -> None:
        """The same, and nothing of it is left."""
        self.hang_up()
        for thread in self._threads:
            thread.join()
        self._local.close()
        self._stream.close()
