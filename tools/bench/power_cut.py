"""The power cut at every write of a recorded run: nothing lost, nothing doubled, and the agent always boots.

The real agent runs on a real ext4 that lies on a disk of ours (tools/powercut): every block write and every flush is written down, while bus, hub
and devices keep the agent busy and it is killed, stopped and cut off from power. What the world sees of it (acknowledged readings, commands,
published batches, desired state) is noted with its place in that log. Then, for every write, the disk is made as a cut right after it leaves it,
once with everything written so far and once with a random part of what was not flushed lost or torn; the file system is mounted, the agent is
booted on it, and all that had been seen by then must be there. Needs root, /dev/fuse and loop devices; nothing else of the machine is touched.
"""

import argparse
import asyncio
import gc
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from tools.powercut.block_log import Loss, Player, Write
from tools.powercut.claims import Expected
from tools.powercut.controls import CONTROLS
from tools.powercut.mounts import own_namespace, reason_against, unmount
from tools.powercut.recording import DISK_BYTES, PROGRAMS, Recorded, Recorder
from tools.powercut.verdict import DISK_NAME, Bench

from .harness import machine, note, private_mosquitto, report

WRITES = 2_000
"""Writes of the promise."""

PROCESS_EVERY = 50
"""Every so many cuts the agent is started as a process by its command; the other boots run the same start in a forked child, which takes a tenth of the time."""

CHUNK = 20
"""Cuts that a worker takes at once: it plays the log forward and must not go back."""

SHOWN = 20
"""Violations told in full."""

NO_VERDICT = 2
"""Exit status where this machine cannot do it: neither met nor broken."""


@dataclass(slots=True)
class Tried:
    """What some cuts came to."""

    cuts: int = 0
    boots: int = 0
    processes: int = 0
    repaired: int = 0
    freed: int = 0
    effects: int = 0
    recoveries: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def add(self, other: "Tried") -> None:
        """Sum up."""
        for name in ("cuts", "boots", "processes", "repaired", "effects"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.freed = max(self.freed, other.freed)
        self.recoveries += other.recoveries
        self.violations += other.violations


class _Worker:
    """One process's place in the log."""

    recorded: Recorded
    folder: Path
    seed: int
    bench: "Bench | None" = None
    player: Player
    expected: Expected


def _try_cuts(cuts: list[tuple[int, bool]]) -> Tried:
    """Try each (position, start as a process); ascending."""
    worker, tried = _Worker, Tried()
    if worker.bench is None or worker.player.position > cuts[0][0]:
        worker.bench = worker.bench or Bench(worker.folder / f"bench-{os.getpid()}", DISK_BYTES).__enter__()  # `cut` unmounts it
        worker.player, worker.expected = Player(worker.recorded.log), Expected()
        gc.collect()
        gc.freeze()  # the boots are forks of this process: they must not look at all of this again
    for position, process in cuts:
        worker.player.go(position)
        worker.recorded.claims.advance(worker.expected, position)
        _try(tried, f"cut at {position}, all written", worker.player.content, (), process)
        _try(tried, f"cut at {position}, unflushed lost", worker.player.durable, worker.player.lossy(random.Random(f"{worker.seed} {position}")), False)
        tried.cuts += 1
    return tried


def _try(tried: Tried, name: str, content: bytearray, writes: Iterable[Write], process: bool) -> None:
    assert _Worker.bench is not None
    trial = _Worker.bench.trial(content, writes, _Worker.expected, process=process)
    tried.boots += 1
    tried.processes += process
    tried.repaired += trial.repaired
    tried.freed = max(tried.freed, trial.freed)
    tried.effects += len(_Worker.expected)
    tried.violations += [f"{name}: {one[:400]}" for one in trial.violations]
    tried.recoveries += [f"{name}: {one}" for one in trial.recoveries]


def chosen(positions: list[int], limit: int) -> Iterator[list[tuple[int, bool]]]:
    """At most `limit` of the positions (0: all), evenly spread, in chunks."""
    if limit and len(positions) > limit:
        positions = [positions[number * len(positions) // limit] for number in range(limit)]
    every = min(PROCESS_EVERY, max(1, len(positions) // 2))
    marked = [(position, number % every == every - 1) for number, position in enumerate(positions)]
    for start in range(0, len(marked), CHUNK):
        yield marked[start : start + CHUNK]


def cut(recorded: Recorded, folder: Path, options: argparse.Namespace) -> Tried:
    """Every cut, in `options.jobs` processes."""
    _Worker.recorded, _Worker.folder, _Worker.seed = recorded, folder, options.seed
    total, done = Tried(), 0
    try:
        with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
            futures = [pool.submit(_try_cuts, chunk) for chunk in chosen([options.only] if options.only else recorded.log.cuts(), options.cuts)]
            for future in as_completed(futures):
                total.add(future.result())
                done += 1
                if done % 10 == 0:
                    note(options, f"{total.cuts} cuts, {total.boots} boots, {len(total.violations)} violations")
    finally:
        for bench in folder.glob("bench-*"):
            unmount(bench / DISK_NAME, detach=True)
    return total


def record(options: argparse.Namespace, home: Path) -> Recorded:
    """One recording of `options.writes` writes."""
    programs = (("-m", "tools.powercut.controls", options.control),) if options.control else PROGRAMS
    with private_mosquitto() as port:
        return asyncio.run(Recorder(home, options.writes, port, options.seed, programs).run())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    parser.add_argument("--writes", type=int, default=WRITES, help="length of the recording")
    parser.add_argument("--cuts", type=int, default=0, help="try only so many of the writes, evenly spread; 0: every one")
    parser.add_argument("--seed", type=int, default=0, help="what is lost and torn; 0: another one each time")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that boot")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="leave the recording in this file, to be tried again with --again")
    parser.add_argument("--again", type=Path, metavar="FILE", help="try a recording that --keep left (a pickle: only your own)")
    parser.add_argument("--only", type=int, default=0, metavar="POSITION", help="only the cut at this position of the log")
    parser.add_argument("--control", choices=sorted(CONTROLS), default="", metavar="NAME", help=f"plant this bug: {', '.join(sorted(CONTROLS))}")
    options = parser.parse_args()
    if options.writes < 50 or options.cuts < 0 or options.jobs < 1:
        parser.error("--writes takes 50 or more, --cuts 0 or more, --jobs 1 or more")
    options.seed = options.seed or random.SystemRandom().randrange(1, 1 << 30)
    about = machine()
    if reason := reason_against():
        print(f"power cuts cannot be made here: {reason}", file=sys.stderr)
        return NO_VERDICT
    own_namespace()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started and made here goes with us
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        recorded = pickle.loads(options.again.read_bytes()) if options.again else record(options, home)
        if options.keep:
            options.keep.write_bytes(pickle.dumps(recorded))
        note(options, f"{recorded.log.writes} writes, {recorded.log.flushes} flushes, {len(recorded.claims)} effects in {recorded.seconds:.0f} s; lives ended by {', '.join(recorded.ends)}")
        began = time.monotonic()
        tried = cut(recorded, home, options)
        seconds = time.monotonic() - began
    details: dict[str, Any] = {
        "writes": recorded.log.writes, "flushes": recorded.log.flushes, "bytes": sum(len(getattr(entry, "data", b"")) for entry in recorded.log.entries), "readings": recorded.readings,
        "lives_ended_by": dict(Counter(recorded.ends)), "power_lost_while_recording": sum(isinstance(entry, Loss) for entry in recorded.log.entries),
        "effects_seen": dict(Counter(claim.kind for claim in recorded.claims.all)), "recording_seconds": round(recorded.seconds, 1),
        "cuts_all_written": tried.cuts, "cuts_unflushed_lost": tried.cuts, "records_freed": tried.freed, "boots": tried.boots, "boots_as_process": tried.processes, "effects_checked": tried.effects,
        "file_systems_repaired": tried.repaired, "recoveries": len(tried.recoveries), "first_recoveries": tried.recoveries[:SHOWN], "seconds": round(seconds, 1), "violations": tried.violations[:SHOWN],
    }
    return report(
        options, about, "power cut at every write of a recorded run: nothing lost, nothing doubled, always boots", len(tried.violations), "violations", not tried.violations and tried.cuts > 0,
        inputs={"writes": options.writes, "cuts": options.cuts or "every write", "seed": options.seed, "control": options.control or None}, details=details,
    )


if __name__ == "__main__":
    sys.exit(main())
