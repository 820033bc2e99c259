"""Which workloads should move while all runs: spread that was lost is made good, overloaded nodes are relieved, nodes that are hardly used are emptied. Pure.

A move for gain has to earn its price several times over (`Worth.threshold_permille`), within a stated time. The search accepts a change only where the objective,
with the price of all moves in it, gets strictly less, and what was moved lately rests: so no plan undoes an earlier one, whatever order they come in.
The search is bounded by steps, not by time: the same state and seed give the same plan on every machine.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from .arrays import GONE
from .feasible import verdicts
from .model import Kind, Workload
from .moves import Course, Limits, Plan, Refused, carry_out, order, skew
from .place import Scheduler
from .reasons import Bools, Ints
from .state import State
from .units import LEAVING

HOUR_MS = 3_600_000

SEARCH_STEPS = 400
"""Changes that one search tries: 1 to 2 s at 1,000 nodes."""

LIFTED_MOST = 40
"""Workloads that one change places anew."""

PRUNE_MOST = 200
"""Moves that are tried without, at the end of a search."""

LOAD_ROWS = (0, 1)
"""CPU and memory: what overload is measured by."""

RESTARTED_FOR_GAIN = (Kind.CONTAINER, Kind.FUNCTION)
"""What may be restarted elsewhere for gain alone. A VM that cannot migrate would be down, a batch job would lose its work: they move only from a node that is drained."""


@dataclass(frozen=True, slots=True)
class Worth:
    """What is gained and what it costs, in millionths of the currency."""

    horizon_ms: int = HOUR_MS
    """Time over which a better layout is counted: arrivals and departures make it another one later."""
    threshold_permille: int = 2_000
    """A plan must gain this much of its cost, in thousandths: twice the cost, as the estimate of both is rough."""
    rest_ms: int = 1_800_000
    """What was moved stays at least so long."""
    safe_permille: int = 900
    """Load of CPU or memory, in thousandths, above which a node counts as overloaded."""
    overload_per_hour: int = 1_000_000
    """Price of one node's whole capacity of one resource in use beyond the safe load, per hour."""
    node_per_hour: int = 100_000
    """Price of a node that states none."""
    per_gb: int = 1_000
    """Price of carrying 10^9 bytes."""
    per_migration: int = 1_000
    """Price of the pause of a live migration."""
    per_restart: int = 10_000
    """Price of a restart."""

    def of_move(self, item: Workload) -> int:
        """What moving a workload costs."""
        return item.state_bytes * self.per_gb // 10**9 + self.per_migration if item.migratable else self.per_restart


def rebalance(scheduler: Scheduler, now_ms: int, moved_ms: Mapping[str, int] | None = None, limits: Limits | None = None, worth: Worth | None = None, seed: int = 0,
              steps: int = SEARCH_STEPS) -> Plan:
    """The next plan: spread first, then gain. `moved_ms`: when each workload was last moved. Changes nothing."""
    limits, worth, moved_ms = limits or Limits(), worth or Worth(), moved_ms or {}
    repair = restore_spread(scheduler, now_ms, moved_ms, limits, worth)
    if repair.steps:
        return repair
    plan = improve(scheduler, now_ms, moved_ms, limits, worth, seed, steps)
    return replace(plan, refused=repair.refused + plan.refused)


def restore_spread(scheduler: Scheduler, now_ms: int, moved_ms: Mapping[str, int], limits: Limits, worth: Worth) -> Plan:
    """Moves that make hard spread true again after workloads or nodes left (k8s#115911); the cheapest workloads of the fullest domain go."""
    course = Course(scheduler, limits, now_ms)
    state, targets, refused = course.state, dict[str, int](), list[Refused]()
    for rule in course.rules:
        while len(targets) < limits.per_plan:
            uneven, fullest, _ = skew(state, rule.row, rule.spread, rule.eligible)
            if uneven <= rule.spread.max_skew:
                break
            domain, size = state.attributes.domains(rule.spread.topology_key)
            found = [item for item in _counted(state, rule.row, np.flatnonzero(domain == fullest)) if rule.spread in item.shape.spread]
            movable = sorted((item for item in found if item.id not in targets and not rests(item, now_ms, moved_ms, worth)), key=lambda item: (worth.of_move(item), item.id))
            sums = np.bincount(np.where(rule.eligible, domain, size), weights=state.counts[rule.row], minlength=size + 1)[:size].astype(np.int64)
            move = _to_emptier(course, movable, domain, sums, fullest)
            if move is None:
                names = ", ".join(sorted(item.id for item in found)[:5])
                why = f"all were moved less than {worth.rest_ms // 1000} s ago, or cannot move" if not movable else "no emptier domain has a node for any of them"
                refused.append(Refused(names, "", "", f"spread over {rule.spread.topology_key} is {uneven}, {rule.spread.max_skew} allowed: {why}"))
                break
            targets[move[0].id] = move[1]
    plan = order(Course(scheduler, limits, now_ms), targets)
    return replace(plan, refused=plan.refused + tuple(refused), reason="" if targets else "spread is even")


def improve(scheduler: Scheduler, now_ms: int, moved_ms: Mapping[str, int], limits: Limits, worth: Worth, seed: int, steps: int) -> Plan:
    """A plan that gains more than it costs by the threshold, or none with the reason."""
    search = _Search(Course(scheduler, limits, now_ms), worth, partial(rests, now_ms=now_ms, moved_ms=moved_ms, worth=worth), seed)
    before = search.layout_cost()
    search.run(steps)
    search.prune()
    targets = search.targets()
    if not targets:
        return Plan(reason="no change gains enough")
    plan = order(Course(scheduler, limits, now_ms), targets)
    reached = scheduler.state.snapshot()
    carry_out(reached, plan, now_ms)
    cost = sum(worth.of_move(item) for move in plan.moves if (item := reached.workload(move.workload)) is not None)
    gain = before - layout_cost(reached, worth)
    if gain <= 0 or gain * 1000 < worth.threshold_permille * cost:
        return Plan(refused=plan.refused, gain=gain, cost=cost, reason=f"what can be reached gains {gain} and costs {cost}; {worth.threshold_permille / 1000:g} times the cost is asked for")
    return replace(plan, gain=gain, cost=cost)


def rests(item: Workload, now_ms: int, moved_ms: Mapping[str, int], worth: Worth) -> bool:
    """Whether a workload may not be moved for spread or gain now."""
    if item.id.endswith(LEAVING) or not (item.migratable or item.shape.kind in RESTARTED_FOR_GAIN):
        return True
    last = moved_ms.get(item.id)
    return last is not None and now_ms < last + worth.rest_ms


def layout_cost(state: State, worth: Worth) -> int:
    """What a layout costs over the horizon: the price of the nodes in use, and of overload."""
    here = state.status != GONE
    price = np.where(state.price > 0, state.price, worth.node_per_hour)
    nodes = int(price[here & (state.load > 0)].sum())
    overload = int(_excess(state, worth)[:, here].sum()) * worth.overload_per_hour // 1000
    return (nodes + overload) * worth.horizon_ms // HOUR_MS


def _excess(state: State, worth: Worth) -> Ints:
    """[CPU and memory, node] load beyond the safe one, in thousandths of the capacity."""
    cap = state.cap[list(LOAD_ROWS)]
    used = cap - state.free[list(LOAD_ROWS)]
    beyond: Ints = np.maximum(used * 1000 - cap * worth.safe_permille, 0) // np.maximum(cap, 1)
    return beyond


def _counted(state: State, row: int, nodes: Ints) -> list[Workload]:
    """Workloads on some nodes that a spread row counts."""
    counts = np.array([klass is not None and any(bumped == row for bumped, _ in klass.spread_bumps) for klass in state.classes], np.bool_)
    slots = np.flatnonzero(np.isin(state.w_node, nodes) & ~state.w_ending)
    return [item for slot in slots if counts[state.w_class[slot]] and (item := state.items[slot]) is not None]


def _to_emptier(course: Course, movable: Sequence[Workload], domain: "np.ndarray[tuple[int], np.dtype[np.int32]]", sums: Ints, fullest: int) -> tuple[Workload, int] | None:
    """Move the first workload that has a place in a domain with at least two fewer, the emptiest first; it is booked there.

    All spreads together must get less uneven: two that pull in different directions would otherwise move things to and fro for ever.
    """
    state = course.state
    for item in movable:
        fits, before = course.nodes_for(item), _too_uneven(course)
        for emptier in np.argsort(sums, kind="stable").tolist():
            if sums[emptier] > sums[fullest] - 2:
                break
            nodes = fits & (domain == emptier)
            if not nodes.any():
                continue
            node = _fullest(state, item, nodes)
            mark = state.begin()
            state.release(item.id)
            seat = course.scheduler.seat_on(state.klass(item.shape), node)
            if seat is not None:
                state.place(item, seat, course.now_ms)
                if _too_uneven(course) < before:
                    state.keep(mark)
                    return item, node
            state.undo(mark)
    return None


def _too_uneven(course: Course) -> int:
    """By how much all hard spreads are exceeded, summed."""
    return sum(max(0, uneven - rule.spread.max_skew) for rule, uneven in course.uneven().items())


def _fullest(state: State, item: Workload, nodes: Bools) -> int:
    """Of some nodes the one that is left with the least, each resource in proportion to the node."""
    klass = state.klass(item.shape)
    rows = np.union1d(klass.resources, LOAD_ROWS)
    rows = rows[(state.cap[rows] > 0).any(1) & (rows != state.resource_rows["slots"])]
    left = ((state.free[rows] - klass.request[rows][:, None]) / np.maximum(state.cap[rows], 1)).sum(0)
    if item.shape.gpu is not None:
        left = left + np.maximum(state.gpu_free, 0).sum(1) / np.maximum((state.gpu_free >= 0).sum(1) * 1000, 1)
    return int(np.where(nodes, left, np.inf).argmin())


class _Search:
    """Large neighbourhood search: lift some workloads, place them anew, keep it where the objective gets strictly less."""

    def __init__(self, course: Course, worth: Worth, rests: Callable[[Workload], bool], seed: int) -> None:
        self.course, self.state, self.worth = course, course.state, worth
        self._rests = rests
        self._random = np.random.Generator(np.random.PCG64(seed))
        self._home: dict[str, int] = {}
        self._away: dict[str, int] = {}
        """Price of the move, of all that are not at home."""
        self._cost = self.layout_cost()

    def layout_cost(self) -> int:
        """Of the layout now, without moves."""
        return layout_cost(self.state, self.worth)

    def targets(self) -> dict[str, int]:
        """Where those that should move should go."""
        return {name: seat.node for name in self._away if (seat := self.state.seat(name)) is not None}

    def run(self, steps: int) -> None:
        """Relieve, empty node by node, then random neighbourhoods, for so many tries in all."""
        left = steps
        for node in np.argsort(-_excess(self.state, self.worth).sum(0), kind="stable").tolist():
            while left > 0 and _excess(self.state, self.worth)[:, node].any():
                left -= 1
                if not self._relieve(node):
                    break
        improved = True
        while improved and left > 0:
            improved = False
            for node in self._by_price_of_emptying():
                if left <= 0:
                    break
                left -= 1
                improved |= self._empty([node])
        while left > 0:
            left -= 1
            used = np.flatnonzero(self._used())
            if len(used) < 3:
                break
            self._empty(self._random.choice(used, 2, replace=False).tolist(), refill=True)

    def prune(self) -> None:
        """Send home what is better left there."""
        for name in sorted(self._away)[:PRUNE_MOST]:
            item = self.state.workload(name)
            if item is not None and name in self._away:
                home = np.zeros(self.state.size, np.bool_)
                home[self._home[name]] = True
                self._try([item], home, tolerate=True)

    def _used(self) -> Bools:
        used: Bools = (self.state.load > 0) & (self.state.status != GONE)
        return used

    def _movable(self, node: int) -> list[Workload] | None:
        """All on a node; None where some must stay, or they are too many."""
        items = self.state.on_node(node)
        if len(items) > LIFTED_MOST or any(self._rests(item) for item in items):
            return None
        return items

    def _by_price_of_emptying(self) -> list[int]:
        """Nodes in use that all can leave, the cheapest to empty for its price first."""
        ranked = []
        for node in np.flatnonzero(self._used()).tolist():
            items = self._movable(node)
            if items is not None:
                price = int(self.state.price[node]) or self.worth.node_per_hour
                ranked.append((sum(self.worth.of_move(item) for item in items if self._home.get(item.id, node) == node) / price, node))
        return [node for _, node in sorted(ranked)]

    def _empty(self, nodes: list[int], refill: bool = False) -> bool:
        """Place what is on some nodes elsewhere: on nodes in use, or on a cheaper empty one. `refill`: one of the nodes may be used again."""
        items = []
        for node in nodes:
            movable = self._movable(node)
            if movable is None:
                return False
            items += movable
        if not items or len(items) > LIFTED_MOST:
            return False
        among = self._used()
        if not refill:
            price = np.where(self.state.price > 0, self.state.price, self.worth.node_per_hour)
            spare = ~among & (self.state.status != GONE) & (price < price[nodes].max())
            if spare.any():
                among[int(np.where(spare, price, np.iinfo(np.int64).max).argmin())] = True
        among[nodes if not refill else nodes[:1]] = False
        return self._try(items, among)

    def _relieve(self, node: int) -> bool:
        """Take one workload off an overloaded node: the one whose leaving lowers the objective, tried from the cheapest to move."""
        items = sorted((item for item in self.state.on_node(node) if not self._rests(item)), key=lambda item: (self.worth.of_move(item), item.id))
        among = self.state.status != GONE
        among[node] = False
        return any(self._try([item], among) for item in items[:LIFTED_MOST])

    def _try(self, items: Iterable[Workload], among: Bools, tolerate: bool = False) -> bool:
        """Place some workloads anew on some nodes; kept where it lowers the objective (`tolerate`: or leaves it), no spread gets worse and the plan not too long."""
        state, worth = self.state, self.worth
        lifted = sorted(items, key=lambda item: (-float((state.klass(item.shape).request[list(LOAD_ROWS)] / np.maximum(state.cap[list(LOAD_ROWS)].max(1), 1)).max()), item.id))
        seats = {item.id: seat for item in lifted if (seat := state.seat(item.id)) is not None}
        rows = {row for item in lifted for row, _ in state.klass(item.shape).spread_bumps}
        uneven = self.course.uneven(rows)
        mark = state.begin()
        away = dict(self._away)
        for item in lifted:
            state.release(item.id)
        for item in lifted:
            node = self._place(item, among)
            if node is None:
                state.undo(mark)
                return False
            if node == self._home.get(item.id, seats[item.id].node):
                away.pop(item.id, None)
            else:
                away[item.id] = worth.of_move(item)
        cost = self.layout_cost()
        price = worth.threshold_permille * (sum(away.values()) - sum(self._away.values())) // 1000
        worse = any(new > max(uneven[rule], rule.spread.max_skew) for rule, new in self.course.uneven(rows).items())
        if worse or len(away) > self.course.limits.per_plan or cost + price > self._cost - (0 if tolerate else 1):
            state.undo(mark)
            return False
        state.keep(mark)
        for name, seat in seats.items():
            self._home.setdefault(name, seat.node)
        self._away, self._cost = away, cost
        return True

    def _place(self, item: Workload, among: Bools) -> int | None:
        """Put one on the fullest node that will do and stays within the safe load."""
        state = self.state
        klass = state.klass(item.shape)
        rows = list(LOAD_ROWS)
        safe = ((state.cap[rows] - state.free[rows] + klass.request[rows][:, None]) * 1000 <= state.cap[rows] * self.worth.safe_permille).all(0)
        fits = (verdicts(state, klass) == 0) & among & safe
        while fits.any():
            node = _fullest(state, item, fits)
            seat = self.course.scheduler.seat_on(klass, node)
            if seat is not None:
                state.place(item, seat, self.course.now_ms)
                return node
            fits[node] = False
        return None
