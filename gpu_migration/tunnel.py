"""Carries the bytes of a local socket over an authenticated stream: what a QEMU says to the server of a disk that is elsewhere, and what local processes of two machines say to each other (carry.py)."""

import contextlib
import select
import socket
import threading

from .errors import MigrationError
from .wire import PAYLOAD_MAX, Kind, Stream

_BUFFER = 1 << 20
"""Bytes that are taken from the socket at once: a whole request of a mirror, which copies up to 1 MiB."""
assert _BUFFER <= PAYLOAD_MAX
_SAID_ALL, _GONE = 1, 2
"""In the `attempt` of a record without bytes: the local end sends nothing more, and may still read; it is gone. Earlier releases say neither, and just end the stream."""


class Tunnel:
    """Both ways at once. Where one local end stops sending, the other sees that after all that was sent before, and may still answer; where one is gone, or the stream, or both have stopped, it is over at both ends.

    What is not read waits in the sockets: there is no queue. So that nothing is lost on the way, a stream ends only when each end has said to the other that its local end is gone: closing a socket in which something has not
    been read yet makes the kernel take back what it has still to send. What comes for a local end that is gone is read and dropped until then.
    """

    def __init__(self, local: socket.socket, stream: Stream, patience: float) -> None:
        """`patience`: seconds that a silent far end is borne, and one whose local end takes nothing while more waits for it."""
        self._local, self._stream = local, stream
        self.sent = self.received = 0
        """Bytes taken from the local socket, and given to it."""
        self._told, self._heard = False, False
        stream.lasting(patience)
        local.settimeout(None)
        self._threads = [threading.Thread(target=work, daemon=True, name="tunnel") for work in (self._out, self._into)]
        for thread in self._threads:
            thread.start()

    @property
    def whole(self) -> bool:
        """Once it is over: all that either local end had sent is at the other, as far as that took it. Else the stream, or the far end, was gone before."""
        return self._told and self._heard

    def _out(self) -> None:
        buffer = memoryview(bytearray(_BUFFER))
        try:
            while count := self._read(buffer):
                self.sent += count
                self._stream.send(Kind.NBD, buffer[:count])
            ended = select.poll()
            ended.register(self._local, 0)  # of itself it says when neither way is left: the other process has closed it, or we have shut it
            if not ended.poll(0):
                self._stream.send(Kind.NBD, attempt=_SAID_ALL)
                ended.poll()
            self._stream.send(Kind.NBD, attempt=_GONE)
            self._stream.finish()  # an earlier release knows it by this
            self._told = True
        except (OSError, MigrationError):
            self._stream.hang_up()  # what has come is still taken from it, by the other thread, which then ends all

    def _read(self, buffer: memoryview) -> int:
        try:
            return self._local.recv_into(buffer)
        except OSError:  # it was closed with something unread; what it had sent came before this
            return 0

    def _into(self) -> None:
        try:
            while not self._heard:
                kind, _, attempt, payload = self._stream.receive()
                if kind != Kind.NBD or not (payload or attempt in (_SAID_ALL, _GONE)):
                    break
                with contextlib.suppress(OSError):  # the local end is gone, which the other thread sees and says
                    if payload:
                        self._local.sendall(payload)
                        self.received += len(payload)
                    elif attempt == _SAID_ALL:
                        self._local.shutdown(socket.SHUT_WR)
                    else:
                        self._heard = True
                        self._local.shutdown(socket.SHUT_RDWR)  # what it has not read yet stays to be read
        except (OSError, MigrationError):
            pass
        if not self._heard:
            self.hang_up()

    def hang_up(self) -> None:
        """Both ends see the end of it, at once. The descriptors stay until the threads are done, so that no other file gets their numbers."""
        self._stream.hang_up()  # first, so that nobody takes it for an orderly end
        with contextlib.suppress(OSError):
            self._local.shutdown(socket.SHUT_RDWR)

    def wait(self) -> None:
        """Until it is over; nothing of it is left."""
        for thread in self._threads:
            thread.join()
        self._local.close()
        self._stream.close()

    def close(self) -> None:
        """End it now; nothing of it is left."""
        self.hang_up()
        self.wait()
