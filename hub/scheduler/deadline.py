"""Batch jobs with deadlines: what is promised at submit is kept. Pure; time is an argument, ms.

A job whose deadline is admitted holds a reservation from then on, in a profile of free capacity over time (`profile.py`). Jobs without a deadline run where
they delay no reservation; the first of them that cannot start holds one too (EASY backfill), so that it is not passed for ever.

What moves a reservation, and which way:

| event | reservations |
|---|---|
| a job is submitted | first tried in the holes, nothing moves; then in other orders (earliest deadline first within a class of priority), taken only where every promise is kept |
| a job ends early, a node comes | each in its order as early as now possible, never later than it was |
| a node vanishes, a job overruns | those it hit are placed anew; where that breaks a promise, all are, if fewer promises break; who is late is told, with the reason |
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from operator import gt
from typing import Any

import numpy as np

from .batch import Admission, Forecast, Hold, Job, Late, Reason, duration
from .outlook import Outlook
from .profile import FAR, Profile

OVERRUN_PERMILLE = 250
"""A job that runs beyond its reservation is expected to need this much of its estimate more, each time anew: few corrections for a bad estimate, little held for a slight one."""

MIN_EXTENSION_MS = 1_000
"""No extension is shorter: a job with a tiny estimate must not have the plan made anew every millisecond."""

MAX_JOBS = 10_000
"""Jobs running, reserved and waiting at once; more are refused with the reason."""


class Timetable(Outlook):
    """The plan of one pool. Every method takes the time now, which never goes back; one that raises has changed nothing."""

    def copy(self, when: Callable[[int], str] | None = None) -> "Timetable":
        """An independent one, for what-if; `when` as at the begin, the same where it is None."""
        other = copy(self)
        other.names, other.profile, other._gone, other._when = list(self.names), self.profile.copy(), set(self._gone), when or self._when
        other.running, other.reserved, other.waiting, other._order = dict(self.running), dict(self.reserved), dict(self.waiting), dict(self._order)
        other._witness = {}
        other.touched, other._slots = set(self.touched), dict(self._slots)
        return other

    def submit(self, job: Job, now_ms: int) -> Admission:
        """Admit a job or say why not. A job without a deadline is always admitted, unless it could never run. Raises ValueError for a malformed one."""
        self._check(job)
        self._advance(now_ms)
        if len(self.running) + len(self.reserved) + len(self.waiting) >= MAX_JOBS:
            return Admission(False, None, None, Reason(f"{MAX_JOBS} jobs are planned already; submit it again when some have ended"))
        never = self._never(job)
        if never is not None:
            return Admission(False, None, None, never)
        if job.deadline_ms is None:
            self._enlist(job)
            self.waiting[job.id] = job
            return Admission(True, None)
        direct = self._find(self.profile, job, now_ms)
        if direct is not None and direct.end_ms <= job.deadline_ms:
            self._enlist(job)
            self._hold(self.profile, direct)
            self._reserve(direct)
            return Admission(True, self._forecast(direct))
        self._enlist(job)
        reordered = self._reorder(job, now_ms) if len(self.reserved) <= self._reorder_most else None
        if reordered is None:
            del self._order[job.id]
            return self._refusal(job, direct, now_ms)
        before = self.reserved
        self.profile, self.reserved = reordered
        self.touched.update(self.reserved)
        moved = tuple(self._forecast(hold) for name, hold in self.reserved.items() if name != job.id and (hold.start_ms, hold.nodes) != (before[name].start_ms, before[name].nodes))
        return Admission(True, self._forecast(self.reserved[job.id]), moved=moved)

    def adopt(self, hold: Hold, now_ms: int) -> None:
        """Book what runs already. Raises `Overcommitted` where it does not fit, ValueError for an id that is planned; nothing is changed then."""
        self._advance(now_ms)
        self._check(hold.job)
        self._hold_or_not(Hold(hold.job, hold.nodes, now_ms, hold.end_ms, hold.need))
        self._enlist(hold.job)
        self.running[hold.job.id] = hold
        self._soonest = min(self._soonest, hold.end_ms)

    def stand(self, gone: Iterable[int], running: Mapping[str, Hold], slots: Mapping[str, int], soonest: int, witness: dict[tuple[int, ...], int], planned: Iterable[Hold], kept: Mapping[str, Hold], loose: Iterable[Job], now_ms: int) -> list[Late]:
        """Begin with what the profile holds already: what runs (in the order of `slots`; none ends before `soonest`), where needs once fitted, and of what was planned (in its order) what is `kept`.

        The rest of it, and `loose` jobs, are placed anew. Returns the promises that this broke.
        """
        self._gone, self.running, self._slots, self._soonest, self._witness = set(gone), dict(running), slots, soonest, witness
        hit = list[Hold]()
        for hold in planned:
            self._enlist(hold.job)
            due = kept.get(hold.job.id)
            if due is None:
                hit.append(hold)
            else:
                self.reserved[hold.job.id] = due
        self.touched.update(name for name, due in kept.items() if due.start_ms <= now_ms)
        for job in loose:
            self._check(job)
            self._enlist(job)
            end = job.deadline_ms if job.deadline_ms is not None else FAR
            hit.append(Hold(job, (), end, end, np.array(job.need, np.int64)))
        return self._settle(hit, now_ms, "what was reserved for it is not there any more") if hit else []

    def move_up(self, now_ms: int) -> list[Forecast]:
        """Reservations as early as what has come free lets them. Returns those that moved."""
        self._advance(now_ms)
        return self._move_up(now_ms, range(self.profile.nodes))

    def turn(self, now_ms: int) -> tuple[list[Hold], list[Late]]:
        """What starts now, and which promises an overrun broke. Call it after every event, and when `next_ms` comes."""
        self._advance(now_ms)
        late = self._extend_overruns(now_ms) + self._overdue(now_ms)
        started = []
        due = [hold for hold in self.reserved.values() if hold.start_ms <= now_ms]
        for hold in sorted(due, key=lambda hold: (hold.start_ms, self._key(hold.job))):
            started.append(self._start(hold))
        return started + self._backfill(now_ms), late

    def next_ms(self) -> int | None:
        """When the next reservation starts or the next running job should have ended."""
        times = [hold.start_ms for hold in self.reserved.values()] + [hold.end_ms for hold in self.running.values()]
        return min(times, default=None)

    def ended(self, job_id: str, now_ms: int) -> list[Forecast]:
        """A running job has ended (or is cancelled): what it still held is free, and reservations move up. Returns those that did. Unknown ids are ignored: an end may be told twice."""
        self._advance(now_ms)
        hold = self.running.pop(job_id, None) or self.reserved.pop(job_id, None)
        if hold is None:
            if self.waiting.pop(job_id, None) is not None:
                del self._order[job_id]
            return []
        self._order.pop(job_id, None)
        self._release(self.profile, hold, now_ms)
        return self._move_up(now_ms, hold.nodes)

    def node_gone(self, node: int, now_ms: int) -> list[Late]:
        """A node vanished: what ran there starts again from its beginning elsewhere. Returns the promises that this broke."""
        self._advance(now_ms)
        if node in self._gone:
            return []
        hit = self._lift(lambda hold: node in hold.nodes, now_ms, running=True)
        self.profile.set_node(node, [0] * len(self.resources), now_ms)
        self._gone.add(node)
        return self._settle(hit, now_ms, f"node {self.names[node]} vanished")

    def node_back(self, node: int, now_ms: int) -> list[Forecast]:
        """It is there again, with all its capacity. Returns the reservations that moved up."""
        self._advance(now_ms)
        if node not in self._gone:
            return []
        self._gone.discard(node)
        self.profile.set_node(node, [int(value) for value in self.base[node]], now_ms)
        return self._move_up(now_ms, [node])

    def node_added(self, name: str, free: Sequence[int], now_ms: int) -> int:
        """A new node; its index. Jobs with a list of allowed nodes do not use it. Reservations move up."""
        self._advance(now_ms)
        self.names.append(name)
        self.base = np.concatenate([self.base, np.array([free], np.int64)])
        node = self.profile.add_node(free, now_ms)
        self._move_up(now_ms, [node])
        return node

    # -- placing

    def _check(self, job: Job) -> None:
        if job.id in self._order or job.id in self.running:
            raise ValueError(f"job {job.id}: is planned already; end it first, or use another id")
        if len(job.need) != len(self.resources) or any(value < 0 for value in job.need) or not any(job.need):
            raise ValueError(f"job {job.id}: need must hold {len(self.resources)} quantities of 0 or more, not all 0, one for each of {', '.join(self.resources)}")
        if job.duration_ms <= 0 or job.members < 1 or job.margin_permille < 0:
            raise ValueError(f"job {job.id}: duration_ms must be above 0, members 1 or more, margin_permille 0 or more")

    def _key(self, job: Job) -> tuple[int, int, int]:
        return -job.priority, job.deadline_ms if job.deadline_ms is not None else FAR, self._order.get(job.id, 0)

    def _enlist(self, job: Job) -> None:
        self._sequence += 1
        self._order[job.id] = self._sequence

    def _advance(self, now_ms: int) -> None:
        if now_ms < self._now:
            raise ValueError(f"time went back from {self._now} to {now_ms} ms")
        if now_ms > self._now:
            self._now = now_ms
            self.profile.advance(now_ms)

    @staticmethod
    def _hold(profile: Profile, hold: Hold) -> None:
        for node in hold.nodes:
            profile.take(node, hold.start_ms, hold.end_ms, hold.need)

    def _hold_or_not(self, hold: Hold) -> None:
        """Hold it on all its nodes. Raises `Overcommitted` with nothing changed."""
        trial = self.profile if len(hold.nodes) == 1 else self.profile.copy()
        self._hold(trial, hold)
        self.profile = trial

    @staticmethod
    def _release(profile: Profile, hold: Hold, now_ms: int) -> None:
        for node in hold.nodes:
            profile.give(node, max(hold.start_ms, now_ms), hold.end_ms, hold.need)

    def _start(self, hold: Hold) -> Hold:
        self.reserved.pop(hold.job.id, None)
        self.waiting.pop(hold.job.id, None)
        self.running[hold.job.id] = hold
        self.touched.add(hold.job.id)
        self._soonest = min(self._soonest, hold.end_ms)
        return hold

    def _reserve(self, hold: Hold) -> None:
        self.reserved[hold.job.id] = hold
        self.touched.add(hold.job.id)

    def _promised_by(self, hold: Hold) -> int:
        """Until when a reservation may be through: its deadline, or as late as it is now where that is lost already."""
        return max(hold.job.deadline_ms, hold.end_ms) if hold.job.deadline_ms is not None else FAR

    def _reorder(self, job: Job, now_ms: int) -> tuple[Profile, dict[str, Hold]] | None:
        """All reservations and the new job placed anew, in several orders; the first where every promise is kept."""
        bare = self.profile.copy()
        for hold in self.reserved.values():
            self._release(bare, hold, now_ms)
        limits = {name: self._promised_by(hold) for name, hold in self.reserved.items()}
        limits[job.id] = job.deadline_ms if job.deadline_ms is not None else FAR
        jobs = sorted([hold.job for hold in self.reserved.values()] + [job], key=self._key)
        orders = (
            jobs,
            sorted(jobs, key=lambda each: (-each.priority, (each.deadline_ms if each.deadline_ms is not None else FAR) - each.planned_ms)),
            [job, *(each for each in jobs if each is not job)],
        )
        for order in orders:
            profile, placed = bare.copy(), dict[str, Hold]()
            for each in order:
                found = self._find(profile, each, now_ms)
                if found is None or found.end_ms > limits[each.id]:
                    break
                self._hold(profile, found)
                placed[each.id] = found
            else:
                return profile, placed
        return None

    def _backfill(self, now_ms: int) -> list[Hold]:
        """Start what has no deadline where it delays no reservation; the first that cannot start gets one."""
        undated = [hold for hold in self.reserved.values() if hold.job.deadline_ms is None]
        for hold in undated:
            self._release(self.profile, hold, now_ms)
            del self.reserved[hold.job.id]
            self.waiting[hold.job.id] = hold.job
        started, head, failed, most = [], False, set[tuple[Any, ...]](), self.profile.first().max(axis=0, initial=0).tolist()
        for job in sorted(self.waiting.values(), key=self._key)[:self._backfill_depth]:
            kin = job.need, job.planned_ms, job.members, id(job.allowed)
            if head and (kin in failed or any(map(gt, job.need, most)) or not self._fits_now(job)):
                continue  # others were only added since
            found = self._find(self.profile, job, now_ms)
            if found is None or found.start_ms > now_ms:
                failed.add(kin)
            if found is None or (found.start_ms > now_ms and head):
                continue
            self._hold(self.profile, found)
            if found.start_ms <= now_ms:
                started.append(self._start(found))
            else:
                self._reserve(found)
                del self.waiting[job.id]
                head = True
        return started

    def _move_up(self, now_ms: int, freed: Iterable[int]) -> list[Forecast]:
        """Each reservation, in its order, as early as the room on the freed nodes lets it. Its own place is free while it looks, so it never gets later.

        A reservation that moves frees its own nodes for the ones after it.
        """
        moved, open_nodes = [], np.zeros(self.profile.nodes, bool)
        open_nodes[list(freed)] = True
        for hold in sorted(self.reserved.values(), key=lambda hold: self._key(hold.job)):
            allowed = self._allowed(hold.job)
            usable = open_nodes if allowed is None else open_nodes & allowed
            if hold.start_ms <= now_ms or not usable.any():
                continue
            self._release(self.profile, hold, now_ms)
            found = self._find(self.profile, hold.job, now_ms, usable if hold.job.members == 1 else allowed)
            better = found if found is not None and found.start_ms < hold.start_ms else hold
            self._hold(self.profile, better)
            if better is not hold:
                self._reserve(better)
                open_nodes[list(hold.nodes)] = True
                moved.append(self._forecast(better))
        return moved

    def _lift(self, hit: Callable[[Hold], bool], now_ms: int, running: bool) -> list[Hold]:
        """Take those holds out of the plan."""
        lifted = []
        for table in (self.reserved, self.running) if running else (self.reserved,):
            for hold in [hold for hold in table.values() if hit(hold)]:
                self._release(self.profile, hold, now_ms)
                del table[hold.job.id]
                lifted.append(hold)
        return lifted

    def _settle(self, hit: Iterable[Hold], now_ms: int, because: str) -> list[Late]:
        """Place again what an event threw out: in the holes, or, where that breaks promises and it breaks fewer, everything anew. The promises newly broken."""
        dated, before = [], {hold.job.id: self._forecast(hold).late_ms for hold in self.reserved.values()}
        for hold in hit:
            before[hold.job.id] = self._forecast(hold).late_ms
            if hold.job.deadline_ms is None:
                self.waiting[hold.job.id] = hold.job
            else:
                dated.append(hold.job)
        kept = self._place_all(self.profile.copy(), dict(self.reserved), dated, now_ms)
        if kept[2] > (0, 0):
            bare = self.profile.copy()
            for hold in self.reserved.values():
                self._release(bare, hold, now_ms)
            anew = self._place_all(bare, {}, dated + [hold.job for hold in self.reserved.values() if hold.job.deadline_ms is not None], now_ms)
            if anew[2] < kept[2]:
                for hold in self.reserved.values():
                    if hold.job.deadline_ms is None:
                        self.waiting[hold.job.id] = hold.job
                kept = anew
        self.profile, self.reserved, _ = kept
        self.touched.update(self.reserved)
        late = []
        for job in dated:
            if job.id not in self.reserved:
                late.append(Late(Forecast(job.id, FAR, FAR, FAR, FAR, ()), f"{because}; no node that is left can run it"))
                self.waiting[job.id] = job
        late += [Late(forecast, because) for forecast in map(self._forecast, self.reserved.values()) if forecast.late_ms > before.get(forecast.job, 0)]
        return late

    def _place_all(self, profile: Profile, reserved: dict[str, Hold], jobs: list[Job], now_ms: int) -> tuple[Profile, dict[str, Hold], tuple[int, int]]:
        """Place jobs in their order; with (promises broken, ms late in all)."""
        for job in sorted(jobs, key=self._key):
            hold = self._find(profile, job, now_ms)
            if hold is not None:
                self._hold(profile, hold)
                reserved[job.id] = hold
        lates = [self._forecast(reserved[job.id]).late_ms if job.id in reserved else FAR for job in jobs] + [self._forecast(hold).late_ms for hold in reserved.values() if hold.job not in jobs]
        return profile, reserved, (sum(late > 0 for late in lates), sum(lates))

    def _extend_overruns(self, now_ms: int) -> list[Late]:
        """Jobs that still run past their reservation keep what they have; reservations in their way are placed anew."""
        late = list[Late]()
        if self._soonest > now_ms:
            return late
        for hold in [hold for hold in self._seated() if hold.end_ms <= now_ms]:
            end = now_ms + max(MIN_EXTENSION_MS, hold.job.duration_ms * OVERRUN_PERMILLE // 1000)
            nodes = set(hold.nodes)
            hit = self._lift(lambda other, nodes=nodes, end=end: other.start_ms < end and not nodes.isdisjoint(other.nodes), now_ms, running=False)  # type: ignore[misc]
            longer = Hold(hold.job, hold.nodes, now_ms, end, hold.need)
            self._hold(self.profile, longer)
            self.running[hold.job.id] = Hold(hold.job, hold.nodes, hold.start_ms, end, hold.need)
            self.touched.add(hold.job.id)
            because = f"job {hold.job.id} runs longer than its estimate of {duration(hold.job.duration_ms)} and its margin"
            itself = self._forecast(self.running[hold.job.id])
            late += [Late(itself, because)] if itself.late_ms else []
            late += self._settle(hit, now_ms, because)
        self._soonest = min((hold.end_ms for hold in self.running.values()), default=FAR)
        return late

    def _overdue(self, now_ms: int) -> list[Late]:
        """Reservations that this turn comes too late for: what is left of them no longer covers the estimate. A slighter delay is the margin's."""
        hit = self._lift(lambda hold: hold.start_ms < now_ms and hold.end_ms - now_ms < hold.job.duration_ms, now_ms, running=False)
        return self._settle(hit, now_ms, "its start was called for too late") if hit else []
