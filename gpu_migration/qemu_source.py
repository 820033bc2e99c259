"""The sending end of a guest that moves while it runs: its memory as an object, then the pages written meanwhile until few are left, then it is stopped, the last pages and QEMU's own device state
follow, and the target is asked to take it over.

Until that question nothing is lost: whatever fails, the guest runs on here, also where this process is killed (`guard`). From the question on only the target's answer tells whose the guest is. It is
written down before it is asked (a journal beside QEMU's control socket), so that whoever runs this again asks before anything else.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np

from . import choice, dirty, guest_disks, patches, qemu_disks, qemu_guest, wire
from .codecs import Coder
from .convergence import CEILING_S, SMOOTHING, STALL_S, Control, Limits, Next, Pass
from .errors import KeyRefused, MigrationError, NotConverged, Refused, SourceError, TransferLost, Undecided
from .layout import PAGE
from .precopy import limits_for
from .qemu_disks import Mirrors
from .qemu_qmp import QemuError, Qmp
from .qemu_question import Guard, Journal, answer, ask, call, expect
from .receiver import PATIENCE_S, STREAMS_MOST
from .sender import STREAMS_AT_FIRST, Sender
from .sources import FileSource
from .wire import Kind

FIRST_S = 0.01
"""Seconds that the last pages may take at first: what a guest at rest leaves goes in less, and it keeps the whole standstill near what stopping and starting it cost anyway."""
STEPS, COOL_DOWN_S = 40, 1.0
"""Raises of what the last pages may take, and seconds between two: finer than for a writer that is paused by a command, as a pass takes milliseconds here."""
SHRINK = 0.7
"""Share to which another pass must have brought what remains to be worth one more, once the guest might be stopped: a pass over little takes milliseconds, and so leaves less."""
FEW = 64
"""Pages below which it does not matter: they go in a millisecond."""
PROBE = 16
"""Pages from which the time that they took says something."""
QUICK_S = 0.01
"""Seconds for a look, on average, up to which there are several while the guest stands still; by hashes it takes that for 16 MiB, and there is one."""
WAITING_MOST = 256
"""Answers of the target that may wait in the socket, 40 bytes each: fewer than it holds."""
LEARN_FROM = 1 << 18
"""Bytes coded at once from which the time that it took says something of the coder."""


class Step(StrEnum):
    """Where a move is, as `progress` is told: before that step is taken."""

    DISKS = "disks"
    MEMORY = "memory"
    LIVE = "live"
    SYNCING = "syncing"
    PASSES = "passes"
    STOPPING = "stopping"
    DETACHING = "detaching"
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
    """Sent once it stood still and its disks were drained."""
    disks: list[str] = field(default_factory=list)
    """Those that went with it, by the names of their nodes."""
    disk_bytes: int = 0
    """Of the protocol for disks, to the target."""
    state_bytes: int = 0
    tracker: str = ""
    look_s: float = 0.0
    """For one look at what was written, on average."""
    implied_s: float = 0.0
    parts_s: dict[str, float] = field(default_factory=dict)
    """Of the downtime."""
    earlier: bool = False
    """An earlier run had moved it and had not heard of it."""


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
        if qemu_guest.running(qmp):
            raise SourceError(f"the target has the guest of an earlier run, and one runs here: if this is another, remove {self._journal.path} and run this again")
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
        tracker = dirty.tracker(qmp.pid, source, max(1, os.cpu_count() or 1), options.track, qemu_guest.unseen(qmp))
        try:
            moved.tracker = tracker.name
            stream = call(self._address, self._key, options.patience)
            mirrors = None
            try:
                qemu_disks.release(qmp)
                offered = qemu_disks.disks_of(qmp)
                _say(stream, Kind.HELLO, wire.HELLO_GUEST.pack(session, source.length) + guest_disks.pack(offered))
                mirrors = self._disks(qmp, stream, session, offered, moved)
                expect(stream, Kind.GO)
                tracker.arm()  # before the first page is read: what is written from here on is found
                control, rate = self._memory(source, stream, tracker, moved)
                options.progress(Step.SYNCING)
                mirrors.same(options.stall)
                live = _Live(stream, source, tracker, choice.Model(1, options.codecs, limit=options.limit), moved, options)
                live.model.wire.value = rate
                options.progress(Step.PASSES)
                guard = Guard(self._control, self._journal.path)
                try:
                    guard.ready()  # and QEMU too, before the last look at what was written: what is written from there on has to follow while the guest stands still
                    with qemu_guest.prepared(qmp):
                        pending = live.converge(control)
                        mirrors.check()
                        self._switch(qmp, live, mirrors, pending, session, guard, moved)
                finally:
                    guard.close()
            finally:
                if mirrors is not None:
                    mirrors.close()
                stream.close()
        finally:
            tracker.close()
            if tracker.looks:
                moved.look_s = tracker.seconds / tracker.looks
        return moved

    def _disks(self, qmp: Qmp, stream: wire.Stream, session: bytes, offered: list[guest_disks.Disk], moved: Moved) -> Mirrors:
        """Those that the target asks for, which begin to be copied. Raises MigrationError."""
        answer = bytes(expect(stream, Kind.DISKS))
        if len(answer) != len(offered):
            raise TransferLost("the target's answer to the offer of disks is not understood")
        taken = [number for number, wanted in enumerate(answer) if wanted]
        moved.disks = [offered[number].name for number in taken]
        mirrors = Mirrors(qmp, self._control, [offered[number] for number in taken], self._options.patience, self._options.limit)
        if not taken:
            return mirrors
        self._options.progress(Step.DISKS)
        streams: list[wire.Stream] = []
        try:
            for number in taken:
                streams.append(call(self._address, self._key, self._options.patience))
                _say(streams[-1], Kind.DISK, wire.DISK_GUEST.pack(session, number))
        except BaseException:
            for one in streams:
                one.close()
            raise
        try:
            mirrors.start(streams)
        except BaseException:
            mirrors.close()
            raise
        return mirrors

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

    def _switch(self, qmp: Qmp, live: "_Live", mirrors: Mirrors, pending: dirty.Numbers, session: bytes, guard: Guard, moved: Moved) -> None:
        """Stop, last pages, state, question."""
        options, asked = self._options, False
        options.progress(Step.STOPPING)
        guard.say(b"s")
        qemu_guest.hurry()
        leaving = qemu_guest.Leaving(qmp, live.state)
        marks = [("", time.monotonic())]
        try:
            live.put(pending)
            moved.stopped_at = leaving.stop(live.follow)
            before = moved.pages
            marks.append(("stop", time.monotonic()))
            if moved.disks:
                options.progress(Step.DETACHING)
                mirrors.end()
                moved.disk_bytes = mirrors.sent
                _say(live.stream, Kind.DISKED)
                marks.append(("disks", time.monotonic()))
            leaving.leave()
            options.progress(Step.PAGES)
            if live.quick:
                live.put(live.look())  # beside QEMU, which leaves its state meanwhile
            leaving.pass_on()
            marks.append(("pages", time.monotonic()))
            options.progress(Step.STATE)
            state = leaving.whole()
            marks.append(("state", time.monotonic()))
            live.put(live.look())  # leaving its state, QEMU is not to write to the guest's memory; what it does write goes over before the guest runs, other than with QEMU's own migration
            moved.last_pages = moved.pages - before
            marks.append(("late pages", time.monotonic()))
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
            leaving.close()
            try:
                qemu_guest.resume(qmp)
            except QemuError as second:
                raise QemuError(f"{second}; the guest may stand still: resume it by hand (before that: {error})") from error
            if isinstance(error, QemuError) and moved.disks:  # it flushes all disks when it stops, those at the target too
                raise QemuError(f"{error}; where the mirror of a disk ({', '.join(moved.disks)}) is the cause: see that the target is there and has room, then start both again") from error
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
            return answer(expect(stream, Kind.VERDICT))
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
        self._plain = patches.Plain()
        self.quick = False
        """Whether one more look at the memory costs next to nothing, and a device's state may be loaded before the last."""
        self._pace: dict[bool, float] = {}
        """Seconds a page until the target had written it, coded and not."""
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
                self.quick = self._tracker.seconds <= QUICK_S * self._tracker.looks and not self._options.verify
                return pending
            if verdict.next is Next.GIVE_UP:
                assert verdict.reason is not None
                wait = f"{verdict.implied:.2f} s" if math.isfinite(verdict.implied) else "an unknown time"
                raise NotConverged(
                    f"the guest writes faster than it can be moved ({verdict.reason.value}, {len(pending)} pages remain): it would stand still for {wait}, and {verdict.allowed:g} s are allowed; "
                    "give a higher --downtime, or try when it is quieter", verdict.reason
                )

    def send(self, numbers: dirty.Numbers) -> None:
        """Those pages, as they are now; returns when the target has written them. The first time that there are some, half go coded and half as they are, so that the quicker way is known."""
        if not self._pace and len(numbers) >= 2 * PROBE and not self._options.limit:
            half = len(numbers) // 2
            self._timed(numbers[:half], True)
            self._timed(numbers[half:], False)
        else:
            self._timed(numbers, self._coded())

    def _coded(self) -> bool:
        """Whether pages go coded: where that was quicker, or is not known, or few bytes are asked for."""
        return not self._pace or self._pace[True] <= self._pace[False]

    def _timed(self, numbers: dirty.Numbers, coded: bool) -> None:
        began = time.monotonic()
        self._put(numbers, coded)
        self.written()
        if len(numbers) >= PROBE and not self._options.limit:
            pace = (time.monotonic() - began) / len(numbers)
            self._pace[coded] = SMOOTHING * pace + (1 - SMOOTHING) * self._pace.get(coded, pace)

    def follow(self) -> None:
        """What was written since the last look, while it is waited for that the guest stands still."""
        if not self.quick:
            return
        self.put(self.look())
        if self._sequence - self._written >= WAITING_MOST:
            self.written()

    def put(self, numbers: dirty.Numbers) -> None:
        """Send them, and wait for nothing: while the guest stands still, a round trip less. The answers, 40 bytes for a MiB, wait in the socket."""
        self._put(numbers, self._coded())

    def _put(self, numbers: dirty.Numbers, coded: bool) -> None:
        for at in range(0, len(numbers), patches.MOST):
            (self._patch if coded else self._pages)(numbers[at : at + patches.MOST])

    def _pages(self, numbers: dirty.Numbers) -> None:
        payload, data = self._plain.pack(numbers, self._memory)
        self._tracker.sent(numbers, data)
        self._chain = patches.chain(self._chain, payload)
        self._sent(Kind.PAGES, payload, numbers)

    def _sent(self, kind: Kind, payload: bytes | memoryview, numbers: dirty.Numbers) -> None:
        self._sequence += 1
        self._moved.pages_bytes += _say(self.stream, kind, payload, self._sequence)
        self._moved.pages += len(numbers)

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
        self._chain = patches.follow(self._chain, payload)
        self._sent(Kind.PATCH, payload, numbers)

    def state(self, piece: memoryview) -> None:
        """The next of the device state. On another thread than the rest. Raises TransferLost."""
        _say(self.stream, Kind.STATE, piece, self.quick)

    def load(self, state: memoryview) -> None:
        """The device state has gone; what it and everything before it come to."""
        root = self._source.root(max(1, os.cpu_count() or 1)) if self._options.verify else wire.NOTHING
        self._moved.state_bytes = len(state)
        _say(self.stream, Kind.LOAD, wire.LOAD_GUEST.pack(patches.chain(self._chain, state), root))
