"""Placing: one workload, a gang, with room made by moving others where priority or a quota gives the right to it. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edge_runtime.contract.limits import MAX_INTEGER
from edge_runtime.contract.workloads import KINDS

from ..scheduler import Decision, Invalid, Placed, Shape, Workload, improve, preempt, quota, refuse_cycles
from ..scheduler import gang as gangs
from ..scheduler.arrays import UP
from ..scheduler.model import GpuRequest
from ..scheduler.reasons import Bools, Ints
from ..scheduler.together import place_together
from ..store.workloads import FINAL_STATES, PlacementRow, WorkloadRow
from .book import PREEMPTED, Book, short
from .documents import Conflict, Submitted, difference

TOGETHER_MOST = 25_000
"""Workloads times nodes up to which a list may be placed together: 0.2 s, which all others wait; larger ones go one by one."""

TOGETHER_EFFORT = 3_000
"""Of branch and bound: 20 workloads on 4 nodes are solved and proven in 20 ms, of what is larger one part is improved."""

TOGETHER_STEPS = 10_000
TOGETHER_STEP_NODES = 70
"""Steps of destroy and repair: the first by nodes and the second, as a step's time is that of so many nodes and each node: 50 ms in all."""

MAX_LIVE = 100_000
"""Workloads that wait or are placed: their rows and arrays take about 4 kB each."""


AVOID_FIRST_MS = 30_000
AVOID_CAP_MS = 3_600_000
"""A node that refused a workload is not asked again for so long, doubled with each refusal up to the cap."""

MAX_AVOIDED = 16
"""Nodes that one workload avoids at once, the newest."""


@dataclass(frozen=True, slots=True)
class Together:
    """How well a list was placed: how many of it, how many there could be at most, in which way, after how many steps of destroy and repair, and whether it is proven that without others
    giving way no placement of it is better."""

    placed: int
    bound: int
    how: str
    steps: int
    proven: bool = False


class Placing(Book):
    """Every method may raise `Invalid` or `Conflict` having changed part: call within `begin` and `undo` or `keep`."""

    def submit(self, entries: Sequence[Submitted], now_ms: int) -> list[str]:
        """Take workloads in and place what can be placed; returns the ids. What is there already is left as it stands. Raises `Invalid` or `Conflict`."""
        return self.submit_all(entries, now_ms)[0]

    def submit_all(self, entries: Sequence[Submitted], now_ms: int) -> tuple[list[str], Together | None]:
        """As `submit`; and how well a list was placed."""
        fresh: list[Submitted] = []
        for entry in entries:
            self.scheduler.ranker.check(entry.item.shape.weights)
            known = self.tables.rows.get(entry.item.id)
            if known is None:
                fresh.append(entry)
                continue
            other = difference(known.document, entry.document)
            if other:
                raise Conflict(f"workload.{other}", f"{entry.item.id!r} is known with another {other}", "cancel it and use another id, or send the document that stands")
        if len(self.tables.rows) + len(fresh) > MAX_LIVE:
            raise Conflict("workload", f"{MAX_LIVE} are known already", "cancel some, or run another hub")
        if len(fresh) > 1:
            refuse_cycles([entry.item for entry in fresh], self._live_shapes(), self.state.namespaces)
        for entry in fresh:
            self.ledger.put(self.tables.items, entry.item.id, entry)
            self.set(WorkloadRow(entry.item.id, entry.document, created_ms=now_ms, changed_ms=now_ms, reason="not looked at yet"))
        found = self._first_try([entry.item.id for entry in fresh], now_ms)
        return [entry.item.id for entry in entries], found

    def _first_try(self, fresh: Sequence[str], now_ms: int) -> Together | None:
        """Place what came in one request; how well, where there was more than one to place."""
        singles = [name for name in fresh if not self.tables.items[name].item.gang]
        gangs = [name for name in fresh if self.tables.items[name].item.gang]
        if len(singles) < 2:
            self._one_by_one(fresh, now_ms)
            return None
        found = self.place_list(singles, now_ms)
        if gangs:
            self._one_by_one([*gangs, *(name for name in singles if self.tables.items[name].item.shape.affinity)], now_ms)
        return found

    def _one_by_one(self, names: Sequence[str], now_ms: int) -> None:
        # What other workloads of the request wait for by affinity may come after them in the list.
        left = list(names)
        while left:
            waits = [workload for workload in left if not self.attempt(workload, now_ms)]
            if len(waits) == len(left) or not any(self.tables.items[workload].item.shape.affinity for workload in waits):
                break
            left = [workload for workload in waits if self.tables.rows[workload].state == "pending"]

    def place_list(self, names: Sequence[str], now_ms: int) -> Together:
        """Place waiting workloads that are no gang: one by one, as the policies say; where some find a place and some none, all together, if that gives more of them a place."""
        bound = self._bound(names)
        self.begin()
        self._one_by_one(names, now_ms)
        alone = self._placed(names)
        count = sum(alone)
        if count in (0, len(names)) or count >= bound or len(names) * self.state.size > TOGETHER_MOST:
            self.keep()
            return Together(count, bound, "one by one", 0)
        self.undo()
        steps = min(improve.STEPS_PER_WORKLOAD * len(names), TOGETHER_STEPS // (TOGETHER_STEP_NODES + self.state.size))
        self.begin()
        free = [name for name in names if not self._avoided(self.tables.rows[name], now_ms) and self.next_epoch(self.tables.rows[name]) <= MAX_INTEGER]
        found = place_together(self.scheduler, [self.tables.items[name].item for name in free], now_ms, steps=steps, effort=TOGETHER_EFFORT)
        for placed in found.placed.values():
            self._book(self.tables.rows[placed.workload], placed, now_ms)
        self._one_by_one([name for name in names if name not in found.placed], now_ms)
        together = self._placed(names)
        if together > alone:
            self.keep()
            return Together(sum(together), bound, "together", found.steps, found.proven and len(free) == len(names))
        self.undo()
        self._one_by_one(names, now_ms)
        return Together(count, bound, "one by one", found.steps)

    def _placed(self, names: Iterable[str]) -> tuple[int, ...]:
        """How many of them have a place, by priority from the highest down."""
        counts: dict[int, int] = {}
        for name in names:
            priority = self.tables.items[name].item.priority
            counts[priority] = counts.get(priority, 0) + (self.tables.rows[name].state == "placed")
        return tuple(count for _, count in sorted(counts.items(), reverse=True))

    def _bound(self, names: Sequence[str]) -> int:
        """As many of them as could have a place at most: those that some node could hold, and by each resource, all nodes' room together with all that others might have to give up."""
        state = self.state
        usable = (state.status == UP) & ~state.cordon
        top = max(self.tables.items[name].item.priority for name in names)
        lends = any((limits := state.quotas.get(self.tables.items[name].item.tenant)) is not None and limits.cohort for name in names)
        room = np.maximum(np.append(np.maximum(state.gpu_free, 0).sum(1)[None, :], state.free, axis=0), 0)  # milli-GPU first, as in the levels
        for priority, held in state.levels.items():
            if priority < top or lends:
                room = room + held
        total = np.where(usable, room, 0).sum(1)
        asked: dict[int, Ints | None] = {}
        needs = []
        for name in names:
            item = self.tables.items[name].item
            try:
                klass = state.klass(item.shape)
            except Invalid:
                continue
            if klass.id not in asked:
                some = ((state.facts(klass).fails == 0) & usable & (state.cap[klass.resources] >= klass.amounts).all(0)).any()
                gpu = item.shape.gpu
                asked[klass.id] = np.append(gpu.count * gpu.milli if gpu is not None else 0, klass.request) if some else None
            need = asked[klass.id]
            if need is not None:
                needs.append(need)
        if not needs:
            return 0
        fitting = np.cumsum(np.sort(np.array(needs), axis=0), axis=0) <= total
        return int(fitting.sum(axis=0).min())

    def _live_shapes(self) -> list[Shape]:
        return [klass.shape for klass in self.state.classes if klass is not None and self.state.class_live[klass.id]]

    def attempt(self, workload: str, now_ms: int) -> bool:
        """Place a waiting workload, or its whole gang, or keep the reason why not."""
        item = self.tables.items[workload].item
        if self.tables.rows[workload].state != "pending":
            return True
        if item.gang:
            return self._attempt_gang(item, now_ms)
        reason = self._place(workload, now_ms)
        if reason:
            self._waits(workload, reason, now_ms)
        return not reason

    def _attempt_gang(self, one: Workload, now_ms: int) -> bool:
        """All members or none; those of a gang that stands already (one was lost) come back one by one."""
        members = [row for row in self.tables.rows.values() if (known := self.tables.items.get(row.id)) is not None and known.item.gang == one.gang and row.state not in FINAL_STATES]
        if any(row.state == "placed" for row in members):
            reason = self._place(one.id, now_ms)
            if reason:
                self._waits(one.id, reason, now_ms)
            return not reason
        waiting = [row for row in members if row.state == "pending"]
        if len(waiting) < one.gang_size:
            self._waits(one.id, f"gang {one.gang}: waits for {one.gang_size - len(waiting)} more of {one.gang_size} members", now_ms)
            return False
        reason = self._place_gang([self.tables.items[row.id].item for row in waiting], waiting, now_ms)
        for row in waiting if reason else ():
            self._waits(row.id, f"gang {one.gang}: {reason}", now_ms)
        return not reason

    def _place_gang(self, items: Sequence[Workload], rows: Sequence[WorkloadRow], now_ms: int) -> str:
        for tenant in {item.tenant for item in items}:
            refusal = quota.refusal(self.state, together([item for item in items if item.tenant == tenant]))
            if refusal:
                return refusal
        # The search knows no nodes to avoid but those that take nothing new.
        avoided = {self.state.nodes[node].name for row in rows for node in self._avoided(row, now_ms)}
        self.begin()
        held_back = [node for node in avoided if not self.state.cordon[self.state.node_index[node]]]
        for node in held_back:
            self.state.set_cordon(node, True)
        try:
            found = gangs.reserve(self.scheduler, items, now_ms)
        except Invalid as error:
            self.undo()
            return f"{error.field} {error.problem}; {error.remedy}"
        if isinstance(found, gangs.Refused):
            self.undo()
            return found.reason
        for node in held_back:
            self.state.set_cordon(node, False)
        for placed in found.placed:
            self._book(self.tables.rows[placed.workload], placed, now_ms)
        self.keep()
        return ""

    def _avoided(self, row: WorkloadRow, now_ms: int) -> list[int]:
        return [self.state.node_index[node] for node, (until, *_) in row.avoid.items() if until > now_ms and node in self.state.node_index]

    def among(self, row: WorkloadRow, now_ms: int, among: Bools | None) -> Bools | None:
        """Of these nodes (None: all) those that a workload does not avoid."""
        avoided = self._avoided(row, now_ms)
        if not avoided:
            return among
        allowed = np.ones(self.state.size, np.bool_) if among is None else among.copy()
        allowed[avoided] = False
        return allowed

    def _place(self, workload: str, now_ms: int, among: Bools | None = None, *, moving: bool = False) -> str:
        """Decide and book; the reason where it did not come about.

        Args:
            moving: it holds its place already: quotas have nothing to say, and nobody goes for it.
        """
        row, item = self.tables.rows[workload], self.tables.items[workload].item
        if self.next_epoch(row) > MAX_INTEGER:
            return "its epochs are used up; submit it under another id"
        try:
            refusal = None if moving else quota.refusal(self.state, item)
            if refusal is None:
                decision = self.scheduler.decide(item, now_ms, self.among(row, now_ms, among))
                placed = self.scheduler.commit(decision, now_ms)
                if placed is not None:
                    self._book(row, placed, now_ms)
                    return ""
                if moving:
                    return "no other node will do"
            why_not = refusal if refusal is not None else self.why_not(decision, row, now_ms)
            return self._make_room(row, item, refusal is not None, why_not, now_ms)
        except Invalid as error:
            return f"{error.field} {error.problem}; {error.remedy}"

    def _book(self, row: WorkloadRow, placed: Placed, now_ms: int) -> None:
        seat = placed.seat
        held = {"gpus": [int(gpu) for gpu in seat.gpus], "numa": [[int(part) for part in share] for share in seat.numa]}
        self.given(row, PlacementRow(row.id, self.next_epoch(row), placed.node, held, now_ms), now_ms)
        if self.tables.items[row.id].item.shape.labels:
            self.version += 1  # somebody may wait to be with it

    def _make_room(self, row: WorkloadRow, item: Workload, over_quota: bool, why_not: str, now_ms: int) -> str:
        """Others go for it, with the least harm: of lower priority, or that borrowed what is its tenant's own. The reason where that does not help, or not yet."""
        leaving = [key for key in self.tables.room.get(item.id, ()) if key in self.tables.open]
        if leaving:
            return f"waits for {len(leaving)} workloads to leave {self.tables.open[leaving[0]].node}"
        among = self.among(row, now_ms, None)
        plan = None if over_quota else preempt.plan(self.scheduler, item, now_ms, among=among)
        limits = self.state.quotas.get(item.tenant)
        if plan is None and limits is not None and limits.cohort and quota.within_nominal(self.state, item):
            plan = preempt.plan(self.scheduler, item, now_ms, only=quota.borrowers(self.state, limits.cohort, limits.tenant), among=among)
        if plan is None or any(name not in self.tables.rows for name in plan.victims):
            return why_not
        if self._spoken_for(item.id, self.state.nodes[plan.node].name, plan.victims):
            return why_not
        node, why, targets = self.state.nodes[plan.node].name, PREEMPTED + item.id, dict(plan.moves)
        self.begin()
        keys = tuple((name, self.tables.rows[name].epoch) for name in plan.victims)
        for name in plan.victims:
            if name not in targets or not self.move(name, now_ms, why, self.state.nodes[targets[name].node].name):
                self.push_out(name, now_ms, why)
        self.version += 1
        if self.is_agent(node):
            self.ledger.put(self.tables.room, item.id, keys)
            self.keep()
            return f"waits for {len(keys)} workloads to leave {node}"
        only = np.zeros(self.state.size, np.bool_)
        only[plan.node] = True
        placed = self.scheduler.commit(self.scheduler.decide(item, now_ms, only), now_ms)
        if placed is None:
            self.undo()
            return why_not
        self._book(row, placed, now_ms)
        self.keep()
        return ""

    def _spoken_for(self, workload: str, node: str, victims: Iterable[str]) -> bool:
        """Whether the room that some would make by leaving a node is reserved for others than the workload."""
        return False

    def why_not(self, decision: Decision, row: WorkloadRow, now_ms: int) -> str:
        """Why a decision found no place."""
        try:
            self.scheduler.check(decision.workload)
        except Invalid as error:
            return f"{error.field} {error.problem}; {error.remedy}"
        kind = decision.workload.shape.kind.value
        reason = self.scheduler.pending(decision).reason
        if self.tables.nodes and not any(kind in self.runs(node) for node in self.tables.nodes):
            reason += f"; no node has a driver for {kind}"
        for node, (until, _, why) in row.avoid.items():
            if until > now_ms:
                reason += f"; {node} is left alone for {(until - now_ms + 999) // 1000 // 60} min: {why}"
        return reason

    def runs(self, node: str) -> list[str]:
        """The kinds of workload for which a node has a driver."""
        row = self.tables.nodes.get(node)
        found: list[str] = row.document.get("runs", list(KINDS)) if row is not None else []
        return found

    def _waits(self, workload: str, reason: str, now_ms: int) -> None:
        row = self.tables.rows[workload]
        if row.reason != short(reason) or row.state != "pending":
            self.set(replace(row, state="pending", node="", reason=short(reason), changed_ms=now_ms))

    # -- moving --------------------------------------------------------------------------------------------------------------

    def move(self, workload: str, now_ms: int, why: str, to: str = "") -> bool:
        """To `to`, or to the best other place; nothing changes where there is none."""
        row, placement = self.tables.rows[workload], self.current(workload)
        if placement is None or row.state != "placed":
            return False
        self.begin()
        among = np.ones(self.state.size, np.bool_) if not to else np.zeros(self.state.size, np.bool_)
        if to:
            among[self.state.node_index[to]] = True
        among[self.state.node_index[placement.node]] = False
        self.leave(placement, now_ms, why)
        self.set(replace(row, state="pending", node="", changed_ms=now_ms))
        if self._place(workload, now_ms, among, moving=True):
            self.undo()
            return False
        self.keep()
        return True

    def push_out(self, workload: str, now_ms: int, why: str) -> None:
        """It gives up its place and waits."""
        row, placement = self.tables.rows[workload], self.current(workload)
        if placement is not None and row.state == "placed":
            self.leave(placement, now_ms, why)
            self.set(replace(row, state="pending", node="", reason=short(why), changed_ms=now_ms))

    def refused(self, row: WorkloadRow, node: str, reason: str, now_ms: int) -> None:
        """It waits again, and leaves the node alone for a while."""
        count = row.avoid.get(node, [0, 0, ""])[1] + 1
        until = now_ms + min(AVOID_CAP_MS, AVOID_FIRST_MS << min(count - 1, 20))
        avoid = {**{name: entry for name, entry in row.avoid.items() if name != node}, node: [until, count, short(reason)]}
        self.set(replace(row, reason=short(reason), changed_ms=now_ms, avoid=dict(list(avoid.items())[-MAX_AVOIDED:])))

    def evict(self, workload: str, now_ms: int, why: str) -> None:
        """It must leave whether or not there is another place."""
        self.push_out(workload, now_ms, why)
        self.attempt(workload, now_ms)


def together(items: Iterable[Workload]) -> Workload:
    """One workload that asks for what all of them ask, for quotas."""
    total: dict[str, int] = {}
    gpu, first = 0, None
    for item in items:
        first = first or item
        for name, amount in item.shape.requests:
            total[name] = total.get(name, 0) + amount
        gpu += item.shape.gpu.count * item.shape.gpu.milli if item.shape.gpu is not None else 0
    assert first is not None
    return replace(first, shape=replace(first.shape, requests=tuple(sorted(total.items())), gpu=GpuRequest(1, gpu) if gpu else None))
