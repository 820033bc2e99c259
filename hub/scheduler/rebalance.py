"""Moves that make the cluster better than it is: spread that has decayed is restored, nodes that are hardly used are emptied.

A plan is an ordered list that is feasible at every step, with both ends of a move held while it runs. Hysteresis keeps it quiet: a move must pay, nothing moves twice
within the cool-down, and few moves run at once. Every target is the scheduler's own choice, so placing and rebalancing never work against each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .arrays import UP, Seat
from .classes import Klass
from .model import Spread, Workload
from .place import Scheduler
from .reasons import Bools, Ints
from .state import State
from .units import Invalid

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a plan may do. Defaults are those of a careful operator: DRS allows 8 moves per host, a storm needs none of them to fail."""

    cooldown_ms: int = 1_800_000
    """Nothing that moved within this time moves again."""
    max_moves: int = 64
    """Of one plan."""
    parallel: int = 8
    """Moves of one wave."""
    per_node: int = 2
    """Moves of one wave that a node takes part in."""
    min_saving: int = 50_000
    """Least saving of emptying a node, in millionths of the currency per hour, idle power not counted."""
    price_per_gib: int = 1_000
    """What moving a GiB of state costs, in the same unit: emptying a node must save more than its moves cost."""
    restarts: bool = True
    """Whether what cannot be migrated may be restarted elsewhere, within the disruption budgets."""


@dataclass(frozen=True, slots=True)
class Step:
    """One move. Steps of one `wave` may run together; a wave starts when the one before it is done."""

    workload: str
    source: str
    target: str
    seat: Seat
    how: str
    bytes: int
    wave: int
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in order, and the nodes that are empty afterwards."""

    steps: tuple[Step, ...]
    emptied: tuple[str, ...]
    saving: int
    bytes: int


def plan(scheduler: Scheduler, now_ms: int, moved_ms: Mapping[str, int] | None = None, limits: Limits | None = None) -> Plan:
    """Work out a plan, changing nothing. `moved_ms`: when each workload last moved."""
    made = _Planner(scheduler.on(scheduler.state.snapshot()), now_ms, moved_ms or {}, limits or Limits())
    made.repair_spread()
    made.empty_nodes()
    return Plan(tuple(made.steps), tuple(made.emptied), made.saving, sum(step.bytes for step in made.steps))


def carry_out(scheduler: Scheduler, made: Plan, now_ms: int) -> list[str]:
    """Book the steps in order until one no longer holds; gives the ids that moved. (In the hub each step is an operation; this is for simulation and what-if.)"""
    done = []
    for step in made.steps:
        try:
            scheduler.state.move(step.workload, step.seat, now_ms)
        except Invalid:
            break
        done.append(step.workload)
    return done


class _Planner:
    """Works on a snapshot; what is planned is booked there at once."""

    def __init__(self, scheduler: Scheduler, now_ms: int, moved_ms: Mapping[str, int], limits: Limits) -> None:
        self.scheduler, self.state, self.now_ms, self.moved_ms, self.limits = scheduler, scheduler.state, now_ms, moved_ms, limits
        self.steps: list[Step] = []
        self.emptied: list[str] = []
        self.saving = 0
        self.moving: set[str] = set()
        self.wave, self.in_wave, self.freed = 0, dict[int, int](), dict[int, Ints]()

    def repair_spread(self) -> None:
        """Hard spread constraints that hold no longer, after a scale-down for instance."""
        for klass in [item for item in self.state.classes if item is not None and self.state.class_live[item.id]]:
            for spread, row in zip(klass.shape.spread, klass.spread_rows, strict=True):
                if spread.hard:
                    while len(self.steps) < self.limits.max_moves and self._level(self.state.klass(klass.shape), spread, row):
                        pass

    def _level(self, klass: Klass, spread: Spread, row: int) -> bool:
        """One move from the fullest domain where the skew is too large; False where there is nothing to do or nothing that helps."""
        state = self.state
        domain, size = state.attributes.domains(spread.topology_key)
        counted = state.facts(klass).affine & (domain >= 0)
        open_nodes = counted & (state.status == UP) & ~state.cordon
        sums = np.bincount(domain[counted], weights=state.counts[row][counted], minlength=size)
        there = np.bincount(domain[open_nodes], minlength=size) > 0
        if not there.any() or sums.max() - sums[there].min() <= spread.max_skew:
            return False
        fullest = int(np.argmax(sums))
        slots = np.flatnonzero((state.w_class == klass.id) & (state.w_node >= 0))
        for slot in sorted(slots[domain[state.w_node[slots]] == fullest].tolist(), key=lambda slot: (not self._item(slot).migratable, -int(state.w_start[slot]), slot)):
            item = self._item(slot)
            elsewhere = domain != fullest
            if self._may_move(item) and self._improves(item, elsewhere, f"spread over {spread.topology_key}: {int(sums.max())} against {int(sums[there].min())}"):
                return True
        return False

    def _improves(self, item: Workload, among: Bools, why: str) -> bool:
        """Move where that makes the spreads of all classes together less uneven: two that pull in different directions would otherwise move things to and fro for ever."""
        kept, mark, before = self._kept(), self.state.begin(), unevenness(self.state)
        if self._move(item, among, why) and unevenness(self.state) < before:
            self.state.keep(mark)
            return True
        self._take_back(kept, mark)
        return False

    def _kept(self) -> tuple[int, set[str], int, dict[int, int], dict[int, Ints]]:
        return len(self.steps), set(self.moving), self.wave, dict(self.in_wave), dict(self.freed)

    def _take_back(self, kept: tuple[int, set[str], int, dict[int, int], dict[int, Ints]], mark: int) -> None:
        self.state.undo(mark)
        count, self.moving, self.wave, self.in_wave, self.freed = kept
        del self.steps[count:]

    def _item(self, slot: int) -> Workload:
        item = self.state.items[slot]
        assert item is not None
        return item

    def _may_move(self, item: Workload) -> bool:
        if item.id in self.moving or self.now_ms - self.moved_ms.get(item.id, -self.limits.cooldown_ms) < self.limits.cooldown_ms:
            return False
        if item.migratable:
            return True
        return self.limits.restarts and item.preemptible and not any(budget.covers(item) and budget.allowed <= 0 for budget in self.state.budgets.values())

    def _move(self, item: Workload, among: Bools, why: str) -> bool:
        state = self.state
        seat = state.seat(item.id)
        assert seat is not None
        request = state.klass(item.shape).request
        placed = self.scheduler.relocate(item.id, self.now_ms, among)
        if placed is None:
            return False
        if not item.migratable:
            self.scheduler.disrupt(item)
        target = placed.seat.node
        short = bool((state.free[:, target] < self.freed.get(target, np.zeros_like(request))).any())
        busy = max(self.in_wave.get(seat.node, 0), self.in_wave.get(target, 0)) >= self.limits.per_node
        if short or busy or sum(self.in_wave.values()) >= 2 * self.limits.parallel:
            self.wave += 1
            self.in_wave, self.freed = {}, {}
        for node in (seat.node, target):
            self.in_wave[node] = self.in_wave.get(node, 0) + 1
        self.freed[seat.node] = self.freed.get(seat.node, np.zeros_like(request)) + request
        self.moving.add(item.id)
        self.steps.append(Step(item.id, state.nodes[seat.node].name, placed.node, placed.seat, "migrate" if item.migratable else "restart", item.state_bytes, self.wave, why))
        return True

    def empty_nodes(self) -> None:
        """Nodes whose workloads all find a place on other nodes that are in use: the least used first, only where it pays."""
        state = self.state
        used = np.where(state.cap > 0, (state.cap - state.free) / np.maximum(state.cap, 1), 0.0)[:2].max(0)
        worth = (state.status == UP) & ~state.cordon & (state.load > 0) & (state.price >= self.limits.min_saving)
        for node in sorted(np.flatnonzero(worth).tolist(), key=lambda node: (float(used[node]), -int(state.price[node]), int(state.tie[node]))):
            items = state.on_node(node)
            cost = sum(item.state_bytes for item in items) * self.limits.price_per_gib // GIB
            room = self.limits.max_moves - len(self.steps)
            if len(items) > room or int(state.price[node]) - cost < self.limits.min_saving or not all(self._may_move(item) for item in items):
                continue
            self._empty(node, sorted(items, key=lambda item: (-max(state.klass(item.shape).request[:2].tolist()), item.id)), int(state.price[node]) - cost)

    def _empty(self, node: int, items: list[Workload], saving: int) -> None:
        state = self.state
        among = (state.load > 0) & (np.arange(state.size) != node)
        kept, mark, before = self._kept(), state.begin(), unevenness(state)
        for item in items:
            if not self._may_move(item) or not self._move(item, among, f"{state.nodes[node].name} can be emptied"):
                self._take_back(kept, mark)
                return
        if unevenness(state) > before:
            self._take_back(kept, mark)
            return
        state.keep(mark)
        state.set_cordon(state.nodes[node].name, True)
        self.emptied.append(state.nodes[node].name)
        self.saving += saving


def unevenness(state: State) -> int:
    """By how much all hard spreads of what runs are exceeded, summed."""
    return sum(
        max(0, skew(state, state.klass(klass.shape), spread, row) - spread.max_skew)
        for klass in state.classes if klass is not None and state.class_live[klass.id]
        for spread, row in zip(klass.shape.spread, klass.spread_rows, strict=True) if spread.hard
    )


def skew(state: State, klass: Klass, spread: Spread, row: int) -> int:
    """How uneven a spread is now over the domains where the class may be."""
    domain, size = state.attributes.domains(spread.topology_key)
    counted = state.facts(klass).affine & (domain >= 0)
    if not counted.any():
        return 0
    sums = np.bincount(domain[counted], weights=state.counts[row][counted], minlength=size)
    there = np.bincount(domain[counted], minlength=size) > 0
    return int(sums[there].max() - sums[there].min())
