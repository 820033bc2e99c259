"""The receiving end: takes streams of whoever has the key, decodes, writes, acknowledges, and commits once the root hash agrees."""

import contextlib
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from . import extents, keys, layout, wire
from .errors import BaseMismatch, DestinationError, FormatError, HashMismatch, KeyRefused, MigrationError, TransferLost, Unauthentic
from .layout import EXTENT, HASH
from .sinks import FileSink
from .sources import FileSource
from .wire import Kind

STREAMS_MOST = 8
"""Streams of one transfer: beyond, no published measurement gains."""
CONNECTIONS_MOST = 2 * STREAMS_MOST
"""Connections at once, those that still shake hands and those of a sender that is gone but not yet noticed too."""
PATIENCE_S = 60.0
"""Without any stream for so long, a receiver gives up; what has arrived is kept for the next one."""
IDLE_S = 120.0
"""A stream without a record for so long is dead: the sender's machine vanished without a word."""
SESSIONS_MOST = 1000
"""Senders, one after the other, that may take a transfer over: each is remembered, so that an old one that wakes is sent away."""
TEXT_MOST = 1024
"""Bytes of a refusal's text."""
FAREWELL_S = 5.0
"""After a commit, without any stream for so long, nobody will ask any more; whoever does later asks the next receiver, which reads it in the journal."""
ACKS_MOST = 8
"""Acknowledgements that wait for each other while there is more to take: a record for each would cost both ends more than many an extent. A group of small extents comes on top."""
_LOCKS = 64
"""Extents are kept apart by so many locks: well over the number of streams."""


@dataclass(slots=True)
class Received:
    """What came of it."""

    root: bytes
    length: int
    records: int
    wire_bytes: int
    refused: int
    """Connections and records that were refused."""


class Receiver:
    """Receives one object. `serve` blocks until it is committed and the sender knows, or raises."""

    def __init__(self, path: Path, key: bytes, listen: tuple[str, int], *, bases: Path | None = None, replace: bool = False, patience: float = PATIENCE_S) -> None:
        self._path, self._key, self._bases, self._replace, self._patience = path, key, bases, replace, patience
        if path.exists() and not path.is_file():
            raise DestinationError(f"destination {path}: it is no regular file; give a path for one")
        try:
            self._listener = socket.create_server(listen, backlog=CONNECTIONS_MOST)
        except OSError as error:
            raise DestinationError(f"listen {listen[0]}:{listen[1]}: {error.strerror or error}; give another address") from None
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._host = wire.host_id()
        self._state = threading.Condition()
        self._opening = threading.Lock()
        self._sink: FileSink | None = None
        self._base: FileSource | None = None
        self._session = b""
        self._past: set[bytes] = set()
        self._streams: dict[wire.Stream, threading.Thread] = {}
        self._threads: set[threading.Thread] = set()
        self._closed = False
        self._attempts: dict[int, int] = {}
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._failure: MigrationError | None = None
        self._root: bytes | None = None
        self._done = False
        self._last_seen = time.monotonic()
        self._records = self._wire_bytes = self._refused = 0

    def serve(self) -> Received:
        """Raises a MigrationError; the destination is then absent (or the one that was there before), and what has arrived stays beside it."""
        accepting = threading.Thread(target=self._accept, daemon=True, name="accept")
        accepting.start()
        try:
            with self._state:
                while not self._done and self._failure is None:
                    quiet, patience = time.monotonic() - self._last_seen, self._patience if self._root is None else min(self._patience, FAREWELL_S)
                    if not self._streams and quiet >= patience:
                        if self._root is not None:
                            break  # the sender's farewell was lost, and the journal stays for its question
                        raise TransferLost(f"receive {self._path}: no sender for {self._patience:g} s; start both again, what has arrived is kept")
                    self._state.wait(max(0.05, patience - quiet) if not self._streams else 1.0)
                if self._failure is not None:
                    raise self._failure
            assert self._sink is not None
            if self._done:
                self._sink.forget()
            return Received(self._root or b"", self._sink.length, self._records, self._wire_bytes, self._refused)
        finally:
            self.close()
            accepting.join()

    def abandon(self, error: MigrationError) -> None:
        """End `serve` with this, from another thread."""
        with self._state:
            self._failure = self._failure or error
            self._state.notify_all()

    def close(self) -> None:
        """End every stream and give the files free."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._state:
            self._closed = True  # no stream is opened after this
            streams, threads = list(self._streams), list(self._threads)
        for stream in streams:
            stream.close()
        for thread in threads:
            thread.join()
        if self._sink is not None:
            self._sink.close()
        if self._base is not None:
            self._base.close()
            self._base = None

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._state:
                full = len(self._threads) >= CONNECTIONS_MOST or self._closed
                if full:
                    self._refused += 1
                else:
                    thread = threading.Thread(target=self._connection, args=(sock,), daemon=True, name="stream")
                    self._threads.add(thread)
                    thread.start()
            if full:
                sock.close()

    def _connection(self, sock: socket.socket) -> None:
        """One connection from hello to end; whatever comes of it stays within it, other than a full destination."""
        stream: wire.Stream | None = None
        try:
            stream, transfer = wire.answer(sock, self._key)
            stream.timeout(min(IDLE_S, max(self._patience, 1.0)))
            self._open(stream, transfer)
            self._take(stream)
        except (KeyRefused, Unauthentic):
            with self._state:
                self._refused += 1
        except FormatError as error:  # from one who has the key: a fault at the other end, which sending again does not cure
            self._tell(stream, error)
            with self._state:
                self._refused += 1
        except (DestinationError, HashMismatch) as error:
            self._tell(stream, error)
            with self._state:
                self._failure = self._failure or error
        except OSError:
            pass  # the stream is gone; the sender brings what was on its way on another
        finally:
            if stream is not None:
                stream.close()
            else:
                sock.close()
            with self._state:
                self._threads.discard(threading.current_thread())
                self._last_seen = time.monotonic()
                if stream is not None:
                    self._streams.pop(stream, None)
                self._state.notify_all()

    @staticmethod
    def _tell(stream: wire.Stream | None, error: MigrationError) -> None:
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.send(Kind.REFUSED, str(error).encode()[:TEXT_MOST])

    def _open(self, stream: wire.Stream, transfer: bytes) -> None:
        """The sender's first record: which object, which session. A new session takes over, an old one is sent away."""
        kind, _, _, payload = stream.receive()
        if kind != Kind.OPEN or len(payload) != wire.OPEN.size:
            raise FormatError("stream: its first record does not open a transfer")
        session, length, base_root = wire.OPEN.unpack(payload)
        with self._opening:
            self._take_over(session)
            with self._state:
                if self._sink is None:
                    self._sink = FileSink(self._path, transfer, length, replace=self._replace)
                    self._root = self._sink.committed
                elif (self._sink.transfer, self._sink.length) != (transfer, length):
                    raise FormatError("this receiver has begun another transfer; start one for each")
                if self._base is None and base_root != wire.NOTHING and self._bases is not None:
                    with contextlib.suppress(MigrationError):
                        self._base = FileSource(self._bases / base_root.hex())
                self._streams[stream] = threading.current_thread()
                sink, base, root = self._sink, self._base, self._root
        stream.send(Kind.ACCEPT, wire.ACCEPT.pack(base is not None, root or wire.NOTHING, self._host, min(os.cpu_count() or 1, 0xFFFF)))
        for first in range(0, sink.extents if root is None else 0, wire.CLAIMS_MAX):
            claims = bytes(sink.hashes[first * HASH : (first + wire.CLAIMS_MAX) * HASH])
            if any(claims):
                stream.send(Kind.CLAIMS, claims, first)
        stream.send(Kind.CLAIMS)

    def _take_over(self, session: bytes) -> None:
        """End the streams that a stream of this session displaces: those of an older one, or the oldest of too many, which are dead and not yet noticed."""
        with self._state:
            if self._closed:
                raise ConnectionAbortedError("this receiver ends")
            if session in self._past:
                raise FormatError("another sender took this transfer over")
            if self._done:
                raise FormatError("this receiver has done its transfer; start another")
            displaced = list(self._streams.items())
            if session == self._session:
                displaced = displaced[: max(0, len(displaced) + 1 - STREAMS_MOST)]
            elif len(self._past) >= SESSIONS_MOST:
                raise FormatError(f"more than {SESSIONS_MOST} senders have begun this transfer; start another receiver")
        for old, thread in displaced:
            old.close()
            thread.join()  # nothing of an older session is written after this
        with self._state:
            if session != self._session:
                self._past.add(self._session)
                self._session, self._attempts = session, {}

    def _take(self, stream: wire.Stream) -> None:
        """Records until the farewell."""
        assert self._sink is not None
        sink = self._sink
        scratch, base_scratch, acks = memoryview(bytearray(EXTENT)), memoryview(bytearray(EXTENT)), bytearray()
        while True:
            if acks and (len(acks) >= ACKS_MOST * wire.ACK.size or not stream.waits()):
                stream.send(Kind.ACK, bytes(acks))
                acks.clear()
            began = time.thread_time()
            kind, index, attempt, payload = stream.receive()
            with self._state:
                self._records += 1
                self._wire_bytes += wire.RECORD.size + len(payload) + keys.TAG
            if kind == Kind.EXTENT:
                acks += self._extent(stream, sink, index, attempt, payload, scratch, base_scratch, began)
            elif kind == Kind.EXTENTS:
                for attempt, encoded in wire.ungrouped(payload):
                    index = layout.index_of(encoded)
                    acks += self._extent(stream, sink, index, attempt, encoded, scratch, base_scratch, began)
                    began = time.thread_time()
            elif kind == Kind.COMMIT and len(payload) == HASH:
                with self._state:
                    sink.commit(bytes(payload))
                    self._root = sink.committed
                stream.send(Kind.COMMITTED, bytes(payload))
            elif kind == Kind.BYE:
                with self._state:
                    self._done = self._root is not None
                return
            elif kind == Kind.REFUSED:
                raise DestinationError(f"the sender gave up: {bytes(payload[:TEXT_MOST]).decode(errors='replace')}")
            else:
                raise FormatError(f"stream: a record of kind {kind} is not for a receiver")

    def _extent(
        self, stream: wire.Stream, sink: FileSink, index: int, attempt: int, payload: memoryview, scratch: memoryview, base_scratch: memoryview, began: float
    ) -> bytes:
        """Decode and write one: its acknowledgement, or nothing where it was asked for without references."""
        extent = layout.unpack(payload, sealed=True)
        taken = decoded = time.thread_time()
        if extent.index != index or index >= sink.extents or extent.raw_length != layout.extent_length(sink.length, index) or self._root is not None:
            raise FormatError(f"extent {index}: it is not of this object, or of another place in it")
        with self._locks[index % _LOCKS]:
            if attempt > self._attempts.get(index, 0):
                base = None
                if self._base is not None and index < self._base.extents:
                    base = self._base.read(index, base_scratch)
                try:
                    raw = extents.decoded(extent, scratch, base=base, page_at=sink.page, base_at=self._base.page if self._base is not None else None)
                except BaseMismatch:
                    stream.send(Kind.NAK, b"", index, attempt)
                    return b""
                decoded = time.thread_time()
                sink.write(index, raw, extent.raw_hash, extent.classes)
                self._attempts[index] = attempt
        return wire.ACK.pack(index, attempt, _microseconds(taken - began), _microseconds(decoded - taken))


def _microseconds(seconds: float) -> int:
    return min(0xFFFFFFFF, max(0, int(seconds * 1e6)))


def add_base(path: Path, bases: Path, threads: int) -> bytes:
    """Keep a copy of a file as a base under its root hash; the root. Raises MigrationError."""
    source = FileSource(path)
    try:
        root = source.root(threads)
        target = bases / root.hex()
        part = target.with_suffix(f".{os.getpid()}.part")
        try:
            bases.mkdir(parents=True, exist_ok=True)
            scratch = memoryview(bytearray(EXTENT))
            hashes = bytearray()
            with part.open("wb") as out:
                for index in range(source.extents):
                    data = source.read(index, scratch)
                    hashes += extents.raw_hash(data)
                    if source.hole(index):
                        out.seek(len(data), os.SEEK_CUR)
                    else:
                        out.write(data)
                out.truncate(source.length)
            if layout.root_of(source.length, hashes) != root:
                raise HashMismatch(f"base {path}: it changed while it was copied; keep it still and run it again")
            part.rename(target)
        except OSError as error:
            raise DestinationError(f"base {target}: {error.strerror or error}") from None
        finally:
            part.unlink(missing_ok=True)
        return root
    finally:
        source.close()
