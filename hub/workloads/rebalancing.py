"""Rebalancing and draining as one operation that is kept: a plan whose steps are taken one after the other through the ledger. Pure.

    inputs (a snapshot) ──> proposal (on a thread of its own: seconds) ──> start: kept ──> advance, in each round

A move of a plan is a restart: stop here, and start there once the old edge has said that it stopped (`moving` has moves with state). A step begins when all moves of
the one before it are over, as the edges' records say. What has been moved on by others meanwhile stops the plan: what is under way ends by itself, nothing more begins.
The document moves in the transaction of the moves that it speaks of, so a kill between two of them loses and doubles none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_runtime.contract.workloads import CHECKPOINTED, RUNNING

from ..scheduler import Invalid, Scheduler, drain, moves, rebalance
from ..scheduler.model import Kind
from .book import short
from .documents import Conflict
from .planner import Planner

LIMITS = moves.Limits(per_plan=50, migrates=False)
"""Of one plan: short, so that the next one sees how this one went."""

WORTH = rebalance.Worth(per_gb=0, per_migration=rebalance.Worth().per_restart)
"""While nothing migrates, each move costs what a restart costs."""

MOVE_PATIENCE_MS = 600_000
"""A move that is not over by then stops the plan: an edge that stops a workload takes its grace period, seldom minutes."""

KEPT = 20
"""Operations that are remembered, the newest."""

MAX_SHOWN = 100
"""Workloads named among those that stay."""

MAX_DRAINED = 32
"""Nodes that one operation empties: with more, what they hold is more than one plan moves."""

BEGUN, DONE, STOPPED, CANCELLED = "running", "done", "stopped", "cancelled"
"""States of an operation."""


@dataclass(slots=True)
class Inputs:
    """What a proposal is made of; the scheduler is on a snapshot."""

    trial: Scheduler
    now_ms: int
    nodes: tuple[str, ...]
    moved_ms: dict[str, int] = field(default_factory=dict)
    """When workloads were last moved; those that may not move at all rest from now."""
    stays: list[dict[str, str]] = field(default_factory=list)
    epochs: dict[str, int] = field(default_factory=dict)


class Rebalancing:
    """The operation of one planner; what is known of it is in the planner's tables. What changes them is called within `begin` and `undo` or `keep`."""

    def __init__(self, planner: Planner) -> None:
        self._planner = planner

    def inputs(self, nodes: Sequence[str], now_ms: int) -> Inputs:
        """What a plan is made of. `nodes`: those that are to be empty; without any, the cluster is rebalanced. Changes nothing; raises `Invalid` or `Conflict`."""
        for name in nodes:
            if name not in self._planner.tables.nodes or name not in self._planner.state.node_index:
                raise Invalid("drain", f"{name[:64]!r} is no node", "list /api/v1/nodes")
            if not self._planner.is_up(name):
                raise Conflict("drain", f"{name!r} is not heard from: nothing there can be stopped", "wait for it, or take it out")
        found = Inputs(self._planner.scheduler.on(self._planner.state.snapshot()), now_ms, tuple(nodes))
        for row in self._planner.tables.rows.values():
            current = self._planner.current(row.id) if row.state == "placed" else None
            if current is None:
                continue
            found.epochs[row.id] = row.epoch
            why = "it is checkpointed, and would begin anew" if current.said == CHECKPOINTED else self._why_it_stays(row.id)
            if why:
                found.moved_ms[row.id] = now_ms
                found.stays.append({"workload": row.id, "node": row.node, "reason": why})
            elif row.epoch > 1:
                found.moved_ms[row.id] = current.from_ms
                if now_ms < current.from_ms + WORTH.rest_ms:
                    found.stays.append({"workload": row.id, "node": row.node, "reason": f"was moved less than {WORTH.rest_ms // 60_000} min ago"})
        return found

    def _why_it_stays(self, workload: str) -> str:
        """Why a workload may not be moved for gain; empty where it may."""
        entry, row = self._planner.tables.items[workload], self._planner.tables.rows[workload]
        if entry.item.shape.kind is Kind.BATCH:
            return "a batch job would begin anew"
        if (entry.document.get("spec") or {}).get("checkpoint") is not None:
            return "its document asks for checkpoints, and it would begin anew"
        if not entry.document.get("migratable", True):
            return "its document says that it does not move"
        if not self._planner.is_up(row.node):
            return "its node is not heard from"
        return "it is being moved already" if len(self._planner.tables.epochs.get(workload, ())) > 1 else ""

    # -- the operation -------------------------------------------------------------------------------------------------------

    def running(self) -> dict[str, Any] | None:
        """The operation under way."""
        return next((document for document in self._planner.tables.rebalances.values() if document["state"] == BEGUN), None)

    def start(self, proposal: Mapping[str, Any], now_ms: int) -> dict[str, Any]:
        """Keep a proposal as the operation under way; its first step begins in the next round. Raises `Conflict` where another runs, or there is nothing to do."""
        other = self.running()
        if other is not None:
            raise Conflict("rebalance", f"{other['id']} is under way", "wait for its end, or cancel it")
        if not proposal["steps"]:
            raise Conflict("rebalance", proposal["text"], "nothing is to be done")
        for name in proposal["nodes"]:
            if name not in self._planner.tables.nodes:
                raise Conflict("drain", f"{name!r} was taken out meanwhile", "plan anew")
            if not self._planner.tables.nodes[name].cordon:
                self._planner.cordon(name, "cordon", now_ms)
        number = now_ms
        while f"rebalance-{number}" in self._planner.tables.rebalances:
            number += 1
        document = {**proposal, "id": f"rebalance-{number}", "state": BEGUN, "step": 0, "created_ms": now_ms, "changed_ms": now_ms}
        self._planner.ledger.put(self._planner.tables.rebalances, document["id"], document)
        for name in list(self._planner.tables.rebalances)[:-KEPT]:
            self._planner.ledger.put(self._planner.tables.rebalances, name, None)
        return document

    def stop(self, name: str, now_ms: int) -> dict[str, Any] | None:
        """Cancel an operation: nothing more begins, what is under way ends by itself. None where it is not known; one that is over stays as it is."""
        document = self._planner.tables.rebalances.get(name)
        if document is not None and document["state"] == BEGUN:
            document = self._end(document, CANCELLED, "cancelled", now_ms)
        return document

    def _end(self, document: dict[str, Any], state: str, reason: str, now_ms: int) -> dict[str, Any]:
        ended = {**document, "state": state, "reason": short(reason), "changed_ms": now_ms}
        self._planner.ledger.put(self._planner.tables.rebalances, document["id"], ended)
        return ended

    def advance(self, now_ms: int) -> None:
        """One round's work on the operation under way: at most one step's moves."""
        document = self.running()
        if document is None:
            return
        steps: list[list[dict[str, Any]]] = [list(step) for step in document["steps"]]
        number = document["step"]
        step = steps[number]
        for at, move in enumerate(step):
            if move["state"] == "waiting":
                step[at], why = self._begin(document, move, now_ms)
            elif move["state"] == "moving":
                step[at], why = self._look(move, now_ms)
            else:
                continue
            if why:
                self._end({**document, "steps": steps}, STOPPED, f"{move['workload']}: {why}", now_ms)
                return
        if all(move["state"] == "done" for move in step):
            number += 1
        changed = {**document, "steps": steps, "step": number}
        if number == len(steps):
            self._end(changed, DONE, "", now_ms)
        elif changed != document:
            self._planner.ledger.put(self._planner.tables.rebalances, document["id"], {**changed, "changed_ms": now_ms})

    def _begin(self, document: Mapping[str, Any], move: dict[str, Any], now_ms: int) -> tuple[dict[str, Any], str]:
        """Begin a move; why the plan stops, where what it stands on is no longer so. It waits while a budget allows no more."""
        row, known = self._planner.tables.rows.get(move["workload"]), self._planner.tables.items.get(move["workload"])
        if row is None or known is None or row.state != "placed" or row.node != move["source"] or move["epoch"] not in (0, row.epoch):
            return move, f"is no longer on {move['source']} as it was"
        target = self._planner.tables.nodes.get(move["target"])
        if target is None or target.cordon or not self._planner.is_up(move["target"]):
            return move, f"{move['target']} takes nothing now"
        if len(self._planner.tables.epochs.get(row.id, ())) > 1:
            return self._patience(move, f"{move['source']} has not taken it over yet", now_ms)
        self._planner.budgets()
        held = next((budget.name for budget in self._planner.state.budgets.values() if budget.covers(known.item) and budget.allowed <= 0), None)
        if held is not None:
            return self._patience(move, f"budget {held} allows no more disruption", now_ms)
        if not self._planner.move(row.id, now_ms, f"{document['id']}: {move['source']} to {move['target']}", move["target"]):
            return move, f"{move['target']} has no place for it any more"
        return {**move, "state": "moving", "new_epoch": self._planner.tables.rows[row.id].epoch, "since_ms": now_ms, "waits_for": ""}, ""

    def _look(self, move: dict[str, Any], now_ms: int) -> tuple[dict[str, Any], str]:
        """Whether a move is over: the old edge has stopped it, and the new one, where there is an agent, says that it runs."""
        row = self._planner.tables.rows.get(move["workload"])
        if row is None or row.state != "placed" or row.epoch != move["new_epoch"]:
            return move, f"did not come to run on {move['target']}" + (f": {row.reason}" if row is not None and row.reason else "")
        if len(self._planner.tables.epochs.get(row.id, ())) > 1:
            return self._patience(move, f"{move['source']} has not said that it stopped it", now_ms)
        current = self._planner.current(row.id)
        if self._planner.is_agent(move["target"]) and (current is None or current.said != RUNNING):
            return self._patience(move, f"{move['target']} has not said that it runs", now_ms)
        return {**move, "state": "done", "end_ms": now_ms, "waits_for": ""}, ""

    @staticmethod
    def _patience(move: dict[str, Any], why: str, now_ms: int) -> tuple[dict[str, Any], str]:
        since = move.get("since_ms", now_ms)
        if now_ms - since > MOVE_PATIENCE_MS:
            return move, f"{why} for {MOVE_PATIENCE_MS // 60_000} min"
        return {**move, "since_ms": since, "waits_for": why}, ""


def propose(inputs: Inputs) -> dict[str, Any]:
    """The plan as it is shown and kept: steps of moves, what was wanted and cannot be, what stays and why. Seconds for large clusters; touches nothing but the snapshot."""
    if inputs.nodes:
        found = drain.drain(inputs.trial, inputs.nodes, inputs.now_ms, LIMITS)
        plan, text = found.plan, found.text
        left = set(found.left)
        stays = [{"workload": each.workload, "node": each.source, "reason": each.reason} for each in plan.refused if each.workload in left]
    else:
        # What is on its way out rests by its id; what only keeps room does not move either.
        plan = rebalance.rebalance(inputs.trial, inputs.now_ms, inputs.moved_ms, LIMITS, WORTH)
        text, stays = plan.text, inputs.stays
    seen: set[str] = set()
    steps = []
    for step in plan.steps:
        made = []
        for move in step:
            made.append({
                "workload": move.workload, "source": move.source, "target": move.target, "how": move.how, "state": "waiting",
                "epoch": 0 if move.workload in seen else inputs.epochs.get(move.workload, 0),
            })
            seen.add(move.workload)
        steps.append(made)
    return {
        "id": "", "kind": "drain" if inputs.nodes else "rebalance", "nodes": list(inputs.nodes), "state": "planned", "text": text, "reason": plan.reason, "steps": steps, "step": 0,
        "moves": len(plan.moves), "expected_ms": plan.duration_ms, "gain": plan.gain, "cost": plan.cost, "created_ms": inputs.now_ms, "changed_ms": inputs.now_ms,
        "refused": [{"workload": each.workload, "source": each.source, "target": each.target, "reason": each.reason} for each in plan.refused][:MAX_SHOWN],
        "stays": stays[:MAX_SHOWN], "stay": len(stays),
    }
