"""Where preemption does the least harm, by room alone: every node at once, no pass over the workloads.

Per node the slots that may be preempted are chained in order of importance (`arrays.first`, `w_next`), and what each priority holds is summed (`levels`). A level of
priority opens nodes: those with room enough were everything up to it gone. Of these, one victim that is enough is best; else kube's plan is worked out on all of them
(all go, the most important are taken back while the workload still fits), those with the smallest shortage first, until no plan of the others could be better.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import kernels
from .arrays import IntArray
from .classes import Klass
from .model import Workload
from .reasons import Bools, Ints
from .state import State

MAX_NODE_VICTIMS = 1024
"""Workloads of one node that a plan looks at."""

GROUP = 64
"""Nodes whose plans are worked out side by side: numpy's calls then cost about as much as its work."""

PRIORITY_OFFSET = 1 << 31
"""Added to every priority before they are summed, so that more victims always weigh more (kube's rule)."""

_NONE: Ints = np.empty(0, np.int64)

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

    def covered(self, group: "_Group") -> Bools:
        """[position, node] the victims that it protects."""
        found: Bools = group.there & self.covers[group.kinds]
        return found & ~np.isin(group.slots, self.disrupted) if self.disrupted else found


def harm_of(state: State, victims: Sequence[int], violations: int) -> Harm:
    """The harm of a plan. `victims` are slots, at least one."""
    priorities, started = [int(state.w_priority[slot]) for slot in victims], [int(state.w_start[slot]) for slot in victims]
    highest = max(priorities)
    oldest = min(start for start, priority in zip(started, priorities, strict=True) if priority == highest)
    return violations, highest, sum(priorities) + PRIORITY_OFFSET * len(priorities), len(priorities), -oldest


def guards(state: State) -> list[Guard]:
    """The budgets that cover a class of which something runs."""
    if not state.budgets:
        return []
    found = []
    kept = state.caches.setdefault("covers", {})
    if len(kept) > len(state.budgets):
        kept.clear()
    for budget in state.budgets.values():
        version = state.classes_made, budget.namespace, budget.selector
        if budget.name not in kept or kept[budget.name][0] != version:
            covers = np.zeros(len(state.class_live), np.bool_)
            for klass in state.classes:
                if klass is not None and klass.shape.namespace == budget.namespace and budget.selector.requirements:
                    covers[klass.id] = budget.selector.matches(dict(klass.shape.labels))
            kept[budget.name] = version, covers
        covers = kept[budget.name][1]
        if (state.class_live[covers] > 0).any():
            found.append(Guard(covers, tuple(slot for name in budget.disrupted if (slot := state.slot_of.get(name)) is not None), budget.allowed))
    return found


@dataclass(frozen=True, slots=True)
class Level:
    """One priority that opens nodes to a class. No chain is looked at above `top`; `lowest` is the least priority of all."""

    state: State
    klass: Klass
    priority: int
    top: int
    lowest: int
    watched: Sequence[Guard]

    def least_weight(self, count: int) -> int:
        """No `count` victims, one of them of the level's priority, weigh less."""
        return self.priority + PRIORITY_OFFSET + (count - 1) * (self.lowest + PRIORITY_OFFSET)

    def starts(self, nodes: Ints) -> IntArray:
        """[node] where the part of each chain begins that is not above `top`."""
        state = self.state
        at = state.first[nodes]
        for priority in sorted((priority for priority in state.last if priority > self.top), reverse=True):
            last = state.last[priority][nodes]
            at = np.where(last >= 0, state.w_next[last], at)
        return at


class Sums:
    """What the levels up to one add up to."""

    def __init__(self, state: State, klass: Klass, open_nodes: Bools) -> None:
        self.left: Bools = open_nodes.copy()
        """[node] whether no level has opened it so far."""
        self.spare: Ints = state.free[klass.resources]
        """[resource, node] what would be free were all up to the level gone."""
        self.largest: Ints = np.empty_like(self.spare)
        """[resource, node] no request of a victim is larger."""
        self.fresh = True

    def opened(self, level: Level) -> tuple[Ints, Ints]:
        """The nodes that the next level opens, and how few victims could be enough there."""
        state, rows, need = level.state, level.klass.resources, level.klass.amounts
        self.spare += state.levels[level.priority][rows + 1]
        self.largest = state.largest[level.priority][rows] if self.fresh else np.maximum(self.largest, state.largest[level.priority][rows])
        self.fresh = False
        nodes = np.flatnonzero(self.left & np.logical_and.reduce(self.spare >= need))
        self.left[nodes] = False
        short = need - state.free[rows]
        fewest: Ints = (-(-short // self.largest)).max(0)[nodes]
        return nodes, fewest


def search(state: State, workload: Workload, klass: Klass, open_nodes: Bools) -> tuple[Victims | None, Ints]:
    """The least harmful victims on the open nodes, None where there are none; and the nodes that hold too much to be looked at whole."""
    watched = guards(state)
    best: Victims | None = None
    missed: list[Ints] = []
    sums = Sums(state, klass, open_nodes)
    lowest = min(state.levels, default=0)
    for priority in sorted(level for level in state.levels if level < workload.priority):
        level = Level(state, klass, priority, workload.priority - 1 if watched else priority, lowest, watched)
        found, overfull = _compiled(level, sums) if kernels.active is not None and not watched else _by_groups(level, *sums.opened(level), best)
        if overfull.size:
            missed.append(overfull)
        if found is not None and (best is None or (found.harm, int(state.tie[found.node])) < (best.harm, int(state.tie[best.node]))):
            best = found
        if best is not None and best.harm[:2] <= (0, priority):
            # nodes that open only at a higher level lose a workload of that level: they cannot be better
            break
    return best, np.concatenate(missed) if missed else _NONE


def _by_groups(level: Level, nodes: Ints, fewest: Ints, best: Victims | None) -> tuple[Victims | None, Ints]:
    """The least harm on the nodes that a level opens, `best` unless something is better; and the nodes that were not looked at whole. `fewest`: no plan has fewer victims."""
    state = level.state
    if not nodes.size:
        return best, _NONE
    alone = nodes[fewest == 1]
    if alone.size:
        group = _Group(level, alone)
        single = group.one()
        if single is not None:
            return single, group.overfull
    missed: list[Ints] = []
    nodes, fewest = nodes[fewest > 0], np.clip(fewest[fewest > 0], 2, MAX_NODE_VICTIMS)
    latest = state.w_start[state.last[level.priority][nodes]]
    for count in np.flatnonzero(np.bincount(fewest)).tolist():
        chosen = np.flatnonzero(fewest == count)
        chosen = chosen[np.lexsort((state.tie[nodes[chosen]], -latest[chosen]))]
        for start in range(0, len(chosen), GROUP):
            part = chosen[start: start + GROUP]
            least = ((0, level.priority, level.least_weight(count), count, -int(latest[part[0]])), int(state.tie[nodes[part[0]]]))
            if best is not None and (best.harm, int(state.tie[best.node])) < least:
                break
            group = _Group(level, nodes[part])
            missed.append(group.overfull)
            found = group.plan()
            if found is not None and (best is None or (found.harm, int(state.tie[found.node])) < (best.harm, int(state.tie[best.node]))):
                best = found
    return best, np.concatenate(missed) if missed else _NONE


class _Group:
    """The chains of some nodes side by side: [position, node], the most important first."""

    def __init__(self, level: Level, nodes: Ints) -> None:
        self.level, state, klass = level, level.state, level.klass
        at = level.starts(nodes)
        chain: list[IntArray] = []
        while len(chain) < MAX_NODE_VICTIMS and at.max(initial=-1) >= 0:
            chain.append(at)
            at = state.w_next[at]
        slots = np.stack(chain) if chain else np.empty((0, len(nodes)), np.int32)
        whole = at < 0
        self.overfull: Ints = nodes[~whole]
        self.nodes, self.slots = (nodes, slots) if whole.all() else (nodes[whole], slots[:, whole])
        self.there = self.slots >= 0
        self.kinds = np.where(self.there, state.w_class[self.slots], 0)
        self.priorities = state.w_priority[self.slots]
        short = klass.amounts - state.free[klass.resources[:, None], self.nodes]
        lacking = (short > 0).any(1)
        self.short = short[lacking]
        """[resource that is short somewhere, node]; the others decide nothing."""
        rows = klass.resources[lacking]
        self.held = np.where(self.there, state.class_request[rows][:, self.kinds], 0)
        seen = np.where(self.priorities == level.priority, self.held, 0).max(1, initial=1)
        state.loose(level.priority)[rows[:, None], self.nodes] = seen

    def one(self) -> Victims | None:
        """The victim of the level's priority that is enough alone and violates no budget, the one that has run the shortest."""
        state = self.level.state
        enough = self.there & (self.priorities == self.level.priority) & (self.held >= self.short[:, None]).all(0)
        for guard in self.level.watched:
            if guard.allowed <= 0:
                enough &= ~guard.covered(self)
        if not enough.any():
            return None
        position, at = np.nonzero(enough)
        slots, nodes = self.slots[position, at], self.nodes[at]
        slot = int(slots[np.lexsort((slots, state.tie[nodes], -state.w_start[slots]))[0]])
        return Victims(int(state.w_node[slot]), (slot,), harm_of(state, (slot,), 0))

    def plan(self) -> Victims | None:
        """The least harmful of kube's plans, one per node."""
        state, held = self.level.state, self.held
        spare = held.sum(1) - self.short
        gone = np.zeros_like(self.there)
        violating = self._violating()
        for part in (held,) if violating is None else (np.where(violating, held, 0), np.where(violating, 0, held)):
            for position in range(len(gone)):
                rest = spare - part[:, position]
                out = np.logical_or.reduce(rest < 0)
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
        if not self.level.watched:
            return None
        found = np.zeros_like(self.there)
        for guard in self.level.watched:
            covered = guard.covered(self)
            found |= covered & (np.cumsum(covered, 0) > guard.allowed)
        return found


def _compiled(level: Level, sums: Sums) -> tuple[Victims | None, Ints]:
    """One level by the compiled kernel, which brings the sums on to it; there are no budgets."""
    state, klass, priority = level.state, level.klass, level.priority
    most = state.loose(priority)
    node, victims, overfull = kernels.active.least_harm(
        sums.fresh, sums.left, sums.spare, sums.largest, state.free, state.levels[priority], most, state.first, state.last[priority], klass.resources, klass.amounts,
        state.class_request, state.w_next, state.w_class, state.w_priority, state.w_start, state.tie, priority, level.lowest, MAX_NODE_VICTIMS,
    )
    sums.fresh = False
    if node < 0:
        return None, overfull
    slots = tuple(victims.tolist())
    return Victims(int(node), slots, harm_of(state, slots, 0)), overfull
