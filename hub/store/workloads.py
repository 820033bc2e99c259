"""What the store keeps of nodes, workloads and placements. The rows are the truth: a hub that was killed builds its state from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

LIVE_STATES = ("pending", "placed", "ending")
FINAL_STATES = ("done", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node.

    Attributes:
        origin: `edge` (told by an agent's records) or `declared` (through the API).
        document: what it has, in the form that `hub.scheduler.node` reads, with `runs`.
        cordon: empty, `cordon` (takes nothing new) or `drain` (and gives away what it has).
        tainted: NoExecute taints, as `key=value`, to when they were first seen (ms).
        seq: the sequence number of the agent's record.
        problem: why the newest description does not count.
    """

    name: str
    origin: str
    document: dict[str, Any]
    cordon: str = ""
    seq: int = 0
    changed_ms: int = 0
    problem: str = ""
    tainted: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WorkloadRow:
    """One workload.

    Attributes:
        document: as it was submitted.
        state: one of `LIVE_STATES` and `FINAL_STATES`.
        node: where it is placed, empty where it waits.
        epoch: of its newest placement, 0 for none yet.
        avoid: node to [until ms, refusals in a row, why].
        plan: of a batch job that says how long it runs, as far as known: `start_ms`, `end_ms`, `nodes` (one per member) that are held for it or on which it runs;
            `promise_ms` where it was taken although it misses its deadline; `because` where a promise was broken.
        fences: epoch (as text) to the highest fence under which it was heard of, where a site gave it to a node by itself; of the newest epochs.
    """

    id: str
    document: dict[str, Any]
    state: str = "pending"
    node: str = ""
    epoch: int = 0
    reason: str = ""
    created_ms: int = 0
    changed_ms: int = 0
    avoid: dict[str, list[Any]] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    fences: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlacementRow:
    """Capacity that a workload holds, or held, on a node: from `from_ms` until `to_ms` (None: still).

    Attributes:
        seat: `gpus` [device] and `numa` [[zone, cpu, memory]]; `move`, the name of the move with which it comes, where it does.
        said: what the edge last said of it.
        why: why it ended.
        seqs: `said`, `form` and `load_ms` to the number, in the edge's stream of events, of the record that they are from: what is live comes before what waited, so what comes later may be older.
    """

    workload: str
    epoch: int
    node: str
    seat: dict[str, Any]
    from_ms: int
    to_ms: int | None = None
    said: str = ""
    why: str = ""
    seqs: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class WorkloadChanges:
    """What one transaction of the planner writes; None deletes.

    Attributes:
        rebalances: rebalancing operations by id.
        moves: moves with their state by id.
        epochs: workload to the highest epoch that edges spoke of, where it is above what was given.
        cursor: the edges' records up to this arrival number have been acted upon.
    """

    workloads: dict[str, WorkloadRow | None] = field(default_factory=dict)
    placements: dict[tuple[str, int], PlacementRow | None] = field(default_factory=dict)
    nodes: dict[str, NodeRow | None] = field(default_factory=dict)
    budgets: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    quotas: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    cursor: int | None = None
    rebalances: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    epochs: dict[str, int | None] = field(default_factory=dict)
    moves: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.workloads or self.placements or self.nodes or self.budgets or self.quotas or self.rebalances or self.epochs or self.moves) or self.cursor is not None


class WorkloadStore(Protocol):
    """The part of the store that the placing of workloads needs."""

    def commit_workloads(self, changes: WorkloadChanges) -> None:
        """Write all of it or none."""

    def nodes(self) -> list[NodeRow]:
        """Every node."""

    def workloads(self) -> list[WorkloadRow]:
        """Every workload that is not forgotten, oldest first."""

    def open_placements(self) -> list[PlacementRow]:
        """Placements that have not ended, in the order in which they were made."""

    def budgets(self) -> dict[str, dict[str, Any]]:
        """Disruption budgets by name."""

    def quotas(self) -> dict[str, dict[str, Any]]:
        """Quotas by tenant."""

    def moves(self) -> dict[str, dict[str, Any]]:
        """Moves of workloads with their state by id, oldest first."""

    def rebalances(self) -> dict[str, dict[str, Any]]:
        """Rebalancing operations by id, oldest first."""

    def heard_epochs(self) -> dict[str, int]:
        """Workload to the highest epoch that edges spoke of, where that was above what was given."""

    def workload_cursor(self) -> int:
        """The `cursor` of the newest transaction that had one; 0 for none."""

    def read_events_after(self, kinds: Sequence[str], after_id: int, limit: int) -> tuple[list[tuple[int, Any]], int]:
        """Events of these kinds by arrival, oldest first, with their numbers, and the number up to which there are no more of them."""

    def read_placements(self, workload: str, limit: int = 100) -> list[PlacementRow]:
        """The placements of one workload, newest first."""

    def put_utilisation(self, minute: int, document: dict[str, Any], keep_minutes: int) -> None:
        """Keep what was in use in one minute (since 1970), and only so many minutes before it."""

    def read_utilisation(self, since_minute: int, limit: int) -> list[tuple[int, dict[str, Any]]]:
        """Utilisation by minute, oldest first: the newest `limit`."""

    def forget_workloads(self, before_ms: int, keep: int) -> list[str]:
        """Delete workloads that ended before `before_ms`, or are not among the newest `keep` that ended, with their placements; returns their ids."""
