"""The book of placements: rows and the scheduler's state changed together, all of it or nothing. Pure: no clock, no store, no network.

A *placement* is capacity that a workload holds on a node, from a time to a time, under an epoch of its own. A workload that moves off a node with an agent holds two: the
old one until the agent says that it has stopped, and the new one, of which its node is told only then. So at no time are two copies wanted.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from edge_runtime.contract.workloads import RUNNING, STOPPED

from ..scheduler import Invalid, Node, Scheduler, Seat, State, Workload, parse
from ..scheduler.arrays import SILENT, UP
from ..scheduler.model import Kind, Shape
from ..scheduler.units import LEAVING
from ..store.workloads import FINAL_STATES, NodeRow, PlacementRow, WorkloadChanges, WorkloadRow
from .documents import Submitted, read_node
from .ledger import Ledger
from .loads import LoadTimes

MAX_REASON = 500
"""Characters of a reason that is kept."""

MAX_HEARD = 100_000
"""Workloads of which a higher epoch was heard than was given: as many as a hub has workloads."""

PREEMPTED = "preempted by "
"""Why a placement ends that makes room; the name of the workload follows."""

MOVE = "move"
"""Key of a placement's seat: `move` and `root`, with which move it comes or came, and the hash of its state; empty until that is there. `live` in place of `root`: it comes while it runs."""

BEGUN = "running"
"""State of a move that is under way."""

CHECKING, ROOM, LIVE, AHEAD, TAKING, SENDING, STARTING, RETURNING = STEPS = ("checking", "room", "live", "ahead", "taking", "sending", "starting", "returning")
"""Of a move, see `moving`."""

UNTOUCHED = (CHECKING, ROOM, LIVE, AHEAD)
"""Steps in which nothing of the workload has been touched: a move that ends in one of them leaves no trace."""

HOLDING = (SENDING, STARTING)
"""Steps in which the source has the state, or is leaving while it runs, and must not go on from it."""

HELD = "held"
"""What a node is told of a placement, beside that it runs or stops: its state stays, and is not gone on from."""

Key = tuple[str, int]

Guard = tuple[Shape, tuple[int, ...]]
"""What keeps room on a node, as a shape that asks for it, and the GPU devices that it takes."""


@dataclass(slots=True)
class Tables:
    """What is kept, and indices over it."""

    rows: dict[str, WorkloadRow] = field(default_factory=dict)
    nodes: dict[str, NodeRow] = field(default_factory=dict)
    budgets: dict[str, dict[str, Any]] = field(default_factory=dict)
    quotas: dict[str, dict[str, Any]] = field(default_factory=dict)
    open: dict[Key, PlacementRow] = field(default_factory=dict)
    closed: dict[Key, PlacementRow] = field(default_factory=dict)
    """Placements that the plan under way ended."""
    items: dict[str, Submitted] = field(default_factory=dict)
    waiting: dict[str, bool] = field(default_factory=dict)
    epochs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Workload to the epochs of its open placements."""
    on_node: dict[str, frozenset[Key]] = field(default_factory=dict)
    room: dict[str, tuple[Key, ...]] = field(default_factory=dict)
    """Workload to the placements that are on their way out for it."""
    timed: dict[str, bool] = field(default_factory=dict)
    """Batch jobs that say how long they run, and wait or run."""
    guards: dict[str, tuple[Guard, ...]] = field(default_factory=dict)
    """Node to the room that is kept there for jobs that start later."""
    rebalances: dict[str, dict[str, Any]] = field(default_factory=dict)
    moves: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Moves of workloads with their state, by id; see `moving`."""
    moving: dict[str, str] = field(default_factory=dict)
    """Workload to the move that is under way."""
    heard: dict[str, int] = field(default_factory=dict)
    """Workload to the highest epoch that edges spoke of, where this hub had not given it: it was restored from an older backup."""
    dirty: dict[str, bool] = field(default_factory=dict)
    """Nodes with an agent whose desired state may have changed."""


class Book:
    """One caller at a time. Changes are made between `begin` and `undo` or `keep`."""

    def __init__(self, seed: int = 0, scheduler: Callable[[State], Scheduler] = Scheduler) -> None:
        self.loads = LoadTimes()
        self.scheduler = scheduler(State(seed))
        self.scheduler.ranker.policies["cold_start"] = self.loads
        self.tables = Tables()
        self.ledger = Ledger()
        self._marks: list[tuple[int, int]] = []
        self.started_ms = 0
        self.version = 0
        """Grows when capacity may have come free: what waits is tried again then."""
        self.beats = 0
        """Events of the state that only say that a node was heard from."""
        self.timed_version = 0
        """Grows when what the timetable knows of jobs is no longer so."""

    @property
    def state(self) -> State:
        """The scheduler's."""
        return self.scheduler.state

    # -- plans ---------------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a plan, or a part of one."""
        self._marks.append((self.ledger.mark(), self.state.begin()))

    def undo(self) -> None:
        """Take back everything since the last `begin`."""
        ledger, state = self._marks.pop()
        self.ledger.undo(ledger)
        self.state.undo(state)
        self.version += 1

    def keep(self) -> None:
        """Let everything since the last `begin` stand."""
        _, state = self._marks.pop()
        self.state.keep(state)
        if not self._marks:
            self.ledger.forget()
            self.tables.closed.clear()

    def fork(self) -> Self:
        """A book of its own that knows the same: what is done to it changes nothing here. Only between plans: rows are never changed in place, so the tables are copied and they are not."""
        assert not self._marks, "a plan is under way"
        other = copy(self)
        other.scheduler = self.scheduler.on(self.state.snapshot())
        other.tables = Tables(**{each.name: dict(getattr(self.tables, each.name)) for each in fields(Tables)})
        other.ledger, other._marks = Ledger(), []
        return other

    def changes(self) -> WorkloadChanges:
        """What the plan under way would write."""
        tables, touched = self.tables, self.ledger.touched
        placements = dict.fromkeys([*touched(tables.open), *touched(tables.closed)])
        return WorkloadChanges(
            workloads={key: tables.rows.get(key) for key in touched(tables.rows)},
            placements={key: tables.open.get(key) or tables.closed.get(key) for key in placements},
            nodes={key: tables.nodes.get(key) for key in touched(tables.nodes)},
            budgets={key: tables.budgets.get(key) for key in touched(tables.budgets)},
            quotas={key: tables.quotas.get(key) for key in touched(tables.quotas)}, rebalances={key: tables.rebalances.get(key) for key in touched(tables.rebalances)},
            epochs={key: tables.heard.get(key) for key in touched(tables.heard)}, moves={key: tables.moves.get(key) for key in touched(tables.moves)},
        )

    # -- from the store ------------------------------------------------------------------------------------------------------

    def load(self, nodes: Iterable[NodeRow], rows: Iterable[WorkloadRow], placements: Iterable[PlacementRow], budgets: Mapping[str, dict[str, Any]],
             quotas: Mapping[str, dict[str, Any]], read: Callable[[Any], Submitted], now_ms: int, rebalances: Mapping[str, dict[str, Any]] | None = None,
             heard: Mapping[str, int] | None = None, moves: Mapping[str, dict[str, Any]] | None = None) -> list[str]:
        """Build the state from the rows, once, at start; what no longer makes sense is set right and named in what is returned."""
        problems: list[str] = []
        self.started_ms = now_ms
        self.begin()
        for node in nodes:
            self.tables.nodes[node.name] = node
            self.scheduler.tainted_since |= {(node.name, *key.split("=", 1)): since for key, since in node.tainted.items()}  # type: ignore[misc]
            try:
                self.describe(node, read_node(node.document, node.name, agent=node.origin == "edge")[1], now_ms)
            except Invalid as error:
                problems.append(f"node {node.name}: {error}")
            if node.origin == "edge" and node.name in self.state.node_index:
                self.state.set_status(node.name, SILENT)
                self.tables.dirty[node.name] = True
        for row in rows:
            self.tables.rows[row.id] = row
            try:
                self.tables.items[row.id] = read(row.document)
            except Invalid as error:
                problems.append(f"workload {row.id}: {error}")
                if row.state not in FINAL_STATES:
                    self.set(replace(row, state="failed", node="", reason=short(str(error)), changed_ms=now_ms))
                continue
            if row.state == "pending":
                self.tables.waiting[row.id] = True
            if row.state in ("pending", "placed") and self.is_timed(row.id):
                self.tables.timed[row.id] = True
        for placement in placements:
            problem = self._adopt(placement, now_ms)
            if problem:
                problems.append(problem)
        for row in list(self.tables.rows.values()):  # placed, and no placement: the store was damaged, or edited
            if row.state in ("placed", "ending") and row.epoch not in self.tables.epochs.get(row.id, ()):
                problems.append(f"workload {row.id}: it is {row.state}, but holds no place")
                self.set(replace(row, state="pending" if row.state == "placed" else "cancelled", node="", reason="its placement was lost", changed_ms=now_ms))
        self.tables.budgets.update(budgets)
        self.tables.rebalances.update(sorted((rebalances or {}).items(), key=lambda each: int(each[1].get("created_ms", 0))))
        self.tables.heard.update(heard or {})
        self.tables.moves.update(sorted((moves or {}).items(), key=lambda each: int(each[1].get("created_ms", 0))))
        self.tables.moving.update({document["workload"]: name for name, document in self.tables.moves.items() if document["state"] == BEGUN})
        for tenant, document in quotas.items():
            self.tables.quotas[tenant] = document
            self.state.set_quota(parse.quota({**document, "tenant": tenant}))
        return problems

    def describe(self, row: NodeRow, node: Node, now_ms: int) -> None:
        self.state.add_nodes([replace(node, unschedulable=node.unschedulable or bool(row.cordon))], now_ms)

    def _adopt(self, placement: PlacementRow, now_ms: int) -> str:
        row, item, index = self.tables.rows.get(placement.workload), self.tables.items.get(placement.workload), self.state.node_index.get(placement.node)
        key = (placement.workload, placement.epoch)
        gpus = placement.seat.get("gpus", [])
        if row is None or item is None or index is None or row.state == "failed" or any(not 0 <= gpu < len(self.state.nodes[index].gpus) for gpu in gpus):
            self.ledger.put(self.tables.closed, key, replace(placement, to_ms=max(now_ms, placement.from_ms), why="its node or workload is unknown"))
            return f"placement {placement.workload}/{placement.epoch} on {placement.node} fits nothing that is known: it has ended"
        if placement.epoch == row.epoch and row.state == "placed":
            self.state.adopt(item.item, self._seat(index, placement.seat), placement.from_ms)
        else:
            self._haunt(item.item, key, self._seat(index, placement.seat), placement.from_ms)
            if placement.why.startswith(PREEMPTED):
                other = placement.why.removeprefix(PREEMPTED)
                self.tables.room[other] = (*self.tables.room.get(other, ()), key)
        self.tables.open[key] = placement
        self.index(placement, add=True)
        self.loads.observe(item.item.shape.image, placement.node, placement.seat.get("load_ms", 0))
        return ""

    @staticmethod
    def _seat(index: int, seat: Mapping[str, Any]) -> Seat:
        return Seat(index, tuple(seat.get("gpus", ())), tuple((zone, cpu, memory) for zone, cpu, memory in seat.get("numa", ())))

    # -- rows ----------------------------------------------------------------------------------------------------------------

    def set(self, row: WorkloadRow) -> None:
        before = self.tables.rows.get(row.id)
        if row.plan and before is not None and before.state != row.state and row.state != "placed":  # what was planned is over; a promise is not
            row = replace(row, plan={"promise_ms": row.plan["promise_ms"]} if row.state == "pending" and "promise_ms" in row.plan else {})
        self.ledger.put(self.tables.rows, row.id, row)
        self.ledger.put(self.tables.waiting, row.id, True if row.state == "pending" else None)
        if self.is_timed(row.id):
            self.ledger.put(self.tables.timed, row.id, True if row.state in ("pending", "placed") else None)
            self.timed_version += before is not None

    def is_timed(self, workload: str) -> bool:
        """Whether it is a batch job that says how long it runs: its start is planned."""
        known = self.tables.items.get(workload)
        return known is not None and known.item.shape.kind is Kind.BATCH and known.item.duration_ms is not None

    def index(self, placement: PlacementRow, *, add: bool) -> None:
        tables, key = self.tables, (placement.workload, placement.epoch)
        epochs, there = tables.epochs.get(placement.workload, ()), tables.on_node.get(placement.node, frozenset())
        self.ledger.put(tables.epochs, placement.workload, ((*epochs, placement.epoch) if add else tuple(epoch for epoch in epochs if epoch != placement.epoch)) or None)
        self.ledger.put(tables.on_node, placement.node, (there | {key} if add else there - {key}) or None)
        self.soil(placement.node)
        # Another placement of it may have waited for this one to end.
        for epoch in tables.epochs.get(placement.workload, ()):
            other = tables.open.get((placement.workload, epoch))
            if other is not None:
                self.soil(other.node)

    def soil(self, node: str) -> None:
        if self.is_agent(node):
            self.ledger.put(self.tables.dirty, node, True)

    def is_agent(self, node: str) -> bool:
        """Whether an agent runs there, which has to be told and has to answer."""
        row = self.tables.nodes.get(node)
        return row is not None and row.origin == "edge"

    def beat(self, node: str, now_ms: int) -> None:
        """The node is heard from."""
        self.state.beat(node, now_ms)
        self.beats += 1

    def is_up(self, node: str) -> bool:
        """Whether the node is heard from."""
        index = self.state.node_index.get(node)
        return index is not None and int(self.state.status[index]) == UP

    def current(self, workload: str) -> PlacementRow | None:
        row = self.tables.rows.get(workload)
        return None if row is None or row.state not in ("placed", "ending") else self.tables.open.get((workload, row.epoch))

    def next_epoch(self, row: WorkloadRow) -> int:
        """Of the next placement: above every epoch that was given, or heard of from an edge."""
        return max(row.epoch, self.tables.heard.get(row.id, 0)) + 1

    def hear(self, workload: str, epoch: int) -> None:
        """An edge speaks of an epoch that this hub has not given: it is not given again."""
        heard = self.tables.heard
        if epoch > heard.get(workload, 0):
            if workload not in heard and len(heard) >= MAX_HEARD:
                self.ledger.put(heard, next(iter(heard)), None)
            self.ledger.put(heard, workload, epoch)

    def renumber(self, row: WorkloadRow, now_ms: int, why: str) -> None:
        """The current placement goes on under a new epoch."""
        placement = self.current(row.id)
        assert placement is not None and row.state == "placed"
        key = (row.id, placement.epoch)
        self.ledger.put(self.tables.open, key, None)
        self.ledger.put(self.tables.closed, key, replace(placement, to_ms=max(now_ms, placement.from_ms), why=short(why)))
        self.index(placement, add=False)
        self.given(row, replace(placement, epoch=self.next_epoch(row), from_ms=max(now_ms, placement.from_ms), said="", seqs={}, seat={key: part for key, part in placement.seat.items() if key != MOVE}), now_ms)

    def given(self, row: WorkloadRow, placement: PlacementRow, now_ms: int) -> None:
        """A placement stands; its epoch is the newest."""
        self.set(replace(row, state="placed", node=placement.node, epoch=placement.epoch, reason="", changed_ms=now_ms))
        self.ledger.put(self.tables.open, (row.id, placement.epoch), placement)
        if row.id in self.tables.heard:
            self.ledger.put(self.tables.heard, row.id, None)
        self.index(placement, add=True)

    def close(self, placement: PlacementRow, now_ms: int, why: str) -> None:
        """The placement holds nothing any more."""
        key, row = (placement.workload, placement.epoch), self.tables.rows[placement.workload]
        self.state.release(row.id if row.state == "placed" and row.epoch == placement.epoch else ghost(key))
        self.ledger.put(self.tables.open, key, None)
        self.ledger.put(self.tables.closed, key, replace(placement, to_ms=max(now_ms, placement.from_ms), why=short(why)))
        self.index(placement, add=False)
        self.version += 1

    def carry(self, placement: PlacementRow, to: PlacementRow, now_ms: int) -> None:
        """A placement is on another node, as a fact: the same epoch, wanted or on its way out as before."""
        key, row = (placement.workload, placement.epoch), self.tables.rows[placement.workload]
        current = row.state == "placed" and row.epoch == placement.epoch
        name = row.id if current else ghost(key)
        item = self.state.workload(name)
        assert item is not None
        self.state.release(name)
        self.state.adopt(item, self._seat(self.state.node_index[to.node], to.seat), now_ms)
        if not current:
            self.state.set_ending(name)
        self.index(placement, add=False)
        self.ledger.put(self.tables.open, key, to)
        self.index(to, add=True)
        if row.epoch == placement.epoch and row.node:
            self.set(replace(row, node=to.node, changed_ms=now_ms))
        self.version += 1

    def hand_over(self, row: WorkloadRow, placement: PlacementRow, now_ms: int, why: str) -> None:
        """A placement that was reserved for a move is the workload's current one now, and the one before is given up: it is to be stopped."""
        before, item = self.current(row.id), self.tables.items[row.id].item
        assert before is not None and row.state == "placed" and placement.epoch > row.epoch
        self.state.release(ghost((row.id, placement.epoch)))
        self.index(placement, add=False)
        self.leave(before, now_ms, why)
        self.state.adopt(item, self._seat(self.state.node_index[placement.node], placement.seat), now_ms)
        self.given(row, placement, now_ms)
        self.version += 1

    def settle(self, row: WorkloadRow, placement: PlacementRow, now_ms: int) -> None:
        """A workload that waits runs on a node, as a fact."""
        self.state.adopt(self.tables.items[row.id].item, self._seat(self.state.node_index[placement.node], placement.seat), now_ms)
        self.given(row, placement, now_ms)

    def intrude(self, placement: PlacementRow, now_ms: int) -> None:
        """Something runs on a node that is not wanted there: it holds its seat until the agent says that it has stopped."""
        key = (placement.workload, placement.epoch)
        self._haunt(self.tables.items[placement.workload].item, key, self._seat(self.state.node_index[placement.node], placement.seat), now_ms)
        self.ledger.put(self.tables.open, key, placement)
        self.index(placement, add=True)

    def leave(self, placement: PlacementRow, now_ms: int, why: str) -> None:
        """The current placement of a placed workload is given up: at once without an agent, else it holds its capacity until the agent has stopped it."""
        if not self.is_agent(placement.node):
            self.close(placement, now_ms, why)
            return
        key = (placement.workload, placement.epoch)
        item, seat = self.state.workload(placement.workload), self.state.seat(placement.workload)
        assert item is not None and seat is not None
        self.state.release(placement.workload)
        self._haunt(item, key, seat, now_ms)
        self.ledger.put(self.tables.open, key, replace(placement, why=short(why)))
        self.soil(placement.node)

    def _haunt(self, item: Workload, key: Key, seat: Seat, now_ms: int) -> None:
        """What is on its way out holds its seat under a name of its own; nobody can preempt it once more."""
        self.state.adopt(replace(item, id=ghost(key), preemptible=False, migratable=False), seat, now_ms)
        self.state.set_ending(ghost(key))

    # -- what is wanted of nodes ---------------------------------------------------------------------------------------------

    def wanted(self, node: str) -> list[dict[str, Any]]:
        """`spec.workloads` of a node with an agent: what shall run there and what shall stop. A placement is told when the one before has ended; but one that comes with its state when that is
        there, while the source holds on to it."""
        out: list[dict[str, Any]] = []
        for key in sorted(self.tables.on_node.get(node, ())):
            placement, row = self.tables.open[key], self.tables.rows[key[0]]
            part = self._part(placement, row)
            if part == STOPPED:
                out.append({"id": row.id, "epoch": placement.epoch, "wanted": STOPPED})
            elif part:
                entry = self.tables.items[row.id]
                shape, requests = entry.item.shape, dict(entry.item.shape.requests)
                told = {
                    "id": row.id, "epoch": placement.epoch, "wanted": RUNNING, "kind": shape.kind.value, "image": shape.image, "requests": requests,
                    "gpus": placement.seat.get("gpus", []), "numa": placement.seat.get("numa", []), "document": row.document, "held": part == HELD,
                    "from": placement.seat.get(MOVE, {}) if placement.said in ("", "accepted") else {},
                }
                if entry.over:  # what it may use itself is what its document says
                    requests["memory"] -= entry.over
                    told["over"] = entry.over
                out.append(told)
        return out

    def _part(self, placement: PlacementRow, row: WorkloadRow) -> str:
        """What a placement's node is told of it: `STOPPED`, `RUNNING`, `HELD`, or nothing (empty)."""
        move = self.move_of(row.id)
        if row.state != "placed":
            return STOPPED
        if placement.epoch == row.epoch:
            others = any(epoch != placement.epoch and (move is None or epoch != move["new_epoch"]) for epoch in self.tables.epochs[row.id])
            if others and MOVE not in placement.seat:  # what a move has brought runs while its source holds on to its state
                return ""
            return HELD if move is not None and move["step"] in HOLDING else RUNNING
        if move is not None and (row.epoch, placement.epoch) == (move["epoch"], move["new_epoch"]):
            return RUNNING if move["step"] == STARTING else ""
        return STOPPED

    def move_of(self, workload: str) -> dict[str, Any] | None:
        """The move with its state that is under way."""
        return self.tables.moves.get(self.tables.moving.get(workload, ""))

    def clean(self, node: str) -> None:
        """The node was told; outside of plans."""
        self.tables.dirty.pop(node, None)

    def forget(self, workloads: Iterable[str]) -> None:
        """Rows that the store no longer has; outside of plans."""
        for name in workloads:
            self.tables.rows.pop(name, None)
            self.tables.items.pop(name, None)


def ghost(key: Key) -> str:
    """What the state calls a placement that is on its way out; no id has a NUL. It ends as the scheduler's own do, so that no plan would move it."""
    return f"{key[0]}\0{key[1]}{LEAVING}"


def short(text: str) -> str:
    return text.encode("utf-8", "replace").decode()[:MAX_REASON]
