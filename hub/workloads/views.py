"""What the planner knows, as the API shows it; and what would be, if. Pure."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..scheduler import Invalid, Node, Placed, Scheduler
from ..scheduler.feasible import shortage, verdicts
from ..scheduler.rank import View
from ..scheduler.reasons import WORDS, Fail
from ..scheduler.state import GONE, SILENT
from ..scheduler.units import GPU_WHOLE, SLOTS, human
from ..store.workloads import PlacementRow, WorkloadRow
from .documents import RUNS, Submitted
from .planner import Planner

MAX_EXPLAINED = 200
"""Nodes of one explanation, those that lack least first."""

MAX_WHAT_IF = 256
"""Workloads, and nodes, of one question."""

STATUS = {0: "up", SILENT: "silent", GONE: "gone"}


def usage(planner: Planner) -> dict[str, Any]:
    """What is in use and what there is: `resources` {name: [used, capacity]}, `gpu_milli` likewise, counts of nodes and workloads. Nodes that are silent have nothing to give."""
    state = planner.state
    up = state.status == 0
    resources = {}
    for name, row in state.resource_rows.items():
        capacity = int(state.cap[row][up].sum())
        if name != SLOTS and capacity:
            resources[name] = [capacity - int(state.free[row][up].sum()), capacity]
    devices = state.gpu_free[up] if state.gpu_free.size else np.zeros((0, 0), np.int32)
    there = devices >= 0
    gpus = int(there.sum()) * GPU_WHOLE
    states = [row.state for row in planner.tables.rows.values()]
    return {
        "nodes": {
            "up": sum(planner.is_up(name) for name in planner.tables.nodes), "silent": sum(not planner.is_up(name) for name in planner.tables.nodes),
            "cordoned": sum(bool(node.cordon) for node in planner.tables.nodes.values()),
        },
        "workloads": {name: states.count(name) for name in ("pending", "placed", "ending", "done", "failed", "cancelled")},
        "resources": resources, "gpu_milli": [gpus - int(devices[there].sum()), gpus],
    }


def node_view(planner: Planner, name: str) -> dict[str, Any]:
    """One node: `resources` {name: [used, capacity]}, free milli of each GPU, what it holds."""
    row, state = planner.tables.nodes[name], planner.state
    index = state.node_index.get(name)
    shown: dict[str, Any] = {
        "node": name, "origin": row.origin, "cordon": row.cordon, "problem": row.problem, "changed_ms": row.changed_ms, "document": row.document, "runs": planner.runs(name),
        "kind": row.document.get("kind", "cloud"), "workloads": len(planner.tables.on_node.get(name, ())),
    }
    if index is None:
        return {**shown, "status": "unusable", "resources": {}, "gpus": []}
    resources = {
        resource: [int(state.cap[at, index] - state.free[at, index]), int(state.cap[at, index])] for resource, at in state.resource_rows.items()
        if state.cap[at, index] and (resource != SLOTS or state.cap[at, index] < 1 << 31)
    }
    gpus = [{"model": device.model, "memory": device.memory, "free_milli": int(state.gpu_free[index, at])} for at, device in enumerate(state.nodes[index].gpus)]
    return {**shown, "status": STATUS[int(state.status[index])], "resources": resources, "gpus": gpus}


def workload_view(planner: Planner, row: WorkloadRow) -> dict[str, Any]:
    """One workload; `seat` and `said` (the edge's last word) of its current placement, `waits_for` where another node has to stop it first."""
    current = planner.tables.open.get((row.id, row.epoch)) if row.state in ("placed", "ending") else None
    others = [planner.tables.open[row.id, epoch].node for epoch in planner.tables.epochs.get(row.id, ()) if epoch != row.epoch or current is None]
    return {
        "workload": row.id, "state": row.state, "node": row.node, "epoch": row.epoch, "reason": row.reason, "created_ms": row.created_ms, "changed_ms": row.changed_ms,
        "seat": current.seat if current else None, "said": current.said if current else "", "since_ms": current.from_ms if current else None, "waits_for": others,
        "document": row.document,
    }


def placement_view(row: PlacementRow) -> dict[str, Any]:
    """One placement, standing or past."""
    return {"epoch": row.epoch, "node": row.node, "seat": row.seat, "from_ms": row.from_ms, "to_ms": row.to_ms, "said": row.said, "why": row.why}


def explain(planner: Planner, workload: str, now_ms: int) -> dict[str, Any]:
    """Per node why it will do or will not, as if the workload were placed now: failed filters, what is missing, scores by policy."""
    row, submitted = planner.tables.rows[workload], planner.tables.items[workload]
    state = planner.state.snapshot()
    state.release(workload)
    answer: dict[str, Any] = {"workload": workload, "state": row.state, "node": row.node, "reason": row.reason, "nodes": [], "advice": []}
    scheduler = planner.scheduler.on(state)
    item = submitted.item
    try:
        scheduler.check(item)
    except Invalid as error:
        answer["advice"].append(f"{error.field} {error.problem}; {error.remedy}")
    try:
        klass = state.klass(item.shape)
    except Invalid:
        return answer
    bits = verdicts(state, klass)
    missing = shortage(state, klass)
    view = View(state, klass, state.facts(klass), bits == 0, now_ms)
    parts = scheduler.ranker.parts(view)
    total = scheduler.ranker.total(view)
    names = {at: name for name, at in state.resource_rows.items()}
    shown: list[dict[str, Any]] = []
    for name in planner.tables.nodes:
        index = state.node_index.get(name)
        if index is None:
            continue
        failed = []
        for flag in Fail:
            if bits[index] & flag:
                failed.append({"filter": (flag.name or "").lower(), "text": WORDS[flag]})
        if item.shape.kind.value not in planner.runs(name):
            words = {"filter": "driver", "text": f"no driver for {item.shape.kind.value} on this node"}
            others = [entry for entry in failed if entry["filter"] != "node_affinity"] if _only_runs(planner, item.shape.node_selector, item.shape.node_terms, name) else failed
            failed = [words, *others]
        lacks = {names[int(at)]: int(missing[place, index]) for place, at in enumerate(klass.resources) if missing[place, index] > 0}
        until, _, why = row.avoid.get(name, [0, 0, ""])
        shown.append({
            "node": name, "fits": not failed and until <= now_ms, "failed": failed, "missing": lacks, "score": int(total[index]) if not failed else None,
            "parts": {policy: {"weight": weight, "score": int(scores[index])} for policy, weight, scores in parts} if not failed else {},
            "avoided_until_ms": until if until > now_ms else None, "avoided_why": why if until > now_ms else "",
        })
    shown.sort(key=lambda entry: (not entry["fits"], len(entry["failed"]), -(entry["score"] or 0), entry["node"]))
    answer["nodes"] = shown[:MAX_EXPLAINED]
    nearest = next((entry for entry in shown if len(entry["failed"]) == 1), None)
    if row.state == "pending" and nearest is not None and not any(entry["fits"] for entry in shown):
        short = ", ".join(human(resource, amount) for resource, amount in nearest["missing"].items())
        answer["advice"].append(f"{nearest['node']} is nearest: {nearest['failed'][0]['text']}" + (f", {short} missing" if short else ""))
    return answer


def _only_runs(planner: Planner, selector: Sequence[tuple[str, str]], terms: Any, node: str) -> bool:
    """Whether the missing driver alone makes the node's labels not match."""
    labels = dict(planner.state.nodes[planner.state.node_index[node]].labels)
    return terms is None and all(labels.get(key) == value for key, value in selector if not key.startswith(RUNS))


def what_if(trial: Scheduler, entries: Sequence[Submitted], lose: Sequence[str], add: Sequence[Node], now_ms: int) -> dict[str, Any]:
    """What would become of it, on a snapshot: nodes added, then lost, then workloads added. Raises `Invalid`."""
    state = trial.state
    for name in lose:
        if name not in state.node_index or state.status[state.node_index[name]] == GONE:
            raise Invalid("lose", f"{name[:64]!r} is no node", "list /api/v1/nodes")
    for node in add:
        if node.name in state.node_index and state.status[state.node_index[node.name]] != GONE:
            raise Invalid("add", f"{node.name!r} is a node already", "give it another name")
    if add:
        state.add_nodes(add, now_ms)
    moved, waiting, placed = [], [], []
    for name in lose:
        for item in trial.vanish(name, now_ms):
            if item.to is not None:
                moved.append({"workload": item.workload, "from": item.source, "to": item.to, "how": item.how})
            else:
                waiting.append({"workload": item.workload, "from": item.source, "reason": item.reason})
    for entry in entries:
        try:
            outcome = trial.reserve(entry.item, now_ms)
        except Invalid as error:
            waiting.append({"workload": entry.item.id, "from": "", "reason": f"{error.field} {error.problem}; {error.remedy}"})
            continue
        if isinstance(outcome, Placed):
            placed.append({"workload": entry.item.id, "node": outcome.node, "gpus": [int(gpu) for gpu in outcome.seat.gpus]})
        else:
            waiting.append({"workload": entry.item.id, "from": "", "reason": outcome.reason})
    return {"placed": placed, "waiting": waiting, "moved": moved}

