"""The target's side of a move while it runs: see `vm_live_keeper`. Part of `vm_keeper`."""

import os
import selectors
import socket
import sys
import time

if __package__:
    from .keeping import Trouble, tell
    from .vm_live_keeper import CHANNELS, DISK, MAX_WORD, MAY, MEMORY, OVER, SAY_S, WORD, reach
else:  # run by a script, without the package
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from keeping import Trouble, tell  # type: ignore[import-not-found,no-redef]
    from vm_live_keeper import CHANNELS, DISK, MAX_WORD, MAY, MEMORY, OVER, SAY_S, WORD, reach  # type: ignore[import-not-found,no-redef]


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
            reach(self.folder, name, listener.bind)
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
