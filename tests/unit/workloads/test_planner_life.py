"""Random lives of the planner: nothing lost, double or overcommitted, and the checker that says so catches planted bugs."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub.scheduler import Invalid
from hub.scheduler.audit import check_invariants
from hub.workloads import planner as planner_module
from hub.workloads.documents import Conflict
from hub.workloads.planner import Planner
from hub.workloads.rounds import LOST_AFTER_MS, Rounds
from tools.bench import placement_log

from .kept import Desk, few_steps, round_of, said, work  # noqa: F401 few_steps is a fixture

Json = dict[str, Any]

OPERATION = st.tuples(st.sampled_from(["submit", "submit", "list", "cancel", "drain", "uncordon", "remove", "add", "said", "said", "silent", "taint", "round", "kill", "refuse"]), st.integers(0, 2**20))


def play(desk: Desk, steps: list[tuple[str, int]]) -> None:
    """Random life of a small cluster, with kills of the hub in between; the rows are checked by a checker that knows none of the planner's code."""
    for number in range(3):
        desk.node(f"n{number}", gpus=[{"model": "t4", "count": 2}], region=f"r{number % 2}")
        desk.node(f"gw{number}", "edge", kind="edge" if number else "cloud")
    desk.do(lambda planner, _: planner.put_quota("red", {"nominal": {"cpu": 5}}))
    desk.do(lambda planner, _: planner.put_budget("x", {"selector": {"labels": {"app": "x"}}, "allowed": 1}))
    rounds, online = Rounds(desk.planner), dict.fromkeys(("gw0", "gw1", "gw2"), True)
    acknowledged: dict[str, Json] = {}
    for what, draw in steps:
        chance = random.Random(draw)
        name, node = f"w{chance.randrange(12)}", chance.choice(["n0", "n1", "n2", "gw0", "gw1", "gw2"])
        if what == "submit":
            document = work(name, chance.choice(["500m", 1, 3]), priority=chance.randrange(3), tenant=chance.choice(["", "red"]), kind=chance.choice(["vm", "container"]), labels={"app": chance.choice("xy")})
            if chance.random() < 0.3:
                document["gpu"] = chance.choice([{"count": 1, "milli": 400}, {"count": 2}])
            if chance.random() < 0.3:
                document["anti_affinity"] = [{"selector": {"labels": {"app": "x"}}, "topology_key": "host"}]
            try:
                desk.submit(document)
            except Conflict:
                pass
            else:
                acknowledged[name] = document
        elif what == "list":
            documents = [work(f"w{chance.randrange(12, 40)}", chance.choice(["500m", 1, 3]), labels={"app": chance.choice("xy")}, priority=chance.randrange(2)) for _ in range(4)]
            documents = list({document["id"]: document for document in documents}.values())
            try:
                desk.submit(*documents)
            except Conflict:
                pass
            else:
                acknowledged |= {document["id"]: document for document in documents}
        elif what == "cancel":
            desk.do(lambda planner, now, name=name: planner.cancel(name, now))
        elif what in ("drain", "uncordon"):
            desk.do(lambda planner, now, node=node, what=what: planner.cordon(node, "drain" if what == "drain" else "", now))
        elif what == "remove":
            desk.do(lambda planner, now, node=node: planner.remove_node(node, False, now))
        elif what == "add":
            if node[0] == "n":
                desk.node(node, gpus=[{"model": "t4", "count": 2}], region="r0")
            else:
                desk.do(lambda planner, now, node=node, draw=draw: planner.capacity(node, now, {"capacity": {"cpu": 4, "memory": "8Gi"}, "kind": "edge"}, now))
        elif what in ("said", "refuse"):
            wanted = [(edge, entry) for edge in online for entry in desk.planner.wanted(edge)]
            if wanted:
                edge, entry = chance.choice(wanted)
                state = "stopped" if entry["wanted"] == "stopped" else "refused" if what == "refuse" else chance.choice(["running", "running", "done", "failed", "stopped"])
                said(desk, edge, entry["id"], entry["epoch"], state, "because")
        elif what == "silent":
            online[f"gw{draw % 3}"] = not online[f"gw{draw % 3}"]
        elif what == "taint" and node[0] == "n":
            row = desk.kept.nodes.get(node)
            if row is not None:
                taints = [] if row.document.get("taints") else [{"key": "t", "effect": "NoExecute"}]
                desk.do(lambda planner, now, node=node, row=row, taints=taints: planner.put_node(node, {**row.document, "taints": taints}, "declared", now))
        elif what == "round":
            round_of(desk, rounds, chance.choice([1000, 60_000, LOST_AFTER_MS + 1]), **{edge: up or desk.now - 400_000 for edge, up in online.items()})
        elif what == "kill":
            before = desk.planner.state
            held = {name: before.free[:, index].tolist() for name, index in before.node_index.items() if name in desk.kept.nodes}
            assert desk.restart() == []
            after = desk.planner.state
            assert {name: after.free[:, after.node_index[name]].tolist() for name in held} == held, "what is held comes back from the rows alone"
            rounds = Rounds(desk.planner)
        check_invariants(desk.planner.state)
        log, documents = desk.kept.log(), {edge: {"spec": {"workloads": desk.planner.wanted(edge)}} for edge in online}
        assert placement_log.doubles(log, documents) == []
        assert placement_log.lost(log, acknowledged) == []
    seconds, where = placement_log.overcommit(desk.kept.log(), desk.now)
    assert (seconds, where) == (0, [])


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(OPERATION, max_size=40))
def test_nothing_is_lost_double_or_overcommitted_whatever_happens(steps: list[tuple[str, int]]) -> None:
    play(Desk(), steps)


def _random_steps(seed: int, count: int) -> list[tuple[str, int]]:
    chance = random.Random(seed)
    names = ["submit"] * 4 + ["list"] + ["cancel", "drain", "uncordon", "said", "said", "said", "silent", "round", "round", "kill", "remove", "add"]
    return [(chance.choice(names), chance.randrange(2**20)) for _ in range(count)]


def test_long_lives_of_the_planner_are_clean() -> None:
    for seed in range(12):
        play(Desk(), _random_steps(seed, 60))


@pytest.mark.parametrize("bug", ["adopt twice", "old place forgotten", "told at once", "release too early"])
def test_the_checker_catches_planted_bugs(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the property test above."""
    if bug == "adopt twice":
        adopt = Planner._adopt
        monkeypatch.setattr(Planner, "_adopt", lambda self, placement, now: adopt(self, placement, now) or (self.state.adopt(
            planner_module.replace(self.items_of(placement.workload), id=f"{placement.workload}?"), self._seat(self.state.node_index[placement.node], placement.seat), now) or ""), raising=True)
        monkeypatch.setattr(Planner, "items_of", lambda self, name: self.tables.items[name].item, raising=False)
    elif bug == "old place forgotten":
        index = Planner.index
        monkeypatch.setattr(Planner, "index", lambda self, placement, *, add: index(self, placement, add=add) if add or placement.epoch % 2 else None)
    elif bug == "told at once":
        def wanted(self: Planner, node: str) -> list[Json]:
            return [
                {"id": key[0], "epoch": key[1], "wanted": "running" if self.tables.rows[key[0]].state == "placed" else "stopped"} for key in self.tables.on_node.get(node, ())
            ]
        monkeypatch.setattr(Planner, "wanted", wanted)
    else:
        def leave(self: Planner, placement: Any, now: int, why: str) -> None:
            self.state.release(placement.workload)
            self.ledger.put(self.tables.open, (placement.workload, placement.epoch), planner_module.replace(placement, why=why))
        monkeypatch.setattr(Planner, "leave", leave)
    with pytest.raises((AssertionError, KeyError, Invalid)):
        for seed in range(25):
            play(Desk(), _random_steps(seed, 60))
