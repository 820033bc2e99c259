"""Faults at every step of a move: bits flipped, bytes lost, repeated and swapped, streams cut, either side killed; the destination is equal or absent, always.

Two processes move a file through a wire that does its worst at a chosen byte (`migration_proxy.py`). Steps are bytes towards the receiver: in the hellos, in the
opening, in the midst of extents, at the end; and for kills also the moment at which the destination has just become visible. A killed side is started again,
and the move has to end well. After each: the destination equal byte by byte, never visible before it was whole, the source as it was.
"""

import hashlib
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from .harness import ROOT, arguments, die_with_parent, machine, note, report, stop
from .migration_proxy import WIRE_FAULTS, Fault, Proxy

MIB = 1 << 20
SIZE = 24 * MIB - 777
"""Bytes of what is moved: some twenty extents, half of it incompressible, the last page not whole."""
STEPS = (1, 60, 119, 121, 200, 400, 5_000, 300_000, 3_000_000, 8_000_000)
"""Bytes towards the receiver at which something happens: hello, opening, extents early and late."""
LATE_S = 6
"""Patience of ends of which one is killed when all is done: the other may be gone by then, as it should."""
LOSS_S = 30
"""Patience where bytes never come: a hello is given ten seconds, any other stream half of this, and then there is another."""
END_S = 60
"""A move ends within that, or counts as hung."""


class Ends:
    """Sender and receiver processes around a proxy; a killed one is started again."""

    def __init__(self, folder: Path, source: Path, patience: float) -> None:
        self._patience = str(patience)
        self._lock = threading.Lock()
        self._killed: set[str] = set()
        self.source, self.target = source, folder / "moved"
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "NOVACRON_MIGRATION_KEY": secrets.token_hex(32)}
        self.receiver, address = self._receive()
        self.proxy = Proxy(address)
        self.sender = self._send()

    def _receive(self) -> tuple["subprocess.Popen[str]", tuple[str, int]]:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpu_migration", "receive", str(self.target), "--patience", self._patience], env=self._environment, preexec_fn=die_with_parent, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        assert process.stderr is not None
        host, _, port = process.stderr.readline().split()[-1].rpartition(":")
        return process, (host, int(port))

    def _send(self) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "gpu_migration", "send", str(self.source), f"{self.proxy.address[0]}:{self.proxy.address[1]}", "--patience", self._patience],
            env=self._environment, preexec_fn=die_with_parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )

    def kill(self, side: str) -> None:
        """Kill a side by force; `end` starts it again."""
        with self._lock:
            process = self.sender if side == "sender" else self.receiver
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
                self._killed.add(side)

    def _again(self) -> None:
        """Start what was killed. By the thread that lasts: a child ends with the thread that started it."""
        with self._lock:
            if "receiver" in self._killed:
                self.receiver, self.proxy.target = self._receive()
                self.proxy.cut_all()
            if "sender" in self._killed:
                self.sender = self._send()
            self._killed.clear()

    def end(self) -> str:
        """Wait for both; "" or what went wrong."""
        by = time.monotonic() + END_S
        try:
            while time.monotonic() < by:
                self._again()
                with self._lock:
                    done = not self._killed and all(process.poll() is not None for process in (self.sender, self.receiver))
                    failed = next((process for process in (self.sender, self.receiver) if process.poll() and process.returncode > 0), None)
                if done or failed is not None:
                    return failed.communicate()[1].strip()[-300:] if failed is not None else ""
                time.sleep(0.02)
            return "hung"
        finally:
            for process in (self.sender, self.receiver):
                stop(process)
                process.communicate()
            self.proxy.close()


def killing(ends: Ends, side: str) -> Fault:
    """Kill a side when the byte passes; the byte's stream ends with it."""

    def fault(_: Proxy, __: bytes) -> None:
        ends.kill(side)

    return fault


def scenario(folder: Path, source: Path, what: str, at: int) -> dict[str, Any]:
    """One move with one fault; `at` 0: when the destination has become visible."""
    ends = Ends(folder, source, (END_S if what.startswith("kill") else LOSS_S) if at else LATE_S)
    watching = threading.Event()
    early: list[str] = []
    digest = hashlib.sha256(source.read_bytes()).hexdigest()

    def watch() -> None:
        """The destination, whenever it can be seen, is whole."""
        while not watching.wait(0.002):
            if ends.target.exists():
                if hashlib.sha256(ends.target.read_bytes()).hexdigest() != digest:
                    early.append("visible before it was whole")
                if not at:
                    ends.kill(what.removeprefix("kill "))
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    if at:
        ends.proxy.plan(at, killing(ends, what.removeprefix("kill ")) if what.startswith("kill") else WIRE_FAULTS[what])
    wrong = ends.end()
    watching.set()
    watcher.join()
    if not at and ends.target.exists() and any(words in wrong for words in ("no sender", "out of reach", "no answer")):
        wrong = ""  # all was done, farewell and all, and who was started again finds nobody to ask
    if not wrong and not (ends.target.exists() and hashlib.sha256(ends.target.read_bytes()).hexdigest() == digest):
        wrong = "the destination is not equal"
    if hashlib.sha256(source.read_bytes()).hexdigest() != digest:
        wrong = "the source was harmed"
    wrong = wrong or "".join(early)
    if at and not ends.proxy.fired:
        wrong = wrong or "the fault did not take place"
    left = [path for path in folder.iterdir() if path != source]
    for path in left:
        path.unlink()
    return {"what": what, "at": at, "wrong": wrong}


def main() -> int:
    """Exit status 0 where every move ended well."""
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    options = parser.parse_args()
    about = machine()
    rng = random.Random(1)
    outcomes: list[dict[str, Any]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary:
        folder = Path(temporary)
        source = folder / "source"
        text = b"".join(b"%d device reading; " % rng.randrange(10**6) for _ in range(MIB))[:MIB]

        def block(n: int) -> bytes:
            return (bytes(MIB), rng.randbytes(MIB), text)[n % 3]

        # Random bytes are new in each block: a reference would go in their place, and less over the wire than the last step.
        source.write_bytes(b"".join(block(n) if n % 2 else rng.randbytes(MIB // 2) + block(n)[: MIB // 2] for n in range(24))[:SIZE])
        for what in (*WIRE_FAULTS, "kill sender", "kill receiver"):
            if options.only in what:
                for at in (*STEPS, 0) if what.startswith("kill") else STEPS:
                    outcomes.append(scenario(folder, source, what, at))
                    note(options, f"{what} at {at}: {outcomes[-1]['wrong'] or 'well'}")
    wrong = [one for one in outcomes if one["wrong"]]
    return report(
        options, about, "whatever happens to the wire or either side, the destination is equal or absent and the source unharmed", len(outcomes) - len(wrong), f"of {len(outcomes)} moves ended well",
        bool(outcomes) and not wrong, inputs={"bytes": SIZE, "steps": STEPS}, details={"wrong": wrong, "seconds": round(time.monotonic() - began, 1)},
    )


if __name__ == "__main__":
    sys.exit(main())
