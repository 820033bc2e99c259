"""Where preemption does the least harm: every node at once, whatever decides beside room (`needs`).

Per node the slots that may be preempted are chained in order of importance (`arrays.first`, `w_next`), and what each priority holds is summed (`levels`). A level of
priority opens nodes: those where every row of the workload's needs is met were everything up to it gone. Of these, one victim that is enough is best; else kube's plan is
worked out on all of them (all go, the most important are taken back while the workload still fits), those that lack the least first, until no plan of the others could be better.
Where devices or zones decide too, a level may open a node in vain: it is then looked at again with the next.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from . import kernels
from .arrays import IntArray
from .classes import Klass
from .model import Workload
from .needs import Needs, Parts
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
    needs: Needs
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

    def __init__(self, needs: Needs, open_nodes: Bools) -> None:
        self.needs = needs
        self.left: Bools = open_nodes.copy()
        """[node] whether no level has opened it so far."""
        self.spare: Ints = np.empty((len(needs.rows), len(open_nodes)), np.int64)
        """[row, node] what would be free were all up to the level gone; as `largest` set by the first level."""
        self.largest: Ints = np.empty_like(self.spare)
        """[row, node] no victim gives back more."""
        self.fresh = True

    def opened(self, level: Level) -> tuple[Ints, Ints]:
        """The nodes that the next level opens, and how few victims could be enough there."""
        needs, need = self.needs, self.needs.amounts
        most = needs.most(level.priority)[needs.rows]
        np.add(needs.free[needs.rows] if self.fresh else self.spare, needs.held(level.priority)[needs.rows + 1], out=self.spare)
        self.largest = most if self.fresh else np.maximum(self.largest, most)
        self.fresh = False
        enough = self.left & np.logical_and.reduce(self.spare >= need)
        if needs.parts:
            enough &= level.state.last[level.priority] >= 0  # a node that was opened in vain has nothing new otherwise
        nodes = np.flatnonzero(enough)
        self.left[nodes] = False
        short = need - needs.free[needs.rows]
        fewest: Ints = (-(-short // self.largest)).max(0)[nodes]
        return nodes, np.maximum(fewest, 1) if needs.parts else fewest


def search(state: State, workload: Workload, klass: Klass, open_nodes: Bools) -> tuple[Victims | None, Ints]:
    """The least harmful victims on the open nodes, None where there are none; and the nodes that hold too much to be looked at whole."""
    watched = guards(state)
    needs = Needs(state, klass, workload.priority)
    best: Victims | None = None
    missed: list[Ints] = []
    sums = Sums(needs, open_nodes if needs.reach is None else open_nodes & needs.reach)
    lowest = min(state.levels, default=0)
    by_kernel = kernels.active is not None and not watched and needs.compilable
    for priority in sorted(level for level in state.levels if level < workload.priority):
        if by_kernel:
            found, overfull = _compiled(sums, priority, lowest)
        else:
            found, overfull = _by_groups(Level(state, needs, priority, workload.priority - 1 if watched else priority, lowest, watched), sums, best)
        if overfull.size:
            missed.append(overfull)
        if found is not None and (best is None or (found.harm, int(state.tie[found.node])) < (best.harm, int(state.tie[best.node]))):
            best = found
        if best is not None and best.harm[:2] <= (0, priority):
            # nodes that open only at a higher level lose a workload of that level: they cannot be better
            break
    return best, np.concatenate(missed) if missed else _NONE


def on_nodes(state: State, workload: Workload, klass: Klass, nodes: Ints, only: "frozenset[str] | None" = None) -> Victims | None:
    """The least harmful of kube's plans of a few nodes, each worked out on the first `MAX_NODE_VICTIMS` that may have to go; None where there is none.

    `only`: no other workloads may have to go, whatever their priority.
    """
    needs = Needs(state, klass, workload.priority if only is None else None)
    top = workload.priority - 1 if only is None else max(state.levels, default=0)
    allowed = None if only is None else np.array([slot for name in only if (slot := state.slot_of.get(name)) is not None], np.int64)
    level = Level(state, needs, top, top, min(state.levels, default=0), guards(state))
    if needs.reach is not None:
        nodes = nodes[needs.reach[nodes]]
    best: Victims | None = None
    for start in range(0, len(nodes), GROUP):
        found = _Group(level, nodes[start: start + GROUP], allowed, partly=True).plan()
        if found is not None and (best is None or (found.harm, int(state.tie[found.node])) < (best.harm, int(state.tie[best.node]))):
            best = found
    return best


def _by_groups(level: Level, sums: Sums, best: Victims | None) -> tuple[Victims | None, Ints]:
    """The least harm on the nodes that a level opens, `best` unless something is better; and the nodes that were not looked at whole."""
    state = level.state
    nodes, fewest = sums.opened(level)
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
        if best is not None and best.harm < (0, level.priority, level.least_weight(count), count):
            break
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
            sums.left[group.vain] = True
            if found is not None and (best is None or (found.harm, int(state.tie[found.node])) < (best.harm, int(state.tie[best.node]))):
                best = found
    return best, np.concatenate(missed) if missed else _NONE


class _Group:
    """The chains of some nodes side by side: [position, node], the most important first. `allowed`: no other slots may go. `partly`: the first part of a chain that is too long will do."""

    def __init__(self, level: Level, nodes: Ints, allowed: Ints | None = None, *, partly: bool = False) -> None:
        self.level, state, needs = level, level.state, level.needs
        at = level.starts(nodes)
        chain: list[IntArray] = []
        while len(chain) < MAX_NODE_VICTIMS and at.max(initial=-1) >= 0:
            chain.append(at)
            at = state.w_next[at]
        slots = np.stack(chain) if chain else np.empty((0, len(nodes)), np.int32)
        whole = (at < 0) | partly
        self.overfull: Ints = nodes[~whole]
        self.nodes, self.slots = (nodes, slots) if whole.all() else (nodes[whole], slots[:, whole])
        self.there = self.slots >= 0
        if allowed is not None:
            self.there &= np.isin(self.slots, allowed)
        self.kinds = np.where(self.there, state.w_class[self.slots], 0)
        self.priorities = state.w_priority[self.slots]
        self.short = needs.amounts - needs.free[needs.rows[:, None], self.nodes]
        """[row, node]"""
        self.held = needs.holdings(self.slots, self.there)
        if needs.plain and not partly:
            seen = np.where(self.priorities == level.priority, self.held, 0).max(1, initial=1)
            needs.most(level.priority)[needs.rows[:, None], self.nodes] = seen
        lacking = (self.short > 0).any(1)
        self.short, self.held = self.short[lacking], self.held[lacking]  # the other rows decide nothing
        self.vain: Ints = _NONE
        """Nodes where not even all of the chain are enough, once `plan` has looked."""

    def one(self) -> Victims | None:
        """The victim of the level's priority that is enough alone and violates no budget, the one that has run the shortest."""
        state = self.level.state
        enough = self.there & (self.priorities == self.level.priority) & (self.held >= self.short[:, None]).all(0)
        for guard in self.level.watched:
            if guard.allowed <= 0:
                enough &= ~guard.covered(self)
        position, at = np.nonzero(enough)
        slots, nodes = self.slots[position, at], self.nodes[at]
        for parts in self.level.needs.parts:
            free, serves, none = parts.at(self.level.needs, nodes)
            good = parts.enough(free + parts.given(self.level.needs, slots, np.ones(len(slots), np.bool_)), serves, none)
            slots, nodes = slots[good], nodes[good]
        if not slots.size:
            return None
        slot = int(slots[np.lexsort((slots, state.tie[nodes], -state.w_start[slots]))[0]])
        return Victims(int(state.w_node[slot]), (slot,), harm_of(state, (slot,), 0))

    def plan(self) -> Victims | None:
        """The least harmful of kube's plans, one per node."""
        state, held = self.level.state, self.held
        spare = held.sum(1) - self.short
        parts = [_Freed(part, self) for part in self.level.needs.parts]
        fits = np.logical_and.reduce([np.logical_and.reduce(spare >= 0), *(part.enough() for part in parts)])
        self.vain = self.nodes[~fits]
        gone = np.zeros_like(self.there)
        violating = self._violating()
        for turn in (self.there,) if violating is None else (violating, self.there & ~violating):
            turn_held = held if violating is None else np.where(turn, held, 0)
            for position in range(len(gone)):
                rest = spare - turn_held[:, position]
                out = np.logical_or.reduce(rest < 0)
                holding = [part for part in parts if part.holds[position]]
                for part in holding:
                    out |= turn[position] & ~part.enough_without(position)
                for part in holding:
                    part.take(position, turn[position] & ~out)
                gone[position] |= out
                spare = np.where(out, spare, rest)
        gone &= self.there & fits
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


class _Freed:
    """The parts of a group's nodes, all victims gone; those that stay take theirs again."""

    def __init__(self, parts: Parts, group: _Group) -> None:
        self.parts = parts
        needs = group.level.needs
        free, self.serves, self.none = parts.at(needs, group.nodes)
        self.held = parts.given(needs, group.slots, group.there & ~self.none)
        self.free = free + self.held.sum(2)
        self.holds: Bools = np.logical_or.reduce(self.held, (0, 1, 3))
        """[position] whether any workload there holds a part."""

    def enough(self) -> Bools:
        """[node] whether it will do as things are."""
        return self.parts.enough(self.free, self.serves, self.none)

    def enough_without(self, position: int) -> Bools:
        """[node] whether it would do if the workload at `position` stayed."""
        return self.parts.enough(self.free - self.held[:, :, position], self.serves, self.none)

    def take(self, position: int, stays: Bools) -> None:
        """The workload at `position` stays on some of the nodes."""
        self.free -= np.where(stays, self.held[:, :, position], 0)


def _compiled(sums: Sums, priority: int, lowest: int) -> tuple[Victims | None, Ints]:
    """One level by the compiled kernel, which brings the sums on to it; there are no budgets, and rows and devices say it all."""
    needs = sums.needs
    state = needs.state
    node, victims, weight, overfull = kernels.active.least_harm(
        sums.fresh, sums.left, sums.spare, sums.largest, needs.free, needs.held(priority), needs.most(priority), state.first, state.last[priority], needs.rows, needs.amounts,
        needs.given, state.w_next, state.w_class, state.w_priority, state.w_start, state.tie, priority, lowest, MAX_NODE_VICTIMS, *needs.devices(),
    )
    sums.fresh = False
    if node < 0:
        return None, overfull
    slots = tuple(victims.tolist())
    first = slots[0]  # in the order of importance: of the highest priority, and of these the one that has run the longest
    return Victims(node, slots, (0, int(state.w_priority[first]), weight, len(slots), -int(state.w_start[first]))), overfull
