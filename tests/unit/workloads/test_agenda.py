"""Batch jobs in the hub: promised at submit, planned, started in time, told when a promise is broken; what others place never takes what is reserved."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hub.scheduler import Invalid
from hub.scheduler.audit import check_invariants
from hub.workloads import agenda
from hub.workloads.agenda import Agenda
from hub.workloads.documents import Conflict, read_list
from hub.workloads.placing import Placing
from hub.workloads.rounds import LOST_AFTER_MS, Rounds
from hub.workloads.timetables import PATIENCE_MS, when
from hub.workloads.views import explain, nodes_view, usage
from tools.bench import placement_log

from .kept import NOW, Desk, round_of, said, work
from .test_planner import entries

Json = dict[str, Any]
S = 1000


def batch(name: str, cpu: Any, seconds: float, deadline: float | None = None, **more: Any) -> Json:
    """`deadline`: seconds after the desk's start."""
    return {"id": name, "kind": "batch", "requests": {"cpu": cpu}, "duration_ms": int(seconds * S), **({} if deadline is None else {"deadline_ms": NOW + int(deadline * S)}), **more}


def planned(desk: Desk, name: str) -> tuple[float, list[str]]:
    """Start in seconds after the desk's start, nodes."""
    plan = desk.row(name).plan
    return round((plan["start_ms"] - NOW) / S, 1), plan["nodes"]


# -- at submit ---------------------------------------------------------------------------------------------------------------


def test_a_job_that_fits_starts_at_once_and_one_that_does_not_is_planned_for_when_there_is_room() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(batch("a", 3, 100, 500))
    assert (desk.row("a").state, desk.row("a").node) == ("placed", "n-1") and desk.row("a").plan["end_ms"] - desk.row("a").plan["start_ms"] == 120 * S, "with a margin of 20 %"
    desk.submit(batch("b", 2, 100, 300))
    assert desk.row("b").state == "pending" and planned(desk, "b") == (120.0, ["n-1"]) and desk.row("b").reason.startswith("is to start at ") and desk.row("b").reason.endswith(" on n-1")
    round_of(desk, after_ms=60 * S)
    assert desk.row("b").state == "pending"
    desk.do(lambda planner, now: planner.cancel("a", now))
    round_of(desk)
    assert desk.row("b").state == "placed", "a job that ends early lets the next one start"


def test_what_misses_its_deadline_is_refused_with_by_how_much_for_want_of_what_until_when_and_what_would_make_it() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(batch("a", 3, 100))
    with pytest.raises(Conflict) as caught:
        desk.submit(batch("b", 2, 100, 200))
    assert caught.value.field == "workload.deadline_ms" and caught.value.problem.startswith("'b' will miss it by 40") and "1000m CPU short on n-1 until " in caught.value.problem
    assert " UTC, held by a" in caught.value.problem and "if a ends" in caught.value.remedy and "when_late: accept" in caught.value.remedy
    assert "b" not in desk.kept.workloads and "b" not in desk.planner.tables.rows
    with pytest.raises(Conflict):
        desk.submit(work("c"), batch("b", 2, 100, 200))
    assert "c" not in desk.kept.workloads, "nothing of a list counts where one cannot be promised"
    check_invariants(desk.planner.state)
    with pytest.raises(Conflict, match="0 ms are left"):
        desk.submit(batch("b", 1, 100, -5))
    with pytest.raises(Conflict, match="cannot be promised: asks for"):
        desk.submit(batch("b", 64, 100, 2000))


def test_where_the_document_says_so_it_is_taken_all_the_same_for_the_earliest_time() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(batch("a", 3, 100))
    desk.submit(batch("b", 2, 100, 200, when_late="accept"))
    assert planned(desk, "b") == (120.0, ["n-1"]) and "will miss its deadline by 40" in desk.row("b").reason and "CPU short on n-1" in desk.row("b").reason
    with pytest.raises(Conflict):
        desk.submit(batch("c", 3, 60, 220))
    assert planned(desk, "b")[0] == 120.0, "what was taken late holds its place too"
    desk.submit(batch("d", 64, 10, 100, when_late="accept"))
    assert desk.row("d").state == "pending" and "no node that it may use has more than 4000m CPU" in desk.row("d").reason
    desk.restart()
    round_of(desk, after_ms=121 * S)
    assert desk.row("a").state == "placed" and desk.row("b").state == "pending", "the estimate of a was wrong: b waits for it"
    desk.do(lambda planner, now: planner.cancel("a", now))
    round_of(desk)
    assert desk.row("b").state == "placed"


@pytest.mark.parametrize(("document", "field"), [
    ({"deadline_ms": NOW + 1}, "workload.duration_ms"), ({"deadline_ms": NOW, "duration_ms": 5, "kind": "vm"}, "workload.deadline_ms"), ({"duration_ms": 5, "when_late": "accept"}, "workload.when_late"),
    ({"deadline_ms": NOW, "duration_ms": 5, "when_late": "maybe"}, "workload.when_late"), ({"duration_ms": 0}, "workload.duration_ms"), ({"duration_ms": 5, "deadline_ms": -1}, "workload.deadline_ms"),
    ({"duration_ms": 5, "deadline_ms": 1 << 60}, "workload.deadline_ms"),
])
def test_bad_times_are_refused_by_field(document: Json, field: str) -> None:
    with pytest.raises(Invalid) as caught:
        read_list({"id": "a", "kind": "batch", **document})
    assert caught.value.field == field and caught.value.remedy


def test_times_are_written_for_people() -> None:
    assert when(NOW, NOW).endswith(" UTC") and when(NOW, NOW).count(":") == 2 and when(NOW + 86_400_000, NOW).startswith("20") and when(1 << 62, NOW).endswith(" ms")


# -- what is reserved stays so -----------------------------------------------------------------------------------------------


def test_nothing_that_is_placed_meanwhile_takes_what_is_reserved() -> None:
    desk = Desk()
    desk.node("n-1", gpus=[{"model": "t4", "count": 2}])
    desk.submit(batch("a", 3, 100), batch("g", "100m", 100, gpu={"count": 2}))
    desk.submit(batch("b", 3, 100, 300), batch("h", "100m", 100, 300, gpu={"count": 1}))
    assert planned(desk, "b") == (120.0, ["n-1"]) == planned(desk, "h")
    desk.submit(work("small", "100m"))
    assert desk.row("small").state == "placed", "what leaves room for b may go"
    for name in "ag":
        desk.do(lambda planner, now, name=name: planner.cancel(name, now))
    desk.submit(work("web", 2), work("gpu", "100m", gpu={"count": 2}), work("one", "100m", gpu={"count": 1}))
    assert [desk.row(name).state for name in ("web", "gpu", "one")] == ["pending"] * 3, "for ever is longer than until b and h start"
    round_of(desk)
    assert desk.row("b").state == desk.row("h").state == desk.row("one").state == "placed" and desk.row("gpu").state == desk.row("web").state == "pending"
    check_invariants(desk.planner.state)


def test_a_reservation_of_nothing_but_a_device_is_kept_on_that_device() -> None:
    desk = Desk()
    desk.node("n-1", gpus=[{"model": "t4", "count": 2}])
    desk.submit(batch("a", 0, 100, gpu={"count": 1}))
    desk.submit(batch("b", 0, 100, 400, gpu={"count": 2}))
    assert planned(desk, "b") == (120.0, ["n-1"]) and len(desk.planner.tables.guards["n-1"]) == 1
    desk.submit(work("c", 0, gpu={"milli": 100}))
    assert desk.row("c").state == "pending" and desk.restart() == []
    desk.submit(work("d", 0, gpu={"milli": 100}))
    assert desk.row("d").state == "pending"


def test_use_and_explanations_tell_what_is_reserved_from_what_is_used() -> None:
    desk = Desk()
    desk.node("n-1", gpus=[{"model": "t4", "count": 2}])
    desk.submit(batch("a", 3, 100, gpu={"count": 1}))
    desk.submit(batch("b", 4, 100, 400, gpu={"count": 2}))
    desk.submit(work("c", 1))
    found = usage(desk.planner)
    assert found["resources"]["cpu"] == [3000, 4000] and found["gpu_milli"] == [1000, 2000] and found["reserved"] == {"cpu": 1000, "gpu_milli": 1000}
    [shown] = nodes_view(desk.planner, ["n-1"])
    assert shown["resources"]["cpu"] == [3000, 4000] and shown["reserved"] == {"cpu": 1000, "gpu_milli": 1000} and sorted(gpu["free_milli"] for gpu in shown["gpus"]) == [0, 1000]
    said = explain(desk.planner, "c", desk.now)
    assert "reserved here for jobs that start later: 1000m CPU" in said["nodes"][0]["why"][-1]
    said = explain(desk.planner, "b", desk.now)
    assert said["planned_nodes"] == ["n-1"] and said["late_ms"] == 0


def test_priority_does_not_take_what_is_promised_and_neither_does_a_gang() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(batch("a", 4, 100))
    desk.submit(batch("b", 4, 100, 300))
    desk.submit(work("vip", 2, priority=100))
    assert desk.row("a").state == "placed" and desk.row("vip").state == "pending", "a would go, but the room is for b"
    desk.submit(*(work(f"m{n}", 1, gang={"id": "m", "size": 2}) for n in range(2)))
    round_of(desk, after_ms=121 * S)
    assert desk.row("m0").state == "pending"
    desk.do(lambda planner, now: planner.cancel("a", now))
    round_of(desk)
    assert desk.row("b").state == "placed" and desk.row("m0").state == desk.row("vip").state == "pending"
    desk.submit(work("boss", 2, priority=1000))
    assert desk.row("b").state == "placed", "what was promised is not preempted"


def test_a_job_that_is_filled_in_does_not_delay_the_first_that_waits() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(batch("run", 3, 100))
    desk.submit(batch("head", 4, 100))
    assert planned(desk, "head") == (120.0, ["n-1"])
    desk.submit(batch("long", 1, 200), batch("short", 1, 50))
    assert desk.row("long").state == "pending" and desk.row("short").state == "placed" and planned(desk, "head")[0] == 120.0
    assert "what is reserved for others" in desk.row("long").reason
    for name in ("run", "short"):
        desk.do(lambda planner, now, name=name: planner.cancel(name, now))
    round_of(desk)
    assert desk.row("head").state == "placed"


def test_the_control_of_backfill_a_hub_without_reservations_delays_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the two above: without guards a container takes what is reserved."""
    monkeypatch.setattr(Agenda, "_guard", lambda *_: None)
    desk = Desk()
    desk.node("n-1")
    desk.submit(batch("run", 3, 100))
    desk.submit(batch("head", 4, 100))
    desk.submit(work("web", 1))
    assert desk.row("web").state == "placed"
    round_of(desk)
    desk.do(lambda planner, now: planner.cancel("run", now))
    round_of(desk)
    assert desk.row("head").state == "pending", "it never starts"


def test_jobs_go_for_by_priority_push_others_out_and_keep_to_quotas() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(work("low", 3))
    desk.submit(batch("high", 3, 100, priority=5))
    round_of(desk)
    round_of(desk)
    assert desk.row("high").state == "placed" and desk.row("low").state == "pending"
    desk = Desk()
    desk.node("n-1")
    desk.do(lambda planner, _: planner.put_quota("red", {"nominal": {"cpu": 2}}))
    desk.submit(batch("r1", 2, 100, tenant="red"), batch("r2", 1, 50, tenant="red"))
    assert desk.row("r1").state == "placed" and "tenant red would use 3000m CPU of 2000m CPU" in desk.row("r2").reason
    with pytest.raises(Conflict, match="tenant red"):
        desk.submit(batch("r3", 1, 50, 900, tenant="red"))
    desk.do(lambda planner, now: planner.cancel("r1", now))
    round_of(desk)
    assert desk.row("r2").state == "placed"


# -- when things change ------------------------------------------------------------------------------------------------------


def test_a_node_that_vanishes_moves_what_was_reserved_there_and_who_is_late_is_told() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.node("n-2")
    desk.submit(work("w1", 4, node_selector={}), batch("a", 4, 100))
    free = desk.row("a").node
    desk.submit(batch("b", 4, 100, 400))
    assert planned(desk, "b") == (120.0, [free])
    other = "n-2" if free == "n-1" else "n-1"
    desk.do(lambda planner, now: planner.cancel("w1", now))
    round_of(desk)
    assert desk.row("b").state == "placed" and desk.row("b").node == other
    desk.submit(batch("c", 4, 100, 400))
    desk.do(lambda planner, now: planner.remove_node(other, False, now))
    round_of(desk)
    assert desk.row("b").state == "pending" and planned(desk, "b")[1] == planned(desk, "c")[1] == [free]
    late = [name for name in "bc" if "will miss its deadline by" in desk.row(name).reason]
    assert late == [] or all("not there any more" in desk.row(name).reason for name in late)
    desk.do(lambda planner, now: planner.remove_node(free, False, now))
    round_of(desk)
    assert {desk.row(name).state for name in "abc"} == {"pending"} and "no node" in desk.row("b").reason
    desk.node("n-3")
    round_of(desk)
    round_of(desk)
    assert sum(desk.row(name).state == "placed" for name in "abc") == 1


def test_an_overrun_moves_what_follows_and_tells_whom_it_makes_late() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(batch("a", 4, 100))
    desk.submit(batch("b", 4, 100, 245))
    rounds = Rounds(desk.planner)
    round_of(desk, rounds, 120 * S)
    assert planned(desk, "b")[0] == pytest.approx(146, abs=2) and "will miss its deadline by" in desk.row("b").reason and "job a runs longer than its estimate" in desk.row("b").reason
    again = desk.row("b")
    round_of(desk, rounds)
    assert desk.row("b") == again, "it is extended by a quarter at a time, not anew each round"
    desk.restart()
    round_of(desk)
    assert desk.row("b").plan == again.plan


def test_what_is_planned_outlives_a_kill_of_the_hub() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.submit(batch("a", 3, 100))
    desk.submit(batch("b", 4, 100, 300))
    before = desk.row("b"), desk.planner.tables.guards
    assert desk.restart() == [] and (desk.row("b"), desk.planner.tables.guards) == before and before[1]
    desk.submit(work("web", 2))
    assert desk.row("web").state == "pending", "also before the first round"
    round_of(desk)
    assert desk.row("b").plan == before[0].plan


def test_on_an_edge_a_job_is_told_when_it_starts_and_its_end_lets_the_next_one_start() -> None:
    desk = Desk()
    desk.node("gw-1", "edge", kind="edge")
    desk.submit(batch("a", 4, 100, 500), batch("b", 4, 100, 500))
    assert entries(desk, "gw-1") == [("a", 1, "running")] and planned(desk, "b") == (120.0, ["gw-1"])
    said(desk, "gw-1", "a", 1, "done")
    rounds = Rounds(desk.planner)
    round_of(desk, rounds, **{"gw-1": True})
    assert desk.row("a").state == "done" and desk.row("a").plan == {} and entries(desk, "gw-1") == [("b", 1, "running")]
    said(desk, "gw-1", "b", 1, "refused", "no driver")
    round_of(desk, rounds, **{"gw-1": True})
    assert desk.row("b").state == "pending"
    desk.node("gw-2", "edge", kind="edge")
    round_of(desk, rounds, **{"gw-1": True, "gw-2": True})
    assert desk.row("b").node == "gw-2"


def test_a_short_silence_moves_nothing_and_a_long_one_does() -> None:
    desk = Desk()
    desk.node("gw-1", "edge", kind="edge")
    desk.node("gw-2", "edge", kind="edge")
    desk.submit(batch("a", 4, 100), batch("x", 4, 200))
    first, other = desk.row("a").node, desk.row("x").node
    desk.submit(batch("b", 4, 100, 1000))
    assert planned(desk, "b") == (120.0, [first])
    rounds, seen = Rounds(desk.planner), desk.now
    round_of(desk, rounds, **{first: seen, other: True})
    assert planned(desk, "b") == (120.0, [first]) and desk.restart() == []
    rounds = Rounds(desk.planner)
    round_of(desk, rounds, **{first: seen, other: True})
    assert planned(desk, "b") == (120.0, [first]), "nor does a restart of the hub, that has heard of nobody yet"
    round_of(desk, rounds, PATIENCE_MS + 1, **{first: seen, other: True})
    assert planned(desk, "b") == (240.0, [other])
    round_of(desk, rounds, LOST_AFTER_MS, **{first: seen, other: True})
    assert desk.row("a").state == "placed", "an edge works on by itself"


def test_however_many_wait_each_turn_is_bounded_and_all_get_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agenda, "BACKFILL_DEPTH", 3)
    monkeypatch.setattr(agenda, "MAX_RESERVED", 2)
    desk = Desk()
    desk.node("n-1", capacity={"cpu": 10})
    desk.submit(*(batch(f"u{n}", 1, 100) for n in range(10)))
    assert sum(desk.row(f"u{n}").state == "placed" for n in range(10)) == 3
    rounds = Rounds(desk.planner)
    for _ in range(4):
        round_of(desk, rounds)
    assert {desk.row(f"u{n}").state for n in range(10)} == {"placed"}
    desk.submit(batch("d0", 1, 10, 1000), batch("d1", 1, 10, 1000))
    with pytest.raises(Conflict, match="2 jobs have room reserved already"):
        desk.submit(batch("d2", 1, 10, 1000))
    desk.submit(batch("d2", 1, 10, 1000, when_late="accept"))
    assert "2 jobs have room" in desk.row("d2").reason
    for number in range(10):
        desk.do(lambda planner, now, name=f"u{number}": planner.cancel(name, now))
    for _ in range(3):
        round_of(desk, rounds)
    assert {desk.row(f"d{n}").state for n in range(3)} == {"placed"}


def test_a_gang_is_one_job() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.node("n-2")
    gang = {"gang": {"id": "g", "size": 4}}
    desk.submit(batch("a", 3, 100), *(batch(f"g{n}", 2, 50, 300, **gang) for n in range(3)))
    assert "waits for 1 more of 4 members" in desk.row("g0").reason
    with pytest.raises(Invalid, match="differ in more than their id"):
        desk.submit(batch("g3", 1, 50, 300, **gang))
    with pytest.raises(Conflict, match="will miss it by"):
        desk.submit(batch("h0", 4, 90, 125, gang={"id": "h", "size": 2}), batch("h1", 4, 90, 125, gang={"id": "h", "size": 2}))
    desk.submit(batch("g3", 2, 50, 300, **gang))
    assert {planned(desk, f"g{n}")[0] for n in range(4)} == {120.0} and sorted(planned(desk, "g0")[1]) == ["n-1", "n-1", "n-2", "n-2"]
    with pytest.raises(Invalid, match="has its 4 members already"):
        desk.submit(batch("g4", 2, 50, 300, **gang))
    desk.do(lambda planner, now: planner.cancel("a", now))
    round_of(desk)
    assert {desk.row(f"g{n}").state for n in range(4)} == {"placed"}
    desk.restart()
    check_invariants(desk.planner.state)


def test_what_the_timetable_does_not_see_is_judged_at_the_start_and_planned_anew() -> None:
    desk = Desk()
    desk.node("n-1")
    desk.node("n-2")
    apart = [{"selector": {"labels": {"app": "x"}}, "topology_key": "host"}]
    desk.submit(work("x1", 1, labels={"app": "x"}))
    desk.submit(batch("b", 1, 100, 900, anti_affinity=apart))
    for _ in range(3):
        round_of(desk)
    assert desk.row("b").state == "placed" and desk.row("b").node != desk.row("x1").node


# -- whatever happens --------------------------------------------------------------------------------------------------------

STEP = st.tuples(st.sampled_from(["dated", "dated", "gang", "undated", "work", "cancel", "cancel", "done", "round", "round", "long round", "kill", "remove", "add", "drain", "uncordon"]), st.integers(0, 2**16))


def overbooked(desk: Desk) -> list[str]:
    """Nodes whose plans together are more than they have at some time: plain sums over the rows, nothing of the timetable's code."""
    found = []
    for node, row in desk.kept.nodes.items():
        cpu = row.document["capacity"]["cpu"] * 1000
        held: list[tuple[float, float, int]] = []
        for each in desk.kept.workloads.values():
            need = desk.planner.tables.items[each.id].item.shape.request_map["cpu"]
            if each.state == "placed" and each.node == node:
                held.append((0, each.plan.get("end_ms", float("inf")), need))
            elif each.state == "pending" and node in each.plan.get("nodes", ()) and not each.id.endswith("-b"):  # of a gang each says where all are
                held += [(each.plan["start_ms"], each.plan["end_ms"], need)] * each.plan["nodes"].count(node)
        for moment, _, _ in held:
            used = sum(need for start, end, need in held if start <= moment < end)
            if used > cpu:
                found.append(f"{node} at {moment}: {used} of {cpu}")
    return found


def act(desk: Desk, rounds: Rounds, what: str, draw: int) -> Rounds:
    """One step of many; the rounds that go on from there."""
    name, node, offset = f"w{draw % 10}", f"n{draw % 3}", (desk.now - NOW) / S
    cpu = (1, 2, 4)[draw // 10 % 3]
    try:
        if what in ("dated", "undated"):
            seconds = (10, 60, 300)[draw // 30 % 3]
            desk.submit(batch(name, cpu, seconds, offset + seconds * (1.3, 2, 5)[draw // 90 % 3] if what == "dated" else None, priority=draw // 270 % 2, **({"when_late": "accept"} if what == "dated" and draw % 2 else {})))
        elif what == "gang":
            desk.submit(*(batch(f"{name}-{end}", cpu, 60, offset + 300 if draw % 2 else None, gang={"id": name, "size": 2}) for end in "ab"))
        elif what == "work":
            desk.submit(work(name, cpu, priority=draw // 30 % 2))
    except (Conflict, Invalid):
        pass
    if what in ("cancel", "done"):
        for ended in (name, f"{name}-a"):
            desk.do(lambda planner, now, name=ended: planner.cancel(name, now))
    elif what == "round":
        round_of(desk, rounds)
    elif what == "long round":
        round_of(desk, rounds, 30 * S)
    elif what == "kill":
        assert desk.restart() == []
        rounds = Rounds(desk.planner)
    elif what == "remove":
        desk.do(lambda planner, now, node=node: planner.remove_node(node, False, now))
    elif what == "add":
        desk.node(node)
    elif what in ("drain", "uncordon"):
        desk.do(lambda planner, now, node=node, what=what: planner.cordon(node, "drain" if what == "drain" else "", now))
    return rounds


def play(steps: list[tuple[str, int]]) -> Desk:
    desk = Desk()
    for number in range(2):
        desk.node(f"n{number}")
    rounds = Rounds(desk.planner)
    for what, draw in steps:
        rounds = act(desk, rounds, what, draw)
        check_invariants(desk.planner.state)
        if what in ("round", "long round"):
            assert overbooked(desk) == []
    round_of(desk, rounds)
    assert overbooked(desk) == []
    assert placement_log.overcommit(desk.kept.log(), desk.now) == (0, []) and placement_log.doubles(desk.kept.log()) == []
    return desk


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(STEP, max_size=40))
def test_plans_never_hold_more_than_there_is(steps: list[tuple[str, int]]) -> None:
    play(steps)


def live(steps: list[tuple[str, int]]) -> list[str]:
    """Jobs end as their estimates say, no node is lost: what was said of promises that were broken."""
    desk = Desk()
    for number in range(2):
        desk.node(f"n{number}")
    rounds, broken = Rounds(desk.planner), []
    for number, (what, draw) in enumerate(steps):
        cpu, seconds = (1, 2, 4)[draw % 3], (10, 30, 60)[draw // 3 % 3]
        try:
            if what == "work":
                desk.submit(work(f"c{number}", cpu, priority=draw // 9 % 3))
            else:
                deadline = (desk.now - NOW) / S + seconds * (1.3, 2, 5)[draw // 9 % 3] if what == "dated" else None
                desk.submit(batch(f"j{number}", cpu, seconds, deadline, priority=draw // 27 % 2))
        except Conflict:
            pass
        for _ in range(1 + draw // 54 % 20):
            for row in list(desk.kept.workloads.values()):
                item = desk.planner.tables.items[row.id].item
                if row.state == "placed" and ((row.id[0] == "c" and draw % 7 == 0) or (row.id[0] == "j" and desk.now - row.plan["start_ms"] >= (item.duration_ms or 0))):
                    desk.do(lambda planner, now, name=row.id: planner.cancel(name, now))
            round_of(desk, rounds)
            broken += [f"{row.id}: {row.reason}" for row in desk.kept.workloads.values() if "will miss" in row.reason or "not there any more" in row.reason]
    return broken


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["dated", "dated", "undated", "work"]), st.integers(0, 2**16)), max_size=25))
def test_what_was_promised_is_kept_whatever_else_is_placed(steps: list[tuple[str, int]]) -> None:
    assert live(steps) == []


def test_promises_are_broken_where_nothing_guards_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(Agenda, "_guard", lambda *_: None)
    monkeypatch.setattr(Agenda, "close", Placing.close)
    steps = [("undated", 6)] * 3 + [("undated", 7), ("dated", 26)] + [("work", 3)] * 3  # three and two CPUs for a minute, then four on either node; containers of one CPU in between
    assert any("not there any more" in said for said in live(steps))
    monkeypatch.undo()
    assert live(steps) == []


def test_the_checker_of_plans_catches_reservations_that_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: containers take what is reserved where nothing guards it."""
    monkeypatch.setattr(Agenda, "_guard", lambda *_: None)
    monkeypatch.setattr(Agenda, "close", Placing.close)
    desk = Desk()
    desk.node("n0")
    desk.submit(batch("a", 4, 100))
    desk.submit(batch("b", 4, 100, 500))
    desk.do(lambda planner, now: planner.cancel("a", now))
    desk.submit(work("web", 4))
    assert overbooked(desk)
