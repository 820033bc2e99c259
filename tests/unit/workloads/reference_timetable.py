"""The timetable as it was before only what changed was made anew: every turn looks at everything, every job at all nodes. See `reference`."""


from collections.abc import Iterable

import numpy as np

from hub.scheduler.batch import Admission, Hold, Job, Late, Reason, Remedy, duration
from hub.scheduler.deadline import MIN_EXTENSION_MS, OVERRUN_PERMILLE, Timetable
from hub.scheduler.profile import FAR, Overcommitted, Profile
from hub.scheduler.reasons import Bools


class OldTimetable(Timetable):
    """Every turn looks at everything, every job at all nodes."""

    def restore(self, holds: Iterable[Hold], loose: Iterable[Job], now_ms: int) -> list[Late]:
        """Reservations as they were kept, each where and when it was, whatever the job's allowed nodes say now; what no longer fits so, and jobs that have none (`loose`), are placed anew. Returns the promises that this broke."""
        self._advance(now_ms)
        hit = list[Hold]()
        for hold in sorted(holds, key=lambda hold: (hold.start_ms, hold.job.id)):
            self._check(hold.job)
            self._enlist(hold.job)
            due = Hold(hold.job, hold.nodes, max(hold.start_ms, now_ms), hold.end_ms, hold.need)
            try:
                if due.end_ms - now_ms < hold.job.duration_ms:  # it was called for too late
                    raise Overcommitted
                self._hold_or_not(due)
            except Overcommitted:
                hit.append(hold)
            else:
                self.reserved[hold.job.id] = due
        for job in loose:
            self._check(job)
            self._enlist(job)
            end = job.deadline_ms if job.deadline_ms is not None else FAR
            hit.append(Hold(job, (), end, end, np.array(job.need, np.int64)))
        return self._settle(hit, now_ms, "what was reserved for it is not there any more") if hit else []

    def turn(self, now_ms: int) -> tuple[list[Hold], list[Late]]:
        """What starts now, and which promises an overrun broke. Call it after every event, and when `next_ms` comes."""
        self._advance(now_ms)
        late = self._extend_overruns(now_ms) + self._overdue(now_ms)
        started = []
        for hold in sorted(self.reserved.values(), key=lambda hold: (hold.start_ms, self._key(hold.job))):
            if hold.start_ms <= now_ms:
                started.append(self._start(hold))
        return started + self._backfill(now_ms), late

    def _advance(self, now_ms: int) -> None:
        if now_ms < self._now:
            raise ValueError(f"time went back from {self._now} to {now_ms} ms")
        self._now = now_ms
        self.profile.advance(now_ms)

    def _backfill(self, now_ms: int) -> list[Hold]:
        """Start what has no deadline where it delays no reservation; the first that cannot start gets one."""
        undated = [hold for hold in self.reserved.values() if hold.job.deadline_ms is None]
        for hold in undated:
            self._release(self.profile, hold, now_ms)
            del self.reserved[hold.job.id]
            self.waiting[hold.job.id] = hold.job
        started, head = [], False
        for job in sorted(self.waiting.values(), key=self._key)[:self._backfill_depth]:
            found = self._find(self.profile, job, now_ms)
            if found is None or (found.start_ms > now_ms and head):
                continue
            self._hold(self.profile, found)
            if found.start_ms <= now_ms:
                started.append(self._start(found))
            else:
                self.reserved[job.id] = found
                del self.waiting[job.id]
                head = True
        return started

    def _extend_overruns(self, now_ms: int) -> list[Late]:
        """Jobs that still run past their reservation keep what they have; reservations in their way are placed anew."""
        late = []
        for hold in [hold for hold in self.running.values() if hold.end_ms <= now_ms]:
            end = now_ms + max(MIN_EXTENSION_MS, hold.job.duration_ms * OVERRUN_PERMILLE // 1000)
            nodes = set(hold.nodes)
            hit = self._lift(lambda other, nodes=nodes, end=end: other.start_ms < end and not nodes.isdisjoint(other.nodes), now_ms, running=False)  # type: ignore[misc]
            longer = Hold(hold.job, hold.nodes, now_ms, end, hold.need)
            self._hold(self.profile, longer)
            self.running[hold.job.id] = Hold(hold.job, hold.nodes, hold.start_ms, end, hold.need)
            because = f"job {hold.job.id} runs longer than its estimate of {duration(hold.job.duration_ms)} and its margin"
            itself = self._forecast(self.running[hold.job.id])
            late += [Late(itself, because)] if itself.late_ms else []
            late += self._settle(hit, now_ms, because)
        return late

    def _overdue(self, now_ms: int) -> list[Late]:
        """Reservations that this turn comes too late for: what is left of them no longer covers the estimate. A slighter delay is the margin's."""
        hit = self._lift(lambda hold: hold.start_ms < now_ms and hold.end_ms - now_ms < hold.job.duration_ms, now_ms, running=False)
        return self._settle(hit, now_ms, "its start was called for too late") if hit else []

    def _never(self, job: Job) -> Reason | None:
        """Why it could not even run in an empty pool."""
        need, allowed = np.array(job.need, np.int64), self._allowed(job)
        usable = np.ones(self.profile.nodes, bool) if allowed is None else allowed.copy()
        usable[list(self._gone)] = False
        if not usable.any():
            return Reason("no node that it may use is there")
        room = Profile(self.base, 0).members(need, 0, 1, job.members)
        if int(room[usable].sum()) >= job.members:
            return None
        largest = self.base[usable].max(axis=0)
        row = int(np.argmax(need - largest))
        if need[row] > largest[row]:
            name = self.resources[row]
            text = f"asks for {self._human(name, int(need[row]))}; no node that it may use has more than {self._human(name, int(largest[row]))} for batch"
            return Reason(text, name, short=int(need[row] - largest[row]))
        return Reason(f"asks for {job.members} members side by side; the nodes that it may use hold {int(room[usable].sum())} when empty")

    def _refusal(self, job: Job, found: Hold | None, now_ms: int) -> Admission:
        """Why it misses and what alone would make it."""
        assert job.deadline_ms is not None
        if found is None:
            return Admission(False, None, None, Reason("no node that it may use is ever free for it"))
        forecast, late = self._forecast(found), found.end_ms - job.deadline_ms
        remedies = [Remedy("deadline", f"with the deadline {duration(late)} later", late)]
        latest = job.deadline_ms - job.planned_ms
        estimate = Job(job.id, job.need, job.duration_ms, job.deadline_ms, job.priority, job.members, 0, job.allowed)
        bare = self._find(self.profile, estimate, now_ms)
        if job.margin_permille and bare is not None and bare.end_ms <= job.deadline_ms:
            remedies.append(Remedy("margin", f"if the estimate of {duration(job.duration_ms)} is taken without its margin", job.margin_permille))
        if latest < now_ms:
            text = f"it takes {duration(job.planned_ms)} (with a margin of {job.margin_permille / 10:g} %) and {duration(max(0, job.deadline_ms - now_ms))} are left"
            return Admission(False, forecast, late, Reason(text), tuple(remedies))
        reason = self._shortage(job, found, latest)
        return Admission(False, forecast, late, reason, (*self._earlier_ends(job, latest, now_ms), *self._more_nodes(job, latest), *remedies))

    def _shortage(self, job: Job, found: Hold, latest_ms: int) -> Reason:
        """Which resource, on the node where it can start first, until when."""
        node = found.nodes[-1]
        wanted = found.need * found.nodes.count(node)
        short = wanted - self.profile.least(latest_ms, job.planned_ms)[node]
        row = int(np.argmax(short / np.maximum(self.base[node], 1)))
        name = self.resources[row]
        holders = tuple(
            hold.job.id for hold in (*self.running.values(), *self.reserved.values())
            if node in hold.nodes and hold.need[row] > 0 and hold.start_ms < latest_ms + job.planned_ms and hold.end_ms > latest_ms
        )
        if short[row] <= 0:
            return Reason(f"its {job.members} members fit side by side only from {self._when(found.start_ms)} on", until_ms=found.start_ms, node=self.names[node], held_by=holders)
        text = f"{self._human(name, int(short[row]))} short on {self.names[node]} until {self._when(found.start_ms)}"
        return Reason(text + (f", held by {', '.join(holders)}" if holders else ""), name, self.names[node], int(short[row]), found.start_ms, holders)

    def _earlier_ends(self, job: Job, latest_ms: int, now_ms: int) -> list[Remedy]:
        """Jobs that alone would make room by ending earlier; the one that has to change the least. Each is tried."""
        allowed = self._allowed(job)
        best: Remedy | None = None
        for hold in self.running.values():
            if hold.end_ms <= latest_ms or not any(allowed is None or allowed[node] for node in hold.nodes) or (best is not None and hold.end_ms - latest_ms >= best.amount):
                continue
            trial = self.profile.copy()
            for node in hold.nodes:
                trial.give(node, max(latest_ms, now_ms), hold.end_ms, hold.need)
            found = self._find(trial, job, now_ms)
            if found is not None and found.start_ms <= latest_ms:
                early = hold.end_ms - latest_ms
                best = Remedy("earlier end", f"if {hold.job.id} ends {duration(early)} earlier, at {self._when(latest_ms)}", early, hold.job.id)
        return [best] if best is not None else []

    def _more_nodes(self, job: Job, latest_ms: int) -> list[Remedy]:
        """How many empty nodes more, like the one that holds most members, would do."""
        need, allowed = np.array(job.need, np.int64), self._allowed(job)
        usable = np.ones(self.profile.nodes, bool) if allowed is None else allowed
        each = np.where(usable, Profile(self.base, 0).members(need, 0, 1, job.members), 0)
        like = int(each.argmax())
        room = np.where(usable, self.profile.members(need, latest_ms, job.planned_ms, job.members), 0)
        count = -(-max(0, job.members - int(room.sum())) // int(each[like])) if each[like] else 0
        return [Remedy("nodes", f"with {count} more node{'s' if count > 1 else ''} like {self.names[like]}", count)] if count else []

    def _find(self, profile: Profile, job: Job, now_ms: int, nodes: Bools | None = None) -> Hold | None:
        """The earliest place, on all nodes that the job may use or on those of `nodes`."""
        need = np.array(job.need, np.int64)
        slot = profile.earliest(need, job.planned_ms, now_ms, self._allowed(job) if nodes is None else nodes, job.members)
        return Hold(job, slot.nodes, slot.start_ms, slot.start_ms + job.planned_ms, need) if slot is not None else None
