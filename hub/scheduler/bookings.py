"""The deadline planner on the scheduler's state: what runs there becomes the timetable, a workload becomes a job. Pure.

The timetable plans with capacity, allowed nodes and time. Affinity, spread, NUMA and which devices of a node are free change until a job starts: they are the scheduler's to judge then
(`Scheduler.decide` among the nodes of the hold). GPUs are counted in thousandths per node, which is exact where jobs take whole devices.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from .arrays import UP
from .batch import MARGIN_PERMILLE, Hold, Job
from .deadline import Timetable
from .model import Kind, Shape, Workload
from .outlook import BACKFILL_DEPTH, REORDER_MAX
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
    free = room(state)
    for name in guards:
        item, seat = state.workload(name), state.seat(name)
        if item is not None and seat is not None:
            free[seat.node] += need(state, item.shape)
    over: Bools = np.logical_or.reduce(free < 0, axis=1)  # a node that became smaller than what it holds: nothing there is planned with
    needs: dict[int, Ints] = {}
    running = list[Hold]()
    for slot, item in enumerate(state.items):
        seat = state.seats[slot]
        if item is None or seat is None or item.shape.kind is not Kind.BATCH or not item.duration_ms or item.id.endswith(LEAVING) or lost[seat.node] or over[seat.node]:
            continue
        klass = int(state.w_class[slot])
        held = needs[klass] if klass in needs else needs.setdefault(klass, need(state, item.shape))
        free[seat.node] += held
        running.append(hold(item, seat.node, int(state.w_start[slot]), held, now_ms, ends.get(item.id), margin_permille))
    found = Timetable(names, [node.name for node in state.nodes], free, now_ms, human, when, reorder_most, backfill_depth)
    for each in running:
        found.adopt(each, now_ms)
    for node in np.flatnonzero(lost).tolist():
        found.node_gone(node, now_ms)
    return found


def room(state: State) -> Ints:
    """[N, R]: what is free on each node, milli-GPU last."""
    found: Ints = np.concatenate([state.free.T, np.maximum(state.gpu_free, 0).sum(1, dtype=np.int64)[:, None]], axis=1)
    return found


def hold(item: Workload, node: int, start_ms: int, held: Ints, now_ms: int, end_ms: int | None, margin_permille: int = MARGIN_PERMILLE) -> Hold:
    """What a batch job that runs since `start_ms` holds, until `end_ms` (None: its estimate with the margin), or until now where that is over."""
    assert item.duration_ms is not None
    planned = Job(item.id, tuple(held.tolist()), item.duration_ms, item.deadline_ms, item.priority, 1, margin_permille)
    return Hold(planned, (node,), start_ms, max(now_ms, start_ms + planned.planned_ms if end_ms is None else end_ms), held)


def job(state: State, item: Workload, margin_permille: int = MARGIN_PERMILLE, allowed: Bools | None = None) -> Job:
    """A batch workload as the planner sees it; a gang's member stands for all of its gang, under the gang's name. Raises `Invalid` where it does not say how long it runs.

    Args:
        allowed: [node] where it may run; None: it is looked up.
    """
    if item.duration_ms is None:
        raise Invalid("workload.duration_ms", f"{item.id} does not say how long it runs", "give an estimate in ms")
    if allowed is None:
        allowed = (state.facts(state.klass(item.shape)).fails == 0) & ~state.cordon & (state.status == UP)
    return Job(item.gang or item.id, tuple(need(state, item.shape).tolist()), item.duration_ms, item.deadline_ms, item.priority, item.gang_size or 1, margin_permille, allowed)


def need(state: State, shape: Shape) -> Ints:
    """[R]: what a workload of a shape holds, milli-GPU last. Raises `Invalid` for a resource that no node ever had."""
    gpu = shape.gpu
    found: Ints = np.append(state.klass(shape).request, gpu.count * gpu.milli if gpu is not None else 0)
    return found
