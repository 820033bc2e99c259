"""Which decisions of a placement were optimal: the exact optimum, re-solved with the decision fixed, does not get worse.

Two readings of "with that decision fixed", both counted:

- `in_order`: the decisions before it (in order of arrival) stand as they were taken; it is charged with what it alone spoils. If all are optimal, so is the whole placement.
- `alone`: nothing else is fixed.

A workload that is left out is a decision like any other. `by_value` counts a decision as optimal where only the policy cost got worse.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from .optimality_exact import Solution, solve
from .optimality_instances import Instance
from .optimality_objective import Placement, Seat, faults, units, value

Z95 = 1.959964
RESAMPLES = 2000
"""Draws of the bootstrap over instances."""


@dataclass
class Verdict:
    """Per decision, in order of arrival: was it optimal."""

    in_order: list[bool] = field(default_factory=list)
    in_order_by_value: list[bool] = field(default_factory=list)
    alone: list[bool] = field(default_factory=list)
    placed: list[bool] = field(default_factory=list)
    whole: bool = False
    """The placement as a whole is an optimum."""


class Broken(AssertionError):
    """A placement that breaks a constraint: no verdict on it means anything."""


def judge(instance: Instance, placement: Placement, best: Solution, seconds: float, *, alone: bool = True) -> Verdict:
    """All decisions of one placement against the proven optimum `best`. Raises `Broken`, and `Undecided` where a solve takes too long."""
    broken = faults(instance, placement)
    if broken:
        raise Broken(f"instance {instance.seed}: {'; '.join(broken[:3])}")
    verdict = Verdict(placed=[w.id in placement for w in instance.workloads])
    count = len(instance.workloads)
    if value(instance, placement) == value(instance, best.placement):
        verdict.whole = True
        verdict.in_order = verdict.in_order_by_value = verdict.alone = [True] * count
        return verdict
    fixed: dict[str, Seat | None] = {}
    standing, pool = best, [best.placement]
    for w in instance.workloads:
        seat = placement.get(w.id)
        fixed[w.id] = seat
        good = by_value = True
        if standing.placement.get(w.id) != seat:
            before = value(instance, standing.placement)
            again = _solve(instance, fixed, seconds, standing.placement)
            after = value(instance, again.placement)
            good, by_value = after == before, after[:-1] == before[:-1]
            standing = again
            if after == value(instance, best.placement):
                pool.append(again.placement)
        verdict.in_order.append(good)
        verdict.in_order_by_value.append(by_value)
    for w in instance.workloads if alone else ():
        seat = placement.get(w.id)
        good = any(_node(other, w.id) == (seat.node if seat else None) for other in pool)
        if not good:
            again = _solve(instance, {w.id: seat}, seconds, best.placement)
            good = value(instance, again.placement) == value(instance, best.placement)
            if good:
                pool.append(again.placement)
        verdict.alone.append(good)
    return verdict


def as_arrived(instance: Instance, placement: Placement, seconds: float) -> list[bool]:
    """Per unit (a gang or one workload) in order of arrival: did the optimum of what had arrived by then, all earlier decisions kept, not get worse.

    Each workload of a unit gets the unit's verdict.
    """
    fixed: dict[str, Seat | None] = {}
    verdict, seen = [], 0
    for unit in units(instance.workloads):
        seen += len(unit)
        part = replace(instance, workloads=instance.workloads[:seen])
        before = _solve(part, fixed, seconds, {})
        fixed |= {w.id: placement.get(w.id) for w in unit}
        good = all(before.placement.get(w.id) == fixed[w.id] for w in unit) or value(part, _solve(part, fixed, seconds, before.placement).placement) == value(part, before.placement)
        verdict += [good] * len(unit)
    return verdict


def _solve(instance: Instance, fixed: Mapping[str, Seat | None], seconds: float, hint: Placement) -> Solution:
    found = solve(instance, fixed, seconds, hint)
    if found is None:
        raise Broken(f"instance {instance.seed}: the exact model refuses what the checker allows")
    return found


def _node(placement: Placement, name: str) -> int | None:
    seat = placement.get(name)
    return seat.node if seat else None


def wilson(good: int, of: int) -> tuple[float, float]:
    """95 % interval of a share, as if decisions were independent."""
    if not of:
        return (0.0, 1.0)
    share, z2 = good / of, Z95**2
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = Z95 * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of)) / (1 + z2 / of)
    return (max(0.0, middle - half), min(1.0, middle + half))


def by_instance(groups: Sequence[Sequence[bool]], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the share by a bootstrap over instances: decisions of one instance hang together."""
    if not groups:
        return (0.0, 1.0)
    rng = Random(seed)
    shares = []
    for _ in range(RESAMPLES):
        drawn = [groups[rng.randrange(len(groups))] for _ in groups]
        shares.append(sum(sum(group) for group in drawn) / max(1, sum(len(group) for group in drawn)))
    shares.sort()
    return (shares[int(0.025 * RESAMPLES)], shares[int(0.975 * RESAMPLES) - 1])
