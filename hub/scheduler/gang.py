"""Gangs: all members or none. Greedy first, hardest members first; small gangs are then searched exhaustively, so that "impossible" is a proof and not an accident of order."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .arrays import Seat
from .classes import Klass
from .feasible import devices_for, verdicts
from .model import Shape, Workload
from .place import Pending, Placed, Scheduler
from .rank import View
from .reasons import Ints
from .state import State
from .units import GPU_WHOLE, Invalid

MAX_EXACT = 64
"""Members of a gang that is searched exhaustively."""

MAX_STEPS = 3_000
"""Placements tried in one search: about half a second on 1,000 nodes. A search that ends there has proven nothing, and says so."""

Solver = Callable[[Scheduler, Sequence[Workload], int], Sequence[Seat] | None]
"""Another exact method (a MIP for instance): a seat per member in their order, or None."""


@dataclass(frozen=True, slots=True)
class Gang:
    """A gang that stands."""

    id: str
    placed: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing was placed. `proven`: no arrangement exists; otherwise none was found within the limits. `member`: the one that found no place."""

    id: str
    reason: str
    proven: bool
    member: str = ""


def reserve(scheduler: Scheduler, members: Sequence[Workload], now_ms: int, solver: Solver | None = None) -> Gang | Refused:
    """Place all members or none. Members that stand already stay where they are. Raises `Invalid` for members of different gangs or of the wrong number."""
    if not members or len({item.id for item in members}) != len(members):
        raise Invalid("gang", "has no members, or one twice", "give each member once")
    name, size = members[0].gang, members[0].gang_size
    if not name or any(item.gang != name or item.gang_size != size for item in members) or size != len(members):
        raise Invalid("workload.gang", f"{len(members)} members of {sorted({item.gang for item in members})[:4]} with size {size}", "submit exactly the members of one gang")
    standing = {item.id: known for item in members if (known := scheduler.standing(item)) is not None}
    waiting = [item for item in members if item.id not in standing]
    if not waiting:
        return Gang(name, tuple(standing.values()))
    state = scheduler.state
    order = _hardest_first(state, waiting)
    impossible = _bound(state, order)
    if impossible is not None:
        return Refused(name, impossible[1], True, impossible[0])
    mark = state.begin()
    placed, stuck = _greedy(scheduler, order, now_ms)
    if stuck is None:
        state.keep(mark)
        return Gang(name, tuple({**standing, **placed}[item.id] for item in members))
    state.undo(mark)
    if solver is not None:
        mark = state.begin()
        seats = solver(scheduler, waiting, now_ms)
        if seats is not None and (done := _seat_all(scheduler, waiting, seats, now_ms)) is not None:
            state.keep(mark)
            return Gang(name, tuple({**standing, **done}[item.id] for item in members))
        state.undo(mark)
    if len(waiting) > MAX_EXACT:
        return Refused(name, f"{stuck.workload}: {stuck.reason} (with the others placed first; a gang of {len(waiting)} is not searched exhaustively)", False, stuck.workload)
    mark = state.begin()
    search = _Search(scheduler, order, now_ms)
    if search.run(0):
        state.keep(mark)
        return Gang(name, tuple({**standing, **search.placed}[item.id] for item in members))
    state.undo(mark)
    limit = f"no arrangement among {MAX_STEPS} placements tried" if search.steps >= MAX_STEPS else "no arrangement exists"
    return Refused(name, f"{limit}: the members fit one by one, but not together ({stuck.workload}: {stuck.reason})", search.steps < MAX_STEPS, stuck.workload)


def _hardest_first(state: State, members: Sequence[Workload]) -> list[Workload]:
    """Fewest nodes first, then the largest share of a node."""
    weight: dict[Shape, tuple[int, float, int]] = {}
    for item in members:
        if item.shape not in weight:
            klass = state.klass(item.shape)
            largest = np.maximum(state.cap[klass.resources].max(1, initial=1), 1)
            weight[item.shape] = int(np.count_nonzero(verdicts(state, klass) == 0)), -float((klass.amounts[:, 0] / largest).max()), len(weight)
    return sorted(members, key=lambda item: (*weight[item.shape], item.id))


def _room(state: State, klass: Klass) -> Ints:
    """[node] how many more workloads of the class fit by resources and devices at most."""
    room: Ints = (np.maximum(state.free[klass.resources], 0) // klass.amounts).min(0)
    gpu = klass.shape.gpu
    if gpu is not None:
        fits, nodes = devices_for(state, klass, gpu), state.facts(klass).gpu_nodes
        each = np.zeros(state.size, np.int64)
        each[nodes] = (np.where(fits, state.gpu_free[nodes], 0) // gpu.milli).sum(1) if gpu.milli < GPU_WHOLE else fits.sum(1) // gpu.count
        room = np.minimum(room, each)
    return room


def _bound(state: State, members: Sequence[Workload]) -> tuple[str, str] | None:
    """Members of one shape of which too few fit even if they had the cluster's room to themselves: the member and the reason."""
    counts: dict[Shape, list[Workload]] = {}
    for item in members:
        counts.setdefault(item.shape, []).append(item)
    for items in counts.values():
        klass = state.klass(items[0].shape)
        shape = klass.shape
        bits = verdicts(state, klass)
        # affinity among the members and spread change as they are placed; only what stays as it is counts here
        fixed = np.uint32(0xFFFF) if not (shape.affinity or shape.spread or shape.links) else np.uint32(0x1FF)
        able = int(_room(state, klass)[(bits & fixed) == 0].sum())
        if able < len(items):
            return items[able].id, f"{len(items)} members of this shape, but the nodes hold {able} of them: free room is there in sum, not in pieces that are large enough"
    return None


def _greedy(scheduler: Scheduler, order: Sequence[Workload], now_ms: int) -> tuple[dict[str, Placed], Pending | None]:
    placed: dict[str, Placed] = {}
    for item in order:
        decision = scheduler.decide(item, now_ms)
        done = scheduler.commit(decision, now_ms)
        if done is None:
            return placed, scheduler.pending(decision)
        placed[item.id] = done
    return placed, None


def _seat_all(scheduler: Scheduler, members: Sequence[Workload], seats: Sequence[Seat], now_ms: int) -> dict[str, Placed] | None:
    """Believe nobody: each seat of a solver is checked."""
    state, placed = scheduler.state, {}
    for item, seat in zip(members, seats, strict=True):
        if not 0 <= seat.node < state.size or verdicts(state, state.klass(item.shape))[seat.node]:
            return None
        try:
            state.place(item, seat, now_ms)
        except Invalid:
            return None
        placed[item.id] = Placed(item.id, state.nodes[seat.node].name, seat)
    return placed


class _Search:
    """Depth first over members and nodes on the state itself; equal members take nodes in ascending order, equal nodes are tried once."""

    def __init__(self, scheduler: Scheduler, order: Sequence[Workload], now_ms: int) -> None:
        self.scheduler, self.order, self.now_ms = scheduler, order, now_ms
        self.placed: dict[str, Placed] = {}
        self.steps = 0
        shapes = [scheduler.state.klass(item.shape) for item in order]
        self.tangled = any(klass.affinity or klass.anti or klass.excluded_by or klass.shape.spread or klass.shape.links for klass in shapes)

    def run(self, at: int) -> bool:
        """Place the members from `at` on; leaves them placed where it gives True, the state as it was where not."""
        if at == len(self.order):
            return True
        state, item = self.scheduler.state, self.order[at]
        klass = state.klass(item.shape)
        feasible = verdicts(state, klass) == 0
        if at and not self.tangled and self.order[at - 1].shape == item.shape:
            feasible[: self.placed[self.order[at - 1].id].seat.node] = False
        if not self.tangled and _bound(state, self.order[at:]) is not None:
            return False
        total = self.scheduler.ranker.total(View(state, klass, state.facts(klass), feasible, self.now_ms))
        nodes = self._distinct(np.flatnonzero(feasible).tolist())
        for node in sorted(nodes, key=lambda node: -int(total[node])):
            if self.steps >= MAX_STEPS:
                return False
            self.steps += 1
            seat = self.scheduler.seat_on(klass, node)
            if seat is None:
                continue
            mark = state.begin()
            state.place(item, seat, self.now_ms)
            self.placed[item.id] = Placed(item.id, state.nodes[node].name, seat)
            if self.run(at + 1):
                state.keep(mark)
                return True
            state.undo(mark)
            del self.placed[item.id]
        return False

    def _distinct(self, nodes: list[int]) -> list[int]:
        """Of nodes that are the same in all that matters, the first; `nodes` ascend. With members in ascending order no arrangement is lost but its mirror images."""
        if self.tangled:
            return nodes
        state = self.scheduler.state
        kinds = {item.shape for item in self.order}
        static = [state.facts(state.klass(shape)).fails for shape in kinds]
        found: dict[tuple[object, ...], int] = {}
        for node in nodes:
            key = (*(array[node].tobytes() for array in (state.gpu_free, state.gpu_mem, state.gpu_model, state.numa_free)), state.free[:, node].tobytes(), *(int(bits[node]) for bits in static))
            found.setdefault(key, node)
        return list(found.values())
