"""What the submit of a batch job that says how long it runs costs in the hub, beside one that does not, in the same hub and the same run.

A planner (what the hub's placing task runs; no store, no network) holds 85 % of the CPU as containers, and 1,000 batch jobs that run or wait, seven in ten with a deadline. Then comes a mixed
stream: a container is submitted, another one is cancelled, a batch job is submitted. So the timetable has something to take in before every job; that is the dear case. A
job's submit includes what it sets going: jobs that wait and start in the room of what was cancelled (`started` says how many). A second stream is of jobs alone.

Every round is the same run from the same seed, and must end in the same state bit by bit. Of each submit the least processor time of the rounds counts: the machine has others to do for.
"""

import gc
import random
import statistics
import sys
import time
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from hub.workloads.documents import Conflict, read_list
from hub.workloads.planner import Planner

from .harness import arguments, machine, note, percentile, report

NOW = 1_795_500_000_000
"""ms since 1970; any time will do, the same each round."""

STEPS = 60
"""Submits of each kind in each stream."""

FILLED = 0.85
"""Of the CPU, by containers, before the jobs come."""

CPUS = 16
"""Of each node."""

MOST = 8.0
"""A job's submit costs at most so many times a container's: it is planned, written and guarded as well, and starts two others in the mixed stream."""

Json = dict[str, Any]


class Run:
    """One round."""

    def __init__(self, nodes: int, jobs: int, seed: int) -> None:
        self.draw, self.planner, self.now, self.made = random.Random(seed), Planner(), NOW, 0
        self._do(lambda now: [self.planner.put_node(f"n{index}", {"capacity": {"cpu": CPUS, "memory": "64Gi"}, "zone": f"z{index % 5}"}, "declared", now, seq=1) for index in range(nodes)])
        cpu = self.planner.state.resource_rows["cpu"]
        while self.planner.state.free[cpu].sum() > nodes * CPUS * 1000 * (1 - FILLED):
            self._submit([self._document(False) for _ in range(100)])
        self._submit([self._document(True) | {"when_late": "accept", "deadline_ms": self.now + 3_600_000} if index % 10 < 7 else self._document(True, dated=False) for index in range(jobs)])
        self._count = 0

    def _document(self, timed: bool, dated: bool | None = None) -> Json:
        self.made += 1
        draw = self.draw
        made: Json = {"id": f"w{self.made}", "requests": {"cpu": draw.choice((1, 2, 3)), "memory": draw.choice(("1Gi", "4Gi"))}}
        if timed:
            seconds = draw.choice((60, 300, 1_800))
            made |= {"kind": "batch", "duration_ms": seconds * 1000}
            if draw.random() < 0.7 if dated is None else dated:
                made |= {"deadline_ms": self.now + int(seconds * 1000 * draw.choice((1.5, 3, 10))), "when_late": draw.choice(("refuse", "accept"))}
        return made

    def _do(self, work: Any) -> int:
        """One plan as the placing task makes it; ns of processor time. What is refused is taken back, as there."""
        self.now += 1
        gc.disable()  # a collection hits one submit or another by chance
        begin = time.thread_time_ns()
        self.planner.begin()
        try:
            work(self.now)
        except Conflict:
            self.planner.undo()
        else:
            self.planner.changes()
            self.planner.keep()
        took = time.thread_time_ns() - begin
        gc.enable()
        return took

    def _submit(self, documents: list[Json]) -> int:
        entries = read_list(documents)
        return self._do(lambda now: self.planner.submit_all(entries, now))

    def _placed(self) -> int:
        return len(self.planner.tables.open)

    def mixed(self) -> tuple[list[int], list[int], list[int]]:
        """ns of each container's submit, ns of each job's, and how many each of these started."""
        plain, timed, started = [], [], []
        for _ in range(STEPS):
            plain.append(self._submit([self._document(False)]))
            placed = [name for name, row in self.planner.tables.rows.items() if row.state == "placed" and name not in self.planner.tables.timed]
            self._do(lambda now, name=self.draw.choice(placed): self.planner.cancel(name, now))
            before = self._placed()
            timed.append(self._submit([self._document(True)]))
            started.append(self._placed() - before)
        return plain, timed, started

    def alone(self) -> list[int]:
        """ns of each job's submit where nothing else comes."""
        return [self._submit([self._document(True)]) for _ in range(STEPS)]


def main() -> int:
    """Exit status 0 where the median of a job's submit is at most `MOST` times a container's."""
    parser = arguments(__doc__)
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--jobs", type=int, default=1_000)
    options, about = parser.parse_args(), machine()
    plain, timed, alone, ends, started = [], [], [], set(), list[int]()
    for number in range(options.rounds):
        run = Run(options.nodes, options.jobs, 1)
        run.mixed()  # every shape has been seen, and what waits has had its turn
        costs, jobs, started = run.mixed()
        plain.append(costs)
        timed.append(jobs)
        alone.append(run.alone())
        ends.add(run.planner.state.digest())
        note(options, f"round {number + 1}: container {statistics.median(costs) / 1e6:.2f} ms, job {statistics.median(jobs) / 1e6:.2f} ms, jobs alone {statistics.median(alone[-1]) / 1e6:.2f} ms")
    least = {name: [min(each) / 1e6 for each in zip(*rounds, strict=True)] for name, rounds in (("container", plain), ("job", timed), ("job_alone", alone))}
    figures = {name: {"p50_ms": round(percentile(values, 0.5), 3), "p99_ms": round(percentile(values, 0.99), 3)} for name, values in least.items()}
    ratio = round(figures["job"]["p50_ms"] / figures["container"]["p50_ms"], 2)
    return report(
        options, about, f"the submit of a timed job costs at most {MOST:g} times an untimed one's in the same hub", ratio, "times, median of the least processor time", ratio <= MOST and len(ends) == 1,
        spread_=figures, inputs={"nodes": options.nodes, "jobs": options.jobs, "steps": STEPS, "rounds": options.rounds, "seed": 1},
        details={"started_by_each_job_submit": round(statistics.mean(started), 2), "same_state_each_round": len(ends) == 1, "job_alone_times": round(figures["job_alone"]["p50_ms"] / figures["container"]["p50_ms"], 2)},
    )


if __name__ == "__main__":
    sys.exit(main())
