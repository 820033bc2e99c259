"""What starts of functions took, as edges say, and what the hub makes of it: where the next one goes, and what is told."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub.scheduler import State, parse
from hub.workloads.loads import LATEST, MAX_IMAGES, LoadTimes, speeds
from hub.workloads.views import explain, workload_view

from .kept import Desk, few_steps, round_of  # noqa: F401 few_steps is a fixture

EDGES = {"gw-1": True, "gw-2": True, "gw-3": True}


def desk_of() -> Desk:
    desk = Desk()
    for name in EDGES:
        desk.node(name, "edge", kind="edge", runs=["function"])
    round_of(desk, **EDGES)
    return desk


def function(name: str, image: str = "edges:1", **more: object) -> dict[str, object]:
    return {"id": name, "kind": "function", "image": image, "requests": {"cpu": "100m", "memory": "16Mi"}, **more}


def runs(desk: Desk, name: str, load_ms: float) -> str:
    """It says that it runs; on which node."""
    row = desk.row(name)
    desk.do(lambda planner, now: planner.said(row.node, desk.number(row.node), {"id": name, "epoch": row.epoch, "state": "running", "reason": "", "load_ms": load_ms}, now))
    return row.node


def test_measured_times_choose_the_node_and_are_told_also_after_a_restart() -> None:
    desk = desk_of()
    for name in EDGES:
        for other in EDGES:
            desk.do(lambda planner, now, other=other: planner.cordon(other, "cordon", now))
        desk.do(lambda planner, now, name=name: planner.cordon(name, "", now))
        desk.submit(function(f"on-{name}"))
        assert runs(desk, f"on-{name}", 4.0 if name == "gw-2" else 40.0) == name
    for other in EDGES:
        desk.do(lambda planner, now, other=other: planner.cordon(other, "", now))
    for _ in range(2):  # once more after a restart, by what stands
        told = explain(desk.planner, "on-gw-1", desk.now)
        by_node = {one["node"]: one for one in told["nodes"]}
        assert told["cold_start_ms"] == 28.0 and {name: one["expected_load_ms"] for name, one in by_node.items()} == {"gw-1": 40.0, "gw-2": 4.0, "gw-3": 40.0}
        assert by_node["gw-2"]["parts"]["cold_start"] == {"weight": 6, "score": 100} and by_node["gw-3"]["parts"]["cold_start"]["score"] == 10
        assert workload_view(desk.planner, desk.row("on-gw-2"))["load_ms"] == 4.0
        assert desk.restart() == []
        round_of(desk, **EDGES)
    desk.submit(function("next"))
    assert desk.row("next").node == "gw-2"


def test_without_measured_times_nothing_is_scored_and_none_is_claimed() -> None:
    desk = desk_of()
    desk.submit(function("first"))
    told = explain(desk.planner, "first", desk.now)
    assert told["cold_start_ms"] is None and all(one["expected_load_ms"] is None and one["load_ms"] is None and "cold_start" not in one["parts"] for one in told["nodes"])
    for oddity in (0.0, -1.0, math.inf, math.nan):
        desk.planner.loads.observe("edges:1", "gw-1", oddity)
    desk.planner.loads.observe("", "gw-1", 5.0)
    assert desk.planner.loads.cold_ms("edges:1") is None


def test_a_node_that_loads_other_images_slowly_is_expected_to_load_this_one_slowly() -> None:
    loads, state = LoadTimes(), State(1)
    state.add_nodes([parse.node({"name": name, "capacity": {"cpu": 4, "memory": "1Gi"}}, "node") for name in ("fast", "slow", "new")], 0)
    for image in ("a", "b"):
        loads.observe(image, "fast", 10.0)
        loads.observe(image, "slow", 90.0)
    loads.observe("c", "fast", 20.0)
    expected = loads.expected_ms("c", state)
    assert expected is not None and expected[state.node_index["fast"]] == 20.0
    assert expected[state.node_index["slow"]] == pytest.approx(60.0) and expected[state.node_index["new"]] == 20.0


def test_what_is_kept_is_bounded_and_the_latest_counts() -> None:
    loads = LoadTimes()
    for number in range(MAX_IMAGES + 50):
        loads.observe(f"image-{number}", "n", 5.0)
    assert loads.cold_ms("image-0") is None and loads.cold_ms(f"image-{MAX_IMAGES + 49}") == 5.0
    for _ in range(100):
        loads.observe("x", "n", 1_000.0)
    for _ in range(LATEST):
        loads.observe("x", "n", 3.0)
    assert loads.cold_ms("x") == loads.measured_ms("x", "n") == 3.0


@given(st.dictionaries(st.sampled_from("abc"), st.dictionaries(st.sampled_from(["n1", "n2", "n3"]), st.floats(0.01, 1e5), min_size=1), max_size=3), st.floats(1.5, 50))
def test_speeds_do_not_depend_on_how_heavy_images_are(times: dict[str, dict[str, float]], factor: float) -> None:
    one = speeds({image: {node: (ms,) for node, ms in each.items()} for image, each in times.items()})
    heavier = speeds({image: {node: (ms * factor,) for node, ms in each.items()} for image, each in times.items()})
    assert one.keys() == heavier.keys() and all(math.isclose(one[node], heavier[node], rel_tol=1e-9) for node in one)
    assert all(math.isfinite(speed) and speed > 0 for speed in one.values())
