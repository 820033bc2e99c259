"""The receiving end of a guest that moves while it runs: takes its memory into a folder, starts a QEMU on it that waits, applies the pages that were written meanwhile, loads the device state, and lets
it run once it is this end's.

One record decides whose the guest is: the file `decision` of the folder, written before the guest runs here. Without it no QEMU of this folder is ever let run; with it the source never runs it again. Whoever
is killed in between, the next one that serves the folder goes on from there.
"""

import contextlib
import mmap
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import numpy as np

from . import guest_disks, patches, qemu_guest, qemu_store, wire
from .errors import DestinationError, FormatError, HashMismatch, MigrationError, TransferLost, Unauthentic
from .layout import EXTENT, OBJECT_MAX, PAGE, pages_of
from .qemu_door import Door
from .qemu_folder import Decision, Folder
from .qemu_qmp import QemuError, Qmp
from .qemu_store import Store
from .receiver import PATIENCE_S, TEXT_MOST, Receiver
from .sources import FileSource
from .wire import Kind

MEMORY = "{memory}"
"""In QEMU's command line, in place of the file that is the guest's memory."""
QUIT_S = 10.0
"""Seconds to reach a QEMU that an earlier one left."""
LOOK_S = 0.1
"""Seconds between two looks whether a source that is to send its disks is still there."""


class Step(StrEnum):
    """Where a move is, as `progress` is told: before that step is taken."""

    DISKS = "disks"
    MEMORY = "memory"
    STARTING = "starting"
    READY = "ready"
    CLOSING = "closing"
    LOADING = "loading"
    LOADED = "loaded"
    DECIDING = "deciding"
    DECIDED = "decided"
    RUNNING = "running"


@dataclass(slots=True)
class Taken:
    """The guest is here."""

    control: str
    """QEMU's control socket."""
    pid: int
    running_at: float
    """Seconds since 1970."""
    patches: int = 0
    disks: list[str] = field(default_factory=list)
    """Files of the disks that came with it."""


class Target:
    """Receives one guest into a folder. `serve` blocks until it runs here and the source knows, or raises."""

    def __init__(
        self, folder: Path, key: bytes, listen: tuple[str, int], command: Sequence[str], *, disks: Path | None = None, patience: float = PATIENCE_S, progress: Callable[[Step], None] = lambda step: None
    ) -> None:
        """`command`: QEMU's command line with `{memory}` where the file of the memory stands, and `{disk:NODE}` where that of a disk stands which comes with the guest; -qmp, -incoming and -S are added. `disks`: the
        folder for those; else one in `folder`."""
        if not any(MEMORY in word for word in command):
            raise DestinationError(f"QEMU's command line does not say {MEMORY}: give -object memory-backend-file,...,share=on,mem-path={MEMORY}")
        self._key, self._command, self._patience, self._progress = key, list(command), patience, progress
        self._asked = guest_disks.asked(command)
        self._folder = Folder(folder.resolve(), (disks or folder / "disks").resolve())
        try:
            self._door: Door | None = Door(key, listen)
        except DestinationError:
            self._folder.close()
            raise
        self.address = self._door.address
        self._qmp: Qmp | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._qemu = self._patches = 0
        self._store: Store | None = None
        self._disks: list[guest_disks.Disk] = []

    def serve(self) -> Taken:
        """Raises MigrationError; nothing of the guest runs here then, unless it had been decided before."""
        try:
            decision = self._folder.decision()
            if decision is None:
                self._folder.clear()
                decision = self._until_decided()
            else:
                self._pick_up()
            return Taken(str(self._folder.control), self._qemu, decision.running_at, self._patches, [str(self._folder.disks / name) for name in self._asked])
        finally:
            self.close()

    def close(self) -> None:
        """A guest that runs goes on."""
        if self._door is not None:
            self._door.close()
            self._door = None
        if self._qmp is not None:
            self._qmp.close()
        self._end_store()
        self._folder.close()

    def _end_store(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None
            self._folder.stored()

    def _pick_up(self) -> None:
        """It was decided by one that did not get further: see that it runs, and tell the source."""
        decision = self._folder.decision()
        assert decision is not None
        self._folder.stored()  # it had let go of the disks before
        try:
            self._qmp = Qmp(self._folder.control, QUIT_S)
            self._qemu = self._qmp.pid
            if not qemu_guest.running(self._qmp):
                self._progress(Step.RUNNING)
                qemu_guest.go(self._qmp)
            qemu_guest.forget(self._qmp)
        except QemuError as error:
            raise QemuError(f"the guest is this end's, and its QEMU is gone ({error}; {self._folder.said()}); remove {self._folder.path} once it is not missed") from None
        self._qmp.close()  # it takes one client, and whoever runs the guest may want it
        self._answer_questions(decision)

    def _until_decided(self) -> Decision:
        """One source after the other, until one has brought its guest."""
        end = time.monotonic() + self._patience
        while True:
            if self._door is None:
                self._door = Door(self._key, self.address)
            stream = self._door.stream(max(0.0, end - time.monotonic()))
            if stream is None:
                raise TransferLost(f"receive {self._folder.path}: no source for {self._patience:g} s; start both again")
            try:
                decision = self._source(stream)
                if decision is not None:
                    return decision
            except (OSError, Unauthentic, TransferLost):
                self._abandon()  # that source is gone; it or another may come again
            except MigrationError as error:
                self._tell(stream, error)
                self._abandon()
                raise
            except BaseException:
                self._abandon()
                raise
            finally:
                stream.close()
            end = time.monotonic() + self._patience

    @staticmethod
    def _tell(stream: wire.Stream, error: MigrationError) -> None:
        with contextlib.suppress(OSError):
            stream.send(Kind.REFUSED, str(error).encode()[:TEXT_MOST])

    def _abandon(self) -> None:
        """Nothing of an undecided move is left. After a decision nothing is touched."""
        if self._folder.decision() is not None:
            return
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        self._end_store()
        self._folder.clear()

    def _source(self, stream: wire.Stream) -> Decision | None:
        """All that one stream brings; None where it only asked. Raises MigrationError, OSError."""
        stream.timeout(self._patience)
        kind, _, _, payload = stream.receive()
        while kind == Kind.ASK:
            stream.send(Kind.VERDICT, wire.VERDICT_GUEST.pack(0, 0.0))  # whatever was on its way in that session is gone
            kind, _, _, payload = stream.receive()
        if kind == Kind.BYE:
            return None
        if kind != Kind.HELLO or len(payload) < wire.HELLO_GUEST.size:
            raise FormatError(f"a record of kind {kind} does not begin a guest's move")
        session, length = wire.HELLO_GUEST.unpack_from(payload)
        if not 0 < length <= OBJECT_MAX or length % PAGE:
            raise FormatError(f"a memory of {length} bytes is none")
        offered = guest_disks.unpack(payload[wire.HELLO_GUEST.size :])
        self._disks = guest_disks.chosen(self._asked, offered)
        if self._disks:
            self._progress(Step.DISKS)
            folder = self._folder
            qemu_store.prepare(folder.disks, self._disks, folder.made)
            self._store = Store(self._command[0], folder.store, folder.store_log, folder.storing)
            self._store.serve(folder.disks, self._disks)
        stream.send(Kind.DISKS, bytes(disk in self._disks for disk in offered))
        if self._disks:
            self._take_disks(stream, session, offered)
        root = self._memory(stream, length)
        self._progress(Step.STARTING)
        self._start()
        return self._live(stream, session, length, root)

    def _take_disks(self, guest: wire.Stream, session: bytes, offered: list[guest_disks.Disk]) -> None:
        """A stream to each. Raises MigrationError, OSError."""
        assert self._door is not None and self._store is not None
        due = {offered.index(disk) for disk in self._disks}
        end = time.monotonic() + self._patience
        while due:
            if guest.speaks() or time.monotonic() > end:
                raise TransferLost("the source is gone: it did not send its disks")  # it says nothing before that
            stream = self._door.stream(LOOK_S)
            if stream is None:
                continue
            try:
                stream.timeout(self._patience)
                kind, _, _, payload = stream.receive()
                if kind != Kind.DISK or len(payload) != wire.DISK_GUEST.size:
                    raise FormatError(f"a record of kind {kind} begins no disk")
                whose, number = wire.DISK_GUEST.unpack(payload)
                if whose != session or number not in due:
                    raise FormatError("a disk that is none of this guest's")
                self._store.take(stream, self._patience)
                due.remove(number)
            except (OSError, Unauthentic, FormatError):
                stream.close()  # of another source, which comes again
            except BaseException:
                stream.close()
                raise

    def _memory(self, stream: wire.Stream, length: int) -> bytes:
        """The memory as an object; its root."""
        self._progress(Step.MEMORY)
        assert self._door is not None
        self._door.close()
        self._door = None
        taking = Receiver(self._folder.memory, self._key, self.address, patience=self._patience)
        found: list[bytes] = []
        wrong: list[MigrationError] = []

        def take() -> None:
            try:
                done = taking.serve()
                found.append(done.root if done.length == length else b"")
            except MigrationError as error:
                wrong.append(error)
                self._tell(stream, error)
                stream.close()  # whoever waits on it wakes

        thread = threading.Thread(target=take, daemon=True, name="memory")
        thread.start()
        try:
            stream.send(Kind.GO)
            stream.timeout(None)  # how long the memory takes is the receiver's business, which has a patience of its own; the end of this stream is seen
            kind, _, _, payload = stream.receive()
            root = bytes(payload)
            stream.timeout(self._patience)
        except (OSError, Unauthentic) as error:
            taking.abandon(TransferLost(f"the source is gone: {error}"))
            thread.join()
            if wrong and not isinstance(wrong[0], TransferLost):
                raise wrong[0] from None
            raise
        thread.join()
        if wrong:
            raise wrong[0]
        if kind != Kind.LIVE or found != [root]:
            raise HashMismatch("the memory that arrived is not what the source says it sent")
        return root

    def _start(self) -> None:
        """QEMU, on that memory; it waits. Raises QemuError."""
        words = guest_disks.placed([word.replace(MEMORY, str(self._folder.memory)) for word in self._command], {name: str(self._folder.disks / name) for name in self._asked})
        try:
            with self._folder.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [*words, "-qmp", f"unix:{self._folder.control},server=on,wait=off", "-incoming", "defer", "-S"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
                )
        except OSError as error:
            raise QemuError(f"{words[0]}: {error.strerror or error}") from None
        self._folder.started(self._process.pid)
        process = self._process
        try:
            self._qmp = Qmp(self._folder.control, alive=lambda: process.poll() is None)
            self._qemu = self._qmp.pid
        except QemuError as error:
            raise QemuError(f"the QEMU that was started here: {error}; {self._folder.said()}") from None
        sizes = {node.get("node-name"): int(node["image"]["virtual-size"]) for node in self._qmp("query-named-block-nodes")} if self._disks else {}
        for disk in self._disks:
            if disk.name not in sizes:
                raise DestinationError(f"disk {disk.name}: QEMU's command line has no node of that name; give node-name={disk.name}, as at the source")
            guest_disks.same_size(disk, sizes[disk.name], "what QEMU's command line makes of it")

    def _live(self, stream: wire.Stream, session: bytes, length: int, root: bytes) -> Decision:
        assert self._qmp is not None
        taking = qemu_guest.Taking(self._qmp)
        with self._folder.memory.open("r+b") as file:
            pages = np.frombuffer(mmap.mmap(file.fileno(), length), np.uint8).reshape(-1, PAGE)
        state, chain, scratch, self._patches = bytearray(), wire.NOTHING, memoryview(bytearray(EXTENT)), 0
        disked, fed = not self._disks, 0
        try:
            self._progress(Step.READY)
            qemu_guest.hurry()  # after QEMU was started, which would inherit it
            stream.send(Kind.READY)
            while True:
                kind, _, sequence, payload = stream.receive()  # of a state, `sequence` says whether QEMU may have it
                if kind in (Kind.PATCH, Kind.PAGES):
                    if kind == Kind.PATCH:
                        numbers, data = patches.unpack(payload, scratch, pages_of(length))
                        chain = patches.follow(chain, payload)
                    else:
                        numbers, data = patches.unpack_plain(payload, pages_of(length))
                        chain = patches.chain(chain, payload)
                    pages[numbers] = np.frombuffer(data, np.uint8).reshape(-1, PAGE)
                    self._patches += 1
                    if sequence != self._patches:
                        raise FormatError(f"patch {sequence} came where {self._patches} was due")
                    stream.send(Kind.APPLIED, b"", 0, sequence)
                elif kind == Kind.DISKED and self._store is not None and not disked:
                    self._progress(Step.CLOSING)
                    self._store.finish()
                    disked = True
                elif kind == Kind.STATE and len(state) + len(payload) <= qemu_guest.STATE_MOST:
                    state += payload
                    if sequence and fed + len(payload) == len(state):
                        fed += len(payload)
                        taking.feed(payload)
                elif kind == Kind.LOAD and len(payload) == wire.LOAD_GUEST.size and disked:
                    self._load(taking, memoryview(state), fed, chain, payload)
                    stream.send(Kind.LOADED)
                elif kind == Kind.COMMIT_GUEST and bytes(payload) == session:
                    return self._commit(stream, taking, session)
                elif kind == Kind.REFUSED:
                    raise DestinationError(f"the source gave up: {bytes(payload[:TEXT_MOST]).decode(errors='replace')}")
                else:
                    raise FormatError(f"a record of kind {kind} is not for a target at this point")
        except OSError as error:
            if self._folder.decision() is None:
                raise TransferLost(f"the source is gone: {error}") from None
            raise
        finally:
            taking.close()

    def _load(self, taking: qemu_guest.Taking, state: memoryview, fed: int, chain: bytes, payload: memoryview) -> None:
        self._progress(Step.LOADING)
        due, root = wire.LOAD_GUEST.unpack(payload)
        if patches.chain(chain, state) != due:
            raise HashMismatch("the pages and the state that arrived are not those that the source sent")
        if root != wire.NOTHING:
            source = FileSource(self._folder.memory)
            try:
                if source.root(max(1, os.cpu_count() or 1)) != root:
                    raise HashMismatch("the guest's memory here is not what it is at the source; it runs on there")
            finally:
                source.close()
        try:
            taking.load(state[fed:])
        except QemuError as error:
            raise QemuError(f"{error} ({self._folder.said()})") from None
        self._progress(Step.LOADED)

    def _commit(self, stream: wire.Stream, taking: qemu_guest.Taking, session: bytes) -> Decision:
        self._progress(Step.DECIDING)
        self._folder.decide(Decision(session, time.time()))
        self._progress(Step.DECIDED)
        since = taking.run()
        decision = Decision(session, since)
        self._progress(Step.RUNNING)
        try:
            stream.send(Kind.VERDICT, wire.VERDICT_GUEST.pack(1, since))
            taking.forget()
            self._until_bye(stream)
        except (OSError, Unauthentic):
            self._answer_questions(decision)
        return decision

    def _until_bye(self, stream: wire.Stream) -> None:
        while stream.receive()[0] != Kind.BYE:
            pass

    def _answer_questions(self, decision: Decision) -> None:
        """The source may not know: until it has asked, or has not for the patience. The decision stays, for who asks later."""
        end = time.monotonic() + self._patience
        if self._door is None:
            self._door = Door(self._key, self.address)
        while (left := end - time.monotonic()) > 0:
            stream = self._door.stream(left)
            if stream is None:
                return
            try:
                stream.timeout(self._patience)
                kind, _, _, payload = stream.receive()
                if kind != Kind.ASK:
                    self._tell(stream, DestinationError("this folder has its guest; give another"))
                    continue
                stream.send(Kind.VERDICT, wire.VERDICT_GUEST.pack(bytes(payload) == decision.session, decision.running_at))
                if bytes(payload) == decision.session:
                    self._until_bye(stream)
                    return
            except (OSError, Unauthentic):
                continue
            finally:
                stream.close()

