"""Moves of the same guest memory by us and by what others would use, over links of 10, 25 and 100 Gbit/s, cold and with a base: seconds and bytes, side by side.

A Debian guest (`migration_guest.py`) is booted and paused, its memory copied as the base; it works for ten seconds and is paused again. That memory then goes from one network namespace to
another (`migration_links.py`) by each way, each time to where nothing is, or where the base is. Every byte of what comes out is compared with the guest's memory; a cell where it differs, or
where a move fails, does not count and says why. Bytes are those of the interface, both ways, headers too.

- ours: as it comes, encrypted, told the bandwidth of the link; with the base at both ends.
- QEMU as it is without a word (one stream, 128 MiB/s); by multifd with two channels and no limit; the same with zstd. They know no base.
- `tar -S | zstd -1` over one connection; it knows no base.
- rsync from daemon to daemon; with the base it finds equal parts by its checksums, in place.

All memory is in /dev/shm, at both ends (`--huge-pages`: in a tmpfs of huge ones). None but ours encrypts: that they are spared. Seconds are by the clock of the engine and of QEMU (total-time), without the start of their programs; of tar and rsync from the start of the command
to the end of the last. A link that is faster than this machine carries is not shaped, and marked.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from . import migration_guest, migration_qemu
from .harness import Stolen, arguments, die_with_parent, free_port, machine, note, report, stop
from .migration_cpu import moved, same
from .migration_links import Carried, Link, inside, link, server, wait_until_it_listens

LINKS_GBIT = (10.0, 25.0, 100.0)
WORK_S = 10
"""Seconds of the guest's work between the base and what is moved."""
TEN = 10.0
"""Times that are asked for somewhere."""
KNOW_BASES = ("ours", "rsync")
"""Ways that gain by a base; what the others need with one is what they need without."""
_COMMAND_S = 300
"""A move takes at most so long."""
ROUNDS = 2

_ACCEPT = """
import os, socket, sys
listener = socket.create_server(("", 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
os.dup2(connection.fileno(), 0)
os.execvp("bash", ["bash", "-o", "pipefail", "-c", sys.argv[1]])
"""
_CONNECT = """
import os, socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
os.dup2(connection.fileno(), 1)
os.execvp("bash", ["bash", "-o", "pipefail", "-c", sys.argv[3]])
"""
"""Both put a connection in a shell's place of standard input or output, and are then gone: no byte goes through them."""

Move = Callable[[Path, Path, Path | None], tuple[float, Path]]
"""From the memory, an empty folder and the base, where there is one: seconds, and where it came out. Raises ValueError, OSError, Missing or a subprocess's error where it fails."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One way, over one link, cold or with a base."""

    way: str
    base: bool
    gbit: float
    seconds: float
    wire_bytes: int
    why_not: str = ""
    """Why it does not count; empty: it does."""


def measured(way: str, gbit: float, move: Move, memory: Path, base: Path | None, passed: Callable[[], int], scratch: Path) -> Cell:
    """Move once, and hold what came out against the memory as it is then (QEMU lets its guest go on for an instant before)."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        before = passed()
        try:
            seconds, out = move(memory, Path(folder), base)
            wire = passed() - before
            why = "" if same(memory, out) else "what came out is not the guest's memory"
        except (ValueError, OSError, migration_guest.Missing, subprocess.SubprocessError) as error:
            seconds, wire, why = 0.0, 0, f"it failed: {error}"[:300]
    return Cell(way, base is not None, gbit, seconds, wire, why)


def table(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row for each way, link and start: medians of the rounds that count, and how many times ours is less. A row counts where all of its rounds do."""
    keys = list(dict.fromkeys((cell.way, cell.base, cell.gbit) for cell in cells))
    rows: list[dict[str, Any]] = []
    for way, base, gbit in keys:
        rounds = [cell for cell in cells if (cell.way, cell.base, cell.gbit) == (way, base, gbit)]
        why = next((cell.why_not for cell in rounds if cell.why_not), "")
        row: dict[str, Any] = {"way": way, "start": "base" if base else "cold", "gbit": gbit, "counts": not why, "why_not": why, "rounds": len(rounds)}
        if not why:
            row |= {"seconds": round(statistics.median(cell.seconds for cell in rounds), 3), "least_seconds": round(min(cell.seconds for cell in rounds), 3)}
            row["wire_mb"] = round(statistics.median(cell.wire_bytes for cell in rounds) / 1e6, 2)
        rows.append(row)
    ours = {(row["start"], row["gbit"]): row for row in rows if row["way"] == "ours" and row["counts"]}
    for row in rows:
        if row["way"] == "ours" or not row["counts"]:
            continue
        for start in ("cold", "base"):
            mine = ours.get((start, row["gbit"]))
            if mine is not None and (start == row["start"] or (start == "base" and row["way"] not in KNOW_BASES)):
                row[f"times_{start}"] = {"seconds": round(row["seconds"] / max(1e-9, mine["seconds"]), 2), "bytes": round(row["wire_mb"] / max(1e-9, mine["wire_mb"]), 2)}
    return rows


def lines(rows: Sequence[dict[str, Any]], carried: Sequence[Carried]) -> list[str]:
    """The table for people."""
    out = [f"{'':18}{'start':>6}" + "".join(f"{one.gbit:>10g} GbE{'' if one.shaped else '*':1}{'':12}" for one in carried)]
    for way, start in dict.fromkeys((row["way"], row["start"]) for row in rows):
        line = f"{way:18}{start:>6}"
        for one in carried:
            row = next((row for row in rows if (row["way"], row["start"], row["gbit"]) == (way, start, one.gbit)), None)
            line += f"{row['seconds']:>8.2f} s {row['wire_mb']:>9.1f} MB  " if row is not None and row["counts"] else f"{'does not count':>24}"
        out.append(line)
    return out + [f"* {one.gbit:g} GbE: {one.why}" for one in carried if not one.shaped]


def _ours(way: Link, gbit: float, bases: Path) -> Move:
    def move(memory: Path, folder: Path, base: Path | None) -> tuple[float, Path]:
        options = ("--transfer", "memory", "--limit-mbit", str(gbit * 1000), *(("--base", str(base)) if base is not None else ()))
        receive = ("--listen", f"{way.address}:0", *(("--bases", str(bases)) if base is not None else ()))
        result = moved(memory, folder / "memory", *options, receive=receive, ends=(inside(way.source), inside(way.target)))
        return float(result["seconds"]), folder / "memory"

    return move


def _qemu(way: Link, made: tuple[Path, Path, Path], qmp: migration_guest.Qmp, multifd: str) -> Move:
    def move(memory: Path, folder: Path, base: Path | None) -> tuple[float, Path]:
        return migration_qemu.move(made, qmp, folder / "memory", way.address, inside(way.target), multifd=multifd), folder / "memory"

    return move


def _tar(way: Link) -> Move:
    def move(memory: Path, folder: Path, base: Path | None) -> tuple[float, Path]:
        began = time.monotonic()
        with server(way.target, [sys.executable, "-S", "-c", _ACCEPT, f"zstd -dcq | tar -xSf - -C '{folder}'"]) as port:
            began = time.monotonic()
            pack = f"tar -C '{memory.parent}' -cSf - '{memory.name}' | zstd -1 -T1 -cq"
            subprocess.run([*inside(way.source), sys.executable, "-S", "-c", _CONNECT, way.address, str(port), pack], check=True, timeout=_COMMAND_S)
        return time.monotonic() - began, folder / memory.name

    return move


def _rsync(way: Link) -> Move:
    def move(memory: Path, folder: Path, base: Path | None) -> tuple[float, Path]:
        out, port, settings = folder / memory.name, free_port(), folder / "rsyncd.conf"
        if base is not None:
            subprocess.run(["cp", "--sparse=always", str(base), str(out)], check=True)
        settings.write_text(f"uid = root\ngid = root\nuse chroot = no\nread only = no\n[to]\npath = {folder}\n")
        daemon = subprocess.Popen(
            [*inside(way.target), "rsync", "--daemon", "--no-detach", f"--port={port}", f"--config={settings}"], preexec_fn=die_with_parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_until_it_listens(way.target, port)
            began = time.monotonic()
            how = ["--inplace", "--no-whole-file", "--ignore-times"] if base is not None else ["--whole-file", "--sparse"]
            subprocess.run([*inside(way.source), "rsync", *how, str(memory), f"rsync://{way.address}:{port}/to/"], check=True, timeout=_COMMAND_S)
            return time.monotonic() - began, out
        finally:
            stop(daemon)

    return move


def _need() -> None:
    for program, package in (("rsync", "rsync"), ("zstd", "zstd"), ("tc", "iproute2")):
        if not any(os.access(Path(folder) / program, os.X_OK) for folder in (*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin", "/sbin")):
            raise migration_guest.Missing(f"{program} is missing: apt-get install --no-install-recommends {package}")


def run(options: Any, folder: Path, scratch: Path) -> tuple[list[Cell], list[Carried]]:
    """All moves. Raises Missing."""
    _need()
    memory, base, bases, cells, carried = scratch / "memory", scratch / "base", scratch / "bases", [], []
    with link() as way, migration_guest.guest(folder, memory, options, inside(way.source)) as qmp:
        qmp("stop")
        subprocess.run(["cp", "--sparse=always", str(memory), str(base)], check=True)
        subprocess.run([sys.executable, "-m", "gpu_migration", "base", str(base), "--bases", str(bases)], check=True, stdout=subprocess.DEVNULL)
        qmp("cont")
        time.sleep(WORK_S)
        qmp("stop")
        made = migration_guest.pieces(folder, options)
        others = {
            "qemu default": _qemu(way, made, qmp, ""), "qemu multifd": _qemu(way, made, qmp, "none"), "qemu multifd zstd": _qemu(way, made, qmp, "zstd"), "tar | zstd": _tar(way), "rsync": _rsync(way),
        }
        for gbit in options.links:
            carried.append(way.set(gbit))
            ways = {"ours": _ours(way, gbit, bases), **others}
            for n in range(options.rounds):
                for name, move in ways.items():
                    for with_base in (False, True) if name in KNOW_BASES else (False,):
                        note(options, f"{gbit:g} Gbit/s, round {n + 1}: {name}{' with the base' if with_base else ''}")
                        cells.append(measured(name, gbit, move, memory, base if with_base else None, way.passed, scratch))
    return cells, carried


def main() -> int:
    """Exit status 0 where every cell was moved, came out right and counts."""
    parser = arguments(__doc__, rounds=ROUNDS)
    parser.add_argument("--images", type=Path, help="folder that keeps the guest's pieces (a temporary one)")
    parser.add_argument("--links", type=float, nargs="+", default=LINKS_GBIT, metavar="GBIT", help="bandwidths of the links, Gbit/s (10 25 100)")
    parser.add_argument("--huge-pages", action="store_true", help="memory in a tmpfs of huge pages, at both ends")
    options = parser.parse_args()
    about, stolen = machine(), Stolen()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as temporary:
        try:
            with migration_guest.memory_folder(huge=options.huge_pages) as scratch:
                cells, carried = run(options, options.images or Path(temporary), scratch)
        except (migration_guest.Missing, OSError, subprocess.SubprocessError) as error:
            print(f"migration_matrix: {error}", file=sys.stderr)
            return 2
    rows = table(cells)
    if not options.json:
        print("\n".join(lines(rows, carried)))
    good = sum(row["counts"] for row in rows)
    ten = {
        f"{what}, {start}": [f"{row['way']}, {row['gbit']:g} GbE" for row in rows if row.get(f"times_{start}", {}).get(what, 0.0) >= TEN] for what in ("seconds", "bytes") for start in ("cold", "base")
    }
    return report(
        options, about, "named baselines and ours move the same guest memory over links of 10, 25 and 100 Gbit/s, cold and with a base, each outcome compared", good, f"of {len(rows)} cells that count",
        good == len(rows) and bool(rows), inputs={"memory_mib": migration_guest.MEMORY_MIB, "work_s": WORK_S, "rounds": options.rounds, "huge_pages": options.huge_pages, "verified": "every byte compared", "qemu_streams": migration_qemu.STREAMS},
        peer={name: "unencrypted" for name in dict.fromkeys(row["way"] for row in rows) if name != "ours"},
        details={"rows": rows, "links": [asdict(one) for one in carried], "ten_times_less": ten, "stolen_percent": stolen.percent()},
    )


if __name__ == "__main__":
    sys.exit(main())
