"""Making room for a workload of higher priority with the least harm.

Harm of a plan, compared in this order (kube's): disruption budgets violated, highest priority that must go, their sum, their number, how long the oldest of the
highest has run. A victim that can be moved elsewhere is migrated, which is no harm. All nodes are compared (`leastharm`).
"""

from dataclasses import dataclass, field, replace

import numpy as np

from . import leastharm
from .arrays import Seat
from .feasible import verdicts
from .leastharm import Victims, on_nodes, search
from .model import Workload
from .place import Pending, Placed, Scheduler
from .reasons import UNRESOLVABLE, Bits, Bools, Ints
from .state import State

_UNRESOLVABLE = np.uint32(UNRESOLVABLE)


@dataclass(frozen=True, slots=True)
class Plan:
    """What has to go from `node` so that the workload fits. `moves`: those among the victims that are migrated, and where to."""

    workload: Workload
    node: int
    victims: tuple[str, ...]
    violations: int
    harm: tuple[int, ...] = ()
    in_part: int = 0
    """Nodes that hold more than a plan looks at (`leastharm.MAX_NODE_VICTIMS`): one of them may do less harm."""
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
    chosen = _choose(scheduler, workload, decision.bits)[0] if workload.preempts else None
    if chosen is None:
        return scheduler.pending(decision)
    victims = {name: item for name in chosen.victims if (item := scheduler.state.workload(name)) is not None}
    mark = scheduler.state.begin()
    done = _execute(scheduler, chosen, now_ms)
    if done is None:
        scheduler.state.undo(mark)
        return scheduler.pending(decision)
    scheduler.state.keep(mark)
    made = replace(chosen, moves=done[1]) if done[1] else chosen
    return Made(done[0], made, tuple(victims[name] for name in made.evicted))


def plan(scheduler: Scheduler, workload: Workload, now_ms: int, *, only: "frozenset[str] | None" = None, among: Bools | None = None) -> Plan | None:
    """The least harmful plan, changing nothing; None where no plan helps.

    `only`: no other workloads may be victims, whatever their priority (reclaiming what a tenant borrowed). `among` restricts the nodes.
    """
    if not workload.preempts and only is None:
        return None
    chosen, _ = _choose(scheduler, workload, verdicts(scheduler.state, scheduler.state.klass(workload.shape)), only, among)
    if chosen is None:
        return None
    mark = scheduler.state.begin()
    done = _execute(scheduler, chosen, now_ms)
    scheduler.state.undo(mark)
    return None if done is None else replace(chosen, moves=done[1])


def outlook(scheduler: Scheduler, workload: Workload) -> str:
    """For people: what preemption would do for a workload that fits nowhere, and whether a limit kept it from looking at all of it."""
    if not workload.preempts:
        return ""
    state = scheduler.state
    chosen, in_part = _choose(scheduler, workload, verdicts(state, state.klass(workload.shape)))
    if chosen is None:
        said = "preemption finds nothing: no node would do without those of lower priority"
    else:
        count = len(chosen.victims)
        said = f"preemption would take {count} workload{'s' if count > 1 else ''} from {state.nodes[chosen.node].name} (highest priority {chosen.harm[1]})"
    if in_part:
        said += f"; {in_part} node{'s hold' if in_part > 1 else ' holds'} more than {leastharm.MAX_NODE_VICTIMS} workloads that may go, and {'were' if in_part > 1 else 'was'} looked at in part only"
    return said


def on_node(scheduler: Scheduler, workload: Workload, node: int) -> Plan | None:
    """Kube's plan of one node, before anybody is migrated; None where it has none."""
    state = scheduler.state
    klass = state.klass(workload.shape)
    return None if verdicts(state, klass)[node] & _UNRESOLVABLE else _planned(state, workload, on_nodes(state, workload, klass, np.array([node])))


def _choose(scheduler: Scheduler, workload: Workload, bits: Bits, only: "frozenset[str] | None" = None, among: Bools | None = None) -> tuple[Plan | None, int]:
    """Whose going does the least harm, before anybody is migrated; and how many nodes hold too much to be looked at whole."""
    state = scheduler.state
    klass = state.klass(workload.shape)
    open_nodes: Bools = (bits & _UNRESOLVABLE) == 0
    if among is not None:
        open_nodes &= among
    if not open_nodes.any():
        return None, 0
    if only is not None:
        return _planned(state, workload, on_nodes(state, workload, klass, _nodes_of(state, only, open_nodes), only)), 0
    found, overfull = search(state, workload, klass, open_nodes)
    in_part = len(np.unique(overfull)) if overfull.size else 0
    if found is None and in_part:
        found = on_nodes(state, workload, klass, np.unique(overfull))
    return _planned(state, workload, found, in_part), in_part


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


def _planned(state: State, workload: Workload, found: Victims | None, in_part: int = 0) -> Plan | None:
    if found is None:
        return None
    return Plan(workload, found.node, tuple(item.id for slot in found.slots if (item := state.items[slot]) is not None), found.harm[0], found.harm, in_part)


def _nodes_of(state: State, workloads: frozenset[str], open_nodes: Bools) -> Ints:
    found: Ints = np.unique(np.array([seat.node for name in workloads if (seat := state.seat(name)) is not None], np.int64))
    return found[open_nodes[found]]
