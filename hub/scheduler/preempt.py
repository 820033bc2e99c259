"""Making room for a workload of higher priority with the least harm.

Harm of a plan, compared in this order (kube's): disruption budgets violated, highest priority that must go, their sum, their number, how long the oldest of the
highest has run. A victim that can be moved elsewhere is migrated, which is no harm. Where room alone decides, all nodes are compared (`leastharm`); where devices,
zones or other workloads decide too, plans are worked out exactly on a few.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .arrays import Seat
from .classes import Klass
from .feasible import gpu_room, verdicts
from .leastharm import MAX_NODE_VICTIMS, Victims, harm_of, search
from .model import Workload
from .place import Pending, Placed, Scheduler
from .reasons import UNRESOLVABLE, Bits, Bools, Ints
from .state import State
from .units import GPU_WHOLE

CANDIDATES = 8
"""Nodes on which plans are worked out victim by victim where more than room decides (devices, zones, peers), those with the smallest shortage first; each costs about 50 us."""


_UNRESOLVABLE = np.uint32(UNRESOLVABLE)


@dataclass(frozen=True, slots=True)
class Plan:
    """What has to go from `node` so that the workload fits. `moves`: those among the victims that are migrated, and where to."""

    workload: Workload
    node: int
    victims: tuple[str, ...]
    violations: int
    harm: tuple[int, ...] = ()
    moves: tuple[tuple[str, Seat], ...] = field(default=())

    @property
    def evicted(self) -> tuple[str, ...]:
        """Victims that are not migrated."""
        moved = {name for name, _ in self.moves}
        return tuple(name for name in self.victims if name not in moved)


@dataclass(frozen=True, slots=True)
class Made:
    """Room that was made: where the workload is now, what was evicted (to queue again) and what was migrated."""

    placed: Placed
    plan: Plan
    evicted: tuple[Workload, ...]


def reserve(scheduler: Scheduler, workload: Workload, now_ms: int) -> Placed | Pending | Made:
    """`Scheduler.reserve`, and where that finds nothing the least harmful plan at once, as one step."""
    known = scheduler.standing(workload)
    if known is not None:
        return known
    decision = scheduler.decide(workload, now_ms)
    placed = scheduler.commit(decision, now_ms)
    if placed is not None:
        return placed
    chosen = _choose(scheduler, workload, decision.bits) if workload.preempts else None
    if chosen is None:
        return scheduler.pending(decision)
    victims = {name: item for name in chosen.victims if (item := scheduler.state.workload(name)) is not None}
    mark = scheduler.state.begin()
    done = _execute(scheduler, chosen, now_ms)
    if done is None:
        scheduler.state.undo(mark)
        return scheduler.pending(decision)
    scheduler.state.keep(mark)
    made = replace(chosen, moves=done[1])
    return Made(done[0], made, tuple(victims[name] for name in made.evicted))


def plan(scheduler: Scheduler, workload: Workload, now_ms: int, *, everywhere: bool = False, only: "frozenset[str] | None" = None) -> Plan | None:
    """The least harmful plan, changing nothing; None where no plan helps. `everywhere`: exact on every node, for small clusters and comparison.

    `only`: no other workloads may be victims, whatever their priority (reclaiming what a tenant borrowed).
    """
    if not workload.preempts and only is None:
        return None
    chosen = _choose(scheduler, workload, verdicts(scheduler.state, scheduler.state.klass(workload.shape)), everywhere=everywhere, only=only)
    if chosen is None:
        return None
    mark = scheduler.state.begin()
    done = _execute(scheduler, chosen, now_ms)
    scheduler.state.undo(mark)
    return None if done is None else replace(chosen, moves=done[1])


def _choose(scheduler: Scheduler, workload: Workload, bits: Bits, *, everywhere: bool = False, only: "frozenset[str] | None" = None) -> Plan | None:
    """Whose going does the least harm, before anybody is migrated."""
    state = scheduler.state
    klass = state.klass(workload.shape)
    open_nodes: Bools = (bits & _UNRESOLVABLE) == 0
    if not open_nodes.any():
        return None
    if everywhere or only is not None:
        nodes = np.flatnonzero(open_nodes) if only is None else _nodes_of(state, only, open_nodes)
        return min(_on_nodes(scheduler, workload, klass, nodes, only), key=lambda made: (made.harm, int(state.tie[made.node])), default=None)
    if _by_room(klass):
        found, overfull = search(state, workload, klass, open_nodes)
        if found is not None or not overfull.size:
            return None if found is None else _planned(state, workload, found)
        open_nodes = np.isin(np.arange(state.size), overfull)
    return _of_few(scheduler, workload, klass, open_nodes)


def _of_few(scheduler: Scheduler, workload: Workload, klass: Klass, open_nodes: Bools) -> Plan | None:
    """The least harmful plan on the nodes that each level of priority opens and that are the least short, where more than room decides."""
    state = scheduler.state
    best: Plan | None = None
    available = state.free[klass.resources].copy()
    gpu, gpu_free = workload.shape.gpu, np.maximum(state.gpu_free, 0).sum(1, dtype=np.int64) if workload.shape.gpu is not None else None
    tried = np.zeros(state.size, np.bool_)
    for priority in sorted(level for level in state.levels if level < workload.priority):
        held = state.levels[priority]
        available += held[klass.resources + 1]
        able = open_nodes & ~tried & (available >= klass.amounts).all(0)
        if gpu is not None and gpu_free is not None:
            gpu_free += held[0]
            able &= gpu_free >= gpu.count * gpu.milli
        if not able.any():
            continue
        nodes = _least_short(state, klass, able)
        tried[nodes] = True
        for made in _on_nodes(scheduler, workload, klass, nodes):
            if best is None or (made.harm, int(state.tie[made.node])) < (best.harm, int(state.tie[best.node])):
                best = made
        if best is not None and best.violations == 0 and best.harm[1] <= priority:
            # nodes that open only at a higher level lose a workload of that level: they cannot be better
            break
    return best


def carry_out(scheduler: Scheduler, made: Plan, now_ms: int) -> Placed | None:
    """Migrate, evict and place, or change nothing and give None where the plan no longer holds. The evicted are `made.evicted`, for the caller to queue again."""
    state = scheduler.state
    if any(name not in state.slot_of for name in made.victims) or made.workload.id in state.slot_of:
        return None
    mark = state.begin()
    done = _execute(scheduler, made, now_ms)
    if done is None or {name for name, _ in done[1]} != {name for name, _ in made.moves}:
        state.undo(mark)
        return None
    state.keep(mark)
    return done[0]


def _execute(scheduler: Scheduler, made: Plan, now_ms: int) -> tuple[Placed, tuple[tuple[str, Seat], ...]] | None:
    """Take the victims off, place the workload, find a new seat for every victim that can be migrated; the caller keeps or undoes it. None where it does not work."""
    state = scheduler.state
    items = [item for name in made.victims if (item := state.workload(name)) is not None]
    for item in items:
        state.release(item.id)
    klass = state.klass(made.workload.shape)
    seat = None if verdicts(state, klass)[made.node] else scheduler.seat_on(klass, made.node)
    if seat is None:
        return None
    state.place(made.workload, seat, now_ms)
    moves = []
    for item in items:
        decision = scheduler.decide(item, now_ms) if item.migratable else None
        if decision is not None and decision.seat is not None and scheduler.commit(decision, now_ms) is not None:
            moves.append((item.id, decision.seat))
        else:
            scheduler.disrupt(item)
    return Placed(made.workload.id, state.nodes[made.node].name, seat), tuple(moves)


def _on_nodes(scheduler: Scheduler, workload: Workload, klass: Klass, nodes: Ints, only: "frozenset[str] | None" = None) -> list[Plan]:
    """The plans of several nodes, those that have one."""
    return [made for node in nodes.tolist() if (made := on_node(scheduler, workload, klass, node, only)) is not None]


def on_node(scheduler: Scheduler, workload: Workload, klass: Klass, node: int, only: "frozenset[str] | None" = None) -> Plan | None:
    """The plan of one node; None where it has none."""
    return _plan_of(scheduler, workload, klass, node, _lower(scheduler.state, workload, node, only))


def _lower(state: State, workload: Workload, node: int, only: "frozenset[str] | None") -> list[int]:
    """The slots of those that may have to go, the most important first: higher priority, then longer running."""
    found: list[int] = []
    slot = int(state.first[node])
    while slot >= 0 and len(found) < MAX_NODE_VICTIMS:
        item = state.items[slot]
        if item is not None and (item.priority < workload.priority if only is None else item.id in only):
            found.append(slot)
        slot = int(state.w_next[slot])
    return found


def _plan_of(scheduler: Scheduler, workload: Workload, klass: Klass, node: int, lower: list[int]) -> Plan | None:
    """The victims on one node: all of `lower` go, then as many as possible are taken back, budget-protected ones first, then the most important."""
    state = scheduler.state
    if not lower:
        return None
    protected, free = _by_budget(state, lower)
    order = protected + free
    gone = _reprieve_tangled(scheduler, klass, node, order) if _tangled(klass) or workload.shape.numa_single else _reprieve(state, klass, node, order)
    victims = [slot for slot, out in zip(order, gone, strict=True) if out] if gone else []
    if not victims:
        return None
    return _planned(state, workload, Victims(node, tuple(victims), harm_of(state, victims, sum(gone[: len(protected)]))))


def _planned(state: State, workload: Workload, found: Victims) -> Plan:
    return Plan(workload, found.node, tuple(item.id for slot in found.slots if (item := state.items[slot]) is not None), found.harm[0], found.harm)


def _nodes_of(state: State, workloads: frozenset[str], open_nodes: Bools) -> Ints:
    found: Ints = np.unique(np.array([seat.node for name in workloads if (seat := state.seat(name)) is not None], np.int64))
    return found[open_nodes[found]]


def _by_room(klass: Klass) -> bool:
    """Whether nothing but the room on a node decides if it may be there, once others have gone."""
    return klass.shape.gpu is None and not klass.shape.numa_single and not _tangled(klass)


def _tangled(klass: Klass) -> bool:
    """Whether other workloads decide, apart from the room they take, if it may be on a node."""
    return bool(klass.affinity or klass.anti or klass.excluded_by or any(item.hard for item in klass.shape.spread) or klass.shape.links)


def _by_budget(state: State, slots: Sequence[int]) -> tuple[list[int], list[int]]:
    """Those whose going would violate a budget, and the others, each in the given order."""
    if not state.budgets:
        return [], list(slots)
    allowed = {name: budget.allowed for name, budget in state.budgets.items()}
    protected: list[int] = []
    others: list[int] = []
    for slot in slots:
        item = state.items[slot]
        covering = [budget.name for budget in state.budgets.values() if item is not None and budget.covers(item)]
        for name in covering:
            allowed[name] -= 1
        (protected if any(allowed[name] < 0 for name in covering) else others).append(slot)
    return protected, others


def _reprieve(state: State, klass: Klass, node: int, order: Sequence[int]) -> list[bool]:
    """Which of `order` must go, by room alone; empty where not even all of them make enough. Plain integers: a handful of victims, two or three resources."""
    rows = klass.resources
    amounts_held = state.class_request[rows[:, None], state.w_class[list(order)]]
    held = amounts_held.T.tolist()
    spare = (state.free[rows, node] - klass.amounts[:, 0]).tolist()
    with_gpu = klass.shape.gpu is not None
    milli, memory = (state.gpu_free[node].tolist(), state.gpu_mem[node].tolist()) if with_gpu else ([], [])
    for slot, amounts in zip(order, held, strict=True):
        spare = [have + amount for have, amount in zip(spare, amounts, strict=True)]
        if with_gpu:
            _devices(state, slot, milli, memory, 1)
    if min(spare) < 0 or not _devices_fit(state, klass, node, milli, memory):
        return []
    gone = []
    for slot, amounts in zip(order, held, strict=True):
        rest = [have - amount for have, amount in zip(spare, amounts, strict=True)]
        stays = min(rest) >= 0
        if stays and with_gpu:
            _devices(state, slot, milli, memory, -1)
            stays = _devices_fit(state, klass, node, milli, memory)
            if not stays:
                _devices(state, slot, milli, memory, 1)
        if stays:
            spare = rest
        gone.append(not stays)
    return gone


def _devices(state: State, slot: int, milli: list[int], memory: list[int], sign: int) -> None:
    item, seat = state.items[slot], state.seats[slot]
    if milli and item is not None and seat is not None and item.shape.gpu is not None:
        for device in seat.gpus:
            milli[device] += sign * item.shape.gpu.milli
            memory[device] += sign * item.shape.gpu.memory


def _devices_fit(state: State, klass: Klass, node: int, milli: list[int], memory: list[int]) -> bool:
    gpu = klass.shape.gpu
    if gpu is None:
        return True
    have = state.nodes[node].gpus
    return sum(milli[at] >= gpu.milli and memory[at] >= gpu.memory and (not gpu.models or device.model in gpu.models) for at, device in enumerate(have)) >= gpu.count


def _reprieve_tangled(scheduler: Scheduler, klass: Klass, node: int, order: Sequence[int]) -> list[bool]:
    """As `_reprieve`, by trial on the state itself: affinity, spread, zones and links decide too."""
    state = scheduler.state
    held = [(slot, state.items[slot], state.seats[slot], int(state.w_start[slot]), bool(state.w_ending[slot])) for slot in order]
    mark = state.begin()
    try:
        for _, item, _, _, _ in held:
            if item is not None:
                state.release(item.id)
        if verdicts(state, klass)[node] or scheduler.seat_on(klass, node) is None:
            return []
        gone = []
        for _, item, seat, start, ending in held:
            assert item is not None and seat is not None
            back = state.begin()
            state.adopt(item, seat, start)
            if ending:
                state.set_ending(item.id)
            stays = not verdicts(state, klass)[node] and scheduler.seat_on(klass, node) is not None
            if stays:
                state.keep(back)
            else:
                state.undo(back)
            gone.append(not stays)
        return gone
    finally:
        state.undo(mark)


def _least_short(state: State, klass: Klass, able: Bools) -> Ints:
    """The nodes among `able` with the smallest shortage, as a share of what they have."""
    nodes = np.flatnonzero(able)
    rows = klass.resources[:, None]
    worst = (np.maximum(klass.amounts - state.free[rows, nodes], 0) / np.maximum(state.cap[rows, nodes], 1)).max(0)
    if klass.shape.gpu is not None:
        room = gpu_room(state, klass, klass.shape.gpu)[nodes]
        worst = worst + np.maximum(klass.shape.gpu.count - room, 0) / GPU_WHOLE
    if len(nodes) > CANDIDATES:
        near = worst <= np.partition(worst, CANDIDATES - 1)[CANDIDATES - 1]
        nodes, worst = nodes[near], worst[near]
    result: Ints = nodes[np.lexsort((state.tie[nodes], worst))][:CANDIDATES]
    return result
