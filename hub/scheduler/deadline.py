"""Batch with deadlines: earliest deadline first on the capacity that will be free, admission that says now what would miss, and backfill that delays nobody.

Capacity over time comes from the durations of what runs; what has no duration is taken to stay. Times are ms. Constraints other than room are taken as they stand now;
parts of GPUs are counted by their sum on a node.
"""

import math
from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .classes import Klass
from .feasible import verdicts
from .model import Workload
from .place import Placed, Scheduler
from .reasons import Fail, Ints
from .state import State
from .units import Invalid

MAX_QUEUE = 4096
"""Batch workloads that wait: each costs a pass over the nodes."""

NEVER = math.inf


@dataclass(frozen=True, slots=True)
class Slot:
    """When and where a batch workload would run; `late_ms` above 0: it misses its deadline by that much. Without a node it never fits (`start_ms` infinite)."""

    workload: str
    node: str | None
    start_ms: float
    end_ms: float
    late_ms: float


@dataclass(frozen=True, slots=True)
class Admission:
    """`accepted`: it keeps its deadline and makes nobody else miss. `message` says which not, and by how much."""

    accepted: bool
    slot: Slot
    message: str
    hurts: tuple[Slot, ...]


class Profile:
    """Free capacity per node over time: [resource + 1] with the sum of free milli-GPU last."""

    def __init__(self, state: State, now_ms: int) -> None:
        self.state, self.now_ms = state, now_ms
        self.gpu = np.maximum(state.gpu_free, 0).sum(1, dtype=np.int64) if state.gpu_free.size else np.zeros(state.size, np.int64)
        self.changes: dict[int, list[tuple[float, int, Ints]]] = {}
        self.count = 0
        for slot in np.flatnonzero(state.w_node >= 0).tolist():
            item = state.items[slot]
            if item is not None and item.duration_ms is not None:
                self._add(int(state.w_node[slot]), max(int(state.w_start[slot]) + item.duration_ms, now_ms), self.need(state.klass(item.shape)))

    def need(self, klass: Klass) -> Ints:
        """What a class takes of a node."""
        gpu = klass.shape.gpu
        return np.append(klass.request, 0 if gpu is None else gpu.count * gpu.milli)

    def _add(self, node: int, at: float, change: Ints) -> None:
        self.count += 1
        insort(self.changes.setdefault(node, []), (at, self.count, change))

    def free(self, node: int) -> Ints:
        """Free now."""
        return np.append(self.state.free[:, node], self.gpu[node])

    def earliest(self, node: int, need: Ints, duration: float) -> float:
        """First time from which `need` is free on the node for `duration`."""
        free = self.free(node)
        start: float = self.now_ms if (free >= need).all() else NEVER
        for at, _, change in self.changes.get(node, ()):
            if at >= start + duration:
                break
            free = free + change
            if not (free >= need).all():
                start = NEVER
            elif start == NEVER:
                start = at
        return start

    def take(self, node: int, need: Ints, start: float, end: float) -> None:
        """Hold `need` from start to end."""
        self._add(node, start, -need)
        if end < NEVER:
            self._add(node, end, need)


def _check(queue: Sequence[Workload]) -> None:
    if len(queue) > MAX_QUEUE:
        raise Invalid("queue", f"{len(queue)} batch workloads wait", f"let at most {MAX_QUEUE} wait")
    for item in queue:
        if item.duration_ms is None:
            raise Invalid("workload.duration_ms", f"{item.id} has none", "say how long it runs at most: planning ahead needs it")


def _order(queue: Sequence[Workload]) -> list[Workload]:
    return sorted(queue, key=lambda item: (-item.priority, NEVER if item.deadline_ms is None else item.deadline_ms, item.id))


def schedule(scheduler: Scheduler, queue: Sequence[Workload], now_ms: int) -> tuple[Slot, ...]:
    """When each would run: by priority, then earliest deadline. Changes nothing. Raises `Invalid` for one without duration."""
    _check(queue)
    profile = Profile(scheduler.state, now_ms)
    return tuple(_reserve(scheduler, profile, item)[0] for item in _order(queue))


def _reserve(scheduler: Scheduler, profile: Profile, item: Workload) -> tuple[Slot, int]:
    """The earliest slot of one workload, held in the profile; the node, -1 where there is none."""
    state = scheduler.state
    klass = state.klass(item.shape)
    assert item.duration_ms is not None
    later = np.uint32(~int(Fail.RESOURCES | Fail.GPU | Fail.NUMA) & 0xFFFF)
    able = ((verdicts(state, klass) & later) == 0) & (state.cap[klass.resources] >= klass.amounts).all(0)
    need = profile.need(klass)
    best, start = -1, NEVER
    for node in np.flatnonzero(able).tolist():
        found = profile.earliest(node, need, item.duration_ms)
        if (found, int(state.tie[node])) < (start, int(state.tie[best]) if best >= 0 else 0):
            best, start = node, found
            if start <= profile.now_ms:
                break
    end = start + item.duration_ms
    if best >= 0:
        profile.take(best, need, start, end)
    late = 0.0 if item.deadline_ms is None else max(0.0, end - item.deadline_ms)
    return Slot(item.id, state.nodes[best].name if best >= 0 else None, start, end, late), best


def admit(scheduler: Scheduler, queue: Sequence[Workload], workload: Workload, now_ms: int) -> Admission:
    """Whether a workload, behind those that wait, keeps its deadline and lets them keep theirs; the answer comes at submit time."""
    before = {slot.workload: slot.late_ms for slot in schedule(scheduler, queue, now_ms)}
    after = {slot.workload: slot for slot in schedule(scheduler, [*queue, workload], now_ms)}
    slot = after.pop(workload.id)
    hurts = tuple(other for name, other in after.items() if other.late_ms > before[name])
    if slot.node is None:
        return Admission(False, slot, f"{workload.id} will never fit on a node that may take it", hurts)
    if slot.late_ms:
        return Admission(False, slot, f"{workload.id} will miss by {_seconds(slot.late_ms)}", hurts)
    if hurts:
        worst = max(hurts, key=lambda other: other.late_ms)
        return Admission(False, slot, f"{len(hurts)} that wait would miss, {worst.workload} by {_seconds(worst.late_ms)}", hurts)
    return Admission(True, slot, f"{workload.id} starts in {_seconds(slot.start_ms - now_ms)}, ends in {_seconds(slot.end_ms - now_ms)}", ())


def _seconds(ms: float) -> str:
    return f"{math.ceil(ms / 1000)} s" if ms < NEVER else "ever"


def start(scheduler: Scheduler, queue: Sequence[Workload], now_ms: int) -> list[Placed]:
    """Start what can start now: in order, and behind the first that must wait only what does not delay it (EASY backfill)."""
    _check(queue)
    state, started = scheduler.state, list[Placed]()
    head: tuple[int, float, Ints] | None = None
    for item in _order(queue):
        if item.id in state.slot_of:
            continue
        decision = scheduler.decide(item, now_ms)
        if head is not None and decision.seat is not None:
            node, when, need = head
            profile = Profile(state, now_ms)
            assert item.duration_ms is not None
            if decision.seat.node == node and now_ms + item.duration_ms > when:
                mine = profile.need(state.klass(item.shape))
                profile.take(node, mine, now_ms, now_ms + item.duration_ms)
                if profile.earliest(node, need, 1) > when:
                    elsewhere = np.arange(state.size) != node
                    decision = scheduler.decide(item, now_ms, elsewhere)
        placed = scheduler.commit(decision, now_ms)
        if placed is not None:
            started.append(placed)
        elif head is None:
            profile = Profile(state, now_ms)
            slot, node = _reserve(scheduler, profile, item)
            if node >= 0 and slot.start_ms < NEVER:
                head = node, slot.start_ms, profile.need(state.klass(item.shape))
    return started
