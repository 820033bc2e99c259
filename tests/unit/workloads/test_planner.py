"""The planner: placing, moving, losing, refusing; all of it or nothing; and that rows alone bring everything back."""

import copy
from typing import Any

import pytest

from hub.scheduler import Invalid
from hub.scheduler.audit import check_invariants
from hub.workloads.documents import MAX_LIST, Conflict, difference, read_list
from hub.workloads.placing import AVOID_FIRST_MS
from hub.workloads.rounds import LOST_AFTER_MS, Rounds
from hub.workloads.views import explain, usage
from tools.bench import placement_log

from .kept import Desk, few_steps, round_of, said, work  # noqa: F401 few_steps is a fixture

Json = dict[str, Any]





# -- placing -----------------------------------------------------------------------------------------------------------------


def test_what_fits_is_placed_what_does_not_waits_with_a_reason() -> None:
    desk = Desk()
    desk.node("n-1")
    assert desk.submit(work("a", 3), work("b", 2)) == ["a", "b"]
    assert (desk.row("a").state, desk.row("a").node, desk.row("a").epoch) == ("placed", "n-1", 1)
    assert desk.row("b").state == "pending" and "too little is free" in desk.row("b").reason
    desk.submit(work("huge", 64))
    assert "64000m CPU is more than any node has" in desk.row("huge").reason and "4000m" in desk.row("huge").reason
    desk.do(lambda planner, now: planner.cancel("a", now))
    assert desk.row("a").state == "cancelled" and desk.row("a").node == ""
    round_of(desk)
    assert desk.row("b").state == "placed"


def test_the_same_document_again_is_answered_as_it_stands_and_another_is_a_conflict_naming_the_field() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(work("a"))
    before = desk.row("a")
    desk.submit(work("a"))
    assert desk.row("a") == before
    with pytest.raises(Conflict) as caught:
        desk.submit(work("a", 2))
    assert caught.value.field == "workload.requests" and desk.row("a") == before
    with pytest.raises(Conflict, match="priority"):
        desk.submit(work("c"), work("a", priority=1))
    assert "c" not in desk.kept.workloads, "one conflict: nothing of the list"
    check_invariants(desk.planner.state)
    desk.do(lambda planner, now: planner.cancel("a", now))
    desk.submit(work("a"))
    assert desk.row("a").state == "cancelled", "a request that is repeated late brings nothing back to life"


def test_documents_differ_as_text() -> None:
    assert difference({"a": 1}, {"a": 1.0}) == "a" and difference({"a": 1}, {"a": True}) == "a" and difference({"a": {"x": 1, "y": 2}}, {"a": {"y": 2, "x": 1}}) == ""
    assert difference({}, {"a": None}) == "a"


@pytest.mark.parametrize(("document", "field"), [
    ({"id": "a", "requests": {"cpu": -1}}, "workload.requests.cpu"), ({"id": "a", "requests": {"cpu": 10**18}}, "workload.requests.cpu"), ({"id": "a", "requests": {"wings": 2}}, "workload.requests.wings"),
    ({"id": "a b"}, "workload.id"), ({}, "workload.id"), ({"id": "a", "colour": 1}, "workload.colour"), ({"id": "a", "spec": []}, "workload.spec"), ({"id": "a", "lost_after_ms": -1}, "workload.lost_after_ms"),
    ({"id": "a", "node_selector": {"novacron.runs/vm": "true"}}, "workload.node_selector"), ({"id": "a", "namespace": "\ud800"}, "workload"), ({"id": "a", "spec": {"x": "y" * 20_000}}, "workload"),
    ({"id": "a", "gpu": {"count": 99}}, "workload.gpu.count"), ({"id": "a", "kind": "spell"}, "workload.kind"), ([], "body"), ([{"id": "a"}, {"id": "a"}], "workloads[1].id"),
    ([{"id": f"w{n}"} for n in range(MAX_LIST + 1)], "body"), (5, "workload"),
])
def test_bad_documents_are_refused_by_field(document: Any, field: str) -> None:
    with pytest.raises(Invalid) as caught:
        read_list(document)
    assert caught.value.field.startswith(field) and caught.value.remedy


def test_a_weight_of_an_unknown_policy_and_a_circle_of_affinity_are_refused_and_nothing_is_kept() -> None:
    desk = Desk()
    desk.node("n-1")
    with pytest.raises(Invalid, match="policy"):
        desk.submit(work("a", weights={"luck": 5}))
    needs = [{"selector": {"labels": {"app": "y"}}, "topology_key": "host"}]
    needed = [{"selector": {"labels": {"app": "x"}}, "topology_key": "host"}]
    with pytest.raises(Invalid, match="circle"):
        desk.submit(work("x", labels={"app": "x"}, affinity=needs), work("y", labels={"app": "y"}, affinity=needed))
    assert desk.kept.workloads == {} and desk.planner.tables.rows == {}


def test_affinity_is_met_whatever_the_order_in_a_list() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.node("n-2")
    beside = [{"selector": {"labels": {"app": "db"}}, "topology_key": "host"}]
    desk.submit(work("web", affinity=beside), work("db", labels={"app": "db"}))
    assert desk.row("web").node == desk.row("db").node != ""
    desk.submit(work("late", affinity=[{"selector": {"labels": {"app": "new"}}, "topology_key": "host"}]))
    assert desk.row("late").state == "pending"
    desk.submit(work("new", labels={"app": "new"}))
    round_of(desk)
    assert desk.row("late").node == desk.row("new").node != ""


def test_a_gang_is_placed_whole_or_not_at_all() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(*(work(f"g{n}", 2, gang={"id": "g", "size": 3}) for n in range(3)))
    assert {desk.row(f"g{n}").state for n in range(3)} == {"pending"} and "3 members of this shape, but the nodes hold 2" in desk.row("g0").reason
    assert desk.planner.state.load.sum() == 0
    desk.node("n-2")
    round_of(desk)
    assert {desk.row(f"g{n}").state for n in range(3)} == {"placed"}
    desk.submit(work("h0", 1, gang={"id": "h", "size": 2}))
    assert "waits for 1 more" in desk.row("h0").reason
    desk.submit(work("h1", 1, gang={"id": "h", "size": 2}))
    assert desk.row("h0").state == desk.row("h1").state == "placed"


def test_a_workload_goes_only_where_there_is_a_driver_for_its_kind_and_explain_says_so() -> None:
    desk = Desk()
    desk.node("n-1", runs=["container"])
    desk.submit({"id": "v", "kind": "vm", "requests": {"cpu": 1}})
    assert desk.row("v").state == "pending" and "no node has a driver for vm" in desk.row("v").reason
    [said] = explain(desk.planner, "v", desk.now)["nodes"]
    assert said["failed"] == ["driver"] and said["why"] == ["no driver for vm on this node"] and said["remedy"] == ["give the node a driver for vm"] and not said["fits"]
    desk.node("n-2", runs=["vm"])
    round_of(desk)
    assert desk.row("v").node == "n-2"
    shown = explain(desk.planner, "v", desk.now)
    assert shown["nodes"][0]["node"] == "n-2" and shown["nodes"][0]["fits"] and shown["nodes"][0]["parts"]


def test_the_order_of_trying_is_priority_then_age_and_nobody_is_passed_over_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(work("old", 3))
    for name, priority in (("low", 0), ("high", 5), ("mid", 3)):
        desk.submit(work(name, 3, priority=priority))
    desk.do(lambda planner, now: planner.cancel("old", now))
    round_of(desk)
    assert [name for name in ("low", "high", "mid") if desk.row(name).state == "placed"] == ["high"]
    monkeypatch.setattr("hub.workloads.rounds.DECISIONS_PER_ROUND", 4)
    desk = Desk()
    desk.node("n-1")
    for number in range(12):  # all of other shapes, none fits; each round something changes
        desk.submit(work(f"w{number:02}", 5 + number, priority=9))
    desk.submit(work("last", "100m"))
    desk.do(lambda planner, now: planner.cancel("last", now))
    desk.do(lambda planner, now: planner.put_node("n-1", {"capacity": {"cpu": 0}}, "declared", now))
    desk.submit(work("small", "100m"))
    rounds = Rounds(desk.planner)
    turns = 0
    while desk.row("small").state != "placed" and turns < 12:
        turns += 1
        desk.do(lambda planner, now: planner.put_node("n-9", {"capacity": {"cpu": 1}, "labels": {"n": "x"}, "price": now % 7}, "declared", now))
        round_of(desk, rounds)
    assert desk.row("small").state == "placed"


def test_what_matters_more_takes_the_place_of_what_matters_less() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(work("low", 3), work("fixed", 1, preemptible=False))
    desk.submit(work("high", 2, priority=10))
    assert desk.row("high").node == "n-1" and desk.row("low").state == "pending" and desk.row("low").reason == "preempted by high" and desk.row("fixed").state == "placed"
    desk.submit(work("higher", 4, priority=20))
    assert desk.row("higher").state == "pending", "what may not be preempted stays"
    desk.submit(work("shy", 2, priority=30, preempts=False))
    assert desk.row("shy").state == "pending"
    assert placement_log.doubles(desk.kept.log()) == [] and placement_log.overcommit(desk.kept.log(), desk.now)[1] == []


def test_what_can_be_migrated_is_and_not_evicted() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(work("low", 2, kind="vm"))
    desk.node("n-2", capacity={"cpu": 2})
    desk.submit(work("high", 4, priority=10))
    assert desk.row("high").node == "n-1" and (desk.row("low").node, desk.row("low").epoch) == ("n-2", 2)


def test_on_an_edge_the_room_is_there_only_when_the_edge_has_stopped_the_other() -> None:
    desk = Desk()
    desk.node("gw-1", "edge")
    desk.submit(work("low", 3))
    desk.submit(work("high", 3, priority=10))
    assert desk.row("high").state == "pending" and desk.row("high").reason == "waits for 1 workloads to leave gw-1"
    assert entries(desk, "gw-1") == [("low", 1, "stopped")]
    desk.submit(work("higher", 3, priority=20))
    rounds = Rounds(desk.planner)
    for _ in range(3):
        round_of(desk, rounds, **{"gw-1": True})
    desk.restart()
    rounds = Rounds(desk.planner)
    round_of(desk, rounds, **{"gw-1": True})
    assert desk.row("high").reason == "waits for 1 workloads to leave gw-1", "a restart does not forget for whom room is made"
    said(desk, "gw-1", "low", 1, "stopped")
    round_of(desk, rounds, **{"gw-1": True})
    assert desk.row("higher").state == "placed" and desk.row("high").state == desk.row("low").state == "pending"


def test_quotas_limit_lend_and_reclaim() -> None:
    desk = Desk()
    desk.node("n-1", capacity={"cpu": 8})
    for tenant in ("red", "blue"):
        desk.do(lambda planner, _, tenant=tenant: planner.put_quota(tenant, {"nominal": {"cpu": 4}, "cohort": "all", "borrow": {"cpu": 2}}))
    desk.submit(*(work(f"r{n}", 2, tenant="red") for n in range(4)))
    assert [desk.row(f"r{n}").state for n in range(4)] == ["placed"] * 3 + ["pending"] and "tenant red would use 8000m CPU of 6000m CPU" in desk.row("r3").reason
    desk.submit(work("b0", 2, tenant="blue"))
    desk.submit(work("b1", 2, tenant="blue"))
    assert desk.row("b0").state == desk.row("b1").state == "placed" and sum(desk.row(f"r{n}").state == "placed" for n in range(4)) == 2, "what was borrowed goes back"
    desk.restart()
    assert desk.planner.state.quotas.keys() == {"red", "blue"}
    gang = [work(f"g{n}", 1, tenant="red", gang={"id": "g", "size": 2}) for n in range(2)]
    desk.submit(*gang)
    assert "tenant red" in desk.row("g0").reason
    with pytest.raises(Invalid):
        desk.do(lambda planner, _: planner.put_quota("red", {"nominal": {"x": 1}}))
    assert desk.do(lambda planner, _: planner.remove_quota("red")) and not desk.do(lambda planner, _: planner.remove_quota("red"))


def test_a_gang_leaves_a_node_alone_that_refused_one_of_it() -> None:
    desk = Desk()
    desk.node("gw-1", "edge")
    desk.submit(*(work(f"g{n}", gang={"id": "g", "size": 2}) for n in range(2)))
    for name in ("g0", "g1"):
        said(desk, "gw-1", name, 1, "refused", "no driver")
    rounds = Rounds(desk.planner)
    round_of(desk, rounds, **{"gw-1": True})
    assert desk.row("g0").state == "pending" and not desk.planner.state.cordon.any()
    desk.node("gw-2", "edge")
    round_of(desk, rounds, **{"gw-1": True, "gw-2": True})
    assert [desk.row(name).node for name in ("g0", "g1")] == ["gw-2", "gw-2"]


# -- agents ------------------------------------------------------------------------------------------------------------------



def entries(desk: Desk, node: str) -> list[tuple[str, int, str]]:
    return [(entry["id"], entry["epoch"], entry["wanted"]) for entry in desk.planner.wanted(node)]


def test_an_edge_is_told_what_to_run_and_a_cancelled_one_holds_its_place_until_the_edge_has_stopped_it() -> None:
    desk = Desk()
    desk.node("gw-1", "edge", kind="edge")
    desk.submit(work("a", 3, image="img", spec={"command": ["x"]}))
    [entry] = desk.planner.wanted("gw-1")
    assert (entry["id"], entry["epoch"], entry["wanted"], entry["kind"], entry["image"], entry["requests"]) == ("a", 1, "running", "container", "img", {"cpu": 3000})
    assert entry["document"]["spec"] == {"command": ["x"]}
    desk.do(lambda planner, now: planner.cancel("a", now))
    assert desk.row("a").state == "ending" and entries(desk, "gw-1") == [("a", 1, "stopped")]
    desk.submit(work("b", 3))
    assert desk.row("b").state == "pending", "the place is not free before the edge says so"
    said(desk, "gw-9", "a", 1, "stopped")
    said(desk, "gw-1", "a", 2, "stopped")
    assert desk.row("a").state == "ending", "another edge's word, or one on another epoch, counts nothing"
    said(desk, "gw-1", "a", 1, "stopped")
    assert desk.row("a").state == "cancelled" and entries(desk, "gw-1") == []
    round_of(desk, **{"gw-1": True})
    assert desk.row("b").state == "placed"


def test_a_refusal_is_remembered_and_backs_off_with_its_reason() -> None:
    desk = Desk()
    desk.node("gw-1", "edge")
    desk.submit(work("a"))
    rounds = Rounds(desk.planner)
    for number in range(3):
        epoch = desk.row("a").epoch
        assert epoch == number + 1
        said(desk, "gw-1", "a", epoch, "refused", "no driver for kind container on this edge")
        round_of(desk, rounds, **{"gw-1": True})
        assert desk.row("a").state == "pending" and "no driver for kind container" in desk.row("a").reason
        wait = AVOID_FIRST_MS << number
        round_of(desk, rounds, wait - 3000, **{"gw-1": True})
        assert desk.row("a").state == "pending"
        round_of(desk, rounds, 3000, **{"gw-1": True})
        assert desk.row("a").state == "placed"
    said(desk, "gw-1", "a", 4, "running")
    assert desk.row("a").avoid == {}
    said(desk, "gw-1", "a", 4, "failed", "exit 1")
    assert desk.row("a").state == "failed" and desk.row("a").reason == "exit 1" and entries(desk, "gw-1") == []


def test_others_make_room_on_the_next_best_node_where_the_best_one_is_avoided() -> None:
    desk = Desk()
    desk.node("gw-1", "edge")
    desk.submit(work("high", 4, priority=10))
    said(desk, "gw-1", "high", 1, "refused", "no such image")
    desk.submit(work("low", 4))
    desk.node("gw-2", "edge")
    desk.submit(work("middle", 4, priority=1))
    assert [desk.row(name).node for name in ("high", "low", "middle")] == ["", "gw-1", "gw-2"], "the least harm would be done on the node that refused"
    rounds, online = Rounds(desk.planner), {"gw-1": True, "gw-2": True}
    round_of(desk, rounds, **online)
    assert desk.row("high").reason == "waits for 1 workloads to leave gw-2"
    assert (desk.row("low").state, desk.row("middle").state) == ("placed", "pending")
    said(desk, "gw-2", "middle", 1, "stopped")
    round_of(desk, rounds, **online)
    assert desk.row("high").node == "gw-2"
    check_invariants(desk.planner.state)


def test_a_drained_edge_gives_away_what_it_has_and_the_new_node_is_told_only_when_the_old_one_has_stopped() -> None:
    desk = Desk()
    desk.node("gw-1", "edge")
    desk.submit(work("a", 3))
    desk.node("gw-2", "edge")
    desk.do(lambda planner, now: planner.cordon("gw-1", "drain", now))
    assert desk.row("a").node == "gw-2" and desk.row("a").epoch == 2
    assert entries(desk, "gw-1") == [("a", 1, "stopped")] and entries(desk, "gw-2") == [], "two copies must never be wanted"
    assert desk.planner.state.free[0].tolist() == [1000, 1000], "both places are held"
    desk.restart()
    assert entries(desk, "gw-1") == [("a", 1, "stopped")] and entries(desk, "gw-2") == [] and desk.planner.state.free[0].tolist() == [1000, 1000]
    said(desk, "gw-1", "a", 1, "stopped")
    assert entries(desk, "gw-1") == [] and entries(desk, "gw-2") == [("a", 2, "running")]
    assert desk.planner.state.free[0].tolist() == [4000, 1000]
    check_invariants(desk.planner.state)


def test_what_has_nowhere_to_go_stays_on_a_drained_node_and_moves_when_there_is_room() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(work("a", 3))
    desk.do(lambda planner, now: planner.cordon("n-1", "drain", now))
    assert desk.row("a").node == "n-1" and "no other node" in desk.row("a").reason
    desk.node("n-2")
    round_of(desk)
    assert desk.row("a").node == "n-2" and desk.row("a").epoch == 2
    assert placement_log.doubles(desk.kept.log()) == []


def three_under_a_budget() -> Desk:
    """Three containers on gw-1, of which one at a time may go; gw-2 is empty."""
    desk = Desk()
    desk.node("gw-1", "edge")
    desk.submit(*(work(f"a{n}", labels={"app": "a"}) for n in range(3)))
    desk.node("gw-2", "edge")
    desk.do(lambda planner, _: planner.put_budget("b", {"selector": {"labels": {"app": "a"}}, "allowed": 1}))
    return desk


def test_a_budget_lets_only_so_many_go_at_once() -> None:
    desk = three_under_a_budget()
    rounds = Rounds(desk.planner)
    desk.do(lambda planner, now: planner.cordon("gw-1", "drain", now))
    for done in range(3):
        round_of(desk, rounds, **{"gw-1": True, "gw-2": True})
        moved = [n for n in range(3) if desk.row(f"a{n}").node == "gw-2"]
        assert len(moved) == done + 1, "one at a time"
        [(name, epoch, _)] = entries(desk, "gw-1") if done == 2 else [entry for entry in entries(desk, "gw-1") if entry[2] == "stopped"]
        said(desk, "gw-1", name, epoch, "stopped")
    with pytest.raises(Invalid):
        desk.do(lambda planner, _: planner.put_budget("b", {"selector": 5}))
    assert desk.do(lambda planner, _: planner.remove_budget("b")) is True and desk.do(lambda planner, _: planner.remove_budget("b")) is False


def test_a_silent_edge_keeps_what_it_runs_and_a_silent_cloud_node_loses_it() -> None:
    for kind, more, moves in (("edge", {}, False), ("hybrid", {}, False), ("cloud", {}, True), ("gpu", {}, True), ("edge", {"lost_after_ms": 60_000}, True), ("cloud", {"lost_after_ms": 9_000_000}, False)):
        desk = Desk()
        desk.node("gw-1", "edge", kind=kind)
        desk.submit(work("a", **more))
        desk.node("gw-2", "edge")
        rounds, seen = Rounds(desk.planner), desk.now
        round_of(desk, rounds, **{"gw-1": seen, "gw-2": True})
        desk.submit(work("b"))
        assert desk.row("b").node == "gw-2", "a silent node takes nothing new"
        assert desk.row("a").node == "gw-1"
        round_of(desk, rounds, LOST_AFTER_MS + 1, **{"gw-1": seen, "gw-2": True})
        assert (desk.row("a").node == "gw-2") is moves, (kind, more)
        if moves:
            assert entries(desk, "gw-1") == [] and entries(desk, "gw-2")[0][:2] == ("a", 2)
            said(desk, "gw-1", "a", 1, "running")
            assert desk.row("a").node == "gw-2", "what the old node says later is old news"
        round_of(desk, rounds, **{"gw-1": True, "gw-2": True})
        assert usage(desk.planner)["nodes"] == {"up": 2, "silent": 0, "cordoned": 0}


def test_no_execute_chases_what_does_not_tolerate_it() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(work("a"), work("b", tolerations=[{"key": "bad", "for_ms": 10_000}]), work("c", tolerations=[{"key": "bad"}]))
    desk.node("n-1", taints=[{"key": "bad", "effect": "NoExecute"}])
    desk.node("n-2")
    rounds = Rounds(desk.planner)
    round_of(desk, rounds)
    assert [desk.row(name).node for name in "abc"] == ["n-2", "n-1", "n-1"]
    round_of(desk, rounds, 11_000)
    assert [desk.row(name).node for name in "abc"] == ["n-2", "n-2", "n-1"]
    assert placement_log.doubles(desk.kept.log()) == []


def test_the_grace_of_a_taint_outlives_a_kill_of_the_hub_and_begins_anew_with_a_new_taint() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(work("b", tolerations=[{"key": "bad", "for_ms": 10_000}]))
    desk.node("n-1", taints=[{"key": "bad", "value": "x=y", "effect": "NoExecute"}])
    desk.node("n-2")
    round_of(desk)
    assert desk.kept.nodes["n-1"].tainted == {"bad=x=y": desk.now} and desk.restart() == []
    round_of(desk, after_ms=6_000)
    assert desk.row("b").node == "n-1" and desk.restart() == []
    round_of(desk, after_ms=5_000)
    assert desk.row("b").node == "n-2", "a hub that forgot would have begun to count again at each start"
    desk.node("n-1")
    rounds = Rounds(desk.planner)
    round_of(desk, rounds)
    assert desk.kept.nodes["n-1"].tainted == {}
    desk.do(lambda planner, now: planner.move("b", now, "back", "n-1"))
    desk.node("n-1", taints=[{"key": "bad", "value": "x=y", "effect": "NoExecute"}])
    round_of(desk, rounds, 60_000)
    assert desk.row("b").node == "n-1"


def test_a_node_taken_out_gives_back_what_it_held() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.node("gw-1", "edge", labels={"only": "here"})
    desk.submit(work("a", node_selector={"only": "here"}), work("b", 4))
    desk.do(lambda planner, now: planner.cancel("a", now))
    with pytest.raises(Conflict, match="online"):
        desk.do(lambda planner, now: planner.remove_node("gw-1", True, now))
    assert desk.do(lambda planner, now: planner.remove_node("gw-1", False, now)) is True
    assert desk.row("a").state == "cancelled" and desk.do(lambda planner, now: planner.remove_node("gw-1", False, now)) is False
    desk.do(lambda planner, now: planner.remove_node("n-1", False, now))
    assert desk.row("b").state == "pending"
    desk.node("n-1")
    round_of(desk)
    assert desk.row("b").state == "placed" and desk.row("b").epoch == 2


def test_descriptions_of_nodes_are_checked_and_an_agents_older_word_counts_nothing() -> None:
    desk = Desk()
    with pytest.raises(Invalid) as caught:
        desk.node("n-1", runs=["dreams"])
    assert caught.value.field == "node.runs"
    for bad in ({"capacity": {"cpu": -1}}, {"capacity": {"x": 1}}, {"labels": {"novacron.runs/vm": "true"}}, {"taints": 5}):
        with pytest.raises(Invalid):
            desk.node("n-1", **bad)
    assert desk.kept.nodes == {} and desk.planner.state.size == 0
    desk.do(lambda planner, now: planner.capacity("gw-1", 7, {"capacity": {"cpu": 2}}, now))
    desk.do(lambda planner, now: planner.capacity("gw-1", 6, {"capacity": {"cpu": 9}}, now))
    assert desk.kept.nodes["gw-1"].document["capacity"] == {"cpu": 2}
    with pytest.raises(Conflict):
        desk.node("gw-1", "declared")
    desk.do(lambda planner, now: planner.capacity("gw-1", 8, {"capacity": {"cpu": 9}}, now))
    assert desk.planner.state.cap[0].tolist() == [9000]


def test_what_cannot_be_told_is_taken_back_newest_first() -> None:
    desk = Desk()
    desk.node("gw-1", "edge")
    desk.submit(work("a"))
    desk.submit(work("b"))
    assert desk.do(lambda planner, now: planner.untellable("gw-1", "300000 bytes are too many", now)) is True
    assert desk.row("a").state == "placed" and desk.row("b").state == "pending" and "cannot be told" in desk.row("b").reason
    assert desk.do(lambda planner, now: planner.untellable("gw-1", "x", now)) and not desk.do(lambda planner, now: planner.untellable("gw-1", "x", now))


# -- all of it or nothing ----------------------------------------------------------------------------------------------------


def test_a_plan_that_is_taken_back_leaves_no_trace() -> None:
    desk = Desk()
    desk.node("gw-1", "edge")
    desk.node("n-1")
    desk.submit(work("a", 2), work("b", 2))
    before, tables = desk.planner.state.digest(), copy.deepcopy(desk.planner.tables)
    planner = desk.planner
    planner.begin()
    planner.submit(read_list([work("c"), work("d", 9)]), desk.now)
    planner.cancel("a", desk.now)
    planner.put_node("n-2", {"capacity": {"cpu": 4}}, "declared", desk.now)
    planner.cordon("n-1", "drain", desk.now)
    planner.remove_node("gw-1", False, desk.now)
    planner.undo()
    assert planner.state.digest() == before and planner.tables == tables
    check_invariants(planner.state)
