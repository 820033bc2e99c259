"""The deadline planner on the scheduler's state: what runs there becomes the timetable, a workload becomes a job. Pure.

The timetable plans with capacity, allowed nodes and time. Affinity, spread, NUMA and which devices of a node are free change until a job starts: they are the scheduler's to judge then
(`Scheduler.decide` among the nodes of the hold). GPUs are counted in thousandths per node, which is exact where jobs take whole devices.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from .arrays import UP
from .batch import MARGIN_PERMILLE, Hold, Job
from .deadline import BACKFILL_DEPTH, REORDER_MAX, Timetable
from .model import Kind, Workload
from .reasons import Bools, Ints
from .state import State
from .units import LEAVING, Invalid, human

GPU_COLUMN = "milli-GPU"


def timetable(state: State, now_ms: int, margin_permille: int = MARGIN_PERMILLE, *, ends: Mapping[str, int] | None = None, guards: Iterable[str] = (), gone: Bools | None = None,
              when: Callable[[int], str] | None = None, reorder_most: int = REORDER_MAX, backfill_depth: int = BACKFILL_DEPTH) -> Timetable:
    """Of a state: batch jobs that run and say for how long, everything else held for ever. A job over its time is taken to end now: the next turn extends it.

    Args:
        ends: until when jobs are expected to run, ms; where one is not named: its estimate from its start, with the margin.
        guards: entries of the state that only keep room for reservations: it is free for these.
        gone: [node] those that are not there; None: those that are not up.
    """
    names, ends = (*state.resource_rows, GPU_COLUMN), ends or {}
    lost = state.status != UP if gone is None else gone
    free = np.concatenate([state.free.T, np.maximum(state.gpu_free, 0).sum(1, dtype=np.int64)[:, None]], axis=1)
    for name in guards:
        item, seat = state.workload(name), state.seat(name)
        if item is not None and seat is not None:
            free[seat.node] += _need(state, item)
    over: Bools = np.logical_or.reduce(free < 0, axis=1)  # a node that became smaller than what it holds: nothing there is planned with
    needs: dict[int, Ints] = {}
    running = list[Hold]()
    for slot, item in enumerate(state.items):
        seat = state.seats[slot]
        if item is None or seat is None or item.shape.kind is not Kind.BATCH or not item.duration_ms or item.id.endswith(LEAVING) or lost[seat.node] or over[seat.node]:
            continue
        klass = int(state.w_class[slot])
        need = needs[klass] if klass in needs else needs.setdefault(klass, _need(state, item))
        free[seat.node] += need
        planned = Job(item.id, tuple(need.tolist()), item.duration_ms, item.deadline_ms, item.priority, 1, margin_permille)
        start = int(state.w_start[slot])
        running.append(Hold(planned, (seat.node,), start, max(now_ms, ends.get(item.id, start + planned.planned_ms)), need))
    found = Timetable(names, [node.name for node in state.nodes], free, now_ms, human, when, reorder_most, backfill_depth)
    found.adopt_all(running, now_ms)
    for node in np.flatnonzero(lost).tolist():
        found.node_gone(node, now_ms)
    return found


def job(state: State, item: Workload, margin_permille: int = MARGIN_PERMILLE) -> Job:
    """A batch workload as the planner sees it; a gang's member stands for all of its gang, under the gang's name. Raises `Invalid` where it does not say how long it runs."""
    if item.duration_ms is None:
        raise Invalid("workload.duration_ms", f"{item.id} does not say how long it runs", "give an estimate in ms")
    klass = state.klass(item.shape)
    allowed = (state.facts(klass).fails == 0) & ~state.cordon & (state.status == UP)
    return Job(item.gang or item.id, tuple(_need(state, item).tolist()), item.duration_ms, item.deadline_ms, item.priority, item.gang_size or 1, margin_permille, allowed)


def _need(state: State, item: Workload) -> Ints:
    gpu = item.shape.gpu
    need: Ints = np.append(state.klass(item.shape).request, gpu.count * gpu.milli if gpu is not None else 0)
    return need
