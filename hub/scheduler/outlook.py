"""What a timetable says without being changed: where a job finds its place, when it would be through, why not earlier, and what alone would help. Pure."""

from collections.abc import Callable, Mapping, Sequence
from operator import ge

import numpy as np

from .batch import Admission, Forecast, Hold, Job, Reason, Remedy, duration
from .profile import FAR, Bools, Ints, Profile, at_least

REORDER_MAX = 300
"""Reservations up to which a submit tries other orders of all of them; beyond it only the holes are tried: bounds a submit to about a second at 1,000 nodes."""

BACKFILL_DEPTH = 1_000
"""Jobs without a deadline that one turn looks at, in their order: bounds a turn's time."""


class Outlook:
    """The plan of one pool, to be looked at; `Timetable` changes it."""

    def __init__(self, resources: Sequence[str], names: Sequence[str], free: Ints, now_ms: int, human: Callable[[str, int], str] | None = None,
                 when: Callable[[int], str] | None = None, reorder_most: int = REORDER_MAX, backfill_depth: int = BACKFILL_DEPTH, profile: Profile | None = None) -> None:
        """`free`: [N, R], what batch may use of each node. `human` writes a quantity of a resource, `when` a time. `profile`: with what is held from the begin, see `stand`."""
        self.resources, self.names = tuple(resources), list(names)
        self.base = free.astype(np.int64)
        self.profile = profile or Profile(self.base, now_ms)
        self.running: dict[str, Hold] = {}
        self.reserved: dict[str, Hold] = {}
        self.waiting: dict[str, Job] = {}
        self.touched: set[str] = set()
        """Jobs whose hold is another since the caller last cleared this."""
        self._gone: set[int] = set()
        self._order: dict[str, int] = {}
        self._slots: Mapping[str, int] = {}
        """What ran at the begin goes by these, before what was started since."""
        self._soonest = FAR
        """Nothing that runs ends before."""
        self._witness: dict[tuple[int, ...], int] = {}
        """Need to a node that could hold it when empty: looked at first."""
        self._sequence = 0
        self._now = now_ms
        self._human = human or (lambda resource, amount: f"{amount} {resource}")
        self._when = when or (lambda ms: f"{ms} ms")
        self._reorder_most, self._backfill_depth = reorder_most, backfill_depth

    def forecast(self, job_id: str) -> Forecast | None:
        """Of a job that runs or holds a reservation."""
        hold = self.running.get(job_id) or self.reserved.get(job_id)
        return self._forecast(hold) if hold is not None else None

    def _allowed(self, job: Job) -> Bools | None:
        """Nodes that came after the job's list was made are not on it."""
        if job.allowed is None or len(job.allowed) == self.profile.nodes:
            return job.allowed
        return np.concatenate([job.allowed, np.zeros(self.profile.nodes - len(job.allowed), bool)])

    def _find(self, profile: Profile, job: Job, now_ms: int, nodes: Bools | None = None) -> Hold | None:
        """The earliest place, on all nodes that the job may use or on those of `nodes`."""
        need = np.array(job.need, np.int64)
        slot = profile.earliest(need, job.planned_ms, now_ms, self._allowed(job) if nodes is None else nodes, job.members)
        return Hold(job, slot.nodes, slot.start_ms, slot.start_ms + job.planned_ms, need) if slot is not None else None

    def _fits_now(self, job: Job) -> bool:
        """Whether some node that it may use has room for one member at this moment: else it does not start now."""
        fitting, allowed = at_least(self.profile.first(), np.array(job.need, np.int64)), self._allowed(job)
        return bool((fitting if allowed is None else fitting & allowed).any())

    def _forecast(self, hold: Hold) -> Forecast:
        deadline = hold.job.deadline_ms
        late = max(0, hold.end_ms - deadline) if deadline is not None else 0
        return Forecast(hold.job.id, hold.start_ms, hold.start_ms + hold.job.duration_ms, hold.end_ms, late, hold.nodes)

    def _seated(self) -> list[Hold]:
        """What runs, in its order."""
        return sorted(self.running.values(), key=lambda hold: slot if (slot := self._slots.get(hold.job.id, -1)) >= 0 else FAR)

    # -- saying why

    def _never(self, job: Job) -> Reason | None:
        """Why it could not even run in an empty pool."""
        need, allowed = np.array(job.need, np.int64), self._allowed(job)
        usable = np.ones(self.profile.nodes, bool) if allowed is None else allowed
        if self._gone:
            usable = usable.copy()
            usable[list(self._gone)] = False
        if not usable.any():
            return Reason("no node that it may use is there")
        if job.members == 1:
            witness = self._witness.get(job.need, -1)
            if 0 <= witness < len(usable) and usable[witness] and all(map(ge, self.base[witness].tolist(), job.need)):
                return None
            able = usable & at_least(self.base, need)
            if able.any():
                self._witness[job.need] = int(able.argmax())
                return None
        asked = need > 0
        room = np.clip((self.base[:, asked] // need[asked]).min(axis=1), 0, job.members)
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
            hold.job.id for hold in (*self._seated(), *self.reserved.values())
            if node in hold.nodes and hold.need[row] > 0 and hold.start_ms < latest_ms + job.planned_ms and hold.end_ms > latest_ms
        )
        if short[row] <= 0:
            return Reason(f"its {job.members} members fit side by side only from {self._when(found.start_ms)} on", until_ms=found.start_ms, node=self.names[node], held_by=holders)
        text = f"{self._human(name, int(short[row]))} short on {self.names[node]} until {self._when(found.start_ms)}"
        return Reason(text + (f", held by {', '.join(holders)}" if holders else ""), name, self.names[node], int(short[row]), found.start_ms, holders)

    def _earlier_ends(self, job: Job, latest_ms: int, now_ms: int) -> list[Remedy]:
        """Jobs that alone would make room by ending earlier; the one that has to change the least. Each is tried, from that one on."""
        allowed, need = self._allowed(job), np.array(job.need, np.int64)
        free = self.profile.least(latest_ms, 1)
        late = [hold for hold in self._seated() if hold.end_ms > latest_ms]
        for hold in sorted(late, key=lambda hold: hold.end_ms):
            mine = [node for node in set(hold.nodes) if allowed is None or allowed[node]]
            usable: Bools | None = None
            if job.members == 1:  # as things are it found no place in time; so it would start on these nodes, and run at that moment
                mine = [node for node in mine if (free[node] + hold.need * hold.nodes.count(node) >= need).all()]
                usable = np.zeros(self.profile.nodes, np.bool_)
                usable[mine] = True
            if not mine:
                continue
            trial = self.profile.copy()
            for node in hold.nodes:
                trial.give(node, max(latest_ms, now_ms), hold.end_ms, hold.need)
            found = self._find(trial, job, now_ms, usable)
            if found is not None and found.start_ms <= latest_ms:
                early = hold.end_ms - latest_ms
                return [Remedy("earlier end", f"if {hold.job.id} ends {duration(early)} earlier, at {self._when(latest_ms)}", early, hold.job.id)]
        return []

    def _more_nodes(self, job: Job, latest_ms: int) -> list[Remedy]:
        """How many empty nodes more, like the one that holds most members, would do."""
        need, allowed = np.array(job.need, np.int64), self._allowed(job)
        usable = np.ones(self.profile.nodes, bool) if allowed is None else allowed
        each = np.where(usable, Profile(self.base, 0).members(need, 0, 1, job.members), 0)
        like = int(each.argmax())
        room = np.where(usable, self.profile.members(need, latest_ms, job.planned_ms, job.members), 0)
        count = -(-max(0, job.members - int(room.sum())) // int(each[like])) if each[like] else 0
        return [Remedy("nodes", f"with {count} more node{'s' if count > 1 else ''} like {self.names[like]}", count)] if count else []
