"""The sending end: encoders fill a bounded queue, streams empty it, the ledger knows what is where. The source is only read."""

import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from . import choice, extents, keys, layout, wire
from .choice import LEARN_FROM
from .codecs import Coder
from .duplicates import PageIndex
from .errors import DeviceFailed, FormatError, HashMismatch, KeyRefused, MigrationError, Refused, TransferLost, Unauthentic
from .flow import STEP_S, Bounded, Meter, Pace, Streams
from .layout import EXTENT, HASH, PAGE, Page
from .ledger import Ledger
from .offload import Offload, by_processor, names_for
from .outlet import Line, Outlet, Ready
from .receiver import PATIENCE_S, STREAMS_MOST, TEXT_MOST
from .sources import FileSource
from .transforms import Facts
from .transforms.gpu import Gpu
from .wire import Kind

STREAMS_AT_FIRST = 2
"""One may wait for an acknowledgement while the other sends."""
RETRY_S = (0.05, 2.0)
"""Seconds between two attempts to connect, at first and at most; doubled, with jitter."""
STALL_S = 30.0
"""A stream on which nothing moved for so long is made anew: the other end, or what is between, vanished without a word."""
DRAIN_S = 5.0
"""Seconds in which what is on its way on a stream that is no longer needed should be acknowledged."""
FAREWELL_S = 5.0
"""Seconds in which a stream must be had for the farewell."""
HANDSHAKES_MOST = 5
"""Handshakes that may fail before the very first that succeeds: a damaged one is rare, another key fails every time."""


@dataclass(slots=True)
class Sent:
    """What came of it. Bytes are those of the sockets, headers and tags too."""

    root: bytes
    length: int
    seconds: float
    wire_bytes: int
    pages: dict[str, int]
    """By class, resends too."""
    coders: dict[str, int]
    """Extents by coder."""
    skipped: int
    """Extents that the destination held already."""
    resent: int
    streams: int
    """At the end."""
    cuts: int
    passes: int
    high_water: int
    """Bytes of the queue at its fullest."""
    transforms: str = "cpu"
    """What sorted out pages; and where a GPU failed meanwhile, how."""
    rates: dict[str, float] = field(default_factory=dict)
    """Bytes a second, as measured: scan and codecs on one thread, the wire altogether."""


class Sender:
    """Sends one object. `run` does all; `start`, `pass_over`, `commit` and `close` are its steps, for who moves a thing that lives."""

    def __init__(
        self, source: FileSource, key: bytes, address: tuple[str, int], *, transfer: str = "", base: FileSource | None = None, codecs: Sequence[str] = choice.FREE,
        threads: int = 0, streams: tuple[int, int] = (STREAMS_AT_FIRST, STREAMS_MOST), limit: float = 0.0, patience: float = PATIENCE_S, gpu: Gpu | None = None, references: bool = True,
    ) -> None:
        """`streams`: at first and at most; `limit`: bytes a second, 0: none; `gpu`: what sorts out pages, its ring with room for a base where there is one, and codes them where it has a coder; `references`: to equal pages in other extents. Raises DeviceFailed where `codecs` names
        a GPU's and there is none."""
        if not 1 <= streams[0] <= streams[1] <= STREAMS_MOST:
            raise ValueError(f"streams: {streams[0]} at first and {streams[1]} at most are not within 1 to {STREAMS_MOST}")
        self._source, self._key, self._address, self._base, self._patience = source, key, address, base, patience
        self._transfer = blake3((transfer or source.path.name).encode()).digest(keys.TRANSFER_ID)
        self._session = os.urandom(16)
        self._threads, self._threads_told = threads or max(1, os.cpu_count() or 1), bool(threads)
        coder = gpu.coder if gpu is not None else None
        self._model = choice.Model(self._threads, names_for(codecs, coder), limit=limit, processors=os.cpu_count() or 1)
        self._offload = Offload(coder, self._model) if coder is not None else None
        self._pace = Pace(limit)
        self._meter = Meter()
        self._streams = Streams(streams[1], streams[0])
        self._queue: Bounded[tuple[Ready, ...]] = Bounded()
        self._ledger = Ledger(source.extents)
        self._host = wire.host_id()
        self._gpu = gpu
        self.without_gpu: str | None = None
        """Why the GPU that was given is not used any more."""
        self._references = references
        self._index: PageIndex | None = None
        self._base_root = wire.NOTHING
        self._base_there = False
        self._stop = threading.Event()
        self._stops: list[threading.Event] = []
        self._workers: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._live: dict[int, Line] = {}
        self._committed: bytes | None = None
        self.asked = False
        """The destination was asked to commit: only its answer tells whether it has."""
        self._committing = threading.Event()
        self._last_live = time.monotonic()
        self._pages = [0] * len(Page)
        self._moved = 0
        self._coders: Counter[str] = Counter()
        self._skipped = self._resent = self._cuts = self._passes = self._numbers = 0
        self._began = time.monotonic()

    # The steps.

    def run(self) -> Sent:
        """Everything, for a source that is still. Raises MigrationError."""
        try:
            self.start()
            if not self.committed:
                self.pass_over()
            return self.commit()
        finally:
            self.close()

    def start(self) -> None:
        """Connect, learn what is there already, and start the threads."""
        if self._base is not None:
            self._base_root = self._base.root(self._threads)
        stream = self._connect_patiently()
        if self._committed is not None:
            root = self._source.root(self._threads)
            try:
                if root == self._committed:
                    stream.send(Kind.BYE)
            except OSError:
                pass
            stream.close()
            if root != self._committed:
                raise Refused("the destination has committed another state under this transfer's name; give another --transfer")
            return
        if self._model.shared and not self._threads_told:
            # The other end wants as many: of more here, each takes the interpreter from another.
            self._threads = self._model.threads = max(1, self._threads // 2)
        for n in range(self._threads):
            self._spawn(self._encode, f"encode-{n}")
        self._add_stream(stream)
        while len(self._stops) < self._streams.count:
            self._add_stream(None)

    @property
    def committed(self) -> bool:
        """The destination has said so."""
        return self._committed is not None

    @property
    def length(self) -> int:
        """Bytes of the source."""
        return self._source.length

    def moved(self) -> tuple[int, int]:
        """So far, with what was sent again: bytes of the source in the extents that went out, and in those of their pages that were not zero."""
        with self._lock:
            return self._moved, PAGE * (sum(self._pages) - self._pages[Page.ZERO])

    def held(self) -> bytes:
        """Raw hashes of all extents as the destination has them, after a pass over all of them."""
        known = self._ledger.known
        return b"".join(known[index] for index in range(self._source.extents))

    def progress(self) -> dict[str, int]:
        """How far it is: bytes of the source that are dealt with, in all passes, and on the wire."""
        with self._lock:
            return {"moved_bytes": self._moved + EXTENT * self._skipped, "wire_bytes": self._meter.bytes, "length": self._source.length, "passes": self._passes}

    def survey(self) -> list[int]:
        """The extents that the destination does not hold as they are now: a read of the whole."""
        hashes = self._source.hashes(self._threads)
        known = self._ledger.known
        return [index for index in range(self._source.extents) if known.get(index) != hashes[index * HASH : (index + 1) * HASH]]

    def pass_over(self, which: Sequence[int] | None = None, deadline: float = math.inf) -> None:
        """Bring those extents, or all, that the destination does not hold as they are now; returns when all are acknowledged. Raises TransferLost at the deadline (monotonic)."""
        self._passes += 1
        self._ledger.begin(range(self._source.extents) if which is None else which)
        looked, sent, busy = time.monotonic(), self._meter.bytes, self._meter.busy
        while not self._ledger.wait(STEP_S):
            now = time.monotonic()
            if now > deadline:
                raise TransferLost(f"send to {self._address[0]}:{self._address[1]}: the last pass, with the writer paused, was not done in time")
            with self._lock:
                if self._live:
                    self._last_live = now
            if now - self._last_live > self._patience:
                raise TransferLost(f"send to {self._address[0]}:{self._address[1]}: out of reach for {self._patience:g} s; run it again, what has arrived is kept")
            if now - looked >= STEP_S:
                count = self._streams.look((self._meter.bytes - sent) / (now - looked), (self._meter.busy - busy) / (now - looked))
                looked, sent, busy = now, self._meter.bytes, self._meter.busy
                self._resize(count)

    def commit(self, deadline: float = math.inf) -> Sent:
        """Let the destination become visible; returns once it is. Raises TransferLost where it cannot even be asked before the deadline (monotonic)."""
        root = self._committed
        if root is None:
            root = layout.root_of(self._source.length, self.held())
            self._commit(root, deadline)
        seconds = time.monotonic() - self._began
        rates = {"wire": self._model.wire.value, "scan": 1 / self._model.scan.value}
        rates.update({name: 1 / mean.value for name, mean in self._model.seconds.items() if mean.known})
        rates.update({f"{name} there": 1 / mean.value for name, mean in self._model.undo.items() if mean.known})
        rates.update({"ship": 1 / self._model.ship.value, "take there": 1 / self._model.take.value})
        rates.update({f"{name} on the gpu": 1 / mean.value for name, mean in self._model.on_device.items() if mean.known})
        transforms = "cpu" if self._gpu is None else self._gpu.name if self.without_gpu is None else f"{self._gpu.name}, then cpu: {self.without_gpu}"
        if self._offload is not None:
            transforms += f"; {self._offload.name}"
        return Sent(
            root, self._source.length, seconds, self._meter.bytes, {kind.name.lower(): self._pages[kind] for kind in Page}, dict(self._coders), self._skipped, self._resent,
            self._streams.count, self._cuts, self._passes, self._queue.peak, transforms, {name: round(rate / 1e9, 3) for name, rate in rates.items()},
        )

    def _commit(self, root: bytes, deadline: float) -> None:
        end = time.monotonic() + self._patience
        while time.monotonic() < (end if self.asked else min(end, deadline)):
            with self._lock:
                stream = next((line.stream for line in self._live.values()), None)
            if stream is None:
                # Streams reconnect by themselves, and learn by the way whether it was committed.
                self._committing.wait(RETRY_S[0])
            else:
                try:
                    self.asked = True  # from here on it may be committed, whatever is heard
                    stream.send(Kind.COMMIT, root)
                    self._committing.wait(1.0)
                except OSError:
                    pass
            self._ledger.wait(0)  # raises what went wrong
            if self._committed is not None:
                if self._committed != root:
                    raise HashMismatch("commit: the destination committed another root")
                self._farewell()
                return
        raise TransferLost(f"send to {self._address[0]}:{self._address[1]}: no answer to the commit; run it again to learn whether it took place")

    def _farewell(self) -> None:
        """Spare the receiver its wait for our question; it does without, if need be."""
        end = time.monotonic() + FAREWELL_S
        while time.monotonic() < end:
            with self._lock:
                stream = next((line.stream for line in self._live.values()), None)
            if stream is not None:
                try:
                    stream.send(Kind.BYE)
                    return
                except OSError:
                    pass
            self._stop.wait(RETRY_S[0])

    def abandon(self, error: MigrationError) -> None:
        """End what goes on with this, from another thread."""
        self._ledger.fail(error)
        self._stop.set()

    def close(self) -> None:
        """End every thread and stream."""
        self._stop.set()
        self._ledger.close()
        self._queue.close()
        for stop in self._stops:
            stop.set()
        with self._lock:
            streams = [line.stream for line in self._live.values()]
        for stream in streams:
            stream.close()
        for worker in self._workers:
            worker.join()

    # Threads.

    def _spawn(self, target: Callable[..., None], name: str, *arguments: object) -> None:
        def guarded() -> None:
            try:
                target(*arguments)
            except MigrationError as error:
                self._ledger.fail(error)
            except Exception as error:  # a fault of ours ends the transfer, never hangs it
                self._ledger.fail(MigrationError(f"send: {type(error).__name__}: {error}"))

        worker = threading.Thread(target=guarded, daemon=True, name=name)
        self._workers.append(worker)
        worker.start()

    def _encode(self) -> None:
        """Take extents, encode them, queue them."""
        outlet = Outlet(self._pass_on)
        if self._gpu is not None:
            self._encode_batches(self._gpu, outlet)
        scratch, base_scratch = memoryview(bytearray(EXTENT)), memoryview(bytearray(EXTENT))
        while True:
            index = self._ledger.take(wait=not outlet.waits())
            if index is None:
                if not outlet.waits() or not outlet.flush():
                    return
                continue
            began = time.thread_time()
            data = self._read(index, scratch, outlet)
            if data is not None and not self._one(index, data, self._read_base(index, base_scratch), began, None, outlet):
                return

    def _encode_batches(self, gpu: Gpu, outlet: Outlet) -> None:
        """The same, a batch at a time whose facts the GPU finds; until the end, or until it fails and the processors go on with what was taken."""
        while self.without_gpu is None:
            with gpu.slot() as slot:
                indices = self._ledger.take_several(gpu.batch)
                if not indices:
                    return
                began = time.thread_time()
                held: list[tuple[int, memoryview, memoryview | None]] = []
                for index in indices:
                    where = slot.extent(len(held))
                    data = self._read(index, where, outlet)
                    if data is not None:
                        where[len(data) : layout.pages_of(len(data)) * PAGE] = bytes(-len(data) % PAGE)
                        held.append((index, data, self._read_base(index, slot.extent_of_base(len(held))) if slot.base is not None else None))
                if not held:
                    outlet.flush()
                    continue
                facts: Sequence[Facts | None]
                try:
                    facts = gpu.scan_batch(slot, [len(data) for _, data, _ in held], [0 if base is None else len(base) for _, _, base in held])
                except DeviceFailed as error:
                    self.without_gpu, facts = str(error), [None] * len(held)
                    if self._offload is not None:
                        self._offload.leave("the GPU is not used any more")
                began = (time.thread_time() - began) / len(held)
                if self._offload is not None and self._offload.failed is None:
                    if not self._offload.encode(slot, held, facts, began, self._effort, outlet.put):
                        return
                    outlet.flush()
                    continue
                for (index, data, base), found in zip(held, facts, strict=True):
                    if not self._one(index, data, base, time.thread_time() - began, found, outlet):
                        return
                outlet.flush()

    def _read(self, index: int, into: memoryview, outlet: Outlet) -> memoryview | None:
        """The bytes of an extent; None where there is nothing to be coded: it is a hole, or the destination holds it."""
        known = self._ledger.known.get(index)
        if self._source.hole(index):
            size = layout.extent_length(self._source.length, index)
            if known == layout.zero_hash(size):
                self._hold(index)
            else:
                outlet.put(Ready(index, extents.zero(index, size, sealed=True)))
            return None
        data = self._source.read(index, into)
        if known is not None and extents.raw_hash(data) == known:
            self._hold(index)
            return None
        return data

    def _page(self, number: int) -> bytes:
        """One page of the source as it is now; empty where it cannot be had."""
        try:
            return self._source.page(number) or b""
        except OSError:
            return b""

    def _elsewhere(self) -> PageIndex | None:
        """What pages may refer to; made when it is first asked for."""
        if self._index is None and self._references:
            with self._lock:
                if self._index is None:
                    self._index = PageIndex(layout.pages_of(self._source.length), self._page, self._ledger.known.__contains__)
        return self._index

    def _read_base(self, index: int, into: memoryview) -> memoryview | None:
        if self._base is None or not self._base_there or index in self._ledger.plain or index >= self._base.extents:
            return None
        base = self._base.read(index, into)
        rest = -len(base) % PAGE
        into[len(base) : len(base) + rest] = bytes(rest)
        return base

    def _effort(self, index: int) -> tuple[bool, PageIndex | None]:
        """Whether to look for what need not be sent, and what pages may refer to."""
        thorough = self._model.wire_binds(EXTENT, EXTENT)
        return thorough, self._elsewhere() if thorough and index not in self._ledger.plain else None

    def _one(self, index: int, data: memoryview, base: memoryview | None, began: float, facts: Facts | None, outlet: Outlet) -> bool:
        """Encode and queue an extent, the work on which began at that processor time of this thread; False once closed."""
        guess, chosen_at = 1.0, 0.0

        def choose(plain: memoryview) -> Coder:
            nonlocal guess, chosen_at
            self._model.scanned(len(data), time.thread_time() - began)
            guess = choice.guess_of(plain)
            coder = self._model.choose(len(data), len(plain), guess)
            if self._offload is not None:  # which has failed
                coder = by_processor(coder)
            chosen_at = time.thread_time()
            return coder

        thorough, elsewhere = self._effort(index)
        encoded = extents.encode(index, data, choose, base=base, facts=facts, elsewhere=elsewhere, sealed=True, thorough=thorough)
        if encoded.plain >= LEARN_FROM:
            self._model.coded(encoded.coder, encoded.plain, encoded.coded, time.thread_time() - chosen_at, guess)
        return outlet.put(Ready(index, encoded))

    def _hold(self, index: int) -> None:
        with self._lock:
            self._skipped += 1
        self._ledger.held(index)

    def _send(self, number: int, stop: threading.Event, stream: wire.Stream | None) -> None:
        """One stream's life: connect, send what comes next, connect again when it was cut."""
        while not stop.is_set():
            try:
                stream = stream or self._connect_patiently(stop)
            except TransferLost:
                if stop.is_set():
                    return
                raise
            with self._lock:
                if stop.is_set():
                    stream.close()
                    return
                line = self._live[number] = Line(number, stream, stop)
                self._last_live = time.monotonic()
            cut = line.cut
            reader = threading.Thread(target=self._acks, args=(stream, number, cut, stop), daemon=True, name=f"acks-{number}")
            reader.start()
            while not stop.is_set() and not cut.is_set():
                together = self._queue.get(cut)
                if together is None:
                    break
                if stop.is_set() and not self._stop.is_set():
                    for ready in together:
                        self._ledger.back(ready.index)
                    break
                with line.busy:
                    self._put_out(line, together)
            if stop.is_set() and not cut.is_set():
                self._ledger.drain(number, DRAIN_S)
            stream.close()  # what was on its way still is sent once more by another
            reader.join()
            with line.busy, self._lock:  # an encoder that was sending on it has given up by now, and none begins
                self._live.pop(number, None)
                self._last_live = time.monotonic()
                if not stop.is_set():
                    self._cuts += 1
                self._resent += self._ledger.lost(number)
            stream = None
            if self._committed is not None:
                return

    def _pass_on(self, together: tuple[Ready, ...], size: int) -> bool:
        """Send what was encoded on this very thread where a stream is idle, which spares handing it over; queue it for the streams' threads where none is. False once closed."""
        if self._queue.empty() and self._pace.open(time.monotonic()):
            with self._lock:
                line = next((line for line in self._live.values() if not line.stop.is_set() and not line.cut.is_set() and line.busy.acquire(blocking=False)), None)
            if line is not None:
                try:
                    self._put_out(line, together)
                finally:
                    line.busy.release()
                return True
        return self._queue.put(together, size)

    def _put_out(self, line: Line, together: tuple[Ready, ...]) -> None:
        """Send on a stream that is held, and is among the live ones."""
        wait = self._pace.due(sum(len(ready.encoded.data) for ready in together), time.monotonic())
        if wait:
            self._stop.wait(wait)
        attempts = [
            self._ledger.sent(ready.index, line.number, ready.encoded.raw_hash, ready.encoded.coder, ready.encoded.plain, len(ready.encoded.data)) for ready in together
        ]
        self._meter.start()
        began, size = time.thread_time(), 0
        try:
            if len(together) == 1:
                size = line.stream.send(Kind.EXTENT, together[0].encoded.data, together[0].index, attempts[0])
            else:
                size = line.stream.send(Kind.EXTENTS, wire.grouped([(attempt, ready.encoded.data) for attempt, ready in zip(attempts, together, strict=True)]))
        except OSError:
            line.cut.set()  # the ledger gives it to another stream
            self._queue.wake()
        finally:
            found = self._meter.stop(size)
        with self._lock:
            for ready in together:
                for kind, count in enumerate(ready.encoded.counts):
                    self._pages[kind] += count
                self._coders[ready.encoded.coder] += 1
                self._moved += layout.extent_length(self._source.length, ready.index)
        if found is not None:
            self._model.sent(*found)
        if size >= LEARN_FROM:
            self._model.shipped(size, time.thread_time() - began)

    def _acks(self, stream: wire.Stream, number: int, cut: threading.Event, stop: threading.Event) -> None:
        """What the receiver says on a stream, until it ends."""
        try:
            while True:
                kind, index, attempt, payload = stream.receive()
                if kind == Kind.ACK and len(payload) % wire.ACK.size == 0:
                    for acknowledged, of, taking, undoing in wire.ACK.iter_unpack(payload):
                        flight = self._ledger.acked(acknowledged, of)
                        if flight is not None:
                            self._model.taken_there(flight.coder, flight.size, flight.plain, taking / 1e6, undoing / 1e6)
                elif kind == Kind.NAK:
                    self._ledger.refused(index, attempt)
                elif kind == Kind.COMMITTED:
                    self._committed = bytes(payload)
                    self._committing.set()
                elif kind == Kind.REFUSED:
                    raise Refused(f"the destination refuses: {bytes(payload[:TEXT_MOST]).decode(errors='replace')}")
                else:
                    raise FormatError(f"stream: a record of kind {kind} is not for a sender")
        except (OSError, Unauthentic, FormatError):
            pass  # given up; another stream takes its place, with keys of its own
        except MigrationError as error:
            self._ledger.fail(error)
        finally:
            cut.set()
            self._queue.wake()

    # Connections.

    def _add_stream(self, stream: wire.Stream | None) -> None:
        stop = threading.Event()
        self._stops.append(stop)
        self._numbers += 1
        self._spawn(self._send, f"stream-{self._numbers}", self._numbers, stop, stream)

    def _resize(self, count: int) -> None:
        """So many streams."""
        while len(self._stops) < count:
            self._add_stream(None)
        while len(self._stops) > count:
            self._stops.pop().set()
            self._queue.wake()

    def _connect(self) -> wire.Stream:
        """One stream, opened: raises OSError where it cannot be had now, MigrationError where it never will."""
        stream = wire.call(self._address, self._key, self._transfer)
        try:
            stream.send(Kind.OPEN, wire.OPEN.pack(self._session, self._source.length, self._base_root))
            first = not self._live
            while True:
                kind, start, _, payload = stream.receive()
                if kind == Kind.ACCEPT and len(payload) == wire.ACCEPT.size:
                    there, committed, host, processors = wire.ACCEPT.unpack(payload)
                    self._base_there = bool(there)
                    self._model.there, self._model.shared = max(1, processors), host == self._host
                    if committed != wire.NOTHING:
                        self._committed = committed
                        self._committing.set()
                elif kind == Kind.CLAIMS and not len(payload):
                    break
                elif kind == Kind.CLAIMS and len(payload) % HASH == 0:
                    if first and self._passes == 0:
                        self._learn(start, bytes(payload))
                elif kind == Kind.REFUSED:
                    raise Refused(f"the destination refuses: {bytes(payload[:TEXT_MOST]).decode(errors='replace')}")
                else:
                    raise FormatError("stream: the destination's first records are not understood")
            stream.timeout(min(STALL_S, self._patience / 2))
        except BaseException:
            stream.close()
            raise
        return stream

    def _learn(self, start: int, claims: bytes) -> None:
        for n in range(len(claims) // HASH):
            claim = claims[n * HASH : (n + 1) * HASH]
            if claim != wire.NOTHING and start + n < self._source.extents:
                self._ledger.known[start + n] = claim

    def _connect_patiently(self, stop: threading.Event | None = None) -> wire.Stream:
        """Until it can be had, for as long as the patience lasts."""
        began, wait, failed = time.monotonic(), RETRY_S[0], 0
        stop = stop or self._stop
        while True:
            try:
                return self._connect()
            except (OSError, Unauthentic, KeyRefused) as error:
                failed += isinstance(error, KeyRefused)
                if failed >= HANDSHAKES_MOST and not self._passes:
                    raise
                if time.monotonic() - began > self._patience or stop.is_set():
                    raise TransferLost(f"send to {self._address[0]}:{self._address[1]}: out of reach for {self._patience:g} s ({error}); run it again, what has arrived is kept") from None
            stop.wait(wait * (0.5 + random.random()))
            wait = min(RETRY_S[1], wait * 2)
