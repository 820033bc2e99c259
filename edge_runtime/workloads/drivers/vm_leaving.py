"""The source's side of a move while it runs: see `vm_live_keeper`. Part of `vm_keeper`."""

import os
import selectors
import socket
import sys
import time

if __package__:
    from .keeping import write
    from .qemu_qmp import QmpError
    from .vm_live_keeper import (
        DISK,
        DOWNTIME_MS,
        DRAIN_S,
        FASTEST,
        FORCE_S,
        GRANT_S,
        HOLD,
        JOB_ENDS,
        LEFT,
        LONGEST_MS,
        LOOK_LIVE_S,
        MAX_WORD,
        MAY,
        MEMORY,
        MIRROR,
        NEAR_S,
        OVER,
        SAY_S,
        TIMES,
        USUAL,
        WORD,
        reach,
    )
else:  # run by a script, without the package
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from keeping import write  # type: ignore[import-not-found,no-redef]
    from qemu_qmp import QmpError  # type: ignore[import-not-found,no-redef]
    from vm_live_keeper import (  # type: ignore[import-not-found,no-redef]
        DISK,
        DOWNTIME_MS,
        DRAIN_S,
        FASTEST,
        FORCE_S,
        GRANT_S,
        HOLD,
        JOB_ENDS,
        LEFT,
        LONGEST_MS,
        LOOK_LIVE_S,
        MAX_WORD,
        MAY,
        MEMORY,
        MIRROR,
        NEAR_S,
        OVER,
        SAY_S,
        TIMES,
        USUAL,
        WORD,
        reach,
    )


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
            reach(self.folder, name, line.connect)
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
