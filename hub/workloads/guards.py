"""Room that is kept on nodes for jobs that start later. Pure.

A *guard* is an entry of the state that keeps on a node the room that reservations will need beyond what ends until then. So every decision of the scheduler, whoever asks
for it, leaves promises alone, and none of them has to know of the timetable.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Self

import numpy as np

from ..scheduler import Scheduler, Seat, Shape, State, Workload, bookings
from ..scheduler.deadline import Timetable
from ..scheduler.model import GpuRequest, Kind
from ..scheduler.profile import FAR
from ..scheduler.reasons import Ints
from ..scheduler.units import GPU_WHOLE, LEAVING, SLOTS
from ..store.workloads import PlacementRow
from .book import Guard
from .placing import Placing

GUARD = "\0guard "
"""Begins the id of a guard; no name from outside may have a zero byte. It ends as those of workloads on the move do, so that nothing would move it."""

MAX_SHAPES = 4_096
"""Guards that are remembered by what they stand for, so that the same room is the same object: a few for each node that has reservations."""


class Guarding(Placing):
    """Every method may raise `Invalid` or `Conflict` having changed part: call within `begin` and `undo` or `keep`."""

    def __init__(self, seed: int = 0, scheduler: Callable[[State], Scheduler] = Scheduler) -> None:
        super().__init__(seed, scheduler)
        self._forget_guards()

    def _forget_guards(self) -> None:
        self._shaped: dict[tuple[int, ...], tuple[Guard, ...]] = {}
        """What is missing of each resource to the guards that stand for it, where no device is."""
        self._shaped_of: dict[str, int] = {}
        """The state's resources when they were made."""
        self._counted: dict[str, tuple[Guard, ...]] = {}
        """Node to the guards that are in `_kept`."""
        self._kept: Ints = np.zeros((0, 0), np.int64)
        """[N, R]: what guards hold of each node; milli-GPU last."""
        self._kept_of: dict[str, int] = {}
        """The state's nodes when it was made."""

    def fork(self) -> Self:
        """As `Book.fork`."""
        other = super().fork()
        other._forget_guards()
        return other

    def close(self, placement: PlacementRow, now_ms: int, why: str) -> None:
        """The placement holds nothing any more. What a job gives back early is kept for those that were to come after it, until the next turn."""
        item = self.tables.items[placement.workload].item
        super().close(placement, now_ms, why)
        if self.is_timed(placement.workload) and self._reserved_on(placement.node):
            kept = (replace(item.shape, namespace=GUARD, labels=()), tuple(placement.seat.get("gpus", ())))
            before = self.tables.guards.get(placement.node, ())
            self._put_guard(placement.node, len(before), kept, now_ms)
            self.ledger.put(self.tables.guards, placement.node, (*before, kept))

    def _reserved_on(self, node: str, besides: str = "") -> bool:
        """Whether something waits that has room reserved on the node."""
        rows = self.tables.rows
        return any(node in rows[name].plan.get("nodes", ()) and rows[name].state == "pending" and name != besides for name in self.tables.timed)

    def _spoken_for(self, workload: str, node: str, victims: Iterable[str]) -> bool:
        return any(name in self.tables.timed for name in victims) and self._reserved_on(node, workload)

    def _guarded(self) -> Ints:
        """[N, R]: what guards hold of each node, milli-GPU last: it is free for what they stand for."""
        state = self.state
        if self._kept_of is not state.node_index:
            self._kept, self._counted, self._kept_of = np.zeros((state.size, len(state.resource_rows) + 1), np.int64), {}, state.node_index
        counted, guards = self._counted, self.tables.guards
        for node in [node for node, kept in guards.items() if counted.get(node) is not kept] + [node for node in counted if node not in guards]:
            total = self._kept[state.node_index[node]]
            total[:] = 0
            for guard, _ in guards.get(node, ()):
                total += bookings.need(state, guard)
        self._counted = dict(guards)
        return self._kept

    def _guard(self, table: Timetable, now_ms: int) -> None:
        """Keep on each node the most that reservations ever need beyond what ends until then."""
        wanted: dict[str, tuple[Guard, ...]] = {}
        nodes = sorted({node for hold in table.reserved.values() for node in hold.nodes})
        if nodes:
            rows = np.array(nodes, np.int64)
            lacks = table.profile.first(rows) - table.profile.least(now_ms, FAR - now_ms, rows)
            for node, lack in zip(nodes, lacks.tolist(), strict=True):
                kept = self._shapes(node, lack)
                if kept:
                    wanted[self.state.nodes[node].name] = kept
        for name in [name for name, kept in self.tables.guards.items() if wanted.get(name) != kept]:
            self._lift(name)
        for name, kept in wanted.items():
            if name not in self.tables.guards:
                for number, guard in enumerate(kept):
                    self._put_guard(name, number, guard, now_ms)
                self.ledger.put(self.tables.guards, name, kept)

    def _put_guard(self, node: str, number: int, guard: Guard, now_ms: int) -> None:
        shape, gpus = guard
        self.state.adopt(Workload(guard_id(node, number), shape, preemptible=False), Seat(self.state.node_index[node], gpus), now_ms)

    def _shapes(self, node: int, lack: Sequence[int]) -> tuple[Guard, ...]:
        """What stands for so much ([resources, milli-GPU]) on a node; GPUs by the devices that have most to give."""
        if self._shaped_of is not self.state.resource_rows or len(self._shaped) >= MAX_SHAPES:
            self._shaped, self._shaped_of = {}, self.state.resource_rows
        key, milli = tuple(lack), lack[-1]
        known = self._shaped.get(key) if milli <= 0 else None
        if known is not None:
            return known
        requests = {name: amount for name, amount in zip(self.state.resource_rows, lack, strict=False) if amount > 0}
        found: list[Guard] = []
        if requests:
            found.append((Shape(Kind.BATCH, GUARD, (), tuple(sorted({SLOTS: 0, **requests}.items()))), ()))
        if milli <= 0:
            return self._shaped.setdefault(key, tuple(found))
        own = {device: shape.gpu.milli for shape, gpus in self.tables.guards.get(self.state.nodes[node].name, ()) if shape.gpu is not None for device in gpus}
        free = {device: int(value) + own.get(device, 0) for device, value in enumerate(self.state.gpu_free[node]) if value >= 0}
        for device in sorted(free, key=lambda device: (-free[device], device)):
            part = min(milli, free[device], GPU_WHOLE)
            if part <= 0:
                break
            milli -= part
            found.append((Shape(Kind.BATCH, GUARD, (), ((SLOTS, 0),), GpuRequest(1, part)), (device,)))
        return tuple(found)

    def _lift(self, node: str) -> None:
        for number in range(len(self.tables.guards.get(node, ()))):
            self.state.release(guard_id(node, number))
        if node in self.tables.guards:
            self.ledger.put(self.tables.guards, node, None)


def guard_id(node: str, number: int) -> str:
    """What the state calls the guard of that number on a node."""
    return f"{GUARD}{node} {number}{LEAVING}"
