"""What the planner knows, as the API shows it. Pure."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_runtime.contract.workloads import AS_CONTAINER, CONVERTS, RUNNING

from ..scheduler import Invalid, Shape
from ..scheduler import explain as explaining
from ..scheduler.arrays import GONE, SILENT, UNLIMITED_SLOTS
from ..scheduler.model import GPU_MILLI
from ..scheduler.reasons import WORDS, Fail
from ..scheduler.units import GPU_WHOLE, SLOTS, human
from ..store.workloads import PlacementRow, WorkloadRow
from .documents import RUNS
from .planner import Planner

MAX_EXPLAINED = 50
"""Nodes of one explanation, those that lack least first."""

STATUS = {0: "up", SILENT: "silent", GONE: "gone"}


def usage(planner: Planner) -> dict[str, Any]:
    """What is in use and what there is: `resources` {name: [used, capacity]}, `gpu_milli` likewise, what of the rest is `reserved` for jobs that start later, counts of nodes and workloads. Nodes that are silent have nothing to give."""
    state = planner.state
    up = state.status == 0
    resources: dict[str, list[int]] = {}
    kept: Counter[str] = Counter()
    for node in planner.tables.guards:
        if planner.is_up(node):
            kept.update(_kept(planner, node))
    for name, row in state.resource_rows.items():
        capacity = int(state.cap[row][up].sum())
        if name != SLOTS and capacity:
            resources[name] = [capacity - int(state.free[row][up].sum()) - kept.get(name, 0), capacity]
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
        "resources": resources, "gpu_milli": [gpus - int(devices[there].sum()) - kept[GPU_MILLI], gpus], "reserved": dict(kept),
    }


def _kept(planner: Planner, node: str) -> dict[str, int]:
    """What a node keeps free for jobs that start later."""
    found: Counter[str] = Counter()
    for shape, gpus in planner.tables.guards.get(node, ()):
        found.update({name: amount for name, amount in shape.requests if name != SLOTS})
        if shape.gpu is not None:
            found[GPU_MILLI] += shape.gpu.milli * len(gpus)
    return dict(found)


def nodes_view(planner: Planner, names: Sequence[str]) -> list[dict[str, Any]]:
    """Nodes: `resources` {name: [used, capacity]}, what of the rest is `reserved` for jobs that start later, free milli of each GPU, what each holds."""
    state = planner.state
    capacity, used, gpu_free = state.cap.T.tolist(), (state.cap - state.free).T.tolist(), state.gpu_free.tolist()  # a list is read a hundred times faster than an array
    shown = []
    for name in names:
        row, index = planner.tables.nodes[name], state.node_index.get(name)
        one: dict[str, Any] = {
            "node": name, "origin": row.origin, "cordon": row.cordon, "problem": row.problem, "changed_ms": row.changed_ms, "document": row.document, "runs": planner.runs(name),
            "kind": row.document.get("kind", "cloud"), "workloads": len(planner.tables.on_node.get(name, ())), "status": "unusable", "resources": {}, "gpus": [], "reserved": _kept(planner, name),
        }
        if index is not None:
            one["status"] = STATUS[int(state.status[index])]
            one["resources"] = {
                resource: [used[index][at] - one["reserved"].get(resource, 0), there] for resource, at in state.resource_rows.items() if (there := capacity[index][at]) and (resource != SLOTS or there < UNLIMITED_SLOTS)
            }
            kept_milli: Counter[int] = Counter()
            for shape, gpus in planner.tables.guards.get(name, ()):
                kept_milli.update({gpu: shape.gpu.milli for gpu in gpus if shape.gpu is not None})
            one["gpus"] = [{"model": device.model, "memory": device.memory, "free_milli": gpu_free[index][at] + kept_milli[at]} for at, device in enumerate(state.nodes[index].gpus)]
        shown.append(one)
    return shown


def workload_view(planner: Planner, row: WorkloadRow) -> dict[str, Any]:
    """One workload; `seat` and `said` (the edge's last word) of its current placement, `load_ms` that its start took where that was measured, `form` what one that can be converted is
    now, `moved_from` where a site that was cut off moved it by itself, `waits_for` where another node has to stop it first."""
    current = planner.tables.open.get((row.id, row.epoch)) if row.state in ("placed", "ending") else None
    others = [planner.tables.open[row.id, epoch].node for epoch in planner.tables.epochs.get(row.id, ()) if epoch != row.epoch or current is None]
    return {
        "workload": row.id, "state": row.state, "node": row.node, "epoch": row.epoch, "reason": row.reason, "created_ms": row.created_ms, "changed_ms": row.changed_ms,
        "seat": current.seat if current else None, "said": current.said if current else "", "since_ms": current.from_ms if current else None, "waits_for": others,
        "load_ms": current.seat.get("load_ms") if current else None, "form": _form(row, current), "moved_from": current.seat.get("site", {}).get("origin", "") if current else "",
        **_planned(row), "document": row.document,
    }


def _form(row: WorkloadRow, current: PlacementRow | None) -> str:
    """What one that can be converted is now; empty of others, and where it does not run."""
    converts = (row.document.get("spec") or {}).get(CONVERTS) is True
    return str(current.seat.get("form", AS_CONTAINER)) if converts and current is not None and current.said == RUNNING else ""


def _planned(row: WorkloadRow) -> dict[str, Any]:
    """Of a batch job that says how long it runs: when it starts or started, until when its room is held, where, by how much it misses its deadline; null where nothing is planned."""
    start, end, deadline = row.plan.get("start_ms"), row.plan.get("end_ms"), row.document.get("deadline_ms")
    return {
        "planned_ms": start, "planned_end_ms": end, "planned_nodes": row.plan.get("nodes", []), "late_ms": max(0, end - deadline) if end is not None and deadline is not None else None,
        "late_because": row.plan.get("because", ""),
    }


def placement_view(row: PlacementRow) -> dict[str, Any]:
    """One placement, standing or past."""
    return {"epoch": row.epoch, "node": row.node, "seat": row.seat, "from_ms": row.from_ms, "to_ms": row.to_ms, "said": row.said, "why": row.why}


def explain(planner: Planner, workload: str, now_ms: int) -> dict[str, Any]:
    """Per node why it will do or will not, as if the workload were placed now: failed filters, sentences, what would make it fit, scores by policy, what a start took or is expected to take there (ms)."""
    row, item = planner.tables.rows[workload], planner.tables.items[workload].item
    image = item.shape.image
    answer: dict[str, Any] = {
        "workload": workload, "state": row.state, "node": row.node, "reason": row.reason, **_planned(row), "cold_start_ms": planner.loads.cold_ms(image), "summary": "", "failed": {}, "nodes": [],
        "advice": [],
    }
    expected = planner.loads.expected_ms(image, planner.state)
    trial = planner.scheduler.on(planner.state.snapshot())
    try:
        trial.check(item)
    except Invalid as error:
        answer["advice"].append(f"{error.field} {error.problem}; {error.remedy}")
    try:
        said = explaining.explain(trial, item, now_ms, MAX_EXPLAINED)
    except Invalid as error:  # a resource that no node ever had
        answer["summary"] = f"{error.problem}; {error.remedy}"
        return answer
    for node in said.nodes:
        if node.node not in planner.tables.nodes:
            continue  # it was taken out
        failed, why, remedy = list(node.failed), list(node.why), [text for text in node.remedy if RUNS not in text]
        if item.shape.kind.value not in planner.runs(node.node):
            if "NODE_AFFINITY" in failed and _only_runs(planner, item.shape, node.node):
                failed.remove("NODE_AFFINITY")
                why.remove(WORDS[Fail.NODE_AFFINITY])
            failed, why = ["DRIVER", *failed], [f"no driver for {item.shape.kind.value} on this node", *why]
            remedy.insert(0, f"give the node a driver for {item.shape.kind.value}")
        reserved = _kept(planner, node.node)
        if reserved and failed:
            why = [*why, f"reserved here for jobs that start later: {', '.join(human(name, amount) for name, amount in reserved.items())}"]
        until, _, refusal = row.avoid.get(node.node, [0, 0, ""])
        if until > now_ms:
            failed, why = [*failed, "REFUSED"], [*why, f"left alone for {(until - now_ms) // 1000} s more: {refusal}"]
        answer["nodes"].append({
            "node": node.node, "fits": not failed, "failed": [name.lower() for name in failed], "why": why, "remedy": remedy, "shortage": node.shortage, "score": node.score,
            "parts": {policy: {"weight": weight, "score": score} for policy, (weight, score) in node.parts.items()}, "load_ms": planner.loads.measured_ms(image, node.node),
            "expected_load_ms": None if expected is None else round(float(expected[planner.state.node_index[node.node]]), 3),
        })
    if said.making_room and not row.node:
        answer["advice"].append(said.making_room)
    return {**answer, "summary": said.summary, "failed": {name.lower(): count for name, count in said.failed.items()}}


def _only_runs(planner: Planner, shape: Shape, node: str) -> bool:
    """Whether the missing driver alone makes the node's labels not match."""
    labels = dict(planner.state.nodes[planner.state.node_index[node]].labels)
    return shape.node_terms is None and all(labels.get(key) == value for key, value in shape.node_selector if not key.startswith(RUNS))
