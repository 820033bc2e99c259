"""Moving what runs, in an order that is feasible at every step. Pure.

A move holds room at both ends until it is over: the workload is booked at its target from the start, and a *leaving* entry, of the same shape and on its way out,
keeps its old seat. So every filter of the scheduler sees both: capacity, devices and zones are taken twice, whoever must be apart from the workload stays apart from
both, spread counts it where it will be. The hub books its running moves the same way (`begin_move`, `end_move`, `cancel_move`): a new plan then knows of them.

A plan is a list of steps. The moves of one step run side by side and the next step begins when all are over, so a slow move delays the plan and never breaks it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .arrays import GONE, Seat
from .feasible import shortage, verdicts
from .model import HOST, Spread, Workload
from .place import Scheduler
from .reasons import WORDS, Bools, Fail
from .state import State
from .units import LEAVING, Invalid, human

BITS_PER_BYTE = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """What moves may take of the cluster at one time, and what they cost."""

    per_node: int = 2
    """Moves that one node sends or takes side by side: with more, each gets slower and its memory changes faster than it is copied."""
    per_link: int = 4
    """Moves side by side on the way between two sites."""
    total: int = 16
    """Moves side by side in all: a fault in the planner or the fabric then hits few workloads."""
    per_plan: int = 200
    """Moves of one plan; what is left waits for the next, which sees how this one went."""
    node_kbps: int = 1_000_000
    """kbit/s of a node that states no network capacity: gigabit Ethernet."""
    restart_ms: int = 30_000
    """How long a workload that cannot migrate takes to be up in its new place."""
    migrates: bool = True
    """Whether there are drivers that migrate. Without them every move is a restart: budgets count all, nothing is carried."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if name == "migrates":
                continue
            if getattr(self, name) < 1:
                raise Invalid(f"limits.{name}", f"{getattr(self, name)} allows no move at all", "give 1 or more")


@dataclass(frozen=True, slots=True)
class Move:
    """One workload from node to node (names). `seat` is where on the target. `hop`: a third node on its way, to break a cycle. Times from the plan's start, ms."""

    workload: str
    source: str
    target: str
    how: str
    bytes: int
    start_ms: int
    end_ms: int
    seat: Seat
    hop: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """A move that was wanted and is not in the plan, and why."""

    workload: str
    source: str
    target: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in order. `gain` and `cost` in millionths of the currency, where the plan is for gain; `reason` says why there is none.

    `waits`: the first step begins when the moves that were under way before are over.
    """

    steps: tuple[tuple[Move, ...], ...] = ()
    refused: tuple[Refused, ...] = ()
    gain: int = 0
    cost: int = 0
    reason: str = ""
    waits: bool = False

    @property
    def moves(self) -> tuple[Move, ...]:
        """All, in order."""
        return tuple(move for step in self.steps for move in step)

    @property
    def bytes(self) -> int:
        """Carried in all."""
        return sum(move.bytes for move in self.moves)

    @property
    def duration_ms(self) -> int:
        """Of all steps."""
        return max((move.end_ms for move in self.moves), default=0)

    @property
    def text(self) -> str:
        """`after moving 2 workloads, 14 GB, in 1 step of 112 s`."""
        if not self.steps:
            return self.reason or "nothing to move"
        count, steps = len({move.workload for move in self.moves}), len(self.steps)
        return (f"after moving {count} workload{'s' if count > 1 else ''}, {human('memory', self.bytes)}, in {steps} step{'s' if steps > 1 else ''} of "
                f"{round(self.duration_ms / 1000, 1):g} s in all")


def begin_move(state: State, workload: str, seat: Seat, now_ms: int) -> None:
    """Book a move as begun: the workload at its target, its old seat held. Raises `Invalid` where the target has no room; nothing is changed then.

    A migrated workload goes on, so it keeps its start; a restarted one starts now.
    """
    item, old = state.workload(workload), state.seat(workload)
    if item is None or old is None:
        raise Invalid("move.workload", f"{workload[:40]!r} is not placed", "plan anew")
    start = int(state.w_start[state.slot_of[workload]])
    mark = state.begin()
    try:
        state.move(workload, seat, start if item.migratable else now_ms)
        leaving = replace(item, id=workload + LEAVING, tenant="", gang="", gang_size=0, preemptible=False)
        state.adopt(leaving, old, start)
        state.set_ending(leaving.id)
    except ValueError:
        state.undo(mark)
        raise
    state.keep(mark)


def end_move(state: State, workload: str) -> bool:
    """The workload runs at its target: its old seat is free. False where no such move is booked."""
    return state.release(workload + LEAVING)


def cancel_move(state: State, workload: str) -> bool:
    """The move failed: the workload is where it was, its target is free. False where no such move is booked."""
    old, item = state.seat(workload + LEAVING), state.workload(workload)
    if old is None or item is None:
        return False
    start = int(state.w_start[state.slot_of[workload + LEAVING]])
    mark = state.begin()
    state.release(workload + LEAVING)
    state.release(workload)
    state.adopt(item, old, start)
    state.keep(mark)
    return True


def under_way(state: State) -> list[tuple[Workload, Seat, Seat]]:
    """Moves that are booked as begun: the workload, from where, to where."""
    found = []
    for name in state.slot_of:
        if name.endswith(LEAVING):
            item, old, new = state.workload(name[:-len(LEAVING)]), state.seat(name), state.seat(name[:-len(LEAVING)])
            if item is not None and old is not None and new is not None:
                found.append((item, old, new))
    return found


def carry_out(state: State, plan: Plan, now_ms: int) -> None:
    """The state after a plan, for what-if. Raises `Invalid` where it no longer fits."""
    for move in plan.moves:
        state.move(move.workload, replace(move.seat, node=state.node_index[move.target]), now_ms)


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """A hard spread constraint that some class carries: its counter row, and [node] whose domains count."""

    row: int
    spread: Spread
    eligible: Bools


class Course:
    """A copy of the state in which moves begin and end. `now_ms` is what bookings carry."""

    def __init__(self, scheduler: Scheduler, limits: Limits, now_ms: int) -> None:
        self.state = scheduler.state.snapshot()
        self.scheduler = scheduler.on(self.state)
        self.limits, self.now_ms = limits, now_ms
        self.busy = [(item, old.node, new.node) for item, old, new in under_way(self.state)]
        """(workload, from, to) of the moves that are under way."""
        self.rules = _rules(self.state)
        self._places = self.state.attributes
        """What the nodes' labels said before `give_up`."""

    def live(self, item: Workload) -> bool:
        """Whether the workload goes on while it moves."""
        return item.migratable and self.limits.migrates

    def give_up(self, names: Sequence[str]) -> None:
        """These nodes are to be empty: they take nothing, and their domains count for no spread, as if they were gone."""
        self.state.add_nodes([replace(self.state.nodes[self.state.node_index[name]], labels=()) for name in names])
        for name in names:
            self.state.set_status(name, GONE)
        self.rules = _rules(self.state)

    def uneven(self, rows: Iterable[int] | None = None) -> dict[Rule, int]:
        """How uneven each hard spread is (of those that count in some rows)."""
        wanted = None if rows is None else set(rows)
        return {rule: skew(self.state, rule.row, rule.spread, rule.eligible)[0] for rule in self.rules if wanted is None or rule.row in wanted}

    def block(self, item: Workload, source: int, target: int) -> str:
        """Why limits or budgets keep the move from beginning now; empty where they do not."""
        limits, state = self.limits, self.state
        if any(other.id == item.id for other, _, _ in self.busy):
            return "it is being moved already"
        if len(self.busy) >= limits.total:
            return f"{limits.total} moves are under way"
        for node in (source, target):
            if sum(node in (a, b) for _, a, b in self.busy) >= limits.per_node:
                return f"{state.nodes[node].name} has {limits.per_node} moves under way"
        sites = self._sites(source, target)
        if sites is not None and sum(self._sites(a, b) == sites for _, a, b in self.busy) >= limits.per_link:
            return f"{limits.per_link} moves are under way between the two sites"
        if not self.live(item):
            for budget in state.budgets.values():
                if budget.covers(item) and sum(budget.covers(other) for other, _, _ in self.busy if not self.live(other)) >= budget.allowed:
                    return f"budget {budget.name} allows {budget.allowed} disruption{'' if budget.allowed == 1 else 's'} at a time"
        return ""

    def hinder(self, item: Workload, target: int) -> str:
        """Why the scheduler's filters, or what others need, keep the workload from the target now; empty where they do not."""
        state, seat = self.state, self.state.seat(item.id)
        assert seat is not None
        mark = state.begin()
        try:
            rows = [row for row, _ in state.klass(item.shape).spread_bumps]
            before = self.uneven(rows)
            state.release(item.id)
            text = self._unfit(item, target)
            if not text:
                klass = state.klass(item.shape)
                places = self.scheduler.seat_on(klass, target)
                assert places is not None
                state.place(item, places, self.now_ms)
                worse = next((rule for rule, new in self.uneven(rows).items() if new > max(before[rule], rule.spread.max_skew)), None)
                if worse is not None:
                    text = f"its leaving would make the spread over {worse.spread.topology_key} too uneven"
            return text or self._needed(item, seat.node, target)
        finally:
            state.undo(mark)

    def begin(self, item: Workload, target: int, start_ms: int, hop: bool = False) -> Move | str:
        """Begin a move, or say why not."""
        seat = self.state.seat(item.id)
        assert seat is not None
        why = self.block(item, seat.node, target) or self.hinder(item, target)
        if why:
            return why
        mark = self.state.begin()
        self.state.release(item.id)
        places = self.scheduler.seat_on(self.state.klass(item.shape), target)
        self.state.undo(mark)
        assert places is not None
        begin_move(self.state, item.id, places, self.now_ms)
        self.busy.append((item, seat.node, target))
        names = self.state.nodes
        carried = item.state_bytes if self.live(item) else 0
        return Move(item.id, names[seat.node].name, names[target].name, "migrate" if self.live(item) else "restart", carried, start_ms,
                    start_ms + self.duration_ms(item, seat.node, target), places, hop)

    def end_all(self) -> None:
        """All moves that are under way end."""
        for item, _, _ in self.busy:
            end_move(self.state, item.id)
        self.busy.clear()

    def duration_ms(self, item: Workload, source: int, target: int) -> int:
        """How long a move takes where as many run beside it as the limits let."""
        if not self.live(item):
            return self.limits.restart_ms
        kbps = min(self._node_kbps(source), self._node_kbps(target)) // self.limits.per_node
        sites = self._sites(source, target)
        if sites is not None:
            free = int(self.state.sites.kbps[sites] - self.state.sites.used_kbps[sites])
            kbps = min(kbps, free // self.limits.per_link)
        return -(-item.state_bytes * BITS_PER_BYTE // max(1, kbps))

    def nodes_for(self, item: Workload) -> Bools:
        """[node] where the scheduler's filters let the workload go now; its own node is not among them."""
        seat = self.state.seat(item.id)
        assert seat is not None
        mark = self.state.begin()
        self.state.release(item.id)
        fits: Bools = verdicts(self.state, self.state.klass(item.shape)) == 0
        self.state.undo(mark)
        fits[seat.node] = False
        return fits

    def _unfit(self, item: Workload, target: int) -> str:
        state = self.state
        klass = state.klass(item.shape)
        bits = int(verdicts(state, klass)[target])
        if bits == Fail.RESOURCES:
            missing = shortage(state, klass)[:, target]
            row = int(np.argmax(missing / np.maximum(state.cap[klass.resources, target], 1)))
            name = next(name for name, at in state.resource_rows.items() if at == klass.resources[row])
            return f"{state.nodes[target].name} lacks {human(name, int(missing[row]))}"
        if bits:
            return f"{state.nodes[target].name}: " + ", ".join(WORDS[flag] for flag in Fail if bits & flag)
        if self.scheduler.seat_on(klass, target) is None:
            return f"{state.nodes[target].name} has no devices or zones that come together"
        if klass.affinity is not None and self.busy:
            mark = state.begin()
            for other, _, _ in self.busy:
                end_move(state, other.id)
            alone = int(verdicts(state, state.klass(item.shape))[target])
            state.undo(mark)
            if alone & Fail.AFFINITY:
                return f"{state.nodes[target].name}: what it must be with is about to leave"
        return ""

    def _needed(self, item: Workload, source: int, target: int) -> str:
        """Whether others must be with it where it is."""
        for row, key in self.state.klass(item.shape).needed_by:
            own = sum(change for bumped, change in self.state.klass(item.shape).bumps if bumped == row)
            counts = self.state.counts[row].copy()
            counts[target] -= own
            domain = self._places.domains(key)[0]
            together = np.arange(self.state.size) == source if key == HOST else (domain == domain[source]) & (domain >= 0)
            if counts[together].any() and not together[target]:
                return f"workloads of its {key} must be with it"
        return ""

    def _sites(self, a: int, b: int) -> tuple[int, int] | None:
        first, second = sorted((int(self.state.site_of[a]), int(self.state.site_of[b])))
        return (first, second) if first >= 0 and first != second else None

    def _node_kbps(self, node: int) -> int:
        return int(self.state.cap[self.state.resource_rows["network"], node]) or self.limits.node_kbps


def _rules(state: State) -> list[Rule]:
    found: dict[tuple[int, Spread, bytes], Rule] = {}
    for klass in list(state.classes):
        if klass is None or not state.class_live[klass.id]:
            continue
        fresh = state.klass(klass.shape)
        for spread, row in zip(fresh.shape.spread, fresh.spread_rows, strict=True):
            if spread.hard:
                eligible = eligible_nodes(state, fresh.shape.spread, state.facts(fresh).affine)
                found.setdefault((row, spread, eligible.tobytes()), Rule(row, spread, eligible))
    return list(found.values())


def eligible_nodes(state: State, spreads: Iterable[Spread], affine: Bools) -> Bools:
    """[node] those whose domains count for hard spread; a node that is gone and empty has none."""
    eligible: Bools = affine & ((state.status != GONE) | (state.load > 0))
    for spread in spreads:
        if spread.hard:
            eligible = eligible & (state.attributes.domains(spread.topology_key)[0] >= 0)
    return eligible


def skew(state: State, row: int, spread: Spread, eligible: Bools) -> tuple[int, int, int]:
    """(most minus least over the domains, the fullest domain, the emptiest); the domains are -1 where there are none."""
    domain, size = state.attributes.domains(spread.topology_key)
    index = np.where(eligible, domain, size)
    there = np.bincount(index, minlength=size + 1)[:size] > 0
    if not there.any():
        return 0, -1, -1
    sums = np.bincount(index, weights=state.counts[row], minlength=size + 1)[:size]
    least = int(sums[there].min()) if int(np.count_nonzero(there)) >= spread.min_domains else 0
    fullest, emptiest = int(np.where(there, sums, -1).argmax()), int(np.where(there, sums, np.inf).argmin())
    return int(sums[fullest]) - least, fullest, emptiest


def order(course: Course, targets: Mapping[str, int]) -> Plan:
    """Steps that bring each workload to its target node. A cycle is broken through a third node, or its moves are refused with the reason."""
    state = course.state
    pending: dict[str, int] = {}
    for name, target in targets.items():
        seat = state.seat(name)
        if seat is not None and seat.node != target:
            pending[name] = target
    items = {name: item for name in pending if (item := state.workload(name)) is not None}
    queue = sorted(pending, key=lambda name: (-_share(state, items[name]), name))
    steps: list[tuple[Move, ...]] = []
    refused: list[Refused] = []
    hopped: set[str] = set()
    for name in queue[course.limits.per_plan:]:
        refused.append(_refused(state, name, pending.pop(name), f"a plan has at most {course.limits.per_plan} moves"))
    busy_before, waits, start = bool(course.busy), False, 0
    while pending:
        step: list[Move] = []
        for name in [name for name in queue if name in pending]:
            move = course.begin(items[name], pending[name], start)
            if isinstance(move, Move):
                step.append(move)
                del pending[name]
        if not step:
            if busy_before:
                course.end_all()
                busy_before, waits = False, True
                continue
            hop = _hop(course, [name for name in queue if name in pending and name not in hopped], items, pending, start)
            if hop is None:
                refused += _stuck(course, items, pending)
                break
            hopped.add(hop.workload)
            step.append(hop)
        busy_before = False
        course.end_all()
        steps.append(tuple(step))
        start = max(move.end_ms for move in step)
    return Plan(tuple(steps), tuple(refused), waits=waits)


def _share(state: State, item: Workload) -> float:
    """The largest part of the cluster's mean node that a workload asks for."""
    klass = state.klass(item.shape)
    mean = np.maximum(state.cap[klass.resources].mean(1), 1)
    return float((klass.amounts[:, 0] / mean).max(initial=0))


def _hop(course: Course, names: list[str], items: Mapping[str, Workload], pending: Mapping[str, int], start_ms: int) -> Move | None:
    """Move one workload of a cycle to a third node where that lets another begin; the one with the least to carry."""
    state = course.state
    for name in sorted(names, key=lambda name: (items[name].state_bytes, name)):
        fits = course.nodes_for(items[name])
        fits[list(pending.values())] = False
        for node in np.flatnonzero(fits).tolist():
            mark, busy = state.begin(), list(course.busy)
            move = course.begin(items[name], node, start_ms, hop=True)
            if isinstance(move, Move):
                inner = state.begin()
                course.end_all()
                helps = any(not course.hinder(items[other], pending[other]) for other in pending if other != name)
                state.undo(inner)
                course.busy = [*busy, (items[name], state.node_index[move.source], node)]
                if helps:
                    state.keep(mark)
                    return move
            state.undo(mark)
            course.busy = busy
    return None


def _stuck(course: Course, items: Mapping[str, Workload], pending: Mapping[str, int]) -> list[Refused]:
    """What is left, each with what keeps it and, in a cycle, who waits for whom."""
    state = course.state
    leaves: dict[int, list[str]] = {}
    for name in pending:
        seat = state.seat(name)
        assert seat is not None
        leaves.setdefault(seat.node, []).append(name)
    result = []
    for name, target in pending.items():
        chain = [name]
        while len(chain) <= len(pending):
            waits_for = leaves.get(pending[chain[-1]])
            if not waits_for:
                break
            chain.append(waits_for[0])
            if chain[-1] in chain[:-1]:
                break
        seat = state.seat(name)
        assert seat is not None
        why = course.block(items[name], seat.node, target) or course.hinder(items[name], target)
        if len(chain) > 1 and chain[-1] in chain[:-1]:
            why += f"; a cycle ({' waits for '.join(chain)}) and no third node can take one of them for a while"
        result.append(_refused(state, name, target, why or "it could not begin"))
    return result


def _refused(state: State, name: str, target: int, reason: str) -> Refused:
    seat = state.seat(name)
    assert seat is not None
    return Refused(name, state.nodes[seat.node].name, state.nodes[target].name, reason)
