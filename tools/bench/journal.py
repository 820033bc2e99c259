"""The journal alone: commits per second one by one and grouped, and kill -9 at random for a minute.

The killed writer says which records are durable; after each kill the next writer goes on in the same folder. At the end every record of the
journal is read with sqlite3 alone: no acknowledged record may be missing or different, no number twice, no gap, and the chain must hold.
"""

import asyncio
import functools
import itertools
import json
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)


from edge_runtime.clock import SystemClock
from edge_runtime.contract.records import Record
from edge_runtime.journal import Journal, JournalSettings
from tools.novactl.journal import check

from .harness import ROOT, arguments, die_with_parent, machine, note, percentile, report, spread

BODY = {"rule": "bench", "device": "bench", "outcome": "fired", "inputs": {f"metric_{n}": n / 7 for n in range(9)}, "actions": [], "generation": 1, "offline": False}
GROUPED_WAITING = 2_000


def _resolve(done: "asyncio.Future[None]", _record: Record) -> None:
    done.set_result(None)


async def one_by_one(folder: Path, seconds: float) -> list[float]:
    """Commit times, seconds, of one record each: the next is appended when the last is durable."""
    journal = Journal(JournalSettings(folder, ballast_bytes=0), SystemClock())
    journal.start()
    journal.grow()
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        journal.append("decision", "decision", BODY, functools.partial(_resolve, done))
        await done
        times.append(time.perf_counter() - started)
    await journal.close()
    return times


async def grouped(folder: Path, seconds: float) -> tuple[float, float]:
    """Durable records and commits per second with many waiting."""
    journal = Journal(JournalSettings(folder, ballast_bytes=0), SystemClock())
    journal.start()
    journal.grow()
    count = 0

    def durable(_record: Record) -> None:
        nonlocal count
        count += 1

    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        for _ in range(500):
            journal.append("decision", "decision", BODY, durable)
        while journal.lanes["journal"].waiting > GROUPED_WAITING:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
    await journal.flush()
    passed = time.perf_counter() - started
    commits = journal.lanes["journal"].commits
    await journal.close()
    return count / passed, commits / passed


def sqlite_alone(folder: Path, seconds: float) -> list[float]:
    """The peer: the same rows with sqlite3 and nothing around it, WAL, synchronous=FULL, a commit each."""
    connection = sqlite3.connect(folder / "plain.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute("CREATE TABLE records (seq INTEGER PRIMARY KEY, boot INTEGER, mono INTEGER, wall INTEGER, tq TEXT, kind TEXT, body TEXT, chain BLOB)")
    text, times, seq = json.dumps(BODY), [], 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started, seq = time.perf_counter(), seq + 1
        connection.execute("INSERT INTO records VALUES (?,1,2,3,'synced','decision',?,?)", (seq, text, b"0" * 16))
        times.append(time.perf_counter() - started)
    connection.close()
    return times


def torture(folder: Path, seconds: float, seed: int, writer: str = "tools.bench.journal_writer") -> dict[str, Any]:
    """Kill -9 at random for `seconds`, then compare; what was lost, doubled, missing."""
    draw = random.Random(seed)
    said: dict[int, str] = {}
    kills = doubled = 0
    end = time.monotonic() + seconds
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    while time.monotonic() < end or kills < 3:
        out = folder / "said"
        with open(out, "wb") as handle:
            process = subprocess.Popen([sys.executable, "-m", writer, str(folder / "j")], stdout=handle, env=env, preexec_fn=die_with_parent)
            begun = time.monotonic()
            # From before the journal is open to well into writing; a first line is not waited for, so that opening is killed as well.
            while time.monotonic() - begun < draw.choice((0.15, 0.4, 0.8)) + draw.random() * 0.7 and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += 1
        for line in out.read_text().splitlines(keepends=True):
            number, _, rest = line.partition(" ")
            if line.endswith("\n"):
                doubled += int(number) in said
                said[int(number)] = rest.rstrip("\n")
    return {"kills": kills, "acknowledged": len(said), "acknowledged_twice": doubled, **compare(folder / "j", said)}


def compare(folder: Path, said: dict[int, str]) -> dict[str, Any]:
    """The journal's rows, read with sqlite3 alone, against what the writers said."""
    connection = sqlite3.connect(folder / "journal.db")
    rows = connection.execute("SELECT seq, boots.boot, body FROM records_decision r JOIN boots ON boots.number=r.boot ORDER BY seq").fetchall()
    connection.close()
    held = {row[0]: f"{row[1]} {row[2]}" for row in rows}
    seqs = [row[0] for row in rows]
    verdict = check(folder, lambda *_: None)
    return {
        "records": len(rows), "lost": sum(held.get(seq) != text for seq, text in said.items()), "doubled": len(seqs) - len(set(seqs)),
        "gaps": sum(later - earlier != 1 for earlier, later in itertools.pairwise(seqs)), "chain": "whole" if verdict["ok"] else "; ".join(verdict["problems"]),
    }


def main() -> int:
    parser = arguments(__doc__, seconds=4)
    parser.add_argument("--torture", type=float, default=60, help="seconds of kill -9 at random")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    options = parser.parse_args()
    seed = options.seed or random.SystemRandom().randrange(1, 1 << 30)
    about = machine()
    singles, groups, commits, plains = [], [], [], []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=ROOT) as folder:
            plains.append(sqlite_alone(Path(folder), options.seconds / 2))
            singles.append(asyncio.run(one_by_one(Path(folder) / "one", options.seconds)))
            rate, per_second = asyncio.run(grouped(Path(folder) / "many", options.seconds))
            groups.append(rate)
            commits.append(per_second)
        note(options, f"round {number + 1}: one by one {len(singles[-1]) / options.seconds:.0f}/s, grouped {rate:.0f} records/s in {per_second:.0f} commits/s")
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        result = torture(Path(folder), options.torture, seed)
    note(options, str(result))
    ok = result["lost"] == 0 and result["doubled"] == 0 and result["acknowledged_twice"] == 0 and result["gaps"] == 0 and result["chain"] == "whole" and result["acknowledged"] > 0
    one = [len(times) / sum(times) for times in singles]
    return report(
        options, about, "journal: kill -9 at random loses, doubles and skips no acknowledged record", result["lost"] + result["doubled"] + result["gaps"], "records", ok,
        spread_={"commits_per_second_one_by_one": spread(one), "records_per_second_grouped": spread(groups), "commits_per_second_grouped": spread(commits)},
        peer={"sqlite3 alone, commits per second": round(statistics.median(len(times) / sum(times) for times in plains))},
        inputs={"seconds": options.seconds, "torture_seconds": options.torture, "seed": seed, "synchronous": "FULL"},
        details={**result, "one_by_one_p50_ms": round(percentile(singles[-1], 0.5) * 1000, 3), "one_by_one_p99_ms": round(percentile(singles[-1], 0.99) * 1000, 3)},
    )


if __name__ == "__main__":
    sys.exit(main())
