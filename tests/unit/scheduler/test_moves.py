"""The order of moves: feasible at every step with room held at both ends, cycles broken or refused, limits and budgets kept. Each plan is followed by `plan_checker`."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler import Invalid, Placed
from hub.scheduler import budget as parse_budget
from hub.scheduler import workload as parse_workload
from hub.scheduler.arrays import Seat
from hub.scheduler.audit import check_invariants
from hub.scheduler.moves import Course, Limits, Move, Plan, begin_move, cancel_move, carry_out, end_move, order, under_way
from tests.unit.scheduler.fleet_builder import GB, Fleet, item, node
from tests.unit.scheduler.plan_checker import Broken, follow


def planned(fleet: Fleet, targets: dict[str, str], limits: Limits | None = None, budgets: dict[str, int] | None = None) -> tuple[Plan, dict[str, str]]:
    """The plan for some targets, followed to its end by the checker and by the state."""
    limits = limits or Limits()
    plan = order(Course(fleet.scheduler, limits, 0), {name: fleet.state.node_index[target] for name, target in targets.items()})
    sites = {name: each["site"] or "" for name, each in fleet.nodes.items()}
    after = follow(fleet.nodes, fleet.items, fleet.where(), fleet.devices(), plan.steps, limits, budgets, sites)
    reached = fleet.state.snapshot()
    carry_out(reached, plan, 0)
    check_invariants(reached)
    return plan, after


def test_a_swap_goes_through_a_third_node() -> None:
    fleet = Fleet(node("n1"), node("n2"), node("n3"))
    fleet.put(item("a", 6, 20), "n1")
    fleet.put(item("b", 6, 8), "n2")
    plan, after = planned(fleet, {"a": "n2", "b": "n1"})
    assert after == {"a": "n2", "b": "n1"} and not plan.refused
    assert [(move.workload, move.target, move.hop) for move in plan.moves] == [("b", "n3", True), ("a", "n2", False), ("b", "n1", False)], "the one with less to carry hops"
    assert plan.text == "after moving 2 workloads, 36 GB, in 3 steps of 576 s in all"


def test_a_cycle_without_a_third_node_is_refused_with_the_reason() -> None:
    fleet = Fleet(node("n1"), node("n2"), node("n3", cpu=2))
    fleet.put(item("a", 6, 20), "n1")
    fleet.put(item("b", 6, 8), "n2")
    plan, after = planned(fleet, {"a": "n2", "b": "n1"})
    assert after == {"a": "n1", "b": "n2"} and not plan.steps
    assert plan.refused[0].reason == "n2 lacks 4000m CPU; a cycle (a waits for b waits for a) and no third node can take one of them for a while"


def test_a_chain_is_ordered_from_its_free_end() -> None:
    fleet = Fleet(node("n1"), node("n2"), node("n3"))
    fleet.put(item("a", 8, 20), "n1")
    fleet.put(item("b", 8, 8), "n2")
    plan, _ = planned(fleet, {"a": "n2", "b": "n3"})
    assert [[move.workload for move in step] for step in plan.steps] == [["b"], ["a"]]


def test_room_is_held_at_both_ends() -> None:
    """A node that is left is free only when the move is over: another workload does not begin to move in before."""
    fleet = Fleet(node("n1"), node("n2"))
    fleet.put(item("a", 6, 8), "n1")
    fleet.put(item("c", 4, 8), "n2")
    course = Course(fleet.scheduler, Limits(), 0)
    assert course.begin(course.state.workload("c"), 0, 0) == "n1 lacks 2000m CPU"  # type: ignore[arg-type]


def test_no_storm_limits_hold_per_node_per_link_and_in_total() -> None:
    """kubevirt/monitoring#266: a hundred VMs that should move do not move at once."""
    fleet = Fleet(*(node(f"a{number}", cpu=64, gb=256, site="west") for number in range(4)), *(node(f"b{number}", cpu=64, gb=256, site="east") for number in range(4)))
    for number in range(100):
        assert fleet.put(item(f"vm{number}", 1, 2), f"a{number % 4}")
    limits = Limits(per_node=2, per_link=3, total=5, per_plan=40)
    plan, _ = planned(fleet, {f"vm{number}": f"b{number % 4}" for number in range(100)}, limits)
    assert max(map(len, plan.steps)) == 3 and len(plan.moves) == 40
    assert len(plan.refused) == 60 and plan.refused[0].reason == "a plan has at most 40 moves"
    with pytest.raises(Invalid, match=r"limits.per_link: 0 allows no move at all; give 1 or more"):
        replace(limits, per_link=0)


def test_what_is_under_way_counts_against_the_limits_and_is_not_moved_again() -> None:
    """A migration that is slow to finish is no reason to start others (kubevirt/community#258)."""
    fleet = Fleet(node("n1"), node("n2"), node("n3"))
    for name in ("a", "b", "c"):
        fleet.put(item(name, 1, 4), "n1")
    begin_move(fleet.state, "a", Seat(fleet.state.node_index["n2"]), 0)
    assert [each[0].id for each in under_way(fleet.state)] == ["a"] and fleet.state.free[0, 0] == 5000, "both ends are held"
    check_invariants(fleet.state)
    course = Course(fleet.scheduler, Limits(per_node=1), 0)
    assert course.begin(course.state.workload("b"), 2, 0) == "n1 has 1 moves under way"  # type: ignore[arg-type]
    assert course.begin(course.state.workload("a"), 2, 0) == "it is being moved already"  # type: ignore[arg-type]
    again = order(Course(fleet.scheduler, Limits(), 0), {"a": 2})
    assert again.waits and again.moves[0].source == "n2", "only after the one that is under way"
    plan = order(Course(fleet.scheduler, Limits(per_node=1), 0), {"b": 2})
    assert plan.waits and [move.workload for move in plan.moves] == ["b"]
    assert end_move(fleet.state, "a") and not end_move(fleet.state, "a")
    assert fleet.state.free[0, 0] == 6000
    check_invariants(fleet.state)


def test_a_failed_move_leaves_the_workload_where_it_was() -> None:
    fleet = Fleet(node("n1"), node("n2"))
    fleet.put(item("a", 2, 4), "n1")
    free = fleet.state.free.copy()
    begin_move(fleet.state, "a", Seat(1), 500)
    assert cancel_move(fleet.state, "a") and not cancel_move(fleet.state, "a")
    assert fleet.where() == {"a": "n1"} and (fleet.state.free == free).all() and fleet.state.w_start[fleet.state.slot_of["a"]] == 0
    check_invariants(fleet.state)
    fleet.put(item("full", 8, 1), "n2")
    with pytest.raises(Invalid, match="no room"):
        begin_move(fleet.state, "a", Seat(1), 0)
    assert fleet.where() == {"a": "n1", "full": "n2"}


def test_budgets_bound_the_restarts_of_a_step() -> None:
    fleet = Fleet(node("n1"), node("n2"))
    for number in range(4):
        fleet.put(item(f"web{number}", 1, 1, app="web", kind="container"), "n1")
    fleet.state.set_budget(parse_budget({"name": "web", "selector": {"labels": {"app": "web"}}, "allowed": 1}))
    plan, after = planned(fleet, {f"web{number}": "n2" for number in range(4)}, budgets={"web": 1})
    assert [len(step) for step in plan.steps] == [1, 1, 1, 1] and set(after.values()) == {"n2"}
    fleet.state.set_budget(parse_budget({"name": "web", "selector": {"labels": {"app": "web"}}, "allowed": 0}))
    plan, _ = planned(fleet, {"web0": "n2"}, budgets={"web": 0})
    assert not plan.steps and plan.refused[0].reason == "budget web allows 0 disruptions at a time"


def test_who_must_be_apart_is_apart_during_the_move() -> None:
    fleet = Fleet(node("n1"), node("n2"), node("n3"))
    fleet.put(item("a", 1, 1, app="db", apart="host"), "n1")
    fleet.put(item("b", 1, 1, app="db", apart="host"), "n2")
    plan, after = planned(fleet, {"a": "n2", "b": "n3"})
    assert [[move.workload for move in step] for step in plan.steps] == [["b"], ["a"]] and after == {"a": "n2", "b": "n3"}


def test_a_gpu_fraction_moves_to_a_device_that_has_it() -> None:
    fleet = Fleet(node("n1", gpus=1), node("n2", gpus=2))
    fleet.put(item("a", 1, 1, gpu=600), "n1")
    fleet.put(item("b", 1, 1, gpu=600), "n2")
    plan, _ = planned(fleet, {"a": "n2"})
    assert plan.moves[0].seat.gpus != (fleet.devices()["b"],)


def test_what_others_must_be_with_stays() -> None:
    fleet = Fleet(node("n1"), node("n2"))
    fleet.put(item("db", 1, 1), "n1")
    follower = {"id": "app", "labels": {"app": "app"}, "requests": {"cpu": 1}, "affinity": [{"selector": {"labels": {"app": "db"}}, "topology_key": "host"}]}
    assert isinstance(fleet.scheduler.reserve(parse_workload(follower), 0), Placed)
    plan = order(Course(fleet.scheduler, Limits(), 0), {"db": 1})
    assert not plan.steps and plan.refused[0].reason == "workloads of its host must be with it"


# any fleet, any targets

nodes = st.lists(st.tuples(st.integers(2, 8), st.integers(4, 16), st.sampled_from(["z1", "z2", "z3"]), st.integers(0, 2), st.sampled_from(["", "west", "east"])), min_size=2, max_size=5)
items = st.lists(st.tuples(
    st.integers(1, 4), st.integers(1, 6), st.sampled_from(["a", "b", "c"]), st.sampled_from(["vm", "container"]), st.sampled_from([None, None, "apart", "spread"]),
    st.sampled_from([0, 0, 400, 700]), st.integers(0, 4), st.integers(0, 4), st.booleans(),
), min_size=1, max_size=12)

RULES = {"a": ("host", 2), "b": ("zone", 1), "c": ("host", 1)}


def build(some_nodes: list[Any], some_items: list[Any]) -> tuple[Fleet, dict[str, str]]:
    fleet = Fleet(*(node(f"n{number}", cpu, gb, zone, gpus, site=site or None, price=100_000 + number) for number, (cpu, gb, zone, gpus, site) in enumerate(some_nodes)))
    targets = {}
    for number, (cpu, gb, app, kind, rule, gpu, at, to, pinned) in enumerate(some_items):
        app, (key, skew) = f"{app}{rule or ''}", RULES[app]
        where, target = f"n{at % len(some_nodes)}", f"n{to % len(some_nodes)}"
        each = item(f"w{number}", cpu / 2, gb, app=app, kind=kind, apart=key if rule == "apart" else None, spread=key if rule == "spread" else None, skew=skew, gpu=gpu,
                    zone=fleet.nodes[where]["zone"] if pinned and number % 3 == 0 else "")
        if fleet.put(each, where):
            targets[each["id"]] = target
    return fleet, targets


@settings(max_examples=200)
@given(nodes, items, st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(0, 2))
def test_every_step_of_any_plan_is_feasible(some_nodes: list[Any], some_items: list[Any], per_node: int, per_link: int, total: int, allowed: int) -> None:
    fleet, targets = build(some_nodes, some_items)
    for app in {each["app"] for each in fleet.items.values()}:
        fleet.state.set_budget(parse_budget({"name": app, "selector": {"labels": {"app": app}}, "allowed": allowed}))
    before = fleet.state.digest()
    limits = Limits(per_node=per_node, per_link=per_link, total=total)
    plan, after = planned(fleet, targets, limits, {each["app"]: allowed for each in fleet.items.values()})
    assert fleet.state.digest() == before, "planning changes nothing"
    refused = {each.workload for each in plan.refused}
    assert all(after[name] == target or name in refused for name, target in targets.items()), "a target is reached or refused"
    assert all(each.reason for each in plan.refused)


# negative controls


def test_the_checker_sees_what_is_wrong() -> None:
    fleet = Fleet(node("n1"), node("n2"), node("n3"), node("n4"))
    for name, where in (("a", "n1"), ("b", "n2")):
        fleet.put(item(name, 6, 4), where)
    move = Move("a", "n1", "n3", "migrate", 4 * GB, 0, 100_000, Seat(2))

    def fails(match: str, *steps: tuple[Move, ...], limits: Limits | None = None) -> None:
        with pytest.raises(Broken, match=match):
            follow(fleet.nodes, fleet.items, fleet.where(), {}, steps, limits or Limits())

    follow(fleet.nodes, fleet.items, fleet.where(), {}, [(move,)], Limits())
    fails("n2 holds 12000 cpu of 8000", (replace(move, target="n2"),))
    fails("a moves 2 times", (move,), (replace(move, source="n3", target="n1", start_ms=100_000, end_ms=200_000),))
    fails("begins before", (move,), (replace(move, workload="b", source="n2", target="n1"),))
    fails("a is on n1", (replace(move, source="n2"),))
    fails("faster than its nodes", (replace(move, end_ms=10),))
    fails("more moves at once", (move, replace(move, workload="b", source="n2", target="n4")), limits=Limits(total=1))
    fails("n1 holds 12000 cpu", (move, replace(move, workload="b", source="n2", target="n1")))


def test_the_property_sees_a_source_that_is_freed_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the old seat is free as soon as the move begins."""
    real = begin_move

    def hasty(state: Any, name: str, seat: Seat, now: int) -> None:
        real(state, name, seat, now)
        end_move(state, name)

    fleet = Fleet(node("n1"), node("n2"), node("n3"))
    fleet.put(item("a", 8, 20), "n2")
    fleet.put(item("b", 8, 8), "n1")
    planned(fleet, {"a": "n3", "b": "n2"})
    monkeypatch.setattr("hub.scheduler.moves.begin_move", hasty)
    with pytest.raises(Broken, match="n2 holds 16000 cpu"):
        planned(fleet, {"a": "n3", "b": "n2"})


def test_a_machine_that_is_gone_is_no_empty_domain() -> None:
    fleet = Fleet(*(node(f"n{number}") for number in range(3)))
    for number in range(3):
        assert fleet.put(item(f"web{number}", app="web", spread="host"), f"n{number}")
    moved = fleet.scheduler.vanish("n2", 0)
    assert [(one.workload, one.to is not None) for one in moved] == [("web2", True)]


def test_what_a_running_move_leaves_behind_is_nobody_s_to_move() -> None:
    fleet = Fleet(*(node(f"n{number}") for number in range(3)))
    fleet.put(item("vm"), "n0")
    begin_move(fleet.state, "vm", Seat(fleet.state.node_index["n1"]), 0)
    assert [one.workload for one in fleet.scheduler.vanish("n0", 0)] == []
    assert fleet.where() == {"vm": "n1"}
