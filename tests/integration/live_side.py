"""What carries a virtual machine that moves while it runs, in one process: connections from the sockets of one folder to those of another, which a test can cut."""

import socket
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from edge_runtime.workloads.drivers.vm_live_keeper import CHANNELS

ROOT = Path(__file__).resolve().parents[2]
BESIDE = ROOT / ".novacron/qemu/qemu-system-x86_64"
"""QEMU 10 as the set-up lays it out."""

NONE = "no QEMU that sends emulated machines whole (10 or later; tools/setup/qemu.sh)"


class Carried:
    """Makes `source` with a socket of each name; who connects to one is connected to that of `target`."""

    def __init__(self, source: Path, target: Path, frozen: tuple[str, ...] = ()) -> None:
        """`frozen`: names by which nothing gets through from the beginning."""
        self._source, self._target, self._lines = source, target, list[socket.socket]()
        self._listeners = {}
        self._swallowed, self._cuts = b"", True
        self.swallowed = threading.Event()
        self._frozen: set[str] = set(frozen)
        self.bytes = dict.fromkeys(CHANNELS, 0)
        """Sent from the source, by name."""
        self._lock, self._over = threading.Lock(), threading.Event()
        new = source.with_name(f".{source.name}.new")
        new.mkdir()
        for name in CHANNELS:
            listener = self._listeners[name] = socket.socket(socket.AF_UNIX)
            listener.bind(str(new / name))
            listener.listen(4)
            threading.Thread(target=self._accept, args=(name, listener), daemon=True).start()
        new.rename(source)

    def _accept(self, name: str, listener: socket.socket) -> None:
        while True:
            try:
                line, _ = listener.accept()
            except OSError:
                return
            other = socket.socket(socket.AF_UNIX)
            with self._lock:
                self._lines += [line, other]
            try:
                other.connect(str(self._target / name))
            except OSError:
                line.close()
                other.close()
                continue
            for one, two, counts in ((line, other, name), (other, line, "")):
                threading.Thread(target=self._pump, args=(one, two, counts, name), daemon=True).start()

    def _pump(self, one: socket.socket, two: socket.socket, counts: str, name: str) -> None:
        with suppress(OSError):
            while data := one.recv(1 << 20):
                while name in self._frozen:
                    if self._over.wait(0.05):
                        return
                if self._swallowed and data.startswith(self._swallowed):
                    self.swallowed.set()
                    if self._cuts:
                        break
                    continue
                two.sendall(data)
                if counts:
                    self.bytes[counts] += len(data)
        for line in (one, two):
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def freeze(self, *names: str) -> None:
        """Nothing gets through by these any more, and nobody sees that."""
        self._frozen |= set(names)

    def swallow(self, word: bytes, cuts: bool = True) -> None:
        """Lose what begins so, and cut the connection through which it comes, or not."""
        self._swallowed, self._cuts = word, cuts

    def cut(self) -> None:
        """Nothing gets through any more."""
        self._over.set()
        for listener in self._listeners.values():
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        with self._lock:
            for line in self._lines:
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)
                line.close()


def live_qemu() -> str:
    """A QEMU that can; empty where there is none."""
    from edge_runtime.workloads.drivers.qemu_driver import version_of
    from edge_runtime.workloads.drivers.vm_probe import too_old

    for program in (str(BESIDE), "qemu-system-x86_64"):
        words = version_of(program).partition("version ")[2].split()
        if words and not too_old(words[0]):
            return program
    return ""


needs_live = pytest.mark.skipif(not live_qemu(), reason=NONE)
