"""Guests that are migrated while they run, over loopback, at several rates of writing: how long they stand still and how long it takes, by this engine and by QEMU alone.

A guest of --memory MiB rewrites so many percent of it a second, page by page in a random order, and checks every page; after each move it must have found all of them right, twice over. QEMU alone is
QEMU 10 with memory of its own, without a bandwidth limit: by its defaults, with a downtime limit of 20 ms, and by multifd with zstd. Standing still is from QEMU's STOP at the source to its RESUME at the
target, for both engines, median and p99; beside it the total, from the order to move until it runs there, which over loopback is several times longer with this engine: a standstill is not won by that unsaid. And what the guest's
console shows: from the last of its ticks (every 5 ms) here to the first there, in which on one machine the source's end takes processors too. What is equal for both is the time that they may stop it for: 10 ms are tried first here, 300 ms
are QEMU's default, and 20 ms its setting that comes near ours. Needs tools/setup/qemu.sh, tools/setup/guest_kernel.sh, gcc.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from gpu_migration import dirty
from gpu_migration.qemu_qmp import Qmp, at
from gpu_migration.qemu_target import MEMORY
from gpu_migration.sources import FileSource

from . import live_guest
from .harness import ROOT, Stolen, arguments, die_with_parent, free_port, machine, note, percentile, report, stop
from .live_guest import Console, Guest, Machine
from .migration_guest import Missing

IDLE_S = 0.050
"""Standing still that a guest at rest may take, median."""
PERCENTS = (0, 1, 5, 10)
"""Of the guest's memory that it rewrites a second."""
KEY = bytes(range(32))
MOVE_S = 120.0
"""A move takes at most so long."""
CHECKED = 0.6
"""Share of the guest's memory that its program fills: the rest is its kernel's, and free."""
UNLIMITED = 1 << 40


@dataclass(slots=True)
class Move:
    """One. Seconds."""

    stood: float
    ticks: float
    total: float
    more: dict[str, Any] = field(default_factory=dict)


def ours(machine_: Machine, guest: Guest, folder: Path) -> tuple[Move, Guest]:
    """Move a guest by this engine, by its two commands; it is there then, and right. Raises Missing."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NOVACRON_MIGRATION_KEY": KEY.hex()}
    words = [sys.executable, "-m", "gpu_migration"]
    receive = subprocess.Popen([*words, "vm-receive", str(folder), "--", *machine_.command(MEMORY, folder / "console")], env=environment, preexec_fn=die_with_parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    opened: list[Console] = []
    watching = threading.Thread(target=lambda: opened.append(Console(folder / "console")), daemon=True)
    watching.start()  # before the guest is there: what it says to nobody is lost
    try:
        assert receive.stderr is not None
        send = subprocess.run([*words, "vm-send", str(guest.control), receive.stderr.readline().split()[-1]], env=environment, capture_output=True, text=True, timeout=MOVE_S)
        if send.returncode:
            raise Missing(f"vm-send: {send.stderr}")
        said, _ = receive.communicate(timeout=MOVE_S)
    finally:
        stop(receive)
    moved = json.loads(send.stdout)
    watching.join(MOVE_S)
    there = Guest(folder / "qmp", opened[0], pid=json.loads(said)["pid"])
    move = _look(guest, there, moved["running_at"] - moved["stopped_at"], moved["total_s"])
    move.more = {name: moved[name] for name in ("passes", "last_pages", "pages", "memory_s", "look_s", "parts_s")}
    return move, there


def qemu_alone(capabilities: tuple[str, ...], parameters: dict[str, Any]) -> Callable[[Machine, Guest, Path], tuple[Move, Guest]]:
    """How QEMU moves a guest by itself."""

    def move(machine_: Machine, guest: Guest, folder: Path) -> tuple[Move, Guest]:
        folder.mkdir(exist_ok=True)
        control, console, port = folder / "qmp", folder / "console", free_port()
        process = subprocess.Popen(
            [*machine_.command("", console), "-qmp", f"unix:{control},server=on,wait=off", "-incoming", "defer"], preexec_fn=die_with_parent, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        source, target, watched = Qmp(guest.control, MOVE_S), Qmp(control, MOVE_S), Console(console)
        try:
            for qmp in (source, target):
                qmp("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in ("events", *capabilities)])
                qmp("migrate-set-parameters", **{"max-bandwidth": UNLIMITED, **parameters})
            target("migrate-incoming", uri=f"tcp:127.0.0.1:{port}")
            source.events.clear()
            began = time.monotonic()
            source("migrate", uri=f"tcp:127.0.0.1:{port}")
            stopped = at(source.until("STOP"))
            running = at(target.until("RESUME"))
            total = time.monotonic() - began
        finally:
            source.close()
            target.close()
        there = Guest(control, watched, process, process.pid)
        return _look(guest, there, running - stopped, total), there

    return move


def _look(before: Guest, there: Guest, stood: float, total: float) -> Move:
    """Both consoles, then that the memory is whole; the guest that was left is ended."""
    try:
        there.console.wait_ticks(1)
        move = Move(stood, there.console.ticks[0] - before.console.ticks[-1], total)
        there.sweeps(2)
        return move
    except BaseException:
        there.end()
        raise
    finally:
        before.end()
        shutil.rmtree(before.control.parent)  # its memory is in this machine's, and there are many moves


WAYS: dict[str, Callable[[Machine, Guest, Path], tuple[Move, Guest]]] = {
    "ours": ours,
    "qemu": qemu_alone((), {}),
    "qemu, 20 ms asked for": qemu_alone((), {"downtime-limit": 20}),
    "qemu multifd zstd": qemu_alone(("multifd",), {"multifd-channels": 2, "multifd-compression": "zstd"}),
}


def series(way: str, machine_: Machine, folder: Path, rounds: int) -> tuple[list[Move], list[str]]:
    """Moves of one guest by one way, one after the other, and what went wrong."""
    moves: list[Move] = []
    guest = live_guest.boot(machine_, folder / "0", memory=way == "ours")
    try:
        guest.sweeps(1)
        for n in range(1, rounds + 1):
            move, guest = WAYS[way](machine_, guest, folder / str(n))
            moves.append(move)
    except (ValueError, Missing) as error:
        return moves, [str(error)[:300]]
    finally:
        guest.end()
        shutil.rmtree(folder)
    return moves, []


def looks(machine_: Machine, folder: Path) -> dict[str, float]:
    """Milliseconds that one look at the memory of a guest that runs takes, by each tracker; the least of five."""
    guest, found = live_guest.boot(machine_, folder), {}
    source = FileSource(folder / "memory")
    try:
        qmp = Qmp(guest.control)
        pid = qmp.pid
        qmp.close()
        for kind in ("protect", "hash"):
            with contextlib.closing(dirty.tracker(pid, source, 2, kind)) as tracker:
                tracker.arm()
                times = []
                for _ in range(5):
                    began = time.monotonic()
                    tracker.written()
                    times.append(time.monotonic() - began)
                found[tracker.name] = round(min(times) * 1e3, 3)
    finally:
        source.close()
        guest.end()
    return found


def figures(moves: list[Move]) -> dict[str, Any]:
    """Milliseconds standing still and seconds in all."""
    stood, ticks = [move.stood * 1e3 for move in moves], [move.ticks * 1e3 for move in moves]
    return {
        "still_p50_ms": round(percentile(stood, 0.5), 1), "still_p99_ms": round(percentile(stood, 0.99), 1), "ticks_p50_ms": round(percentile(ticks, 0.5), 1), "ticks_p99_ms": round(percentile(ticks, 0.99), 1),
        "total_p50_s": round(percentile([move.total for move in moves], 0.5), 2), "moves": len(moves), "last": moves[-1].more if moves else {},
    }


def against(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How much longer QEMU alone stands still (median and p99) and takes in all, by rate and setting: 2 is twice as long."""
    names = {"still_p50": "still_p50_ms", "still_p99": "still_p99_ms", "total_p50": "total_p50_s"}
    return {
        rate: {way: {name: round(one[key] / ways["ours"][key], 2) for name, key in names.items()} for way, one in ways.items() if way != "ours" and one["moves"] and ways["ours"]["moves"]}
        for rate, ways in found.items() if "ours" in ways
    }


def main() -> int:
    """Exit status 0 where it stands still no longer than with QEMU alone at any rate, at rest at most IDLE_S (median), and every page was right each time."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--memory", type=int, default=512, help="MiB of the guest")
    parser.add_argument("--percents", type=int, nargs="*", default=PERCENTS, help="of the memory rewritten a second")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    options = parser.parse_args()
    about, stolen = machine(), Stolen()
    program = live_guest.qemus().get("10")
    if program is None:
        print("migration_live: there is no QEMU 10, and QEMU 7.2 alone damages guests: tools/setup/qemu.sh", file=sys.stderr)
        return 2
    found: dict[str, dict[str, Any]] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="live-") as scratch:
        folder = Path(scratch)
        try:
            base = Machine(program, live_guest.kernel(), live_guest.initial(folder), options.memory, int(options.memory * CHECKED), 0, 20_000)
            cost = looks(base, folder / "looks")
            for percent in options.percents:
                for way in options.ways:
                    guest = replace(base, rewrites=options.memory * 256 * percent // 100)
                    moves, bad = series(way, guest, folder / f"{percent}-{way.replace(' ', '-').replace(',', '')}", options.rounds)
                    wrong += [f"{percent} %, {way}: {text}" for text in bad]
                    found.setdefault(f"{percent} %", {})[way] = figures(moves)
                    note(options, f"{percent} % a second, {way}: {found[f'{percent} %'][way]}")
        except Missing as error:
            print(f"migration_live: {error}", file=sys.stderr)
            return 2
    own = {rate: ways.get("ours", {}).get("still_p50_ms") for rate, ways in found.items()}
    peers = {rate: min((one["still_p50_ms"] for way, one in ways.items() if way != "ours"), default=None) for rate, ways in found.items()}
    ours_wrong = [text for text in wrong if ", ours:" in text]
    idle = own.get("0 %")
    shorter = all(own[rate] is not None and peers[rate] is not None and own[rate] <= peers[rate] for rate in found)
    return report(
        options, about, f"a guest that is migrated while it runs stands still at most {IDLE_S * 1e3:g} ms at rest, and at any rate no longer than with QEMU alone", idle if idle is not None else -1, "ms standing still at rest, median",
        idle is not None and idle <= IDLE_S * 1e3 and shorter and not ours_wrong, spread_={rate: ways.get("ours") for rate, ways in found.items()},
        peer={rate: {way: one for way, one in ways.items() if way != "ours"} for rate, ways in found.items()},
        inputs={"memory_mib": options.memory, "checked_share": CHECKED, "rounds": options.rounds, "qemu": ".".join(map(str, live_guest.version(program))), "processors": "emulated"},
        details={"shorter_than_qemu_alone": shorter, "qemu_alone_times_ours": against(found), "wrong": wrong, "look_ms": cost, "stolen_percent": stolen.percent()},
    )


if __name__ == "__main__":
    sys.exit(main())
