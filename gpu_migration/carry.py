"""Carries connections between local processes of two machines: each over an authenticated stream of its own, from a socket in a folder at one end to the socket of the same name at the other (`carry-out`, `carry-in`).

It is for what has a protocol of its own and cannot be taken up again after a cut: QEMU's own migration, a disk's mirror, the words of those who lead both. What goes over is not looked at. A channel is a name, and as many
connections may be made by it as there is room for.
"""

import contextlib
import os
import re
import selectors
import socket
import stat
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blake3 import blake3

from . import keys, wire
from .errors import DestinationError, KeyRefused, MigrationError, Refused, SourceError, TransferLost
from .qemu_door import Door
from .receiver import CONNECTIONS_MOST, PATIENCE_S, TEXT_MOST
from .tunnel import Tunnel
from .wire import Kind

CHANNELS = ("disk", "memory", "word")
"""What a hub's workers carry, for a guest that moves while it runs."""
CHANNELS_MOST = 8
LINGER_S = 0.5
"""After the last stream has ended, for so long there may be another: who has ended one and begins the next is not shut out."""
LOOK_S = 0.25
"""Between two looks whether streams have ended. What comes is taken at once."""
CONNECT_S = 5.0
"""Seconds for a local process to take a connection: less than the other end waits for the answer."""
_NAME = re.compile(r"[a-z0-9-]{1,32}")
_BACKLOG = 16


def channels_of(text: str) -> tuple[str, ...]:
    """Names, with commas between. Raises ValueError."""
    names = tuple(text.split(","))
    wrong = next((name for name in names if not _NAME.fullmatch(name)), None)
    if wrong is not None or len(names) > CHANNELS_MOST or len(set(names)) < len(names):
        raise ValueError(f"{text}: give 1 to {CHANNELS_MOST} names with commas between, each once, of 1 to 32 of a-z 0-9 -")
    return names


@dataclass(frozen=True, slots=True)
class Carried:
    """What came of it, as this end sees it."""

    bytes_out: int
    """Taken from local processes."""
    bytes_in: int
    """Given to them."""
    streams: int


class _End(ABC):
    """What both ends have: streams that are being made or are up, and when all is over. `run` is called once."""

    def __init__(self, name: str, patience: float, wait: float | None) -> None:
        self._name, self._patience, self._wait = name, patience, patience if wait is None else wait
        self._state = threading.Lock()
        self._threads: set[threading.Thread] = set()
        self._tunnels: set[Tunnel] = set()
        self._failure: MigrationError | None = None
        self._closed = False
        self._said = ""
        self._streams = self._out = self._in = self._broken = 0
        self._since = time.monotonic()

    def run(self) -> Carried:
        """Until all streams have ended, and at least one was there. Raises MigrationError: TransferLost where none came, or one ended because the other end was gone."""
        try:
            self._open()
            while (left := self._left()) > 0:
                self._accept(left)
            if self._broken:
                raise TransferLost(f"{self._name}: {self._broken} of {self._streams} streams ended because the other end was gone; what was on its way is lost")
            return Carried(self._out, self._in, self._streams)
        finally:
            self.close()

    def carried(self) -> int:
        """Bytes up to now, both ways."""
        with self._state:
            return self._out + self._in + sum(one.sent + one.received for one in self._tunnels)

    def close(self) -> None:
        """End every stream."""
        with self._state:
            self._closed = True  # one that is being made is ended once it is up
            tunnels = list(self._tunnels)
        for one in tunnels:
            one.hang_up()

    def _open(self) -> None:  # noqa: B027 - one end has nothing to open
        """What is needed before anything can come. Raises MigrationError."""

    @abstractmethod
    def _accept(self, seconds: float) -> None:
        """Take what comes, for so long at the most, and begin a stream for it."""

    def _left(self) -> float:
        """Seconds until it has to be looked again; 0: all is over. Raises MigrationError."""
        with self._state:
            if self._failure is not None:
                raise self._failure
            if self._threads:
                return LOOK_S
            quiet = time.monotonic() - self._since
            if self._streams:
                return max(0.0, LINGER_S - quiet)
            if quiet < self._wait:
                return self._wait - quiet
        raise TransferLost(f"{self._name}: no connection for {self._wait:g} s{f' ({self._said})' if self._said else ''}; start both ends again")

    def _begin(self, work: Callable[[], None]) -> bool:
        """Do that on a thread of its own; False where there are as many as may be."""
        with self._state:
            if len(self._threads) >= CONNECTIONS_MOST:
                return False
            thread = threading.Thread(target=self._stream, args=(work,), daemon=True, name="stream")
            self._threads.add(thread)
        thread.start()
        return True

    def _stream(self, work: Callable[[], None]) -> None:
        try:
            work()
        except KeyRefused as error:
            with self._state:
                self._failure = self._failure or error
        except (OSError, MigrationError) as error:  # that one comes to nothing; its local process sees the end of its connection, and may make another
            self._said = str(error)
        finally:
            with self._state:
                self._threads.discard(threading.current_thread())

    def _carry(self, local: socket.socket, stream: wire.Stream) -> None:
        """Until that one is over."""
        tunnel = Tunnel(local, stream, self._patience)
        with self._state:
            self._streams += 1
            self._tunnels.add(tunnel)
            closed = self._closed
        if closed:
            tunnel.hang_up()
        tunnel.wait()
        with self._state:
            self._tunnels.discard(tunnel)
            self._out += tunnel.sent
            self._in += tunnel.received
            self._broken += not tunnel.whole
            self._since = time.monotonic()


class CarryOut(_End):
    """Has a folder of sockets; whatever connects there is connected with the socket of that name at the other end. The folder is there, under its name, once all sockets listen."""

    def __init__(self, folder: Path, key: bytes, to: tuple[str, int], channels: Sequence[str], *, transfer: str = "", patience: float = PATIENCE_S, wait: float | None = None) -> None:
        """`patience`: seconds that a far end is borne that says nothing; `wait`: for the first connection (as the patience)."""
        super().__init__(f"carry-out {folder}", patience, wait)
        self._key, self._to = key, to
        self._transfer = blake3((transfer or folder.name).encode()).digest(keys.TRANSFER_ID)
        self._channels = tuple(channels)
        self._folder, self._made = folder, folder.with_name(f".{folder.name}.new")
        self._listeners: dict[str, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._inside, self._ours = -1, False

    def _open(self) -> None:
        """Raises SourceError."""
        try:
            _clear(self._made)
            self._made.mkdir(0o700)
            self._inside = os.open(self._made, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            for name in self._channels:
                listener = self._listeners[name] = socket.socket(socket.AF_UNIX)
                listener.bind(_reach(self._inside, name))
                os.chmod(name, 0o600, dir_fd=self._inside)
                listener.listen(_BACKLOG)
                listener.setblocking(False)
                self._selector.register(listener, selectors.EVENT_READ, name)
            _clear(self._folder)
            self._ours = True  # from here on what is there, if anything, is what we have made
            self._made.rename(self._folder)
        except OSError as error:
            raise SourceError(f"{self._name}: {error.strerror or error}; give a path for a folder that can be made") from None

    def _accept(self, seconds: float) -> None:
        for ready, _ in self._selector.select(seconds):
            listener, name = ready.fileobj, ready.data
            assert isinstance(listener, socket.socket)
            try:
                local, _ = listener.accept()
            except BlockingIOError:  # it was gone again
                continue
            if not self._begin(partial(self._call, name, local)):
                local.close()

    def _call(self, name: str, local: socket.socket) -> None:
        """Raises KeyRefused where the other end has another key; OSError, MigrationError where that stream comes to nothing."""
        with contextlib.closing(local):
            stream = wire.call(self._to, self._key, self._transfer)
            with contextlib.closing(stream):
                stream.send(Kind.CHANNEL, name.encode())
                kind, _, _, payload = stream.receive()
                if kind != Kind.CHANNEL or bytes(payload) != name.encode():
                    raise Refused(f"{name}: {bytes(payload[:TEXT_MOST]).decode(errors='replace')}")
                self._carry(local, stream)

    def close(self) -> None:
        """End every stream; the folder is no more."""
        super().close()
        self._selector.close()
        for name, listener in self._listeners.items():
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=self._inside)  # ours, whatever is under the folder's name by now
        self._listeners.clear()
        if self._inside >= 0:
            os.close(self._inside)
            self._inside = -1
            for place in (self._made, *([self._folder] if self._ours else [])):
                with contextlib.suppress(OSError):
                    place.rmdir()  # fails where another one has put its own there


class CarryIn(_End):
    """Takes streams of whoever has the key; each is connected with the socket that it names, in a folder in which other local processes listen."""

    def __init__(self, folder: Path, key: bytes, listen: tuple[str, int], channels: Sequence[str], *, patience: float = PATIENCE_S, wait: float | None = None) -> None:
        """`patience`: seconds that a far end is borne that says nothing; `wait`: for the first stream (as the patience). Raises DestinationError."""
        super().__init__(f"carry-in {folder}", patience, wait)
        self._folder, self._channels = folder, frozenset(channels)
        self._door = Door(key, listen, None)
        self.address = self._door.address

    def _accept(self, seconds: float) -> None:
        stream = self._door.stream(seconds)
        if stream is not None and not self._begin(partial(self._answer, stream)):
            stream.close()

    def _answer(self, stream: wire.Stream) -> None:
        """Raises OSError, MigrationError where that stream comes to nothing."""
        with contextlib.closing(stream):
            kind, _, _, payload = stream.receive()
            name = bytes(payload[:TEXT_MOST]).decode("ascii", "replace")
            if kind != Kind.CHANNEL or name not in self._channels:
                raise self._refuse(stream, f"a record of kind {kind} with {name[:32]!r} names none of the channels {', '.join(sorted(self._channels))}")
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as local:
                try:
                    self._connect(local, name)
                except OSError as error:
                    raise self._refuse(stream, f"nobody listens on socket {name} of {self._folder} ({error.strerror or error})") from None
                stream.send(Kind.CHANNEL, payload)
                self._carry(local, stream)

    def _connect(self, local: socket.socket, name: str) -> None:
        inside = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            local.settimeout(CONNECT_S)
            local.connect(_reach(inside, name))
        finally:
            os.close(inside)

    @staticmethod
    def _refuse(stream: wire.Stream, why: str) -> DestinationError:
        """The other end is told."""
        with contextlib.suppress(OSError):
            stream.send(Kind.REFUSED, why.encode()[:TEXT_MOST])
        return DestinationError(why)

    def close(self) -> None:
        """End every stream; nobody may come any more."""
        super().close()
        self._door.close()


def _reach(inside: int, name: str) -> str:
    """A path for bind and connect, which take 108 bytes: the folder's own may be longer."""
    return f"/proc/self/fd/{inside}/{name}"


def _clear(folder: Path) -> None:
    """Take away what an earlier one has left there. Raises SourceError where it is anything else; OSError."""
    try:
        inside = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        names = os.listdir(inside)
        for name in names:
            if not stat.S_ISSOCK(os.stat(name, dir_fd=inside, follow_symlinks=False).st_mode):
                raise SourceError(f"carry-out {folder}: there is something else than sockets in it ({name}); give another path, or remove it")
        for name in names:
            os.unlink(name, dir_fd=inside)
    finally:
        os.close(inside)
    folder.rmdir()
