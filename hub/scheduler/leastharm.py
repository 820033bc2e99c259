"""Where preemption does the least harm, by room alone: every node at once, no pass over the workloads.

Per node the slots that may be preempted are chained in order of importance (`arrays.first`, `w_next`), and what each priority holds is summed (`levels`). A level of
priority opens nodes: those with room enough were everything up to it gone. Of these, one victim that is enough is best; else kube's plan is worked out on all of them
(all go, the most important are taken back while the workload still fits), those with the smallest shortage first, until no plan of the others could be better.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import kernels
from .classes import Klass
from .model import Workload
from .reasons import Bools, Ints
from .state import State

MAX_NODE_VICTIMS = 1024
"""Workloads of one node that a plan looks at."""

PRIORITY_OFFSET = 1 << 31
"""Added to every priority before they are summed, so that more victims always weigh more (kube's rule)."""

Harm = tuple[int, ...]
"""Budgets violated, highest priority, sum of priorities (each with the offset), number, and how long the oldest of the highest has run (its start, negated)."""


@dataclass(frozen=True, slots=True)
class Victims:
    """Who has to go from `node`, in the order of release."""

    node: int
    slots: tuple[int, ...]
    harm: Harm


@dataclass(frozen=True, slots=True)
class Guard:
    """A disruption budget as arrays: [class] whether it covers it, slots that it covers no more, how many may go."""

    covers: Bools
    disrupted: tuple[int, ...]
    allowed: int


def harm_of(state: State, victims: Sequence[int], violations: int) -> Harm:
    """The harm of a plan. `victims` are slots, at least one."""
    priorities, started = state.w_priority[list(victims)].tolist(), state.w_start[list(victims)].tolist()
    highest = max(priorities)
    oldest = min(start for start, priority in zip(started, priorities, strict=True) if priority == highest)
    return violations, highest, sum(priorities) + PRIORITY_OFFSET * len(priorities), len(priorities), -oldest


def guards(state: State) -> list[Guard]:
    """The budgets that cover a class of which something runs."""
    found = []
    for budget in state.budgets.values():
        key = ("covers", budget.namespace, budget.selector)
        known = state.caches.get(key)
        if known is None or known[0] != state.classes_made:
            covers = np.zeros(len(state.class_live), np.bool_)
            for klass in state.classes:
                if klass is not None and klass.shape.namespace == budget.namespace and budget.selector.requirements:
                    covers[klass.id] = budget.selector.matches(dict(klass.shape.labels))
            known = state.caches[key] = state.classes_made, covers
        if (state.class_live[: len(known[1])][known[1]] > 0).any():
            found.append(Guard(known[1], tuple(slot for name in budget.disrupted if (slot := state.slot_of.get(name)) is not None), budget.allowed))
    return found


def search(state: State, workload: Workload, klass: Klass, open_nodes: Bools) -> tuple[Victims | None, Ints]:
    """The least harmful victims on the open nodes, None where there are none; and the nodes that hold too much to be looked at whole."""
    need, rows = klass.amounts, klass.resources
    watched = guards(state)
    best: Victims | None = None
    left, missed = open_nodes.copy(), list[Ints]()
    spare = state.free[rows] - need
    largest = np.maximum(state.class_request[rows][:, state.class_live > 0].max(1, initial=1), 1)[:, None]
    lowest = min(state.levels, default=0)
    for priority in sorted(level for level in state.levels if level < workload.priority):
        spare += state.levels[priority][rows + 1]
        able = left & (spare >= 0).all(0)
        nodes = np.flatnonzero(able)
        if not nodes.size:
            continue
        left[nodes] = False
        short = need - state.free[rows[:, None], nodes]
        fewest = (-(-short // largest)).max(0)
        if kernels.active is not None and not watched:
            found, overfull = _compiled(state, klass, nodes, spare, fewest, priority, lowest)
            missed.append(overfull)
            if found is not None:
                best = found
        else:
            top = workload.priority - 1 if watched else priority
            for count in np.unique(fewest[fewest > 0]).tolist():
                least = (0, priority, priority + PRIORITY_OFFSET + (count - 1) * (lowest + PRIORITY_OFFSET), count)
                if best is not None and best.harm < least:
                    break
                found, overfull = _Group(state, klass, nodes[fewest == count], top, watched).least(priority, alone=count == 1)
                missed.append(overfull)
                if found is not None and (best is None or (found.harm, int(state.tie[found.node])) < (best.harm, int(state.tie[best.node]))):
                    best = found
        if best is not None and best.harm[:2] <= (0, priority):
            # nodes that open only at a higher level lose a workload of that level: they cannot be better
            break
    return best, np.concatenate(missed) if missed else np.empty(0, np.int64)


class _Group:
    """The chains of some nodes side by side: [position, node], the most important first."""

    def __init__(self, state: State, klass: Klass, nodes: Ints, top: int, watched: Sequence[Guard]) -> None:
        """Of priorities up to `top`."""
        self.state, self.klass = state, klass
        at = state.first[nodes]
        for level in sorted((level for level in state.last if level > top), reverse=True):
            last = state.last[level][nodes]
            at = np.where(last >= 0, state.w_next[last], at)
        chain = []
        while len(chain) < MAX_NODE_VICTIMS and (at >= 0).any():
            chain.append(at)
            at = state.w_next[at]
        slots = np.stack(chain) if chain else np.empty((0, len(nodes)), np.int32)
        whole = at < 0
        self.overfull: Ints = nodes[~whole]
        self.nodes, self.slots = nodes[whole], slots[:, whole]
        self.there = self.slots >= 0
        self.kinds = np.where(self.there, state.w_class[self.slots], 0)
        self.priorities = state.w_priority[self.slots]
        self.held = np.where(self.there, state.class_request[klass.resources][:, self.kinds], 0)
        self.watched = watched

    def least(self, priority: int, *, alone: bool) -> tuple[Victims | None, Ints]:
        """The least harm among the nodes; `alone`: one victim may be enough, and then it is the one of `priority` that has run the shortest."""
        found = self._one(priority) if alone else None
        return found or self._plans(), self.overfull

    def _one(self, priority: int) -> Victims | None:
        state, klass = self.state, self.klass
        short = klass.amounts - state.free[klass.resources[:, None], self.nodes]
        enough = self.there & (self.priorities == priority) & (self.held >= short[:, None]).all(0)
        for guard in self.watched:
            if guard.allowed <= 0:
                enough &= ~guard.covers[self.kinds]
        if not enough.any():
            return None
        position, at = np.nonzero(enough)
        slots, nodes = self.slots[position, at], self.nodes[at]
        slot = int(slots[np.lexsort((slots, state.tie[nodes], -state.w_start[slots]))[0]])
        return Victims(int(state.w_node[slot]), (slot,), harm_of(state, (slot,), 0))

    def _plans(self) -> Victims | None:
        state, held = self.state, self.held
        spare = held.sum(1) + state.free[self.klass.resources[:, None], self.nodes] - self.klass.amounts
        gone = np.zeros_like(self.there)
        violating = self._violating()
        for part in (held,) if violating is None else (np.where(violating, held, 0), np.where(violating, 0, held)):
            for position in range(len(gone)):
                rest = spare - part[:, position]
                out = (rest < 0).any(0)
                gone[position] |= out
                spare = np.where(out, spare, rest)
        count = gone.sum(0)
        violations = np.zeros_like(count) if violating is None else (gone & violating).sum(0)
        highest = np.where(gone, self.priorities, -PRIORITY_OFFSET).max(0, initial=-PRIORITY_OFFSET)
        weight = np.where(gone, self.priorities + PRIORITY_OFFSET, 0).sum(0)
        youngest = np.where(gone & (self.priorities == highest), -state.w_start[self.slots], np.iinfo(np.int64).min).max(0, initial=np.iinfo(np.int64).min)
        among = np.flatnonzero(count)
        if not among.size:
            return None
        for key in (violations, highest, weight, count, youngest, state.tie[self.nodes]):
            values = key[among]
            among = among[values == values.min()]
            if among.size == 1:
                break
        at = int(among[0])
        mine = gone[:, at]
        order = self.slots[mine, at] if violating is None else np.concatenate((self.slots[mine & violating[:, at], at], self.slots[mine & ~violating[:, at], at]))
        return Victims(int(self.nodes[at]), tuple(order.tolist()), tuple(int(key[at]) for key in (violations, highest, weight, count, youngest)))

    def _violating(self) -> Bools | None:
        """[position, node] whose going would violate a budget, were all of the node to go in order; None where there are no budgets."""
        if not self.watched:
            return None
        found = np.zeros_like(self.there)
        for guard in self.watched:
            covered = self.there & guard.covers[self.kinds]
            if guard.disrupted:
                covered &= ~np.isin(self.slots, guard.disrupted)
            found |= covered & (np.cumsum(covered, 0) > guard.allowed)
        return found


def _compiled(state: State, klass: Klass, nodes: Ints, spare: Ints, fewest: Ints, priority: int, lowest: int) -> tuple[Victims | None, Ints]:
    """What the groups of one level give, by the compiled kernel; there are no budgets."""
    starts = state.first[nodes]
    for level in sorted((level for level in state.last if level > priority), reverse=True):
        last = state.last[level][nodes]
        starts = np.where(last >= 0, state.w_next[last], starts)
    at, victims, overfull = kernels.active.least_harm(
        nodes, starts, fewest, spare, state.free, klass.resources, klass.amounts, state.class_request, state.w_next, state.w_class, state.w_priority, state.w_start, state.tie,
        priority, lowest, MAX_NODE_VICTIMS,
    )
    if at < 0:
        return None, nodes[overfull]
    slots = tuple(victims.tolist())
    return Victims(int(nodes[at]), slots, harm_of(state, slots, 0)), nodes[overfull]
