"""A whole backlog placed at once: the programme over node patterns, rounded, topped up and repaired while time is left.

The programme's patterns are rounded down, then up while demand lasts; free room is filled; then nodes are emptied and filled again, a few at a time, and the new
filling is kept where the value does not fall. What fits on a node is never exceeded at any step.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .compiled import COMPILED, MODULUS, kernel, lehmer
from .gpus import Ints
from .patterns import Patterns, Prices, Problem, generate, knapsack, prices, problem, weights

DESTROY = 3
"""Nodes emptied and filled again in one repair."""

REPAIRS_MAX = 100_000
"""Repairs at most, where no time is set."""

CHUNK = 50 if COMPILED else 1
"""Repairs between two looks at the clock: a few milliseconds."""

GAP_DONE = 1e-6
"""Relative gap to the bound at which there is nothing left to repair."""


@dataclass(frozen=True)
class Backlog:
    """`amount [N, C]` of each class on each node; `group [N]` of each node (groups in order); its `value`, the `bound`, and how it came about."""

    amount: Ints
    group: Ints
    value: float
    bound: float
    prices: Prices
    patterns: int
    rounds: int
    repairs: int


@kernel
def repair(times: int, values: Any, requests: Any, most: Any, capacity: Any, group: Any, weight: Any, amount: Any, spare: Any, room: Any, worth: Any, state: Any) -> float:
    """Empty `DESTROY` nodes and fill them again, `times` over; kept where the value does not fall. `amount [N, C]`, `spare [C]`, `room [N, R]`, `worth [N]` change in place; the gain is returned.

    One of the nodes is the worst of a few at random (least worth for its group's prices), the others are any.
    """
    count, classes = amount.shape
    kinds = requests.shape[1]
    many = min(DESTROY, count)
    chosen = np.empty(many, dtype=np.int64)
    before, pattern, limit = np.empty((many, classes), dtype=np.int64), np.empty(classes, dtype=np.int64), np.empty(classes, dtype=np.int64)
    net = np.empty(classes)
    gained = 0.0
    for _ in range(times):
        for at in range(many):
            best = -1
            for _ in range(4 if at == 0 else 1):
                n = lehmer(state) % count
                taken = False
                for e in range(at):
                    if chosen[e] == n:
                        taken = True
                if not taken and (best < 0 or worth[n] < worth[best]):
                    best = n
            chosen[at] = best
        if many > 0 and chosen[0] < 0:
            continue
        old = 0.0
        for at in range(many):
            n = chosen[at]
            if n < 0:
                continue
            for c in range(classes):
                before[at, c] = amount[n, c]
                old += values[c] * amount[n, c]
                spare[c] += amount[n, c]
                amount[n, c] = 0
        new = 0.0
        for at in range(many):
            n = chosen[at]
            if n < 0:
                continue
            g = group[n]
            for c in range(classes):
                limit[c] = min(most[c, g], spare[c])
                net[c] = values[c] * (0.85 + 0.3 * lehmer(state) / MODULUS)
            knapsack(net, requests, limit, capacity[g], weight[g], 2, state, pattern)
            for c in range(classes):
                if pattern[c] > 0:
                    amount[n, c] = pattern[c]
                    spare[c] -= pattern[c]
                    new += values[c] * pattern[c]
        if new >= old:
            gained += new - old
            for at in range(many):
                n = chosen[at]
                if n < 0:
                    continue
                worth[n] = 0.0
                for k in range(kinds):
                    room[n, k] = capacity[group[n], k]
                    worth[n] -= capacity[group[n], k] * weight[group[n], k]
                for c in range(classes):
                    if amount[n, c] > 0:
                        worth[n] += values[c] * amount[n, c]
                        for k in range(kinds):
                            room[n, k] -= amount[n, c] * requests[c, k]
        else:
            for at in range(many):
                n = chosen[at]
                if n < 0:
                    continue
                for c in range(classes):
                    spare[c] += before[at, c] * -1 + amount[n, c]
                    amount[n, c] = before[at, c]
    return gained


@kernel
def top_up(values: Any, requests: Any, most: Any, group: Any, weight: Any, amount: Any, spare: Any, room: Any, worth: Any, state: Any) -> None:
    """Fill the free `room [N, R]` of every node with what is `spare [C]`."""
    count, classes = amount.shape
    pattern, limit = np.empty(classes, dtype=np.int64), np.empty(classes, dtype=np.int64)
    for n in range(count):
        g = group[n]
        left = 0
        for c in range(classes):
            limit[c] = min(most[c, g], spare[c])
            left += limit[c]
        if left == 0:
            continue
        knapsack(values, requests, limit, room[n], weight[g], 4, state, pattern)
        for c in range(classes):
            if pattern[c] > 0:
                amount[n, c] += pattern[c]
                spare[c] -= pattern[c]
                worth[n] += values[c] * pattern[c]
                for k in range(requests.shape[1]):
                    room[n, k] -= pattern[c] * requests[c, k]


def rounded(of: Problem, patterns: Patterns, group: Ints) -> Ints:
    """A pattern, or what demand leaves of it, for the nodes it is meant for: `amount [N, C]`."""
    amount = np.zeros((len(group), len(of.counts)), dtype=np.int64)
    spare = of.counts.copy()
    start = np.concatenate([[0], np.cumsum(of.nodes)])
    end, at = start[1:].copy(), start[:-1].copy()
    whole = np.floor(patterns.times + 1e-6).astype(np.int64)
    for p in np.flatnonzero(whole):
        g = int(patterns.group[p])
        fits = int(np.min(spare[patterns.amount[p] > 0] // patterns.amount[p][patterns.amount[p] > 0], initial=int(whole[p])))
        times = min(fits, int(whole[p]), int(end[g] - at[g]))
        amount[at[g]:at[g] + times] = patterns.amount[p]
        spare -= times * patterns.amount[p]
        at[g] += times
    part = patterns.times - whole
    for p in np.argsort(-part, kind="stable"):
        g = int(patterns.group[p])
        if part[p] <= 1e-6:
            break
        if at[g] < end[g]:
            amount[at[g]] = np.minimum(patterns.amount[p], spare)
            spare -= amount[at[g]]
            at[g] += 1
    return amount


def backlog(
    requests: Any, counts: Any, values: Any, capacity: Any, nodes: Any, allowed: Any, *, out_of_time: Callable[[], bool], pattern_time_over: Callable[[], bool] | None = None,
    repairs_max: int = REPAIRS_MAX, seed: int = 1,
) -> Backlog:
    """Place up to `counts [C]` requests of size `requests [C, R]`, worth `values [C]` each, on `nodes [G]` empty nodes of `capacity [G, R]`, where `allowed [C, G]`.

    `pattern_time_over` ends the generation of patterns, `out_of_time` the repair; for callables that never say so and equal `seed`, the result is always the same.
    Raises `Bad` naming the field, the place and the remedy.
    """
    of = problem(requests, counts, values, capacity, nodes, allowed)
    state = np.array([seed % (MODULUS - 1) + 1], dtype=np.int64)
    found = prices(of)
    patterns = generate(of, found, pattern_time_over or out_of_time, state)
    group = np.repeat(np.arange(len(of.nodes)), of.nodes).astype(np.int64)
    amount = rounded(of, patterns, group)
    spare = of.counts - amount.sum(axis=0)
    room = of.capacity[group] - amount @ of.requests
    weight = weights(of, found)
    worth = amount @ of.values
    repairs = 0
    if len(group) and len(spare):
        top_up(of.values, of.requests, of.most, group, weight, amount, spare, room, worth, state)
        value = float((amount @ of.values).sum())
        worth -= (of.capacity * weight).sum(axis=1)[group]
        while repairs < repairs_max and spare.any() and value < found.bound * (1 - GAP_DONE) and not out_of_time():
            chunk = min(CHUNK, repairs_max - repairs)
            value += repair(chunk, of.values, of.requests, of.most, of.capacity, group, weight, amount, spare, room, worth, state)
            repairs += chunk
    return Backlog(amount, group, float((amount @ of.values).sum()), found.bound, found, len(patterns.group), patterns.rounds, repairs)
