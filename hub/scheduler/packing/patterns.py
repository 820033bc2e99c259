"""Classes of alike requests on groups of alike nodes: scarcity prices with a bound, and patterns (what one node holds) that pay.

`prices` solves the programme that pools each group's resources. Its duals are the scarcity prices; by weak duality they give an upper bound on the value of any
placement, which `bound` computes in plain arithmetic from the prices alone, so that a reader can check it. `generate` solves the programme over patterns by column
generation, each pattern by a knapsack heuristic. All quantities are whole numbers; values may be fractions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .compiled import MODULUS, kernel, lehmer
from .gpus import Bad, Ints

CLASSES_MAX = 2_048
"""Classes of requests at a time: one column per class and group in the pooled programme, which must be solved within a fraction of a second."""

GROUPS_MAX = 256
"""Groups of nodes at a time, for the same reason."""

QUANTITY_MAX = 1 << 40
"""Largest request, capacity or count: products with the numbers above stay exact enough in float64 and far from overflow in int64."""

TRIES = 24
"""Knapsack tries per pattern: the prices as they are, then prices disturbed at random."""

ROUNDS_MAX = 200
"""Rounds of column generation at most; ordinary backlogs need 20 to 60."""

GAIN_REL = 2e-4
"""Column generation ends when the patterns found in a round promise less than this share of the value."""

FIRST_PATTERNS = 4
"""Patterns per group to begin with, at the pooled prices."""

FREE_WEIGHT = 0.05
"""What resources without a price count as size, as a share of what they would if all counted alike."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Prices:
    """What is scarce: resource `[G, R]`, the value of one more unit in each group; request `[C]`, of one more request of each class; bound, what no placement's value exceeds."""

    resource: Floats
    request: Floats
    bound: float


@dataclass(frozen=True)
class Problem:
    """Checked arrays: requests `[C, R]`, counts, values `[C]`, capacity `[G, R]`, nodes `[G]`, most `[C, G]` (requests of a class that fit on one empty node; 0 where not allowed)."""

    requests: Ints
    counts: Ints
    values: Floats
    capacity: Ints
    nodes: Ints
    most: Ints


def problem(requests: Any, counts: Any, values: Any, capacity: Any, nodes: Any, allowed: Any) -> Problem:
    """Check shapes and ranges; raises `Bad` naming the field, the place and the remedy."""
    arrays = {}
    for name, given, dims in (("requests", requests, 2), ("counts", counts, 1), ("capacity", capacity, 2), ("nodes", nodes, 1)):
        array = np.asarray(given)
        if array.ndim != dims or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise Bad(f"{name}: give whole numbers in {dims} dimension{'s' * (dims > 1)}")
        wrong = np.argwhere((array < 0) | (array > QUANTITY_MAX))
        if len(wrong):
            raise Bad(f"{name}{[int(at) for at in wrong[0]]} is {int(array[tuple(wrong[0])])}; give 0 .. {QUANTITY_MAX}")
        arrays[name] = array.astype(np.int64)
    asked, many, room, number = arrays["requests"], arrays["counts"], arrays["capacity"], arrays["nodes"]
    worth, may = np.asarray(values, dtype=np.float64), np.asarray(allowed, dtype=np.bool_)
    classes, groups = len(many), len(number)
    for name, found, expected in (("requests", asked.shape[0], classes), ("capacity", room.shape[0], groups), ("values", worth.shape, (classes,)), ("allowed", may.shape, (classes, groups)), ("capacity", room.shape[1], asked.shape[1])):
        if found != expected:
            raise Bad(f"{name}: there are {classes} classes, {groups} groups and {asked.shape[1]} resources; its shape must match ({found} instead of {expected})")
    if classes > CLASSES_MAX or groups > GROUPS_MAX:
        raise Bad(f"requests: {classes} classes and {groups} groups; give at most {CLASSES_MAX} and {GROUPS_MAX}, alike ones merged")
    if not np.isfinite(worth).all() or (worth < 0).any():
        raise Bad(f"values[{int(np.argmin(np.where(np.isfinite(worth), worth, -1.0)))}]: give a finite value of 0 or more")
    most = np.broadcast_to(many[:, None], may.shape).copy()
    for k in range(asked.shape[1]):
        need = asked[:, k] > 0
        most[need] = np.minimum(most[need], room[None, :, k] // asked[need, k][:, None])
    return Problem(asked, many, worth, room, number, np.where(may, most, 0))


def bound(of: Problem, resource: Floats) -> float:
    """What no placement's value exceeds, by weak duality from any prices of 0 or more, `resource [G, R]`."""
    pays = of.values[:, None] - of.requests @ resource.T
    gain = np.where(of.most > 0, pays, 0.0).max(axis=1, initial=0.0)
    return float((of.nodes * (of.capacity * resource).sum(axis=1)).sum() + (of.counts * np.maximum(gain, 0.0)).sum())


def _solver() -> Any:
    import highspy  # the solver is only needed where a plan is made

    solver = highspy.Highs()  # type: ignore[no-untyped-call]
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    return solver


def _rows(solver: Any, upper: Floats) -> None:
    none = np.zeros(0, dtype=np.int32)
    starts = np.zeros(len(upper), dtype=np.int32)
    solver.addRows(len(upper), np.full(len(upper), -np.inf), upper, 0, starts, none, np.zeros(0))


def _columns(solver: Any, worth: Floats, index: list[NDArray[np.int32]], amount: list[Floats]) -> None:
    starts = np.concatenate([[0], np.cumsum([len(each) for each in index])])[:-1].astype(np.int32)
    solver.addCols(len(worth), -worth, np.zeros(len(worth)), np.full(len(worth), np.inf), sum(len(each) for each in index), starts, np.concatenate(index), np.concatenate(amount))


def prices(of: Problem) -> Prices:
    """Solve the pooled programme: requests of class c in group g share that group's resources."""
    classes, groups = of.most.shape
    kinds = of.requests.shape[1]
    scale = np.maximum(of.capacity.max(axis=0, initial=1), 1).astype(np.float64)
    at, where = np.nonzero(of.most > 0)
    resource = np.zeros((groups, kinds))
    if len(at):
        solver = _solver()
        _rows(solver, np.concatenate([of.counts, (of.nodes[:, None] * of.capacity / scale).ravel()]).astype(np.float64))
        index, amount = [], []
        asked = of.requests / scale
        for c, g in zip(at.tolist(), where.tolist(), strict=True):
            used = np.flatnonzero(of.requests[c])
            index.append(np.concatenate([[c], classes + g * kinds + used]).astype(np.int32))
            amount.append(np.concatenate([[1.0], asked[c, used]]))
        _columns(solver, of.values[at], index, amount)
        solver.run()
        dual = np.maximum(-np.array(solver.getSolution().row_dual), 0.0)
        resource = dual[classes:].reshape(groups, kinds) / scale
    pays = np.where(of.most > 0, of.values[:, None] - of.requests @ resource.T, 0.0)
    return Prices(resource, np.maximum(pays.max(axis=1, initial=0.0), 0.0), bound(of, resource))


@kernel
def knapsack(net: Any, requests: Any, most: Any, room: Any, weight: Any, tries: int, state: Any, best: Any) -> float:
    """Fill `room [R]` with requests of the greatest sum of `net [C]`, at most `most [C]` of each; the amounts into `best [C]`, the sum returned.

    Greedy by net value per weighted size, the weights `[R]` (per unit) disturbed in each try but the first.
    """
    classes, kinds = requests.shape
    top = -1.0
    density, disturbed = np.empty(classes), np.empty(kinds)
    left, amount = np.empty(kinds, dtype=np.int64), np.empty(classes, dtype=np.int64)
    for attempt in range(tries):
        for k in range(kinds):
            disturbed[k] = weight[k]
            if attempt > 0:
                disturbed[k] *= 0.2 + 2.0 * lehmer(state) / MODULUS
            left[k] = room[k]
        for c in range(classes):
            density[c] = 0.0
            amount[c] = 0
            if net[c] > 0 and most[c] > 0:
                size = 1e-12
                for k in range(kinds):
                    size += disturbed[k] * requests[c, k]
                density[c] = -net[c] / size
                if attempt > 0:
                    density[c] *= 0.8 + 0.4 * lehmer(state) / MODULUS
        total = 0.0
        for c in np.argsort(density, kind="mergesort"):  # stable, so that numba and numpy agree on ties
            if density[c] >= 0:
                break
            times = most[c]
            for k in range(kinds):
                if requests[c, k] > 0:
                    times = min(times, left[k] // requests[c, k])
            if times > 0:
                amount[c] = times
                total += times * net[c]
                for k in range(kinds):
                    left[k] -= times * requests[c, k]
        if total > top:
            top = total
            for c in range(classes):
                best[c] = amount[c]
    return top



@dataclass(frozen=True)
class Patterns:
    """P patterns: amount `[P, C]` on one node, group `[P]`, and times `[P]` of each that the programme uses (fractions); after how many rounds."""

    amount: Ints
    group: Ints
    times: Floats
    rounds: int


def weights(of: Problem, found: Prices) -> Floats:
    """What a unit of each resource counts as size in each group, `[G, R]`: its price, and a little where it has none, so that no resource is wasted for nothing."""
    room = np.maximum(of.capacity, 1).astype(np.float64)
    node = (found.resource * of.capacity).sum(axis=1, keepdims=True)
    base = np.where(node > 0, node, 1.0) / (room.shape[1] * room)
    sizes: Floats = np.where(node > 0, found.resource + FREE_WEIGHT * base, base)
    return sizes


def generate(of: Problem, found: Prices, out_of_time: Callable[[], bool], state: Ints) -> Patterns:
    """The patterns that pay and how often, until they stop to pay or time is up; `state [1]` seeds the knapsack's tries."""
    classes, groups = of.most.shape
    weight = weights(of, found)
    solver = _solver()
    _rows(solver, np.concatenate([of.counts, of.nodes]).astype(np.float64))
    amounts: list[Ints] = []
    where: list[int] = []
    usable = [g for g in range(groups) if of.nodes[g] > 0 and (of.most[:, g] > 0).any()]

    def add(net: Floats, floor: Floats, tries: int) -> float:
        gain, index, amount, worth = 0.0, [], [], []
        for g in usable:
            best = np.zeros(classes, dtype=np.int64)
            top = knapsack(net, of.requests, of.most[:, g], of.capacity[g], weight[g], tries, state, best)
            if top > floor[g] + 1e-9 * (1.0 + abs(floor[g])):
                gain += float(of.nodes[g]) * (top - float(floor[g]))
                used = np.flatnonzero(best)
                index.append(np.concatenate([used, [classes + g]]).astype(np.int32))
                amount.append(np.concatenate([best[used], [1]]).astype(np.float64))
                worth.append(float(of.values @ best))
                amounts.append(best)
                where.append(g)
        if worth:
            _columns(solver, np.array(worth), index, amount)
        return gain

    rounds = 0
    times = np.zeros(0)
    if usable:
        add(of.values.copy(), np.zeros(groups), 1)
        for _ in range(FIRST_PATTERNS):
            add(np.maximum(of.values - found.request, 0.02 * of.values), np.zeros(groups), 2)
        while rounds < ROUNDS_MAX:
            solver.run()
            solution = solver.getSolution()
            times = np.array(solution.col_value)
            rounds += 1
            if out_of_time():
                break
            dual = np.maximum(-np.array(solution.row_dual), 0.0)
            reached = -float(solver.getInfo().objective_function_value)
            if add(of.values - dual[:classes], dual[classes:], TRIES) <= GAIN_REL * reached:
                break
    return Patterns(np.array(amounts, dtype=np.int64).reshape(len(where), classes), np.array(where, dtype=np.int64), np.concatenate([times, np.zeros(len(where) - len(times))]), rounds)
