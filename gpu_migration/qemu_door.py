"""By which streams come to who takes more than one kind of them, or several side by side: a target that takes a guest, `carry-in`."""

import contextlib
import queue
import socket
import threading

from . import wire
from .errors import DestinationError, KeyRefused
from .qemu_question import TRANSFER
from .receiver import CONNECTIONS_MOST


class Door:
    """Takes streams of whoever has the key, each handshake on a thread of its own, so that one that stalls holds up no other."""

    def __init__(self, key: bytes, listen: tuple[str, int], transfer: bytes | None = TRANSFER) -> None:
        """`transfer`: the name of streams that may come in; None: any. Raises DestinationError."""
        self._key, self._transfer = key, transfer
        try:
            self._listener = socket.create_server(listen, backlog=CONNECTIONS_MOST)
        except OSError as error:
            raise DestinationError(f"listen {listen[0]}:{listen[1]}: {error.strerror or error}; give another address") from None
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._opened: queue.Queue[wire.Stream] = queue.Queue(CONNECTIONS_MOST)
        self._places = threading.BoundedSemaphore(CONNECTIONS_MOST)
        self._thread = threading.Thread(target=self._accept, daemon=True, name="door")
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if self._places.acquire(blocking=False):
                threading.Thread(target=self._shake, args=(sock,), daemon=True, name="handshake").start()
            else:
                sock.close()

    def _shake(self, sock: socket.socket) -> None:
        try:
            stream, transfer = wire.answer(sock, self._key)
            if self._transfer is not None and transfer != self._transfer:
                stream.close()
            else:
                self._opened.put_nowait(stream)
        except (OSError, KeyRefused, queue.Full):
            sock.close()
        finally:
            self._places.release()

    def stream(self, seconds: float) -> wire.Stream | None:
        """The next one; None where none came in time."""
        try:
            return self._opened.get(timeout=seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        while not self._opened.empty():
            self._opened.get_nowait().close()
