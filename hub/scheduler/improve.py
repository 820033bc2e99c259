"""A waiting backlog made better step by step: what none of its workloads could know alone. `together.py` uses it where the programme is too large or proves nothing.

First every unit (a gang, or one workload) greedily, the important and the hard to place first. Then steps of *destroy and repair* on the live arrays under the undo
journal: a few units give up their places, come back in another order, and the step stands only where the objective did not get worse. What runs already is never moved.

Work is bounded by steps, not by time: the same backlog, state and seed give the same placements.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from . import quota
from .arrays import Seat
from .classes import Klass
from .feasible import verdicts
from .model import Spread, Workload
from .parse import peer_matches
from .place import Scheduler
from .reasons import Ints
from .units import CPU, MEMORY

MAX_BACKLOG = 256
"""Workloads that are improved together: a step costs what it removes, but how many steps it takes grows with the backlog. Larger ones are placed greedily."""

STEPS_PER_WORKLOAD = 100
"""Steps for each workload of the backlog: on exactly solved instances of 20 to 40 workloads 12 gave 94 % optimal placements (earlier ones kept), 60 gave 97 %."""

MAX_REMOVED = 16
"""Workloads that one step takes out at most, with those that depend on them."""

BEST = 100
SKEW_POINTS = 100
"""Points of one workload too many in a domain."""

@dataclass(frozen=True)
class Weights:
    """Of the policies that the objective counts; the defaults of the library."""

    cost_optimization: int = 6
    node_affinity: int = 8
    topology_spread: int = 5


@dataclass
class _Item:
    workload: Workload
    klass: Klass
    points: Ints
    """[node] what a placement there misses."""
    would_do: Ints
    """Nodes that would do in an empty cluster."""
    unit: int
    soft: tuple[tuple[Spread, int], ...]


@dataclass
class _Unit:
    members: list[int]
    priority: int
    size: float
    helped: bool = False
    """Has affinity or a hard spread: what others do can open a place to it."""
    needs: set[int] = field(default_factory=set)
    """Units whose company it needs, some of them."""
    with_it: set[int] = field(default_factory=set)
    """Units that must leave when this one does: they stand on its presence, or share a hard spread with it."""


def points(scheduler: Scheduler, klass: Klass, weights: Weights) -> tuple[Ints, Ints]:
    """([node] points missed, nodes that would do when empty) for a class, from what nodes are, not from what runs there."""
    state = scheduler.state
    facts = state.facts(klass)
    nodes = np.array([index for index in np.flatnonzero((facts.fails == 0) & (state.cap[klass.resources] >= klass.amounts).all(0)) if _large_enough(scheduler, klass, int(index))], np.int64)
    missed = np.zeros(state.size, np.int64)
    if not len(nodes):
        return missed, nodes
    rows = [row for row in (state.resource_rows[CPU], state.resource_rows[MEMORY]) if row in klass.resources]
    share = np.array([1_000_000 * klass.request[row] // np.maximum(state.cap[row], 1) for row in rows]).max(0) if rows else np.zeros(state.size, np.int64)
    price = state.price * share
    least, most = int(price[nodes].min()), int(price[nodes].max())
    if most > least:
        missed += weights.cost_optimization * (BEST * (price - least) // (most - least))
    best = int(facts.preferred[nodes].max(initial=0))
    if best:
        missed += weights.node_affinity * (BEST - BEST * facts.preferred // best)
    return missed, nodes


def _large_enough(scheduler: Scheduler, klass: Klass, index: int) -> bool:
    """Devices, zones and ways to sites of one node, as if nothing ran."""
    state, shape = scheduler.state, klass.shape
    node, need, gpu = state.nodes[index], shape.request_map, shape.gpu
    if gpu is not None and sum(device.memory >= gpu.memory and (not gpu.models or device.model in gpu.models) for device in node.gpus) < gpu.count:
        return False
    if shape.numa_single and node.numa and not any(zone.cpu >= need.get(CPU, 0) and zone.memory >= need.get(MEMORY, 0) for zone in node.numa):
        return False
    site, sites = int(state.site_of[index]), state.sites
    for link in shape.links:
        to = sites.ids.get(link.site)
        if to is None or site < 0 or (link.max_rtt_us and sites.rtt_us[site, to] > link.max_rtt_us) or (site != to and sites.kbps[site, to] < link.min_kbps):
            return False
    return True


class Backlog:
    """One backlog on its way to its places. Use `together.place_together`."""

    def __init__(self, scheduler: Scheduler, workloads: Sequence[Workload], now_ms: int, seed: int, weights: Weights, levels: set[int]) -> None:
        self.scheduler, self.state, self.now_ms, self.weights = scheduler, scheduler.state, now_ms, weights
        self.rng = Random(seed)
        self.units: list[_Unit] = []
        self.items: list[_Item] = []
        units: dict[str, _Unit] = {}
        known: dict[int, tuple[Ints, Ints]] = {}
        for workload in workloads:
            klass = self.state.klass(workload.shape)
            missed, nodes = known.setdefault(klass.id, points(scheduler, klass, weights))
            key = f"gang {workload.gang}" if workload.gang else f"one {workload.id}"
            if key not in units:
                units[key] = _Unit([], workload.priority, 0.0)
                self.units.append(units[key])
            unit = units[key]
            total = self.state.cap[klass.resources].sum(1)
            unit.size += float((klass.amounts[:, 0] / np.maximum(total, 1)).max())
            unit.priority = max(unit.priority, workload.priority)
            unit.members.append(len(self.items))
            unit.helped |= bool(workload.shape.affinity) or any(spread.hard for spread in workload.shape.spread)
            soft = tuple((item, row) for item, row in zip(workload.shape.spread, klass.spread_rows, strict=True) if not item.hard)
            self.items.append(_Item(workload, klass, missed, nodes, self.units.index(unit), soft))
        self.levels = sorted(levels, reverse=True)
        self.softs = {(row, item.topology_key, item.max_skew): at.klass for at in self.items for item, row in at.soft}
        self.hopeful = [index for index in range(len(self.units)) if self._choice(index)]
        """Units for which nodes would do at least in an empty cluster."""
        self._connect()

    def _connect(self) -> None:
        """Which units stand or fall together. Classes are compared, not workloads."""
        units_of: dict[int, set[int]] = {}
        for item in self.items:
            units_of.setdefault(item.klass.id, set()).add(item.unit)
        shapes = {item.klass.id: item.klass.shape for item in self.items}
        spaces = self.state.namespaces
        for mine, shape in shapes.items():
            for other, target in shapes.items():
                needs = mine != other and any(peer_matches(term, target, spaces) for term in shape.affinity)
                shares = any(
                    spread.hard and spread.selector is not None and target.namespace == shape.namespace and spread.selector.matches(dict(target.labels)) for spread in shape.spread
                )
                if needs or shares:
                    for index in units_of[other]:
                        self.units[index].with_it |= units_of[mine]
                if needs:
                    for index in units_of[mine]:
                        self.units[index].needs |= units_of[other]
        for index, unit in enumerate(self.units):
            unit.with_it.discard(index)

    # the objective

    def value(self) -> tuple[int, ...]:
        """As `together.Result.value`."""
        placed = dict.fromkeys(self.levels, 0)
        missed = 0
        for item in self.items:
            seat = self.state.seat(item.workload.id)
            if seat is not None:
                placed[item.workload.priority] += 1
                missed += int(item.points[seat.node])
        for (row, key, skew), klass in self.softs.items():
            counts = self._domain_counts(klass, row, key)
            if len(counts):
                missed += self.weights.topology_spread * SKEW_POINTS * max(0, int(counts.max() - counts.min()) - skew)
        return (*placed.values(), -missed)

    def _domain_counts(self, klass: Klass, row: int, key: str) -> Ints:
        domain, size = self.state.attributes.domains(key)
        index = np.where(self.state.facts(klass).affine & (domain >= 0), domain, size)
        there = np.bincount(index, minlength=size + 1)[:size] > 0
        counts: Ints = np.bincount(index, weights=self.state.counts[row], minlength=size + 1)[:size][there].astype(np.int64)
        return counts

    def _soft_points(self, item: _Item) -> Ints:
        """[node] how many points the soft spreads would add."""
        total = np.zeros(self.state.size, np.int64)
        for spread, row in item.soft:
            domain, size = self.state.attributes.domains(spread.topology_key)
            index = np.where(self.state.facts(item.klass).affine & (domain >= 0), domain, size)
            there = np.bincount(index, minlength=size + 1)[:size] > 0
            sums = np.bincount(index, weights=self.state.counts[row], minlength=size + 1)[:size]
            if there.any():
                # What the count of the domain is above the emptiest steers towards level domains also before the skew is too large.
                total += self.weights.topology_spread * SKEW_POINTS * np.append(np.maximum(sums + 1 - sums[there].min() - spread.max_skew, 0), 0)[domain].astype(np.int64)
        return total

    # placing

    def insert(self, index: int, noise: int, first: int | None = None) -> bool:
        """A unit, all or nothing, each member where it misses least (give or take `noise` points); `first`: the node that its first member has to take."""
        unit = self.units[index]
        mark = self.state.begin()
        for member in unit.members:
            item = self.items[member]
            if self.state.seat(item.workload.id) is not None:
                continue
            if quota.refusal(self.state, item.workload) is not None or not self._seat(item, noise, first):
                self.state.undo(mark)
                return False
            first = None
        self.state.keep(mark)
        return True

    def _seat(self, item: _Item, noise: int, only: int | None) -> bool:
        bits = verdicts(self.state, item.klass)
        nodes = np.flatnonzero(bits == 0).tolist() if only is None else [only] if bits[only] == 0 else []
        missed = item.points + self._soft_points(item) if item.soft else item.points
        # Among equals the node that is left with least: it keeps the others whole.
        left = (self.state.free[:2, nodes] / np.maximum(self.state.cap[:2, nodes], 1)).sum(0)
        ranked = sorted(range(len(nodes)), key=lambda at: (int(missed[nodes[at]]) + (self.rng.randrange(noise) if noise else 0), left[at], nodes[at]))
        for at in ranked:
            seat = self.scheduler.seat_on(item.klass, nodes[at])
            if seat is not None:
                self.state.place(item.workload, seat, self.now_ms)
                return True
        return False

    def placed(self, index: int) -> bool:
        """Whether the unit has its places."""
        return self.state.seat(self.items[self.units[index].members[0]].workload.id) is not None

    def fill(self, order: Sequence[int], noise: int) -> None:
        """Insert units in this order; those that others can help to a place (company, a level spread) again while any succeeds. For the rest it only gets fuller."""
        waiting = list(order)
        while waiting:
            later = [index for index in waiting if not self.insert(index, noise)]
            if len(later) == len(waiting):
                return
            waiting = [index for index in later if self.units[index].helped]

    # destroy and repair

    def greedy(self) -> None:
        """The important first, then those with fewest nodes, then the largest."""
        self.fill(sorted(self.hopeful, key=lambda index: (-self.units[index].priority, self._choice(index), -self.units[index].size, index)), 0)

    def _choice(self, index: int) -> int:
        return min(len(self.items[member].would_do) for member in self.units[index].members)

    def improve(self, steps: int) -> dict[str, Seat]:
        """That many steps; the places in the end."""
        value = self.value()
        for _ in range(steps):
            value = self.step(value)
        return self.seats()

    def seats(self) -> dict[str, Seat]:
        """Where the backlog's workloads are now, in the order in which they came there: it is one in which all of them can."""
        came = {event[1].id: at for at, event in enumerate(self.state.log) if event[0] == "place"}
        there = [(came.get(item.workload.id, -1), item.workload.id, seat) for item in self.items if (seat := self.state.seat(item.workload.id)) is not None]
        return {name: seat for _, name, seat in sorted(there, key=lambda part: part[0])}

    def step(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """One move in a trial, which stands where it made nothing worse. Gives the value after it."""
        mark = self.state.begin()
        removed, first, node = self._destroy()
        if not removed and first is None:
            self.state.undo(mark)
            return before
        noise = self.rng.choice((0, 0, 100, 400))
        if first is not None:
            self.insert(first, noise, node)
        rest = [index for index in self.hopeful if not self.placed(index)]
        self.rng.shuffle(rest)
        if self.rng.random() < 0.7:
            rest.sort(key=lambda index: -self.units[index].priority)
        self.fill(rest, noise)
        after = self.value()
        if after >= before:
            self.state.keep(mark)
            return after
        self.state.undo(mark)
        return before

    def _destroy(self) -> tuple[set[int], int | None, int | None]:
        """Units taken out, the unit that comes back first, and where to."""
        rng = self.rng
        waiting = [index for index in self.hopeful if not self.placed(index)]
        standing = [index for index in self.hopeful if self.placed(index)]
        if waiting and rng.random() < 0.5:
            first = rng.choice(waiting) if rng.random() < 0.5 else max(waiting, key=lambda index: (self.units[index].priority, rng.random()))
        elif standing:
            # One that would rather be elsewhere, and some of those that are where it wants to be.
            sample = rng.sample(standing, min(4, len(standing)))
            first = max(sample, key=self._regret)
        else:
            return set(), None, None
        item = self.items[self.units[first].members[0]]
        seat = self.state.seat(item.workload.id)
        wanted = [int(n) for n in item.would_do if seat is None or item.points[n] <= item.points[seat.node]] or item.would_do.tolist()
        node = int(rng.choice(wanted))
        there = [index for index in standing if index != first and any(self._node(member) == node for member in self.units[index].members)]
        if item.workload.shape.gpu is not None and rng.random() < 0.7:
            # Room on a device comes from those that hold devices, often from putting them together another way.
            there = [index for index in there if any(self.items[member].workload.shape.gpu is not None for member in self.units[index].members)]
        out = set(rng.sample(there, min(len(there), rng.randint(1, 4))))
        needs = sorted(index for index in self.units[first].needs if self.placed(index))
        if needs and rng.random() < 0.4:
            # The company that it needs may have to come along.
            out |= set(rng.sample(needs, min(len(needs), 3)))
        tenant = item.workload.tenant
        if seat is None and tenant in self.state.quotas and rng.random() < 0.5:
            same = [index for index in standing if self.items[self.units[index].members[0]].workload.tenant == tenant]
            out |= set(rng.sample(same, min(len(same), rng.randint(1, 3))))
        if rng.random() < 0.3 and standing:
            out |= set(rng.sample(standing, min(len(standing), 2)))
        if rng.random() < 0.2:
            # Alike stand together (company, a spread): only all of them can go elsewhere.
            alike = [index for index in standing if self.items[self.units[index].members[0]].klass is item.klass]
            out |= set(alike[:MAX_REMOVED])
        if seat is not None:
            out.add(first)
        out = self._closure(out)
        if sum(len(self.units[index].members) for index in out) > MAX_REMOVED:
            return set(), None, None
        for index in out:
            for member in self.units[index].members:
                self.state.release(self.items[member].workload.id)
        return out, first, node

    def _closure(self, units: set[int]) -> set[int]:
        found, edge = set(units), list(units)
        while edge:
            for index in self.units[edge.pop()].with_it - found:
                found.add(index)
                edge.append(index)
        return found

    def _node(self, member: int) -> int:
        seat = self.state.seat(self.items[member].workload.id)
        return -1 if seat is None else seat.node

    def _regret(self, index: int) -> int:
        total = 0
        for member in self.units[index].members:
            item, node = self.items[member], self._node(member)
            if node >= 0 and len(item.would_do):
                total += int(item.points[node] - item.points[item.would_do].min())
        return total
