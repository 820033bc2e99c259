"""A store in memory for planners: what was written, and nothing else, survives."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hub.store.workloads import NodeRow, PlacementRow, WorkloadChanges, WorkloadRow
from hub.workloads import placing
from hub.workloads.documents import read_list, read_workload
from hub.workloads.planner import Planner
from hub.workloads.rounds import Heard, Rounds
from tools.bench.placement_log import Held, Log

NOW = 1_795_500_000_000


class Kept:
    """Applies changes as a store does."""

    def __init__(self, kind: type[Planner] = Planner) -> None:
        self.kind = kind
        self.workloads: dict[str, WorkloadRow] = {}
        self.placements: dict[tuple[str, int], PlacementRow] = {}
        self.nodes: dict[str, NodeRow] = {}
        self.budgets: dict[str, dict[str, Any]] = {}
        self.quotas: dict[str, dict[str, Any]] = {}
        self.rebalances: dict[str, dict[str, Any]] = {}
        self.epochs: dict[str, int] = {}
        self.moves: dict[str, dict[str, Any]] = {}
        self.ever: dict[str, NodeRow] = {}
        """Nodes that are gone too: the log speaks of them."""

    def apply(self, changes: WorkloadChanges) -> None:
        for mine, theirs in ((self.workloads, changes.workloads), (self.placements, changes.placements), (self.nodes, changes.nodes), (self.budgets, changes.budgets), (self.quotas, changes.quotas),
                             (self.rebalances, changes.rebalances), (self.epochs, changes.epochs), (self.moves, changes.moves)):
            for key, row in theirs.items():
                if row is None:
                    mine.pop(key, None)  # type: ignore[attr-defined]
                else:
                    mine[key] = row  # type: ignore[index]
        self.ever |= self.nodes

    def planner(self, now_ms: int) -> tuple[Planner, list[str]]:
        """A planner as a hub that starts would build it."""
        planner = self.kind()
        rows = sorted((row for row in self.placements.values() if row.to_ms is None), key=lambda row: (row.from_ms, row.workload, row.epoch))
        problems = planner.load(self.nodes.values(), self.workloads.values(), rows, self.budgets, self.quotas, read_workload, now_ms, self.rebalances, self.epochs, self.moves)
        self.apply(planner.changes())
        planner.keep()
        return planner, problems

    def log(self) -> Log:
        """For the independent checker."""
        placements = [Held(row.workload, row.epoch, row.node, tuple(row.seat["gpus"]), row.from_ms, row.to_ms) for row in self.placements.values()]
        return Log(
            {row.id: (row.state, row.epoch, row.document) for row in self.workloads.values()}, placements, {row.name: row.document for row in self.ever.values()},
            {row.name for row in self.ever.values() if row.origin == "edge"},
        )


class Desk:
    """A planner with its store and clock: each call is one plan that is kept."""

    def __init__(self, kind: type[Planner] = Planner) -> None:
        self.kept, self.now = Kept(kind), NOW
        self.numbers: Counter[str] = Counter()
        """Of each edge's stream of events, the number given last."""
        self.planner, _ = self.kept.planner(self.now)

    def do(self, work: Callable[[Planner, int], Any], after_ms: int = 1) -> Any:
        self.now += after_ms
        self.planner.begin()
        try:
            result = work(self.planner, self.now)
        except BaseException:
            self.planner.undo()
            raise
        self.kept.apply(self.planner.changes())
        self.planner.keep()
        return result

    def node(self, name: str, origin: str = "declared", **document: Any) -> None:
        self.do(lambda planner, now: planner.put_node(name, {"capacity": {"cpu": 4, "memory": "8Gi"}, **document}, origin, now, seq=1))

    def submit(self, *documents: dict[str, Any]) -> list[str]:
        entries = read_list(list(documents))
        result: list[str] = self.do(lambda planner, now: planner.submit(entries, now))
        return result

    def number(self, edge: str) -> int:
        """The next number in an edge's stream of events."""
        self.numbers[edge] += 1
        return self.numbers[edge]

    def row(self, workload: str) -> WorkloadRow:
        return self.kept.workloads[workload]

    def restart(self) -> list[str]:
        self.planner, problems = self.kept.planner(self.now)
        return problems


@pytest.fixture(autouse=True, scope="module")
def few_steps() -> Iterator[None]:
    """Lists are searched briefly: it is the books that are looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placing, "TOGETHER_STEPS", 500)
        yield


def work(name: str, cpu: Any = 1, **more: Any) -> dict[str, Any]:
    return {"id": name, "kind": "container", "requests": {"cpu": cpu}, **more}


def round_of(desk: Desk, rounds: Rounds | None = None, after_ms: int = 1000, **online: bool | int) -> None:
    """One round; `online`: node to True, or to when it was last seen."""
    def look(planner: Planner, now: int) -> None:
        heard = {name: Heard(value is True, 0 if value is True else now - max(planner.started_ms, int(value))) for name, value in online.items()}
        (rounds or Rounds(planner)).reconcile(heard, now)

    desk.do(look, after_ms)


def said(desk: Desk, edge: str, workload: str, epoch: int, state: str, reason: str = "", seq: int = 0) -> None:
    """An edge's word; `seq`: its number where it is not the next."""
    desk.do(lambda planner, now: planner.said(edge, seq or desk.number(edge), {"id": workload, "epoch": epoch, "state": state, "reason": reason}, now))
