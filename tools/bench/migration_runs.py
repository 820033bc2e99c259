"""Moves that are really made, one after the other, of sources drawn at random: what predictions are trained on and held against.

Each is a file in memory with holes, zeros, pages of one word, pages that shrink and pages that do not, moved by a sender here and a receiver that is a process of its own, over a link of a drawn
bandwidth. Half of them are written to meanwhile, by a process that is paused for the last pass. A move that is not done in `RUN_MOST_S` is ended.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gpu_migration import precopy, sample
from gpu_migration.convergence import Limits, Pass
from gpu_migration.errors import MigrationError, NotConverged
from gpu_migration.layout import EXTENT, PAGE
from gpu_migration.precopy_model import Link
from gpu_migration.prediction import Outcome, Question, busy
from gpu_migration.receiver import Receiver
from gpu_migration.sender import Sender
from gpu_migration.sources import FileSource

RUN_MOST_S = 20.0
"""Seconds of one move; a drawn one takes one or two."""
SIZES_MIB = (24, 320)
BANDWIDTHS = (20e6, 1.25e9)
"""Bytes a second: a poor line to 10 GbE."""

WRITER = """
import mmap, os, random, sys, time
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), 0)
rate, hot, draw = float(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
extents = [int(one) for one in sys.argv[5].split(",")][:hot]
print("ready", flush=True)
n, began = 0, time.monotonic()
while True:
    n += 1
    at = (draw.choice(extents) << 20) + draw.randrange(256) * 4096
    memory[at : at + 64] = os.urandom(64)
    time.sleep(max(0.0, began + n / rate - time.monotonic()))
"""
"""Writes to pages of its extents at random, so many a second."""


@dataclass(frozen=True, slots=True)
class Case:
    """A drawn move. `rate`: pages that are written a second, 0: it stands still."""

    mib: int
    hole: float
    zero: float
    const: float
    noise: float
    """Share of a page's bytes that do not shrink."""
    bandwidth: float
    rate: float
    hot: float
    seed: int


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one: the question of before and after the first pass, and what it took; without `outcome` it did not converge."""

    case: Case
    before: Question
    after: Question | None
    seconds: float
    baseline: float
    """Seconds by size over bandwidth."""
    converged: bool

    def outcome(self, *, passed: bool = False) -> Outcome:
        """For whoever learns."""
        question = self.after if passed and self.after is not None else self.before
        foreseen = question.foresee()
        return Outcome(tuple(question.features(foreseen)), foreseen.seconds, self.seconds)


def draw(rng: random.Random) -> Case:
    """Any, evenly over logarithms of size and bandwidth."""
    mib = round(SIZES_MIB[0] * (SIZES_MIB[1] / SIZES_MIB[0]) ** rng.random())
    bandwidth = BANDWIDTHS[0] * (BANDWIDTHS[1] / BANDWIDTHS[0]) ** rng.random()
    changing = rng.random() < 0.5
    # As many extents a second as a tenth of a percent to a half of what the link brings: more does not converge, and is not what is asked here.
    rate = min(2000.0, bandwidth / EXTENT * 0.001 * 500 ** rng.random()) if changing else 0.0
    return Case(mib, rng.choice((0.0, 0.4 * rng.random())), 0.7 * rng.random(), 0.15 * rng.random(), rng.choice((0.02, 0.95)) if rng.random() < 0.3 else rng.random(), bandwidth, rate, 0.05 * 20 ** rng.random(), rng.randrange(1 << 30))


def fill(path: Path, case: Case) -> list[int]:
    """Write the source; returns its extents that are no holes, at least one."""
    rng = np.random.default_rng(case.seed)
    phrases = rng.integers(0, 1 << 16, (64, 16), np.uint16)
    pages, noise = EXTENT // PAGE, int(case.noise * PAGE)
    there = [index for index in range(case.mib) if rng.random() >= case.hole] or [0]
    with open(path, "wb") as file:
        file.truncate(case.mib * EXTENT)
        for index in there:
            # What shrinks: phrases of 32 bytes out of a few, in an order that is drawn, as records and texts are.
            extent = phrases[rng.integers(0, len(phrases), (pages, PAGE // 32))].reshape(pages, PAGE // 2)
            extent[:, : noise // 2] = rng.integers(0, 1 << 16, (pages, noise // 2), np.uint16)
            kind = rng.random(pages)
            extent[kind < case.zero] = 0
            extent[(kind >= case.zero) & (kind < case.zero + case.const)] = 0x4242
            file.seek(index * EXTENT)
            file.write(extent.tobytes())
    return there


class Writer:
    """The process that writes, and its hook."""

    def __init__(self, path: Path, case: Case, there: list[int]) -> None:
        hot = max(1, round(len(there) * case.hot))
        chosen = random.Random(case.seed).sample(there, len(there))
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", WRITER, str(path), str(case.rate), str(hot), str(case.seed), ",".join(map(str, chosen))], stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None and self._process.stdout.readline()

    def pause(self) -> None:
        os.kill(self._process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)

    def resume(self) -> None:
        os.kill(self._process.pid, signal.SIGCONT)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


def _receive(target: Path, key: bytes, line: Any) -> None:
    taking = Receiver(target, key, ("127.0.0.1", 0))
    line.send(taking.address)
    line.close()
    taking.serve()


def run(case: Case, folder: Path) -> Row:
    """Make one move. `folder` in memory. Raises MigrationError, TimeoutError."""
    path, target, key = folder / "source", folder / "target", os.urandom(32)
    there = fill(path, case)
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    receiver = multiprocessing.get_context("fork").Process(target=_receive, args=(target, key, theirs), daemon=True)
    receiver.start()
    theirs.close()
    source, writer = FileSource(path), Writer(path, case, there) if case.rate else None
    try:
        address = ours.recv()
        link = Link(case.bandwidth, os.cpu_count() or 1)
        limits = replace(precopy.limits_for(source.length, Limits()), seconds=RUN_MOST_S) if writer else None
        before = Question(sample.take(source, changing=writer is not None), link, limits, busy())
        sender, first = Sender(source, key, address, limit=case.bandwidth), 0.0

        def seen(one: Pass) -> None:
            nonlocal first
            first = first or one.sending

        began, converged = time.monotonic(), True
        try:
            if writer is None:
                sender.run()
            else:
                precopy.move(sender, precopy.Hook(writer.pause, writer.resume), limits, seen=seen)
        except NotConverged:
            converged = False
        seconds = time.monotonic() - began
        after = replace(before, first_took=first) if first else None
        return Row(case, before, after, seconds, source.length / case.bandwidth, converged)
    finally:
        source.close()
        if writer is not None:
            writer.end()
        receiver.join(0 if sys.exc_info()[0] else 5)
        if receiver.is_alive():
            receiver.kill()
            receiver.join()
        receiver.close()
        ours.close()
        for left in folder.iterdir():
            left.unlink()


def runs(count: int, seed: int, told: Any = None) -> list[Row]:
    """So many, drawn from a seed; `told` is called with each. One that fails for another reason than not converging is an error of the engine, and raised."""
    rng, rows = random.Random(seed), []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None, prefix="novacron-runs-") as name:
        for number in range(count):
            case = draw(rng)
            try:
                rows.append(run(case, Path(name)))
            except MigrationError as error:
                raise RuntimeError(f"run {number + 1} of seed {seed}, {case}: {error}") from error
            if told is not None:
                told(number + 1, rows[-1])
    return rows
