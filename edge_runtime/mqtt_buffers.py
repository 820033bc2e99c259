"""paho's client with buffers between it and its socket: what a turn of the loop reads and writes costs one system call each way.

paho reads a packet in three or four calls and writes each packet by itself. With two hundred messages in a turn that is a third of the agent's
time, and the broker is woken for every one of them. Only `_sock_recv` and `_sock_send` are replaced (paho-mqtt 1.6 to 2.2 have them); in a
version without them the buffers stay empty and everything works as before, only dearer.
"""

from typing import Any

from .lean_imports import import_paho

READ_BYTES = 65_536
"""Read from the socket at once: about 200 messages, the most that one turn takes on anyway."""

_made: list[Any] = []


def buffered_client() -> Any:
    """The class; made at the first connection, because paho is not imported before."""
    if not _made:
        _made.append(_make(import_paho()))
    return _made[0]


def _make(paho: Any) -> Any:
    class BufferedClient(paho.Client):  # type: ignore[misc]
        """See the module. `begin_turn` allows one read of the socket; `push` writes what has gathered."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._ahead = b""
            self._at = 0
            self._may_read = False
            self._gathered = bytearray()
            self.at_once = False
            """Write through: set before DISCONNECT, after which paho closes the socket by itself."""

        def begin_turn(self) -> None:
            """The socket is readable."""
            self._may_read = True

        @property
        def has_more(self) -> bool:
            """Bytes were read that paho has not taken yet."""
            return self._at < len(self._ahead)

        @property
        def unsent(self) -> bool:
            """Bytes wait for the socket."""
            return bool(self._gathered) or self.want_write()

        def _sock_recv(self, bufsize: int) -> bytes:
            start = self._at
            if start >= len(self._ahead):
                if not self._may_read:
                    raise BlockingIOError
                self._may_read = False
                self._ahead, start = super()._sock_recv(READ_BYTES), 0
            self._at = min(start + bufsize, len(self._ahead))
            return self._ahead[start : self._at]

        def _sock_send(self, buf: bytes | bytearray) -> int:
            self._gathered += buf
            if self.at_once:
                self.push()
            return len(buf)

        def push(self) -> bool:
            """Write what has gathered, as far as the socket takes it; False where the connection is lost."""
            if self._gathered:
                try:
                    del self._gathered[: super()._sock_send(self._gathered)]
                except BlockingIOError:
                    pass  # the socket is full: the loop says when it is not
                except OSError:
                    return False
            return True

    return BufferedClient
