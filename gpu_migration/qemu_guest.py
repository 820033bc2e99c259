"""What both ends of a guest's move ask of a QEMU: its memory, to run again, to leave its device state or to take one."""

import contextlib
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import MigrationError, SourceError
from .qemu_qmp import QemuError, QemuRefused, Qmp, at

STATE_MOST = 256 << 20
"""Bytes of a device state at most: a few hundred KB as a rule, more with a screen's memory."""
CHUNK = 1 << 18
NICE = -10
"""Of the two ends' own threads for the last moments."""
SWITCH_S = 0.0005
"""Seconds that one of their threads may keep another waiting, instead of Python's 5 ms: the whole standstill is hardly longer."""
CANCEL_S = 10.0
"""Seconds for a migration of QEMU's that is cancelled."""
_STATE = "novacron-state"
_PAUSES = "pause-before-switchover"
_OURS = {"x-ignore-shared": True, "events": True, "multifd": False, "return-path": False, _PAUSES: False}
"""What QEMU is told while it leaves or takes its state: that of the memory is moved by us."""
EARLY_FROM = 10
"""QEMU's version from which its own migration begins while the guest runs, and so has all but the devices' state out before it stands still: its firmware's memory, a screen's. Version 7.2 loses writes to such
memory under emulation; those between have not been tried."""
_UNLIMITED = 1 << 40
_WAITS = "pre-switchover"
_OVER = ("completed", "failed", "cancelled")


def _early(qmp: Qmp) -> bool:
    """Whether its own migration begins while the guest runs, and pauses once it stands still."""
    return int(qmp("query-version")["qemu"]["major"]) >= EARLY_FROM


def _migration(event: dict[str, Any], statuses: Sequence[str]) -> bool:
    return event["event"] == "MIGRATION" and event["data"]["status"] in statuses


@dataclass(frozen=True, slots=True)
class Memory:
    """A guest's memory: the file it is shared in, and its bytes."""

    path: Path
    length: int


def memory_of(qmp: Qmp) -> Memory:
    """Raises SourceError where it is not in one shared file."""
    backends = qmp("query-memdev")
    size = int(qmp("query-memory-size-summary")["base-memory"])
    if len(backends) != 1 or not backends[0].get("share") or int(backends[0]["size"]) != size or "id" not in backends[0]:
        raise SourceError("the guest's memory is not in one shared file; start QEMU with -machine memory-backend=ID -object memory-backend-file,id=ID,share=on,mem-path=FILE,size=...")
    try:
        path = Path(str(qmp("qom-get", path=f"/objects/{backends[0]['id']}", property="mem-path")))
    except QemuError as error:
        raise SourceError(f"the guest's memory is in no file ({error}); start QEMU with memory-backend-file") from None
    if not path.is_file():
        raise SourceError(f"the guest's memory {path} is no file that can be read here; give memory-backend-file a path of one")
    return Memory(path, size)


def unseen(qmp: Qmp) -> str:
    """Why write protection would not see all writes; empty where it does. A device that writes memory by itself has asked for the page before, and writes it when the disk is ready, protected or not."""
    for node in qmp("query-named-block-nodes"):
        if node.get("cache", {}).get("direct"):
            return f"the disk {node.get('file') or node.get('node-name')} is read past the page cache (cache.direct), straight into the guest's memory"
    return ""


def hurry() -> None:
    """Ask to be preferred: a guest stands still, and each of the four processes that hand it on waits for the one before. Without the right to, as before."""
    sys.setswitchinterval(SWITCH_S)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)


def running(qmp: Qmp) -> bool:
    """Whether its processors run."""
    return bool(qmp("query-status")["running"])


def resume(qmp: Qmp) -> None:
    """Let a guest run again that was to be moved and was not. May be called whatever was begun. Raises QemuError."""
    end = time.monotonic() + CANCEL_S
    while True:
        try:
            if qmp("query-migrate").get("status") in ("setup", "active", "device", "pre-switchover", "cancelling"):
                qmp("migrate_cancel")
            elif running(qmp):
                return
            else:
                qmp("cont")
                return
        except QemuRefused as error:  # a migration that has ended is not tidied up at once, and nothing is let run until it is
            if time.monotonic() > end:
                raise QemuError(f"the guest was not let run again within {CANCEL_S:g} s ({error})") from None
        if time.monotonic() > end:
            raise QemuError(f"QEMU's migration was not cancelled within {CANCEL_S:g} s")
        select.select([], [], [], 0.01)


@contextlib.contextmanager
def prepared(qmp: Qmp) -> Iterator[None]:
    """QEMU is told to leave the shared memory to us; afterwards, where it still is there, it is told what it was told before: an administrator's own migration must not leave out the memory."""
    before = {one["capability"]: bool(one["state"]) for one in qmp("query-migrate-capabilities")}
    bandwidth = qmp("query-migrate-parameters").get("max-bandwidth")
    _tell(qmp, {name: value for name, value in {**_OURS, _PAUSES: _early(qmp)}.items() if name in before}, _UNLIMITED)
    try:
        yield
    finally:
        with contextlib.suppress(QemuError):
            _tell(qmp, {name: before[name] for name in _OURS if name in before}, bandwidth)


def forget(qmp: Qmp) -> None:
    """What `prepared` told it, where that is not known otherwise: as a QEMU is that nobody told anything. Raises QemuError."""
    there = {one["capability"] for one in qmp("query-migrate-capabilities")}
    _tell(qmp, {name: False for name in ("x-ignore-shared", _PAUSES) if name in there}, None)


def _tell(qmp: Qmp, capabilities: dict[str, bool], bandwidth: int | None) -> None:
    qmp("migrate-set-capabilities", capabilities=[{"capability": name, "state": value} for name, value in capabilities.items()])
    if bandwidth is not None:
        qmp("migrate-set-parameters", **{"max-bandwidth": bandwidth})


class Leaving:
    """A guest's device state as QEMU gives it, handed on beside whatever else is done. `stop`, `leave`, `pass_on` and `whole`, in this order."""

    def __init__(self, qmp: Qmp, hand: Callable[[memoryview], None]) -> None:
        """While the guest still runs: QEMU is given what it is to write to. `hand` is called with piece after piece, on a thread of its own. Raises QemuError."""
        self._qmp, self._hand, self._state, self._wrong = qmp, hand, bytearray(), ""
        self._early = _early(qmp)
        self._begun, self._left, self._said = False, not self._early, ""
        self._pass = threading.Event()
        self._ours, theirs = socket.socketpair()
        try:
            qmp.give(_STATE, theirs.fileno())
        except BaseException:
            self._ours.close()
            raise
        finally:
            theirs.close()
        self._reader = threading.Thread(target=self._read, daemon=True, name="state")
        self._reader.start()

    def stop(self, meanwhile: Callable[[], None]) -> float:
        """Let the guest stand still, its disks too; since when, in seconds since 1970. `meanwhile` is called until it does, and once more while its disks are drained. Raises QemuError."""
        if not self._early:
            return stop(self._qmp)
        self._qmp.events.clear()
        self._begun = True
        self._qmp("migrate", uri=f"fd:{_STATE}")
        found = self._qmp.first(lambda event: event["event"] == "STOP" or _migration(event, _OVER), meanwhile)
        if found["event"] == "STOP":
            meanwhile()
            if not _migration(self._qmp.first(lambda event: _migration(event, (_WAITS, *_OVER))), _OVER):
                return at(found)
        raise QemuError(f"QEMU did not stop the guest: {self._qmp('query-migrate').get('error-desc', 'its migration has ended')}")

    def leave(self) -> None:
        """Let QEMU write what is left to write, and wait for nothing; `whole` does. Raises QemuError."""
        self._left, self._said = True, "migrate-continue" if self._early else "migrate"
        if self._early:
            self._qmp.say(self._said, state=_WAITS)
        else:
            self._begun = True
            self._qmp.say(self._said, uri=f"fd:{_STATE}")

    def pass_on(self) -> None:
        """The pages that the devices may look at have been handed on: so may be their state."""
        self._pass.set()

    def _read(self) -> None:
        try:
            while data := self._ours.recv(CHUNK):
                self._state += data
                if len(self._state) > STATE_MOST:
                    self._wrong = f"its device state is larger than {STATE_MOST} bytes"
                    return
                if self._left:  # what came before is no device's
                    self._pass.wait()
                self._hand(memoryview(data))
        except (OSError, MigrationError) as error:
            self._wrong = str(error)
        finally:
            self._ours.close()

    def whole(self) -> memoryview:
        """All of it, which has been handed on. Raises QemuError."""
        self._answer()
        found = self._qmp.until("MIGRATION", status=_OVER)["data"]["status"]
        self._reader.join()
        if found != "completed" or self._wrong:
            raise QemuError(f"QEMU did not leave its state: {self._wrong or self._qmp('query-migrate').get('error-desc', found)}")
        return memoryview(self._state)

    def close(self) -> None:
        """Whatever came of it."""
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        self._pass.set()
        self._reader.join()
        with contextlib.suppress(QemuError):
            self._answer()
            if not self._begun:
                self._qmp("closefd", fdname=_STATE)

    def _answer(self) -> None:
        """To what was said and has none yet."""
        if self._said:
            said, self._said = self._said, ""
            self._qmp.answer(said)


class Taking:
    """A QEMU that was started with `-incoming defer -S` and waits for a device state."""

    def __init__(self, qmp: Qmp) -> None:
        """Raises QemuError where it does not wait."""
        self._qmp = qmp
        status = qmp("query-status")["status"]
        if status != "inmigrate":
            raise QemuError(f"the QEMU that was started here does not wait for a guest (status {status}); leave -incoming to this program")
        _tell(qmp, {one["capability"]: _OURS[one["capability"]] for one in qmp("query-migrate-capabilities") if one["capability"] in _OURS}, None)
        self._ours, theirs = socket.socketpair()
        try:
            qmp.give(_STATE, theirs.fileno())
            qmp("migrate-incoming", uri=f"fd:{_STATE}")
        except BaseException:
            self._ours.close()
            raise
        finally:
            theirs.close()

    def feed(self, piece: memoryview) -> None:
        """The next piece of a state. Of a device only once the memory here is what it was when the guest stood still: a device that is loaded may look at it."""
        with contextlib.suppress(OSError):  # it ends where it cannot read it, and then says why
            self._ours.sendall(piece)

    def load(self, rest: memoryview) -> None:
        """Give it the rest of the state; returns when it has it, and stands still. Raises QemuError."""
        self.feed(rest)
        self._ours.close()
        found = self._qmp.until("MIGRATION", status=("completed", "failed"))["data"]["status"]
        if found != "completed":
            raise QemuError("QEMU cannot take the guest's state: give it the same machine as at the source")

    def run(self) -> float:
        """Let it run; since when, in seconds since 1970."""
        return go(self._qmp)

    def forget(self) -> None:
        """It runs: what it was told to take it, it is not told any more."""
        with contextlib.suppress(QemuError):
            forget(self._qmp)

    def close(self) -> None:
        """QEMU stays."""
        self._ours.close()


def go(qmp: Qmp) -> float:
    """Let a guest run that stands still; since when, in seconds since 1970."""
    qmp.events.clear()
    qmp("cont")
    return at(qmp.until("RESUME"))


def stop(qmp: Qmp) -> float:
    """Let a guest that runs stand still; since when, in seconds since 1970."""
    qmp.events.clear()
    answer: Any = qmp("stop")
    assert answer is not None
    return at(qmp.until("STOP"))
