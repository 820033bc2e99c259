"""Run the simulator: the shipped edge and hub code through partitions, power cuts, full disks and wrong clocks, deterministic by seed.

    python -m tools.simulate --seeds 1000 --hours 72 --json      many seeds; 0 where no promise is broken
    python -m tools.simulate --seed 7 --hours 72 --trace FILE    one seed again, its whole trace in a file
    python -m tools.simulate --replay TRACE                      the run of a trace again: is it the same, line by line?
    python -m tools.simulate --scenario FILE                     a scenario of your own (tests/simulation/README.md)
    python -m tools.simulate --controls --json                   planted bugs: each must be caught
"""

import argparse
import contextlib
import functools
import io
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.bench.harness import ROOT, machine, note, percentile, report, spread

TASKS_PER_PROCESS = 25
"""Runs after which a worker process is replaced: bounds what its memory grows to."""


SEEDS_MAX, JOBS_MAX = 1_000_000, 256
"""Of one command."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run."""

    seed: int
    hours: float
    kind: str = ""
    control: str = ""
    scenario: str = ""
    trace: str = ""
    focus: tuple[str, ...] = ()
    edges: int = 0
    settle_s: float = 0.0

    def replay(self) -> str:
        """The command that runs it again."""
        words = ["python -m tools.simulate"]
        words += [f"--scenario {self.scenario}"] if self.scenario else [f"--seed {self.seed} --hours {self.hours:g}"]
        words += [f"--kind {self.kind}"] if self.kind else []
        words += [f"--focus {','.join(self.focus)}"] if self.focus else []
        words += [f"--edges {self.edges}"] if self.edges else []
        words += [f"--control {self.control}"] if self.control else []
        return " ".join(words)


def run_job(job: Job) -> tuple[Job, Any]:
    """Run one; returns its `Outcome`."""
    from tests.simulation.controls import planted
    from tests.simulation.reading import head_of, load
    from tests.simulation.scenario import draw
    from tests.simulation.world import SETTLE_MAX_S, simulate

    scenario = load(Path(job.scenario), job.seed, job.hours) if job.scenario else draw(job.seed, job.hours, job.kind, job.focus, job.edges)
    with contextlib.ExitStack() as stack:
        stack.enter_context(planted(job.control))
        trace = stack.enter_context(open(job.trace, "w")) if job.trace else None
        if trace is not None:
            print(head_of(scenario), file=trace)
        return job, simulate(scenario, trace, job.settle_s or SETTLE_MAX_S)


@functools.cache
def _kept(seed: int, kind: str, focus: tuple[str, ...]) -> bool:
    """Whether a control's run breaks nothing without its bug; several controls have the same run."""
    from tests.simulation.controls import HOURS, SETTLE_S

    return run_job(Job(seed, HOURS, kind, focus=focus, settle_s=SETTLE_S))[1].failure is None


def run_control(name: str) -> tuple[str, int, float, tuple[str, str, str] | None, str]:
    """Try seeds until the planted bug is caught: name, seeds tried, CPU seconds, the violation, the command that shows it again."""
    from tests.simulation.controls import CONTROLS, HOURS, SEEDS_MAX, SETTLE_S
    from tests.simulation.scenario import KINDS

    control = CONTROLS[name]
    kind = next((need for need in control.needs if need in KINDS), "")
    focus = tuple(need for need in control.needs if need != kind)
    seconds = 0.0
    for seed in range(1, SEEDS_MAX + 1):
        job, outcome = run_job(Job(seed, HOURS, kind, name, focus=focus, settle_s=SETTLE_S))
        seconds += outcome.cpu_s
        if outcome.failure and _kept(seed, kind, focus):  # what is broken without it proves nothing
            return name, seed, seconds, outcome.failure, job.replay()
    return name, SEEDS_MAX, seconds, None, ""


def spread_over(jobs: int, function: Any, items: Iterable[Any]) -> Iterator[Any]:
    """`function` over `items` in `jobs` processes; results as they come."""
    if jobs <= 1:
        yield from map(function, items)
        return
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=TASKS_PER_PROCESS) as pool:
        yield from pool.imap_unordered(function, items)


def replay(options: argparse.Namespace, about: dict[str, Any]) -> int:
    """Run a trace's scenario again and compare line by line; exit status."""
    from tests.simulation.controls import planted
    from tests.simulation.reading import difference, read_trace
    from tests.simulation.world import simulate

    scenario, kept = read_trace(options.replay)
    now = io.StringIO()
    with planted(options.control):
        outcome = simulate(scenario, now)
    found = difference(options.replay, kept, now.getvalue().removesuffix("\n").split("\n"))
    details = {"trace": outcome.digest, "difference": found, "failure": outcome.failure}
    return report(options, about, "a trace is the same run again", len(kept), "lines", not found, details=details)


def seeds(options: argparse.Namespace, jobs: list[Job], about: dict[str, Any]) -> int:
    """Run all; exit status."""
    from tests.simulation.coverage import EFFECTS, HOURS_MIN, SEEDS_MIN, never
    from tests.simulation.scenario import FAULTS

    end_s = time.monotonic() + options.minutes * 60
    failures: list[dict[str, Any]] = []
    edges_max = 0
    happened: Counter[str] = Counter()
    times: list[float] = []
    checks: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    hours = 0.0
    last = ""
    for job, outcome in spread_over(min(options.jobs, len(jobs)), run_job, jobs):
        times.append(outcome.cpu_s)
        checks.update(outcome.checks)
        happened.update(outcome.happened)
        edges_max = max(edges_max, outcome.edges)
        kinds[outcome.kind] += 1
        hours += outcome.hours
        if outcome.failure:
            promise, who, what = outcome.failure
            last = job.replay()
            failures.append({"seed": job.seed, "hours": job.hours, "promise": promise, "who": who, "what": what[:400], "replay": last})
            if not options.json:
                print("\n".join(outcome.trace))
                print(f"seed {job.seed}: '{promise}' is broken at {who}: {what}", flush=True)
        elif len(jobs) == 1:
            note(options, f"seed {job.seed} ({outcome.kind}): all promises kept, trace {outcome.digest}, {outcome.cpu_s:.2f} s, checked {dict(outcome.checks)}")
        if len(times) % 50 == 0:
            print(f"{len(times)} of {len(jobs)} seeds, {len(failures)} violations, {sum(times) / len(times):.2f} s each", file=sys.stderr, flush=True)
        if time.monotonic() > end_s:
            break
    # Which faults come is up to the seed, but not where somebody chose them.
    drawn = not (options.scenario or options.seed_file or options.kind or options.focus or options.control)
    missing = never(happened, checks)
    covered = not missing or not drawn or len(times) < SEEDS_MIN or options.hours < HOURS_MIN
    details = {
        "runs": len(times), "not_run": len(jobs) - len(times), "edges_in_one_run": edges_max,
        "failures": failures[:50], "seconds_per_seed": round(sum(times) / max(1, len(times)), 3), "seconds_p99": round(percentile(times, 0.99), 3), "kinds": dict(kinds),
        "virtual_hours": hours, "faults": {name: happened[name] for name in FAULTS}, "effects": {name: happened[name] for name in EFFECTS}, "checked": dict(checks),
        "never": missing,
    }
    if len(jobs) == 1:
        details["trace"] = outcome.digest
    ok = not failures and len(times) == len(jobs) and covered
    promise = "every promise is kept through all faults: nothing lost or doubled, order, decisions, desired state, limits, fairness"
    if options.json:
        return report(options, about, promise, len(failures), f"violations in {len(times)} seeds x {jobs[0].hours:g} h", ok, spread_=spread(times), details=details)
    print(f"{len(times)} runs, {len(failures)} violations, {details['seconds_per_seed']} s of CPU each")
    if len(jobs) > 1:
        for name in ("faults", "effects", "checked"):
            print(f"{name}: {details[name]}")
    if missing and len(jobs) > 1:
        print(f"{'never came' if covered else 'NEVER CAME, in a run that must meet all'}: {', '.join(missing)}")
    if len(times) < len(jobs):
        print(f"{len(jobs) - len(times)} seeds were not run: the time was over")
    if failures:
        print(last)
    return 0 if ok else 1


def controls(options: argparse.Namespace, about: dict[str, Any]) -> int:
    """Run the planted bugs; exit status."""
    from tests.simulation.controls import CONTROLS

    found: dict[str, Any] = {}
    seconds: list[float] = []
    for name, tried, took, failure, replay in spread_over(options.jobs, run_control, list(CONTROLS)):
        seconds.append(took)
        found[name] = {"caught": failure is not None, "bug": CONTROLS[name].text, "promise": failure[0] if failure else None, "seeds": tried, "replay": replay}
        note(options, f"{name:32} {'caught by: ' + failure[0] if failure else 'NOT CAUGHT'} ({tried} seeds, {took:.1f} s)")
    caught = sum(entry["caught"] for entry in found.values())
    return report(
        options, about, "each planted bug is caught", caught, f"of {len(CONTROLS)} controls", caught == len(CONTROLS), spread_=spread(seconds),
        details={name: found[name] for name in sorted(found)},
    )


def main() -> int:
    """The command."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Text hashes must be the same in every process, or one forgotten set would make two runs of a seed differ.
        os.execve(sys.executable, [sys.executable, "-m", "tools.simulate", *sys.argv[1:]], {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))})
    from tests.simulation.controls import CONTROLS
    from tests.simulation.reading import HOURS_MAX, SEED_MAX, ScenarioError, load, read_seeds
    from tests.simulation.scenario import EDGES_MAX, FAULTS, KINDS

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], epilog="see tests/simulation/README.md")
    parser.add_argument("--hours", type=float, default=72.0, help="virtual hours of each run")
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds, from --first")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--seed-file", type=Path, help="a file with one seed a line")
    parser.add_argument("--scenario", type=Path, help="a scenario file (JSON)")
    parser.add_argument("--kind", choices=KINDS, default="", help="draw only this kind of world")
    parser.add_argument("--focus", default="", metavar="FAULTS", help="one edge that meets these faults again and again (names with commas)")
    parser.add_argument("--edges", type=int, default=0, help="so many edges in each world (mirrors and --focus have their own number)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no seed after so long; what was not run is said and is a failure")
    parser.add_argument("--control", choices=sorted(CONTROLS), default="", metavar="NAME", help="plant this bug")
    parser.add_argument("--controls", action="store_true", help="plant every bug, one after the other")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--trace", default="", metavar="FILE", help="write the whole trace of one seed")
    parser.add_argument("--replay", type=Path, metavar="TRACE", help="run a trace's scenario again and compare")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    about = machine()
    for name, value, low, high in (
        ("hours", options.hours, 0.01, HOURS_MAX), ("seeds", options.seeds, 1, SEEDS_MAX), ("first", options.first, 0, SEED_MAX - SEEDS_MAX), ("seed", options.seed or 0, 0, SEED_MAX),
        ("edges", options.edges, 0, EDGES_MAX), ("jobs", options.jobs, 1, JOBS_MAX), ("minutes", options.minutes, 0, float("inf")),
    ):
        if not low <= value <= high:
            parser.error(f"--{name}: {value} is outside {low}..{high}")
    if options.trace and options.seed is None and not options.scenario:
        parser.error("--trace: takes the run of one --seed or --scenario")
    if options.trace:
        try:
            open(options.trace, "w").close()
        except OSError as error:
            parser.error(f"--trace: {options.trace}: {error.strerror}; give a file that can be written")
    focus = tuple(filter(None, options.focus.split(",")))
    for name in focus:
        if name not in FAULTS:
            parser.error(f"--focus: {name!r} is unknown; use {', '.join(FAULTS)}")
    try:
        if options.controls:
            return controls(options, about)
        if options.replay:
            return replay(options, about)
        if options.scenario:
            scenario = load(options.scenario, options.seed, options.hours)
            jobs = [Job(scenario.seed, scenario.hours, "", options.control, str(options.scenario), options.trace)]
        elif options.seed_file:
            jobs = [Job(seed.seed, seed.hours, seed.kind, options.control) for seed in read_seeds(options.seed_file, options.hours)]
        elif options.seed is not None:
            jobs = [Job(options.seed, options.hours, options.kind, options.control, "", options.trace, focus, options.edges)]
        else:
            jobs = [Job(seed, options.hours, options.kind, options.control, focus=focus, edges=options.edges) for seed in range(options.first, options.first + options.seeds)]
        return seeds(options, jobs, about)
    except ScenarioError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
