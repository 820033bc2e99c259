"""An independent look at what a hub kept of placements: nothing of the scheduler's code, only the rows of hub.db and desired state documents.

`overcommit`: node-seconds in which the placements of a node together held more than it has, by the intervals of the log. `doubles`: workloads that held two places at one
time without the older being on its way out, or that two documents want running. `lost`: what was acknowledged and is in no row.
"""

import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

SUFFIXES: dict[str, Fraction | int] = {"": 1, "m": Fraction(1, 1000), "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def amount(text: Any) -> Fraction:
    """`500m`, `4Gi`, 2, 0.5 as an exact number."""
    if isinstance(text, int | float):
        return Fraction(str(text))
    body = text.rstrip("kMGTim")
    return Fraction(body) * SUFFIXES[text[len(body):]]


@dataclass(frozen=True, slots=True)
class Held:
    """One placement: what it held, where, when (ms; `to_ms` None: still)."""

    workload: str
    epoch: int
    node: str
    gpus: tuple[int, ...]
    from_ms: int
    to_ms: int | None


@dataclass(slots=True)
class Log:
    """Everything kept: workloads (id to state, epoch, document), placements, nodes (name to document)."""

    workloads: dict[str, tuple[str, int, dict[str, Any]]] = field(default_factory=dict)
    placements: list[Held] = field(default_factory=list)
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    agents: set[str] = field(default_factory=set)


def read(path: Path) -> Log:
    """From a hub.db that nobody writes, or that is being written: one read transaction."""
    log = Log()
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        db.execute("BEGIN")
        for name, document, state, epoch in db.execute("SELECT id, document, state, epoch FROM workloads"):
            log.workloads[name] = state, epoch, json.loads(document)
        for workload, epoch, node, seat, since, until in db.execute("SELECT workload, epoch, node, seat, from_ms, to_ms FROM placements"):
            log.placements.append(Held(workload, epoch, node, tuple(json.loads(seat).get("gpus", ())), since, until))
        for name, origin, document in db.execute("SELECT name, origin, document FROM nodes"):
            log.nodes[name] = json.loads(document)
            if origin == "edge":
                log.agents.add(name)
    return log


def asked(document: Mapping[str, Any], gpus: Iterable[int]) -> dict[str, Fraction]:
    """What one placement holds, by resource; each GPU device is a resource of its own."""
    found = {name: amount(value) for name, value in document.get("requests", {}).items()}
    gpu: dict[str, Any] = document.get("gpu") or {}
    for device in gpus if gpu else ():
        found[f"gpu {device}"] = Fraction(gpu.get("milli", 1000))
        found[f"gpu memory {device}"] = amount(gpu.get("memory", 0))
    return found


def has(document: Mapping[str, Any]) -> dict[str, Fraction]:
    """What a node has, likewise."""
    found = {name: amount(value) for name, value in document.get("capacity", {}).items()}
    device = 0
    for entry in document.get("gpus", ()):
        for _ in range(entry.get("count", 1)):
            found[f"gpu {device}"], found[f"gpu memory {device}"] = Fraction(1000), amount(entry.get("memory", 0))
            device += 1
    return found


def overcommit(log: Log, now_ms: int, gone: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[float, list[str]]:
    """Node-seconds with more held than there is, and where. Placements that end and begin in the same millisecond do not overlap. `gone`: nodes that were taken out."""
    steps: dict[str, list[tuple[int, int, dict[str, Fraction], str]]] = defaultdict(list)
    for held in log.placements:
        document = log.workloads[held.workload][2] if held.workload in log.workloads else {}
        need = asked(document, held.gpus)
        until = now_ms if held.to_ms is None else held.to_ms
        if until > held.from_ms:
            steps[held.node] += [(held.from_ms, 1, need, held.workload), (until, -1, need, held.workload)]
    seconds, found = 0.0, []
    for node, changes in steps.items():
        capacity = has(log.nodes.get(node) or (gone or {}).get(node, {}))
        used: dict[str, Fraction] = defaultdict(Fraction)
        last = 0
        over: list[str] = []
        for at, sign, need, workload in sorted(changes, key=lambda step: (step[0], step[1])):
            if over and at > last:
                seconds += (at - last) / 1000
                found.append(f"{node} from {last} to {at}: {', '.join(over)}")
            for name, value in need.items():
                used[name] += sign * value
            last = at
            over = [f"{name} {float(value)} of {float(capacity.get(name, 0))} (last: {workload})" for name, value in used.items() if value > capacity.get(name, 0)]
    return seconds, found


def doubles(log: Log, desired: Mapping[str, Mapping[str, Any]] | None = None) -> list[str]:
    """Workloads in two places: by the log (on nodes without an agent at any time; with agents two newest at once) and by what documents want running."""
    found = []
    by_workload: dict[str, list[Held]] = defaultdict(list)
    for held in log.placements:
        by_workload[held.workload].append(held)
    for workload in {**log.workloads, **by_workload}:
        rows = by_workload.get(workload, [])
        rows.sort(key=lambda held: held.epoch)
        for before, after in pairwise(rows):
            if before.epoch == after.epoch:
                found.append(f"{workload}: epoch {before.epoch} stands twice")
            if before.node in log.agents:
                continue  # it holds its place until its agent has stopped it; the documents say what may run
            if before.to_ms is None or before.to_ms > after.from_ms:
                found.append(f"{workload}: on {before.node} until {before.to_ms} and on {after.node} from {after.from_ms}")
        state, epoch, _ = log.workloads.get(workload, ("", 0, {}))
        still = [held for held in rows if held.to_ms is None]
        if state == "placed" and [held.epoch for held in still if held.epoch == epoch] != [epoch]:
            found.append(f"{workload}: is placed under epoch {epoch}, but holds {[held.epoch for held in still]}")
        if state in ("pending", "cancelled", "done", "failed"):
            found += [f"{workload}: is {state}, but holds {held.node}" for held in still if held.node not in log.agents]
    running: dict[str, list[str]] = defaultdict(list)
    for node, document in (desired or {}).items():
        for entry in document.get("spec", {}).get("workloads", ()):
            if entry.get("wanted") == "running":
                running[entry["id"]].append(f"{node} (epoch {entry['epoch']})")
    return found + [f"{workload}: wanted on {' and '.join(nodes)}" for workload, nodes in running.items() if len(nodes) > 1]


def lost(log: Log, acknowledged: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of the documents whose submission was acknowledged: those that are in no row, or in a row that says something else; and those placed that hold nothing."""
    found = []
    for workload, document in acknowledged.items():
        if workload not in log.workloads:
            found.append(f"{workload}: acknowledged, and in no row")
        elif log.workloads[workload][2] != document:
            found.append(f"{workload}: kept with another document")
    return found
