"""How many of the scheduler's placements are optimal, on random instances that are solved exactly (at most 12 nodes, 40 workloads, all kinds of constraints).

Instances: `optimality_instances.py`. Objective and independent checker: `optimality_objective.py`. Exact solver: `optimality_exact.py`. What "optimal" means: `optimality_judge.py`.
Every placement is checked before it is judged. An instance that the solver cannot prove within `--limit` is dropped and counted; a proven one has gap 0.
The planted bad rule (`worst_cost`: the dearest place that is allowed) must come out clearly below the bar, or the measure is broken.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from .harness import arguments, machine, note, report
from .optimality_exact import Solution, Undecided, solve
from .optimality_instances import Instance, draw
from .optimality_judge import Verdict, by_instance, judge, wilson
from .optimality_objective import Placement, faults, greedy, value

BAR = 0.95
"""Share of placements that must be optimal, in either reading."""

FIRST_SEED = 1000
"""Default first seed; those below were looked at while the rules were written."""

Rule = Callable[[Instance], Placement]

PEERS: dict[str, Rule] = {
    "random": lambda instance: greedy(instance, "random", instance.seed), "best_fit": lambda instance: greedy(instance, "best_fit"),
    "planted_worst": lambda instance: greedy(instance, "worst_cost"),
}


def summary(verdicts: list[Verdict], alone: bool) -> dict[str, Any]:
    """Shares with their intervals."""
    out: dict[str, Any] = {"instances": len(verdicts), "decisions": sum(len(v.in_order) for v in verdicts), "instances_at_optimum": sum(v.whole for v in verdicts)}
    for name in ("in_order", "in_order_by_value", *(("alone",) if alone else ())):
        groups = [getattr(v, name) for v in verdicts]
        good, of = sum(map(sum, groups)), sum(map(len, groups))
        out[name] = {
            "share": round(good / max(1, of), 4), "wilson95": [round(x, 4) for x in wilson(good, of)], "by_instance95": [round(x, 4) for x in by_instance(groups)],
        }
    out["placed"] = sum(sum(v.placed) for v in verdicts)
    return out


def measure(rules: dict[str, Rule], instances: list[tuple[Instance, Solution]], limit: float, alone: bool, say: Callable[[str], None]) -> tuple[dict[str, dict[str, Any]], int]:
    """Each rule on each instance; also how many (rule, instance) pairs were dropped for the time limit."""
    results, dropped = {}, 0
    for name, rule in rules.items():
        verdicts = []
        for instance, best in instances:
            try:
                verdicts.append(judge(instance, rule(instance), best, limit, alone=alone))
            except Undecided as error:
                dropped += 1
                say(f"{name}: {error}")
        results[name] = summary(verdicts, alone)
        say(f"{name}: {results[name]}")
    return results, dropped
