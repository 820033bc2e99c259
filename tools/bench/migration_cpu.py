"""Real guest memory over loopback by the processors alone, both ends on this machine: GB/s of guest memory and ratio, beside QEMU's own migration of the same guest.

A Debian guest is booted (`migration_guest.py`), paused, and its memory moved from its file to a file in memory by two processes of ours, with every byte
compared afterwards; then QEMU moves the same paused guest to another QEMU, by multifd without and with zstd, without a bandwidth limit. QEMU's bytes are those
of the interface of a network namespace of its own, for its own count leaves out what it should not; ours are those given to the sockets. Ratio: memory by
wire bytes; without zero pages: the other pages by wire bytes. Ours is held to a link of `--link-gbit` (10); QEMU is not, and ours without it is printed too. QEMU does not
encrypt: ours without encryption stands beside the figures that count (`migration_plain.py`). All memory, at both ends and QEMU's too, is in /dev/shm; ours in a tmpfs of huge pages, as
hosts of guests may have it, is printed as well (`--huge-pages`: all in these). `--images FOLDER` keeps the guest's pieces and its memory at three moments, and moves those too.

The promise is kept or not by the coder that the engine chooses itself. The frontier beside it says what each coder alone gives of rate and ratio, in the same rounds. Of every move
the processor time of both ends is counted, without their start: by two processors' time it bounds the rate, whatever else runs. Before each move, of ours and of QEMU's, as much memory as it moves is used and given back.

Each move finds the guest's memory as the guest left it, with holes where it never touched it: QEMU reads by a mapping, which puts pages of zeros there, and the next to come, its own next move too, would find another memory. What both
do where no page is untouched stands in the details.
"""

import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from . import migration_guest, migration_qemu
from .harness import ROOT, Stolen, arguments, die_with_parent, machine, note, report, spread, stop
from .migration_links import inside, namespace, passed

RATE_GB_S = 1.5
"""GB of guest memory a second on two cores."""
RATIO = 3.5
"""Of memory to wire bytes, zero pages counted."""
LINK_GBIT = 10.0
"""Bandwidth that ours is held to: on loopback alone nothing speaks for a ratio, and 1.5 GB/s of memory is what such a link is asked for."""
FRONTIER = ("store", "lz4-faster", "lz4-fast", "zstd-fast", "zstd-1")
"""Coders that are measured one by one."""
ENGINE, UNENCRYPTED = "gpu_migration", "tools.bench.migration_plain"
STRIDE = 2
"""Ways by which each round begins further on in the list of them: what comes after another always is measured with what that leaves behind."""
MOVE_S = 300
"""A migration takes at most so long."""


def moved(
    image: Path, target: Path, *options: str, receive: tuple[str, ...] = (), ends: tuple[tuple[str, ...], tuple[str, ...]] = ((), ()), module: str = ENGINE
) -> dict[str, Any]:
    """Move a file to where nothing is by two processes; the sender's result. Raises ValueError where it fails. `ends`: what the commands of sender and receiver begin with."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NOVACRON_MIGRATION_KEY": secrets.token_hex(32)}
    taking = subprocess.Popen(
        [*ends[1], sys.executable, "-m", module, "receive", str(target), *receive], env=environment, preexec_fn=die_with_parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert taking.stderr is not None
        address = taking.stderr.readline().split()[-1]
        done = subprocess.run([*ends[0], sys.executable, "-m", module, "send", str(image), address, *options], env=environment, capture_output=True, text=True, timeout=MOVE_S)
        said, wrong = taking.communicate(timeout=MOVE_S)
    finally:
        stop(taking)
    if done.returncode or taking.returncode:
        raise ValueError(f"the move failed: {done.stderr} {wrong}")
    result: dict[str, Any] = json.loads(done.stdout)
    if json.loads(said)["root"] != result["root"]:
        raise ValueError("the roots of the ends differ")
    return result


def same(one: Path, other: Path) -> bool:
    """Every byte compared."""
    return subprocess.run(["cmp", "-s", str(one), str(other)]).returncode == 0


def move(image: Path, *options: str, receive: tuple[str, ...] = (), module: str = ENGINE, where: Path | None = None) -> dict[str, Any]:
    """Move a file into memory by two processes; the sender's result. Raises ValueError where another file came out. `where`: a folder of memory (/dev/shm)."""
    return processor(image, *options, receive=receive, module=module, where=where)[0]


def at_hand(where: Path | None, length: int) -> None:
    """Have so many bytes of memory in the kernel's hands that were used a moment ago, before anybody is measured: a virtual machine gives what is free back to its host within seconds, and who then comes first
    would pay for getting it back."""
    with tempfile.TemporaryFile(dir=where or ("/dev/shm" if os.path.isdir("/dev/shm") else None)) as file:
        piece = b"\1" * (1 << 20)
        for _ in range(length >> 20):
            file.write(piece)


def processor(image: Path, *options: str, receive: tuple[str, ...] = (), module: str = ENGINE, where: Path | None = None) -> tuple[dict[str, Any], float]:
    """A move, and the processor time that both ends took."""
    with tempfile.TemporaryDirectory(dir=where or ("/dev/shm" if os.path.isdir("/dev/shm") else None)) as folder:
        target = Path(folder) / "moved"
        at_hand(where, image.stat().st_size)
        before = os.times()
        result = moved(image, target, *options, receive=receive, module=module)
        after = os.times()
        if not same(image, target):
            raise ValueError("another file came out than went in")
        return result, after.children_user + after.children_system - before.children_user - before.children_system


def figures(result: dict[str, Any], seconds: float = 0.0) -> dict[str, Any]:
    """GB/s and ratios of a move, and what so much processor time of both ends bounds it to."""
    zero = result["pages"]["zero"] * 4096
    return {
        "gb_s": round(result["length"] / result["seconds"] / 1e9, 3), "ratio": round(result["length"] / result["wire_bytes"], 2),
        "ratio_without_zero": round(max(0, result["length"] - zero) / result["wire_bytes"], 2), "zero_share": round(zero / result["length"], 3), "wire_mb": round(result["wire_bytes"] / 1e6, 1),
        **({"processor_s": round(seconds, 2), "bound_gb_s": round(result["length"] * (os.cpu_count() or 1) / seconds / 1e9, 2)} if seconds > 0 else {}),
        "coders": result["coders"], "streams": result["streams"], "high_water": result["high_water"], "resent": result["resent"],
    }


def qemu_moves(folder: Path, source: migration_guest.Qmp, holder: int, compression: str, options: Any, where: Path) -> dict[str, Any]:
    """Let QEMU move the paused guest to another QEMU in the same namespace."""
    made = migration_guest.pieces(folder, options)
    with tempfile.TemporaryDirectory(dir=where) as scratch:
        at_hand(where, migration_guest.MEMORY_MIB << 20)
        before = passed(holder)
        seconds = migration_qemu.move(made, source, Path(scratch) / "memory", "127.0.0.1", inside(holder), multifd=compression)
        wire, length = passed(holder) - before, migration_guest.MEMORY_MIB << 20
        return {"gb_s": round(length / seconds / 1e9, 3), "seconds": seconds, "wire_mb": round(wire / 1e6, 1), "ratio": round(length / wire, 2)}


def _memory(options: Any) -> AbstractContextManager[Path]:
    return migration_guest.memory_folder(huge=options.huge_pages)


def _point(several: list[dict[str, Any]]) -> dict[str, Any]:
    """One coder's place between rate and ratio."""
    return {
        "median_gb_s": statistics.median(one["gb_s"] for one in several), "best_gb_s": max(one["gb_s"] for one in several), "bound_gb_s": max(one["bound_gb_s"] for one in several),
        "ratio": statistics.median(one["ratio"] for one in several), "ratio_without_zero": statistics.median(one["ratio_without_zero"] for one in several),
    }


def main() -> int:
    """Exit status 0 where the rate, the ratio and the lead over QEMU are met on the guest that was booted."""
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--images", type=Path, help="folder that keeps the guest's pieces and memory (a temporary one)")
    parser.add_argument("--codecs", default="auto", help="coders to choose from")
    parser.add_argument("--link-gbit", type=float, default=LINK_GBIT, help="bandwidth of the link that ours is held to, Gbit/s")
    parser.add_argument("--huge-pages", action="store_true", help="memory in a tmpfs of huge pages for all: ours and QEMU")
    options = parser.parse_args()
    limit = ("--limit-mbit", str(options.link_gbit * 1000))
    about, stolen = machine(), Stolen()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary, _memory(options) as scratch:
        folder, memory = options.images or Path(temporary), scratch / "memory"
        ours: list[dict[str, Any]] = []
        unencrypted: list[dict[str, Any]] = []
        frontier: dict[str, list[dict[str, Any]]] = {name: [] for name in FRONTIER}
        peers: dict[str, list[dict[str, Any]]] = {"none": [], "zstd": []}
        try:
            with namespace() as holder, migration_guest.guest(folder, memory, options, inside(holder)) as qmp:
                qmp("stop")
                never = migration_guest.holes(memory)
                nothing = scratch / "nothing"
                nothing.write_bytes(bytes(4096))
                start = min(processor(nothing)[1] for _ in range(2))

                def counted(image: Path, *how: str, module: str = ENGINE, where: Path | None = scratch) -> dict[str, Any]:
                    result, seconds = processor(image, *how, *limit, module=module, where=where)
                    return figures(result, seconds - start)

                def qemu(compression: str) -> dict[str, Any]:
                    try:
                        return qemu_moves(folder, qmp, holder, compression, options, scratch)
                    finally:
                        migration_guest.punch(memory, never)

                ways: list[tuple[list[dict[str, Any]], Callable[[], dict[str, Any]]]] = [
                    (ours, lambda: counted(memory, "--codecs", options.codecs)), (unencrypted, lambda: counted(memory, "--codecs", options.codecs, module=UNENCRYPTED)),
                    *((several, partial(counted, memory, "--codecs", name)) for name, several in frontier.items()), *((results, partial(qemu, compression)) for compression, results in peers.items()),
                ]
                for n in range(options.rounds):
                    note(options, f"round {n + 1}")
                    first = n * STRIDE % len(ways)
                    for results, way in ways[first:] + ways[:first]:
                        results.append(way())
                unlimited = figures(move(memory, "--codecs", options.codecs, where=scratch))
                qemu_moves(folder, qmp, holder, "none", options, scratch)
                touched = {"ours": [counted(memory, "--codecs", options.codecs) for _ in range(options.rounds)]}
                touched |= {f"qemu multifd {name}": [qemu_moves(folder, qmp, holder, name, options, scratch) for _ in range(options.rounds)] for name in peers}
                migration_guest.punch(memory, never)
                with migration_guest.memory_folder(huge=not options.huge_pages) as other:
                    copy = other / "memory"
                    subprocess.run(["cp", "--sparse=always", str(memory), str(copy)], check=True)
                    other_pages = [counted(copy, "--codecs", options.codecs, where=other) for _ in range(options.rounds)]
            others = {path.name: figures(move(path, "--codecs", options.codecs, *limit, where=scratch)) for path in (migration_guest.images(folder, options) if options.images else [])}
        except migration_guest.Missing as error:
            print(f"migration_cpu: {error}", file=sys.stderr)
            return 2
    rates = [one["gb_s"] for one in ours]
    best = {name: max(one["gb_s"] for one in results) for name, results in peers.items()}
    value, ratio = round(statistics.median(rates), 3), min(one["ratio"] for one in ours)
    ahead = all(value > statistics.median(one["gb_s"] for one in results) for results in peers.values())
    return report(
        options, about, f"guest memory moved by the processors at {RATE_GB_S} GB/s, at a ratio of {RATIO} with zero pages, ahead of QEMU", value, "GB/s of guest memory, median",
        value >= RATE_GB_S and ratio >= RATIO and ahead, spread_={**spread(rates), "ratio": spread([one["ratio"] for one in ours])},
        peer={"qemu multifd " + name: {"median_gb_s": statistics.median(one["gb_s"] for one in results), "best_gb_s": best[name], "last": results[-1]} for name, results in peers.items()},
        inputs={"memory_mib": migration_guest.MEMORY_MIB, "codecs": options.codecs, "link_gbit": options.link_gbit, "huge_pages": options.huge_pages, "qemu_streams": migration_qemu.STREAMS, "verified": "every byte compared"},
        details={"rounds": [one["gb_s"] for one in ours], "last": ours[-1], "frontier": {name: _point(several) for name, several in {"auto": ours, "auto, unencrypted": unencrypted, f"auto, {'4 KiB' if options.huge_pages else 'huge'} pages": other_pages, **frontier}.items()}, "no_page_untouched": {name: {"median_gb_s": statistics.median(one["gb_s"] for one in several), "ratio": several[-1]["ratio"]} for name, several in touched.items()},
                 "untouched_share": round(sum(end - start for start, end in never) / (migration_guest.MEMORY_MIB << 20), 3), "without_link_limit": unlimited, "images": others, "ahead_of_qemu": ahead, "stolen_percent": stolen.percent()},
    )


if __name__ == "__main__":
    sys.exit(main())
