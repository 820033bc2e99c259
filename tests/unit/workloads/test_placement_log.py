"""The independent checker of placements: quiet on what is right, loud on each planted fault."""

from pathlib import Path

import pytest

from hub.store.sqlite import SqliteStore
from hub.store.workloads import NodeRow, PlacementRow, WorkloadChanges, WorkloadRow
from tools.bench.placement_log import Held, Log, amount, doubles, lost, overcommit, read

A = {"id": "a", "requests": {"cpu": "1500m", "memory": "1Gi"}, "gpu": {"milli": 600, "memory": "2Gi"}}
NODE = {"capacity": {"cpu": 2, "memory": "4Gi"}, "gpus": [{"model": "t4", "memory": "4Gi", "count": 2}]}


def log(*placements: Held, state: str = "placed", epoch: int = 1, agents: tuple[str, ...] = ()) -> Log:
    other = "placed" if any(held.workload == "b" for held in placements) else "pending"
    return Log({"a": (state, epoch, A), "b": (other, 1, {**A, "id": "b"})}, list(placements), {"n": NODE, "m": NODE}, set(agents))


def test_amounts_are_exact() -> None:
    assert amount("500m") == amount(0.5) and amount("1Gi") == 1 << 30 and amount("2k") == 2000 and amount(3) == 3


def test_holding_more_than_there_is_is_counted_in_seconds() -> None:
    assert overcommit(log(Held("a", 1, "n", (0,), 0, 1000), Held("b", 1, "n", (1,), 1000, None)), 5000) == (0, [])
    seconds, where = overcommit(log(Held("a", 1, "n", (0,), 0, 3000), Held("b", 1, "n", (1,), 1000, None)), 5000)
    assert seconds == 2 and "cpu 3.0 of 2.0" in where[0]
    small = {"id": "s", "requests": {}, "gpu": {"milli": 600}}
    shared = Log({"a": ("placed", 1, small), "b": ("placed", 1, small)}, [Held("a", 1, "n", (0,), 0, None), Held("b", 1, "n", (0,), 500, None)], {"n": NODE})
    assert overcommit(shared, 1000)[0] == 0.5 and "gpu 0" in overcommit(shared, 1000)[1][0]
    assert overcommit(log(Held("a", 1, "nowhere", (0,), 0, None)), 1000)[0] == 1, "a node that nobody knows has nothing"


@pytest.mark.parametrize(("placements", "state", "epoch", "word"), [
    ((Held("a", 1, "n", (), 0, None), Held("a", 2, "m", (), 5, None)), "placed", 2, "on n until None and on m from 5"), ((Held("a", 1, "n", (), 0, 9), Held("a", 2, "m", (), 5, None)), "placed", 2, "until 9"),
    ((), "placed", 1, "holds []"), ((Held("a", 1, "n", (), 0, None),), "placed", 2, "under epoch 2"), ((Held("a", 1, "n", (), 0, None),), "cancelled", 1, "is cancelled, but holds n"),
    ((Held("a", 1, "n", (), 0, None),), "pending", 1, "is pending, but holds n"),
])
def test_two_places_or_none_are_found(placements: tuple[Held, ...], state: str, epoch: int, word: str) -> None:
    assert any(word in found for found in doubles(log(*placements, state=state, epoch=epoch)))
    assert doubles(log(Held("a", 1, "n", (), 0, 5), Held("a", 2, "m", (), 5, None), epoch=2)) == []


def test_documents_that_want_two_copies_are_found() -> None:
    entry = {"id": "a", "epoch": 1, "wanted": "running"}
    both = {"gw-1": {"spec": {"workloads": [entry]}}, "gw-2": {"spec": {"workloads": [{**entry, "epoch": 2}]}}}
    one = {"gw-1": {"spec": {"workloads": [entry]}}, "gw-2": {"spec": {"workloads": [{**entry, "wanted": "stopped"}]}}}
    held = log(Held("a", 1, "gw-1", (), 0, None), agents=("gw-1",))
    assert any("gw-1 (epoch 1) and gw-2 (epoch 2)" in found for found in doubles(held, both)) and doubles(held, one) == []


def test_what_was_acknowledged_must_be_kept_as_it_was_sent(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "hub.db")
    row = WorkloadRow("a", A, "placed", "n", 1)
    store.commit_workloads(WorkloadChanges({"a": row}, {("a", 1): PlacementRow("a", 1, "n", {"gpus": [1], "numa": []}, 5)}, {"n": NodeRow("n", "edge", NODE)}))
    store.close()
    found = read(tmp_path / "hub.db")
    assert found.workloads == {"a": ("placed", 1, A)} and found.placements == [Held("a", 1, "n", (1,), 5, None)] and found.agents == {"n"}
    assert lost(found, {"a": A}) == [] and lost(found, {"a": {**A, "priority": 1}}) == ["a: kept with another document"] and lost(found, {"c": A}) == ["c: acknowledged, and in no row"]
