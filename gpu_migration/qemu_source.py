"""The sending end of a guest that moves while it runs: its memory as an object, then the pages written meanwhile until few are left, then it is stopped, the last pages and QEMU's own device state
follow, and the target is asked to take it over.

Until that question nothing is lost: whatever fails, the guest runs on here, also where this process is killed (`guard`). From the question on only the target's answer tells whose the guest is. It is
written down before it is asked (a journal beside QEMU's control socket), so that whoever runs this again asks before anything else.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np
from blake3 import blake3

from . import choice, dirty, keys, patches, qemu_guest, wire
from .codecs import Coder
from .convergence import CEILING_S, STALL_S, Control, Limits, Next, Pass
from .errors import KeyRefused, MigrationError, NotConverged, Refused, SourceError, TransferLost, Unauthentic, Undecided
from .layout import PAGE
from .precopy import limits_for
from .qemu_qmp import QemuError, Qmp
from .receiver import PATIENCE_S, STREAMS_MOST, TEXT_MOST
from .sender import RETRY_S, STREAMS_AT_FIRST, Sender
from .sources import FileSource
from .wire import Kind

TRANSFER = blake3(b"novacron guest 1").digest(keys.TRANSFER_ID)
"""Name of the stream by which both ends agree; the memory's is another."""
FIRST_S = 0.01
"""Seconds that the last pages may take at first: what a guest at rest leaves goes in less, and it keeps the whole standstill near what stopping and starting it cost anyway."""
STEPS, COOL_DOWN_S = 40, 1.0
"""Raises of what the last pages may take, and seconds between two: finer than for a writer that is paused by a command, as a pass takes milliseconds here."""
SHRINK = 0.7
"""Share to which another pass must have brought what remains to be worth one more, once the guest might be stopped: a pass over little takes milliseconds, and so leaves less."""
FEW = 64
"""Pages below which it does not matter: they go in a millisecond."""
LEARN_FROM = 1 << 18
"""Bytes coded at once from which the time that it took says something of the coder."""
GUARD_S = 20.0
"""Seconds for the guard to start: an interpreter, on a busy machine."""


class Step(StrEnum):
    """Where a move is, as `progress` is told: before that step is taken."""

    MEMORY = "memory"
    LIVE = "live"
    PASSES = "passes"
    STOPPING = "stopping"
    PAGES = "pages"
    STATE = "state"
    LOADED = "loaded"
    ASKING = "asking"
    ASKED = "asked"
    TAKEN = "taken"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Options:
    """How a guest is moved. `track`: auto, protect or hash; `verify`: compare the whole memory at both ends while it stands still."""

    codecs: Sequence[str] = choice.FREE
    streams: int = STREAMS_MOST
    limit: float = 0.0
    """Bytes a second; 0: none."""
    patience: float = PATIENCE_S
    first: float = FIRST_S
    ceiling: float = CEILING_S
    stall: float = STALL_S
    track: str = "auto"
    verify: bool = False
    leave: bool = False
    """QEMU is left where it is, stopped, after the target has the guest; else it is ended."""
    progress: Callable[[Step], None] = field(default=lambda step: None)
    lose: Callable[[dirty.Numbers], dirty.Numbers] = field(default=lambda pages: pages)
    """For tests: takes pages out of what was found written, as a tracker would that is wrong."""


@dataclass(slots=True)
class Moved:
    """What came of it. Seconds and bytes."""

    length: int
    total_s: float = 0.0
    downtime_s: float = 0.0
    """From before the guest was asked to stop until the target had said that it runs there."""
    stopped_at: float = 0.0
    running_at: float = 0.0
    """By the clocks of the two ends, since 1970."""
    passes: int = 0
    memory_s: float = 0.0
    memory_bytes: int = 0
    """On the wire, for the whole memory while it ran."""
    pages: int = 0
    """Sent after that."""
    pages_bytes: int = 0
    last_pages: int = 0
    """Sent while it stood still."""
    state_bytes: int = 0
    tracker: str = ""
    look_s: float = 0.0
    """For one look at what was written, on average."""
    implied_s: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)
    """Of the downtime."""
    earlier: bool = False
    """An earlier run had moved it and had not heard of it."""


class Journal:
    """That the target was asked, whose the guest is therefore not known here."""

    def __init__(self, control: Path) -> None:
        self.path = control.with_name(control.name + ".moving")

    def read(self) -> tuple[bytes, tuple[str, int]] | None:
        """Session and target; None where nothing is open. Raises SourceError."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SourceError(f"journal {self.path}: {error.strerror or error}") from None
        try:
            found = json.loads(text)
            session = bytes.fromhex(found["session"])
            if len(session) == wire.SESSION:
                return session, (str(found["host"]), int(found["port"]))
        except (ValueError, KeyError, TypeError):
            pass
        raise SourceError(f"journal {self.path}: it cannot be read; find out whether the guest runs at its target, then remove it")

    def write(self, session: bytes, address: tuple[str, int]) -> None:
        part = self.path.with_name(self.path.name + ".part")
        try:
            with part.open("w") as file:
                json.dump({"session": session.hex(), "host": address[0], "port": address[1]}, file)
                file.flush()
                os.fsync(file.fileno())
            part.rename(self.path)
        except OSError as error:
            raise SourceError(f"journal {self.path}: {error.strerror or error}") from None

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class _Guard:
    """Resumes the guest if we are killed."""

    def __init__(self, control: Path, journal: Path) -> None:
        package = Path(__file__).resolve().parent
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{package.name}.guard", str(control.resolve()), str(journal.resolve())], cwd=package.parent, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout

    def ready(self) -> None:
        """Wait until it watches. Raises SourceError."""
        if self._out.readline() != b"ready\n":
            raise SourceError("the guard that resumes the guest if this program is killed did not start")

    def say(self, letter: bytes) -> None:
        self._in.write(letter)
        self._in.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.say(b"d")
        self._in.close()
        self._out.close()
        self._process.wait()


def call(address: tuple[str, int], key: bytes, patience: float) -> wire.Stream:
    """A stream to the target, for as long as the patience lasts. Raises TransferLost, KeyRefused."""
    end, wait = time.monotonic() + patience, RETRY_S[0]
    while True:
        try:
            stream = wire.call(address, key, TRANSFER)
            stream.timeout(patience)
            return stream
        except (OSError, Unauthentic) as error:
            if time.monotonic() + wait > end:
                raise TransferLost(f"target {address[0]}:{address[1]}: out of reach for {patience:g} s ({error})") from None
        time.sleep(wait)
        wait = min(RETRY_S[1], wait * 2)


def expect(stream: wire.Stream, kind: Kind) -> memoryview:
    """The next record, which is to be of that kind. Raises Refused with the target's words, TransferLost."""
    try:
        found, _, _, payload = stream.receive()
    except (OSError, Unauthentic) as error:
        raise TransferLost(f"the target is gone: {error}") from None
    if found == Kind.REFUSED:
        raise Refused(f"the target gave up: {bytes(payload[:TEXT_MOST]).decode(errors='replace')}")
    if found != kind:
        raise TransferLost(f"the target said {found} where {kind.name} was due")
    return payload


def ask(address: tuple[str, int], key: bytes, session: bytes, patience: float) -> float | None:
    """Whose is the guest? Since when it runs at the target (seconds since 1970), None: it is ours, for good. Raises TransferLost where nobody answers in time."""
    end = time.monotonic() + patience
    while True:
        try:
            stream = call(address, key, max(0.1, end - time.monotonic()))
            try:
                stream.send(Kind.ASK, session)
                return _verdict(expect(stream, Kind.VERDICT))
            finally:
                with contextlib.suppress(OSError):
                    stream.send(Kind.BYE)
                stream.close()
        except (OSError, TransferLost, Refused):
            if time.monotonic() > end:
                raise TransferLost(f"target {address[0]}:{address[1]}: it did not say whose the guest is") from None
            time.sleep(RETRY_S[0])


def _verdict(payload: memoryview) -> float | None:
    if len(payload) != wire.VERDICT_GUEST.size:
        raise TransferLost("the target's verdict is not understood")
    taken, since = wire.VERDICT_GUEST.unpack(payload)
    return float(since) if taken else None


class Source:
    """Moves one guest, whose QEMU has that control socket."""

    def __init__(self, control: Path, key: bytes, address: tuple[str, int], options: Options | None = None) -> None:
        self._control, self._key, self._address, self._options = control, key, address, options or Options()
        self._journal = Journal(control)

    def move(self) -> Moved:
        """Raises MigrationError; the guest then runs on here, unless it is Undecided."""
        began = time.monotonic()
        qmp = Qmp(self._control)
        try:
            earlier = self._settle(qmp)
            if earlier is not None:
                return earlier
            if not qemu_guest.running(qmp):
                raise SourceError("the guest stands still; resume it first")
            memory = qemu_guest.memory_of(qmp)
            source = FileSource(memory.path)
            try:
                if source.length != memory.length:
                    raise SourceError(f"memory {memory.path}: it has {source.length} bytes and the guest {memory.length}")
                moved = self._move(qmp, source)
            finally:
                source.close()
            moved.total_s = time.monotonic() - began
            return moved
        finally:
            qmp.close()

    def _settle(self, qmp: Qmp) -> Moved | None:
        """What an earlier run left open. Raises Undecided."""
        opened = self._journal.read()
        if opened is None:
            return None
        session, address = opened
        try:
            since = ask(address, self._key, session, self._options.patience)
        except (TransferLost, KeyRefused) as error:
            raise Undecided(f"{error}; an earlier run asked it to take this guest over, so that it stays stopped here: start the target again on its folder, then run this again") from None
        if since is None:
            qemu_guest.resume(qmp)
            self._journal.remove()
            return None
        self._leave(qmp)
        return Moved(0, running_at=since, earlier=True)

    def _leave(self, qmp: Qmp) -> None:
        """The guest is the target's."""
        self._options.progress(Step.LEAVING)
        if not self._options.leave:
            with contextlib.suppress(QemuError):
                qmp("quit")
        self._journal.remove()

    def _move(self, qmp: Qmp, source: FileSource) -> Moved:
        options, session, moved = self._options, os.urandom(wire.SESSION), Moved(source.length)
        tracker = dirty.tracker(qmp.pid, source, max(1, os.cpu_count() or 1), options.track)
        try:
            moved.tracker = tracker.name
            stream = call(self._address, self._key, options.patience)
            try:
                _say(stream, Kind.HELLO, wire.HELLO_GUEST.pack(session, source.length))
                expect(stream, Kind.GO)
                tracker.arm()  # before the first page is read: what is written from here on is found
                control, rate = self._memory(source, stream, tracker, moved)
                live = _Live(stream, source, tracker, choice.Model(1, options.codecs, limit=options.limit), moved, options)
                live.model.wire.value = rate
                options.progress(Step.PASSES)
                guard = _Guard(self._control, self._journal.path)
                try:
                    pending = live.converge(control)
                    guard.ready()
                    with qemu_guest.prepared(qmp):
                        self._switch(qmp, live, pending, session, guard, moved)
                finally:
                    guard.close()
            finally:
                stream.close()
        finally:
            tracker.close()
            if tracker.looks:
                moved.look_s = tracker.seconds / tracker.looks
        return moved

    def _memory(self, source: FileSource, stream: wire.Stream, tracker: dirty.Tracker, moved: Moved) -> tuple[Control, float]:
        """The whole memory as an object, while the guest runs; what decides on passes after it, and the wire's rate."""
        options = self._options
        options.progress(Step.MEMORY)
        began = time.monotonic()
        sender = Sender(
            source, self._key, self._address, transfer=f"guest {source.path.name}", codecs=options.codecs, streams=(min(STREAMS_AT_FIRST, options.streams), options.streams), limit=options.limit,
            patience=options.patience,
        )
        watch = _Watch(stream, sender)
        try:
            sender.start()
            sender.pass_over()
            sent, held = sender.commit(), sender.held()
            moved.memory_s, moved.memory_bytes = time.monotonic() - began, sent.wire_bytes
            options.progress(Step.LIVE)
            _say(stream, Kind.LIVE, sent.root)
            tracker.brought(held)
            watch.ready(options.patience)
        except MigrationError as error:
            raise watch.error or error from None
        finally:
            sender.close()
        control = Control(limits_for(source.length, Limits(first=min(options.first, options.ceiling), ceiling=options.ceiling, steps=STEPS, cool_down=COOL_DOWN_S, stall=options.stall)))
        return control, max(sent.rates.get("wire", 0.0) * 1e9, choice.START_WIRE)

    def _switch(self, qmp: Qmp, live: "_Live", pending: dirty.Numbers, session: bytes, guard: _Guard, moved: Moved) -> None:
        """Stop, last pages, state, question."""
        options, asked, leaving = self._options, False, None
        options.progress(Step.STOPPING)
        guard.say(b"s")
        qemu_guest.hurry()
        marks = [("", time.monotonic())]
        try:
            moved.stopped_at = qemu_guest.stop(qmp)
            marks.append(("stop", time.monotonic()))
            leaving = qemu_guest.Leaving(qmp)
            options.progress(Step.PAGES)
            live.put(pending)  # beside QEMU, which leaves its state meanwhile
            marks.append(("pages left", time.monotonic()))
            options.progress(Step.STATE)
            state = leaving.whole()
            marks.append(("state", time.monotonic()))
            last = live.look()  # only now: leaving its state, QEMU may have written
            live.put(last)
            moved.last_pages = len(pending) + len(last)
            marks.append(("last pages", time.monotonic()))
            live.load(state)
            live.written()
            options.progress(Step.LOADED)
            expect(live.stream, Kind.LOADED)
            marks.append(("load", time.monotonic()))
            options.progress(Step.ASKING)
            self._journal.write(session, self._address)
            asked = True
            options.progress(Step.ASKED)
            since = self._ask(live.stream, session)
            marks.append(("take over", time.monotonic()))
            if since is None:
                self._journal.remove()
                asked = False
                raise Refused("the target did not take the guest over; it runs on here")
        except BaseException as error:
            if asked:
                if isinstance(error, MigrationError):
                    raise Undecided(f"{error}; it was asked to take the guest over, which stays stopped here: run the same command again, resume it by hand only if the target does not have it") from error
                raise
            if leaving is not None:
                leaving.close()
            try:
                qemu_guest.resume(qmp)
            except QemuError as second:
                raise QemuError(f"{second}; the guest may stand still: resume it by hand (before that: {error})") from error
            raise
        leaving.close()
        moved.running_at = since
        moved.downtime_s = marks[-1][1] - marks[0][1]
        moved.parts_s = {name: round(when - before, 5) for (name, when), (_, before) in zip(marks[1:], marks, strict=False)}
        options.progress(Step.TAKEN)
        self._leave(qmp)
        with contextlib.suppress(OSError):
            live.stream.send(Kind.BYE)  # nothing will be asked any more

    def _ask(self, stream: wire.Stream, session: bytes) -> float | None:
        """The question, and its answer by whichever stream. Raises TransferLost."""
        try:
            stream.send(Kind.COMMIT_GUEST, session)
            return _verdict(expect(stream, Kind.VERDICT))
        except (OSError, TransferLost, Refused):
            stream.close()
            return ask(self._address, self._key, session, self._options.patience)


class _Watch:
    """Waits for the target's next word on the guest's stream while its memory goes over others: where that stream is gone, so is the move, and the others need not be waited for."""

    def __init__(self, stream: wire.Stream, sender: Sender) -> None:
        self._stream, self._sender = stream, sender
        self.error: MigrationError | None = None
        stream.timeout(None)
        self._thread = threading.Thread(target=self._wait, daemon=True, name="watch")
        self._thread.start()

    def _wait(self) -> None:
        try:
            expect(self._stream, Kind.READY)
        except MigrationError as error:
            self.error = error
            self._sender.abandon(error)

    def ready(self, patience: float) -> None:
        """Until the target's QEMU waits. Raises what it says instead, TransferLost."""
        self._thread.join(patience)
        if self._thread.is_alive():
            raise TransferLost(f"the target's QEMU was not ready within {patience:g} s")
        if self.error is not None:
            raise self.error
        self._stream.timeout(patience)


def _say(stream: wire.Stream, kind: Kind, payload: bytes | memoryview = b"", attempt: int = 0) -> int:
    try:
        return stream.send(kind, payload, 0, attempt)
    except OSError as error:
        raise TransferLost(f"the target is gone: {error}") from None


class _Live:
    """Pages that were written, sent until few are left."""

    def __init__(self, stream: wire.Stream, source: FileSource, tracker: dirty.Tracker, model: choice.Model, moved: Moved, options: Options) -> None:
        self.stream, self.model = stream, model
        self._source, self._tracker, self._moved, self._options = source, tracker, moved, options
        self._memory = source.mapped()
        self._scratch = np.empty((patches.MOST, PAGE), np.uint8)
        self._chain = wire.NOTHING
        self._sequence = self._written = 0

    def look(self) -> dirty.Numbers:
        """Pages written since the last look."""
        return self._options.lose(self._tracker.written())

    def converge(self, control: Control) -> dirty.Numbers:
        """Pass by pass; the pages that are left when it may be stopped. Raises NotConverged."""
        pending = self.look()
        while True:
            began, before = time.monotonic(), len(pending)
            self.send(pending)
            sending = time.monotonic() - began
            self._moved.passes += 1
            pending = self.look()
            verdict = control.after(Pass(before * PAGE, sending, time.monotonic() - began, len(pending) * PAGE))
            if verdict.next is Next.SWITCH and not FEW < len(pending) < SHRINK * before:
                self._moved.implied_s = verdict.implied
                return pending
            if verdict.next is Next.GIVE_UP:
                assert verdict.reason is not None
                wait = f"{verdict.implied:.2f} s" if math.isfinite(verdict.implied) else "an unknown time"
                raise NotConverged(
                    f"the guest writes faster than it can be moved ({verdict.reason.value}, {len(pending)} pages remain): it would stand still for {wait}, and {verdict.allowed:g} s are allowed; "
                    "give a higher --downtime, or try when it is quieter", verdict.reason
                )

    def send(self, numbers: dirty.Numbers) -> None:
        """Those pages, as they are now; returns when the target has written them."""
        self.put(numbers)
        self.written()

    def put(self, numbers: dirty.Numbers) -> None:
        """Send them, and wait for nothing: while the guest stands still, a round trip less. The answers, 40 bytes for a MiB, wait in the socket."""
        for at in range(0, len(numbers), patches.MOST):
            self._patch(numbers[at : at + patches.MOST])

    def written(self) -> None:
        """Until the target has written all that was sent."""
        while self._written < self._sequence:
            expect(self.stream, Kind.APPLIED)
            self._written += 1

    def _patch(self, numbers: dirty.Numbers) -> None:
        rows = self._scratch[: len(numbers)]
        np.take(self._memory, numbers, axis=0, out=rows, mode="clip")  # one copy, so that what is hashed is what is sent
        data = rows.data.cast("B")
        guess, began = 1.0, 0.0

        def choose(plain: memoryview) -> Coder:
            nonlocal guess, began
            guess, began = choice.guess_of(plain), time.thread_time()
            return self.model.choose(len(data), len(plain), guess)

        payload, encoded = patches.pack(numbers, data, choose)
        self._tracker.sent(numbers, data)
        if encoded.plain >= LEARN_FROM:
            self.model.coded(encoded.coder, encoded.plain, encoded.coded, time.thread_time() - began, guess)
        self._sequence += 1
        self._chain = patches.follow(self._chain, payload)
        self._moved.pages_bytes += _say(self.stream, Kind.PATCH, payload, self._sequence)
        self._moved.pages += len(numbers)

    def load(self, state: memoryview) -> None:
        """The device state, and what everything before it comes to."""
        root = self._source.root(max(1, os.cpu_count() or 1)) if self._options.verify else wire.NOTHING
        for at in range(0, len(state), qemu_guest.CHUNK):
            _say(self.stream, Kind.STATE, state[at : at + qemu_guest.CHUNK])
        self._moved.state_bytes = len(state)
        _say(self.stream, Kind.LOAD, wire.LOAD_GUEST.pack(patches.chain(self._chain, state), root))
