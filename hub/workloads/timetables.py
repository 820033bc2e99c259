"""The timetable of the books: kept while it is true, and made anew from rows and state where they have changed. Pure.

The rows keep what is planned (`WorkloadRow.plan`). What was made of a row (a job, a hold) is kept with the row: rows are never changed in place, so the same row means the same job,
also after a plan was taken back. `Standing` then books only what is another object.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from operator import is_
from typing import Any, Self

import numpy as np

from ..scheduler import Invalid, Scheduler, Shape, State, bookings, quota
from ..scheduler.arrays import GONE, SILENT, UP
from ..scheduler.batch import Hold, Job, Late
from ..scheduler.deadline import Timetable
from ..scheduler.reasons import Bools
from ..scheduler.standing import Standing
from ..scheduler.units import human
from ..store.workloads import WorkloadRow
from .guards import Guarding
from .placing import together

REORDER_MOST = 32
"""Reservations up to which a submit tries other orders of all of them: under 100 ms at 1,000 nodes, which all others wait."""

BACKFILL_DEPTH = 64
"""Jobs without a deadline that one turn looks at, in their order: as many as a round tries of what has no duration."""

MAX_TRIED = 256
"""Jobs without a deadline that are looked at when the timetable is made anew, those included that no node can take: 100 ms at 1,000 nodes."""

MAX_RESERVED = 1_000
"""Jobs with room reserved at one time: each costs some microseconds whenever the timetable is made anew."""

PATIENCE_MS = 60_000
"""A node may be silent for so long before what is reserved there is planned anew: an edge that restarts is back long before."""

MAX_STALE = 64
"""Jobs that are remembered although they wait no more, besides as many as do."""

DAY_MS = 86_400_000

LAST_DATE_MS = 253_402_300_799_000
"""The last millisecond that a date can be written for, in the year 9999."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What was made of the rows of a job that waits; `hold` is where its rows say that room is reserved, None where that cannot be any more."""

    rows: tuple[WorkloadRow, ...]
    job: Job
    hold: Hold | None


class Timed(Guarding):
    """Every method may raise `Invalid` or `Conflict` having changed part: call within `begin` and `undo` or `keep`."""

    def __init__(self, seed: int = 0, scheduler: Callable[[State], Scheduler] = Scheduler) -> None:
        super().__init__(seed, scheduler)
        self._table: Timetable | None = None
        """The timetable, while it is true at `_where`."""
        self._where: tuple[Any, ...] = ()
        self._now = 0
        """When the timetable was last looked at."""
        self._edits = 0
        """Grows when the timetable changes."""
        self._begun: list[int] = []
        """For each plan under way, `_edits` at its begin where the timetable was true then, else -1."""
        self._left = False
        """Some jobs are not in the timetable yet."""
        self._members: dict[str, tuple[str, ...]] = {}
        """Job of the timetable to its workloads."""
        self._never: dict[str, str] = {}
        """Jobs that are not in the timetable, and why; those that it could not place are among the members all the same."""
        self._forget_jobs()

    def _forget_jobs(self) -> None:
        self._standing = Standing()
        self._names: list[str] = []
        self._nodes: tuple[Any, ...] = ()
        """What of nodes the following depends on."""
        self._news, self._order = self.ledger.watch(self.tables.rows), self.ledger.watch(self.tables.timed)
        self._anew = True
        """Nothing is known of jobs: all of them are looked at."""
        self._off = b""
        self._slots: dict[str, int] = {}
        """Job that waits or runs to its slot in the state, -1 where it waits."""
        self._waiting: dict[str, bool] = {}
        """Those that wait, in the order of the table."""
        self._jobs: dict[str, _Known] = {}
        self._allowed: dict[Shape, tuple[Bools, Bools]] = {}
        """[node] where a shape may start now, and where it may have room reserved."""

    # -- while it is true ----------------------------------------------------------------------------------------------------

    def fork(self) -> Self:
        """As `Book.fork`; with a timetable of its own, which is as true as this one's."""
        other = super().fork()
        other._begun, other._members, other._never = [], dict(self._members), dict(self._never)
        other._forget_jobs()
        if self._table is not None:
            other._table = self._table.copy(lambda ms: when(ms, other._now))
        return other

    def begin(self) -> None:
        """Start a plan, or a part of one."""
        super().begin()
        self._begun.append(self._edits if self._table is not None and self._position(self._now) == self._where else -1)

    def undo(self) -> None:
        """Take back everything since the last `begin`."""
        super().undo()
        if self._begun.pop() == self._edits:
            self._where = self._position(self._now)  # the books are as they were, and so is the timetable
        else:
            self._table = None

    def keep(self) -> None:
        """Let everything since the last `begin` stand."""
        super().keep()
        self._begun.pop()

    def _position(self, now_ms: int) -> tuple[Any, ...]:
        """Where the books are: a timetable that was made at another place is made anew."""
        state = self.state
        return state.changes - self.beats, state.status.tobytes(), state.cordon.tobytes(), self._gone(now_ms).tobytes(), self.version, self.timed_version

    def _gone(self, now_ms: int) -> Bools:
        """[node] those with which nothing is planned: taken out, or silent for long."""
        state = self.state
        gone: Bools = (state.status == GONE) | ((state.status == SILENT) & (now_ms - state.beat_ms > PATIENCE_MS))
        return gone

    # -- jobs ----------------------------------------------------------------------------------------------------------------

    def _groups(self, waiting: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Jobs that wait: their name in the timetable, and their workloads. A gang is one job, unless part of it runs (one was lost)."""
        rows, items = self.tables.rows, self.tables.items
        found: dict[str, list[str]] = {}
        running: set[str] | None = None
        for name in waiting:
            gang = items[name].item.gang
            if gang:
                if running is None:
                    running = {items[other].item.gang for other in self.tables.timed if rows[other].state == "placed"}
                if gang not in running:
                    found.setdefault(f"gang {gang}", []).append(name)  # no id has a space
                    continue
            found[name] = [name]
        for key, names in found.items():
            yield key, tuple(names)

    def _deadline(self, workload: str) -> int | None:
        """What is promised to a job, or what it asks for."""
        promise: int | None = self.tables.rows[workload].plan.get("promise_ms", self.tables.items[workload].item.deadline_ms)
        return promise

    def _may(self, shape: Shape, now_ms: int) -> tuple[Bools, Bools]:
        """[node] where a shape may start now, and where it may have room reserved. Raises `Invalid`."""
        known = self._allowed.get(shape)
        if known is None:
            state = self.state
            fitting = (state.facts(state.klass(shape)).fails == 0) & ~state.cordon
            known = self._allowed[shape] = fitting & (state.status == UP), fitting & ~self._gone(now_ms)
        return known

    def _job(self, key: str, names: Sequence[str], now_ms: int, table: Timetable | None = None) -> Job | str:
        """As the timetable takes it, or why it cannot be planned now. `table`: what is reserved there counts for the quota too."""
        self._look_at_nodes(now_ms)
        item = self.tables.items[names[0]].item
        if key != names[0] and len(names) < item.gang_size:
            return f"gang {item.gang}: waits for {item.gang_size - len(names)} more of {item.gang_size} members"
        try:
            made = bookings.job(self.state, item, allowed=self._may(item.shape, now_ms)[0])
        except Invalid as error:
            return f"{error.field} {error.problem}; {error.remedy}"
        if item.tenant in self.state.quotas:
            asked = [self.tables.items[name].item for name in names]
            held = [self.tables.items[name].item for other in (table.reserved if table is not None else ()) for name in self._members.get(other, ())]
            refusal = quota.refusal(self.state, together([*asked, *(other for other in held if other.tenant == item.tenant)]))
            if refusal is not None:
                return refusal
        return replace(made, id=key, members=len(names), deadline_ms=self._deadline(names[0]), allowed=self._without(made.allowed, names, now_ms))

    def _without(self, nodes: Bools | None, names: Iterable[str], now_ms: int) -> Bools:
        """[node] those that no member avoids."""
        assert nodes is not None
        avoided = [node for name in names for node in self._avoided(self.tables.rows[name], now_ms)]
        if avoided:
            nodes = nodes.copy()
            nodes[avoided] = False
        return nodes

    def _planned(self, key: str, names: tuple[str, ...], now_ms: int) -> _Known | str:
        """The job of rows that wait and what is reserved for it; what was made of the same rows is the same object. A string says why it cannot be planned now."""
        rows = tuple([self.tables.rows[name] for name in names])
        item, known = self.tables.items[names[0]].item, self._jobs.get(key)
        if known is not None and len(known.rows) == len(rows) and all(map(is_, known.rows, rows)) and item.tenant not in self.state.quotas:
            return known
        job = self._job(key, names, now_ms)
        if isinstance(job, str):
            return job
        plan, hold = rows[0].plan, None
        nodes = [self.state.node_index[node] for node in plan.get("nodes", ()) if node in self.state.node_index]
        if len(nodes) == job.members and self._without(self._may(item.shape, now_ms)[1], names, now_ms)[nodes].all():
            hold = Hold(job, tuple(nodes), plan["start_ms"], plan["end_ms"], np.array(job.need, np.int64))
        made = _Known(rows, job, hold)
        if item.tenant in self.state.quotas or any(row.avoid for row in rows):
            self._jobs.pop(key, None)  # it depends on what others hold, or on the time
        else:
            self._jobs[key] = made
        return made

    def _look_at_nodes(self, now_ms: int) -> None:
        """Forget what was made of nodes that were otherwise."""
        state = self.state
        nodes = state.attributes.version, state.node_index, state.status.tobytes(), state.cordon.tobytes(), self._gone(now_ms).tobytes()
        if not self._nodes or nodes[1] is not self._nodes[1] or nodes != self._nodes:
            self._nodes = nodes
            self._anew, self._jobs, self._allowed = True, {}, {}
            self._names = [node.name for node in state.nodes]

    # -- made anew -----------------------------------------------------------------------------------------------------------

    def _synced(self, now_ms: int, besides: Collection[str] = ()) -> tuple[Timetable, list[Late]]:
        """The timetable as the books are now, without the jobs of `besides`; and the promises that are broken by what has changed."""
        if self._table is not None and self._position(now_ms) == self._where:
            self._now = now_ms
            return self._table, []
        self._look_at_nodes(now_ms)
        self._now, self._members, self._never = now_ms, {}, {}
        self._edits += 1
        rows, state, gone = self.tables.rows, self.state, self._gone(now_ms)
        room = bookings.room(state) + self._guarded()
        over: Bools = np.logical_or.reduce(room < 0, axis=1)  # a node that became smaller than what it holds: nothing there is planned with
        changes, waiting = self._running(gone | over, now_ms)
        left_out = set(besides)
        holds, loose, late_comers = list[Hold](), list[Job](), list[tuple[str, tuple[str, ...]]]()
        dated, undated = list[tuple[str, tuple[str, ...]]](), list[tuple[str, tuple[str, ...]]]()
        for key, names in self._groups(waiting):
            if left_out.isdisjoint(names):
                (undated if self._deadline(names[0]) is None and "start_ms" not in rows[names[0]].plan else dated).append((key, names))
        for key, names in dated[:MAX_RESERVED]:
            known = self._planned(key, names, now_ms)
            if isinstance(known, str):
                self._never[key] = known
                self._hold_off(names, known, now_ms)
                continue
            self._members[key] = names
            if known.hold is not None:
                holds.append(known.hold)
            elif known.job.deadline_ms is not None:
                loose.append(known.job)
            else:
                late_comers.append((key, names))
        undated += late_comers
        for _, names in dated[MAX_RESERVED:]:
            self._hold_off(names, f"{MAX_RESERVED} jobs have room reserved already", now_ms)
        table, late = self._standing.timetable(
            (*state.resource_rows, bookings.GPU_COLUMN), self._names, room, gone, changes, self._slots, holds, loose, now_ms,
            human=human, when=lambda ms: when(ms, self._now), reorder_most=REORDER_MOST, backfill_depth=BACKFILL_DEPTH,
        )
        self._anew = False
        undated.sort(key=lambda each: -self.tables.items[each[1][0]].item.priority)
        self._left = len(dated) > MAX_RESERVED
        for number, (key, names) in enumerate(undated):
            if number >= MAX_TRIED or len(table.waiting) >= BACKFILL_DEPTH:
                self._left = True
                break
            self._submit_undated(table, key, names, now_ms)
        if len(self._jobs) > 2 * (len(dated) + len(undated)) + MAX_STALE:
            live = {key for key, _ in (*dated, *undated)}
            self._jobs = {key: known for key, known in self._jobs.items() if key in live}
        return table, late

    def _running(self, off: Bools, now_ms: int) -> tuple[dict[str, Hold | None], list[str]]:
        """Of what runs on nodes that are not `off`, what is different from what is standing (None: it runs no more); and who waits, in the order of the table."""
        rows, timed, news, order = self.tables.rows, self.tables.timed, self._news, self._order
        if self._anew or news.lost or order.lost or off.tobytes() != self._off:
            self._standing, self._off, self._slots, self._waiting, names = Standing(), off.tobytes(), {}, {}, list(timed)
        else:
            names = [name for name in news.keys if name in timed or name in self._slots]
        slots, waiting, moved, changes = self._slots, self._waiting, order.moved, dict[str, Hold | None]()
        for name in names:
            before = slots.pop(name, None)
            if before is not None and before >= 0:
                changes[name] = None
            if name not in timed:
                waiting.pop(name, None)
            elif (row := rows[name]).state == "pending":
                moved = moved or (before is not None and before >= 0)  # it stands where it was, not behind all others
                slots[name], waiting[name] = -1, True
            else:
                waiting.pop(name, None)
                slots[name], changes[name] = self._run(row, off, now_ms)
        if moved:
            self._waiting = waiting = {name: True for name in timed if rows[name].state == "pending"}
        news.clear()
        order.clear()
        self._anew = True  # what is told here is told once: all of it again, where it does not come to stand
        return changes, list(waiting)

    def _run(self, row: WorkloadRow, off: Bools, now_ms: int) -> tuple[int, Hold | None]:
        """The slot of a job that runs, and what it holds."""
        state, item = self.state, self.tables.items[row.id].item
        slot = state.slot_of.get(row.id)
        seat = None if slot is None else state.seats[slot]
        if slot is None or seat is None or off[seat.node]:
            return slot or 0, None
        end = row.plan.get("end_ms")
        return slot, bookings.hold(item, seat.node, int(state.w_start[slot]), bookings.need(state, item.shape), now_ms, None if end is None else int(end))

    def _submit_undated(self, table: Timetable, key: str, names: tuple[str, ...], now_ms: int) -> None:
        known = self._planned(key, names, now_ms)
        why = known if isinstance(known, str) else ""
        if not isinstance(known, str):
            self._members[key] = names
            verdict = table.submit(known.job, now_ms)
            self._edits += verdict.admitted
            why = "" if verdict.admitted else verdict.text
        if why:
            self._never[key] = why
            self._hold_off(names, why, now_ms)

    def _hold_off(self, names: Iterable[str], reason: str, now_ms: int) -> None:
        """They are not planned now, for that reason."""
        for name in names:
            row = self.tables.rows[name]
            if "start_ms" in row.plan:
                self.set(replace(row, plan=promise(row.plan)))
            self._waits(name, reason, now_ms)


def when(ms: int, now_ms: int) -> str:
    """`14:03:20 UTC`, with the date where that is another day."""
    if ms > LAST_DATE_MS:
        return f"{ms} ms"
    return datetime.fromtimestamp(ms // 1000, UTC).strftime("%H:%M:%S UTC" if ms // DAY_MS == now_ms // DAY_MS else "%Y-%m-%d %H:%M:%S UTC")


def promise(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plan outlives a new one."""
    return {key: plan[key] for key in ("promise_ms",) if key in plan}
