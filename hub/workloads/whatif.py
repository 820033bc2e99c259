"""What would be, if: nodes added and lost, workloads submitted, on a planner of its own. Pure.

The same methods answer as for a real submit (`Planner.submit_all`, and with it the admission of `Agenda`), on a fork. So the verdict on a deadline is what a submit would say now.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..scheduler import Invalid
from ..scheduler.arrays import GONE
from ..scheduler.model import Kind
from ..store.workloads import WorkloadRow
from .documents import Missed, Submitted
from .planner import Planner

MAX_WHAT_IF = 256
"""Workloads, and nodes, of one question."""


def what_if(fork: Planner, entries: Sequence[Submitted], lose: Sequence[str], add: Mapping[str, Any], now_ms: int) -> dict[str, Any]:
    """What would become of it: nodes added (name to document), then lost, then workloads submitted as one request. Changes `fork` (`Book.fork`), which is thrown away.

    Returns `placed` and `waiting` (the workloads asked about, and who would lose a place), `moved`, and `jobs`: of each batch job asked about that says how long it runs, when
    it would start and end, or why its deadline is not promised. Raises `Invalid`, or `Conflict` where a submit would be refused for something else than a deadline.
    """
    before, missed = dict(fork.tables.rows), None
    fork.begin()
    _change_nodes(fork, lose, add, now_ms)
    fork.begin()
    try:
        fork.submit_all(entries, now_ms)
    except Missed as error:
        fork.undo()
        missed = error
    else:
        fork.keep()
    rows, asked = fork.tables.rows, {entry.item.id for entry in entries}
    answer: dict[str, list[dict[str, Any]]] = {"placed": [], "waiting": [], "moved": [], "jobs": []}
    for name, row in before.items():
        after = rows[name]
        if row.state != "placed" or name in asked or (after.state, after.epoch) == (row.state, row.epoch):
            continue
        if after.state == "placed":
            answer["moved"].append({"workload": name, "from": row.node, "to": after.node, "how": "restart"})
        else:
            answer["waiting"].append({"workload": name, "from": row.node, "reason": after.reason})
    for entry in entries:
        name, known = entry.item.id, rows.get(entry.item.id)
        if known is not None and known.state == "placed":
            answer["placed"].append({"workload": name, "node": known.node, "gpus": fork.tables.open[name, known.epoch].seat.get("gpus", [])})
        else:
            answer["waiting"].append({"workload": name, "from": "", "reason": _untaken(name, missed) if known is None else known.reason or f"is {known.state}"})
        if entry.item.shape.kind is Kind.BATCH and entry.item.duration_ms is not None:
            answer["jobs"].append(_refused(fork, entry, missed) if known is None else _planned(entry, known))
    return answer


def _change_nodes(fork: Planner, lose: Sequence[str], add: Mapping[str, Any], now_ms: int) -> None:
    """Add nodes, then lose some; what was planned follows, as in the next round."""
    state = fork.state
    known = {name for name, index in state.node_index.items() if state.status[index] != GONE}
    for name in lose:
        if name not in known:
            raise Invalid("lose", f"{name[:64]!r} is no node", "list /api/v1/nodes")
    for name, document in add.items():
        if name in known:
            raise Invalid("add", f"{name!r} is a node already", "give it another name")
        fork.put_node(name, document, "declared", now_ms)
    for name in lose:
        fork.remove_node(name, False, now_ms)
    if lose or add:
        fork.replan(now_ms)


def _untaken(name: str, missed: Missed | None) -> str:
    """Why a workload is not taken in: with one of a request, nothing of it is."""
    assert missed is not None, "only a missed deadline takes a request back"
    return missed.problem if name == missed.workload else f"nothing of the request is taken: {missed.problem}"


def _planned(entry: Submitted, row: WorkloadRow) -> dict[str, Any]:
    """Of a job that is taken: `late_ms` is by how much it misses its deadline; null where nothing is planned."""
    start, end, deadline = row.plan.get("start_ms"), row.plan.get("end_ms"), entry.item.deadline_ms
    late = max(0, end - deadline) if end is not None and deadline is not None else None
    verdict = "waits" if start is None else "late" if late else "starts" if row.state == "placed" else "planned"
    return _verdict(entry, verdict, start, end, row.plan.get("nodes", []), late, row.plan.get("because", "") if late else row.reason, "")


def _refused(fork: Planner, entry: Submitted, missed: Missed | None) -> dict[str, Any]:
    """Of a job that is not taken; `missed` has a forecast where its own deadline is the cause, and it could run later."""
    name = entry.item.id
    assert missed is not None
    found = missed.forecast if name == missed.workload else None
    if found is None:
        return _verdict(entry, "refused", None, None, [], None, _untaken(name, missed), missed.remedy)
    return _verdict(entry, "refused", found.start_ms, found.by_ms, [fork.state.nodes[node].name for node in found.nodes], found.late_ms, missed.problem, missed.remedy)


def _verdict(entry: Submitted, verdict: str, start_ms: int | None, end_ms: int | None, nodes: Sequence[str], late_ms: int | None, reason: str, remedy: str) -> dict[str, Any]:
    """`expected_end_ms`: where the estimate is right; `planned_end_ms`: with its margin used up, what is held against the deadline."""
    expected = None if start_ms is None or entry.item.duration_ms is None else start_ms + entry.item.duration_ms
    return {
        "workload": entry.item.id, "verdict": verdict, "planned_ms": start_ms, "expected_end_ms": expected, "planned_end_ms": end_ms, "planned_nodes": list(nodes), "late_ms": late_ms,
        "reason": reason, "remedy": remedy,
    }
