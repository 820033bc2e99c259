"""What rebalancing and draining do with a running fleet: each pain of the threads cited is one test. Plans are followed by `plan_checker`."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler import Scheduler, State
from hub.scheduler import budget as parse_budget
from hub.scheduler import node as parse_node
from hub.scheduler import workload as parse_workload
from hub.scheduler.arrays import Seat
from hub.scheduler.audit import check_invariants
from hub.scheduler.drain import drain, maintenance, room_for
from hub.scheduler.feasible import verdicts
from hub.scheduler.moves import Limits, Plan, carry_out
from hub.scheduler.reasons import Fail
from hub.scheduler.rebalance import Worth, layout_cost, rebalance
from tests.unit.scheduler import streams
from tests.unit.scheduler.fleet_builder import Fleet, item, node, to_workload
from tests.unit.scheduler.plan_checker import follow, uneven
from tests.unit.scheduler.test_moves import build, items, nodes
from tools.bench.placement_check import Checker

HOUR = 3_600_000


def checked(fleet: Fleet, plan: Plan, limits: Limits | None = None, budgets: dict[str, int] | None = None) -> dict[str, str]:
    """Follow a plan, then make it true."""
    sites = {name: each["site"] or "" for name, each in fleet.nodes.items()}
    after = follow(fleet.nodes, fleet.items, fleet.where(), fleet.devices(), plan.steps, limits or Limits(), budgets, sites)
    carry_out(fleet.state, plan, 0)
    check_invariants(fleet.state)
    assert fleet.where() == after
    return after


# spread


def test_spread_is_made_good_after_scale_down() -> None:
    """kubernetes#115911: ten replicas over three zones go down to three, and what is left is 2-1-0."""
    fleet = Fleet(*(node(f"n{number}", zone=f"z{number % 3}") for number in range(6)))
    for number in range(10):
        fleet.put(item(f"web{number}", 1, 1, app="web", kind="container", spread="zone"), f"n{number % 6}")
    for number in (1, 2, 4, 5, 7, 8, 9):
        fleet.state.release(f"web{number}")
    fleet.put(item("web10", 1, 1, app="web", kind="container", spread="zone"), "n1")
    fleet.state.release("web6")
    assert sorted(fleet.where().values()) == ["n0", "n1", "n3"] and uneven(fleet.nodes, fleet.items, fleet.where(), "web", "zone") == 2
    after = checked(fleet, rebalance(fleet.scheduler, HOUR))
    assert uneven(fleet.nodes, fleet.items, after, "web", "zone") == 0
    assert not rebalance(fleet.scheduler, HOUR).steps


def test_spread_that_cannot_be_made_good_says_why() -> None:
    fleet = Fleet(node("n0", zone="z0"), node("n1", zone="z1", cpu=1))
    fleet.put(item("full", 1, 1, migratable=False), "n1")
    for number in range(3):
        fleet.put(item(f"web{number}", 1, 1, app="web", spread="zone"), "n0", anyway=True)
    plan = rebalance(fleet.scheduler, HOUR)
    assert not plan.steps and plan.refused[0].reason == "spread over zone is 3, 1 allowed: no emptier domain has a node for any of them"
    plan = rebalance(fleet.scheduler, HOUR, {f"web{number}": HOUR - 1000 for number in range(3)})
    assert plan.refused[0].reason == "spread over zone is 3, 1 allowed: all were moved less than 1800 s ago, or cannot move"


# gain


def sparse() -> Fleet:
    fleet = Fleet(*(node(f"n{number}", price=100_000) for number in range(4)))
    for number in range(4):
        fleet.put(item(f"vm{number}", 2, 4), f"n{number}")
    return fleet


def test_hardly_used_nodes_are_emptied() -> None:
    fleet = sparse()
    plan = rebalance(fleet.scheduler, HOUR)
    after = checked(fleet, plan)
    assert len(set(after.values())) == 2, "four quarters fill one node to 100 %, which is beyond the safe load"
    assert plan.gain == 200_000 and plan.cost == 2 * (4 * 1_000 + 1_000)


def test_consolidation_does_not_churn() -> None:
    """karpenter#2388: thousands of evictions a day for nodes that cost the same. What was moved rests, a gain must be worth several times its cost, no plan undoes another."""
    fleet = sparse()
    moved: dict[str, int] = {}
    total = 0
    for turn in range(48):
        now = turn * HOUR // 2
        plan = rebalance(fleet.scheduler, now, moved, seed=turn)
        total += len(plan.moves)
        checked(fleet, plan)
        moved |= {move.workload: now for move in plan.moves}
    assert total == 2, "two moves on the first turn, none on the 47 after it"
    pricey = Worth(per_gb=100_000)
    fleet = sparse()
    plan = rebalance(fleet.scheduler, 0, worth=pricey)
    assert not plan.steps and plan.reason == "no change gains enough"


def test_what_was_moved_lately_rests() -> None:
    fleet = sparse()
    recently = {f"vm{number}": HOUR - 1_799_999 for number in range(4)}
    assert not rebalance(fleet.scheduler, HOUR, recently).steps
    assert rebalance(fleet.scheduler, HOUR + 1, recently).steps


def test_a_node_of_the_same_price_is_no_reason_to_move() -> None:
    """karpenter#2388 again: the same instance type comes back."""
    fleet = Fleet(node("n0", price=100_000), node("n1", price=100_000), node("cheaper", price=90_000))
    fleet.put(item("a", 2, 4), "n0")
    assert rebalance(fleet.scheduler, HOUR, worth=Worth(threshold_permille=3_000)).reason == "no change gains enough"
    assert checked(fleet, rebalance(fleet.scheduler, HOUR, worth=Worth(threshold_permille=1_000))) == {"a": "cheaper"}


def test_nothing_is_evicted_to_come_back() -> None:
    """descheduler#994: a move names its target, holds it, and is gone from the source; the scheduler that places is the one that moves."""
    fleet = Fleet(node("n0", cpu=8), node("n1", cpu=8), node("n2", cpu=8))
    for number in range(8):
        fleet.put(item(f"vm{number}", 1, 1), "n0")
    fleet.put(item("there", 1, 1), "n1")
    plan = rebalance(fleet.scheduler, HOUR)
    assert plan.moves and all(move.source == "n0" != move.target for move in plan.moves)
    before = fleet.where()
    after = checked(fleet, plan)
    again = rebalance(fleet.scheduler, HOUR, {move.workload: HOUR for move in plan.moves})
    assert not again.steps and fleet.where() == after != before
    assert not rebalance(fleet.scheduler, 10 * HOUR).steps, "nor later"


def test_a_workload_that_overloads_any_node_stays() -> None:
    """descheduler#1695: too large for the threshold wherever it is, it would be evicted for ever."""
    fleet = Fleet(node("n0"), node("n1"))
    fleet.put(item("large", 7.8, 4), "n0")
    assert rebalance(fleet.scheduler, HOUR).reason == "no change gains enough"


def test_a_vm_that_cannot_migrate_and_a_batch_job_stay_for_gain() -> None:
    for kind in ("vm", "batch"):
        fleet = Fleet(node("n0", price=100_000), node("n1", price=100_000))
        fleet.put(item("a", 1, 1, kind=kind, migratable=False), "n0")
        fleet.put(item("b", 1, 1, kind=kind, migratable=False), "n1")
        assert not rebalance(fleet.scheduler, HOUR).steps


def test_a_search_is_the_same_every_time() -> None:
    plans = [rebalance(build_many().scheduler, HOUR, seed=3, steps=60) for _ in range(2)]
    assert plans[0] == plans[1] and plans[0].moves


def build_many() -> Fleet:
    fleet = Fleet(*(node(f"n{number}", 16, 64, f"z{number % 3}", price=100_000 + 7_000 * (number % 4)) for number in range(12)))
    for number in range(40):
        fleet.put(item(f"w{number}", 1 + number % 3, 2 + number % 5, app=f"a{number % 6}", spread="zone" if number % 6 < 2 else None, apart="host" if number % 6 == 3 else None), f"n{number % 12}")
    return fleet


@settings(max_examples=60)
@given(nodes, items)
def test_no_plan_undoes_another_and_each_is_feasible(some_nodes: list[Any], some_items: list[Any]) -> None:
    fleet, _ = build(some_nodes, some_items)
    seen = [fleet.where()]
    worth = Worth()
    for turn in range(5):
        uneven_before = any(each["spread"] for each in fleet.items.values())
        cost = layout_cost(fleet.state, worth)
        plan = rebalance(fleet.scheduler, turn * HOUR, seed=turn, steps=25)
        after = checked(fleet, plan)
        if not plan.steps:
            assert plan.reason or plan.refused
            continue
        assert after not in seen or uneven_before, "a layout came back"
        if plan.gain:
            assert plan.gain == cost - layout_cost(fleet.state, worth) and plan.gain * 1000 >= worth.threshold_permille * plan.cost
        seen.append(after)


# drain


def test_a_drain_names_what_it_moves() -> None:
    fleet = Fleet(node("n1"), node("n2", cpu=4), node("n3", cpu=4))
    fleet.put(item("a", 3, 10), "n1")
    fleet.put(item("b", 3, 4), "n1")
    found = drain(fleet.scheduler, ["n1"], 0)
    after = checked(fleet, found.plan)
    assert "n1" not in after.values() and not found.left
    assert found.text == "n1 is empty after moving 2 workloads, 14 GB, in 1 step of 160 s in all"
    assert drain(fleet.scheduler, ["n1"], 0).text == "n1 is empty already"


def test_a_drain_makes_room_by_moving_others() -> None:
    """Nothing takes the large one as it is; after two small VMs have moved, it fits."""
    fleet = Fleet(node("n1"), node("n2"), node("n3", cpu=5))
    fleet.put(item("large", 8, 20), "n1")
    fleet.put(item("s1", 2, 8), "n2")
    fleet.put(item("s2", 2, 6), "n2")
    room = room_for(fleet.scheduler, to_workload(fleet.items["large"]), 0)
    assert room is not None and room.text == "fits on n2 after moving 2 VMs, 14 GB"
    found = drain(fleet.scheduler, ["n1"], 0)
    after = checked(fleet, found.plan)
    assert after["large"] == "n2" and after["s1"] == after["s2"] == "n3" and found.made_room[0].text == "fits on n2 after moving 2 VMs, 14 GB"


def test_a_drain_that_cannot_be_says_why_and_moves_the_rest() -> None:
    fleet = Fleet(node("n1"), node("n2", cpu=4))
    fleet.put(item("large", 5, 8), "n1")
    fleet.put(item("small", 2, 8), "n1")
    found = drain(fleet.scheduler, ["n1"], 0)
    checked(fleet, found.plan)
    assert found.left == ("large",) and found.text.startswith("n1 cannot be emptied: large: 0 of 2 nodes will do")


def test_a_drain_keeps_budgets() -> None:
    fleet = Fleet(node("n1"), node("n2"))
    for number in range(3):
        fleet.put(item(f"web{number}", 1, 1, app="web", kind="container"), "n1")
    fleet.state.set_budget(parse_budget({"name": "web", "selector": {"labels": {"app": "web"}}, "allowed": 1}))
    found = drain(fleet.scheduler, ["n1"], 0)
    checked(fleet, found.plan, budgets={"web": 1})
    assert [len(step) for step in found.plan.steps] == [1, 1, 1]


def test_maintenance_goes_through_all_nodes_and_moves_few_twice() -> None:
    fleet = Fleet(*(node(f"n{number}") for number in range(4)))
    for number in range(9):
        fleet.put(item(f"vm{number}", 2, 2), f"n{number % 3}")
    plan = maintenance(fleet.scheduler, [f"n{number}" for number in range(4)], 0)
    assert [phase.nodes for phase in plan.phases] == [("n0",), ("n1",), ("n2",), ("n3",)] and not plan.skipped
    for phase in plan.phases:
        after = checked(fleet, phase.plan)
        assert phase.nodes[0] not in after.values()
    assert len(plan.twice) <= 3, "only those that went to the node that is last"
    with pytest.raises(ValueError, match="at_once: 0 is out of range"):
        maintenance(fleet.scheduler, ["n0"], 0, at_once=0)


def test_maintenance_skips_what_cannot_be_emptied() -> None:
    fleet = Fleet(node("n0"), node("n1", cpu=2))
    fleet.put(item("a", 4, 2), "n0")
    fleet.put(item("b", 1, 2), "n1")
    plan = maintenance(fleet.scheduler, ["n0", "n1"], 0)
    assert [phase.nodes for phase in plan.phases] == [("n1",)] and [phase.nodes for phase in plan.skipped] == [("n0",)]


@settings(max_examples=100)
@given(nodes, items)
def test_any_drain_is_feasible_and_complete_or_says_why(some_nodes: list[Any], some_items: list[Any]) -> None:
    fleet, _ = build(some_nodes, some_items)
    before = fleet.state.digest()
    found = drain(fleet.scheduler, ["n0"], 0)
    assert fleet.state.digest() == before
    after = checked(fleet, found.plan)
    assert {name for name, at in after.items() if at == "n0"} == set(found.left)
    assert not found.left or found.plan.refused


def test_a_drain_counts_the_node_out_of_spread() -> None:
    """AKS#4201: three replicas spread over three hosts; the third host is to be emptied, so two hosts are all there are."""
    fleet = Fleet(node("n1"), node("n2"), node("n3"))
    for number in range(3):
        fleet.put(item(f"web{number}", 1, 1, app="web", kind="container", spread="host"), f"n{number + 1}")
    found = drain(fleet.scheduler, ["n1"], 0)
    assert not found.left and found.plan.moves[0].workload == "web0"


def test_spreads_that_pull_apart_move_nothing_for_ever() -> None:
    """Two of an app on the only node of a zone cannot be even over zones and over hosts at once."""
    state = State(seed=1)
    state.add_nodes([parse_node({"name": name, "zone": zone, "capacity": {"cpu": 8}}) for name, zone in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"))])
    scheduler = Scheduler(state)
    constraint = [{"topology_key": key, "selector": {"labels": {"app": "web"}}} for key in ("zone", "host")]
    for number in range(8):
        each = parse_workload({"id": f"w{number}", "kind": "vm", "labels": {"app": "web"}, "spread": constraint, "requests": {"cpu": 1}})
        state.adopt(each, Seat(number % 2), 0)
    for turn in range(10):
        plan = rebalance(scheduler, turn * HOUR, steps=20)
        carry_out(state, plan, 0)
    assert not plan.steps


# the clusters of the other tests: every kind of constraint


@settings(max_examples=40)
@given(streams.node_list(), streams.stream(), st.booleans())
def test_plans_keep_every_constraint(some_nodes: list[Any], events: list[tuple[str, Any]], to_drain: bool) -> None:
    """Followed by the placement checker, each move with a second copy of what it holds left behind; and rebalancing comes to rest."""
    state = State(seed=5)
    state.add_nodes([parse_node({**each, "price": 1_000_000}) for each in some_nodes])
    scheduler, known = Scheduler(state), {}
    for what, value in events:
        if what == "reserve":
            scheduler.reserve(parse_workload(value), 0)
            known[value["id"]] = value
        elif what == "release" and state.slot_of:
            scheduler.release(sorted(state.slot_of)[value % len(state.slot_of)])
    before = state.digest()
    for turn in range(6):
        plan = drain(scheduler, ["n0"], 0).plan if to_drain else rebalance(scheduler, turn * HOUR, steps=30)
        assert turn or state.digest() == before
        strictly_followed(some_nodes, state, known, plan, leaving=to_drain)
        carry_out(state, plan, 0)
        check_invariants(state)
        if to_drain or not plan.steps:
            break
    assert to_drain or not plan.steps, "it must come to rest"


def strictly_followed(some_nodes: list[Any], state: State, known: dict[str, Any], plan: Plan, leaving: bool) -> None:
    """`leaving`: who is on a node that is to be empty counts there for nobody: neither is spread against it, nor is it company. Of two on it of which one must be with the
    other, one has to go first."""
    checker = Checker(some_nodes)
    for slot, each in enumerate(state.items):
        seat = state.seats[slot]
        if each is not None and seat is not None:
            checker.placed(known[each.id], state.nodes[seat.node].name, seat.gpus, seat.numa[0][0] if known[each.id].get("numa") == "single" and seat.numa else None)
    checker.problems.clear()
    for step in plan.steps:
        for move in step:
            each, _, gpus, zone = checker.live[move.workload]
            checker.released(move.workload)
            left = {key: each[key] for key in ("requests", "gpu", "numa") if key in each}
            checker.placed({**left, "id": f"{move.workload} leaving", "namespace": "leaving", "tolerations": [{}]}, move.source, gpus, zone)
            checker.placed(each, move.target, move.seat.gpus, move.seat.numa[0][0] if each.get("numa") == "single" and move.seat.numa else None)
        for move in step:
            checker.released(f"{move.workload} leaving")
    tolerated = ("uneven", ": affinity does not hold") if leaving else ()
    assert [problem for problem in checker.problems if not any(words in problem for words in tolerated)] == []


# negative control


def test_a_planner_that_moves_without_need_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: any change counts as a gain, as in the threads. The plan's last check stops it; without that check too, the fleet goes to and fro, which the properties look for."""
    monkeypatch.setattr("hub.scheduler.rebalance._Search._try", _careless)
    fleet = Fleet(node("n0", price=100_000), node("n1", price=100_000))
    fleet.put(item("a", 2, 4), "n0")
    plan = rebalance(fleet.scheduler, HOUR, steps=1)
    assert not plan.steps and plan.reason.startswith("what can be reached gains 0")
    costs = iter(range(10**9, 0, -10**7))
    monkeypatch.setattr("hub.scheduler.rebalance.layout_cost", lambda state, worth: next(costs))
    first = fleet.where()
    for _ in range(2):
        carry_out(fleet.state, rebalance(fleet.scheduler, HOUR, steps=1), 0)
    assert fleet.where() == first, "a layout came back"


def _careless(self: Any, lifted: Any, among: Any, tolerate: bool = False) -> bool:
    for each in lifted:
        home = self.state.seat(each.id)
        self.state.release(each.id)
        spare = (self.state.load == 0) & (self.state.status == 0)
        spare[home.node] = False
        node = self._place(each, spare)
        if node is None:
            self.state.place(each, home, 0)
        else:
            self._home.setdefault(each.id, home.node)
            self._away[each.id] = 0
    return True


def test_a_planner_that_looks_at_room_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: of all filters only the one for room is left."""
    real = verdicts
    monkeypatch.setattr("hub.scheduler.rebalance.verdicts", lambda state, klass: real(state, klass) & Fail.RESOURCES)
    monkeypatch.setattr("hub.scheduler.moves.verdicts", lambda state, klass: real(state, klass) & Fail.RESOURCES)
    some_nodes = [{"name": f"n{number}", "capacity": {"cpu": 8, "memory": "8Gi"}, "price": 1_000_000} for number in range(2)]
    state = State()
    state.add_nodes([parse_node(each) for each in some_nodes])
    scheduler, known = Scheduler(state), {}
    for number in range(2):
        known[f"w{number}"] = {"id": f"w{number}", "kind": "vm", "labels": {"app": "a"}, "requests": {"cpu": 1}, "anti_affinity": [streams.term("host", "a")]}
        scheduler.reserve(parse_workload(known[f"w{number}"]), 0)
    plan = rebalance(scheduler, HOUR)
    assert plan.steps
    with pytest.raises(AssertionError, match="anti-affinity does not hold"):
        strictly_followed(some_nodes, state, known, plan, leaving=False)
