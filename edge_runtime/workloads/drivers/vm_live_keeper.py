"""What a virtual machine's keeper does in a move while the machine runs: at its source (`Leaving`), and at its target (`Arriving`). Part of `vm_keeper`; imports nothing that would load the agent.

Between the two keepers lie three connections, which others carry from node to node (at each end a folder with a UNIX socket of each name):

    disk      QEMU's mirror of the disk, to the NBD server of the QEMU that waits
    memory    QEMU's own migration
    word      lines between the keepers: `may` from the target, `over MICROSECONDS` from the source (for which it has stood still there)

    source                                    target
    copies the disk, goes on copying          waits: its disk is written to, it has not begun
    sends memory, round after round
    nearly all is there: tells its agent      is told by its agent that it may: says `may`
    writes `left.json`; stands still
    the last of disk, memory, devices         has all of it
    says `over`; is nobody's any more         begins, once it may, has all, and heard `over`

So the target never begins before the source stands still for good, and the source says so only when QEMU has ended its part well: one that failed goes on by itself, and no `over` was said. From `may` on
only the hub knows whose the machine is: `left.json` says so to whoever looks, also where this keeper is gone. The source goes on again only where it is told to (`stay`), which the hub does when the
target has said that it never began.
"""

import os
import selectors
import socket
import sys
import time

if __package__:
    from .keeping import Trouble, tell, write
    from .qemu_qmp import QmpError
else:  # run by a script, without the package
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from keeping import Trouble, tell, write  # type: ignore[import-not-found,no-redef]
    from qemu_qmp import QmpError  # type: ignore[import-not-found,no-redef]

DISK, MEMORY, WORD = CHANNELS = ("disk", "memory", "word")
"""Connections between the keepers, and the names of their sockets."""

MAY, OVER = b"may\n", b"over "
"""What the keepers say; the second one's number and its end follow."""

LEFT = "left.json"
"""In a machine's folder: another node may begin it, or has (`instance.LEFT`)."""

MIRROR = "live"
"""What the copy of the disk, and its job, are called in QEMU."""

LOOK_LIVE_S = 0.1
"""Between two looks at how much is left to send: QEMU says nothing of that by itself."""

NEAR_S = 1.0
"""So many seconds before all is there the hub is asked whether the target may begin: its word takes less. Of a machine with less memory than that it is asked at once."""

USUAL = 500_000_000
"""Bytes in a second that are believed to be carried where no limit says less."""

HOLD = 16_384
"""Bytes in a second with which what is left is sent until the target may begin: one that does nothing would be through at once, and stand still while the hub is asked. Pages of zeros go by the hundred in that: 7 MB of memory a second."""

DOWNTIME_MS = 50
"""QEMU stops the machine when what is left takes less than this."""

GRANT_S = 10.0
"""A machine that stands still, or nearly could, waits so long for its target's `may`; then it goes on here. A guest that does nothing is there at once."""

FORCE_S = 20.0
"""A machine that writes faster than the link carries is stopped so long after `may`, with whatever is left: as where it is stopped at first."""

LONGEST_MS = 2_000_000
"""QEMU's longest downtime limit: it stops at once then."""

SAY_S = 20.0
"""A word that is not taken within this, or a job that does not end, hangs."""

DRAIN_S = 60.0
"""For what the guest wrote last to reach the target, beside what its bytes take at the limit: one that stands still must not wait for a link that has died for longer."""

TIMES = 3
"""So many times as long as its bytes take at its limit the rest may take."""

MAX_WORD = 64
"""Bytes of a keeper's word, at most."""

FASTEST = 1 << 40
"""Bytes in a second where no limit was asked for."""

JOB_ENDS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")


def _at(folder: str, name: str, act: object) -> None:
    """Bind or connect (`act`) by the path of a socket, however long that is: sun_path has 108 bytes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        act(f"/proc/self/fd/{descriptor}/{name}")  # type: ignore[operator]
    finally:
        os.close(descriptor)


class Leaving:
    """A machine that leaves while it runs. Raises OSError where what carries it does not answer; then nothing of it is left.

    Args:
        keeper: the machine's.
        request: `folder` with the sockets, `speed` in bytes a second, 0 for no limit.
        line: of the agent that waits until it is near.
    """

    def __init__(self, keeper: object, request: dict, line: socket.socket) -> None:  # type: ignore[type-arg]
        self.keeper, self.machine, self.qmp = keeper, keeper.machine, keeper.machine.qmp  # type: ignore[attr-defined]
        self.line: socket.socket | None = line
        self.folder, self.speed = str(request["folder"]), int(request["speed"]) or FASTEST
        self.stage = "greeting"
        """`greeting` (its target's server has yet to say something), `disk`, `memory`, `still` (QEMU has stopped it), `over`; `ended` where nothing came of it."""
        self.near = self.may = self.forced = False
        self.size = keeper.told["machine"]["memory_mb"] << 20  # type: ignore[attr-defined]
        """Bytes of its memory."""
        self.until = time.monotonic() + SAY_S
        """When what it waits for is waited for no longer, or the machine is stopped whatever is left; 0: neither."""
        self.still_since = 0.0
        self.said = b""
        self.lines: dict = {}  # type: ignore[type-arg]
        """Connections, those that QEMU has too: where a link is dead it waits for them, and for nothing else; shut down, it goes on."""
        try:
            for name in (WORD, DISK):
                self.lines[name] = self._connected(name)
        except OSError:
            self._hang_up()
            raise
        self.lines[WORD].setblocking(False)
        self._register(WORD, self._heard)
        self._register(DISK, self._greeted)

    def _connected(self, name: str) -> socket.socket:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.settimeout(SAY_S)
            _at(self.folder, name, line.connect)
            line.setblocking(True)
        except OSError:
            line.close()
            raise
        return line

    def _register(self, name: str, act: object) -> None:
        self.keeper.selector.register(self.lines[name], selectors.EVENT_READ, act)  # type: ignore[attr-defined]

    def _unregister(self, name: str) -> None:
        try:
            self.keeper.selector.unregister(self.lines[name])  # type: ignore[attr-defined]
        except (KeyError, ValueError):
            pass  # it was before

    def _hang_up(self) -> None:
        """Whoever waits for one of the connections, QEMU too, sees its end."""
        for name, line in self.lines.items():
            self._unregister(name)
            try:
                line.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            line.close()
        self.lines = {}

    def _greeted(self) -> None:
        """The server of its target's disk speaks first: only now QEMU gets the connection, since it waits for the next words with all that it does, the guest too."""
        if self.stage != "greeting":
            return
        self._unregister(DISK)
        try:
            if not self.lines[DISK].recv(1, socket.MSG_PEEK):
                raise OSError("its target has no place for its disk, or what carries it there has gone")
            self.qmp.events = [one for one in self.qmp.events if not one[0].startswith("BLOCK_JOB") and one[0] != "MIGRATION"]
            self.qmp.ask_with(self.lines[DISK].fileno(), "getfd", fdname=MIRROR)
            self.qmp.ask("blockdev-add", **{"driver": "nbd", "node-name": MIRROR, "server": {"type": "fd", "str": MIRROR}, "export": DISK})
            self.qmp.ask("blockdev-mirror", **{"job-id": MIRROR, "device": "disk", "target": MIRROR, "sync": "top", "speed": 0 if self.speed == FASTEST else self.speed, "on-target-error": "report"})
            self.stage, self.until = "disk", 0.0
        except (QmpError, OSError) as error:
            self.end(str(error))

    @property
    def wait_s(self) -> float | None:
        """Seconds until it wants to be looked at though nothing happens; None: not at all."""
        return LOOK_LIVE_S if self.stage in ("greeting", "memory", "still") else None

    @property
    def going(self) -> bool:
        """Something is being sent."""
        return self.stage in ("greeting", "disk", "memory", "still")

    def look(self) -> None:
        """Go on with what has happened. Raises nothing: where it comes to nothing, the machine goes on."""
        if not self.going:
            return
        try:
            self.qmp.drain()
            taken = [one for one in self.qmp.events if one[0].startswith("BLOCK_JOB") or one[0] == "MIGRATION"]
            self.qmp.events = [one for one in self.qmp.events if one not in taken]
            for name, data in taken:
                if name == "MIGRATION":
                    self._sent(str(data.get("status")))
                elif name == "BLOCK_JOB_READY" and self.stage == "disk":
                    self._send()
                elif name in JOB_ENDS or name == "BLOCK_JOB_ERROR":
                    raise QmpError(f"its disk could not be copied: {data.get('error', name)}")
            if self.line is not None and self.line not in self.keeper.asking:  # type: ignore[attr-defined]
                raise QmpError("whoever asked for it has gone")
            if self.stage == "greeting" and time.monotonic() >= self.until:
                raise QmpError(f"its target said nothing for {SAY_S:g} s")
            if self.stage == "memory":
                self._look_at_rest()
            elif self.stage == "still" and self.may:
                self._switch()
            elif self.stage == "still" and time.monotonic() >= self.until:
                raise QmpError(f"its target did not say within {GRANT_S:g} s that it may begin")
        except (QmpError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # whatever QEMU says: the machine goes on
            if self.going:  # else its target may have begun it
                self.end(str(error))

    def _send(self) -> None:
        """The disk is there, and what is written goes there too: now the memory."""
        try:  # from here on what it writes is at its target before it goes on, so that little of it is left when it stands still
            self.qmp.ask("block-job-change", id=MIRROR, type="mirror", **{"copy-mode": "write-blocking"})
        except QmpError:
            pass  # QEMU before 8.2
        self.lines[MEMORY] = self._connected(MEMORY)
        self.qmp.ask_with(self.lines[MEMORY].fileno(), "getfd", fdname=MEMORY)
        self.qmp.ask("migrate-set-capabilities", capabilities=[{"capability": name, "state": on} for name, on in (("x-ignore-shared", False), ("events", True), ("pause-before-switchover", True))])
        small = self.size <= min(self.speed, USUAL) * NEAR_S
        self.qmp.ask("migrate-set-parameters", **{"max-bandwidth": HOLD if small else self.speed, "downtime-limit": DOWNTIME_MS})
        self.qmp.ask("migrate", uri=f"fd:{MEMORY}")
        self.stage = "memory"
        if small:
            self._nearly(GRANT_S + FORCE_S)

    def _look_at_rest(self) -> None:
        """How much of the memory is left."""
        now = time.monotonic()
        if self.may:
            if now >= self.until and self.forced:
                raise QmpError("what carries it takes nothing any more")
            if now >= self.until:
                self.forced, self.until = True, now + DRAIN_S + TIMES * self.size / self.speed
                self.qmp.ask("migrate-set-parameters", **{"downtime-limit": LONGEST_MS})
            return
        if self.near:
            if now >= self.until:
                raise QmpError(f"its target did not say within {GRANT_S + FORCE_S:g} s that it may begin")
            return
        ram = self.qmp.ask("query-migrate").get("ram") or {}
        rate = float(ram.get("mbps", 0)) * 125_000
        if int(ram.get("dirty-sync-count", 0)) > 1 or (rate and int(ram.get("remaining", 0)) <= rate * NEAR_S):
            self.qmp.ask("migrate-set-parameters", **{"max-bandwidth": HOLD})
            self._nearly(GRANT_S + FORCE_S)

    def _nearly(self, seconds: float) -> None:
        """Tell the agent, once."""
        if not self.near:
            self.near, self.until = True, time.monotonic() + seconds
            line, self.line = self.line, None
            if line in self.keeper.asking:  # type: ignore[attr-defined]
                self.keeper.answer(line, {"done": True})  # type: ignore[attr-defined]

    def _heard(self) -> None:
        """The target's keeper says something, or has gone."""
        if WORD not in self.lines:
            return  # it was hung up in the same turn
        try:
            data = self.lines[WORD].recv(MAX_WORD)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.said += data
        if data and len(self.said) <= MAX_WORD:
            if self.said == MAY and not self.may and self.going:
                self._may()
            return
        self._unregister(WORD)
        if self.going:
            self.end("its target, or what carries it there, has gone")

    def _may(self) -> None:
        """Its target may begin it."""
        try:
            write(os.path.join(self.keeper.folder, LEFT), {"at_ms": int(time.time() * 1000)})  # type: ignore[attr-defined]
            self.qmp.ask("migrate-set-parameters", **{"max-bandwidth": self.speed})
        except (OSError, QmpError) as error:  # a disk that is full must not end it
            self.end(f"that it leaves could not be written down, or told: {error}")
            return
        self.may, self.until = True, time.monotonic() + FORCE_S
        self.look()

    def _sent(self, status: str) -> None:
        """QEMU says how far it is with the memory."""
        if status == "pre-switchover":
            self.stage, self.still_since = "still", time.monotonic()
            self._nearly(GRANT_S)
            self.until = self.still_since + GRANT_S
        elif status in ("failed", "cancelled"):
            raise QmpError(str(self.machine.trouble("QEMU could not send it")))
        elif status == "completed":
            raise QmpError("QEMU sent all of it before it was told to")  # it waits for that: see `_send`

    def _switch(self) -> None:
        """It stands still, and the target may begin: the last of its disk, of its memory, and its devices."""
        seconds = DRAIN_S + TIMES * int((self.qmp.ask("query-migrate").get("ram") or {}).get("remaining", 0)) / self.speed
        self.qmp.ask("block-job-cancel", device=MIRROR)  # a copy that is ready ends well by this, with all that was written
        name, data = self.qmp.until_one(JOB_ENDS, "device", MIRROR, seconds)
        if name != "BLOCK_JOB_COMPLETED" or "error" in data:
            raise QmpError(f"the last of its disk could not be copied: {data.get('error', name)}")
        self.qmp.ask("blockdev-del", **{"node-name": MIRROR})
        self.qmp.events = [one for one in self.qmp.events if one[0] != "MIGRATION"]
        self.qmp.ask("migrate-continue", state="pre-switchover")
        if self.qmp.until("MIGRATION", "status", ("completed", "failed", "cancelled"), seconds) != "completed":
            raise QmpError(str(self.machine.trouble("QEMU could not send the last of it")))
        # From here on it does not go on by itself, whatever happens.
        self.stage = "over"
        word = self.lines[WORD]
        word.settimeout(SAY_S)
        try:
            word.sendall(OVER + f"{(time.monotonic() - self.still_since) * 1e6:.0f}\n".encode())
        except OSError:
            pass  # the target never begins then, and says so
        word.setblocking(False)
        try:
            write(os.path.join(self.keeper.folder, "paused"), {"at_ms": int(time.time() * 1000)})  # type: ignore[attr-defined]
        except OSError:
            pass  # it is shown as running then; that it has left is written down

    def end(self, why: str) -> None:
        """Nothing comes of it: the machine goes on, as QEMU lets it where what it sent is stopped. That it had left is not taken back by this, but by the hub."""
        self.stage = "ended"
        self._hang_up()  # before all else: the target never begins, and QEMU waits for nobody
        if self.line is not None and self.line in self.keeper.asking:  # type: ignore[attr-defined]
            self.keeper.answer(self.line, {"failed": why})  # type: ignore[attr-defined]
        self.line = None
        self._forget()
        try:
            self._go_on()
        except QmpError:
            pass  # it has ended, or is asked again (`stay`)

    def _go_on(self) -> None:
        """Where it stands still for its way, and was through when that was stopped too: its target has not heard of that, and never begins. Raises `QmpError`."""
        told = self.qmp.ask("query-status")
        if isinstance(told, dict) and told.get("status") in ("postmigrate", "finish-migrate", "paused"):
            self.qmp.ask("cont")  # it opens its disks again

    def _forget(self) -> None:
        """Stop what QEMU does for it."""
        qmp = self.qmp
        try:
            told = qmp.ask("query-migrate")
            if isinstance(told, dict) and told.get("status") in ("setup", "active", "pre-switchover", "device", "cancelling"):
                qmp.events = [one for one in qmp.events if one[0] != "MIGRATION"]
                qmp.ask("migrate_cancel")
                qmp.until("MIGRATION", "status", ("completed", "failed", "cancelled"))
        except QmpError:
            pass
        try:
            jobs = qmp.ask("query-block-jobs")
            if isinstance(jobs, list) and any(job.get("device") == MIRROR for job in jobs):
                qmp.ask("block-job-cancel", device=MIRROR, force=True)
                qmp.until_one(JOB_ENDS, "device", MIRROR)
        except QmpError:
            pass
        for command, arguments in (
            ("blockdev-del", {"node-name": MIRROR}), ("closefd", {"fdname": MIRROR}), ("closefd", {"fdname": MEMORY}),
            ("migrate-set-capabilities", {"capabilities": [{"capability": "pause-before-switchover", "state": False}]}),
        ):
            try:
                qmp.ask(command, **arguments)
            except QmpError:
                pass  # it had not come that far
        qmp.events = [one for one in qmp.events if not one[0].startswith("BLOCK_JOB") and one[0] != "MIGRATION"]

    def stay(self) -> None:
        """It is this node's again, which the hub says when its target never began it. Raises `QmpError`."""
        if self.going:
            self.end("it stays")
        elif self.stage == "over":
            self._hang_up()
            self._forget()
        self._go_on()
        self.stage = "ended"


class Arriving:
    """A machine that comes while it runs elsewhere: QEMU waits for it."""

    def __init__(self, keeper: object, folder: str) -> None:
        self.keeper, self.machine, self.qmp, self.folder = keeper, keeper.machine, keeper.machine.qmp, folder  # type: ignore[attr-defined]
        self.may = self.over = self.whole = False
        self.over_at = 0.0
        self.still_ms = 0.0
        """For how long it stood still, as far as both keepers can tell: without the way of a word from one to the other."""
        self.word: socket.socket | None = None
        self.said = b""
        self.gone = False
        self.asked: list = []  # type: ignore[type-arg]
        """The agents that have said that it may begin, and wait until it has."""
        self.listeners: dict = {}  # type: ignore[type-arg]

    def wait(self) -> bool:
        """Until all of it is here and it may begin; False where it is to be ended. Raises `Trouble` and `QmpError` where it never will be."""
        selector = self.keeper.selector  # type: ignore[attr-defined]
        os.makedirs(self.folder, exist_ok=True, mode=0o700)
        for name in CHANNELS:
            try:
                os.unlink(os.path.join(self.folder, name))
            except FileNotFoundError:
                pass
            listener = self.listeners[name] = socket.socket(socket.AF_UNIX)
            _at(self.folder, name, listener.bind)
            listener.listen(1)
        self.qmp.ask_with(self.listeners[DISK].fileno(), "getfd", fdname=DISK)
        self.qmp.ask("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": False}, {"capability": "events", "state": True}])
        self.qmp.ask("nbd-server-start", addr={"type": "fd", "data": {"str": DISK}}, **{"max-connections": 1})
        self.qmp.ask("block-export-add", **{"type": "nbd", "id": DISK, "node-name": "disk", "name": DISK, "writable": True})
        for name, act in ((MEMORY, self._comes), (WORD, self._met)):
            selector.register(self.listeners[name], selectors.EVENT_READ, act)
        ended = os.pidfd_open(self.machine.process.pid)
        selector.register(ended, selectors.EVENT_READ, lambda: None)
        selector.register(self.machine.qmp_line, selectors.EVENT_READ, self._heard_qemu)
        self.keeper.attend()  # type: ignore[attr-defined]
        tell("waiting")
        try:
            while not self.begins:
                if self.keeper.wish:  # type: ignore[attr-defined]
                    return False
                if self.machine.process.poll() is not None:
                    raise self.machine.trouble("QEMU ended while it took it in")
                if self.gone and not self.over:
                    raise Trouble("the node that it came from, or what carried it, has gone before all of it was here")
                for key, _ in selector.select():
                    key.data()
            self.qmp.ask("nbd-server-stop")
        finally:
            for one in (ended, self.machine.qmp_line):
                selector.unregister(one)
            os.close(ended)
            for name in CHANNELS:
                self._close(name)
            if self.word is not None:
                try:
                    selector.unregister(self.word)
                except KeyError:
                    pass
                self.word.close()
        return True

    def begun(self) -> None:
        """It runs here: whoever waits for that is told."""
        self.still_ms += (time.monotonic() - self.over_at) * 1e3
        for line in self.asked:
            if line in self.keeper.asking:  # type: ignore[attr-defined]
                self.keeper.answer(line, {"done": True, "still_ms": round(self.still_ms, 1)})  # type: ignore[attr-defined]
        self.asked = []

    @property
    def begins(self) -> bool:
        """Nothing is missing."""
        return self.may and self.over and self.whole

    def go(self, line: socket.socket) -> None:
        """It may begin, as soon as all of it is here."""
        self.asked.append(line)
        self.may = True
        self._say()

    def _close(self, name: str) -> None:
        """Take one connection, and no more."""
        listener = self.listeners.pop(name, None)
        if listener is not None:
            try:
                self.keeper.selector.unregister(listener)  # type: ignore[attr-defined]
            except KeyError:
                pass
            listener.close()
            try:
                os.unlink(os.path.join(self.folder, name))
            except OSError:
                pass

    def _comes(self) -> None:
        """The memory."""
        if MEMORY not in self.listeners:
            return
        line, _ = self.listeners[MEMORY].accept()
        self._close(MEMORY)
        try:
            self.qmp.ask_with(line.fileno(), "getfd", fdname=MEMORY)
        finally:
            line.close()
        self.qmp.ask("migrate-incoming", uri=f"fd:{MEMORY}")

    def _met(self) -> None:
        """The source's keeper is there."""
        if WORD not in self.listeners:
            return
        self.word, _ = self.listeners[WORD].accept()
        self._close(WORD)
        self.word.settimeout(SAY_S)
        self.keeper.selector.register(self.word, selectors.EVENT_READ, self._hears)  # type: ignore[attr-defined]
        self._say()

    def _say(self) -> None:
        if self.may and self.word is not None and not self.gone:
            try:
                self.word.sendall(MAY)
            except OSError:
                self.gone = True

    def _hears(self) -> None:
        """The source's keeper says something, or has gone."""
        assert self.word is not None
        try:
            data = self.word.recv(MAX_WORD)
        except OSError:
            data = b""
        self.said = (self.said + data)[: MAX_WORD]
        if not self.over and self.said.startswith(OVER) and self.said.endswith(b"\n"):
            told = self.said[len(OVER):].strip()
            self.over, self.over_at, self.still_ms = True, time.monotonic(), int(told) / 1e3 if told.isdigit() else 0.0
        if not data:
            self.gone = True
            self.keeper.selector.unregister(self.word)  # type: ignore[attr-defined]

    def _heard_qemu(self) -> None:
        """How far it is with the memory."""
        if not self.qmp.drain():
            raise self.machine.trouble("QEMU ended while it took it in")
        for name, data in self.qmp.events:
            if name == "MIGRATION" and data.get("status") == "completed":
                self.whole = True
            elif name == "MIGRATION" and data.get("status") == "failed":
                raise self.machine.trouble("QEMU could not take it in")
        self.qmp.events = [one for one in self.qmp.events if one[0] != "MIGRATION"]
