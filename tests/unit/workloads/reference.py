"""The agenda as it was before only what changed was made anew: the timetable is booked from nothing whenever anything was placed, every plan is written at every turn.

Kept word for word as the reference that the agenda is held against; it shares the placing below it, and what of the timetable was not changed.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hub.scheduler import Invalid, Placed, Scheduler, Seat, Shape, State, Workload, bookings, preempt, quota
from hub.scheduler.arrays import GONE, SILENT
from hub.scheduler.batch import MARGIN_PERMILLE, Admission, Hold, Job, Late, duration
from hub.scheduler.deadline import Timetable
from hub.scheduler.model import GpuRequest, Kind
from hub.scheduler.profile import FAR
from hub.scheduler.reasons import WORDS, Bools, Fail
from hub.scheduler.units import GPU_WHOLE, SLOTS
from hub.store.workloads import NodeRow, PlacementRow, WorkloadRow
from hub.workloads.agenda import PUSHES, WAITS, _missed
from hub.workloads.book import Guard, short
from hub.workloads.documents import ACCEPT, REFUSE, Missed, Submitted
from hub.workloads.guards import GUARD
from hub.workloads.guards import guard_id as _guard_id
from hub.workloads.placing import Placing, Together, together
from hub.workloads.planner import Planner
from hub.workloads.timetables import BACKFILL_DEPTH, MAX_RESERVED, MAX_TRIED, PATIENCE_MS, REORDER_MOST, when
from hub.workloads.timetables import promise as _promise

from .reference_timetable import OldTimetable


class Reference(Planner):
    """A planner with the agenda as it was."""

    def __init__(self, seed: int = 0, scheduler: Callable[[State], Scheduler] = Scheduler) -> None:
        Planner.__init__(self, seed, scheduler)
        self._table: Timetable | None = None
        """The timetable, while it is true at `_where`."""
        self._where: tuple[Any, ...] = ()
        self._now = 0
        """When the timetable was last looked at."""
        self._edits = 0
        """Grows when the timetable changes."""
        self._begun: list[int] = []
        """For each plan under way, `_edits` at its begin where the timetable was true then, else -1."""
        self._more = False
        """The last turn looked at as many jobs as it may, and started some: the next round goes on."""
        self._left = False
        """Some jobs are not in the timetable yet."""
        self._members: dict[str, tuple[str, ...]] = {}
        """Job of the timetable to its workloads."""
        self._never: dict[str, str] = {}
        """Jobs that are not in the timetable, and why; those that it could not place are among the members all the same."""

    # -- as for all workloads ------------------------------------------------------------------------------------------------

    def load(self, nodes: Iterable[NodeRow], rows: Iterable[WorkloadRow], placements: Iterable[PlacementRow], budgets: Mapping[str, dict[str, Any]],
             quotas: Mapping[str, dict[str, Any]], read: Callable[[Any], Submitted], now_ms: int, rebalances: Mapping[str, dict[str, Any]] | None = None,
             heard: Mapping[str, int] | None = None, moves: Mapping[str, dict[str, Any]] | None = None) -> list[str]:
        """As `Book.load`; what is reserved is guarded before anything is asked."""
        problems = Placing.load(self, nodes, rows, placements, budgets, quotas, read, now_ms, rebalances, heard, moves)
        if any("start_ms" in self.tables.rows[name].plan for name in self.tables.timed):
            table, _ = self._synced(now_ms)
            self._guard(table, now_ms)
        self._table = None
        return problems

    def begin(self) -> None:
        """Start a plan, or a part of one."""
        Placing.begin(self)
        self._begun.append(self._edits if self._table is not None and self._position(self._now) == self._where else -1)

    def undo(self) -> None:
        """Take back everything since the last `begin`."""
        Placing.undo(self)
        if self._begun.pop() == self._edits:
            self._where = self._position(self._now)  # the books are as they were, and so is the timetable
        else:
            self._table = None

    def keep(self) -> None:
        """Let everything since the last `begin` stand."""
        Placing.keep(self)
        self._begun.pop()

    def attempt(self, workload: str, now_ms: int) -> bool:
        """Place a waiting workload; one whose start is planned waits for its turn."""
        return self.tables.rows[workload].state != "pending" if workload in self.tables.timed else Placing.attempt(self, workload, now_ms)

    def close(self, placement: PlacementRow, now_ms: int, why: str) -> None:
        """The placement holds nothing any more. What a job gives back early is kept for those that were to come after it, until the next turn."""
        item = self.tables.items[placement.workload].item
        Placing.close(self, placement, now_ms, why)
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

    def _first_try(self, fresh: Sequence[str], now_ms: int) -> Together | None:
        timed = [name for name in fresh if self.is_timed(name)]
        found = Placing._first_try(self, [name for name in fresh if name not in self.tables.timed], now_ms)
        if timed:
            self._admit(timed, now_ms)
        return found

    def _book(self, row: WorkloadRow, placed: Placed, now_ms: int) -> None:
        Placing._book(self, row, placed, now_ms)
        item = self.tables.items[row.id].item
        if item.duration_ms is not None and self.is_timed(row.id):
            planned = -(-item.duration_ms * (1000 + MARGIN_PERMILLE) // 1000)
            plan = {**_promise(row.plan), "start_ms": now_ms, "end_ms": now_ms + planned, "nodes": [placed.node]}
            self.set(replace(self.tables.rows[row.id], plan=plan))

    # -- admission, rounds ---------------------------------------------------------------------------------------------------

    def _admit(self, fresh: Collection[str], now_ms: int) -> None:
        """Plan jobs that came just now. Raises `Missed` for one that will miss its deadline and is not to be taken then."""
        table, late = self._synced(now_ms, besides=fresh)
        self._now = now_ms
        for key, names in self._groups():
            if not any(name in fresh for name in names):
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

    def _hold_off(self, names: Iterable[str], reason: str, now_ms: int) -> None:
        """They are not planned now, for that reason."""
        for name in names:
            row = self.tables.rows[name]
            if "start_ms" in row.plan:
                self.set(replace(row, plan=_promise(row.plan)))
            self._waits(name, reason, now_ms)

    # -- the timetable -------------------------------------------------------------------------------------------------------

    def _position(self, now_ms: int) -> tuple[Any, ...]:
        """Where the books are: a timetable that was made at another place is made anew."""
        state = self.state
        return state.changes - self.beats, state.status.tobytes(), state.cordon.tobytes(), self._gone(now_ms).tobytes(), self.version, self.timed_version

    def _gone(self, now_ms: int) -> Bools:
        """[node] those with which nothing is planned: taken out, or silent for long."""
        state = self.state
        gone: Bools = (state.status == GONE) | ((state.status == SILENT) & (now_ms - state.beat_ms > PATIENCE_MS))
        return gone

    def _groups(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Jobs that wait: their name in the timetable, and their workloads. A gang is one job, unless part of it runs (one was lost)."""
        rows, items = self.tables.rows, self.tables.items
        running = {items[name].item.gang for name in self.tables.timed if rows[name].state == "placed"}
        found: dict[str, list[str]] = {}
        for name in self.tables.timed:
            if rows[name].state == "pending":
                gang = items[name].item.gang
                found.setdefault(f"gang {gang}" if gang and gang not in running else name, []).append(name)  # no id has a space
        for key, names in found.items():
            yield key, tuple(names)

    def _job(self, key: str, names: Sequence[str], now_ms: int, table: Timetable | None = None) -> Job | str:
        """As the timetable takes it, or why it cannot be planned now. `table`: what is reserved there counts for the quota too."""
        item = self.tables.items[names[0]].item
        if key != names[0] and len(names) < item.gang_size:
            return f"gang {item.gang}: waits for {item.gang_size - len(names)} more of {item.gang_size} members"
        try:
            made = bookings.job(self.state, item)
        except Invalid as error:
            return f"{error.field} {error.problem}; {error.remedy}"
        asked = [self.tables.items[name].item for name in names]
        if item.tenant in self.state.quotas:
            held = [self.tables.items[name].item for other in (table.reserved if table is not None else ()) for name in self._members.get(other, ())]
            refusal = quota.refusal(self.state, together([*asked, *(other for other in held if other.tenant == item.tenant)]))
            if refusal is not None:
                return refusal
        allowed = made.allowed
        assert allowed is not None
        allowed[[node for name in names for node in self._avoided(self.tables.rows[name], now_ms)]] = False
        return replace(made, id=key, members=len(names), deadline_ms=self._deadline(names[0]), allowed=allowed)

    def _synced(self, now_ms: int, besides: Collection[str] = ()) -> tuple[Timetable, list[Late]]:
        """The timetable as the books are now, without the jobs of `besides`; and the promises that are broken by what has changed."""
        if self._table is not None and self._position(now_ms) == self._where:
            self._now = now_ms
            return self._table, []
        rows, state, gone = self.tables.rows, self.state, self._gone(now_ms)
        ends = {name: int(rows[name].plan["end_ms"]) for name in self.tables.timed if rows[name].state == "placed" and "end_ms" in rows[name].plan}
        guards = [_guard_id(node, number) for node, kept in self.tables.guards.items() for number in range(len(kept))]
        table = bookings.timetable(state, now_ms, ends=ends, guards=guards, gone=gone, when=lambda ms: when(ms, self._now), reorder_most=REORDER_MOST, backfill_depth=BACKFILL_DEPTH)
        table.__class__ = OldTimetable
        self._now, self._members, self._never = now_ms, {}, {}
        self._edits += 1
        holds, loose = list[Hold](), list[Job]()
        dated, undated = list[tuple[str, tuple[str, ...]]](), list[tuple[str, tuple[str, ...]]]()
        for key, names in self._groups():
            if not any(name in besides for name in names):
                (undated if self._deadline(names[0]) is None and "start_ms" not in rows[names[0]].plan else dated).append((key, names))
        for key, names in dated[:MAX_RESERVED]:
            job = self._job(key, names, now_ms)
            if isinstance(job, str):
                self._never[key] = job
                self._hold_off(names, job, now_ms)
                continue
            self._members[key] = names
            plan = rows[names[0]].plan
            nodes = [state.node_index[node] for node in plan.get("nodes", ()) if node in state.node_index]
            usable = (state.facts(state.klass(self.tables.items[names[0]].item.shape)).fails == 0) & ~state.cordon & ~gone
            usable[[node for name in names for node in self._avoided(rows[name], now_ms)]] = False
            if len(nodes) == job.members and usable[nodes].all():
                holds.append(Hold(job, tuple(nodes), plan["start_ms"], plan["end_ms"], np.array(job.need, np.int64)))
            elif job.deadline_ms is not None:
                loose.append(job)
            else:
                undated.append((key, names))
        for _, names in dated[MAX_RESERVED:]:
            self._hold_off(names, f"{MAX_RESERVED} jobs have room reserved already", now_ms)
        late = table.restore(holds, loose, now_ms)  # type: ignore[attr-defined]
        undated.sort(key=lambda each: -self.tables.items[each[1][0]].item.priority)
        self._left = len(dated) > MAX_RESERVED
        for number, (key, names) in enumerate(undated):
            if number >= MAX_TRIED or len(table.waiting) >= BACKFILL_DEPTH:
                self._left = True
                break
            self._submit_undated(table, key, names, now_ms)
        return table, late

    def _deadline(self, workload: str) -> int | None:
        """What is promised to a job, or what it asks for."""
        promise: int | None = self.tables.rows[workload].plan.get("promise_ms", self.tables.items[workload].item.deadline_ms)
        return promise

    def _submit_undated(self, table: Timetable, key: str, names: tuple[str, ...], now_ms: int) -> None:
        job = self._job(key, names, now_ms)
        why = job if isinstance(job, str) else ""
        if not isinstance(job, str):
            self._members[key] = names
            verdict = table.submit(job, now_ms)
            self._edits += verdict.admitted
            why = "" if verdict.admitted else verdict.text
        if why:
            self._never[key] = why
            self._hold_off(names, why, now_ms)

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
                    state.release(_guard_id(node, number))
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
        for key, hold in table.reserved.items():
            self._plan(key, hold, because.get(key, ""), now_ms)
        for key, hold in table.running.items():
            self._plan(key, hold, because.get(key, ""), now_ms)
        for key in table.waiting:
            self._hold_off(self._members.get(key, ()), because.get(key, WAITS), now_ms)

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
                plan = {**_promise(row.plan), "start_ms": hold.start_ms, "end_ms": hold.end_ms, "nodes": names}
                reason = f"is to start at {when(hold.start_ms, now_ms)} on {', '.join(dict.fromkeys(names))}" + (f"; {end}" if end else "")
            plan = {name: value for name, value in plan.items() if name != "because"} | ({"because": why} if why else {})
            if row.plan != plan or row.reason != short(reason):
                self.set(replace(row, plan=plan, reason=short(reason), changed_ms=now_ms if row.plan != plan else row.changed_ms))

    # -- guards --------------------------------------------------------------------------------------------------------------

    def _guard(self, table: Timetable, now_ms: int) -> None:
        """Keep on each node the most that reservations ever need beyond what ends until then."""
        wanted: dict[str, tuple[Guard, ...]] = {}
        nodes = sorted({node for hold in table.reserved.values() for node in hold.nodes})
        if nodes:
            least = table.profile.least(now_ms, FAR - now_ms, np.array(nodes, np.int64))
            for at, node in enumerate(nodes):
                kept = self._shapes(node, (table.profile.at(node, now_ms) - least[at]).tolist())
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
        self.state.adopt(Workload(_guard_id(node, number), shape, preemptible=False), Seat(self.state.node_index[node], gpus), now_ms)

    def _shapes(self, node: int, lack: list[int]) -> tuple[Guard, ...]:
        """What stands for so much ([resources, milli-GPU]) on a node; GPUs by the devices that have most to give."""
        requests = {name: amount for name, amount in zip(self.state.resource_rows, lack, strict=False) if amount > 0}
        found: list[Guard] = []
        if requests:
            found.append((Shape(Kind.BATCH, GUARD, (), tuple(sorted({SLOTS: 0, **requests}.items()))), ()))
        milli = lack[-1]
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
            self.state.release(_guard_id(node, number))
        if node in self.tables.guards:
            self.ledger.put(self.tables.guards, node, None)
