"""A waiting backlog placed together: greedy, then an integer programme that finds the best placement and proves it, then, where it proves nothing, destroy and repair.

Objective, lexicographic: for each priority from the highest down how many workloads of the backlog are placed; then the least sum of the policy points that placements
miss, where the nodes that would do in an empty cluster set the scale (`improve.points`), plus the soft spreads' excess skew.

No method is believed: its placements count only where the state's own filters take them one by one, and only where they are no worse than what stood before. What runs
already is never moved. Work is bounded by nodes and steps, not by time: the same backlog, state and seed give the same placements.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from . import quota
from .arrays import Seat
from .feasible import verdicts
from .improve import MAX_BACKLOG, SKEW_POINTS, STEPS_PER_WORKLOAD, Backlog, Weights
from .model import Workload
from .optimum import EFFORT, Optimum, optimum
from .place import Pending, Placed, Scheduler
from .programme import Programme, Wanted
from .units import Invalid


@dataclass(frozen=True)
class Result:
    """`placed` in the order of the backlog; `value`: workloads per priority (highest first), then minus the points missed."""

    placed: dict[str, Placed]
    pending: dict[str, Pending]
    value: tuple[int, ...]
    greedy: tuple[int, ...]
    """The value before improvement."""
    bound: tuple[int, ...] | None
    """No placement of the backlog has a larger value; None where nothing is known."""
    nodes: int
    """Explored by branch and bound."""
    steps: int
    """Of destroy and repair."""

    @property
    def proven(self) -> bool:
        """Whether no placement is better."""
        return self.value == self.bound


def place_together(
    scheduler: Scheduler, workloads: Sequence[Workload], now_ms: int, *, seed: int = 0, steps: int | None = None, effort: int = EFFORT, weights: Weights | None = None
) -> Result:
    """Place a backlog. Every unit that finds no place is pending, with the reason as the cluster then stands; so is what the cluster could never hold.

    `effort` of branch and bound for each priority and for the points (`optimum.EFFORT`), 0 for none; `steps` of destroy and repair, by default none after a programme that was solved as one.
    """
    pending: dict[str, Pending] = {}
    for workload in workloads:
        try:
            scheduler.check(workload)
        except Invalid as error:
            pending[workload.id] = Pending(workload.id, str(error))
    hopeless = {workload.gang for workload in workloads if workload.gang and workload.id in pending}
    possible = [workload for workload in workloads if workload.id not in pending and workload.gang not in hopeless]
    # Tried out on a snapshot: the cluster sees only where the backlog goes in the end.
    trial = scheduler.on(scheduler.state.snapshot())
    backlog = Backlog(trial, possible, now_ms, seed, weights or Weights(), {workload.priority for workload in workloads})
    programme = _programme(trial, backlog) if effort else None
    backlog.greedy()
    start = backlog.value()
    best, taken = _best(backlog, programme, effort) if programme is not None else (None, False)
    bound = _bound(backlog, programme, best) if programme is not None and programme.exact and best is not None else None
    if backlog.value() == bound:
        steps = 0
    elif steps is None:
        # After an exact programme that was solved as one they find nothing more: measured on 100 workloads and 35 nodes.
        done = taken and bound is not None and best is not None and best.whole
        steps = 0 if done or len(possible) > MAX_BACKLOG else STEPS_PER_WORKLOAD * len(possible)
    before, kept = backlog.value(), backlog.seats()
    found = backlog.improve(steps)
    mark = scheduler.state.begin()
    placed = _settle(scheduler, backlog, found)
    if backlog.value() < before:
        # Repaired into something that comes about in no order; what stood before does.
        scheduler.state.undo(mark)
        mark = scheduler.state.begin()
        placed = _settle(scheduler, backlog, kept)
    scheduler.state.keep(mark)
    for workload in workloads:
        if workload.id in pending or workload.id in placed:
            continue
        if workload.gang in hopeless:
            pending[workload.id] = Pending(workload.id, f"gang {workload.gang} has a member that no node could ever hold")
            continue
        refused = quota.refusal(scheduler.state, workload)
        pending[workload.id] = Pending(workload.id, refused) if refused else scheduler.pending(scheduler.decide(workload, now_ms))
    return Result(placed, pending, backlog.value(), start, bound, best.nodes if best is not None else 0, steps)


def _programme(trial: Scheduler, backlog: Backlog) -> Programme | None:
    """None where the backlog is too large for one."""
    wanted = [Wanted(item.workload, item.klass, item.points, item.unit) for item in backlog.items]
    try:
        return Programme(trial, wanted, backlog.weights.topology_spread * SKEW_POINTS)
    except Invalid:
        return None


def _best(backlog: Backlog, programme: Programme, effort: int) -> tuple[Optimum | None, bool]:
    """What the solver found, and whether the state took it and it is no worse; None where the solver is not installed, has too little effort or finds nothing."""
    try:
        best = optimum(programme, programme.values(backlog.seats()), effort, backlog.rng)
    except ImportError:
        best = None
    if best is None:
        return None, False
    state, before = backlog.state, backlog.value()
    mark = state.begin()
    for item in backlog.items:
        state.release(item.workload.id)
    try:
        commit(backlog.scheduler, [item.workload for item in backlog.items], programme.seats(best.columns), backlog.now_ms)
        better = backlog.value() >= before
    except Invalid:
        better = False
    if better:
        state.keep(mark)
    else:
        state.undo(mark)
    return best, better


def _settle(scheduler: Scheduler, backlog: Backlog, seats: dict[str, Seat]) -> dict[str, Placed]:
    """Seats made true in the cluster, and the backlog's trial made to hold the same. Gives them in the order of the backlog."""
    workloads = [item.workload for item in backlog.items]
    placed = commit(scheduler, workloads, seats, backlog.now_ms)
    for workload in workloads:
        backlog.state.release(workload.id)
    for workload in workloads:
        if workload.id in placed:
            backlog.state.adopt(workload, seats[workload.id], backlog.now_ms)
    return {workload.id: placed[workload.id] for workload in workloads if workload.id in placed}


def _bound(backlog: Backlog, programme: Programme, best: Optimum) -> tuple[int, ...]:
    """In the terms of `Result.value`: priorities of which nothing can be placed have no level in the programme."""
    levels = dict(zip(programme.levels, best.bound, strict=False))
    return (*(levels.get(level, 0) for level in backlog.levels), best.bound[-1])


def commit(scheduler: Scheduler, workloads: Sequence[Workload], seats: dict[str, Seat], now_ms: int) -> dict[str, Placed]:
    """The seats that were found, in their order, each when its constraints hold in the cluster as it then stands: company first, spreads level by level.

    What holds together but comes about in no order is left out, gangs as a whole. Raises `Invalid` for a seat without room, having changed nothing.
    """
    state = scheduler.state
    by_id = {workload.id: workload for workload in workloads}
    wanted = [by_id[name] for name in seats]
    while True:
        mark = state.begin()
        waiting, placed = wanted, dict[str, Placed]()
        while waiting:
            later = []
            for workload in waiting:
                seat = seats[workload.id]
                if verdicts(state, state.klass(workload.shape))[seat.node] or quota.refusal(state, workload) is not None:
                    later.append(workload)
                    continue
                try:
                    state.place(workload, seat, now_ms)
                except Invalid:
                    state.undo(mark)
                    raise
                placed[workload.id] = Placed(workload.id, state.nodes[seat.node].name, seat)
            if len(later) == len(waiting):
                break
            waiting = later
        if not waiting:
            state.keep(mark)
            return placed
        state.undo(mark)
        stuck = {workload.gang or workload.id for workload in waiting}
        wanted = [workload for workload in wanted if (workload.gang or workload.id) not in stuck]
