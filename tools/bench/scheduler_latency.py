"""How long one placement takes at 10,000 live workloads: a mixed stream of affinity, spread, taints, gangs, GPU fractions and preemptions on a nearly full cluster.

A decision is everything from the workload to the booked seat (`reserve`, or a whole gang, or the preemption plan and its execution); what it takes per workload is
the sample. Departures keep the number of live workloads and are not timed. An independent checker verifies every placement afterwards.

Every round is the same run from the same seed, and must end in the same state bit by bit. Printed are p50, p99 and p99.9 by wall clock and by processor time of the
deciding thread, over all decisions and per kind, where `preemption` is what made others go or move, and `whole_gang` is a gang's time not divided by its members.

Judged is the wall clock, what a caller waits for: the median of the rounds' p99. Beside it stands `undisturbed`: of each decision the least processor time of the deciding
thread over the rounds, then the p99 of these. The rounds decide the same in the same state, so what differs between them is not the scheduler's: other processes take the
core (wall clock) and empty its caches (processor time too). What is slow in every round stays slow. `--judge` takes another one.
"""

import gc
import random
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from hub.scheduler import Placed, Ranker, Scheduler, State, gang, kernels, node, preempt, workload
from hub.scheduler.fragmentation import Fragmentation, typical_of
from hub.scheduler.model import Workload

from .harness import arguments, machine, note, percentile, report
from .placement_check import Checker

LIVE_PER_NODE = 10
"""Live workloads per node at 1,000 nodes: 10,000."""

LIMITS_US = {1_000: (1_000.0, 300.0), 10_000: (5_000.0, 5_000.0)}
"""Nodes to p99 bars in us: numpy, numba."""

JUDGES = {
    "undisturbed": "p99 of each decision's least processor time over the rounds", "processor": "the median of the rounds' p99 by processor time", "wall": "the median of the rounds' p99 by wall clock",
}

APPS = 150
"""Applications in the stream; each has one or two shapes."""

MIX = (("plain", 44), ("spread", 10), ("anti_affinity", 8), ("affinity", 6), ("taint", 7), ("gpu", 11), ("soft", 8), ("gang", 3), ("preempt", 3))
"""Parts of the stream in percent."""

CONSTRAINTS: tuple[dict[str, Any], ...] = (
    {"anti_affinity": [{"topology_key": "host", "selector": {"labels": {"app": "plain-0"}}}]},
    {"anti_affinity": [{"topology_key": "rack", "selector": {"labels": {"app": "anti_affinity-0"}}}]},
    {"spread": [{"topology_key": "zone", "selector": {"labels": {"app": "spread-0"}}, "max_skew": 1}]},
    {"affinity": [{"topology_key": "zone", "selector": {"labels": {"app": "affinity-0"}}}]},
    {"gpu": {"milli": 1000}}, {"gpu": {"milli": 500}}, {"labels": {"app": "anti_affinity-1"}}, {"numa": "single"},
)
"""What `--constrained` asks of those who preempt, in turn: hosts and racks without others, even zones, where others are, devices, where others keep them away, one zone of the machine."""

GANG_SIZE = 4
WARM_UP = 2_000
"""Decisions before the timed ones: every shape has been seen, and those of high priority have filled what was left."""

Json = dict[str, Any]


def cluster(count: int, rng: random.Random, constrained: bool = False) -> list[Json]:
    """Nodes of five kinds in 5 zones, a tenth with GPUs, a tenth tainted; all of two NUMA zones where `constrained`."""
    nodes = []
    for index in range(count):
        size = rng.choice((16, 16, 16, 16, 24))
        made: Json = {
            "name": f"n{index}", "capacity": {"cpu": size, "memory": f"{4 * size}Gi", "slots": 110}, "region": "eu" if index % 3 else "us", "zone": f"z{index % 5}", "rack": f"r{index % 40}",
            "labels": {"disk": rng.choice(("ssd", "hdd"))}, "price": size * 40_000 + rng.randrange(20_000), "idle_mw": 90_000, "busy_mw": 90_000 + 6_000 * size,
        }
        if constrained:
            made["numa"] = [{"cpu": size // 2, "memory": f"{2 * size}Gi"}] * 2
        if index % 10 == 3:
            made["gpus"] = [{"model": rng.choice(("T4", "A100")), "memory": "16Gi", "count": rng.choice((2, 4, 8))}]
        if index % 10 == 7:
            made["taints"] = [{"key": "team", "value": rng.choice("xy"), "effect": "NoSchedule"}]
        nodes.append(made)
    return nodes


def template(what: str, app: int, rng: random.Random) -> Json:
    """The shape of one application of a part of the stream."""
    name = f"{what}-{app}"
    chosen = {"labels": {"app": name}}
    made: Json = {
        "kind": rng.choice(("vm", "container", "function", "batch")), "labels": {"app": name}, "priority": rng.choice((0, 0, 0, 1)), "migratable": rng.random() < 0.3,
        "requests": {"cpu": rng.choice(("500m", "1", "2", "3")), "memory": rng.choice(("1Gi", "4Gi", "8Gi"))},
    }
    if what == "spread":
        made["spread"] = [{"topology_key": rng.choice(("zone", "rack")), "selector": chosen, "max_skew": 2}]
    elif what == "anti_affinity":
        made["anti_affinity"] = [{"topology_key": "host", "selector": chosen}]
    elif what == "affinity":
        made["affinity"] = [{"topology_key": "zone", "selector": chosen}]
    elif what == "taint":
        made["tolerations"] = [{"key": "team"}]
        made["node_affinity"] = {"preferred": [{"weight": 50, "term": {"labels": [{"key": "disk", "op": "In", "values": ["ssd"]}]}}]}
    elif what == "gpu":
        made["gpu"] = {"milli": rng.choice((100, 200, 250, 500, 1000)), "models": rng.choice(([], ["T4"]))}
    elif what == "soft":
        made["spread"] = [{"topology_key": "zone", "selector": chosen, "hard": False}]
        made["preferred_peers"] = [{"weight": 10, "term": {"topology_key": "rack", "selector": chosen}}]
    elif what == "gang":
        made["kind"] = "batch"
    elif what == "preempt":
        made |= {"priority": 10, "requests": {"cpu": "8", "memory": "24Gi"}, "preemptible": False}
    return made


class Stream:
    """The same seed gives the same arrivals."""

    def __init__(self, seed: int, constrained: bool = False) -> None:
        self.rng = random.Random(seed)
        self.templates = {what: [template(what, app, self.rng) for app in range(max(2, APPS * share // 100))] for what, share in MIX}
        if constrained:
            self.templates["preempt"] = [{**shape, **more} for shape in self.templates["preempt"] for more in CONSTRAINTS]
        self.made = 0

    def next(self) -> tuple[str, list[Json]]:
        """One decision: the part of the stream it belongs to and its workloads."""
        what = self.rng.choices([name for name, _ in MIX], [share for _, share in MIX])[0]
        shape = self.rng.choice(self.templates[what])
        members = []
        for _ in range(GANG_SIZE if what == "gang" else 1):
            self.made += 1
            members.append({**shape, "id": f"w{self.made}"})
        if what == "gang":
            for item in members:
                item["gang"] = {"id": f"g{self.made}", "size": GANG_SIZE}
        return what, members


class Run:
    """A cluster that is kept at a number of live workloads."""

    def __init__(self, nodes: int, live: int, seed: int, constrained: bool = False) -> None:
        self.rng = random.Random(seed + 1)
        self.specs = cluster(nodes, random.Random(seed), constrained)
        state = State(seed)
        state.add_nodes([node(item) for item in self.specs])
        self.scheduler = Scheduler(state)
        self.stream, self.target = Stream(seed + 2, constrained), live
        self.events: list[tuple[str, Any, Any]] = []
        self.live: list[str] = []
        self.raw: dict[str, Json] = {}
        self.outcomes: dict[str, int] = defaultdict(int)

    def decide(self, what: str, members: list[Workload]) -> tuple[int, int, list[Placed], tuple[str, ...]]:
        """One timed decision: nanoseconds of wall and of processor time, what was placed, who had to go or move."""
        scheduler = self.scheduler
        worked = time.thread_time_ns()
        begin = time.perf_counter_ns()
        preempted: tuple[str, ...] = ()
        if what == "gang":
            answer = gang.reserve(scheduler, members, 0)
            placed = list(answer.placed) if isinstance(answer, gang.Gang) else []
        elif what == "preempt":
            made = preempt.reserve(scheduler, members[0], 0)
            placed = [made.placed] if isinstance(made, preempt.Made) else [made] if isinstance(made, Placed) else []
            preempted = made.plan.victims if isinstance(made, preempt.Made) else ()
        else:
            one = scheduler.reserve(members[0], 0)
            placed = [one] if isinstance(one, Placed) else []
        spent, busy = time.perf_counter_ns() - begin, time.thread_time_ns() - worked
        self.outcomes["preemptions"] += bool(preempted)
        return spent, busy, placed, preempted

    def book(self, members: list[Json], placed: list[Placed], gone: tuple[str, ...]) -> None:
        """Remember what happened for the checker. Victims leave first; those that moved come back on their new seats."""
        state = self.scheduler.state
        for name in gone:
            self.events.append(("release", name, None))
            if state.seat(name) is None:
                self.live.remove(name)
        for raw, answer in zip(members, placed, strict=False):
            self.raw[answer.workload] = raw
            self.live.append(answer.workload)
            self.events.append(("place", raw, answer.seat))
        for name in gone:
            seat = state.seat(name)
            if seat is not None:
                self.events.append(("place", self.raw[name], seat))

    def step(self) -> tuple[str, int, int, int]:
        """One arrival, and departures down to the target: the kind, nanoseconds of wall and processor time, workloads in it."""
        what, members = self.stream.next()
        spent, worked, placed, gone = self.decide(what, [workload(item) for item in members])
        self.book(members, placed, gone)
        self.outcomes["placed" if placed else "pending"] += 1
        while len(self.live) > self.target:
            at = self.rng.randrange(len(self.live))
            self.live[at], self.live[-1] = self.live[-1], self.live[at]
            name = self.live.pop()
            self.scheduler.release(name)
            self.events.append(("release", name, None))
        return "preemption" if gone else what, spent, worked, len(members)

    def problems(self) -> tuple[int, list[str]]:
        """What the independent checker says about the whole run."""
        checker = Checker(self.specs)
        names = [item["name"] for item in self.specs]
        for what, value, seat in self.events:
            if what == "release":
                checker.released(value)
            else:
                checker.placed(value, names[seat.node], seat.gpus, seat.numa[0][0] if len(seat.numa) == 1 else None)
        return checker.placements, checker.problems


def fill(run: Run, warm_up: int = WARM_UP) -> None:
    """Bring the cluster to its live workloads, untimed; then let the fragmentation policy know what is typical, and see every shape once."""
    tries = 0
    while len(run.live) < run.target and tries < 4 * run.target:
        tries += 1
        what, members = run.stream.next()
        if what != "preempt":
            _, _, placed, gone = run.decide(what, [workload(item) for item in members])
            run.book(members, placed, gone)
    run.scheduler.ranker = Ranker({"fragmentation": Fragmentation(typical_of(run.scheduler.state))})
    for _ in range(warm_up):
        run.step()


def quantiles(values: list[float]) -> Json:
    """us: of all, and of the slowest."""
    return {"p50": round(percentile(values, 0.5), 1), "p99": round(percentile(values, 0.99), 1), "p999": round(percentile(values, 0.999), 1), "max": round(max(values), 1)}


@dataclass(slots=True)
class Round:
    """What the decisions of one round took, us per workload, in their order; `whole` is of gangs, us of processor time per gang."""

    kinds: list[str] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    work: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    def add(self, kind: str, spent: int, worked: int, count: int) -> None:
        """One decision, ns, of `count` workloads."""
        self.kinds.append(kind)
        self.wall.append(spent / count / 1000)
        self.work.append(worked / count / 1000)
        if count > 1:
            self.whole.append(worked / 1000)


def by_kind(rounds: list[Round]) -> Json:
    """Per kind of decision: how many of one round, times, and how many of the slowest hundredth of all decisions (least processor time of all rounds) are of it."""
    wall, work = defaultdict(list), defaultdict(list)
    for one in rounds:
        for kind, spent, worked in zip(one.kinds, one.wall, one.work, strict=True):
            wall[kind].append(spent)
            work[kind].append(worked)
    least = sorted(zip(least_work(rounds), rounds[0].kinds, strict=True), reverse=True)
    slowest = Counter(kind for _, kind in least[: max(1, len(least) // 100)])
    return {kind: {"count": len(work[kind]) // len(rounds), "of_the_slowest_1_percent": slowest[kind], "wall": quantiles(wall[kind]), "processor": quantiles(work[kind])} for kind in sorted(work)}


def least_work(rounds: list[Round]) -> list[float]:
    """Of each decision the least processor time of all rounds, us."""
    return [min(samples) for samples in zip(*(one.work for one in rounds), strict=True)]


def main() -> int:
    """Exit status 0 where the judged p99 is under the bar and the checker finds nothing."""
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--nodes", type=int, default=1_000)
    parser.add_argument("--live", type=int, default=0, help="live workloads (10 per node, at most 10,000, where 0)")
    parser.add_argument("--decisions", type=int, default=3_000, help="timed decisions per round")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--numba", choices=("auto", "on", "off"), default="auto", help="compiled kernels: where installed, required, never")
    parser.add_argument("--constrained", action="store_true", help="those who preempt ask for more than room: devices, zones, peers, spread")
    parser.add_argument("--judge", choices=tuple(JUDGES), default="wall", help="which p99 is held against the bar")
    options = parser.parse_args()
    about = machine()
    compiled = kernels.use(options.numba)
    live = options.live or min(10_000, LIVE_PER_NODE * options.nodes)
    bar = next((limits for size, limits in sorted(LIMITS_US.items()) if options.nodes <= size), LIMITS_US[10_000])[1 if compiled else 0]
    rounds: list[Round] = []
    digests: set[str] = set()
    for _ in range(options.rounds):
        run = Run(options.nodes, live, options.seed, options.constrained)
        fill(run)
        note(options, f"{len(run.live)} live on {options.nodes} nodes")
        gc.collect()
        gc.freeze()
        rounds.append(Round())
        for _ in range(options.decisions):
            rounds[-1].add(*run.step())
        gc.unfreeze()
        digests.add(run.scheduler.state.digest())
    state = run.scheduler.state
    used = 1 - state.free[:2].sum(1) / state.cap[:2].sum(1)
    placements, problems = run.problems()
    p99 = {name: sorted(round(percentile(getattr(one, name), 0.99), 1) for one in rounds) for name in ("work", "wall")}
    undisturbed = quantiles(least_work(rounds))
    value = undisturbed["p99"] if options.judge == "undisturbed" else p99["work" if options.judge == "processor" else "wall"][len(rounds) // 2]
    gangs = [spent for one in rounds for spent in one.whole]
    return report(
        options, about, f"placement latency p99, {live} live x {options.nodes} nodes, {'numba' if compiled else 'numpy'}", value, "us", value < bar and not problems and len(digests) == 1,
        spread_={"judged": JUDGES[options.judge], "processor_p99_of_rounds": p99["work"], "wall_p99_of_rounds": p99["wall"],
                 "processor": quantiles([spent for one in rounds for spent in one.work]), "wall": quantiles([spent for one in rounds for spent in one.wall]),
                 "undisturbed": undisturbed},
        inputs={"nodes": options.nodes, "live": len(run.live), "decisions": options.decisions, "rounds": options.rounds, "seed": options.seed, "constrained": options.constrained, "bar_us": bar,
                "used_cpu_memory": [round(float(item), 3) for item in used]},
        details={"us_by_kind": by_kind(rounds), "whole_gang_processor": quantiles(gangs) if gangs else None,
                 "outcomes": dict(run.outcomes), "rounds_end_in_the_same_state": len(digests) == 1, "checked_placements": placements, "checker_problems": len(problems), "problems": problems[:5]},
    )


if __name__ == "__main__":
    sys.exit(main())
