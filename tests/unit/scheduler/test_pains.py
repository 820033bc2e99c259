"""What users of other schedulers suffer from, each as a small scenario (the threads are named). None of it may happen here.

Those of rebalancing (spread, churn, storms, what comes back) are in `test_rebalance.py` and `test_moves.py`.
"""

from typing import Any

import numpy as np

from hub.scheduler import Kind, Pending, Placed, Ranker, Scheduler, State, gang, node, preempt, quota, workload
from hub.scheduler.audit import check_invariants
from hub.scheduler.parse import budget as parse_budget
from hub.scheduler.parse import quota as parse_quota

Json = dict[str, Any]


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
    scheduler = cluster({}, {})
    scheduler.state.set_budget(parse_budget({"name": "db", "selector": {"labels": {"app": "db"}}, "allowed": 0}))
    put(scheduler, "db-0", 0, labels={"app": "db"}, priority=1, requests={"cpu": 4})
    put(scheduler, "web", 0, priority=2, requests={"cpu": 4})
    put(scheduler, "db-1", 1, labels={"app": "db"}, priority=1, requests={"cpu": 8})
    made = preempt.plan(scheduler, item("w", priority=10, requests={"cpu": 4}), 0)
    assert made is not None and (made.victims, made.violations) == (("web",), 0)


def test_one_plan_counts_its_own_disruptions_kubernetes_91492() -> None:
    """The budget allows one: a plan that needs two of the same application on one node loses to one that needs a single other workload of higher priority."""
    scheduler = cluster({}, {})
    scheduler.state.set_budget(parse_budget({"name": "db", "selector": {"labels": {"app": "db"}}, "allowed": 1}))
    for name in ("db-0", "db-1"):
        put(scheduler, name, 0, labels={"app": "db"}, priority=1, requests={"cpu": 4})
    put(scheduler, "web", 1, priority=5, requests={"cpu": 8})
    made = preempt.plan(scheduler, item("w", priority=10, requests={"cpu": 8}), 0)
    assert made is not None and made.victims == ("web",)


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
