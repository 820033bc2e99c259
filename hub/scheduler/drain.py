"""Emptying nodes: for maintenance, or for a workload that finds no room. Pure; the plans are those of `moves.py`, feasible at every step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from .arrays import UP
from .feasible import shortage, verdicts
from .model import Workload
from .moves import Course, Limits, Plan, Refused, carry_out, order
from .place import Decision, Scheduler
from .reasons import Bools, Fail, Ints
from .state import State
from .units import LEAVING, human

ROOM_NODES = 32
"""Nodes on which room is looked for, those that lack the least first."""

ROOM_VICTIMS = 4
"""Workloads that are moved away for one that finds no room, at most: more is a rebalancing and not a favour."""

ROOM_CANDIDATES = 64
"""Workloads of one node that are looked at for it, those with the least to carry first."""

CURED_BY_ROOM = Fail.RESOURCES | Fail.GPU | Fail.NUMA
"""Filters that moving others away can turn."""


@dataclass(frozen=True, slots=True)
class Room:
    """A node (its index) that takes a workload once others have moved away: (their ids, to which node)."""

    node: int
    victims: tuple[tuple[str, int], ...]
    bytes: int
    text: str


@dataclass(frozen=True, slots=True)
class Drain:
    """How nodes are emptied. `left`: what stays on them, with the reasons in the plan's `refused`."""

    nodes: tuple[str, ...]
    plan: Plan
    made_room: tuple[Room, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """For people."""
        names = ", ".join(self.nodes)
        if self.left:
            return f"{names} cannot be emptied: " + "; ".join(f"{each.workload}: {each.reason}" for each in self.plan.refused[:5])
        return f"{names} {'is' if len(self.nodes) == 1 else 'are'} empty" + (f" {self.plan.text}" if self.plan.steps else " already")


@dataclass(frozen=True, slots=True)
class Maintenance:
    """Drains one after the other; a node is back before the next is emptied. `skipped`: nodes that could not be, with the reason. `twice`: workloads that move more than once."""

    phases: tuple[Drain, ...]
    skipped: tuple[Drain, ...] = ()
    twice: tuple[str, ...] = field(default=())


def drain(scheduler: Scheduler, nodes: Sequence[str], now_ms: int, limits: Limits | None = None, avoid: Bools | None = None) -> Drain:
    """A plan that empties nodes. Where something finds no room elsewhere, others make it ("after moving 2 VMs, 14 GB"). `avoid`: nodes to use only where no other will do."""
    limits = limits or Limits()
    course = Course(scheduler, limits, now_ms)
    trial, state = Course(scheduler, limits, now_ms), course.state
    leaving = [state.node_index[name] for name in nodes]
    for each in (course, trial):
        each.give_up(nodes)
    targets, rooms, refused = dict[str, int](), list[Room](), list[Refused]()
    items = [item for node in leaving for item in state.on_node(node) if not item.id.endswith(LEAVING)]
    for item in sorted(items, key=lambda item: (-item.priority, -_size(state, item), item.id)):
        decision = _decide(trial, item, avoid)
        if decision.seat is None:
            room = room_for(trial.scheduler, item, now_ms, movable=lambda other: other.id not in targets)
            if room is None:
                source = state.seat(item.id)
                refused.append(Refused(item.id, state.nodes[source.node].name if source else "", "", trial.scheduler.pending(decision).reason))
                continue
            for name, node in room.victims:
                _settle(trial, name, node)
                targets[name] = node
            rooms.append(room)
            decision = _decide(trial, item, None)
            if decision.seat is None:
                refused.append(Refused(item.id, "", "", trial.scheduler.pending(decision).reason))
                continue
        trial.state.move(item.id, decision.seat, now_ms)
        targets[item.id] = decision.seat.node
    plan = order(course, targets)
    plan = replace(plan, refused=plan.refused + tuple(refused))
    gone = {move.workload for move in plan.moves if not move.hop}
    return Drain(tuple(nodes), plan, tuple(rooms), tuple(item.id for item in items if item.id not in gone))


def maintenance(scheduler: Scheduler, nodes: Sequence[str], now_ms: int, at_once: int = 1, limits: Limits | None = None) -> Maintenance:
    """Empty all the nodes in turn, `at_once` at a time. Workloads go to nodes that are done or not due where they can, so that few move twice."""
    if at_once < 1:
        raise ValueError(f"at_once: {at_once} is out of range; give 1 or more")
    state = scheduler.state.snapshot()
    copy = scheduler.on(state)
    phases, skipped, count = list[Drain](), list[Drain](), dict[str, int]()
    for first in range(0, len(nodes), at_once):
        group = nodes[first:first + at_once]
        due = np.zeros(state.size, np.bool_)
        due[[state.node_index[name] for name in nodes[first + at_once:]]] = True
        found = drain(copy, group, now_ms, limits, due)
        if found.left:
            skipped.append(found)
            continue
        phases.append(found)
        carry_out(state, found.plan, now_ms)
        for name in {move.workload for move in found.plan.moves}:
            count[name] = count.get(name, 0) + 1
    return Maintenance(tuple(phases), tuple(skipped), tuple(sorted(name for name, times in count.items() if times > 1)))


def room_for(scheduler: Scheduler, item: Workload, now_ms: int, movable: Callable[[Workload], bool] | None = None, among: Bools | None = None) -> Room | None:
    """The node that takes the workload after the least has been moved away, and what that is; None where moving up to `ROOM_VICTIMS` does not do.

    The workload need not be placed; where it is, its own node is no answer. `movable`: which of the others may move (a predicate on workloads). Changes nothing.
    """
    may = movable or (lambda other: True)
    state = scheduler.state.snapshot()
    copy = scheduler.on(state)
    seat = state.seat(item.id)
    state.release(item.id)
    klass = state.klass(item.shape)
    bits = verdicts(state, klass)
    curable = (bits != 0) & ((bits & np.uint32(~int(CURED_BY_ROOM) & 0xFFFFFFFF)) == 0)
    if among is not None:
        curable &= among
    if seat is not None:
        curable[seat.node] = False
    lack = (shortage(state, klass) / np.maximum(state.cap[klass.resources], 1)).sum(0)
    lack = lack + ((bits & np.uint32(CURED_BY_ROOM & ~Fail.RESOURCES)) != 0)
    best: Room | None = None
    for node in islice((node for node in np.argsort(np.where(curable, lack, np.inf), kind="stable").tolist() if curable[node]), ROOM_NODES):
        found = _make_room(copy, item, node, now_ms, may, best.bytes if best is not None else None)
        if found is not None and (best is None or (found.bytes, len(found.victims)) < (best.bytes, len(best.victims))):
            best = found
    return best


def _make_room(scheduler: Scheduler, item: Workload, node: int, now_ms: int, may: Callable[[Workload], bool], most: int | None) -> Room | None:
    """Move away from one node until the workload fits: one that alone does it, else by turns the one that takes off most of what is lacking. Then without those that were not needed."""
    state, klass = scheduler.state, scheduler.state.klass(item.shape)
    candidates = sorted((other for other in state.on_node(node) if not other.id.endswith(LEAVING) and other.migratable and may(other)), key=lambda other: (other.state_bytes, other.id))
    candidates = candidates[:ROOM_CANDIDATES]
    mark = state.begin()
    try:
        for other in candidates:
            inner = state.begin()
            place = _elsewhere(scheduler, other, node, now_ms)
            fits = place is not None and not verdicts(state, klass)[node]
            state.undo(inner)
            if fits and place is not None:
                return _room(state, node, ((other, place),), most)
        moved: list[tuple[Workload, int]] = []
        while len(moved) < ROOM_VICTIMS:
            lacking = shortage(state, klass)[:, node]
            ranked = sorted((other for other in candidates if other not in [each for each, _ in moved]), key=lambda other: (-_relief(state, other, klass.resources, lacking), other.state_bytes))
            for other in ranked:
                place = _elsewhere(scheduler, other, node, now_ms)
                if place is not None:
                    moved.append((other, place))
                    break
            else:
                return None
            if not verdicts(state, klass)[node]:
                return _room(state, node, tuple(moved), most)
        return None
    finally:
        state.undo(mark)


def _relief(state: State, other: Workload, resources: Ints, lacking: Ints) -> float:
    """Which part of what is lacking a workload's leaving gives."""
    given = state.klass(other.shape).request[resources]
    return float((np.minimum(given, lacking) / np.maximum(lacking, 1)).sum())


def _elsewhere(scheduler: Scheduler, other: Workload, node: int, now_ms: int) -> int | None:
    placed = scheduler.relocate(other.id, now_ms, scheduler.state.status == UP)
    return None if placed is None else placed.seat.node


def _room(state: State, node: int, moved: tuple[tuple[Workload, int], ...], most: int | None) -> Room | None:
    carried = sum(other.state_bytes for other, _ in moved)
    if most is not None and carried > most:
        return None
    kinds = {other.shape.kind for other, _ in moved}
    word = {"vm": "VM"}.get(next(iter(kinds)), next(iter(kinds)).value) if len(kinds) == 1 else "workload"
    text = f"fits on {state.nodes[node].name} after moving {len(moved)} {word}{'s' if len(moved) > 1 else ''}, {human('memory', carried)}"
    return Room(node, tuple((other.id, place) for other, place in moved), carried, text)


def _size(state: State, item: Workload) -> float:
    klass = state.klass(item.shape)
    return float((klass.amounts[:, 0] / np.maximum(state.cap[klass.resources].max(1), 1)).max(initial=0))


def _decide(trial: Course, item: Workload, avoid: Bools | None) -> Decision:
    """Where the workload goes when it is lifted from where it is: off the nodes to avoid where that can be."""
    mark = trial.state.begin()
    trial.state.release(item.id)
    decision = trial.scheduler.decide(item, trial.now_ms, ~avoid if avoid is not None else None)
    if decision.seat is None and avoid is not None:
        decision = trial.scheduler.decide(item, trial.now_ms)
    trial.state.undo(mark)
    return decision


def _settle(trial: Course, name: str, node: int) -> None:
    """Put one on a node of the trial."""
    item = trial.state.workload(name)
    assert item is not None
    mark = trial.state.begin()
    trial.state.release(name)
    seat = trial.scheduler.seat_on(trial.state.klass(item.shape), node)
    trial.state.undo(mark)
    assert seat is not None
    trial.state.move(name, seat, trial.now_ms)
