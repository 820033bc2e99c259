"""The small placement of a cut-off site says of every node what the hub's scheduler says, on random shared cases; only this test knows both."""

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.contract.errors import ContractError
from edge_runtime.workloads import placement
from edge_runtime.workloads.placement import Seat, Site, quantity
from hub.scheduler import Fail, Invalid, Scheduler, State
from hub.scheduler.feasible import verdicts
from hub.scheduler.units import quantity as hub_quantity
from hub.workloads.documents import read_node, read_workload

Json = dict[str, Any]
APPS, ZONES, MODELS = ("x", "y", "z"), ("z1", "z2"), ("t4", "a100")


def selector(draw: random.Random) -> Json | None:
    return draw.choice([
        None, {}, {"labels": {"app": draw.choice(APPS)}}, {"requirements": [{"key": "app", "op": draw.choice(["In", "NotIn"]), "values": draw.sample(APPS, 2)}]},
        {"requirements": [{"key": "n", "op": draw.choice(["Gt", "Lt"]), "values": ["3"]}]}, {"requirements": [{"key": "app", "op": draw.choice(["Exists", "DoesNotExist"])}]},
    ])


def peer(draw: random.Random) -> Json:
    made: Json = {"topology_key": draw.choice(["host", "zone", "rack"])}
    chosen = selector(draw)
    if chosen is not None:
        made["selector"] = chosen
    if draw.random() < 0.3:
        made["namespaces"] = draw.sample(["default", "other"], draw.randrange(3))
    if draw.random() < 0.2:
        made["namespace_selector"] = draw.choice([{}, {"labels": {"team": "a"}}, {"requirements": [{"key": "team", "op": "DoesNotExist"}]}])
    return made


def requirement(draw: random.Random, key: str) -> Json:
    op = draw.choice(["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"])
    values = {"In": ["z1", "5"], "NotIn": ["z1"], "Gt": ["3"], "Lt": ["3"]}.get(op)
    return {"key": key, "op": op} | ({"values": values} if values else {})


def node(draw: random.Random, name: str) -> Json:
    made: Json = {"name": name, "kind": draw.choice(["edge", "cloud", "gpu"]), "capacity": {"cpu": draw.choice([2, "3500m", 8]), "memory": draw.choice(["2Gi", 8 << 30])}, "labels": {}}
    if draw.random() < 0.7:
        made["zone"] = draw.choice(ZONES)
    if draw.random() < 0.5:
        made["labels"]["rack"] = draw.choice(["r1", "r2"])
    if draw.random() < 0.5:
        made["labels"]["n"] = draw.choice(["1", "5", "x"])
    if draw.random() < 0.5:
        made["region"] = draw.choice(["eu", "us"])
    if draw.random() < 0.4:
        made["gpus"] = [{"model": draw.choice(MODELS), "memory": "16Gi", "count": draw.randrange(1, 3)}]
    if draw.random() < 0.3:
        made["taints"] = [{"key": draw.choice("ab"), "value": draw.choice(["", "v"]), "effect": draw.choice(["NoSchedule", "PreferNoSchedule", "NoExecute"])}]
    if draw.random() < 0.3:
        made["runs"] = draw.sample(["vm", "container"], draw.randrange(3))
    if draw.random() < 0.15:
        made["unschedulable"] = True
    if draw.random() < 0.3:
        made["capacity"]["slots"] = draw.randrange(4)
    if draw.random() < 0.2:
        made["capacity"]["lab/fpga"] = draw.randrange(3)
    if draw.random() < 0.3:
        made["capacity"] |= {"cpu": 8, "memory": "8Gi"}
        made["numa"] = [{"cpu": 4, "memory": "4Gi"}] * 2
    return made


def workload(draw: random.Random, name: str) -> Json:
    made: Json = {"id": name, "kind": draw.choice(["vm", "container"]), "labels": {"app": draw.choice(APPS)}, "requests": {"cpu": draw.choice(["100m", 1, "1500m", 3]), "memory": draw.choice([0, "1Gi", "3Gi"])}}
    options: list[tuple[float, str, Any]] = [
        (0.2, "gpu", lambda: draw.choice([{"count": 1}, {"count": 2}, {"milli": 300}, {"milli": 700, "memory": "10Gi"}, {"models": ["t4"]}, {"count": 1, "memory": "20Gi"}])),
        (0.2, "node_selector", lambda: draw.choice([{"zone": "z1"}, {"n": "5"}, {"rack": "r1", "zone": "z2"}])),
        (0.2, "node_affinity", lambda: {"required": [
            draw.choice([{}, {"labels": [requirement(draw, draw.choice(["zone", "n"]))]}, {"names": [{"op": "In", "values": ["n0", "n1"]}]}]) for _ in range(draw.randrange(3))]}),
        (0.2, "affinity", lambda: [peer(draw) for _ in range(draw.randrange(1, 3))]), (0.3, "anti_affinity", lambda: [peer(draw) for _ in range(draw.randrange(1, 3))]),
        (0.3, "tolerations", lambda: [draw.choice([{"key": "a"}, {}, {"key": "b", "value": "v"}, {"key": "a", "effect": "NoSchedule"}, {"key": "node.kubernetes.io/unschedulable"}])]),
        (0.3, "spread", lambda: [{"topology_key": draw.choice(["zone", "host", "rack"]), "max_skew": draw.randrange(1, 3), "hard": draw.random() < 0.8, "min_domains": draw.randrange(1, 4)}
                                 | ({"selector": chosen} if (chosen := selector(draw)) is not None else {}) for _ in range(draw.randrange(1, 3))]),
        (0.1, "numa", lambda: "single"), (0.15, "residency", lambda: ["eu"]), (0.15, "node_kinds", lambda: ["edge", "gpu"]), (0.2, "namespace", lambda: "other"),
    ]
    for chance, key, make in options:
        if draw.random() < chance:
            made[key] = make()
    if draw.random() < 0.1:
        made["requests"]["lab/fpga"] = 1
    if draw.random() < 0.2:
        made["labels"]["n"] = draw.choice(["1", "5", "x"])
    return made


def compare(seed: int) -> int:
    """One site over its life; returns how many verdicts were compared."""
    draw = random.Random(seed)
    site, state = Site(), State(seed)
    documents = [node(draw, f"n{number}") for number in range(draw.randrange(1, 7))]
    for document in documents:
        site.add(document)
    state.add_nodes([read_node(document, document["name"])[1] for document in documents])
    scheduler, compared, placed = Scheduler(state), 0, list[str]()
    for number in range(draw.randrange(1, 14)):
        document = workload(draw, f"w{number}")
        item = read_workload(document).item
        try:
            klass = state.klass(item.shape)
        except Invalid:  # no node here ever offered the resource
            assert all("RESOURCES" in failed for failed in site.verdicts(document).values())
            continue
        bits = verdicts(state, klass)
        ours = site.verdicts(document)
        for index, there in enumerate(state.nodes):
            theirs = {flag.name for flag in Fail if int(bits[index]) & flag}
            assert set(ours[there.name]) == theirs, f"seed {seed}: {document} on {there.name}"
            compared += 1
        decision = scheduler.decide(item, number)
        done = scheduler.commit(decision, number)
        if done is not None:
            seat = Seat(done.node, tuple(int(gpu) for gpu in done.seat.gpus), tuple((int(zone), int(cpu), int(memory)) for zone, cpu, memory in done.seat.numa))
            site.hold(document, seat)
            placed.append(item.id)
            if draw.random() < 0.1:
                site.hold(document, seat, ending=True)
                state.set_ending(item.id)
        if placed and draw.random() < 0.2:
            gone = placed.pop(draw.randrange(len(placed)))
            assert site.release(gone) and state.release(gone)
        for index, there in enumerate(state.nodes):
            assert site.nodes[there.name].free["cpu"] == int(state.free[state.resource_rows["cpu"], index])
    return compared


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_what_fits_on_a_cut_off_site_is_what_fits_at_the_hub(seed: int) -> None:
    compare(seed)


def test_enough_is_compared_and_a_planted_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(compare(seed) for seed in range(40)) > 500
    for name, broken in (("_tolerates", lambda *_: True), ("_speaks_of", lambda *_: False), ("affine", lambda *_: True), ("_devices", lambda *_: [0, 1, 2])):
        with monkeypatch.context() as patch:
            patch.setattr(placement, name, broken)
            with pytest.raises((AssertionError, KeyError)):
                for seed in range(80):
                    compare(seed)


@given(st.sampled_from(["cpu", "memory", "lab/fpga"]), st.one_of(st.integers(0, 1 << 50), st.floats(0, 1e6), st.tuples(st.floats(0, 1e3), st.sampled_from(["m", "k", "Ki", "M", "Gi", ""])).map(lambda pair: f"{pair[0]}{pair[1]}")))
def test_quantities_are_read_as_at_the_hub(resource: str, value: Any) -> None:
    try:
        theirs = hub_quantity(resource, value, "x")
    except Invalid:
        return
    assert quantity(resource, value) == theirs


def test_placing_takes_the_best_and_twice_the_same_is_once() -> None:
    site = Site()
    for name, cpu in (("big", 8), ("small", 2)):
        site.add({"name": name, "capacity": {"cpu": cpu, "memory": "8Gi"}})
    first = site.place({"id": "a", "requests": {"cpu": 2}})
    assert first is not None and site.place({"id": "a", "requests": {"cpu": 2}}) == first
    assert site.nodes[first.node].free["slots"] == placement.UNLIMITED_SLOTS - 1
    assert site.place({"id": "c", "requests": {"cpu": 64}}) is None and site.place({"id": "l", "links": [{"site": "x"}]}) is None
    assert site.release("a") and not site.release("a")


@pytest.mark.parametrize("bad", [{}, {"name": "n", "capacity": 5}, {"name": "n", "capacity": {"cpu": "many"}}, {"name": "n", "gpus": [{}]}, {"name": "n", "capacity": {"cpu": -1}}])
def test_bad_nodes_are_one_error(bad: Json) -> None:
    site = Site()
    with pytest.raises(ContractError):
        site.add(bad)
    assert site.nodes == {}


@pytest.mark.parametrize("bad", [{"id": "a", "requests": {"cpu": "x"}}, {"id": "a", "affinity": [5]}, {"id": "a", "spread": [{}]}, {"id": "a", "gpu": 7}, {"id": "a", "requests": []}])
def test_bad_workloads_are_one_error_and_change_nothing(bad: Json) -> None:
    site = Site()
    site.add({"name": "n", "capacity": {"cpu": 1}})
    with pytest.raises(ContractError):
        site.place(bad)
    assert site.held == {}
