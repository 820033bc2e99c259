"""What users of other schedulers suffer from, each as a small scenario (the threads are named). None of it may happen here."""

from typing import Any

import numpy as np

from hub.scheduler import Kind, Pending, Placed, Ranker, Scheduler, State, gang, node, preempt, quota, rebalance, workload
from hub.scheduler.audit import check_invariants
from hub.scheduler.parse import budget as parse_budget
from hub.scheduler.parse import quota as parse_quota
from hub.scheduler.rebalance import Limits

Json = dict[str, Any]
HOUR_MS = 3_600_000


def cluster(*nodes: Json, ranker: Ranker | None = None) -> Scheduler:
    state = State(seed=3)
    state.add_nodes([node({"name": f"n{at}", "capacity": {"cpu": 8, "memory": "32Gi"}, **item}) for at, item in enumerate(nodes)])
    return Scheduler(state, ranker)


def item(name: str, **more: Any) -> Any:
    return workload({"id": name, "requests": {"cpu": 1, "memory": "1Gi"}, **more})


def put(scheduler: Scheduler, name: str, on: int, **more: Any) -> None:
    done = scheduler.commit(scheduler.decide(item(name, **more), 0, np.arange(scheduler.state.size) == on), 0)
    assert done is not None


def node_of(scheduler: Scheduler, name: str) -> str | None:
    seat = scheduler.state.seat(name)
    return None if seat is None else scheduler.state.nodes[seat.node].name


def test_gang_order_does_not_decide_volcano_1297() -> None:
    """X may go to A or B and likes A, Y only to A: in the order of submission X takes A and Y has no place."""
    scheduler = cluster({"capacity": {"cpu": 1, "memory": "4Gi"}, "labels": {"disk": "ssd", "kind": "a"}}, {"capacity": {"cpu": 1, "memory": "4Gi"}, "labels": {"disk": "hdd"}})
    likes = {"preferred": [{"weight": 100, "term": {"labels": [{"key": "disk", "op": "In", "values": ["ssd"]}]}}]}
    x = item("x", gang={"id": "g", "size": 2}, node_affinity=likes)
    y = item("y", gang={"id": "g", "size": 2}, node_selector={"kind": "a"})
    assert isinstance(gang.reserve(scheduler, [x, y], 0), gang.Gang)
    assert (node_of(scheduler, "x"), node_of(scheduler, "y")) == ("n1", "n0")


def test_gang_that_greedy_cannot_place_is_found_by_search_volcano_1297() -> None:
    """Largest first puts 4 beside 3 and leaves no room for 3 + 3 + 2; another arrangement holds all."""
    scheduler = cluster({"capacity": {"cpu": 8, "memory": "32Gi"}}, {"capacity": {"cpu": 7, "memory": "32Gi"}}, ranker=Ranker(weights={kind: {"packing": 1} for kind in Kind}))
    sizes = (4, 3, 3, 3, 2)
    group = [item(f"m{at}", requests={"cpu": size}, gang={"id": "g", "size": len(sizes)}) for at, size in enumerate(sizes)]
    assert isinstance(gang.reserve(scheduler, group, 0), gang.Gang)
    assert not scheduler.state.free[0].any()
    check_invariants(scheduler.state)


def test_sum_fits_but_the_nodes_do_not_volcano_665() -> None:
    """8 CPUs are free in sum, in pieces of 2: a gang of two that want 3 each is refused with proof, and leaves nothing behind."""
    scheduler = cluster(*[{"capacity": {"cpu": 2, "memory": "8Gi"}}] * 3, {"capacity": {"cpu": 3, "memory": "8Gi"}})
    before = scheduler.state.digest()
    answer = gang.reserve(scheduler, [item(f"m{at}", requests={"cpu": 3}, gang={"id": "g", "size": 2}) for at in range(2)], 0)
    assert isinstance(answer, gang.Refused) and answer.proven and "pieces" in answer.reason
    assert scheduler.state.digest() == before


def test_reclaim_frees_gpus_where_they_are_of_use_kueue_5243() -> None:
    """A wants 8 GPUs of one node back from B, who borrowed on both: what goes is on one node, and the head of the queue blocks nobody."""
    scheduler = cluster(*[{"gpus": [{"model": "H100", "count": 8}], "capacity": {"cpu": 64, "memory": "256Gi"}}] * 2)
    state = scheduler.state
    for tenant in ("a", "b"):
        state.set_quota(parse_quota({"tenant": tenant, "nominal": {"gpu_milli": 8000}, "cohort": "c", "borrow": {"gpu_milli": 8000}}))
    for at in range(16):
        put(scheduler, f"b{at}", at % 2, tenant="b", gpu={})
    done = quota.admit(scheduler, [item("a", tenant="a", gpu={"count": 8})], 0)
    assert [placed.workload for placed in done.placed] == ["a"]
    assert len(done.evicted) == 8 and len({int(gone.id[1:]) % 2 for gone in done.evicted}) == 1
    stuck = quota.admit(scheduler, [item("head", tenant="b", priority=9, gpu={"count": 8}), item("small", tenant="b", requests={"cpu": 1})], 0)
    assert [placed.workload for placed in stuck.placed] == ["small"] and [waiting.workload for waiting in stuck.pending] == ["head"]
    check_invariants(state)


def test_no_budget_is_violated_without_need_kubernetes_91492() -> None:
    """A budget-protected pod of lower priority stays where an unprotected one of higher priority makes room as well."""
    for everywhere in (False, True):
        scheduler = cluster({}, {})
        scheduler.state.set_budget(parse_budget({"name": "db", "selector": {"labels": {"app": "db"}}, "allowed": 0}))
        put(scheduler, "db-0", 0, labels={"app": "db"}, priority=1, requests={"cpu": 4})
        put(scheduler, "web", 0, priority=2, requests={"cpu": 4})
        put(scheduler, "db-1", 1, labels={"app": "db"}, priority=1, requests={"cpu": 8})
        made = preempt.plan(scheduler, item("w", priority=10, requests={"cpu": 4}), 0, everywhere=everywhere)
        assert made is not None and (made.victims, made.violations) == (("web",), 0)


def test_one_plan_counts_its_own_disruptions_kubernetes_91492() -> None:
    """The budget allows one: a plan that needs two of the same application on one node loses to one that needs a single other workload of higher priority."""
    for everywhere in (False, True):
        scheduler = cluster({}, {})
        scheduler.state.set_budget(parse_budget({"name": "db", "selector": {"labels": {"app": "db"}}, "allowed": 1}))
        for name in ("db-0", "db-1"):
            put(scheduler, name, 0, labels={"app": "db"}, priority=1, requests={"cpu": 4})
        put(scheduler, "web", 1, priority=5, requests={"cpu": 8})
        made = preempt.plan(scheduler, item("w", priority=10, requests={"cpu": 8}), 0, everywhere=everywhere)
        assert made is not None and made.victims == ("web",)


def spread_cluster() -> Scheduler:
    """Six replicas over three zones of two nodes, then a scale-down that takes both of zone b and one of zone c."""
    scheduler = cluster(*[{"zone": zone, "price": 10} for zone in "abcabc"])
    constraint = [{"topology_key": "zone", "selector": {"labels": {"app": "web"}}}]
    for at in range(8):
        put(scheduler, f"w{at}", at % 6, labels={"app": "web"}, spread=constraint, migratable=True, state_bytes=1 << 30)
    for name in ("w1", "w4", "w7", "w2"):
        scheduler.release(name)
    return scheduler


def zones(scheduler: Scheduler) -> list[int]:
    names = [dict(entry.labels)["zone"] for entry in scheduler.state.nodes]
    return [sum(int(scheduler.state.load[at]) for at, zone in enumerate(names) if zone == wanted) for wanted in "abc"]


def test_spread_is_restored_after_a_scale_down_kubernetes_115911() -> None:
    scheduler = spread_cluster()
    assert zones(scheduler) == [3, 0, 1]
    made = rebalance.plan(scheduler, HOUR_MS)
    assert zones(scheduler) == [3, 0, 1], "planning changes nothing"
    assert rebalance.carry_out(scheduler, made, HOUR_MS) == [step.workload for step in made.steps]
    assert max(zones(scheduler)) - min(zones(scheduler)) <= 1 and len(made.steps) == 1
    check_invariants(scheduler.state)


def test_what_was_moved_does_not_come_back_descheduler_994() -> None:
    """After a plan the next one is empty, also without cool-down, and each target is where the scheduler itself would put the workload among the allowed nodes."""
    scheduler = spread_cluster()
    made = rebalance.plan(scheduler, HOUR_MS)
    rebalance.carry_out(scheduler, made, HOUR_MS)
    assert all(step.source != step.target for step in made.steps)
    for hour in range(2, 6):
        assert rebalance.plan(scheduler, hour * HOUR_MS, {}, Limits(cooldown_ms=0)).steps == ()


def test_consolidation_comes_to_rest_karpenter_2388() -> None:
    """Equal nodes, each a quarter full: emptied once, and never again though nothing forbids it; a node is not emptied for less than it saves."""
    scheduler = cluster(*[{"price": 1_000_000}] * 4)
    for at in range(8):
        put(scheduler, f"v{at}", at % 4, kind="vm", state_bytes=1 << 30)
    moves = []
    for hour in range(24):
        made = rebalance.plan(scheduler, hour * HOUR_MS, {}, Limits(cooldown_ms=0))
        moves.append(len(rebalance.carry_out(scheduler, made, hour * HOUR_MS)))
    assert sum(moves) <= 8 and not any(moves[3:]) and sorted(scheduler.state.load.tolist()) == [0, 0, 0, 8]
    dear = cluster(*[{"price": 1_000_000}] * 2)
    for at in range(2):
        put(dear, f"big{at}", at, kind="vm", state_bytes=1 << 50)
    assert rebalance.plan(dear, 0, {}, Limits(cooldown_ms=0)).steps == ()


def test_what_just_moved_stays_until_the_cooldown_is_over_karpenter_2388() -> None:
    scheduler = cluster(*[{"price": 1_000_000}] * 2)
    for at in range(2):
        put(scheduler, f"v{at}", at, kind="vm")
    recent = {"v0": HOUR_MS - 1, "v1": HOUR_MS - 1}
    assert rebalance.plan(scheduler, HOUR_MS, recent).steps == ()
    assert len(rebalance.plan(scheduler, 2 * HOUR_MS, recent).steps) == 1


def test_there_is_no_migration_storm_kubevirt_258() -> None:
    """40 VMs could move at once: waves stay within their limits, both ends have room while a wave runs, and a step that fails ends the plan."""
    scheduler = cluster(*[{"price": 1_000_000, "capacity": {"cpu": 64, "memory": "64Gi"}}] * 10)
    for at in range(40):
        put(scheduler, f"v{at}", at % 10, kind="vm", requests={"cpu": 2, "memory": "1Gi"})
    limits = Limits(parallel=4, per_node=2)
    made = rebalance.plan(scheduler, HOUR_MS, {}, limits)
    assert made.steps and len(made.emptied) == 8
    held = scheduler.state.snapshot()
    for wave in range(made.steps[-1].wave + 1):
        steps = [step for step in made.steps if step.wave == wave]
        ends = [end for step in steps for end in (step.source, step.target)]
        assert 0 < len(steps) <= limits.parallel and max(ends.count(end) for end in ends) <= limits.per_node
        twin = held.snapshot()
        for step in steps:
            moving = held.workload(step.workload)
            assert moving is not None
            twin.place(workload({"id": f"{step.workload}-arriving", "requests": {"cpu": 2, "memory": "1Gi"}}), step.seat, 0)
        for step in steps:
            held.move(step.workload, step.seat, 0)
    scheduler.state.set_cordon(made.steps[0].target, True)
    scheduler.release(made.steps[1].workload)
    assert rebalance.carry_out(scheduler, made, HOUR_MS) == [made.steps[0].workload]


def test_every_node_is_scored_kubernetes_95709() -> None:
    """The fullest node of 600 is found wherever it is: no share of nodes is left out, no starting index turns."""
    scheduler = cluster(*[{}] * 600, ranker=Ranker(weights={kind: {"packing": 1} for kind in Kind}))
    for at in (599, 0, 311):
        put(scheduler, f"seed{at}", at, requests={"cpu": 4})
        placed = scheduler.reserve(item(f"w{at}"), 0)
        assert isinstance(placed, Placed) and placed.node == f"n{at}"
        scheduler.release(f"seed{at}")
        scheduler.release(f"w{at}")


def test_pending_says_why_per_node_kubernetes_4583() -> None:
    scheduler = cluster({"taints": [{"key": "k", "effect": "NoSchedule"}]}, {}, {"unschedulable": True})
    put(scheduler, "full", 1, requests={"cpu": 8})
    answer = scheduler.reserve(item("w"), 0)
    assert isinstance(answer, Pending) and answer.failed == {"CORDONED": 1, "TAINT": 1, "RESOURCES": 1}
