"""Batch jobs that say how long they run: promised at submit, planned ahead, started when their time has come. Pure.

The rows keep what is planned (`WorkloadRow.plan`); the timetable (`hub.scheduler.deadline`) is made of them and of the scheduler's state where that has changed since.

    submit ──> admit ──> turn: what starts now is placed ──> rows: what is planned, who is late ──> guards
    rounds ──> replan ──^

`Timed` keeps the timetable true, `Guarding` keeps free what is reserved; this is what is decided with them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import numpy as np

from ..scheduler import Invalid, Placed, Scheduler, State, preempt, quota
from ..scheduler.batch import MARGIN_PERMILLE, Admission, Hold, Job, Late, duration
from ..scheduler.deadline import Timetable
from ..scheduler.profile import FAR
from ..scheduler.reasons import WORDS, Fail
from ..store.workloads import NodeRow, PlacementRow, WorkloadRow
from .book import short
from .documents import ACCEPT, REFUSE, Missed, Submitted
from .guards import guard_id
from .placing import Together
from .timetables import BACKFILL_DEPTH, DAY_MS, MAX_RESERVED, Timed, promise, when

PUSHES = 8
"""Jobs of one turn for which others may have to go."""

WAITS = "waits for room: what is reserved for others stays theirs"


class Agenda(Timed):
    """Every method may raise `Invalid` or `Conflict` having changed part: call within `begin` and `undo` or `keep`."""

    def __init__(self, seed: int = 0, scheduler: Callable[[State], Scheduler] = Scheduler) -> None:
        super().__init__(seed, scheduler)
        self._more = False
        """The last turn looked at as many jobs as it may, and started some: the next round goes on."""
        self._unwritten = self.ledger.watch(self.tables.rows)
        """Rows that have changed since what is planned was last kept in them."""
        self._written_day = 0
        """Reasons write a time of another day with its date."""

    # -- as for all workloads ------------------------------------------------------------------------------------------------

    def load(self, nodes: Iterable[NodeRow], rows: Iterable[WorkloadRow], placements: Iterable[PlacementRow], budgets: Mapping[str, dict[str, Any]],
             quotas: Mapping[str, dict[str, Any]], read: Callable[[Any], Submitted], now_ms: int, rebalances: Mapping[str, dict[str, Any]] | None = None,
             heard: Mapping[str, int] | None = None, moves: Mapping[str, dict[str, Any]] | None = None) -> list[str]:
        """As `Book.load`; what is reserved is guarded before anything is asked."""
        problems = super().load(nodes, rows, placements, budgets, quotas, read, now_ms, rebalances, heard, moves)
        if any("start_ms" in self.tables.rows[name].plan for name in self.tables.timed):
            table, _ = self._synced(now_ms)
            self._guard(table, now_ms)
        self._table = None
        return problems

    def fork(self) -> Self:
        """As `Book.fork`."""
        other = super().fork()
        other._unwritten = other.ledger.watch(other.tables.rows)
        other._unwritten.keys.update(self._unwritten.keys)
        other._unwritten.lost = self._unwritten.lost
        return other

    def attempt(self, workload: str, now_ms: int) -> bool:
        """Place a waiting workload; one whose start is planned waits for its turn."""
        return self.tables.rows[workload].state != "pending" if workload in self.tables.timed else super().attempt(workload, now_ms)

    def _first_try(self, fresh: Sequence[str], now_ms: int) -> Together | None:
        timed = [name for name in fresh if self.is_timed(name)]
        found = super()._first_try([name for name in fresh if name not in self.tables.timed], now_ms)
        if timed:
            self._admit(timed, now_ms)
        return found

    def _book(self, row: WorkloadRow, placed: Placed, now_ms: int) -> None:
        super()._book(row, placed, now_ms)
        item = self.tables.items[row.id].item
        if item.duration_ms is not None and self.is_timed(row.id):
            planned = -(-item.duration_ms * (1000 + MARGIN_PERMILLE) // 1000)
            plan = {**promise(row.plan), "start_ms": now_ms, "end_ms": now_ms + planned, "nodes": [placed.node]}
            self.set(replace(self.tables.rows[row.id], plan=plan))

    # -- admission, rounds ---------------------------------------------------------------------------------------------------

    def _admit(self, fresh: Sequence[str], now_ms: int) -> None:
        """Plan jobs that came just now. Raises `Missed` for one that will miss its deadline and is not to be taken then."""
        table, late = self._synced(now_ms, besides=fresh)
        self._now = now_ms
        alone = not any(self.tables.items[name].item.gang for name in fresh)  # a gang may have members that came earlier
        mine = set(fresh)
        for key, names in self._groups(fresh if alone else [name for name in self.tables.timed if self.tables.rows[name].state == "pending"]):
            if mine.isdisjoint(names):
                continue
            entry = self.tables.items[names[0]]
            if key in table.reserved or key in table.waiting:
                raise Invalid("workload.gang", f"{entry.item.gang!r} has its {entry.item.gang_size} members already", "use another gang")
            self._alike(names)
            if entry.item.deadline_ms is not None:
                self._admit_dated(table, key, names, entry.when_late, now_ms)
            elif len(table.waiting) < BACKFILL_DEPTH:
                self._submit_undated(table, key, names, now_ms)
            else:
                self._left = True
                self._hold_off(names, WAITS, now_ms)
        self._turn(table, now_ms, late)
        self._push(now_ms)

    def _admit_dated(self, table: Timetable, key: str, names: tuple[str, ...], when_late: str, now_ms: int) -> None:
        """A promise, or none. Raises `Missed` where it is not to be taken without one."""
        job = f"{MAX_RESERVED} jobs have room reserved already" if len(table.reserved) >= MAX_RESERVED else self._job(key, names, now_ms, table)
        if isinstance(job, str):
            if when_late == REFUSE and len(names) >= self.tables.items[names[0]].item.gang_size:
                raise Missed(names[0], f"cannot be promised: {job}", f"with when_late: {ACCEPT} it is taken all the same")
            self._left = True
            self._hold_off(names, job, now_ms)
            return
        verdict = table.submit(job, now_ms)
        self._edits += verdict.admitted
        if not verdict.admitted:
            if when_late == REFUSE:
                raise _missed(names[0], verdict)
            verdict = self._take_late(table, job, names, verdict, now_ms)
        self._members[key] = names
        if not verdict.admitted:
            self._never[key] = verdict.text
            self._hold_off(names, verdict.text, now_ms)

    def replan(self, now_ms: int) -> None:
        """What a round does: start whose time has come, plan anew where something changed. Bounded by `BACKFILL_DEPTH`, and by what is reserved."""
        rows = self.tables.rows
        if not self.tables.guards and all(rows[name].state == "placed" and rows[name].plan.get("end_ms", FAR) > now_ms for name in self.tables.timed):
            return
        changed = self._more or self._table is None or self._position(now_ms) != self._where
        due = None if self._table is None else self._table.next_ms()
        if not changed and (due is None or due > now_ms):
            return
        table, late = self._synced(now_ms)
        if changed:
            table.move_up(now_ms)
        self._turn(table, now_ms, late)
        if changed:
            self._push(now_ms)

    def _alike(self, names: Sequence[str]) -> None:
        """Raises `Invalid` for a gang whose members the timetable could not take as one job."""
        first = self.tables.items[names[0]].item
        for name in names[1:]:
            other = self.tables.items[name].item
            if replace(other, id=first.id) != first:
                raise Invalid("workload.gang", f"{name!r} and {names[0]!r} differ in more than their id", "give batch jobs of one gang the same document")

    def _take_late(self, table: Timetable, job: Job, names: Sequence[str], verdict: Admission, now_ms: int) -> Admission:
        """Promise the earliest time there is instead."""
        if verdict.forecast is None:
            return verdict
        again = table.submit(replace(job, deadline_ms=verdict.forecast.by_ms), now_ms)
        self._edits += again.admitted
        if again.admitted:
            for name in names:
                row = self.tables.rows[name]
                self.set(replace(row, plan={"promise_ms": verdict.forecast.by_ms, "because": short(verdict.reason.text if verdict.reason else "")}))
        return again

    # -- turns ---------------------------------------------------------------------------------------------------------------

    def _turn(self, table: Timetable, now_ms: int, late: list[Late]) -> None:
        """Start what starts now, then keep what is planned."""
        self._edits += 1
        started, more = table.turn(now_ms)
        self._more = len(started) > 0 and len(table.waiting) > 0
        whole = True
        for hold in started:
            if not self._start(hold, now_ms):
                table.ended(hold.job.id, now_ms)
                whole = False
        self._write(table, {each.forecast.job: each.because for each in (*late, *more)}, now_ms)
        self._guard(table, now_ms)
        whole = whole and not (self._left and started)  # there is room in the timetable for those that are not in it yet
        self._table, self._where = (table, self._position(now_ms)) if whole else (None, ())

    def _start(self, hold: Hold, now_ms: int) -> bool:
        """Place a job where its room is; all members or none. What the timetable does not see may stand against it: then it leaves the node alone for a while."""
        names, refusal, node = self._members[hold.job.id], "", hold.nodes[0]
        self.begin()
        for at in set(hold.nodes):
            self._lift(self.state.nodes[at].name)
        for name, node in zip(names, hold.nodes, strict=True):
            item, row = self.tables.items[name].item, self.tables.rows[name]
            refusal = quota.refusal(self.state, item) or ""
            if refusal:
                break
            only = np.zeros(self.state.size, np.bool_)
            only[node] = True
            decision = self.scheduler.decide(item, now_ms, only)
            placed = self.scheduler.commit(decision, now_ms)
            if placed is None:
                failed = ", ".join(WORDS[flag] for flag in Fail if int(decision.bits[node]) & flag) or "its devices or zones do not come together"
                refusal = f"{self.state.nodes[node].name} was to take it: {failed}"
                break
            self._book(row, placed, now_ms)
            self.set(replace(self.tables.rows[name], plan={**self.tables.rows[name].plan, "end_ms": hold.end_ms}))
        if not refusal:
            self.keep()
            return True
        self.undo()
        for name in names:
            if refusal.startswith("tenant"):
                self._waits(name, refusal, now_ms)
            else:
                self.refused(self.tables.rows[name], self.state.nodes[node].name, refusal, now_ms)
        return False

    def _push(self, now_ms: int) -> None:
        """Others go for a job that waits, where priority gives the right to it, and nothing is reserved on that node."""
        table, state, tried = self._table, self.state, 0
        if table is None:
            return
        late = [(key, hold) for key, hold in table.reserved.items() if hold.job.deadline_ms is None or hold.end_ms > (self.tables.items[self._members[key][0]].item.deadline_ms or FAR)]
        for key, hold in [*((key, None) for key in [*table.waiting, *self._never] if key in self._members), *late]:
            names = self._members[key]
            row, item = self.tables.rows[names[0]], self.tables.items[names[0]].item
            if row.state != "pending" or len(names) > 1 or not item.preempts or min(state.levels, default=item.priority) >= item.priority or any(left in self.tables.open for left in self.tables.room.get(item.id, ())):
                continue
            tried += 1
            if tried > PUSHES:
                return
            own = {state.nodes[node].name for node in hold.nodes} if hold is not None else set()
            mark = state.begin()
            for node in own:
                for number in range(len(self.tables.guards.get(node, ()))):
                    state.release(guard_id(node, number))
            plan = preempt.plan(self.scheduler, item, now_ms, among=self.among(row, now_ms, None))
            state.undo(mark)
            if plan is None or self._reserved_on(state.nodes[plan.node].name, item.id):
                continue
            for node in own:
                self._lift(node)
            reason = self._make_room(row, item, False, WAITS, now_ms)
            if reason:
                self._waits(item.id, reason, now_ms)
            else:
                table.ended(key, now_ms)
            self._guard(table, now_ms)
            if reason != WAITS:
                self._table = None  # it is no longer true: the next round goes on
                return
        self._where = self._position(now_ms)

    # -- what is kept of it --------------------------------------------------------------------------------------------------

    def _write(self, table: Timetable, because: Mapping[str, str], now_ms: int) -> None:
        """Keep in the rows what is planned: of the holds that changed, and where a row did."""
        day, news = now_ms // DAY_MS, self._unwritten
        keys = {**because, **dict.fromkeys(table.touched)}
        if news.lost or day != self._written_day:
            keys = dict.fromkeys((*table.reserved, *table.running))
        for name in news.keys:
            keys[name] = keys[self._job_of(name)] = ""
        for key in keys:
            hold = table.reserved.get(key) or table.running.get(key)
            if hold is not None:
                self._plan(key, hold, because.get(key, ""), now_ms)
        for key in table.waiting:
            self._hold_off(self._members.get(key, ()), because.get(key, WAITS), now_ms)
        self._written_day = day
        table.touched.clear()
        news.clear()

    def _job_of(self, workload: str) -> str:
        """What the timetable calls the job of a workload, unless part of its gang runs."""
        known = self.tables.items.get(workload)
        return f"gang {known.item.gang}" if known is not None and known.item.gang else workload

    def _plan(self, key: str, hold: Hold, because: str, now_ms: int) -> None:
        for name in self._members.get(key, (key,)):
            row, item = self.tables.rows[name], self.tables.items[name].item
            names = [self.state.nodes[node].name for node in hold.nodes]
            late_ms = max(0, hold.end_ms - item.deadline_ms) if item.deadline_ms is not None else 0
            why = (short(because) or row.plan.get("because", "")) if late_ms else ""
            end = f"will miss its deadline by {duration(late_ms)}: {why}" if late_ms else ""
            if row.state == "placed":
                plan, reason = {**row.plan, "end_ms": hold.end_ms}, end
            else:
                plan = {**promise(row.plan), "start_ms": hold.start_ms, "end_ms": hold.end_ms, "nodes": names}
                reason = f"is to start at {when(hold.start_ms, now_ms)} on {', '.join(dict.fromkeys(names))}" + (f"; {end}" if end else "")
            plan = {name: value for name, value in plan.items() if name != "because"} | ({"because": why} if why else {})
            if row.plan != plan or row.reason != short(reason):
                self.set(replace(row, plan=plan, reason=short(reason), changed_ms=now_ms if row.plan != plan else row.changed_ms))

def _missed(name: str, verdict: Admission) -> Missed:
    """The refusal of a job that misses its deadline: by how much, for want of what, until when; and what would make it."""
    remedies = ", or ".join(f"it makes it {remedy.text}" for remedy in verdict.remedies[:1]) + "".join(f", or {remedy.text}" for remedy in verdict.remedies[1:])
    why = verdict.reason.text if verdict.reason is not None else ""
    text = f"will miss it by {duration(verdict.late_ms)}: {why}" if verdict.late_ms is not None else f"cannot be promised: {why}"
    return Missed(name, text, (f"{remedies}; " if remedies else "") + f"with when_late: {ACCEPT} it is taken all the same", verdict.forecast)
