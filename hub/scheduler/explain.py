"""Why a workload is where it is, or nowhere: per node the failed filters, how far off it is, the parts of its score, and what would make it fit."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from . import preempt, quota
from .classes import Klass
from .feasible import shortage, verdicts
from .model import Effect, Workload
from .place import Scheduler, tally
from .rank import View
from .reasons import WORDS, Bits, Fail
from .state import State
from .units import CPU, human

MAX_TRIED = 3
"""Nodes on which moving others away is tried: each costs a decision per workload moved."""

MAX_MOVES = 8
"""Workloads that would be moved at most to make room: beyond that it is no answer."""


@dataclass(frozen=True, slots=True)
class NodeAnswer:
    """One node. `failed`: names of filters (empty: it will do); `why`: a sentence each; `parts`: policy to (weight, score); `remedy`: all that would make it fit."""

    node: str
    failed: tuple[str, ...]
    why: tuple[str, ...]
    shortage: float
    score: int | None = None
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    remedy: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Explanation:
    """`place`: the node it is on; `summary`: one sentence; `failed`: filter to number of nodes; `nodes`: the best that will do, then the nearest misses.

    `making_room`: what preemption would do where no node will do.
    """

    workload: str
    place: str | None
    summary: str
    failed: dict[str, int]
    nodes: tuple[NodeAnswer, ...]
    making_room: str = ""


def explain(scheduler: Scheduler, workload: Workload, now_ms: int, limit: int = 20) -> Explanation:
    """Work it out for up to `limit` nodes, changing nothing. A workload that is placed is looked at as if it were to be placed now."""
    state = scheduler.state
    seat = state.seat(workload.id)
    mark = state.begin()
    try:
        state.release(workload.id)
        return _explain(scheduler, workload, now_ms, limit, None if seat is None else state.nodes[seat.node].name)
    finally:
        state.undo(mark)


def _explain(scheduler: Scheduler, workload: Workload, now_ms: int, limit: int, place: str | None) -> Explanation:
    state = scheduler.state
    klass = state.klass(workload.shape)
    bits = verdicts(state, klass)
    feasible = bits == 0
    missing = shortage(state, klass)
    relative = (missing / np.maximum(state.cap[klass.resources], klass.amounts)).max(0) if missing.size else np.zeros(state.size)
    view = View(state, klass, state.facts(klass), feasible, now_ms)
    parts = scheduler.ranker.parts(view) if feasible.any() else []
    total = scheduler.ranker.total(view)
    failed_filters = np.array([int(item).bit_count() for item in bits.tolist()])
    order = np.lexsort((state.tie, relative, failed_filters, -total))[:limit].tolist()
    tried = 0
    answers = []
    for node in order:
        remedy: tuple[str, ...] = ()
        if bits[node]:
            only_room = not int(bits[node]) & ~int(Fail.RESOURCES | Fail.GPU | Fail.NUMA)
            moving = _by_moving(scheduler, workload, node, now_ms) if only_room and tried < MAX_TRIED else None
            tried += only_room
            remedy = (moving,) if moving is not None else remedies(state, klass, node, bits)
        answers.append(NodeAnswer(
            state.nodes[node].name, tuple(flag.name or "" for flag in Fail if int(bits[node]) & flag), reasons(state, klass, node, bits), round(float(relative[node]), 4),
            int(total[node]) if feasible[node] else None, {name: (weight, int(scores[node])) for name, weight, scores in parts} if feasible[node] else {}, remedy,
        ))
    failed = tally(bits)
    refused = quota.refusal(state, workload)
    count = int(np.count_nonzero(feasible))
    if refused is not None and place is None:
        summary = f"quota: {refused}; {count} of {state.size} nodes would do"
    elif place is not None:
        summary = f"on {place}; {count} of {state.size} nodes would do"
    elif count:
        summary = f"{count} of {state.size} nodes will do"
    else:
        summary = f"0 of {state.size} nodes will do: " + "; ".join(f"{number}: {WORDS[Fail[name]]}" for name, number in failed.items())
    making_room = preempt.outlook(scheduler, workload) if not count and place is None and refused is None else ""
    return Explanation(workload.id, place, summary, failed, tuple(answers), making_room)


def reasons(state: State, klass: Klass, node: int, bits: Bits) -> tuple[str, ...]:
    """A sentence per failed filter of one node, with figures where there are any."""
    found = []
    for flag in Fail:
        if not int(bits[node]) & flag:
            continue
        if flag is Fail.RESOURCES:
            names = list(state.resource_rows)
            found += [
                f"{names[row]}: {human(names[row], int(klass.amounts[at, 0]))} wanted, {human(names[row], max(0, int(state.free[row, node])))} free of {human(names[row], int(state.cap[row, node]))}"
                for at, row in enumerate(klass.resources.tolist()) if state.free[row, node] < klass.amounts[at, 0]
            ]
        elif flag is Fail.TAINT:
            found += [f"taint {taint} is not tolerated" for taint in _untolerated(state, klass, node)]
        elif flag is Fail.GPU and klass.shape.gpu is not None:
            free = [int(milli) for milli in state.gpu_free[node] if milli >= 0]
            found.append(f"{klass.shape.gpu.count} GPU with {klass.shape.gpu.milli} milli each wanted, free are {free}")
        else:
            found.append(WORDS[flag])
    return tuple(found)


def _untolerated(state: State, klass: Klass, node: int) -> list[str]:
    return [
        f"{taint.key}={taint.value}:{taint.effect}" for taint in state.nodes[node].taints
        if taint.effect is not Effect.PREFER_NO_SCHEDULE and not any(item.tolerates(taint) for item in klass.shape.tolerations)
    ]


def remedies(state: State, klass: Klass, node: int, bits: Bits) -> tuple[str, ...]:
    """All of these together make the node do; empty where nobody can change it."""
    found: list[str] = []
    shape = klass.shape
    for flag in Fail:
        if not int(bits[node]) & flag:
            continue
        if flag is Fail.TAINT:
            found += [f"tolerate {taint}" for taint in _untolerated(state, klass, node)]
        elif flag is Fail.CORDONED:
            found.append("uncordon the node")
        elif flag is Fail.DOWN:
            found.append("bring the node back")
        elif flag is Fail.RESOURCES:
            names = list(state.resource_rows)
            for at, row in enumerate(klass.resources.tolist()):
                short = int(klass.amounts[at, 0]) - int(state.free[row, node])
                if short > 0:
                    able = int(klass.amounts[at, 0]) <= int(state.cap[row, node])
                    found.append(f"free {human(names[row], short)}" if able else f"ask for at most {human(names[row], int(state.cap[row, node]))}")
        elif flag is Fail.RESIDENCY:
            found.append(f"allow region {dict(state.nodes[node].labels).get('region', '(none)')}")
        elif flag is Fail.KIND:
            found.append(f"allow nodes of kind {state.nodes[node].kind}")
        elif flag is Fail.NODE_AFFINITY:
            labels = dict(state.nodes[node].labels)
            wrong = [f"label the node {key}={value} (it has {labels.get(key, 'none')})" for key, value in shape.node_selector if labels.get(key) != value]
            found += wrong or ["change the node affinity, or the node's labels"]
        elif flag is Fail.GPU_MODEL:
            found.append(f"allow a GPU of {sorted({device.model for device in state.nodes[node].gpus})}" if state.nodes[node].gpus else "choose a node with GPUs")
        elif flag is Fail.GPU:
            found.append("free GPU devices of the node")
        elif flag is Fail.NUMA:
            found.append("allow more than one NUMA zone" if int(state.free[0, node]) >= shape.request_map.get(CPU, 0) else "free a NUMA zone")
        else:
            found.append({
                Fail.AFFINITY: "place the workloads that it must be with first", Fail.ANTI_AFFINITY: "move the workloads away that it must be apart from",
                Fail.EXCLUDED: "move the workload away that keeps it off", Fail.SPREAD: "allow a larger skew, or level the other domains first",
                Fail.SPREAD_KEY: "label the node with the topology key", Fail.LINK: "allow a longer way, or a narrower one",
            }[flag])
    return tuple(found)


def _by_moving(scheduler: Scheduler, workload: Workload, node: int, now_ms: int) -> str | None:
    """What becomes of the node when workloads that can be migrated go elsewhere, largest first: as few as will do, None where that does not help."""
    state = scheduler.state
    klass = state.klass(workload.shape)
    others = sorted((item for item in state.on_node(node) if item.migratable), key=lambda item: (-_use(state, klass, item), item.id))
    among = np.ones(state.size, np.bool_)
    among[node] = False
    mark = state.begin()
    moved: list[Workload] = []
    try:
        for item in others[: 4 * MAX_MOVES]:
            if len(moved) >= MAX_MOVES:
                return None
            if scheduler.relocate(item.id, now_ms, among) is not None:
                moved.append(item)
            if moved and not verdicts(state, klass)[node]:
                break
        else:
            return None
        needed = _fewest(scheduler, workload, node, moved, now_ms)
    finally:
        state.undo(mark)
    kinds = {item.shape.kind for item in needed}
    name = f"{next(iter(kinds)).upper() if kinds == {'vm'} else 'workload'}{'s' if len(needed) > 1 else ''}".replace("VMS", "VMs")
    return f"after moving {len(needed)} {name}, {human('memory', sum(item.state_bytes for item in needed))}"


def _use(state: State, klass: Klass, item: Workload) -> float:
    request = state.klass(item.shape).request[klass.resources]
    return float((request / klass.amounts[:, 0]).max(initial=0)) + (1.0 if klass.shape.gpu is not None and item.shape.gpu is not None else 0.0)


def _fewest(scheduler: Scheduler, workload: Workload, node: int, moved: Sequence[Workload], now_ms: int) -> list[Workload]:
    """Without those among the moved that could stay after all."""
    state = scheduler.state
    klass = state.klass(workload.shape)
    needed = list(moved)
    only = np.zeros(state.size, np.bool_)
    only[node] = True
    for item in reversed(moved):
        mark = state.begin()
        back = scheduler.relocate(item.id, now_ms, only)
        if back is not None and not verdicts(state, klass)[node]:
            state.keep(mark)
            needed.remove(item)
        else:
            state.undo(mark)
    return needed
