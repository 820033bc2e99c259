"""Rebalancing and draining as an operation: a plan in steps, each waited for; stopped when the world has moved on; nothing lost or double wherever the hub is killed."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub.scheduler import Invalid
from hub.scheduler.audit import check_invariants
from hub.workloads.documents import Conflict
from hub.workloads.planner import Planner
from hub.workloads.rebalancing import KEPT, MOVE_PATIENCE_MS, WORTH, Rebalancing, propose
from hub.workloads.rounds import Rounds
from tools.bench import placement_log

from .kept import Desk, round_of, said, work
from .test_agenda import batch
from .test_planner import entries, three_under_a_budget

Json = dict[str, Any]


def plan(desk: Desk, *drain: str) -> Json:
    return propose(Rebalancing(desk.planner).inputs(drain, desk.now))


def go(desk: Desk, *drain: str) -> Json:
    proposal = plan(desk, *drain)
    document: Json = desk.do(lambda planner, now: Rebalancing(planner).start(proposal, now))
    return document


def operation(desk: Desk) -> Json:
    return list(desk.kept.rebalances.values())[-1]


def scattered(origin: str = "declared", **more: Any) -> Desk:
    """Two nodes with one container each, where one node would do."""
    desk = Desk()
    for name, other in (("gw-1", "gw-2"), ("gw-2", "gw-1")):
        desk.node(name, origin, labels={"n": name})
        if other in desk.planner.tables.nodes:
            desk.do(lambda planner, now, other=other: planner.cordon(other, "cordon", now))
        desk.submit(work(f"w-{name}", labels={"app": "w"}, **more))
    desk.do(lambda planner, now: planner.cordon("gw-1", "", now))
    assert {desk.row(f"w-{name}").node for name in ("gw-1", "gw-2")} == {"gw-1", "gw-2"}
    return desk


def moves(document: Json) -> list[tuple[str, str, str]]:
    return [(move["workload"], move["source"], move["target"]) for step in document["steps"] for move in step]


def test_a_plan_says_what_would_move_and_changes_nothing() -> None:
    desk = scattered()
    before = desk.planner.state.digest()
    found = plan(desk)
    assert found["state"] == "planned" and found["moves"] == 1 and found["gain"] > 2 * found["cost"] > 0 and "after moving 1 workload" in found["text"]
    assert desk.planner.state.digest() == before and desk.kept.rebalances == {}


def test_without_agents_the_steps_are_taken_and_no_plan_undoes_another() -> None:
    desk = scattered()
    rounds = Rounds(desk.planner)
    [(name, source, target)] = moves(go(desk))
    assert desk.row(name).node == source, "nothing moves before the first round"
    round_of(desk, rounds)
    assert (desk.row(name).node, desk.row(name).epoch) == (target, 2)
    round_of(desk, rounds)
    assert operation(desk)["state"] == "done" and operation(desk)["steps"][0][0]["state"] == "done"
    again = plan(desk)
    assert again["steps"] == [] and "gains" in again["text"]
    with pytest.raises(Conflict) as caught:
        desk.do(lambda planner, now: Rebalancing(planner).start(again, now))
    assert caught.value.field == "rebalance"
    check_invariants(desk.planner.state)
    assert placement_log.doubles(desk.kept.log()) == []


def test_with_agents_each_move_waits_for_both_edges_also_over_a_kill_of_the_hub() -> None:
    desk = scattered("edge")
    both: dict[str, bool | int] = {"gw-1": True, "gw-2": True}
    round_of(desk, **both)
    for name in ("gw-1", "gw-2"):
        said(desk, name, f"w-{name}", 1, "running")
    [(name, source, target)] = moves(go(desk))
    with pytest.raises(Conflict, match="is under way"):
        go(desk)
    assert desk.restart() == []
    rounds = Rounds(desk.planner)
    round_of(desk, rounds, **both)
    assert (name, 1, "stopped") in entries(desk, source) and (name, 2, "running") not in entries(desk, target)
    assert operation(desk)["steps"][0][0]["state"] == "moving" and desk.restart() == []
    rounds = Rounds(desk.planner)
    round_of(desk, rounds, **both)
    round_of(desk, rounds, **both)
    assert f"{source} has not said that it stopped it" in operation(desk)["steps"][0][0]["waits_for"]
    said(desk, source, name, 1, "stopped")
    round_of(desk, rounds, **both)
    assert (name, 2, "running") in entries(desk, target) and f"{target} has not said that it runs" in operation(desk)["steps"][0][0]["waits_for"]
    said(desk, target, name, 2, "running")
    round_of(desk, rounds, **both)
    assert operation(desk)["state"] == "done" and desk.row(name).epoch == 2


@pytest.mark.parametrize("what", ["cancelled", "moved", "target cordoned", "refused", "silence", "gone"])
def test_what_has_moved_on_stops_the_plan_with_the_reason(what: str) -> None:
    desk = scattered("edge")
    both: dict[str, bool | int] = {"gw-1": True, "gw-2": True}
    rounds = Rounds(desk.planner)
    round_of(desk, rounds, **both)
    [(name, source, target)] = moves(go(desk))
    words = f"is no longer on {source}"
    if what == "cancelled":
        desk.do(lambda planner, now: planner.cancel(name, now))
    elif what == "moved":
        said(desk, source, name, 1, "refused", "odd")
    elif what == "target cordoned":
        desk.do(lambda planner, now: planner.cordon(target, "cordon", now))
        words = f"{target} takes nothing now"
    elif what == "refused":
        round_of(desk, rounds, **both)
        said(desk, source, name, 1, "stopped")
        said(desk, target, name, 2, "refused", "no driver")
        words = "no driver"
    elif what == "silence":
        round_of(desk, rounds, **both)
        round_of(desk, rounds, MOVE_PATIENCE_MS + 1, **both)
        words = f"{source} has not said that it stopped it for 10 min"
    else:
        round_of(desk, rounds, **{source: True})
        words = f"{target} takes nothing now"
    if what != "gone":
        round_of(desk, rounds, **both)
    assert operation(desk)["state"] == "stopped" and words in operation(desk)["reason"] and operation(desk)["reason"].startswith(name)
    check_invariants(desk.planner.state)
    assert placement_log.doubles(desk.kept.log()) == []


def test_a_plan_that_is_cancelled_begins_nothing_more() -> None:
    desk = scattered()
    document = go(desk)
    assert desk.do(lambda planner, now: Rebalancing(planner).stop(document["id"], now))["state"] == "cancelled"
    round_of(desk)
    assert desk.row("w-gw-1").epoch == desk.row("w-gw-2").epoch == 1 and desk.do(lambda planner, now: Rebalancing(planner).stop("none", now)) is None
    assert desk.do(lambda planner, now: Rebalancing(planner).stop(document["id"], now))["state"] == "cancelled"


def test_what_may_not_move_stays_with_the_reason() -> None:
    desk = scattered(migratable=False)
    found = plan(desk)
    assert found["steps"] == [] and {one["reason"] for one in found["stays"]} == {"its document says that it does not move"} and found["stay"] == 2
    desk = Desk()
    desk.node("n-1")
    desk.submit(batch("job", 1, 1000), {"id": "vm", "kind": "vm", "migratable": False})
    assert {one["workload"]: one["reason"] for one in plan(desk)["stays"]} == {"job": "a batch job would begin anew", "vm": "its document says that it does not move"}
    desk = scattered("edge")
    round_of(desk, **{"gw-1": True})
    assert [one["reason"] for one in plan(desk)["stays"]] == ["its node is not heard from"]
    desk = scattered()
    [(name, _, _)] = moves(go(desk))
    rounds = Rounds(desk.planner)
    round_of(desk, rounds)
    round_of(desk, rounds)
    assert [(one["workload"], one["reason"]) for one in plan(desk)["stays"]] == [(name, "was moved less than 30 min ago")]
    desk.now += WORTH.rest_ms
    assert plan(desk)["stays"] == []


def test_what_has_a_state_stays_as_it_would_begin_anew_elsewhere() -> None:
    assert {one["reason"] for one in plan(scattered(spec={"checkpoint": {"every_s": 60}}))["stays"]} == {"its document asks for checkpoints, and it would begin anew"}
    desk = scattered("edge")
    assert moves(plan(desk)) and plan(desk)["stays"] == [], "the control: these would move"
    for name in ("w-gw-1", "w-gw-2"):
        said(desk, desk.row(name).node, name, 1, "running")
        said(desk, desk.row(name).node, name, 1, "checkpointed")
    assert moves(plan(desk)) == [] and {one["reason"] for one in plan(desk)["stays"]} == {"it is checkpointed, and would begin anew"}
    said(desk, desk.row("w-gw-1").node, "w-gw-1", 1, "running")
    assert {one["workload"] for one in plan(desk)["stays"]} == {"w-gw-2"}


def test_a_node_is_emptied_with_room_made_for_what_finds_none_and_a_budget_kept() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(work("big", 4, kind="vm"))
    desk.node("n-2")
    desk.submit(work("small", 2, kind="vm"))
    desk.node("n-3", capacity={"cpu": 2})
    assert desk.row("big").node == "n-1" and desk.row("small").node == "n-2"
    found = plan(desk, "n-1")
    assert [[move["workload"] for move in step] for step in found["steps"]] == [["small"], ["big"]] and "n-1 is empty after moving 2 workloads" in found["text"]
    assert {move["how"] for step in found["steps"] for move in step} == {"restart"}, "there are no drivers that migrate"
    go(desk, "n-1")
    rounds = Rounds(desk.planner)
    for _ in range(4):
        round_of(desk, rounds)
    assert operation(desk)["state"] == "done" and (desk.row("big").node, desk.row("small").node) == ("n-2", "n-3") and desk.kept.nodes["n-1"].cordon == "cordon"
    desk.submit(work("next", 1))
    assert desk.row("next").state == "pending", "an emptied node takes nothing new"
    for name, match in (("none", "is no node"),):
        with pytest.raises(Invalid, match=match):
            plan(desk, name)
    desk.node("gw-1", "edge")
    round_of(desk, rounds)
    with pytest.raises(Conflict, match="not heard from"):
        plan(desk, "gw-1")


def test_budgets_hold_back_moves_until_the_one_before_runs() -> None:
    desk = three_under_a_budget()
    rounds = Rounds(desk.planner)
    both: dict[str, bool | int] = {"gw-1": True, "gw-2": True}
    round_of(desk, rounds, **both)
    found = go(desk, "gw-1")
    assert [len(step) for step in found["steps"]] == [1, 1, 1]
    for done in range(3):
        round_of(desk, rounds, **both)
        round_of(desk, rounds, **both)
        [(name, epoch, _)] = [entry for entry in entries(desk, "gw-1") if entry[2] == "stopped"]
        assert sum(desk.row(f"a{n}").node == "gw-2" for n in range(3)) == done + 1, "one at a time"
        said(desk, "gw-1", name, epoch, "stopped")
        said(desk, "gw-2", name, epoch + 1, "running")
        round_of(desk, rounds, **both)
    assert operation(desk)["state"] == "done"


def test_what_is_reserved_is_left_alone_by_a_plan_too() -> None:
    desk = scattered()
    desk.submit(batch("run", 3, 1000, node_selector={"n": "gw-1"}))
    desk.submit(batch("later", 3, 1000, 9000, node_selector={"n": "gw-1"}))
    assert all(target != "gw-1" for _, _, target in moves(plan(desk)))
    go(desk)
    rounds = Rounds(desk.planner)
    for _ in range(3):
        round_of(desk, rounds)
    check_invariants(desk.planner.state)
    desk.do(lambda planner, now: planner.cancel("run", now))
    round_of(desk, rounds)
    assert desk.row("later").state == "placed"


def test_old_operations_are_forgotten() -> None:
    desk = scattered()
    for _ in range(KEPT + 3):
        document = go(desk)
        desk.do(lambda planner, now, name=document["id"]: Rebalancing(planner).stop(name, now))
    assert len(desk.kept.rebalances) == KEPT and operation(desk)["id"] == document["id"]


# -- whatever happens --------------------------------------------------------------------------------------------------------

STEP = st.tuples(st.sampled_from(["submit", "submit", "cancel", "go", "go", "drain", "stop", "say", "say", "say", "round", "round", "kill", "remove", "add", "silent", "cordon"]), st.integers(0, 2**16))


def play(steps: list[tuple[str, int]]) -> None:
    desk = Desk()
    for number in range(2):
        desk.node(f"n{number}")
        desk.node(f"gw{number}", "edge", kind="edge")
    rounds, online, acknowledged = Rounds(desk.planner), dict.fromkeys(("gw0", "gw1"), True), dict[str, Json]()
    for what, draw in steps:
        chance = random.Random(draw)
        name, node = f"w{chance.randrange(10)}", chance.choice(["n0", "n1", "gw0", "gw1"])
        try:
            if what == "submit":
                document = work(name, chance.choice(["500m", 1, 2]), labels={"app": "x"})
                desk.submit(document)
                acknowledged[name] = document
            elif what in ("go", "drain"):
                go(desk, *([node] if what == "drain" else []))
        except (Conflict, Invalid):
            pass
        if what == "cancel":
            desk.do(lambda planner, now, name=name: planner.cancel(name, now))
        elif what == "stop" and desk.kept.rebalances:
            desk.do(lambda planner, now: Rebalancing(planner).stop(operation(desk)["id"], now))
        elif what == "say":
            wanted = [(edge, entry) for edge in online for entry in desk.planner.wanted(edge)]
            if wanted:
                edge, entry = chance.choice(wanted)
                said(desk, edge, entry["id"], entry["epoch"], "stopped" if entry["wanted"] == "stopped" else chance.choice(["running", "running", "refused"]))
        elif what == "round":
            round_of(desk, rounds, **{edge: up or desk.now - 400_000 for edge, up in online.items()})
        elif what == "kill":
            assert desk.restart() == []
            rounds = Rounds(desk.planner)
        elif what == "remove" and node[0] == "n":
            desk.do(lambda planner, now, node=node: planner.remove_node(node, False, now))
        elif what == "add" and node[0] == "n":
            desk.node(node)
        elif what == "silent":
            online[f"gw{draw % 2}"] = not online[f"gw{draw % 2}"]
        elif what == "cordon":
            desk.do(lambda planner, now, node=node, draw=draw: planner.cordon(node, ["", "cordon", "drain"][draw % 3], now))
        check_invariants(desk.planner.state)
        documents = {edge: {"spec": {"workloads": desk.planner.wanted(edge)}} for edge in online}
        assert placement_log.doubles(desk.kept.log(), documents) == [] and placement_log.lost(desk.kept.log(), acknowledged) == []
        assert sum(document["state"] == "running" for document in desk.kept.rebalances.values()) <= 1
    assert placement_log.overcommit(desk.kept.log(), desk.now) == (0, [])


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(STEP, max_size=40))
def test_nothing_is_lost_double_or_overcommitted_whatever_happens(steps: list[tuple[str, int]]) -> None:
    play(steps)


def test_the_checker_catches_a_move_that_frees_its_old_place_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the new node is told before the old one has stopped."""
    def wanted(self: Planner, node: str) -> list[Json]:
        return [{"id": key[0], "epoch": key[1], "wanted": "running"} for key in self.tables.on_node.get(node, ())]

    monkeypatch.setattr(Planner, "wanted", wanted)
    chance = random.Random(1)
    names = ["submit", "submit", "go", "drain", "say", "round", "round", "round"]
    with pytest.raises(AssertionError):
        for _ in range(20):
            play([(chance.choice(names), chance.randrange(2**16)) for _ in range(40)])
