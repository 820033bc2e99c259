"""Tables beside filters, policies, gangs, preemption, quotas and explanations: small clusters, one fact each."""

from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler import Fail, Invalid, Kind, Pending, Placed, Ranker, Scheduler, Seat, State, View, gang, node, preempt, quota, refuse_cycles, workload
from hub.scheduler.arrays import SILENT
from hub.scheduler.audit import check_invariants
from hub.scheduler.explain import explain
from hub.scheduler.feasible import verdicts
from hub.scheduler.fragmentation import Fragmentation, Typical, typical_of
from hub.scheduler.parse import budget as parse_budget
from hub.scheduler.parse import quota as parse_quota
from hub.scheduler.rank import Given, policies_from
from tests.unit.scheduler import preempt_reference, streams

Json = dict[str, Any]


def cluster(*nodes: Json, ranker: Ranker | None = None) -> Scheduler:
    state = State(seed=3)
    state.add_nodes([node({"name": f"n{at}", "capacity": {"cpu": 4, "memory": "8Gi"}, **item}) for at, item in enumerate(nodes)])
    return Scheduler(state, ranker)


def item(name: str, **more: Any) -> Any:
    return workload({"id": name, "requests": {"cpu": 1, "memory": "1Gi"}, **more})


def put(scheduler: Scheduler, name: str, on: int | str | None = None, **more: Any) -> Placed:
    """Place and demand that it works; `on` names the node."""
    among = None
    if on is not None:
        among = np.array([entry.name == (on if isinstance(on, str) else f"n{on}") for entry in scheduler.state.nodes])
    done = scheduler.commit(scheduler.decide(item(name, **more), 0, among), 0)
    assert done is not None
    return done


SAME_APP = {"selector": {"labels": {"app": "a"}}}

FILTERS: list[tuple[str, Json, Json, Fail]] = [
    ("selector", {"labels": {"disk": "hdd"}}, {"node_selector": {"disk": "ssd"}}, Fail.NODE_AFFINITY),
    ("gt", {"labels": {"cores": "8"}}, {"node_affinity": {"required": [{"labels": [{"key": "cores", "op": "Gt", "values": ["8"]}]}]}}, Fail.NODE_AFFINITY),
    ("empty term", {}, {"node_affinity": {"required": [{}]}}, Fail.NODE_AFFINITY),
    ("taint", {"taints": [{"key": "k", "effect": "NoSchedule"}]}, {}, Fail.TAINT),
    ("taint of another value", {"taints": [{"key": "k", "value": "v", "effect": "NoExecute"}]}, {"tolerations": [{"key": "k", "value": "w"}]}, Fail.TAINT),
    ("cordoned", {"unschedulable": True}, {}, Fail.CORDONED),
    ("kind", {"kind": "edge"}, {"node_kinds": ["gpu", "cloud"]}, Fail.KIND),
    ("residency", {"region": "us"}, {"residency": ["eu"]}, Fail.RESIDENCY),
    ("no region", {}, {"residency": ["eu"]}, Fail.RESIDENCY),
    ("cpu", {"capacity": {"cpu": "999m", "memory": "8Gi"}}, {}, Fail.RESOURCES),
    ("slots", {"capacity": {"cpu": 4, "memory": "8Gi", "slots": 0}}, {}, Fail.RESOURCES),
    ("extended", {}, {"requests": {"example.com/fpga": 1}}, Fail.RESOURCES),
    ("no gpu", {}, {"gpu": {}}, Fail.GPU_MODEL),
    ("gpu model", {"gpus": [{"model": "T4"}]}, {"gpu": {"models": ["A100"]}}, Fail.GPU_MODEL),
    ("gpu memory", {"gpus": [{"model": "T4", "memory": "1Gi"}]}, {"gpu": {"milli": 100, "memory": "2Gi"}}, Fail.GPU),
    ("numa", {"capacity": {"cpu": 4, "memory": "8Gi"}, "numa": [{"cpu": 2, "memory": "4Gi"}, {"cpu": 2, "memory": "4Gi"}]}, {"numa": "single", "requests": {"cpu": 3}}, Fail.NUMA),
    ("affinity to nobody", {"zone": "z"}, {"affinity": [{"topology_key": "zone", **SAME_APP}]}, Fail.AFFINITY),
    ("spread without key", {}, {"spread": [{"topology_key": "zone", **SAME_APP}]}, Fail.SPREAD_KEY),
    ("link to an unknown site", {"site": "s"}, {"links": [{"site": "nowhere", "max_rtt_us": 1}]}, Fail.LINK),
]


@pytest.mark.parametrize(("name", "about", "wanted", "flag"), FILTERS, ids=[row[0] for row in FILTERS])
def test_each_filter_alone(name: str, about: Json, wanted: Json, flag: Fail) -> None:
    scheduler = cluster(about, {"name": "fpga", "capacity": {"example.com/fpga": 1}})
    bits = verdicts(scheduler.state, scheduler.state.klass(item("w", **wanted).shape))
    assert Fail(int(bits[0])) == flag


GOOD: list[tuple[str, Json, Json]] = [
    ("toleration of all", {"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]}, {"tolerations": [{}]}),
    ("soft taint", {"taints": [{"key": "k", "effect": "PreferNoSchedule"}]}, {}),
    ("tolerated cordon", {"unschedulable": True}, {"tolerations": [{"key": "node.kubernetes.io/unschedulable"}]}),
    ("first of its own group", {"zone": "z"}, {"labels": {"app": "a"}, "affinity": [{"topology_key": "zone", **SAME_APP}]}),
    ("or of terms", {"labels": {"a": "1"}}, {"node_affinity": {"required": [{"labels": [{"key": "x", "op": "Exists"}]}, {"labels": [{"key": "a", "op": "In", "values": ["1"]}]}]}}),
    ("numa of a node without zones", {}, {"numa": "single", "requests": {"cpu": 3}}),
    ("its own site", {"site": "s"}, {"links": [{"site": "s", "max_rtt_us": 1, "min_kbps": 10}]}),
]


@pytest.mark.parametrize(("name", "about", "wanted"), GOOD, ids=[row[0] for row in GOOD])
def test_what_must_fit_fits(name: str, about: Json, wanted: Json) -> None:
    scheduler = cluster(about)
    assert not verdicts(scheduler.state, scheduler.state.klass(item("w", **wanted).shape)).any()


def test_anti_affinity_holds_in_both_directions() -> None:
    scheduler = cluster({"zone": "z1"}, {"zone": "z1"}, {"zone": "z2"})
    put(scheduler, "lonely", on=0, anti_affinity=[{"topology_key": "zone", **SAME_APP}])
    bits = verdicts(scheduler.state, scheduler.state.klass(item("w", labels={"app": "a"}).shape))
    assert [Fail(int(bit)) for bit in bits] == [Fail.EXCLUDED, Fail.EXCLUDED, Fail(0)]
    put(scheduler, "a", on=2, labels={"app": "a"})
    bits = verdicts(scheduler.state, scheduler.state.klass(item("v", anti_affinity=[{"topology_key": "host", **SAME_APP}]).shape))
    assert [bool(bit) for bit in bits] == [False, False, True]


def test_links_by_distance_by_measurement_and_by_bandwidth() -> None:
    scheduler = cluster({"site": "berlin", "location": [52.5, 13.4]}, {"site": "paris", "location": [48.9, 2.4]}, {"site": "sydney", "location": [-33.9, 151.2]})
    near = item("near", links=[{"site": "berlin", "max_rtt_us": 20_000}])
    assert [bool(bit) for bit in verdicts(scheduler.state, scheduler.state.klass(near.shape))] == [False, False, True]
    scheduler.state.set_link("berlin", "paris", 30_000, 1_000)
    assert [bool(bit) for bit in verdicts(scheduler.state, scheduler.state.klass(near.shape))] == [False, True, True]
    put(scheduler, "wide", on=1, links=[{"site": "berlin", "min_kbps": 600}])
    wide = scheduler.state.klass(item("second", links=[{"site": "berlin", "min_kbps": 600}]).shape)
    assert verdicts(scheduler.state, wide)[1] == Fail.LINK
    scheduler.release("wide")
    assert not verdicts(scheduler.state, wide)[1]


def test_spread_counts_only_where_the_workload_may_go() -> None:
    scheduler = cluster({"zone": "z1", "labels": {"pool": "a"}}, {"zone": "z2", "labels": {"pool": "a"}}, {"zone": "z3", "labels": {"pool": "b"}})
    wanted: Json = {"labels": {"app": "a"}, "node_selector": {"pool": "a"}, "spread": [{"topology_key": "zone", **SAME_APP}]}
    assert {put(scheduler, name, **wanted).node for name in "pq"} == {"n0", "n1"}
    assert put(scheduler, "r", **wanted).node in ("n0", "n1")


BAD: list[tuple[Json, str]] = [
    ({"requests": {"cpu": -1}}, "requests.cpu"), ({"requests": {"memory": "9999999999999Gi"}}, "requests.memory"), ({"requests": {"cpu": "1e400"}}, "requests.cpu"),
    ({"requests": {"flux": 1}}, "requests.flux"), ({"requests": {"cpu": "NaN"}}, "requests.cpu"), ({"requests": {"cpu": True}}, "requests.cpu"), ({"requests": {"memory": "4Gx"}}, "requests.memory"),
    ({"requests": [1]}, "requests"), ({"requests": {"slots": 2}}, "requests.slots"), ({"gpu": {"count": 99}}, "gpu.count"), ({"gpu": {"count": 2, "milli": 500}}, "gpu.milli"),
    ({"gpu": {"milli": 0}}, "gpu.milli"), ({"gpu": {"milli": 1001}}, "gpu.milli"), ({"priority": 10**10}, "priority"), ({"kind": "pod"}, "kind"), ({"unknown": 1}, "unknown"), ({"id": ""}, "id"),
    ({"labels": {"a": "bad value!"}}, "labels.a"), ({"node_affinity": {"required": [{"labels": [{"key": "a", "op": "In"}]}]}}, "values"), ({"weights": {"x": -1}}, "weights.x"),
    ({"spread": [{"topology_key": "zone", "max_skew": 0}]}, "max_skew"), ({"tolerations": [{"value": "x"}]}, "tolerations[0].key"), ({"deadline_ms": "soon"}, "deadline_ms"),
    ({"anti_affinity": [{"topology_key": "zone"}] * 65}, "anti_affinity"), ({"numa": "both"}, "numa"), ({"gang": {"id": "g", "size": 0}}, "gang.size"),
]


@pytest.mark.parametrize(("bad", "field"), BAD, ids=[row[1] for row in BAD])
def test_bad_input_names_the_field_and_the_remedy(bad: Json, field: str) -> None:
    with pytest.raises(Invalid) as caught:
        workload({"id": "w", **bad})
    assert field in caught.value.field and caught.value.problem and caught.value.remedy


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8)


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(["id", "kind", "labels", "requests", "gpu", "affinity", "spread", "tolerations", "gang", "node_affinity", "weights", "links", "priority"]), JSON))
def test_no_bytes_of_a_stranger_do_more_than_raise_invalid(value: Json) -> None:
    for parse in (workload, node, parse_budget, parse_quota):
        try:
            parse(value)
        except Invalid as error:
            assert error.field and error.remedy


def test_a_circle_of_affinities_is_refused_and_named() -> None:
    def needs(name: str, other: str) -> Any:
        return item(name, labels={"app": name}, affinity=[{"topology_key": "zone", "selector": {"labels": {"app": other}}}])

    with pytest.raises(Invalid, match="a -> b -> c -> a"):
        refuse_cycles([needs("a", "b"), needs("b", "c"), needs("c", "a")])
    refuse_cycles([needs("a", "b"), needs("b", "c"), item("c", labels={"app": "c"})])
    refuse_cycles([needs("a", "a"), needs("b", "a")])
    refuse_cycles([needs("a", "b"), needs("b", "a")], live=[item("x", labels={"app": "b"}).shape])


def test_what_no_node_could_ever_hold_is_an_error() -> None:
    scheduler = cluster({"gpus": [{"model": "T4", "count": 2}]})
    for wanted, field in (({"requests": {"cpu": 5}}, "requests.cpu"), ({"gpu": {"count": 3}}, "gpu.count"), ({"gpu": {"models": ["H100"]}}, "gpu.count"), ({"weights": {"luck": 3}}, "weights.luck")):
        with pytest.raises(Invalid) as caught:
            scheduler.check(item("w", **wanted))
        assert field in caught.value.field


def test_weights_of_a_workload_and_policies_from_outside() -> None:
    class Last:
        def score(self, view: View) -> Any:
            return np.arange(view.state.size)

    class Point:
        name = "last"

        @staticmethod
        def load() -> Any:
            return Last

    ranker = Ranker(policies_from([Point]))
    scheduler = cluster({}, {}, {}, ranker=ranker)
    assert put(scheduler, "w", weights={"last": 100, "packing": 0}).node == "n2"
    dear = Ranker({"scarcity": Given(lambda view: np.array([5.0, 1.0, 5.0]))})
    assert put(cluster({}, {}, {}, ranker=dear), "w").node == "n1"
    with pytest.raises(Invalid, match="one per node"):
        put(cluster({}, {}, ranker=dear), "w")


POLICIES: list[tuple[str, list[Json], Json, str]] = [
    ("cost_optimization", [{"price": 900}, {"price": 300}, {"price": 600}], {}, "n1"),
    ("energy", [{"idle_mw": 100, "busy_mw": 300}, {"idle_mw": 10, "busy_mw": 100}], {}, "n1"),
    ("warm", [{}, {"images": ["web"]}], {"image": "web"}, "n1"),
    ("node_affinity", [{}, {"labels": {"disk": "ssd"}}], {"node_affinity": {"preferred": [{"weight": 1, "term": {"labels": [{"key": "disk", "op": "Exists"}]}}]}}, "n1"),
    ("taint_preference", [{"taints": [{"key": "k", "effect": "PreferNoSchedule"}]}, {}], {}, "n1"),
    ("packing", [{"capacity": {"cpu": 64, "memory": "64Gi"}}, {}], {}, "n1"),
    ("headroom", [{}, {"capacity": {"cpu": 64, "memory": "64Gi"}}], {}, "n1"),
    ("resource_balance", [{"capacity": {"cpu": 1, "memory": "64Gi"}}, {"capacity": {"cpu": 8, "memory": "8Gi"}}], {}, "n1"),
]


@pytest.mark.parametrize(("policy", "nodes", "wanted", "best"), POLICIES, ids=[row[0] for row in POLICIES])
def test_each_policy_alone(policy: str, nodes: list[Json], wanted: Json, best: str) -> None:
    only = {kind: {policy: 1} for kind in Kind}
    scheduler = cluster(*nodes, ranker=Ranker(weights=only))
    assert put(scheduler, "w", **wanted).node == best


def test_fragmentation_prefers_what_leaves_whole_devices() -> None:
    """A part of a GPU goes to the device that is in use already, and not to the node whose whole device others need."""
    policy = Fragmentation([Typical(1000, 1, 1000, (), 1_000_000)])
    scheduler = cluster({"gpus": [{"model": "T4", "count": 2}]}, {"gpus": [{"model": "T4", "count": 2}]}, ranker=Ranker({"fragmentation": policy}, {kind: {"fragmentation": 1} for kind in Kind}))
    first = put(scheduler, "a", on=1, gpu={"milli": 300})
    second = put(scheduler, "b", gpu={"milli": 300})
    assert (second.node, second.seat.gpus) == ("n1", first.seat.gpus)
    assert typical_of(scheduler.state)[0].milli == 300


@settings(max_examples=20)
@given(streams.node_list(), streams.stream())
def test_kept_fragmentation_equals_that_worked_out_anew(nodes: list[Json], events: list[tuple[str, Any]]) -> None:
    typical = [Typical(1000, 1, 500, (), 400_000), Typical(500, 1, 1000, ("T4",), 300_000), Typical(250, 2, 1000, (), 200_000), Typical(1000, 0, 0, (), 100_000)]
    policy = Fragmentation(typical)
    state = State(seed=5)
    state.add_nodes([node(entry) for entry in nodes])
    scheduler = Scheduler(state, Ranker({"fragmentation": policy}))
    for what, value in events:
        if what == "reserve":
            asked = workload(value)
            scheduler.reserve(asked, 0)
            if asked.shape.gpu is not None:
                klass = state.klass(asked.shape)
                fresh = Fragmentation(typical)
                for kept, anew in zip(policy.kept(state, klass), fresh.kept(state, klass), strict=True):
                    assert np.array_equal(kept, anew)
        elif what == "release" and state.slot_of:
            scheduler.release(sorted(state.slot_of)[value % len(state.slot_of)])


# leaving


def test_heartbeats_that_stop_move_what_was_there() -> None:
    scheduler = cluster({}, {})
    placed = put(scheduler, "w", on=0)
    scheduler.state.beat("n1", 9_000)
    moved = scheduler.expire(10_000, 5_000)
    assert [(entry.workload, entry.to) for entry in moved] == [("w", "n1")]
    assert scheduler.state.status[placed.seat.node] == SILENT
    scheduler.state.beat("n0", 11_000)
    assert put(scheduler, "back", on=0).node == "n0"


def test_a_lost_node_whose_workloads_have_nowhere_to_go_gives_them_back() -> None:
    scheduler = cluster({}, {"capacity": {"cpu": 1, "memory": "1Gi"}})
    for name in ("a", "b"):
        put(scheduler, name, on=0, priority=1 if name == "b" else 0)
    moved = {entry.workload: entry.to for entry in scheduler.vanish("n0", 0)}
    assert moved == {"b": "n1", "a": None}
    assert set(scheduler.state.slot_of) == {"b"}
    check_invariants(scheduler.state)


def test_drain_migrates_restarts_and_respects_budgets() -> None:
    scheduler = cluster({}, {})
    put(scheduler, "vm", on=0, kind="vm")
    put(scheduler, "web-1", on=0, labels={"app": "web"})
    put(scheduler, "web-2", on=0, labels={"app": "web"})
    scheduler.state.set_budget(parse_budget({"name": "web", "selector": {"labels": {"app": "web"}}, "allowed": 1}))
    moved = {entry.workload: (entry.how, entry.to, entry.held) for entry in scheduler.drain("n0", 0)}
    assert moved == {"vm": ("migrate", "n1", False), "web-1": ("restart", "n1", False), "web-2": ("stay", None, True)}
    check_invariants(scheduler.state)


def test_no_execute_taints_chase_after_the_tolerated_time() -> None:
    scheduler = cluster({}, {})
    put(scheduler, "now", on=0)
    put(scheduler, "later", on=0, tolerations=[{"key": "bad", "for_ms": 1_000}])
    put(scheduler, "never", on=0, tolerations=[{"key": "bad"}])
    about = {"name": "n0", "capacity": {"cpu": 4, "memory": "8Gi"}, "taints": [{"key": "bad", "effect": "NoExecute"}]}
    scheduler.state.add_nodes([node(about)], 100)
    assert [entry.workload for entry in scheduler.execute_taints(100)] == ["now"]
    assert scheduler.execute_taints(1_099) == []
    assert [entry.workload for entry in scheduler.execute_taints(1_100)] == ["later"]
    assert scheduler.state.seat("never") is not None


# gangs


def members(count: int, **more: Any) -> list[Any]:
    return [item(f"m{at}", gang={"id": "g", "size": count}, **more) for at in range(count)]


def test_gang_is_all_or_nothing_and_idempotent() -> None:
    scheduler = cluster({}, {})
    before = scheduler.state.digest()
    refused = gang.reserve(scheduler, members(9), 0)
    assert isinstance(refused, gang.Refused) and refused.proven and scheduler.state.digest() == before
    first = gang.reserve(scheduler, members(8), 0)
    assert isinstance(first, gang.Gang)
    again = gang.reserve(scheduler, members(8), 0)
    assert isinstance(again, gang.Gang) and [entry.seat for entry in again.placed] == [entry.seat for entry in first.placed]
    with pytest.raises(Invalid, match="exactly the members"):
        gang.reserve(scheduler, members(3)[:2], 0)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4), st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5))
def test_the_verdict_on_a_small_gang_is_that_of_trying_everything(nodes: list[tuple[int, int]], asked: list[tuple[int, int]]) -> None:
    state = State(seed=1)
    state.add_nodes([node({"name": f"n{at}", "capacity": {"cpu": cpu, "memory": memory}}) for at, (cpu, memory) in enumerate(nodes)])
    group = [workload({"id": f"m{at}", "requests": {"cpu": cpu, "memory": memory}, "gang": {"id": "g", "size": len(asked)}}) for at, (cpu, memory) in enumerate(asked)]
    answer = gang.reserve(Scheduler(state), group, 0)

    def holds(places: tuple[int, ...]) -> bool:
        return all(sum(asked[at][part] for at, place in enumerate(places) if place == number) <= size for number, sizes in enumerate(nodes) for part, size in enumerate(sizes))

    possible = any(holds(places) for places in product(range(len(nodes)), repeat=len(asked)))
    assert isinstance(answer, gang.Gang) == possible
    if isinstance(answer, gang.Refused):
        assert answer.proven
    check_invariants(state)


def test_a_solvers_seats_are_not_believed() -> None:
    scheduler = cluster({"capacity": {"cpu": 2, "memory": "8Gi"}}, {"capacity": {"cpu": 3, "memory": "8Gi"}})
    group = [item(f"m{at}", requests={"cpu": cpu}, gang={"id": "g", "size": 3}) for at, cpu in enumerate((2, 2, 1))]
    answer = gang.reserve(scheduler, group, 0, solver=lambda *_: [Seat(0), Seat(0), Seat(0)])
    assert isinstance(answer, gang.Gang)
    check_invariants(scheduler.state)


# preemption


def full(scheduler: Scheduler, *rows: tuple[str, int, int, Json]) -> None:
    for name, on, priority, more in rows:
        put(scheduler, name, on=on, **{"priority": priority, **more})


TWO: Json = {"requests": {"cpu": 2, "memory": "1Gi"}}
FOUR: Json = {"requests": {"cpu": 4, "memory": "1Gi"}}

CHOICES: list[tuple[str, list[tuple[str, int, int, Json]], Json, set[str] | None]] = [
    ("lowest highest priority", [("a", 0, 5, FOUR), ("b", 1, 3, FOUR)], FOUR, {"b"}),
    ("fewest victims", [("a", 0, 3, TWO), ("b", 0, 3, TWO), ("c", 1, 3, FOUR)], FOUR, {"c"}),
    ("only as many as needed", [("a", 0, 3, TWO), ("b", 0, 4, TWO), ("c", 1, 9, FOUR)], TWO, {"a"}),
    ("nobody of equal or higher priority", [("a", 0, 10, FOUR), ("b", 1, 11, FOUR)], FOUR, None),
    ("not what may not be preempted", [("a", 0, 1, {**FOUR, "preemptible": False}), ("b", 1, 5, FOUR)], FOUR, {"b"}),
]


@pytest.mark.parametrize(("name", "there", "wanted", "victims"), CHOICES, ids=[row[0] for row in CHOICES])
def test_preemption_does_the_least_harm(name: str, there: list[tuple[str, int, int, Json]], wanted: Json, victims: set[str] | None) -> None:
    scheduler = cluster({}, {})
    full(scheduler, *there)
    made = preempt.plan(scheduler, item("w", priority=10, **wanted), 0)
    assert (None if made is None else set(made.victims)) == victims
    if made is not None:
        assert preempt.carry_out(scheduler, made, 0) is not None
        check_invariants(scheduler.state)


def test_of_equals_the_one_goes_that_has_run_the_shortest() -> None:
    scheduler = cluster({}, {})
    for at, name in enumerate("ab"):
        decision = scheduler.decide(item(name, **FOUR), 0, np.array([at == 0, at == 1]))
        assert scheduler.commit(decision, 1_000 * at) is not None
    made = preempt.plan(scheduler, item("w", priority=1, **FOUR), 0)
    assert made is not None and made.victims == ("b",)


def test_a_victim_that_can_move_is_migrated() -> None:
    scheduler = cluster({}, {"capacity": {"cpu": 2, "memory": "8Gi"}})
    put(scheduler, "vm", on=0, kind="vm", **TWO)
    put(scheduler, "box", on=0, priority=2, **TWO)
    made = preempt.plan(scheduler, item("w", priority=10, requests={"cpu": 2}, node_selector={"host": "n0"}), 0)
    assert made is not None and made.victims == ("vm",) and made.evicted == ()
    assert preempt.carry_out(scheduler, made, 0) is not None
    assert scheduler.state.nodes[scheduler.state.seat("vm").node].name == "n1"  # type: ignore[union-attr]
    check_invariants(scheduler.state)


def test_a_plan_that_was_overtaken_changes_nothing() -> None:
    scheduler = cluster({})
    put(scheduler, "a", **FOUR)
    made = preempt.plan(scheduler, item("w", priority=1, **FOUR), 0)
    assert made is not None
    scheduler.state.set_cordon("n0", True)
    before = scheduler.state.digest()
    assert preempt.carry_out(scheduler, made, 0) is None
    assert scheduler.state.digest() == before


@settings(max_examples=25)
@given(streams.node_list(), streams.stream())
def test_reserve_with_preemption_keeps_the_books_and_gives_back_who_had_to_go(nodes: list[Json], events: list[tuple[str, Any]]) -> None:
    state = State(seed=5)
    state.add_nodes([node(entry) for entry in nodes])
    scheduler = Scheduler(state)
    there: set[str] = set()
    for what, value in events:
        if what != "reserve":
            continue
        answer = preempt.reserve(scheduler, workload(value), 0)
        if isinstance(answer, preempt.Made):
            assert all(gone.priority < value["priority"] for gone in answer.evicted)
            there -= {gone.id for gone in answer.evicted}
        if not isinstance(answer, Pending):
            there.add(value["id"])
        assert set(state.slot_of) == there
        check_invariants(state)


@settings(max_examples=25)
@given(streams.node_list(), streams.stream(), streams.workload("high"))
def test_preemption_keeps_the_books_and_hurts_no_more_than_on_every_node(nodes: list[Json], events: list[tuple[str, Any]], high: Json) -> None:
    state = State(seed=5)
    state.add_nodes([node(entry) for entry in nodes])
    scheduler = Scheduler(state)
    for what, value in events:
        if what == "reserve":
            scheduler.reserve(workload(value), 0)
    asked = workload({**high, "priority": 9})
    if not isinstance(scheduler.reserve(asked, 0), Pending):
        return
    before = state.digest()
    made, least = preempt.plan(scheduler, asked, 0), preempt_reference.least(scheduler, asked)
    assert state.digest() == before
    assert (None if made is None else made.harm) == (None if least is None else least[0])
    if made is not None:
        assert preempt.carry_out(scheduler, made, 0) is not None
        assert not any(state.seat(name) for name in made.evicted) and state.seat("high") is not None
        check_invariants(state)


# quotas


def test_quota_borrowing_and_the_cohorts_limit() -> None:
    scheduler = cluster({"capacity": {"cpu": 16, "memory": "64Gi"}})
    state = scheduler.state
    state.set_quota(parse_quota({"tenant": "a", "nominal": {"cpu": 4}, "cohort": "c", "borrow": {"cpu": 2}}))
    state.set_quota(parse_quota({"tenant": "b", "nominal": {"cpu": 4}, "cohort": "c"}))
    placed = [isinstance(quota.admit_one(scheduler, item(f"a{at}", tenant="a"), 0)[0], Placed) for at in range(8)]
    assert placed == [True] * 6 + [False] * 2
    refusal = quota.refusal(state, item("late", tenant="a"))
    assert refusal is not None and "7000m CPU of 6000m CPU" in refusal
    assert [isinstance(quota.admit_one(scheduler, item(f"b{at}", tenant="b"), 0)[0], Placed) for at in range(5)] == [True] * 4 + [False]
    assert sum(name.startswith("a") for name in state.slot_of) == 6, "the node has room for all: nobody is evicted for quota alone"


def test_a_gang_is_held_against_the_quota_as_a_whole() -> None:
    scheduler = cluster({"capacity": {"cpu": 16, "memory": "64Gi"}})
    scheduler.state.set_quota(parse_quota({"tenant": "t", "nominal": {"cpu": 3}}))
    before = scheduler.state.digest()
    refused = quota.admit_gang(scheduler, members(4, tenant="t"), 0)
    assert isinstance(refused, gang.Refused) and "4000m CPU of 3000m CPU" in refused.reason and scheduler.state.digest() == before
    assert isinstance(quota.admit_gang(scheduler, members(3, tenant="t"), 0), gang.Gang)
    assert isinstance(quota.admit_gang(scheduler, members(3, tenant="t"), 0), gang.Gang), "again"


def test_the_queue_is_served_by_dominant_share() -> None:
    scheduler = cluster({"capacity": {"cpu": 12, "memory": "12Gi"}})
    heavy = [item(f"cpu{at}", tenant="cpu", requests={"cpu": 2, "memory": "1Gi"}) for at in range(9)]
    light = [item(f"mem{at}", tenant="mem", requests={"cpu": 1, "memory": "2Gi"}) for at in range(9)]
    done = quota.admit(scheduler, [*heavy, *light], 0)
    shares = {tenant: quota.share(scheduler.state, tenant, quota.totals(scheduler.state)) for tenant in ("cpu", "mem")}
    assert len(done.placed) == 8 and shares["cpu"] == shares["mem"] == pytest.approx(8 / 12)


# explanations


def test_explain_names_the_filter_the_miss_and_the_remedy() -> None:
    scheduler = cluster(
        {"taints": [{"key": "team", "value": "x", "effect": "NoSchedule"}]}, {"capacity": {"cpu": 1, "memory": "8Gi"}}, {"unschedulable": True}, {"region": "us"},
    )
    before = scheduler.state.digest()
    told = explain(scheduler, item("w", requests={"cpu": 2}, residency=["eu"]), 0)
    assert scheduler.state.digest() == before
    assert told.summary.startswith("0 of 4 nodes will do") and told.failed["RESIDENCY"] == 4
    told = explain(scheduler, item("w", requests={"cpu": 2}, residency=["us"], tolerations=[]), 0)
    assert told.nodes[0].node == "n3" and told.nodes[0].score is not None and "resource_balance" in told.nodes[0].parts
    told = explain(scheduler, item("w", requests={"cpu": 2}), 0)
    remedies = {answer.node: answer.remedy for answer in told.nodes if answer.failed}
    assert remedies == {"n0": ("tolerate team=x:NoSchedule",), "n1": ("ask for at most 1000m CPU",), "n2": ("uncordon the node",)}
    assert "2000m CPU wanted, 1000m CPU free" in next(answer.why[0] for answer in told.nodes if answer.node == "n1")


def test_explain_finds_what_to_move() -> None:
    scheduler = cluster({}, {"capacity": {"cpu": 3, "memory": "8Gi"}})
    for at in range(2):
        put(scheduler, f"vm{at}", on=0, kind="vm", state_bytes=7_000_000_000)
    put(scheduler, "box", on=0, requests={"cpu": 2})
    told = explain(scheduler, item("w", requests={"cpu": 2}, node_selector={"host": "n0"}), 0)
    assert {answer.node: answer.remedy for answer in told.nodes}["n0"] == ("after moving 2 VMs, 14 GB",)
    check_invariants(scheduler.state)


@settings(max_examples=20)
@given(streams.node_list(), streams.stream())
def test_a_remedy_that_says_tolerate_or_uncordon_is_true(nodes: list[Json], events: list[tuple[str, Any]]) -> None:
    state = State(seed=5)
    state.add_nodes([node({**entry, "unschedulable": at % 2 == 0}) for at, entry in enumerate(nodes)])
    scheduler = Scheduler(state)
    for what, value in events:
        if what != "reserve" or isinstance(scheduler.reserve(workload(value), 0), Placed):
            continue
        before = state.digest()
        told = explain(scheduler, workload(value), 0)
        assert state.digest() == before
        for answer in told.nodes:
            if answer.remedy and all(text.startswith(("tolerate", "uncordon")) for text in answer.remedy):
                cured = {**value, "tolerations": [*value.get("tolerations", []), {}]}
                aside = scheduler.on(state.snapshot())
                aside.state.set_cordon(answer.node, False)
                bits = verdicts(aside.state, aside.state.klass(workload(cured).shape))
                assert not bits[state.node_index[answer.node]]
                return
